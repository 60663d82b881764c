"""The training state on disk: written beside the old one, flushed, verified, and only then pointed at.

latest/step-00000123/  model.safetensors, optimizer.safetensors, state.json, manifest.json (sha256s)
latest/pointer.json    which of the two kept ones to resume from

No pickle: tensors are safetensors, the rest is JSON. The random state is no tensor to keep: every step seeds
its generator from (seed, step), so the step number is the whole of it.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from fmcore.artifacts.files import fsync_path, fsync_tree, read_json, sha256_file, write_json
from fmcore.artifacts.store import package_versions
from fmcore.training.optimizer import load_state, state_tensors

KEPT = 2
POINTER = "pointer.json"


class TrainState(BaseModel):
    """Where a training is. step: optimizer steps done; tokens: positions fed; seconds: time spent in steps.

    threads, micro_batch, packages: what the bits of the result depend on, used again on resume.
    """

    model_config = ConfigDict(extra="forbid")
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    smoothed_loss: float | None = None
    threads: int
    micro_batch: int
    packages: dict[str, str]


class Trainee:
    """What is saved and loaded together: the trainable parameters by name, and their optimizer."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer
        self._names: dict[torch.Tensor, str] = {p: name for name, p in self.parameters.items()}

    def save(self, folder: Path) -> None:
        """Write model.safetensors and optimizer.safetensors."""
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.parameters.items()}
        save_file(tensors, folder / "model.safetensors")
        state = {name: t.cpu() for name, t in state_tensors(self.optimizer, self._names).items()}
        save_file(state, folder / "optimizer.safetensors")

    def load(self, folder: Path) -> None:
        """Read both back."""
        tensors = load_file(folder / "model.safetensors")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])
        self.load_optimizer(folder / "optimizer.safetensors")

    def load_optimizer(self, path: Path) -> None:
        """Read the optimizer's state alone."""
        load_state(self.optimizer, self._names, load_file(path))


def write_state(folder: Path, trainee: Trainee, state: TrainState) -> None:
    """Write one complete, flushed state folder in place of whatever stands at `folder`."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    trainee.save(temporary)
    write_json(temporary / "state.json", state.model_dump())
    manifest = {p.name: {"sha256": sha256_file(p), "size": p.stat().st_size} for p in sorted(temporary.iterdir())}
    write_json(temporary / "manifest.json", manifest)
    fsync_tree(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    fsync_path(folder.parent)


def save_latest(latest: Path, trainee: Trainee, state: TrainState) -> None:
    """Save, verify by reading back, then move the pointer, then drop all but the last two."""
    folder = latest / f"step-{state.step:08d}"
    write_state(folder, trainee, state)
    if problem := damage(folder):
        raise OSError(f"the state just written does not read back: {problem}")
    write_json(latest / POINTER, {"folder": folder.name})
    for old in sorted(latest.glob("step-????????"))[:-KEPT]:
        shutil.rmtree(old)


def resume_points(latest: Path) -> Iterator[Path]:
    """State folders to resume from, the pointed one first, then older ones."""
    folders = sorted(latest.glob("step-????????"), reverse=True)
    pointer = latest / POINTER
    if pointer.exists():
        pointed = latest / read_json(pointer)["folder"]
        folders = [pointed, *(f for f in folders if f.name < pointed.name)]
    yield from folders


def load_latest(latest: Path, trainee: Trainee) -> TrainState | None:
    """Load the newest state that verifies; a damaged one is named and passed over."""
    for folder in resume_points(latest):
        if problem := damage(folder):
            print(f"WARNING: {folder.name} is damaged ({problem}); going back to the state before it")
            continue
        trainee.load(folder)
        return TrainState.model_validate(read_json(folder / "state.json"))
    return None


def peek_latest(latest: Path) -> dict[str, Any] | None:
    """The state.json that a resume would start from, if there is one."""
    for folder in resume_points(latest):
        if damage(folder) is None:
            return dict(read_json(folder / "state.json"))
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a state folder, or None."""
    try:
        manifest = read_json(folder / "manifest.json")
    except (OSError, ValueError):
        return "its manifest.json cannot be read"
    for name, recorded in manifest.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != recorded["size"]:
            return f"{name} is missing or cut short"
        if sha256_file(path) != recorded["sha256"]:
            return f"{name} does not match its sha256"
    return None


def initial_state(threads: int, micro_batch: int) -> TrainState:
    """The state before the first step."""
    return TrainState(threads=threads, micro_batch=micro_batch, packages=package_versions())
