"""The training loop, for every stage: read it top to bottom."""

import math
import time

import torch
from torch.distributed.tensor import DTensor

from fmcore.errors import TrainingError
from fmcore.process.guard import Heartbeat, Stop
from fmcore.training.batches import Batch, Batches
from fmcore.training.checkpoint import Trainee, TrainState
from fmcore.training.health import MAX_ROLLBACKS
from fmcore.training.loss import StepModel
from fmcore.training.metrics import MetricsLog
from fmcore.training.parallel import Processes
from fmcore.training.saving import Saver
from fmcore.training.spec import TrainSpec

SMOOTHING = 0.95  # of the loss that progress shows


def train(
    spec: TrainSpec,
    model: StepModel,
    trainee: Trainee,
    batches: Batches,
    state: TrainState,
    saver: Saver,
    log: MetricsLog | None,
    stop: Stop,
    heartbeat: Heartbeat,
    processes: Processes,
) -> bool:
    """Train from `state` to the end; False if stopped before it, after saving.

    Killed at any moment and started again, it ends in the same bits: the batch, the rate and the random
    state of a step follow from its number alone, and all else is in the saved state. Several processes each
    take their share of a step's rows, and decide nothing but by what they have added up; log: the first one's.
    """
    device = processes.device
    parameters = list(trainee.parameters.values())
    num_steps = spec.schedule.num_steps
    last_save = time.monotonic()
    [stopping] = processes.sum([stop.requested])
    model.train()

    while state.step < num_steps:
        if state.step == spec.schedule.stable_step and spec.method == "full":
            saver.save_stable(state)
        if stopping:
            saver.save_latest(state)
            saver.wait()
            return False

        # step
        start = time.perf_counter()
        torch.manual_seed(step_seed(spec.seed, state.step, processes.rank))
        batch = batches.at(state.step, rank=processes.rank, world=processes.world)
        [num_labels] = processes.sum([batch.num_labels])
        state.effort.data_wait_s += time.perf_counter() - start
        lr = spec.schedule.lr(state.step)
        for group in trainee.optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=device)
        for micro in micro_batches(batch, state.micro_batch, device):
            part = model(micro.input_ids, micro.position_ids, micro.labels, max(1, num_labels))
            part.backward()
            loss += part.detach()
        grad_norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, spec.grad_clip)))
        late = time.monotonic() - last_save >= spec.save_interval_s and not saver.busy and processes.is_first
        value, stopping, due = processes.sum([float(loss), stop.requested, late])
        problem = state.health.problem(value, grad_norm, spec.spike_sigma)
        if not problem:
            trainee.optimizer.step()
        trainee.optimizer.zero_grad(set_to_none=True)

        # log
        seconds = time.perf_counter() - start
        state.step += 1
        state.tokens += batch.num_tokens
        state.seconds += seconds
        if log:
            row = {
                "step": state.step, "tokens": state.tokens, "loss": finite(value), "lr": lr,
                "grad_norm": finite(grad_norm), "skipped": int(bool(problem)),
                "tokens_per_sec": batch.num_tokens / seconds, "time": time.time(), "sources": batch.sources,
            }  # fmt: skip
            log.write(row)
            heartbeat.beat()

        # health
        if problem:
            processes.say(f"WARNING: step {state.step} changes nothing: its {problem}")
            if state.health.failed(state.step - 1, num_steps):
                go_back(spec, batches, state, saver, log, problem, processes)
            continue
        state.health.passed(value, grad_norm)
        smoothed = state.smoothed_loss
        state.smoothed_loss = value if smoothed is None else SMOOTHING * smoothed + (1 - SMOOTHING) * value

        # save
        if (due or saver.is_anchor(state)) and state.step < num_steps:
            saver.save_latest(state)
            last_save = time.monotonic()
    saver.wait()
    saver.count_time(state)
    return True


def go_back(
    spec: TrainSpec, batches: Batches, state: TrainState, saver: Saver, log: MetricsLog | None, problem: str,
    processes: Processes,
) -> None:  # fmt: skip
    """Make `state`, weights and optimizer those of an anchor, and leave the data since out for good.

    Raises TrainingError where it was done too often, or no anchor is left.
    """
    tried = state.health.rollbacks
    saved = saver.load_anchor() if tried < MAX_ROLLBACKS else None
    if saved is None:
        raise TrainingError(
            f"step {state.step}: its {problem}, like those of the {state.health.in_a_row - 1} steps before it, and "
            f"after going back {tried} times. Training cannot go on from here; lower train.lr (now "
            f"{spec.schedule.peak_lr:g}), or look at the data of the last steps"
        )
    processes.say(
        f"WARNING: {state.health.in_a_row} steps in a row had to be skipped; going back to step {saved.step}, without "
        f"the data of the {state.step - saved.step} steps since"
    )
    batches.order = batches.order.without(saved.step, state.step)
    saved.health.rollbacks = tried + 1
    saved.health.windows = list(batches.order.windows)
    state.effort.lost_steps += state.step - saved.step
    if log:
        log.go_back(saved.step)
    state.become(saved)
    saver.save_latest(state)
    saver.wait()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be spread over processes, all of which have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def finite(value: float) -> float | None:
    """The value, or None: JSON has no NaN."""
    return value if math.isfinite(value) else None


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The random seed of a step in one of the processes, so that no generator's state needs to be carried along."""
    return (seed * 1_000_003 + step + (rank << 48)) % (1 << 63)


def micro_batches(batch: Batch, size: int, device: torch.device) -> list[Batch]:
    """Cut a step's rows into pieces of `size` rows, on the device."""
    return [
        batch._replace(
            input_ids=batch.input_ids[i : i + size].to(device),
            labels=batch.labels[i : i + size].to(device),
            position_ids=batch.position_ids[i : i + size].to(device),
        )
        for i in range(0, len(batch.input_ids), size)
    ]
