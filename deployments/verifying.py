"""`strata verify`: every byte of artifacts against its recorded sha256."""

from pathlib import Path

from rich.console import Console

from fmcore.artifacts.store import RECORD, Store
from fmcore.errors import IntegrityError
from fmcore.workspace import Workspace


def verify_artifacts(path: Path | None, console: Console) -> None:
    """Check one folder, or all of the home's. Raises IntegrityError where one is damaged."""
    store = Store(Workspace.current().home, rehash=True)
    folders = [path] if path else sorted(p.parent for p in store.root.glob(f"*/*/{RECORD}"))
    damaged = 0
    for folder in folders:
        problems = list(store.problems(folder)) if (folder / RECORD).is_file() else [f"{folder} has no {RECORD}"]
        damaged += bool(problems)
        console.print(f"{folder.name}: {'intact' if not problems else 'DAMAGED'}", highlight=False)
        for problem in problems:
            console.print(f"  {problem}", highlight=False, soft_wrap=True)
    if damaged:
        raise IntegrityError(f"{damaged} of {len(folders)} artifacts are damaged")
    console.print(f"{len(folders)} artifacts, every file matches its sha256")
