"""What is saved and loaded together, weights and optimizer state, as safetensors of one process or of many."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as read_into
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fmcore.training.optimizer import empty_state, load_state, state_tensors

SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # as torch.distributed.checkpoint's safetensors reader expects


class Snapshot(NamedTuple):
    """Weights and optimizer state by name, on the CPU, apart from those that training goes on to change.

    What this process holds of them, or the whole. offsets: of what is a part, where it begins in the whole.
    """

    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    offsets: dict[str, list[int]]

    def write(self, folder: Path, part: str = "") -> list[Path]:
        """Write model<part>.safetensors and optimizer<part>.safetensors."""
        written = []
        for kind, tensors in (("model", self.model), ("optimizer", self.optimizer)):
            path = folder / f"{kind}{part}.safetensors"
            save_file(tensors, path, self._header(tensors) if part else None)
            written.append(path)
        return written

    def _header(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        places = {name: {OFFSETS: self.offsets.get(name, [0] * tensors[name].ndim)} for name in tensors}
        return {SHARDING: json.dumps(places)}


class Trainee:
    """What is saved and loaded together: the trainable parameters by name, and their optimizers."""

    def __init__(self, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizers = optimizers
        self._names: dict[torch.Tensor, str] = {p: name for name, p in self.parameters.items()}
        self._snapshot = Snapshot({}, {}, {})

    def snapshot(self, *, first: bool = True) -> Snapshot:
        """A copy in memory that the next one takes again: write it before you ask for another.

        first: whether this process keeps what all of them have the same.
        """
        state = state_tensors(self.optimizers, self._names)
        model = _own(self.parameters, self._snapshot.offsets, first=first)
        _copy(model, self._snapshot.model)
        _copy(_own(state, self._snapshot.offsets, first=first), self._snapshot.optimizer)
        return self._snapshot

    def whole(self, *, keep: bool = True) -> Snapshot:
        """All of it, put together from all processes, which have to ask at the same time; keep: for which of them."""
        state = state_tensors(self.optimizers, self._names)
        return Snapshot(self.weights(keep=keep), _gathered(state, keep=keep), {})

    def weights(self, *, keep: bool = True) -> dict[str, torch.Tensor]:
        """The parameters alone, put together as `whole` does."""
        return _gathered(self.parameters, keep=keep)

    def load(self, folder: Path) -> None:
        """Read weights and optimizer state back, as much of them as this process holds."""
        _read(folder, {name: parameter.detach() for name, parameter in self.parameters.items()})
        self.load_optimizer(folder)

    def load_optimizer(self, folder: Path) -> None:
        """Read the optimizer's state alone; parameters that had none when it was written get none."""
        reader = HuggingFaceStorageReader(str(folder))
        state = empty_state(self.parameters, reader.read_metadata().state_dict_metadata)
        _read(folder, state)
        load_state(self.optimizers, self._names, state)


def _read(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors from the safetensors files of a folder, whoever wrote them, of however many processes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads for itself
        if tensors:
            read_into(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def _own(tensors: Mapping[str, torch.Tensor], offsets: dict[str, list[int]], *, first: bool) -> dict[str, torch.Tensor]:
    """What this process is to write, and where in the whole it begins."""
    own = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            local = tensor.to_local()
            if local.numel():
                _, begin = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
                own[name], offsets[name] = local, list(begin)
        elif first:
            own[name] = tensor
    return own


def _gathered(tensors: Mapping[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full.detach().to("cpu", copy=True).contiguous()
    return whole


def _copy(source: Mapping[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    for name in target.keys() - source.keys():
        del target[name]
    with torch.no_grad():
        for name, tensor in source.items():
            if name not in target:  # pinned, which a GPU fills several times as fast
                target[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            target[name].copy_(tensor, non_blocking=True)
    if any(tensor.is_cuda for tensor in source.values()):
        torch.cuda.synchronize()
