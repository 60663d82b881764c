"""The artifact store: the truth about what is done.

`<home>/artifacts/<kind>/<name>-<first 8 hex>/` is built in `<path>.partial/` under a lock; files are
flushed, `artifact.json` is written last, then one rename. Its presence means complete.
"""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from fmcore.artifacts.files import (
    DigestCache,
    canonical_json,
    fsync_path,
    fsync_tree,
    read_json,
    sha256_file,
    sha256_text,
    write_json,
)
from fmcore.artifacts.lock import exclusive
from fmcore.artifacts.step import Step
from fmcore.artifacts.types import ARTIFACT_TYPES, Artifact
from fmcore.errors import IntegrityError, StoreError

RECORD = "artifact.json"
DIGESTS = Path("cache", "digests.json")  # below the home
MARKER = "building.json"  # in a partial folder: whose it is
RECORD_FORMAT = 1
RECORDED_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "numpy", "pyarrow", "strata")
ArtifactT = TypeVar("ArtifactT", bound=Artifact)

# What a builder returns: the class's own fields and `counts`.
Fields = dict[str, Any]


class Building:
    """Where a builder writes: `path` (the partial folder) and the lock's descriptor for its child."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.lock = lock


class Store:
    """Finds, builds, opens and verifies the artifacts below one home folder."""

    def __init__(self, home: Path, *, rehash: bool = False) -> None:
        self.home = home
        self.root = home / "artifacts"
        self._digests = DigestCache(home / DIGESTS, rehash=rehash)

    @property
    def digests(self) -> DigestCache:
        """The sha256 cache, shared with the readers of sources."""
        return self._digests

    def find(self, step: Step, cls: type[ArtifactT]) -> ArtifactT | None:
        """The complete artifact that this step would make, or None."""
        return self.find_fingerprint(step.fingerprint, cls)

    def find_fingerprint(self, fingerprint: str, cls: type[ArtifactT]) -> ArtifactT | None:
        """The complete artifact of that fingerprint and class, under whatever name it was built."""
        for folder in (self.root / cls.kind).glob(f"*-{fingerprint[:8]}*"):
            if (folder / RECORD).exists() and not folder.name.endswith(".partial"):
                artifact = load(folder, cls)
                if artifact.fingerprint == fingerprint:
                    return artifact
        return None

    def get(self, fingerprint: str, cls: type[ArtifactT]) -> ArtifactT:
        """Like `find_fingerprint`, for an artifact that has to be there."""
        found = self.find_fingerprint(fingerprint, cls)
        if found is None:
            raise StoreError(
                f"{cls.kind} artifact {fingerprint[:8]} is not in {self.root}: it was removed, or this is "
                f"another STRATA_HOME than the one it was made in. Run its recipe again to rebuild it."
            )
        return found

    def partial_of(self, fingerprint: str, cls: type[ArtifactT]) -> Path | None:
        """The folder in which an artifact of that fingerprint is being built, or was when its builder stopped."""
        for marker in (self.root / cls.kind).glob(f"*-{fingerprint[:8]}*.partial/{MARKER}"):
            if read_json(marker)["fingerprint"] == fingerprint:
                return marker.parent
        return None

    def all(self, cls: type[ArtifactT]) -> Iterator[ArtifactT]:
        """Every complete artifact of a class, oldest first."""
        records = [p for p in (self.root / cls.kind).glob(f"*/{RECORD}") if p.parent.suffix != ".partial"]
        for record in sorted(records, key=lambda p: p.stat().st_mtime_ns):
            yield load(record.parent, cls)

    def path_for(self, step: Step) -> Path:
        """Where the step's artifact stands once it is built."""
        path = self.root / step.kind / f"{step.name}-{step.fingerprint[:8]}"
        if (path / RECORD).exists() and read_json(path / RECORD)["fingerprint"] != step.fingerprint:
            return path.with_name(f"{step.name}-{step.fingerprint[:16]}")  # two identities share 8 digits
        return path

    def lock_path(self, kind: str, fingerprint: str) -> Path:
        """The lock file that whoever builds or removes the artifact holds."""
        return self.root / kind / ".locks" / fingerprint[:16]

    def build(
        self,
        step: Step,
        cls: type[ArtifactT],
        builder: Callable[[Building], Fields],
        *,
        resumable: bool = False,
        on_wait: Callable[[str], None] | None = None,
    ) -> ArtifactT:
        """Build the step's artifact, or wait for whoever builds it and take theirs.

        builder: fills `building.path` and returns the class's fields and `counts`.
        resumable: keep what an interrupted builder of the same identity left behind; otherwise the
        partial folder starts empty.
        """
        with exclusive(self.lock_path(step.kind, step.fingerprint), on_wait=on_wait) as descriptor:
            if done := self.find(step, cls):
                return done
            path = self.path_for(step)
            partial = path.with_name(path.name + ".partial")
            _claim(partial, step, keep=resumable)
            try:
                fields = builder(Building(partial, descriptor))
            except BaseException:
                if not resumable:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            self._complete(step, cls, partial, fields)
            if path.exists():  # without a record: it was being removed
                shutil.rmtree(path)
            partial.replace(path)
            (path / MARKER).unlink(missing_ok=True)  # last, for until the rename the partial can be resumed
            fsync_path(path.parent)
            return load(path, cls)

    def _complete(self, step: Step, cls: type[ArtifactT], partial: Path, fields: Fields) -> None:
        artifact = cls(
            path=partial, name=step.name, fingerprint=step.fingerprint, config=step.config,
            parents=step.parents, **fields,
        )  # fmt: skip
        fsync_tree(partial)
        record = {
            "format": RECORD_FORMAT,
            "kind": step.kind,
            **artifact.model_dump(mode="json"),
            "code_version": step.code_version,
            "files": _inventory(partial),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "git_commit": git_commit(),
            "packages": package_versions(),
        }
        write_json(partial / RECORD, {**record, "record_sha256": record_digest(record)})

    def discard_partial(self, step: Step) -> None:
        """Drop what an interrupted builder of this step left behind."""
        path = self.path_for(step)
        with exclusive(self.lock_path(step.kind, step.fingerprint)):
            shutil.rmtree(path.with_name(path.name + ".partial"), ignore_errors=True)

    def remove(self, artifact: Artifact) -> None:
        """Take an artifact out, record first, so that no reader takes the rest for complete."""
        (artifact.path / RECORD).unlink()
        shutil.rmtree(artifact.path)

    def check(self, artifact: ArtifactT) -> ArtifactT:
        """Compare every file with its recorded sha256 (cached by size and mtime) before it is read.

        Raises IntegrityError, naming the first file that is missing or differs.
        """
        for problem in self.problems(artifact.path):
            raise IntegrityError(problem)
        return artifact

    def problems(self, folder: Path, *, only: str = "") -> Iterator[str]:
        """One sentence for every file below an artifact's folder, or the one named, that is not as it was recorded."""
        try:
            files = _read_record(folder)["files"]
        except IntegrityError as error:
            yield str(error)
            return
        for name, recorded in files.items():
            path = folder / name
            if only and name != only:
                continue
            if not path.is_file():
                yield f"{path} is missing. Remove the folder {folder} and run its recipe again."
            elif path.stat().st_size != recorded["size"] or self._digests.sha256(path) != recorded["sha256"]:
                yield (
                    f"{path} is damaged: its bytes do not match the sha256 recorded in {folder / RECORD}. "
                    f"Remove the folder {folder} and run its recipe again."
                )
        self._digests.save()


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = read_json(folder / RECORD)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{folder / RECORD} cannot be read ({error}); remove the folder {folder}") from error
    if record.get("record_sha256") != record_digest(record):
        raise IntegrityError(f"{folder / RECORD} is damaged: it does not match its own sha256; remove {folder}")
    return record


def load(folder: Path, cls: type[ArtifactT]) -> ArtifactT:
    """Read an artifact's record; refuses a folder of another class."""
    record = _read_record(folder)
    if record.get("kind") != cls.kind:
        raise StoreError(f"{folder} holds {record.get('kind')!r}, expected {cls.kind!r}")
    fields = {name: record[name] for name in cls.model_fields if name in record}
    return cls(path=folder, **fields)


def record_digest(record: dict[str, Any]) -> str:
    """The sha256 of an artifact's record, which the record itself carries as `record_sha256`."""
    return sha256_text(canonical_json({key: value for key, value in record.items() if key != "record_sha256"}))


def load_any(folder: Path) -> Artifact:
    """Read an artifact of whatever class its record names."""
    if not (folder / RECORD).is_file():
        raise StoreError(f"{folder} is no artifact: it has no {RECORD}")
    return load(folder, ARTIFACT_TYPES[_read_record(folder)["kind"]])


def _claim(partial: Path, step: Step, *, keep: bool) -> None:
    marker = partial / MARKER
    same = marker.exists() and read_json(marker)["fingerprint"] == step.fingerprint
    if partial.exists() and not (keep and same):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    for left in partial.glob(f"{RECORD}*"):  # stopped between the record and the rename
        left.unlink()
    write_json(marker, {"fingerprint": step.fingerprint, "config": step.config, "parents": step.parents})


def _inventory(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MARKER)
    return {p.relative_to(folder).as_posix(): {"sha256": sha256_file(p), "size": p.stat().st_size} for p in files}


@cache
def git_commit() -> str | None:
    """The commit of the checkout this package runs from, if it is one (an installed copy is not)."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split("\n")
    return lines[1] if done.returncode == 0 and Path(lines[0]) == root else None


@cache
def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result's bytes."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
