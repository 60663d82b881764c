"""Learning rate over optimizer steps."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict

COSINE_FLOOR = 0.1  # as in Hoffmann et al. 2022 (arXiv 2203.15556)


class Schedule(BaseModel):
    """Learning rate of each step, steps counted from 0.

    wsd: linear warmup, stable, then decay by 1 - sqrt over the last steps (Hagele et al. 2024, arXiv
    2405.18392). cosine: linear warmup, then a half cosine to 10 % of the peak.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["wsd", "cosine"]
    peak_lr: float
    num_steps: int
    warmup_steps: int
    decay_steps: int

    @property
    def stable_step(self) -> int | None:
        """How many steps are done when the decay begins; None where the schedule has no stable part."""
        if self.kind != "wsd" or self.num_steps - self.decay_steps < self.warmup_steps:
            return None
        return self.num_steps - self.decay_steps

    def lr(self, step: int) -> float:
        """The rate that step `step` is taken with."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        if self.kind == "cosine":
            progress = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
            return self.peak_lr * (COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))
        into_decay = step - (self.num_steps - self.decay_steps)
        return self.peak_lr * (1 - math.sqrt(max(0, into_decay) / self.decay_steps))
