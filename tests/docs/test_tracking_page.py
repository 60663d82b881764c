"""The tables of stable names in docs/tracking.md are those of the code."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from deployments.running import REFUSED
from fmcore import errors
from fmcore.artifacts.types import ACCEPTED, EvalReport, Verdict
from fmcore.tracking import names, uploader
from fmcore.tracking.runs import Status

PAGE = Path(__file__).parents[2] / "docs" / "tracking.md"


def table(title: str) -> list[list[str]]:
    """The rows of the table below a line that begins with the title, without marks."""
    text = PAGE.read_text().split(f"\n{title}", 1)[1]
    rows = re.search(r"\n\|[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)+)", text)
    assert rows
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows[1].splitlines()]


def first_column(title: str) -> set[str]:
    return {row[0] for row in table(title)}


def test_tags_and_aliases() -> None:
    constants = {value for name, value in vars(names).items() if name.isupper()}
    tags = {value for value in constants if value.startswith("strata.")}
    assert first_column("Tags") == tags
    assert first_column("Aliases:") == constants - tags


def test_verdicts() -> None:
    assert first_column("Verdicts:") == set(get_args(Verdict))
    assert {row[0] for row in table("Verdicts:") if row[2] == "yes"} == set(ACCEPTED)


def test_metrics_by_step() -> None:
    by_step = {row[0] for row in table("Metrics") if row[1] == "yes"}
    assert by_step == {f"train/{name}" for name in uploader.SCALARS} | {"train/source/<source>"}


def test_metrics_of_a_real_report(base_home: Any) -> None:
    listed = first_column("Metrics")
    patterns = [re.sub(r"<\w+>", "[^/]+(/[^/]+)*", name) + "(_low|_high)?" for name in listed]
    found = [name for report in base_home.store.all(EvalReport) for name in report.metrics]
    assert found
    assert [name for name in found if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []


def test_states_and_exit_codes() -> None:
    statuses = {row[0] for row in table("States:") if row[1] == "MLflow run"}
    assert statuses == {"RUNNING", *get_args(Status)}
    for path, state in (("tasks/context.py", "Cached"), ("flows/continue_pretrain.py", "NoNewData")):
        assert f'name="{state}"' in (PAGE.parents[1] / path).read_text()
        assert state in first_column("States:")
    codes = {cls.exit_code for cls in vars(errors).values() if isinstance(cls, type)}
    assert {int(code) for code in first_column("Exit codes:")} == codes | {0, REFUSED}


@pytest.mark.parametrize("name", ["strata.verdict", "train/loss"])
def test_a_table_is_found_at_all(name: str) -> None:
    assert name in first_column("Tags") | first_column("Metrics")
