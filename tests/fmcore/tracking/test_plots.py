from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from fmcore.tracking.plots import _smoothed, plot_training

Row = Callable[..., str]


def test_three_pictures_are_drawn(tmp_path: Path, row: Row) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(row(n) for n in range(1, 200)) + row(200)[:20])
    paths = plot_training(metrics, tmp_path / "plots")
    assert [path.name for path in paths] == ["loss.png", "lr.png", "sources.png"]
    for path in paths:
        pixels = imread(path)  # (H, W, 4)
        assert pixels.shape[:2] == (540, 960)
        assert np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0).shape[0] > 10


def test_no_rows_no_pictures(tmp_path: Path) -> None:
    assert plot_training(tmp_path / "metrics.jsonl", tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()


def test_rows_without_sources_have_no_picture_of_them(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "tokens": 8, "loss": NaN, "lr": 0.1, "time": 1}\n')
    assert [path.name for path in plot_training(metrics, tmp_path)] == ["loss.png", "lr.png"]


def test_smoothing_is_a_trailing_mean_that_leaves_out_what_is_not_finite() -> None:
    values = np.arange(100.0)
    values[50] = np.nan
    mean, window = _smoothed(values)
    assert window == 2
    assert mean[0] == 0
    assert mean[10] == pytest.approx(9.5)
    assert mean[50] == 49
    assert mean[51] == 51
    assert mean[99] == pytest.approx(98.5)
