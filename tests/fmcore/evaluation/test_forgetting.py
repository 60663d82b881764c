import numpy as np
import pytest

from fmcore.evaluation.bootstrap import Interval
from fmcore.evaluation.forgetting import forgetting, summary
from fmcore.evaluation.gate import SetScores


def text(name: str, bpb: np.ndarray | float, n: int = 50) -> SetScores:
    num_bytes = np.linspace(2000, 20_000, n)
    return SetScores(name, "text", [f"{i:03}" for i in range(n)], bpb * num_bytes, num_bytes)


def task(name: str, num_right: int, n: int = 50) -> SetScores:
    return SetScores(name, "task", [f"{i:03}" for i in range(n)], (np.arange(n) < num_right).astype(float), np.ones(n))


def test_positive_means_forgot_in_both_units():
    assert forgetting(text("old", 2.0), text("old", 2.3)).value == pytest.approx(0.3)
    assert forgetting(task("qa", 40), task("qa", 30)).value == pytest.approx(0.2)
    assert forgetting(text("old", 2.0), text("old", 1.9)).value == pytest.approx(-0.1)


def test_nothing_changed_nothing_forgotten():
    assert forgetting(text("old", 2.0), text("old", 2.0)) == Interval(0.0, 0.0, 0.0, 50)


def test_forgetting_is_paired():
    """Documents differ far more than the two stages do on each of them."""
    hard = np.random.default_rng(0).normal(2.0, 0.5, 50)
    interval = forgetting(text("old", hard), text("old", hard + 0.05))
    assert (interval.low, interval.high) == pytest.approx((0.05, 0.05), abs=1e-9)


def test_different_sets_are_refused():
    with pytest.raises(ValueError, match="cannot be compared"):
        forgetting(text("old", 2.0), text("other", 2.0))


def test_summary_is_the_mean_over_sets_by_unit():
    """Lopez-Paz & Ranzato's backward transfer, negated, computed by hand."""
    before = [task("a", 40), task("b", 30), text("old", 2.0), text("gone", 2.0)]
    after = [task("a", 30), task("b", 35), text("old", 2.1), task("new", 50)]
    result = summary(before, after)
    assert result["task"].value == pytest.approx(((0.8 - 0.6) + (0.6 - 0.7)) / 2)
    assert result["task"].n == 100
    assert result["text"].value == pytest.approx(0.1)
    assert summary(before, [task("new", 50)]) == {}


def test_summary_interval_agrees_with_resampling_every_set_at_once():
    rng = np.random.default_rng(1)
    sets = [(rng.random(80) < p, rng.random(80) < p - 0.2) for p in (0.9, 0.7, 0.5)]
    ids = [f"{i:03}" for i in range(80)]

    def scores(which: int) -> list[SetScores]:
        return [SetScores(f"s{k}", "task", ids, pair[which].astype(float), np.ones(80)) for k, pair in enumerate(sets)]

    losses = [before.astype(float) - after for before, after in sets]
    draws = [loss[rng.integers(0, 80, (5000, 80))].mean(axis=1) for loss in losses]
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    interval = summary(scores(0), scores(1))["task"]
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.012)
