"""Registrations that a registry's absence has put off: `<home>/pending/<first 16 of the model's fingerprint>.json`.

Nothing is lost by waiting: all artifacts up to the report are in the store. The same `strata run`, or
`strata sync`, registers them when the registry answers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from fmcore.artifacts.files import read_json, write_json
from fmcore.artifacts.step import Step
from fmcore.errors import TrackingError
from fmcore.tracking.record import read_record


def pending_folder(home: Path) -> Path:
    """Where pending registrations are noted."""
    return home / "pending"


@contextmanager
def noting_pending(home: Path, step: Step, record: Path) -> Iterator[None]:
    """Register inside: done, the note of an earlier attempt goes; where MLflow fails, there is one.

    Raises TrackingError, which says what happens next.
    """
    note = _note_path(home, step.fingerprint)
    try:
        yield
    except TrackingError as error:
        note.parent.mkdir(parents=True, exist_ok=True)
        tracked = read_record(record)
        write_json(note, {"identity": step.fingerprint, **(asdict(tracked) if tracked else {})})
        raise TrackingError(
            f"{step.config['model']} is trained and evaluated, but not registered: {error}. All of it is kept; "
            f"`strata sync`, or the same command again, registers it when MLflow answers."
        ) from None
    note.unlink(missing_ok=True)


def pending_identities(home: Path) -> list[str]:
    """Fingerprints of the models that wait for their registration, the longest waiting first."""
    notes = sorted(pending_folder(home).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [str(read_json(note)["identity"]) for note in notes]


def _note_path(home: Path, identity: str) -> Path:
    return pending_folder(home) / f"{identity[:16]}.json"
