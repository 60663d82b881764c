import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmcore.evaluation import bootstrap
from fmcore.evaluation.bootstrap import (
    Interval,
    mean_interval,
    paired_mean_interval,
    paired_ratio_interval,
    ratio_interval,
)


def texts(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits and bytes of n documents of very unequal length, (n,) each."""
    num_bytes = np.clip(np.exp(rng.normal(7.6, 1.1, n)), 200, 65_536)
    return num_bytes * (1.6 + rng.gamma(2, 0.15, n)), num_bytes


def half_width(interval: Interval) -> float:
    return (interval.high - interval.low) / 2


def test_value_is_the_ratio_of_sums_not_the_mean_of_ratios():
    interval = ratio_interval([100.0, 10.0], [10.0, 10.0])
    assert interval.value == 5.5
    assert ratio_interval([100.0, 1.0], [10.0, 1.0]).value == pytest.approx(101 / 11)
    assert interval.n == 2


def test_interval_brackets_the_value_and_narrows_with_the_root_of_n():
    rng = np.random.default_rng(0)
    small = ratio_interval(*texts(rng, 100))
    large = ratio_interval(*texts(rng, 1600))
    assert small.low < small.value < small.high
    assert half_width(small) / half_width(large) == pytest.approx(4, rel=0.4)


@pytest.mark.parametrize(("n", "least"), [(20, 0.88), (50, 0.89), (200, 0.92)])
def test_coverage_on_skewed_documents(n: int, least: float):
    trials, truth = 500, 1.9  # 1.6 + 2 * 0.15, independent of length
    rng = np.random.default_rng(n)
    covered = 0
    for _ in range(trials):
        interval = ratio_interval(*texts(rng, n), resamples=600)
        covered += interval.low <= truth <= interval.high
    assert least <= covered / trials <= 0.98


def test_expanded_interval_is_wider_than_the_plain_percentile_interval_at_small_n():
    values = np.random.default_rng(1).normal(size=20)
    sums = bootstrap._resampled_sums(values[:, None], 0, 10_000)[:, 0] / 20
    plain = np.quantile(sums, [0.025, 0.975])
    interval = mean_interval(values)
    assert interval.high - interval.low > 1.05 * (plain[1] - plain[0])


@pytest.mark.parametrize(("dof", "quantile"), [(9, 2.26216), (19, 2.09302), (49, 2.00958), (999, 1.96234)])
def test_student_quantile_agrees_with_the_tables(dof: int, quantile: float):
    assert bootstrap._student_quantile(0.975, dof) == pytest.approx(quantile, abs=1e-3)


def test_paired_difference_is_far_narrower_than_two_unpaired_scores():
    rng = np.random.default_rng(2)
    bits, num_bytes = texts(rng, 100)
    worse = bits + num_bytes * rng.normal(0.02, 0.01, 100)
    paired = paired_ratio_interval(worse, num_bytes, bits, num_bytes)
    assert paired.low > 0
    assert half_width(paired) < half_width(ratio_interval(bits, num_bytes)) / 5


def test_paired_ratio_with_unequal_denominators_agrees_with_a_plain_loop():
    rng = np.random.default_rng(3)
    bits, num_bytes = texts(rng, 60)
    other_bytes = num_bytes * rng.uniform(0.9, 1.1, 60)
    interval = paired_ratio_interval(bits, num_bytes, bits, other_bytes)
    draws = rng.integers(0, 60, size=(10_000, 60))
    loop = [bits[d].sum() / num_bytes[d].sum() - bits[d].sum() / other_bytes[d].sum() for d in draws]
    assert interval.value == pytest.approx(bits.sum() / num_bytes.sum() - bits.sum() / other_bytes.sum())
    tail = bootstrap._tail(60, 0.95)
    assert [interval.low, interval.high] == pytest.approx(np.quantile(loop, [tail, 1 - tail]), abs=0.003)


def test_equal_scores_give_exactly_zero():
    bits, num_bytes = texts(np.random.default_rng(4), 37)
    assert paired_ratio_interval(bits, num_bytes, bits, num_bytes) == Interval(0.0, 0.0, 0.0, 37)
    assert paired_mean_interval(np.ones(37), np.ones(37)) == Interval(0.0, 0.0, 0.0, 37)
    assert mean_interval(np.ones(37)) == Interval(1.0, 1.0, 1.0, 37)


def test_extra_values_widen_but_do_not_move_the_value():
    answers = np.ones(20)
    interval = mean_interval(answers, extra=(0.0, 1.0))
    assert interval.value == 1.0
    assert interval.n == 20
    assert interval.low < 0.95
    paired = paired_mean_interval(answers, answers, extra=(-1.0, 1.0))
    assert paired.value == 0.0
    assert paired.low < -0.05 < 0.05 < paired.high


def test_extra_values_keep_rare_losses_covered():
    """One answer in a hundred lost: 20 examples mostly show none, and must not claim to exclude it."""
    rng = np.random.default_rng(5)
    excluded = {(): 0, (-1.0, 1.0): 0}
    for _ in range(200):
        lost = (rng.random(20) < 0.01).astype(float)
        for extra in excluded:
            excluded[extra] += paired_mean_interval(lost, np.zeros(20), extra=extra, resamples=500).high < 0.01
    assert excluded[()] > 100
    assert excluded[(-1.0, 1.0)] <= 10


def test_seed_decides_the_interval():
    bits, num_bytes = texts(np.random.default_rng(6), 40)
    assert ratio_interval(bits, num_bytes, seed=1) == ratio_interval(bits, num_bytes, seed=1)
    assert ratio_interval(bits, num_bytes, seed=1) != ratio_interval(bits, num_bytes, seed=2)


def test_level_sets_the_width():
    values = np.random.default_rng(7).normal(size=100)
    assert half_width(mean_interval(values, level=0.99)) > 1.2 * half_width(mean_interval(values, level=0.95))


def test_memory_is_flat_in_resamples():
    bits, num_bytes = texts(np.random.default_rng(8), 2000)
    tracemalloc.start()
    ratio_interval(bits, num_bytes, resamples=3000)  # all counts at once would be 48 MB, and their indices too
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_chunks_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch):
    bits, num_bytes = texts(np.random.default_rng(9), 50)
    whole = ratio_interval(bits, num_bytes, resamples=2000)
    monkeypatch.setattr(bootstrap, "_CELLS", 50 * 7)
    parts = ratio_interval(bits, num_bytes, resamples=2000)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_one_document_decides_nothing():
    assert ratio_interval([3.0], [2.0]) == Interval(1.5, -np.inf, np.inf, 1)
    assert mean_interval([1.0], extra=(0.0, 1.0)).low == -np.inf


@pytest.mark.parametrize(
    ("numerators", "denominators", "words"),
    [
        ([], [], "no documents"),
        ([1.0, 2.0], [1.0], "one value per document"),
        ([1.0, np.nan], [1.0, 1.0], "finite"),
        ([1.0, 2.0], [1.0, 0.0], "above zero"),
    ],
)
def test_what_cannot_be_resampled_is_refused(numerators: list[float], denominators: list[float], words: str):
    with pytest.raises(ValueError, match=words):
        ratio_interval(numerators, denominators)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30), st.floats(0.1, 10))
def test_an_interval_scales_with_its_values(values: list[float], factor: float):
    plain = mean_interval(values, resamples=200)
    scaled = mean_interval(np.asarray(values) * factor, resamples=200)
    assert [scaled.low, scaled.value, scaled.high] == pytest.approx(
        [plain.low * factor, plain.value * factor, plain.high * factor], rel=1e-6, abs=1e-6
    )
    assert plain.low <= plain.high
