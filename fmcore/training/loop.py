"""The training loop, for every stage: read `Training.run` top to bottom."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from fmcore.errors import TrainingError
from fmcore.model.attention import document_boundaries
from fmcore.process.guard import Heartbeat, Stop
from fmcore.training.batches import Batch, Batches
from fmcore.training.checkpoint import TrainState
from fmcore.training.health import MAX_ROLLBACKS, Expectation
from fmcore.training.loss import Micro, StepModel, labelled
from fmcore.training.metrics import MetricsLog
from fmcore.training.optimizer import step_unless
from fmcore.training.parallel import OnTheWay, Processes
from fmcore.training.saving import Saver
from fmcore.training.spec import TrainSpec
from fmcore.training.trainee import Trainee

SMOOTHING = 0.95  # of the loss that progress shows


class Begun(NamedTuple):
    """A step that the device is at, or was: its number from 0, and what its outcome needs to be understood.

    tokens: fed so far, this step's included. outcome: loss, gradient norm, how many processes were asked to stop,
    whether a save is due.
    """

    number: int
    batch: Batch
    tokens: int
    lr: float
    expected: Expectation
    outcome: OnTheWay
    start: float


@dataclass
class Training:
    """One training, from `state` to the end.

    Killed at any moment and started again, it ends in the same bits: the batch, the rate and the random
    state of a step follow from its number alone, and all else is in the saved state. Several processes each
    take their share of a step's rows, and decide nothing but by what they have added up; log: the first one's.

    A GPU is not waited for in a step (Muon's apart): while it is at one, the outcome of the one before is read.
    """

    spec: TrainSpec
    model: StepModel
    trainee: Trainee
    batches: Batches
    state: TrainState
    saver: Saver
    log: MetricsLog | None
    stop: Stop
    heartbeat: Heartbeat
    processes: Processes
    trouble: str = ""  # why training has to go back
    stopping: bool = False
    save_due: bool = False
    skipped: bool = False  # whether the last step was
    last_save: float = field(default_factory=time.monotonic)
    last_end: float = 0.0

    def run(self) -> bool:
        """Train to the end; False if stopped before it, after saving."""
        state, num_steps = self.state, self.spec.schedule.num_steps
        saved: int = state.step
        begun: Begun | None = None
        [self.stopping] = map(bool, self.processes.sum([self.stop.requested]))
        self.model.train()
        while True:
            if begun and not self.trouble and self._has_to_know():
                self._end_step(begun)
                begun = None
            if self.trouble:
                self._go_back()
                saved, begun = state.step, None

            # save
            if state.step == num_steps:
                break
            if state.step == self.spec.schedule.stable_step and self.spec.method == "full":
                self.saver.save_stable(state)
            if self.stopping:
                if state.step != saved:
                    self.saver.save_latest(state)
                self.saver.wait()
                return False
            if (self.save_due or self.saver.is_anchor(state)) and not self.skipped and state.step != saved:
                self.saver.save_latest(state)
                saved, self.save_due, self.last_save = state.step, False, time.monotonic()

            # step, and meanwhile what the one before has come to
            following = self._begin_step(begun)
            if begun:
                self._end_step(begun)
            begun = following
        self.saver.wait()
        self.saver.count_time(state)
        return True

    @property
    def is_ahead(self) -> bool:
        """Whether a step begins before the last one has ended. A CPU has nothing else to do meanwhile."""
        return self.processes.device.type != "cpu"

    def _has_to_know(self) -> bool:
        """Whether what comes next depends on how the last step ended."""
        step = self.state.step
        return (
            not self.is_ahead or self.stopping or self.save_due or self.saver.is_anchor(self.state)
            or step in (self.spec.schedule.stable_step, self.spec.schedule.num_steps)
        )  # fmt: skip

    def _begin_step(self, before: Begun | None) -> Begun:
        """Have the device do a step. before: what it may still be at."""
        spec, state, processes = self.spec, self.state, self.processes
        start = time.perf_counter()
        torch.manual_seed(step_seed(spec.seed, state.step, processes.rank))
        batch = self.batches.at(state.step, rank=processes.rank, world=processes.world)
        [num_labels] = processes.sum([batch.num_labels])
        if before is None or before.outcome.arrived:
            state.effort.data_wait_s += time.perf_counter() - start
        lr = spec.schedule.lr(state.step)
        for group in (group for optimizer in self.trainee.optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        loss = torch.zeros((), device=processes.device)
        for micro in micro_batches(batch, state.micro_batch, processes.device, varlen=self.model.varlen):
            part = self.model(micro, max(1, num_labels))
            part.backward()
            loss += part.detach()
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(self.trainee.parameters.values(), spec.grad_clip))
        late = time.monotonic() - self.last_save >= spec.save_interval_s and not self.saver.busy and processes.is_first
        loss, stopping, due = processes.add(loss, self.stop.requested, late)
        grad_norm = grad_norm.to(loss)
        expected = state.health.begin()
        highest_loss, highest_norm = expected.limits(spec.spike_sigma)
        may = loss.isfinite() & grad_norm.isfinite() & (loss <= highest_loss) & (grad_norm <= highest_norm)
        step_unless(~may, self.trainee.optimizers)
        self.model.zero_grad(set_to_none=True)
        outcome = OnTheWay(torch.stack([loss, grad_norm, stopping, due]))
        state.step += 1
        state.tokens += batch.num_tokens
        return Begun(state.step - 1, batch, state.tokens, lr, expected, outcome, start)

    def _end_step(self, begun: Begun) -> None:
        """Learn what a step has come to, and write it down."""
        spec, state = self.spec, self.state
        loss, grad_norm, stopping, due = begun.outcome.values()
        problem = begun.expected.problem(loss, grad_norm, spec.spike_sigma)
        now = time.perf_counter()
        seconds = now - max(begun.start, self.last_end)
        self.last_end = now
        self.stopping, self.save_due, self.skipped = stopping > 0, due > 0, bool(problem)
        state.seconds += seconds
        if self.log:
            row = {
                "step": begun.number + 1, "tokens": begun.tokens,
                "loss": finite(loss), "lr": begun.lr, "grad_norm": finite(grad_norm), "skipped": int(bool(problem)),
                "tokens_per_sec": begun.batch.num_tokens / seconds, "time": time.time(), "sources": begun.batch.sources,
            }  # fmt: skip
            self.log.write(row)
            self.heartbeat.beat()
        if problem:
            self.processes.say(f"WARNING: step {begun.number + 1} changes nothing: its {problem}")
            if state.health.failed(begun.number, spec.schedule.num_steps):
                self.trouble = problem
            return
        state.health.passed(loss, grad_norm)
        smoothed = state.smoothed_loss
        state.smoothed_loss = loss if smoothed is None else SMOOTHING * smoothed + (1 - SMOOTHING) * loss

    def _go_back(self) -> None:
        """Make `state`, weights and optimizer those of an anchor, and leave the data since out for good.

        Raises TrainingError where it was done too often, or no anchor is left.
        """
        state = self.state
        tried, reached = state.health.rollbacks, state.health.skipped[-1] + 1
        saved = self.saver.load_anchor() if tried < MAX_ROLLBACKS else None
        if saved is None:
            raise TrainingError(
                f"step {reached}: its {self.trouble}, like those of the {state.health.in_a_row - 1} steps before it, "
                f"and after going back {tried} times. Training cannot go on from here; lower train.lr (now "
                f"{self.spec.schedule.peak_lr:g}), or look at the data of the last steps"
            )
        self.processes.say(
            f"WARNING: {state.health.in_a_row} steps in a row had to be skipped; going back to step {saved.step}, "
            f"without the data of the {reached - saved.step} steps since"
        )
        self.batches.order = self.batches.order.without(saved.step, reached)
        saved.health.rollbacks = tried + 1
        saved.health.windows = list(self.batches.order.windows)
        state.effort.lost_steps += reached - saved.step
        if self.log:
            self.log.go_back(saved.step)
        state.become(saved)
        self.trouble, self.skipped = "", False
        self.save_due, self.last_save = False, time.monotonic()
        self.saver.save_latest(state)
        self.saver.wait()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be spread over processes, all of which have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def finite(value: float) -> float | None:
    """The value, or None: JSON has no NaN."""
    return value if math.isfinite(value) else None


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The random seed of a step in one of the processes, so that no generator's state needs to be carried along."""
    return (seed * 1_000_003 + step + (rank << 48)) % (1 << 63)


def micro_batches(batch: Batch, size: int, device: torch.device, *, varlen: bool = False) -> Iterator[Micro]:
    """Cut a step's rows into pieces of `size` rows, on the device; varlen: with the places where documents begin."""
    for start in range(0, len(batch.input_ids), size):
        piece = slice(start, start + size)
        rows, targets = labelled(batch.labels[piece])
        documents = document_boundaries(batch.position_ids[piece]) if varlen else {}
        if varlen:
            documents["boundaries"] = on_device(documents["boundaries"], device)
        yield Micro(
            on_device(batch.input_ids[piece], device), on_device(batch.position_ids[piece], device),
            on_device(rows, device), on_device(targets, device), documents,
        )  # fmt: skip


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """There, without waiting for it."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
