"""Trainings to be disturbed: a driver process stands for the flow, so that the parent can be killed too."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fmcore.artifacts.files import sha256_file
from fmcore.training.checkpoint import peek_latest
from fmcore.training.metrics import read_metrics

DRIVER = Path(__file__).parent / "fmcore" / "training" / "resume_driver.py"
PATIENCE_S = 120
GRACE_S = 20.0


@dataclass(frozen=True)
class Case:
    """A home with shards and the recipe to train there."""

    home: Path
    recipe: Path

    def folder(self) -> Path | None:
        """The checkpoint's folder, partial or complete, if there is one."""
        found = sorted((self.home / "artifacts" / "checkpoint").glob("plays-*"))
        return found[0] if found else None

    def steps_done(self) -> int:
        folder = self.folder()
        rows = read_metrics(folder / "metrics.jsonl") if folder else []
        return rows[-1]["step"] if rows else 0

    def saved_step(self) -> int:
        """The step of the newest whole state; 0 before the first one after the start."""
        folder = self.folder()
        return int((peek_latest(folder / "latest") or {}).get("step", 0)) if folder else 0


def prepare(folder: Path, given: dict[str, Any]) -> Case:
    """Documents and shards of a recipe, which its trainings find done."""
    from fmcore.artifacts.store import Store
    from fmcore.data.prepare import prepare_documents
    from fmcore.planning.steps import stage_steps, tokenizer_of
    from fmcore.recipes.load import parse_recipe
    from fmcore.tokens.tokenize import tokenize_documents

    (folder / "recipe.json").write_text(json.dumps(given))
    recipe, store = parse_recipe(given), Store(folder / "home")
    steps = stage_steps(recipe, None, store.digests)
    documents = prepare_documents(steps.documents, recipe.data, None, store)
    tokenize_documents(steps.shards, documents, tokenizer_of(recipe), None, store)
    return Case(folder / "home", folder / "recipe.json")


def copy_of(case: Case, folder: Path, **execution: Any) -> Case:
    """The same in a home of its own, run in another way."""
    folder.mkdir(parents=True, exist_ok=True)
    given = json.loads(case.recipe.read_text())
    (folder / "recipe.json").write_text(json.dumps({**given, "execution": {**given["execution"], **execution}}))
    home = folder / "home"
    return Case(home if home.exists() else Path(shutil.copytree(case.home, home)), folder / "recipe.json")


def driver_of(case: Case, log: Path) -> subprocess.Popen:
    with log.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, str(DRIVER), str(case.home), str(case.recipe)], stdout=sink, stderr=subprocess.STDOUT
        )


def child_of(driver: subprocess.Popen) -> psutil.Process | None:
    try:
        found = psutil.Process(driver.pid).children()
    except psutil.NoSuchProcess:
        return None
    return next((p for p in found if "fmcore.training.child" in p.cmdline()), None)


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"{what} took over {PATIENCE_S} s")


@contextmanager
def training(case: Case, log: Path, *, until: int) -> Iterator[tuple[subprocess.Popen, psutil.Process]]:
    """Driver and child, once the child has gone `until` steps (-1: as soon as it was started)."""
    before = case.steps_done()
    driver = driver_of(case, log)
    try:
        child = wait_for(lambda: child_of(driver), "starting the child")
        if until >= 0:
            wait_for(lambda: case.steps_done() >= max(until, before + 1) or driver.poll() is not None, "training")
        yield driver, child
    finally:
        if driver.poll() is None:
            driver.kill()
        driver.wait()


def gone(process: psutil.Process) -> bool:
    """Ended; a zombie that nobody reaps in this container counts as ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def result(case: Case) -> dict[str, Any]:
    """All that has to be the same."""
    folder = case.folder()
    assert folder is not None
    assert folder.suffix != ".partial"
    digests = {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for part in ("final", "stable", "ledger", "seen")
        for path in sorted((folder / part).rglob("*"))
        # seconds spent are part of stable's state, and so of its manifest
        if path.is_file() and path.name not in ("state.json", "manifest.json")
    }
    rows = [{key: row[key] for key in row if key not in ("time", "tokens_per_sec")} for row in
            read_metrics(folder / "metrics.jsonl")]  # fmt: skip
    state = json.loads((folder / "stable" / "state.json").read_text())
    return {"digests": digests, "rows": rows, "stable": {**state, "seconds": None, "effort": None}}


def finish(case: Case, log: Path) -> dict[str, Any]:
    driver = driver_of(case, log)
    assert driver.wait(PATIENCE_S) == 0, log.read_text()
    return result(case)
