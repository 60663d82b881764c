"""What some tests need beside Python: where it is, and what to say where it is missing."""

import os
import shutil
from pathlib import Path

import pytest


def require(present: bool, reason: str) -> None:
    """Skip the test where something is missing; on CI, where everything has to be there, fail."""
    if not present:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def postgres_folder() -> Path | None:
    """The folder of PostgreSQL's server programs, as Debian installs them; the newest."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


def chromium() -> str | None:
    """The browser that the page tests drive."""
    return shutil.which("chromium")
