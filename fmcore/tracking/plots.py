"""The course of a training as pictures, drawn from metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

FIGURE_INCHES = (8.0, 4.5)
DOTS_PER_INCH = 120
# A mean over this share of the training follows the curve, and hides the noise between batches.
WINDOW_FRACTION = 0.02

Rows = list[dict[str, Any]]
Values = NDArray[np.float64]


def plot_training(metrics_path: Path, out: Path) -> list[Path]:
    """Draw loss.png, lr.png and sources.png into the folder `out`; returns what was drawn.

    metrics_path: one JSON object a line; a last line without its end is left out. Without rows nothing is
    drawn, and sources.png only where rows tell their sources.
    """
    rows = _rows(metrics_path)
    if not rows:
        return []
    out.mkdir(parents=True, exist_ok=True)
    drawings = {"loss.png": _draw_loss, "lr.png": _draw_lr}
    if any(row.get("sources") for row in rows):
        drawings["sources.png"] = _draw_sources
    paths = []
    for name, draw in drawings.items():
        # a figure of its own, not pyplot's: those stay in memory and are shared between threads
        figure = Figure(figsize=FIGURE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, rows)
        figure.savefig(out / name)
        paths.append(out / name)
    return paths


def _rows(path: Path) -> Rows:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _draw_loss(axes: Axes, rows: Rows) -> None:
    tokens, loss = _column(rows, "tokens"), _column(rows, "loss")
    smoothed, window = _smoothed(loss)
    axes.plot(tokens, loss, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(tokens, smoothed, color="tab:blue", linewidth=1.8, label=_mean_of(window))
    axes.set(title="Training loss", ylabel="loss (nats per token)")
    _token_axis(axes)
    axes.legend(frameon=False)


def _draw_lr(axes: Axes, rows: Rows) -> None:
    axes.plot(_column(rows, "tokens"), _column(rows, "lr"), color="tab:orange", linewidth=1.8)
    axes.set(title="Learning rate", ylabel="learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _token_axis(axes)


def _draw_sources(axes: Axes, rows: Rows) -> None:
    names = sorted({name for row in rows for name in row.get("sources") or {}})
    shares = [np.array([(row.get("sources") or {}).get(name, 0.0) for row in rows], dtype=float) for name in names]
    smoothed = [_smoothed(share) for share in shares]
    window = smoothed[0][1]
    axes.stackplot(_column(rows, "step"), [mean for mean, _ in smoothed], labels=names, alpha=0.85)
    axes.set(title=f"Sources, {_mean_of(window)}", xlabel="step", ylabel="fraction of the step's tokens")
    axes.set_ylim(0, 1)
    axes.margins(x=0)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)


def _token_axis(axes: Axes) -> None:
    axes.set_xlabel("tokens trained on")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))


def _column(rows: Rows, name: str) -> Values:
    return np.array([row[name] for row in rows], dtype=float)


def _mean_of(window: int) -> str:
    return "each step" if window == 1 else f"mean of {window} steps"


def _smoothed(values: Values) -> tuple[Values, int]:
    """The mean of the last `window` finite values at each place, of fewer at the beginning, (n,)."""
    window = max(1, round(len(values) * WINDOW_FRACTION))
    finite = np.isfinite(values)  # one diverged step must not blank the rest of the curve
    total = np.cumsum(np.insert(np.where(finite, values, 0.0), 0, 0.0))
    count = np.cumsum(np.insert(finite.astype(float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    num_finite = count[ends] - count[starts]
    mean = np.full(len(values), np.nan)
    np.divide(total[ends] - total[starts], num_finite, out=mean, where=num_finite > 0)
    return mean, window
