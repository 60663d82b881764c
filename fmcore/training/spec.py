"""The JSON spec that the training process reads: everything it does follows from it."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from fmcore.model.outside import Origin
from fmcore.model.weights import Weights
from fmcore.recipes.fields import Lora
from fmcore.training.schedule import Schedule


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Member(_Block):
    """One source of a shards artifact. subset: a file of sample numbers (uint32) to draw from, or all.

    label: its name in metrics (`replay/<source>` for replay). own: whether its documents enter this
    checkpoint's own record of seen samples, from which descendants replay.
    """

    shards: Path
    source: str
    label: str
    form: Literal["text", "records"]
    vocab_size: int
    subset: Path | None = None
    own: bool = True


class PoolSpec(_Block):
    """Sources drawn together, with a share of the samples."""

    weight: float
    members: tuple[Member, ...]


class TrainSpec(_Block):
    """One training. lengths in tokens, times in seconds.

    model: config fields for fresh weights, or None to start from `weights`. optimizer: a safetensors file with the
    state to go on with, of the kind optimizer_kind. base, base_fingerprint: the parent's version, and its checkpoint's
    identity; origin: where its whole weights were imported from, if they were. num_samples: sample slots in the whole
    run. ledger: what the starting weights have seen. mirror: address where copies of the state go.
    """

    seed: int
    model: dict[str, Any] | None
    weights: Weights | None
    optimizer: Path | None
    method: Literal["full", "lora"]
    lora: Lora
    base: str
    base_fingerprint: str
    origin: Origin | None
    tokenizer: Path
    pools: tuple[PoolSpec, ...]
    num_samples: int
    batch_samples: int
    seq_len: int
    schedule: Schedule
    precision: Literal["fp32", "bf16"]
    optimizer_kind: Literal["adamw", "muon"]
    betas: tuple[float, float]
    weight_decay: float
    grad_clip: float
    spike_sigma: float
    ledger: Path | None
    device: Literal["auto", "cpu", "cuda"]
    threads: int
    micro_batch: int
    compile: Literal["auto", "on", "off"]
    recompute_layers: int
    save_interval_s: float
    hang_timeout_s: float
    mirror: str = ""
