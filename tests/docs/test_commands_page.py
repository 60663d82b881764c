"""docs/commands.md shows every command of the command line at work."""

from itertools import pairwise
from pathlib import Path

import pytest
import typer

from deployments.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_shown_with_what_it_answers(command: str) -> None:
    blocks = [block.splitlines() for block in PAGE.read_text().split("```\n")[1::2]]
    pairs = [pair for lines in blocks for pair in pairwise(lines)]
    answers = [after for line, after in pairs if line.startswith("$ ") and f"strata {command} " in f"{line} "]
    assert [answer for answer in answers if not answer.startswith("$ ")]
