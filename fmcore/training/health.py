"""Whether a step may change the weights: its loss and gradient norm against those of the steps before it.

A step that is not finite, or lies far above its predecessors, is skipped: weights and optimizer stay as they
were (OLMo 2's SkipStepOptimizer, arXiv 2501.00656). Where many in a row are, the weights themselves have gone
wrong: training goes back to an anchor, a state saved at a step that follows from the number of steps alone, and
leaves the data between out (PaLM, arXiv 2204.02311, section 5.1). So it goes the same way however often it is
interrupted.
"""

import math
import statistics

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


class Health(BaseModel):
    """What is kept of the steps so far, with the training state.

    losses, grad_norms: of the last WINDOW steps that changed the weights. in_a_row: steps skipped since.
    skipped: the numbers of all skipped steps. windows: data left out after going back, see tokens/order.py.
    """

    model_config = ConfigDict(extra="forbid")
    losses: list[float] = []
    grad_norms: list[float] = []
    in_a_row: int = 0
    skipped: list[int] = []
    windows: list[tuple[int, int]] = []
    rollbacks: int = 0

    def problem(self, loss: float, grad_norm: float, sigma: float) -> str:
        """Why a step must not change the weights; empty where it may. sigma: 0 = only for what is not finite."""
        for name, value, before in (("loss", loss, self.losses), ("gradient norm", grad_norm, self.grad_norms)):
            if not math.isfinite(value):
                return f"{name} is {value}"
            if not sigma or len(before) < MIN_STEPS:
                continue
            mean = statistics.fmean(before)
            spread = max(statistics.pstdev(before, mean), MIN_SPREAD * abs(mean))
            if value > mean + sigma * spread:
                far = f"{(value - mean) / spread:.1f} standard deviations above" if spread else "above"
                return f"{name} is {value:.4g}, {far} the mean of the last {len(before)} steps, {mean:.4g}"
        return ""

    def passed(self, loss: float, grad_norm: float) -> None:
        """A step has changed the weights."""
        self.losses = [*self.losses, loss][-WINDOW:]
        self.grad_norms = [*self.grad_norms, grad_norm][-WINDOW:]
        self.in_a_row = 0

    def failed(self, step: int, num_steps: int) -> bool:
        """A step of `num_steps` was skipped; whether it is time to go back."""
        self.skipped.append(step)
        self.in_a_row += 1
        return self.in_a_row >= min(PATIENCE, max(2, num_steps // 10))
