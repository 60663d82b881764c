"""What a training's speed and memory depend on, as far as a short calibration can stand for it; knows no torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from fmcore.artifacts.files import canonical_json, sha256_text
from fmcore.recipes.fields import Lora

# of a micro-batch that is chosen for you, by device; a CPU is about as fast with 4,096 (benchmarks/README.md)
MICRO_TOKENS = {"cpu": 2048, "cuda": 8192}


class Workload(BaseModel):
    """The work of one process that trains alone.

    fields: transformers' config of the model, trained with fresh weights. seq_len: tokens; micro_batch: sequences.
    accumulates: whether a step takes more than one micro-batch, so that gradients lie beside activations.
    threads: of torch. machine, packages: where, and with which versions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    fields: dict[str, Any]
    vocab_size: int
    seq_len: int
    micro_batch: int
    accumulates: bool
    method: Literal["full", "lora"]
    lora: Lora
    precision: Literal["fp32", "bf16"]
    optimizer: Literal["adamw", "muon"]
    device: Literal["auto", "cpu", "cuda"]
    threads: int
    machine: str
    packages: dict[str, str]

    @property
    def key(self) -> str:
        """Hex sha256 over all of it."""
        return sha256_text(canonical_json(self.model_dump(mode="json")))


class Timing(BaseModel):
    """What a calibration measured.

    num_steps: optimizer steps that were timed; micro_s: seconds of a micro-batch, forward and backward; update_s: of
    clipping and the optimizer; peak_bytes: of memory, as `fmcore.training.figures.peak_memory` counts it; others: share
    of the processors that other work had meanwhile.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    num_steps: int
    micro_s: float
    update_s: float
    peak_bytes: int
    others: float
    parameters: int
    trained: int
    flops_per_token: float
