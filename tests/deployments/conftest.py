"""The command line inside the test process: quick, and with the exit code and messages that a user gets."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Said(NamedTuple):
    """What a command answered."""

    code: int
    out: str
    err: str


Cli = Callable[..., Said]


@pytest.fixture
def environment_kept() -> Iterator[None]:
    """Commands prepare the environment for Prefect and MLflow; the next test has the old one again."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def cli(
    environment_kept: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Cli:
    """cli(home, *arguments), run in a working directory of the test's own."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")

    def call(home: Any, *arguments: object) -> Said:
        from deployments.cli import main

        os.environ["STRATA_HOME"] = str(home.path)
        monkeypatch.setattr(sys, "argv", ["strata", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return Said(code, out, err)

    return call
