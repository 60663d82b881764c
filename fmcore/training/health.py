"""Whether a step may change the weights: its loss and gradient norm against those of the steps before it.

A step that is not finite, or lies far above its predecessors, is skipped: weights and optimizer stay as they
were (OLMo 2's SkipStepOptimizer, arXiv 2501.00656). Where many in a row are, the weights themselves have gone
wrong: training goes back to an anchor, a state saved at a step that follows from the number of steps alone, and
leaves the data between out (PaLM, arXiv 2204.02311, section 5.1). So it goes the same way however often it is
interrupted.

A step is held against what was usual one step before its predecessor ended: so a GPU decides by itself, with limits
it has been told, and need not wait until the CPU has read the last loss.
"""

import math
import statistics
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

WINDOW = 128  # steps that a new one is compared with
MIN_STEPS = 64  # fewer say nothing about what is usual
MIN_SPREAD = 0.01  # of the mean, as standard deviation: a loss that hardly moves has no outliers
PATIENCE = 10  # skipped steps in a row before training goes back; fewer where there are fewer than a hundred
MAX_ROLLBACKS = 3
MIN_ANCHOR, MAX_ANCHOR = 10, 100  # steps between two anchors


def anchor_interval(num_steps: int) -> int:
    """Steps between two anchors."""
    return min(MAX_ANCHOR, max(MIN_ANCHOR, num_steps // 20))


class Usual(BaseModel):
    """Mean and standard deviation of a figure over so many steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    mean: float = 0.0
    spread: float = 0.0
    steps: int = 0

    @classmethod
    def of(cls, values: Sequence[float]) -> "Usual":
        """What is usual after steps with these values."""
        if len(values) < MIN_STEPS:
            return cls()
        mean = statistics.fmean(values)
        return cls(mean=mean, spread=max(statistics.pstdev(values, mean), MIN_SPREAD * abs(mean)), steps=len(values))

    def limit(self, sigma: float) -> float:
        """Up to which a value is no spike. sigma: standard deviations; 0 = any."""
        return self.mean + sigma * self.spread if sigma and self.steps else math.inf

    def problem(self, name: str, value: float, sigma: float) -> str:
        """What is wrong with a value, or nothing."""
        if not math.isfinite(value):
            return f"{name} is {value}"
        if value <= self.limit(sigma):
            return ""
        far = f"{(value - self.mean) / self.spread:.1f} standard deviations above" if self.spread else "above"
        return f"{name} is {value:.4g}, {far} the mean of the last {self.steps} steps, {self.mean:.4g}"


class Expectation(BaseModel):
    """What a step is held against."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    loss: Usual = Usual()
    grad_norm: Usual = Usual()

    def limits(self, sigma: float) -> tuple[float, float]:
        """Of loss and gradient norm: a step that is above either, or not finite, must not change the weights."""
        return self.loss.limit(sigma), self.grad_norm.limit(sigma)

    def problem(self, loss: float, grad_norm: float, sigma: float) -> str:
        """Why a step must not change the weights; empty where it may. sigma: 0 = only for what is not finite."""
        return self.loss.problem("loss", loss, sigma) or self.grad_norm.problem("gradient norm", grad_norm, sigma)


class Health(BaseModel):
    """What is kept of the steps so far, with the training state.

    losses, grad_norms: of the last WINDOW steps that changed the weights. expected: what the next two steps are held
    against, or the next one while the outcome of the last is not known. in_a_row: steps skipped since. skipped: the
    numbers of all skipped steps. windows: data left out after going back, see tokens/order.py.
    """

    model_config = ConfigDict(extra="forbid")
    losses: list[float] = []
    grad_norms: list[float] = []
    expected: list[Expectation] = [Expectation(), Expectation()]
    in_a_row: int = 0
    skipped: list[int] = []
    windows: list[tuple[int, int]] = []
    rollbacks: int = 0

    def begin(self) -> Expectation:
        """What the step that begins is held against."""
        return self.expected.pop(0)

    def passed(self, loss: float, grad_norm: float) -> None:
        """A step has changed the weights."""
        self.losses = [*self.losses, loss][-WINDOW:]
        self.grad_norms = [*self.grad_norms, grad_norm][-WINDOW:]
        self.in_a_row = 0
        self._ended()

    def failed(self, step: int, num_steps: int) -> bool:
        """A step of `num_steps` was skipped; whether it is time to go back."""
        self.skipped.append(step)
        self.in_a_row += 1
        self._ended()
        return self.in_a_row >= min(PATIENCE, max(2, num_steps // 10))

    def _ended(self) -> None:
        usual = Expectation(loss=Usual.of(self.losses), grad_norm=Usual.of(self.grad_norms))
        self.expected.append(usual)
