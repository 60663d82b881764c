"""What a training reached of its machine, in a few figures.

MFU (model FLOPs utilization, PaLM, arXiv 2204.02311, appendix B) is the FLOPs that the model itself needs, nothing
recomputed, over those of a matrix product on this device in the same time.
"""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from fmcore.artifacts.files import read_json, write_json
from fmcore.training.checkpoint import TrainState

PEAK_SIZE = {"cpu": 1024, "cuda": 8192}
PEAK_REPEATS = 8
FORMULA = (
    "FLOPs per token: 4 per parameter in matrix products, 2 more where it is trained, 12 x layers x width x context"
)


def measure_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a matrix product here, the best of a few, with the threads and the precision that training has."""
    size = PEAK_SIZE.get(device.type, 1024)
    left = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(PEAK_REPEATS):
        start = time.perf_counter()
        (left @ left)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def flops_per_token(model: torch.nn.Module, config: PretrainedConfig, seq_len: int) -> float:
    """Of a forward and a backward pass: see FORMULA. Attention is counted as if every token saw all of its context."""
    product = trained = 0
    embedding = None if config.tie_word_embeddings else model.get_input_embeddings().weight  # type: ignore[operator]
    for parameter in model.parameters():
        if parameter.ndim >= 2 and parameter is not embedding:
            product += parameter.numel()
            trained += parameter.numel() * parameter.requires_grad
    return 4.0 * product + 2.0 * trained + 12.0 * config.num_hidden_layers * config.hidden_size * seq_len


def count_restart(state: TrainState, attempts: Path, lost: list[dict[str, Any]], batch_tokens: int) -> None:
    """Note that training goes on after an attempt that ended; lost: the rows of steps it has to do again.

    attempts: a file about each attempt after the first, for one that ends before it has saved anything is not in the
    state that the next one begins with.
    """
    effort = state.effort
    seconds = sum(batch_tokens / row["tokens_per_sec"] for row in lost)
    before = read_json(attempts) if attempts.exists() else []
    unsaved = [row for row in before if row["restart"] > effort.restarts]
    this = {"restart": effort.restarts + len(unsaved) + 1, "lost_steps": len(lost), "lost_s": seconds}
    write_json(attempts, [*before, this])
    for row in (*unsaved, this):
        effort.restarts += 1
        effort.lost_steps += row["lost_steps"]
        effort.wall_s += row["lost_s"]


def figures(state: TrainState, flops: float, peak: float, device: torch.device) -> dict[str, float]:
    """Name -> value, as in docs/tracking.md."""
    effort = state.effort
    rate = state.tokens / state.seconds if state.seconds else 0.0
    return {
        "mean_tokens_per_sec": rate,
        "mfu": rate * flops / peak,
        "peak_flops": peak,
        "peak_memory_mb": peak_memory(device) / 1e6,
        "data_wait": effort.data_wait_s / effort.wall_s,
        "save_stall": effort.save_stall_s / effort.wall_s,
        "goodput": state.seconds / effort.wall_s,
        "saves": effort.saves,
        "restarts": effort.restarts,
        "lost_steps": effort.lost_steps,
        "skipped_steps": len(state.health.skipped),
        "rollbacks": state.health.rollbacks,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device where it is a GPU, else the process's largest resident size, of this attempt."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage counts what the parent held when it started us
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_words(values: dict[str, float]) -> str:
    """One line for the log."""
    return (
        f"{values['mean_tokens_per_sec']:,.0f} tokens/s, MFU {values['mfu']:.1%} of {values['peak_flops'] / 1e9:,.0f} "
        f"GFLOP/s, peak memory {values['peak_memory_mb']:,.0f} MB, goodput {values['goodput']:.1%}; waiting for data "
        f"{values['data_wait']:.2%}, for {values['saves']:.0f} saves {values['save_stall']:.2%} of the time"
    )
