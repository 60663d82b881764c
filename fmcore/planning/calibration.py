"""Time and memory as measured: by an earlier training of the same kind in this home, or by a few steps taken now.

Comparable is an earlier training on the same kind of machine with the same device, processes, threads and torch, of
a model of the same form (layers and widths; the vocabulary may differ by a tenth), with the same batch, micro-batch,
context and method. What a calibration measures is kept in `<home>/cache/calibrations`, by all that it depends on.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fmcore.artifacts.ancestry import full_checkpoint
from fmcore.artifacts.files import read_json, write_json
from fmcore.artifacts.store import Store, package_versions
from fmcore.artifacts.types import Checkpoint
from fmcore.errors import StoreError, TrainingError
from fmcore.model.outside import CONFIG
from fmcore.planning.memory import micro_batch_of, rows_of
from fmcore.planning.shape import Shape, adapter_parameters, block_sizes, flops_per_token, trainable_parameters
from fmcore.process.launch import Child, num_gpus
from fmcore.process.machine import machine_name
from fmcore.recipes.fields import Execution, Lora
from fmcore.recipes.stages import FinetuneRecipe, StageRecipe
from fmcore.training.train import precision_of
from fmcore.training.workload import Timing, Workload

FOLDER = Path("cache", "calibrations")  # below the home
RESULT = "result.json"
TIMEOUT_S = 60.0  # of the process as a whole, which usually takes about 10
STEPS_S = 15.0  # what its fewest steps may be foretold to take ...
FLOPS_PER_CORE = 35e9  # ... at half of what a matrix product reaches; not measured, for other work would decide
FEWEST_PASSES = 3  # of a micro-batch: one to warm up, two that are timed
FREE_SHARE = 0.8  # of the free memory that a calibration may be foretold to need
MIN_TRAIN_S = 5.0  # of a training that says something of speed
CLOSE_VOCABULARY = 0.1
GRACE_S = 2.0
# what pretraining needs beyond its calibration, which has no tokenizer, data, writing thread, or time to fragment;
# of a process on a CPU (benchmarks/README.md)
ADDED_BYTES = 60e6
BUSY_SHARE = 0.1  # of the processors: what was measured while other work had more ...
BUSY_KEPT_S = 600.0  # ... holds for as long as this


class NotCalibrated(Exception):
    """Why nothing is measured, in words."""


@dataclass(frozen=True)
class StepCost:
    """What a training takes, by formulas or by measurement. seconds, flops: per token; peak_bytes: of memory.

    parameters: of the whole model; trained: of those, and adapters, what the optimizer sees. basis: where it is from;
    measured: how the memory was, if it was.
    """

    seconds: float
    flops: float
    parameters: int
    trained: int
    peak_bytes: float
    basis: str
    measured: str = ""


@dataclass(frozen=True)
class Calibrator:
    """Finds or measures what a step takes. say: told before steps are taken, which takes seconds."""

    store: Store
    say: Callable[[str], None]

    def measure(self, recipe: StageRecipe, shape: Shape, peak_bytes: float) -> StepCost:
        """What a training like this took, or what a few steps of it take now. Raises NotCalibrated.

        peak_bytes: of memory, by the formulas; where they say too much, no steps are taken.
        """
        workload, processes = workload_of(recipe, shape), num_processes(recipe.execution)
        if earlier := comparable_training(workload, rows_of(shape), processes, self.store):
            return _as_it_went(earlier, recipe, shape)
        if processes > 1:
            raise NotCalibrated(f"{processes} processes share the work")
        timing = self._kept(workload)
        if timing is None:
            _check_bounds(workload, peak_bytes, flops_per_token(shape, trainable_parameters(recipe, shape)))
            self.say("taking a few steps of this model, to see what they take (--no-calibration goes without) ...")
            timing = self._calibrate(workload, recipe.execution)
        return _as_calibrated(timing, workload, rows_of(shape))

    def _path(self, workload: Workload) -> Path:
        return self.store.home / FOLDER / f"{workload.key[:16]}.json"

    def _kept(self, workload: Workload) -> Timing | None:
        path = self._path(workload)
        try:
            kept = read_json(path)
            timing = Timing.model_validate(kept["timing"])
        except (OSError, ValueError, KeyError):  # there is none, or one of another version of ours
            return None
        old = time.time() - path.stat().st_mtime > BUSY_KEPT_S
        fresh = timing.others <= BUSY_SHARE or not old
        return timing if fresh and kept["key"] == workload.key else None

    def _calibrate(self, workload: Workload, execution: Execution) -> Timing:
        path = self._path(workload)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="running-", dir=path.parent) as folder:
            write_json(Path(folder) / "spec.json", workload.model_dump(mode="json"))
            _run(Path(folder), execution.threads)
            timing = Timing.model_validate(read_json(Path(folder) / RESULT))
        write_json(path, {"key": workload.key, "timing": timing.model_dump(), "workload": workload.model_dump()})
        return timing


def _as_calibrated(timing: Timing, workload: Workload, rows: int) -> StepCost:
    """A step's micro-batches, as many as its rows need, and its one update, by token."""
    steps = f"calibrated on {timing.num_steps} step{'s' if timing.num_steps > 1 else ''}"
    busy = f" while other work had {timing.others:.0%} of the processors" if timing.others > BUSY_SHARE else ""
    added = ADDED_BYTES if device_of(workload.device) == "cpu" else 0.0
    return StepCost(
        seconds=(timing.micro_s / workload.micro_batch + timing.update_s / rows) / workload.seq_len,
        flops=timing.flops_per_token,
        parameters=timing.parameters,
        trained=timing.trained,
        peak_bytes=timing.peak_bytes + added,
        basis=steps + busy,
        measured=f"measured with optimizer and copies for a save, {added / 1e6:.0f} MB added for tokenizer and data",
    )


def _run(folder: Path, threads: int) -> None:
    lock, start = os.open(os.devnull, os.O_RDONLY), time.monotonic()  # nobody else's lock
    try:
        Child(
            "fmcore.training.calibration", folder, lock=lock, grace_s=GRACE_S, hang_timeout_s=TIMEOUT_S,
            threads=threads,
        ).run(on_line=lambda line: None)  # fmt: skip
    except TrainingError as error:
        late = time.monotonic() - start > TIMEOUT_S
        why = f"the steps took over {TIMEOUT_S:.0f} s" if late else f"its process failed: {str(error).splitlines()[-1]}"
        raise NotCalibrated(why) from error
    finally:
        os.close(lock)


def _check_bounds(workload: Workload, peak_bytes: float, flops: float) -> None:
    """Refuse what would take too long, or drive the machine into swap, by formulas, which know CPUs alone."""
    if device_of(workload.device) != "cpu":
        return
    free = psutil.virtual_memory().available
    if peak_bytes > FREE_SHARE * free:
        raise NotCalibrated(f"it needs about {peak_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
    tokens = FEWEST_PASSES * workload.micro_batch * workload.seq_len
    seconds = tokens * flops / (FLOPS_PER_CORE * workload.threads)
    if seconds > STEPS_S:
        raise NotCalibrated(f"{FEWEST_PASSES} micro-batches take about {seconds:.0f} s")


def workload_of(recipe: StageRecipe, shape: Shape) -> Workload:
    """What one process of a training does, and on what."""
    execution = recipe.execution
    micro_batch = micro_batch_of(shape, execution.micro_batch, device_of(execution.device))
    adapters = isinstance(recipe, FinetuneRecipe) and recipe.method == "lora"
    return Workload(
        fields=shape.fields,
        vocab_size=shape.vocab_size,
        seq_len=shape.seq_len,
        micro_batch=micro_batch,
        accumulates=rows_of(shape) > micro_batch,
        method="lora" if adapters else "full",
        lora=recipe.lora if isinstance(recipe, FinetuneRecipe) and adapters else Lora(),
        precision=precision_of(recipe),
        optimizer=recipe.train.optimizer or "adamw",  # a parent's other one is not looked up
        device=execution.device,
        threads=execution.threads or max(1, (os.cpu_count() or 1) // _processes_here(execution)),
        machine=machine_name(execution.device),
        packages=package_versions(),
    )


def num_processes(execution: Execution) -> int:
    """Processes that a new training of the recipe starts, on all machines together."""
    return _processes_here(execution) * execution.nodes


def _processes_here(execution: Execution) -> int:
    return execution.processes or max(1, num_gpus() if execution.device != "cpu" else 1)


def device_of(device: str) -> str:
    """cpu or cuda, told without torch."""
    return ("cuda" if num_gpus() else "cpu") if device == "auto" else device


def comparable_training(workload: Workload, rows: int, processes: int, store: Store) -> Checkpoint | None:
    """The newest training in this home that took what this one will take. rows: sequences of a step."""
    for checkpoint in reversed(list(store.all(Checkpoint))):
        if checkpoint.train_seconds > MIN_TRAIN_S and _same_conditions(checkpoint, workload, processes):
            try:
                if _same_work(checkpoint, workload, rows, store):
                    return checkpoint
            except (StoreError, OSError):  # its base was removed
                continue
    return None


def _same_conditions(checkpoint: Checkpoint, workload: Workload, processes: int) -> bool:
    now = {
        "machine": workload.machine, "device": device_of(workload.device), "torch": workload.packages["torch"],
        "processes": processes, "threads": workload.threads,
    }  # fmt: skip
    return {**checkpoint.conditions, **now} == checkpoint.conditions and checkpoint.method == workload.method


def _same_work(checkpoint: Checkpoint, workload: Workload, rows: int, store: Store) -> bool:
    spec = read_json(checkpoint.path / "spec.json")
    micro_batch = min(rows, checkpoint.conditions["micro_batch"])
    if (spec["batch_samples"], spec["seq_len"], micro_batch) != (rows, workload.seq_len, workload.micro_batch):
        return False
    kinds = spec.get("precision", "fp32"), spec.get("optimizer_kind", "adamw")
    if kinds != (workload.precision, workload.optimizer):
        return False
    if workload.method == "lora" and spec["lora"] != workload.lora.model_dump():
        return False
    fields = read_json(full_checkpoint(store, checkpoint).final / CONFIG)
    vocabulary = abs(fields["vocab_size"] / workload.vocab_size - 1)
    return _form(fields) == _form(workload.fields) and vocabulary <= CLOSE_VOCABULARY


def _form(fields: dict[str, Any]) -> tuple[object, ...]:
    """What makes two models of one vocabulary equally large and equally fast."""
    return fields["model_type"], *block_sizes(fields), fields.get("tie_word_embeddings", True)


def _as_it_went(checkpoint: Checkpoint, recipe: StageRecipe, shape: Shape) -> StepCost:
    """Its speed and memory; parameters and FLOPs are the new model's own."""
    trained = trainable_parameters(recipe, shape)
    return StepCost(
        seconds=1 / checkpoint.figures["mean_tokens_per_sec"],
        flops=flops_per_token(shape, trained),
        parameters=shape.parameters + adapter_parameters(shape, trained),
        trained=trained,
        peak_bytes=checkpoint.figures["peak_memory_mb"] * 1e6,
        basis=f"as {checkpoint.name}-{checkpoint.short} went",
        measured="as measured then",
    )
