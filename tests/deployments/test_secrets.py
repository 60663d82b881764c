"""Secrets planted in the environment: no file of the home, no output and no row of a database holds one."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
PATIENCE_S = 500
# the value that must be found nowhere -> the variables it is planted in
PLANTED = {
    "Kf7+planted/aws/secret4711": {"AWS_SECRET_ACCESS_KEY": "{}", "AWS_ACCESS_KEY_ID": "AKIAPLANTED"},
    "hf_PlantedHubToken4712": {"HF_TOKEN": "{}"},
    "Planted-mlflow-pw-4713": {"MLFLOW_TRACKING_USERNAME": "svc", "MLFLOW_TRACKING_PASSWORD": "{}"},
    "Planted-mlflow-token-4714": {"MLFLOW_TRACKING_TOKEN": "{}"},
    "Planted-prefect-auth-4715": {
        "PREFECT_API_AUTH_STRING": "admin:{}", "PREFECT_SERVER_API_AUTH_STRING": "admin:{}",
    },
    "Planted-proxy-pw-4716": {"HTTPS_PROXY": "http://me:{}@127.0.0.1:9", "NO_PROXY": "127.0.0.1,localhost"},
    "Planted-s3-endpoint-4717": {"AWS_ENDPOINT_URL": "http://key:{}@127.0.0.1:9"},
    "Planted-database-pw-4718": {"WAREHOUSE": "postgresql://me:{}@db.internal/x"},
    "Planted-uri-pw-4719": {},  # of the tracking address, where a test sets it
}  # fmt: skip
URI_SECRET = "Planted-uri-pw-4719"
# What a library raises in a training process: an address with its password, and a bare token.
BOOBY_TRAP = """
import os, sys
if "fmcore.training.child" in sys.orig_argv:
    import fmcore.training.loop as loop

    def refuse(*given):
        sys.stderr.write("retrying " + os.environ["WAREHOUSE"] + chr(10))
        raise ConnectionError(os.environ["AWS_ENDPOINT_URL"] + " refused " + os.environ["HF_TOKEN"])

    loop.step_seed = refuse
"""


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for secret, variables in PLANTED.items():
        for name, value in variables.items():
            monkeypatch.setenv(name, value.format(secret))


@pytest.fixture
def dead() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://svc:{URI_SECRET}@127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def strata(planted: None, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    def call(home: Any, *arguments: object, **more: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "STRATA_HOME": str(home.path), "COLUMNS": "200", **more}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "deployments.cli", *map(str, arguments)], env=environment, cwd=tmp_path,
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        (home.path / f"output-{len(list(home.path.glob('output-*')))}.txt").write_text(done.stdout + done.stderr)
        return done

    return call


def holders(home: Any) -> Iterator[tuple[str, Path]]:
    """(secret, file) for every file below the home that holds one; databases are files, too."""
    for path in sorted(p for p in home.path.rglob("*") if p.is_file()):
        content = path.read_bytes()
        for secret in PLANTED:
            spellings = {secret, json.dumps(secret)[1:-1], secret.replace("/", "%2F").replace("+", "%2B")}
            if any(spelling.encode() in content for spelling in spellings):
                yield secret, path


def assert_clean(home: Any) -> None:
    found = [f"{path.relative_to(home.path)} holds {secret}" for secret, path in holders(home)]
    assert found == []


def test_the_search_would_find_one(base_home: Any, tmp_path: Path) -> None:
    """The positive control: each secret in a text file, and one in a database."""

    class Home:
        path = tmp_path

    for number, secret in enumerate(PLANTED):
        (tmp_path / f"{number}.log").write_text(f"before {secret} after")
    assert {secret for secret, _ in holders(Home)} == set(PLANTED)
    import sqlite3

    with sqlite3.connect(tmp_path / "x.db") as database:
        database.execute("create table log (message text)")
        database.execute("insert into log values (?)", (URI_SECRET,))
    assert (URI_SECRET, tmp_path / "x.db") in list(holders(Home))


def test_runs_that_succeed_and_runs_that_fail(
    strata: Callable[..., subprocess.CompletedProcess], fresh_home: Any, tiny: Any, corpora: dict[str, Path],
    tmp_path: Path, dead: str,
) -> None:  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tiny.pretrain(corpora["old"])))
    done = strata(fresh_home, "run", recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_clean(fresh_home)

    # a training process that dies of an error that names its address and token
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "sitecustomize.py").write_text(BOOBY_TRAP)
    path = os.pathsep.join([str(trap), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = strata(fresh_home, "run", recipe, "--set", "seed=1", PYTHONPATH=path)
    assert done.returncode == 1
    assert "http://127.0.0.1:9 refused ***" in done.stdout + done.stderr
    [log] = (fresh_home.path / "artifacts" / "checkpoint").glob("*.partial/log.txt")
    assert "retrying postgresql://db.internal/x" in log.read_text()
    assert_clean(fresh_home)

    # a tracking server that is away, its password in the address
    done = strata(fresh_home, "run", recipe, "--set", "seed=2", MLFLOW_TRACKING_URI=dead)
    assert done.returncode == 1
    host = dead.rpartition("@")[2]
    assert re.search(rf"not registered: MLflow at http://{host} does not answer", done.stderr)
    assert strata(fresh_home, "sync", MLFLOW_TRACKING_URI=dead).returncode == 1
    assert strata(fresh_home, "list", MLFLOW_TRACKING_URI=dead).returncode == 1
    assert_clean(fresh_home)
    done = strata(fresh_home, "sync")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "registered as plays/2" in done.stdout
    assert_clean(fresh_home)


def test_a_prefect_database_that_is_away(
    strata: Callable[..., subprocess.CompletedProcess], fresh_home: Any, tiny: Any, corpora: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tiny.pretrain(corpora["old"])))
    address = f"postgresql+asyncpg://svc:{URI_SECRET}@127.0.0.1:9/prefect"
    done = strata(fresh_home, "run", recipe, PREFECT_API_DATABASE_CONNECTION_URL=address)
    assert done.returncode == 1
    assert "did not start" in done.stderr
    assert_clean(fresh_home)
