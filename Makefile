# Every target first makes the environment, where .venv is missing or older than pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo demo-fast test test-all check bench up clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: setup        ## the main job: corpus, pretrain, fine-tune, continue, fine-tune again (minutes)
	$(BIN)/python -P -m deployments.demo --size full

demo-fast: setup   ## the same on a quarter of it (about two minutes)
	$(BIN)/python -P -m deployments.demo --size fast

test: setup        ## pip only, no root, minutes
	$(BIN)/python -m pytest -m "not slow"

test-all: setup    ## what needs many processes, servers, minutes; names the tests it skips for what is missing
	@command -v chromium >/dev/null || echo "no chromium: tests of the pages are skipped (apt-get install chromium)"
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || echo "no PostgreSQL: the compose test is skipped (apt-get install postgresql)"
	$(BIN)/python -m pytest -m slow

check: setup       ## style, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup       ## speed, memory and compression, as published in benchmarks/
	$(BIN)/python -P benchmarks/training_step.py --workloads tiny
	$(BIN)/python -P benchmarks/compression.py

up: setup          ## Prefect and MLflow pages of this home, and the flows to be run from them, on 127.0.0.1
	$(BIN)/strata up

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
