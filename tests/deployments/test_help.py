"""Help, completion, version, and how errors are told."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from deployments.cli import app
from fmcore.errors import DataError

COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]
SCRIPT = Path(sys.executable).with_name("strata")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_and_describes_its_options(cli: Any, fresh_home: Any, command: str) -> None:
    said = cli(fresh_home, command, "--help")
    assert said.code == 0
    example = said.out.partition("Example: ")[2]
    assert f"strata {command}" in example.partition("Options")[0]
    for parameter in get_command(app).commands[command].params:  # type: ignore[attr-defined]
        assert getattr(parameter, "help", None), f"{command}: {parameter.name} says nothing of itself"


def test_help_lists_exit_codes_and_version_is_the_packages(cli: Any, fresh_home: Any) -> None:
    said = cli(fresh_home, "--help")
    for code in ("0 done", "1 failed", "2 bad input", "3 the gate", "75 interrupted"):
        assert code in said.out
    assert cli(fresh_home, "--version").out.startswith("strata ")
    assert cli(fresh_home).out  # no arguments: help


@pytest.mark.parametrize("arguments", [["--help"], ["init", "--help"], ["--version"]])
def test_what_only_talks_imports_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [str(SCRIPT), *arguments], env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    imported = {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "mlflow", "prefect", "peft", "numpy", "pyarrow"}


def complete(line: str, home: Path, cwd: Path) -> tuple[list[str], str]:
    """What bash is offered after a line, and what was imported for it."""
    environment = {
        **os.environ, "STRATA_HOME": str(home), "_STRATA_COMPLETE": "complete_bash", "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1), "PYTHONPROFILEIMPORTTIME": "1",
    }  # fmt: skip
    done = subprocess.run(
        [str(SCRIPT)], env=environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout.split(), done.stderr


def test_completion_offers_recipes_models_and_commands(base_home: Any, tmp_path: Path) -> None:
    (tmp_path / "plays.yaml").write_text("")
    (tmp_path / "plays.txt").write_text("")
    (tmp_path / "recipes").mkdir()
    offered, imported = complete("strata run p", base_home.path, tmp_path)
    assert offered == ["plays.yaml"]
    assert "torch" not in imported
    assert "mlflow" not in imported
    assert set(complete("strata run ", base_home.path, tmp_path)[0]) == {"plays.yaml", "recipes/"}
    assert complete("strata lineage pl", base_home.path, tmp_path)[0] == ["plays/1", "plays@champion"]
    assert complete("strata lin", base_home.path, tmp_path)[0] == ["lineage"]
    assert complete("strata lineage x", tmp_path / "nowhere", tmp_path)[0] == []


def test_an_error_of_ours_is_one_message_and_debug_shows_where(
    cli: Any, fresh_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = cli(fresh_home, "plan", "nowhere.yaml")
    assert (said.code, len(said.err.strip().splitlines())) == (2, 1)
    monkeypatch.setenv("STRATA_DEBUG", "1")
    with pytest.raises(AssertionError, match="Traceback"):
        cli(fresh_home, "plan", "nowhere.yaml")


def test_a_bug_is_one_line_and_its_traceback_is_kept(
    cli: Any, fresh_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("deployments.models.print_models", broken)
    said = cli(fresh_home, "list")
    log = fresh_home.path / "logs" / "errors.log"
    assert said.code == 1
    assert said.err.strip() == f"error: unexpected ZeroDivisionError: first line; the traceback is in {log}"
    assert "raise ZeroDivisionError" in log.read_text()


def test_brackets_in_a_message_are_shown_as_they_are(
    cli: Any, fresh_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise DataError("file[3]: [bold]no[/bold] markup")

    monkeypatch.setattr("deployments.models.print_models", broken)
    said = cli(fresh_home, "list")
    assert (said.code, said.err.strip()) == (2, "error: file[3]: [bold]no[/bold] markup")
