"""The training state on disk: written beside the old one, flushed, verified, and only then pointed at.

latest/step-00000123/  model.safetensors, optimizer.safetensors, state.json, manifest.json (sha256s)
                       of several processes a pair of files each, in the format of torch.distributed.checkpoint's
                       safetensors writer: what each holds of the parameters says its header. Any number of
                       processes reads them
                       after going back: step-00000123-1, so that no state is ever replaced by another
latest/pointer.json    which of the kept ones to resume from, the sha256 of each one's manifest, and its own

Kept are the last two, and the last two anchors, which training goes back to when it goes wrong.

No pickle: tensors are safetensors, the rest is JSON. The random state is no tensor to keep: every step seeds
its generator from (seed, step), so the step number is the whole of it.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from fmcore.artifacts.files import (
    as_json,
    canonical_json,
    fsync_path,
    fsync_tree,
    read_json,
    sha256_file,
    sha256_text,
    write_json,
)
from fmcore.artifacts.store import package_versions
from fmcore.training.health import Health
from fmcore.training.parallel import ALONE, Processes
from fmcore.training.trainee import Snapshot, Trainee

KEPT = 2
POINTER = "pointer.json"
MANIFEST = "manifest.json"
STATE = "state.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})(?:-(\d+))?")  # step, and how often training had gone back before it


class Effort(BaseModel):
    """What a training has cost, all attempts together; going back does not undo it.

    wall_s: seconds that training processes ran, from when their model stood; data_wait_s, save_stall_s: of those,
    in which nothing was computed for want of data, or for a save. lost_steps: computed, and gone back over.
    """

    model_config = ConfigDict(extra="forbid")
    wall_s: float = 0.0
    data_wait_s: float = 0.0
    save_stall_s: float = 0.0
    saves: int = 0
    restarts: int = 0
    lost_steps: int = 0


class TrainState(BaseModel):
    """Where a training is. step: optimizer steps done; tokens: positions fed; seconds: time spent in those steps.

    health: of the steps before. processes, threads (of each), micro_batch, compiled (the decoder's layers), packages:
    what the bits of the result depend on, used again on resume.
    """

    model_config = ConfigDict(extra="forbid")
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    smoothed_loss: float | None = None
    health: Health = Health()
    effort: Effort = Effort()
    processes: int = 1
    threads: int
    micro_batch: int
    compiled: bool
    packages: dict[str, str]

    def become(self, other: "TrainState") -> None:
        """Take over all of another state's values, but what was spent and how this attempt runs."""
        for name in TrainState.model_fields.keys() - {"effort", "processes", "compiled"}:
            setattr(self, name, getattr(other, name))


def write_state(folder: Path, snapshot: Snapshot, state: TrainState, processes: Processes = ALONE) -> str:
    """Write one complete, flushed state folder in place of whatever stands at `folder`, all processes together.

    Returns the sha256 of its manifest. What cannot be finished, on a full disk, leaves nothing behind.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    part = f"-{processes.rank:05d}-of-{processes.world:05d}" if processes.world > 1 else ""
    processes.first(lambda: _empty(temporary))
    try:
        entries = processes.each(lambda: [_entry(path) for path in snapshot.write(temporary, part)])
        manifest = {name: entry for written in entries for name, entry in written}
        return processes.first(lambda: _complete(temporary, folder, state, manifest))
    except BaseException:
        if processes.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _entry(path: Path) -> tuple[str, dict[str, Any]]:
    fsync_path(path)
    return path.name, {"sha256": sha256_file(path), "size": path.stat().st_size}


def _complete(temporary: Path, folder: Path, state: TrainState, manifest: dict[str, Any]) -> str:
    write_json(temporary / STATE, state.model_dump())
    manifest[STATE] = _entry(temporary / STATE)[1]
    write_json(temporary / MANIFEST, manifest)
    fsync_tree(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    fsync_path(folder.parent)
    return sha256_file(folder / MANIFEST)


def write_latest(
    latest: Path, snapshot: Snapshot, state: TrainState, anchor_steps: int, processes: Processes = ALONE,
    held: Callable[[], Collection[str]] = tuple,
) -> None:  # fmt: skip
    """Write, verify by reading back, then move the pointer, then drop what is no longer kept.

    held: names of folders that somebody reads, and that are dropped another time.
    """
    gone_back = f"-{state.health.rollbacks}" if state.health.rollbacks else ""
    folder = latest / f"step-{state.step:08d}{gone_back}"
    digest = write_state(folder, snapshot, state, processes)
    processes.first(lambda: _point_at(folder, digest, anchor_steps, held))


def _point_at(folder: Path, digest: str, anchor_steps: int, held: Callable[[], Collection[str]]) -> None:
    latest = folder.parent
    check_written(folder, digest)
    known = {name: sha for name, sha in _manifests(latest).items() if (latest / name).is_dir()}
    known[folder.name] = digest
    # of later steps are those that were damaged, of the same step is the one that was gone back to
    whole = [folder, *(p for p in _newest_first(latest) if p.name in known and _place(p)[0] < _place(folder)[0])]
    kept = {path.name for path in (*whole[:KEPT], *[p for p in whole if is_anchor(p, anchor_steps)][:KEPT])}
    pointer = {"folder": folder.name, "manifests": {name: known[name] for name in sorted(kept)}}
    write_json(latest / POINTER, {**pointer, "sha256": sha256_text(canonical_json(pointer))})
    for old in latest.glob("step-*"):  # half-written ones too, of attempts that were killed
        if old.name not in kept and old.name not in held():
            shutil.rmtree(old)


def check_written(folder: Path, digest: str) -> None:
    """Read a state back that was just written. Raises OSError where it is not what was meant."""
    if problem := damage(folder, digest):
        raise OSError(f"the state just written does not read back: {problem}")


def _newest_first(latest: Path) -> list[Path]:
    found = (path for path in latest.glob("step-*") if STEP_FOLDER.fullmatch(path.name))
    return sorted(found, key=_place, reverse=True)


def _place(folder: Path) -> tuple[int, int]:
    """(step, how often training had gone back): where a state stands among the others."""
    match = STEP_FOLDER.fullmatch(folder.name)
    assert match
    return int(match[1]), int(match[2] or 0)


def is_anchor(folder: Path, anchor_steps: int) -> bool:
    """Whether a state folder is one that training may go back to.

    No such state is one that was saved on request after a step that was skipped: undisturbed, there would be none.
    """
    if _place(folder)[0] % anchor_steps:
        return False
    try:
        return bool(read_json(folder / STATE)["health"]["in_a_row"] == 0)
    except (OSError, ValueError, TypeError, KeyError):  # damaged, which is found when it is loaded
        return True


def _pointer(latest: Path) -> dict[str, Any]:
    """What the pointer says; nothing where it is missing or damaged."""
    try:
        text = (latest / POINTER).read_text(encoding="utf-8")
        pointer = json.loads(text)
        digest = pointer.pop("sha256")
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return {}
    same = digest == sha256_text(canonical_json(pointer)) and text == as_json({**pointer, "sha256": digest})
    return dict(pointer) if same else {}


def _manifests(latest: Path) -> dict[str, str]:
    """Folder name -> sha256 of its manifest, of the states that were verified when they were written."""
    manifests = _pointer(latest).get("manifests")
    return manifests if isinstance(manifests, dict) else {}


def resume_points(latest: Path) -> Iterator[tuple[Path, str]]:
    """(state folder, sha256 of its manifest where that is known), the pointed one first, then newest to oldest."""
    manifests, pointed = _manifests(latest), _pointer(latest).get("folder")
    folders = sorted(_newest_first(latest), key=lambda folder: folder.name != pointed)  # stable: newest first
    yield from ((folder, manifests.get(folder.name, "")) for folder in folders)


def load_latest(latest: Path, trainee: Trainee, processes: Processes = ALONE) -> TrainState | None:
    """Load the newest state that verifies; a damaged one is named and passed over."""
    if (latest / POINTER).exists() and not _manifests(latest):
        processes.say(f"WARNING: {POINTER} is damaged; looking for the newest state that is whole")
    return _load_first(resume_points(latest), trainee, processes)


def load_anchor(latest: Path, trainee: Trainee, anchor_steps: int, processes: Processes = ALONE) -> TrainState | None:
    """Load the last anchor but one, or the last where there is but one, and drop the states of later steps.

    The last may have been saved when things were going wrong already.
    """
    anchors = [point for point in resume_points(latest) if is_anchor(point[0], anchor_steps)]
    by_step = {_place(point[0])[0]: point for point in sorted(anchors, key=lambda point: _place(point[0]))}
    kept = [by_step[step] for step in sorted(by_step, reverse=True)][:KEPT]
    state = _load_first([*kept[1:], *kept[:1]], trainee, processes)
    if state is not None:
        later = [folder for folder in _newest_first(latest) if _place(folder)[0] > state.step]
        processes.first(lambda: _remove(later))
    return state


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)


def _load_first(points: Iterable[tuple[Path, str]], trainee: Trainee, processes: Processes) -> TrainState | None:
    folder = processes.first(lambda: _first_whole(points))
    if folder is None:
        return None
    trainee.load(folder)
    return TrainState.model_validate(read_json(folder / STATE))


def _first_whole(points: Iterable[tuple[Path, str]]) -> Path | None:
    for folder, digest in points:
        problem = damage(folder, digest)
        if problem is None:
            return folder
        print(f"WARNING: {folder.name} is damaged ({problem}); going back to the state before it", flush=True)
    return None


def peek_latest(latest: Path) -> dict[str, Any] | None:
    """The state.json that a resume would start from, if there is one."""
    for folder, digest in resume_points(latest):
        if damage(folder, digest) is None:
            return dict(read_json(folder / STATE))
    return None


def damage(folder: Path, digest: str = "") -> str | None:
    """What is wrong with a state folder, or None. digest: of its manifest, where that is known."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = [(name, recorded["sha256"], recorded["size"]) for name, recorded in manifest.items()]
        matches = not digest or sha256_file(folder / MANIFEST) == digest
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return f"its {MANIFEST} cannot be read"
    if not matches:
        return f"{MANIFEST} does not match its sha256"
    for name, sha256, size in files:
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or cut short"
        if sha256_file(path) != sha256:
            return f"{name} does not match its sha256"
    return None


def initial_state(threads: int, micro_batch: int, processes: int = 1, *, compiled: bool = False) -> TrainState:
    """The state before the first step."""
    return TrainState(
        processes=processes, threads=threads, micro_batch=micro_batch, compiled=compiled, packages=package_versions()
    )
