"""The record of one tracked run, written into the home before MLflow is asked for anything.

From it and the artifacts, `strata sync` can say to any server what a run should hold, and how it ended.
"""

import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fmcore.artifacts.files import read_json, write_json
from fmcore.artifacts.lock import exclusive
from fmcore.artifacts.step import Step


@dataclass(frozen=True)
class TrackingRecord:
    """One run as it should stand in MLflow.

    identity: fingerprint of what the run makes. name, tags, recipe: the run's, without credentials. address:
    where it was first tracked, without credentials. key: by which the run is found again on any server.
    status: RUNNING, FINISHED, FAILED or KILLED. started, ended: ms since 1970. step: what registering would
    make, empty for a pipeline. recipe_identity: of the recipe's own record. pipeline: identity of the run above.
    page: the Prefect run's. run_id: MLflow's, empty until there is one. complete: the run in which every row and
    value was compared.
    """

    identity: str
    name: str
    tags: dict[str, str]
    recipe: dict[str, Any]
    address: str
    key: str
    started: int
    status: str = "RUNNING"
    ended: int | None = None
    step: dict[str, Any] | None = None
    recipe_identity: str = ""
    pipeline: str = ""
    page: str | None = None
    run_id: str = ""
    complete: str = ""

    @property
    def model_step(self) -> Step | None:
        """The register step; its parents name the stage's other artifacts."""
        return Step(**self.step) if self.step else None


def now_ms() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return int(time.time() * 1000)


def record_path(runs: Path, identity: str) -> Path:
    """Where the record of an identity's run stands, in the home's folder of runs."""
    return runs / f"{identity[:16]}.mlflow.json"


def sent_path(record: Path) -> Path:
    """Where it is noted which rows of metrics.jsonl a run has."""
    return record.with_suffix(".sent.json")


def read_record(path: Path) -> TrackingRecord | None:
    """The record, or None where there is none, or one of the first release, which said too little."""
    if not path.exists():
        return None
    values = read_json(path)
    known = {field.name for field in fields(TrackingRecord)}
    if not {"key", "recipe", "started"} <= values.keys():
        return None
    return TrackingRecord(**{name: value for name, value in values.items() if name in known})


def begin_record(path: Path, **given: Any) -> TrackingRecord:
    """Write the record of a run that begins, or begins again: then it keeps its key, its run and its beginning."""
    with _changing(path):
        before = read_json(path) if path.exists() else {}
        same = before.get("identity") == given["identity"]
        kept = {name: before[name] for name in ("key", "started", "run_id") if same and name in before}
        record = TrackingRecord(**{"key": uuid.uuid4().hex, "started": now_ms(), **given, **kept})
        write_json(path, asdict(record))
    return record


def change_record(path: Path, **changes: Any) -> TrackingRecord | None:
    """Change fields of a record, whoever else may be changing others."""
    with _changing(path):
        record = read_record(path)
        if record is None:
            return None
        record = replace(record, **changes)
        write_json(path, asdict(record))
    return record


def opening(path: Path) -> Any:
    """A lock around finding or making the run in MLflow, so that two processes make one."""
    return exclusive(_lock(path, "open"))


@contextmanager
def alive(path: Path) -> Iterator[None]:
    """Show, for as long as the context lasts, that the run is at work; several may, and the kernel ends it."""
    descriptor = _open_lock(_lock(path, "alive"))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def is_alive(path: Path) -> bool:
    """Whether a process is at work on the run of this record."""
    descriptor = _open_lock(_lock(path, "alive"))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _changing(path: Path) -> Any:
    return exclusive(_lock(path, "change"))


def _lock(path: Path, what: str) -> Path:
    return path.parent / ".locks" / f"{path.name.removesuffix('.json')}.{what}"


def _open_lock(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
