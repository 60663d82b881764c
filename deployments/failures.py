"""How an error is told on the command line: one message; the traceback only where it is asked for, or in a log."""

import os
import traceback
from contextlib import suppress
from datetime import UTC, datetime

from rich.console import Console

from fmcore.errors import Interrupted, StrataError
from fmcore.workspace import Workspace

DEBUG_VARIABLE = "STRATA_DEBUG"
LOG_NAME = "errors.log"


def report_error(error: StrataError) -> int:
    """Print an error of ours for people; returns its exit code."""
    if os.environ.get(DEBUG_VARIABLE) == "1":
        traceback.print_exception(error)
    _print(str(error), label="stopped" if isinstance(error, Interrupted) else "error")
    return error.exit_code


def report_unexpected(error: Exception) -> int:
    """Print what nobody foresaw as one line, with its traceback in the home's log; returns exit code 1."""
    if os.environ.get(DEBUG_VARIABLE) == "1":
        traceback.print_exception(error)
    first = str(error).strip().split("\n")[0]
    kept = _keep(error)
    where = f"; the traceback is in {kept}" if kept else f"; {DEBUG_VARIABLE}=1 shows the traceback"
    _print(f"unexpected {type(error).__name__}{': ' + first if first else ''}{where}")
    return 1


def _keep(error: Exception) -> str:
    """Append the traceback to `<home>/logs/errors.log`; the file's path, or nothing where it cannot be written."""
    log = Workspace.current().home / "logs" / LOG_NAME
    with suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')}\n")
            file.writelines(traceback.format_exception(error))
        return str(log)
    return ""


def _print(message: str, *, label: str = "error") -> None:
    text = message.replace("[", r"\[")
    style = "bold red" if label == "error" else "bold yellow"
    Console(stderr=True).print(f"[{style}]{label}:[/] {text}", highlight=False, soft_wrap=True)
