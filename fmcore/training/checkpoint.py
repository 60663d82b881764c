"""The training state on disk: written beside the old one, flushed, verified, and only then pointed at.

latest/step-00000123/  model.safetensors, optimizer.safetensors, state.json, manifest.json (sha256s)
latest/pointer.json    which of the kept ones to resume from, and the sha256 of each one's manifest

Kept are the last two, and the last two anchors, which training goes back to when it goes wrong.

No pickle: tensors are safetensors, the rest is JSON. The random state is no tensor to keep: every step seeds
its generator from (seed, step), so the step number is the whole of it.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from fmcore.artifacts.files import fsync_path, fsync_tree, read_json, sha256_file, write_json
from fmcore.artifacts.store import package_versions
from fmcore.training.health import Health
from fmcore.training.optimizer import load_state, state_tensors

KEPT = 2
POINTER = "pointer.json"
MANIFEST = "manifest.json"


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

    health: of the steps before. threads, micro_batch, packages: what the bits of the result depend on, used again
    on resume.
    """

    model_config = ConfigDict(extra="forbid")
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    smoothed_loss: float | None = None
    health: Health = Health()
    effort: Effort = Effort()
    threads: int
    micro_batch: int
    packages: dict[str, str]

    def become(self, other: "TrainState") -> None:
        """Take over all of another state's values, but what was spent."""
        for name in TrainState.model_fields.keys() - {"effort"}:
            setattr(self, name, getattr(other, name))


class Snapshot(NamedTuple):
    """Weights and optimizer state by name, on the CPU, apart from those that training goes on to change."""

    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]

    def write(self, folder: Path) -> None:
        """Write model.safetensors and optimizer.safetensors."""
        save_file(self.model, folder / "model.safetensors")
        save_file(self.optimizer, folder / "optimizer.safetensors")


class Trainee:
    """What is saved and loaded together: the trainable parameters by name, and their optimizer."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer
        self._names: dict[torch.Tensor, str] = {p: name for name, p in self.parameters.items()}
        self._snapshot = Snapshot({}, {})

    def snapshot(self) -> Snapshot:
        """A copy in memory that the next one takes again: write it before you ask for another."""
        _copy(self.parameters, self._snapshot.model)
        _copy(state_tensors(self.optimizer, self._names), self._snapshot.optimizer)
        return self._snapshot

    def load(self, folder: Path) -> None:
        """Read weights and optimizer state back."""
        tensors = load_file(folder / "model.safetensors")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])
        self.load_optimizer(folder / "optimizer.safetensors")

    def load_optimizer(self, path: Path) -> None:
        """Read the optimizer's state alone."""
        load_state(self.optimizer, self._names, load_file(path))


def _copy(source: Mapping[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    for name in target.keys() - source.keys():
        del target[name]
    with torch.no_grad():
        for name, tensor in source.items():
            if name in target:
                target[name].copy_(tensor)
            else:
                target[name] = tensor.detach().to("cpu", copy=True).contiguous()


def write_state(folder: Path, snapshot: Snapshot, state: TrainState) -> str:
    """Write one complete, flushed state folder in place of whatever stands at `folder`.

    Returns the sha256 of its manifest. What cannot be finished, on a full disk, leaves nothing behind.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        snapshot.write(temporary)
        write_json(temporary / "state.json", state.model_dump())
        manifest = {p.name: {"sha256": sha256_file(p), "size": p.stat().st_size} for p in sorted(temporary.iterdir())}
        write_json(temporary / MANIFEST, manifest)
        fsync_tree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    fsync_path(folder.parent)
    return sha256_file(folder / MANIFEST)


def write_latest(latest: Path, snapshot: Snapshot, state: TrainState, anchor_steps: int) -> None:
    """Write, verify by reading back, then move the pointer, then drop what is no longer kept."""
    folder = latest / f"step-{state.step:08d}"
    digest = write_state(folder, snapshot, state)
    if problem := damage(folder, digest):
        raise OSError(f"the state just written does not read back: {problem}")
    known = {name: sha for name, sha in _manifests(latest).items() if (latest / name).is_dir()}
    known[folder.name] = digest
    whole = [path for path in _newest_first(latest) if path.name in known]
    kept = {path.name for path in (*whole[:KEPT], *[p for p in whole if is_anchor(p, anchor_steps)][:KEPT])}
    write_json(latest / POINTER, {"folder": folder.name, "manifests": {name: known[name] for name in sorted(kept)}})
    for old in _newest_first(latest):
        if old.name not in kept:
            shutil.rmtree(old)


def _newest_first(latest: Path) -> list[Path]:
    return sorted(latest.glob("step-????????"), reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def is_anchor(folder: Path, anchor_steps: int) -> bool:
    """Whether a state folder is one that training may go back to."""
    return _step_of(folder) % anchor_steps == 0


def _pointer(latest: Path) -> dict[str, Any]:
    """What the pointer says; nothing where it is missing or damaged."""
    try:
        pointer = read_json(latest / POINTER)
    except (OSError, ValueError):
        return {}
    return pointer if isinstance(pointer, dict) else {}


def _manifests(latest: Path) -> dict[str, str]:
    """Folder name -> sha256 of its manifest, of the states that were verified when they were written."""
    manifests = _pointer(latest).get("manifests")
    return manifests if isinstance(manifests, dict) else {}


def resume_points(latest: Path) -> Iterator[tuple[Path, str]]:
    """(state folder, sha256 of its manifest where that is known), the pointed one first, then newest to oldest."""
    manifests, pointed = _manifests(latest), _pointer(latest).get("folder")
    folders = sorted(_newest_first(latest), key=lambda folder: folder.name != pointed)
    yield from ((folder, manifests.get(folder.name, "")) for folder in folders)


def load_latest(latest: Path, trainee: Trainee) -> TrainState | None:
    """Load the newest state that verifies; a damaged one is named and passed over."""
    if (latest / POINTER).exists() and not _manifests(latest):
        print(f"WARNING: {POINTER} is damaged; looking for the newest state that is whole")
    return _load_first(resume_points(latest), trainee)


def load_anchor(latest: Path, trainee: Trainee, anchor_steps: int) -> TrainState | None:
    """Load the last anchor but one, or the last where there is but one, and drop the states of later steps.

    The last may have been saved when things were going wrong already.
    """
    anchors = [point for point in resume_points(latest) if is_anchor(point[0], anchor_steps)]
    kept = sorted(anchors, reverse=True)[:KEPT]
    state = _load_first([*kept[1:], *kept[:1]], trainee)
    if state is not None:
        for folder in _newest_first(latest):
            if _step_of(folder) > state.step:
                shutil.rmtree(folder)
    return state


def _load_first(points: Iterable[tuple[Path, str]], trainee: Trainee) -> TrainState | None:
    for folder, digest in points:
        if problem := damage(folder, digest):
            print(f"WARNING: {folder.name} is damaged ({problem}); going back to the state before it")
            continue
        trainee.load(folder)
        return TrainState.model_validate(read_json(folder / "state.json"))
    return None


def peek_latest(latest: Path) -> dict[str, Any] | None:
    """The state.json that a resume would start from, if there is one."""
    for folder, digest in resume_points(latest):
        if damage(folder, digest) is None:
            return dict(read_json(folder / "state.json"))
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


def initial_state(threads: int, micro_batch: int) -> TrainState:
    """The state before the first step."""
    return TrainState(threads=threads, micro_batch=micro_batch, packages=package_versions())
