"""The calibration process: `python -m fmcore.training.calibration SPEC.json`, for `strata plan`.

It takes a few optimizer steps as the training process would, on fresh weights and made rows, and writes result.json
(a Timing). The copies that a save takes are made too, for they count in the peak of memory; nothing is saved.
"""

import os
import statistics
import time
from pathlib import Path

import psutil
import torch
from transformers.utils import logging as transformers_logging

from fmcore.artifacts.files import read_json, write_json
from fmcore.model.adapters import add_lora
from fmcore.model.build import fresh_model
from fmcore.process.guard import run_main
from fmcore.training.child import prepare_torch
from fmcore.training.figures import flops_per_token, measure_peak, peak_memory
from fmcore.training.layers import decoder_layers
from fmcore.training.loss import Micro, StepModel, labelled
from fmcore.training.optimizer import make_optimizers
from fmcore.training.parallel import PRECISIONS, Processes, pick_device
from fmcore.training.trainee import Trainee
from fmcore.training.workload import Timing, Workload

RESULT = "result.json"
NUM_STEPS = 3  # timed, after one to warm up
MICRO_BATCHES = 4  # of a timed step at the most; time grows with their number
BUDGET_S = 6.0  # for all steps; the process takes as long again to start


def main(path: Path) -> bool:
    """Calibrate what the spec says, and write what was measured beside it."""
    workload = Workload.model_validate(read_json(path))
    transformers_logging.set_verbosity_error()
    prepare_torch(workload.threads)
    write_json(path.parent / RESULT, calibrate(workload).model_dump())
    return True


def calibrate(workload: Workload) -> Timing:
    """Time the steps of a workload in this process. Raises RecipeError where its model cannot be trained."""
    device = pick_device(workload.device)
    sizes = {"vocab_size": workload.vocab_size, "max_position_embeddings": workload.seq_len}
    model = fresh_model({**sizes, **workload.fields}, seed=0)
    trained = add_lora(model, workload.lora) if workload.method == "lora" else model
    flops = flops_per_token(trained, model.config, workload.seq_len)
    step_model, processes = StepModel(model).to(device).train(), Processes(device)
    processes.shard(step_model, workload.precision)
    optimizers = make_optimizers(
        workload.optimizer, trained.named_parameters(), decoder_layers(model), betas=(0.9, 0.95), weight_decay=0.1
    )
    steps = Steps(step_model, Trainee(trained, optimizers), workload, device)
    measure_peak(device, PRECISIONS[workload.precision])  # training does, and its matrices stay with the allocator
    start, busy = time.perf_counter(), _busy_elsewhere()
    micro_s, update_s = steps.time()
    others = (_busy_elsewhere() - busy) / (time.perf_counter() - start) / (os.cpu_count() or 1)
    processes.leave()
    return Timing(
        num_steps=len(micro_s),
        micro_s=statistics.median(micro_s),
        update_s=statistics.median(update_s),
        peak_bytes=peak_memory(device),
        others=min(1.0, max(0.0, others)),
        parameters=sum(p.numel() for p in trained.parameters()),
        trained=sum(p.numel() for p in trained.parameters() if p.requires_grad),
        flops_per_token=flops,
    )


def _busy_elsewhere() -> float:
    """Seconds so far that this machine's processors worked for others than this process, or were taken by a host."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    counted_twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # on Linux, in user and nice
    return float(sum(times) - idle - counted_twice - time.process_time())


class Steps:
    """Optimizer steps on one made micro-batch, at a rate of zero."""

    def __init__(self, model: StepModel, trainee: Trainee, workload: Workload, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._most = MICRO_BATCHES if workload.accumulates else 1
        self._trainee = trainee
        shape = (workload.micro_batch, workload.seq_len)
        ids = torch.randint(workload.vocab_size, shape)  # (B, T)
        # two documents in a row: attention then needs a mask, as packed rows do
        positions = (torch.arange(workload.seq_len) % -(-workload.seq_len // 2)).expand(shape)
        rows, targets = labelled(ids)
        self._micro = Micro(ids.to(device), positions.to(device), rows.to(device), targets.to(device), {})

    def time(self) -> tuple[list[float], list[float]]:
        """Seconds of a micro-batch, and of the update, in each timed step."""
        start = time.perf_counter()
        self._trainee.snapshot()  # training saves before its first step, and from then on the optimizer's state too
        micro_s, _ = self._step(1)
        self._trainee.snapshot()
        timed: list[tuple[float, float]] = []
        left = BUDGET_S - (time.perf_counter() - start)
        num = max(min(2, self._most), min(self._most, int(left / NUM_STEPS / micro_s)))
        while len(timed) < NUM_STEPS:
            timed.append(self._step(num))
            left = BUDGET_S - (time.perf_counter() - start)
            if left < num * timed[-1][0] + timed[-1][1]:
                break
        return [micro for micro, _ in timed], [update for _, update in timed]

    def _step(self, num: int) -> tuple[float, float]:
        """Mean seconds of `num` micro-batches, forward and backward, and seconds of the update."""
        start = time.perf_counter()
        for _ in range(num):
            self._model(self._micro, num * len(self._micro.targets)).backward()
        self._wait()
        computed = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(self._trainee.parameters.values(), 1.0)
        for optimizer in self._trainee.optimizers:
            optimizer.step()
        self._model.zero_grad(set_to_none=True)
        self._wait()
        return (computed - start) / num, time.perf_counter() - computed

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


if __name__ == "__main__":
    run_main(main)
