"""The processes that train one model together. One alone runs the same program, without the others."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fmcore.process.guard import TORCHRUN_VARIABLE
from fmcore.process.launch import BEGINS_VARIABLE, MEETING
from fmcore.training.layers import decoder_layers
from fmcore.training.loss import StepModel

T = TypeVar("T")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Processes:
    """What one process knows of the others, and how they add up, share and wait.

    rank: of this one, from 0; world: how many there are; device: what this one computes on.
    """

    def __init__(self, device: torch.device, rank: int = 0, world: int = 1, *, speaks: bool = True) -> None:
        self.device = device
        self.rank = rank
        self.world = world
        self._speaks = speaks
        # of the thread that writes states, whose talk must not come between two collectives of training
        self._saving = dist.new_group(backend="gloo") if world > 1 else None
        self.sharded = False  # whether the parameters are spread over the processes, be it over one

    @classmethod
    def join(cls, device: str, folder: Path, timeout_s: float) -> "Processes":
        """Meet the others that torchrun has started, if it has.

        device: auto, cpu or cuda. timeout_s: after which a process that does not answer is an error.
        """
        place = pick_device(device)
        if TORCHRUN_VARIABLE not in os.environ:
            return cls(place)
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if place.type == "cuda":
            place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(place)
        alone = os.environ["GROUP_WORLD_SIZE"] == "1"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
            init_method=f"file://{folder / MEETING / 'workers'}" if alone else "env://",
            rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip
        # torch makes any machine's process the first; who started the training reads along on one of them
        speaks = os.environ.get(BEGINS_VARIABLE, "1") == "1" and os.environ["LOCAL_RANK"] == "0"
        return cls(place, rank, world, speaks=speaks)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes what is written once."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print a line, once for all, where the training was begun."""
        if self._speaks:
            print(line, flush=True)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over all processes, by their CPUs; everyone gets the same bits."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def add(self, tensor: torch.Tensor, *values: float) -> torch.Tensor:
        """A number on the device and others, (1 + N,) float64 there, added up over all processes without waiting."""
        others = torch.tensor(values, dtype=torch.float64).to(self.device, non_blocking=True)
        total = torch.cat([tensor.to(torch.float64)[None], others])
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def each(self, work: Callable[[], T]) -> list[T]:
        """What everyone's work comes to, by rank; where one cannot write or read, all raise its error.

        By a group of its own, for the thread that writes states; training asks for it only while that one rests.
        """
        if self.world == 1:
            return [work()]
        outcome: tuple[T | None, str | OSError] = (None, "")
        try:
            outcome = (work(), "")
        except OSError as error:
            outcome = (None, error)
        except SafetensorError as error:  # which cannot be sent
            outcome = (None, OSError(str(error)))
        outcomes: list[Any] = [None] * self.world
        dist.all_gather_object(outcomes, outcome, group=self._saving)
        for _, problem in outcomes:
            if problem:
                raise problem
        return [result for result, _ in outcomes]

    def first(self, work: Callable[[], T]) -> T:
        """What the first one's work comes to, for all."""
        return cast(T, self.each(lambda: work() if self.is_first else None)[0])

    def shard(self, step: StepModel, precision: str = "fp32") -> None:
        """Spread parameters, gradients and optimizer state over all processes (FSDP2), a decoder layer at a time.

        precision: fp32, or bf16: then what is computed with are copies in bf16, of a process alone too, while
        parameters, sums of gradients and optimizer stay fp32.
        """
        if self.world == 1 and precision == "fp32":
            return
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        mesh = init_device_mesh(self.device.type, (self.world,))
        dtype = PRECISIONS[precision]
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for module in (*decoder_layers(step.model), step):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=None if self.world > 1 else False)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the labels of all: add, not average,
            module.set_force_sum_reduction_for_comms(True)  # and by a plain sum, which gloo has
        self.sharded = True

    def leave(self) -> None:
        """Part from the others, once all have come so far: torchrun ends all when one ends early."""
        if self.world > 1:
            self.first(lambda: None)
        if dist.is_initialized():
            dist.destroy_process_group()


class OnTheWay:
    """Numbers that a device has been asked to compute."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)
        self._event = torch.cuda.Event() if values.is_cuda else None
        if self._event:
            self._event.record()

    @property
    def arrived(self) -> bool:
        """Whether they are there."""
        return self._event is None or self._event.query()

    def values(self) -> list[float]:
        """Wait for them."""
        if self._event:
            self._event.synchronize()
        return self._values.tolist()


ALONE = Processes(torch.device("cpu"))


def pick_device(device: str) -> torch.device:
    """auto takes a GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
