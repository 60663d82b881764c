"""What nothing reaches any more: found by following the parents that records name, and taken out record first.

Kept is whatever the roots reach: registered versions with their whole lineage (so that replay finds its
shards), the champions they were compared with, and what unfinished runs have made so far.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fmcore.artifacts.files import read_json
from fmcore.artifacts.lock import exclusive_if_free
from fmcore.artifacts.store import MARKER, RECORD, Store
from fmcore.artifacts.types import ARTIFACT_TYPES, Artifact, RegisteredModel

PARTIAL = ".partial"


@dataclass(frozen=True)
class Roots:
    """Where reaching begins: fingerprints of artifacts, and of the steps that unfinished runs are about to make.

    all_partials: keep every half-built artifact, for a run whose steps are not known.
    """

    artifacts: frozenset[str]
    steps: frozenset[str]
    all_partials: bool = False


@dataclass(frozen=True)
class Garbage:
    """A folder to remove. fingerprint: empty for what an interrupted removal left behind."""

    path: Path
    kind: str
    fingerprint: str
    num_bytes: int

    @property
    def label(self) -> str:
        """As it is printed: kind/name."""
        return f"{self.kind}/{self.path.name}"


@dataclass(frozen=True)
class _Folder:
    """A folder of the store, complete or not, and what it was made from."""

    path: Path
    kind: str
    fingerprint: str
    above: tuple[str, ...]
    complete: bool


def find_garbage(store: Store, roots: Roots) -> list[Garbage]:
    """Everything that no root reaches, what was made last first. Raises IntegrityError for a damaged record."""
    folders = list(_folders(store))
    kept = _reached(folders, roots)
    wanted = {f.fingerprint for f in folders if not f.complete} if roots.all_partials else roots.steps
    unwanted = [f for f in folders if f.fingerprint not in (kept if f.complete else wanted)]
    order = list(ARTIFACT_TYPES)
    unwanted.sort(key=lambda f: (order.index(f.kind), f.path.stat().st_mtime_ns), reverse=True)
    return [Garbage(f.path, f.kind, f.fingerprint, _num_bytes(f.path)) for f in unwanted]


def _folders(store: Store) -> Iterator[_Folder]:
    for kind, cls in ARTIFACT_TYPES.items():
        complete = {artifact.path.name: artifact for artifact in store.all(cls)}
        for path in sorted((store.root / kind).glob("[!.]*")):
            if path.name in complete:
                artifact = complete[path.name]
                yield _Folder(path, kind, artifact.fingerprint, _above(artifact), complete=True)
            elif path.is_dir():
                marker = read_json(path / MARKER) if (path / MARKER).is_file() else {}
                above = tuple(marker.get("parents", {}).values())
                yield _Folder(path, kind, marker.get("fingerprint", ""), above, complete=False)


def _above(artifact: Artifact) -> tuple[str, ...]:
    before = (artifact.predecessor,) if isinstance(artifact, RegisteredModel) and artifact.predecessor else ()
    return (*artifact.parents.values(), *before)


def _reached(folders: Iterable[_Folder], roots: Roots) -> set[str]:
    above: dict[str, tuple[str, ...]] = {}
    open_steps: list[str] = []
    for folder in folders:
        above[folder.fingerprint] = (*above.get(folder.fingerprint, ()), *folder.above)
        if not folder.complete and (roots.all_partials or folder.fingerprint in roots.steps):
            open_steps.append(folder.fingerprint)
    reached: set[str] = set()
    queue = [*roots.artifacts, *roots.steps, *open_steps]
    while queue:
        fingerprint = queue.pop()
        if fingerprint not in reached:
            reached.add(fingerprint)
            queue += above.get(fingerprint, ())
    return reached


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def remove_garbage(store: Store, garbage: Garbage, *, is_wanted: Callable[[str], bool]) -> bool:
    """Take one folder out, unless somebody is building it or has come to want it; whether it was taken out.

    The record goes first: killed in the middle, what is left counts as nothing, and is found again.
    is_wanted: asked under the lock, for runs that have begun since the garbage was found.
    """
    if not garbage.fingerprint:
        shutil.rmtree(garbage.path, ignore_errors=True)
        return True
    with exclusive_if_free(store.lock_path(garbage.kind, garbage.fingerprint)) as held:
        if not held or is_wanted(garbage.fingerprint):
            return False
        (garbage.path / RECORD).unlink(missing_ok=True)
        shutil.rmtree(garbage.path, ignore_errors=True)
    return True
