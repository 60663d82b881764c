"""Bootstrap intervals over held-out documents: one score, or the paired difference of two.

Resampled are documents, never tokens: tokens of one document are not independent. Every interval is an
expanded percentile interval, [q(a), q(1 - a)] of the resampled statistic with

    a = Phi(-sqrt(n / (n - 1)) * t(1 - (1 - level) / 2, n - 1)),

which undoes the narrowness of the plain percentile interval at small n (Hesterberg 2015, "What teachers
should know about the bootstrap", section 5.3; arXiv 1411.5279).

Why this one: beside percentile, BCa and bootstrap-t it covered better than percentile and BCa on texts of
skewed lengths at n = 20 and 50, and stayed sane on 0/1 answers of which few differ, where bootstrap-t (the
best on skewed texts) fails.

Measured coverage of 95 % intervals at n = 20, 50, 200 documents (2,000 trials, for answers 1,000, of 2,000
resamples each):

    bits per byte, lengths log-normal (sigma 1.1, 200 B to 64 KiB)          0.92  0.92  0.94
    paired difference, the same lengths, the effect growing with length     0.88  0.90  0.92
    paired difference, lengths 2,000 B to 64 KiB (sigma 0.6)                0.94  0.94  0.95
    paired 0/1 answers, 5 % lost and 5 % won, extra = (-1, 1)               1.00  0.99  0.97
    paired 0/1 answers, 2 % lost and 1 % won, extra = (-1, 1)               1.00  1.00  0.96
    the same without extra: most samples of 20 hold no change at all        0.36  0.64  0.95

So with few documents of very unequal length an interval is too narrow, and mostly at its upper end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Values = npt.ArrayLike
Statistic = Callable[[np.ndarray], np.ndarray]  # column sums (R, k) -> (R,)
_CELLS = 2**20  # counts held at once: 8 MiB, however many documents and resamples


@dataclass(frozen=True)
class Interval:
    """A statistic of n documents and its confidence interval, all in the statistic's unit."""

    value: float
    low: float
    high: float
    n: int


def ratio_interval(
    numerators: Values, denominators: Values, *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """sum(numerators) / sum(denominators), e.g. bits over bytes: bits per byte.

    numerators, denominators: (n,), one entry per document; denominators above zero. One document alone
    gets an infinite interval. Raises ValueError on unequal lengths, no documents or values not finite.
    """
    columns = _columns(numerators, denominators)
    _check_denominators(columns[:, 1:])
    value = float(_ratio(columns.sum(axis=0, keepdims=True))[0])
    return _interval(value, *_bounds(columns, _ratio, seed, resamples, level), len(columns))


def mean_interval(
    values: Values,
    *,
    extra: Sequence[float] = (),
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """The mean of (n,) values, e.g. accuracy of 0/1 answers.

    extra: made-up values that are resampled with the others but are no part of `value` and `n`. With
    (0, 1) an accuracy of 20 out of 20 does not claim to be certain (Agresti & Coull 1998 add two of each).
    """
    columns = _columns(values)
    padded = np.concatenate([columns, np.asarray(extra, dtype=np.float64).reshape(-1, 1)])
    low, high = _bounds(np.hstack([padded, np.ones_like(padded)]), _ratio, seed, resamples, level)
    return _interval(float(columns.mean()), low, high, len(columns))


def paired_ratio_interval(
    num_a: Values,
    den_a: Values,
    num_b: Values,
    den_b: Values,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """sum(num_a) / sum(den_a) - sum(num_b) / sum(den_b) over the same resampled documents.

    With bits and bytes: bits per byte of a, less those of b. Row i of all four is document i. Equal
    scores give exactly [0, 0].
    """
    columns = _columns(num_a, den_a, num_b, den_b)
    _check_denominators(columns[:, [1, 3]])
    statistic = _ratio_difference
    if np.array_equal(columns[:, 1], columns[:, 3]):  # the same texts: fewer columns, and zero is exact
        columns = np.stack([columns[:, 0] - columns[:, 2], columns[:, 1]], axis=1)
        statistic = _ratio
    value = float(statistic(columns.sum(axis=0, keepdims=True))[0])
    return _interval(value, *_bounds(columns, statistic, seed, resamples, level), len(columns))


def paired_mean_interval(
    a: Values,
    b: Values,
    *,
    extra: Sequence[float] = (),
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """mean(a - b) over the same resampled examples; row i of both is example i.

    extra: made-up differences, as in `mean_interval`. With (-1, 1), one example lost and one won (Bonett &
    Price 2012), 0/1 answers of which none differs do not pass for a proof that none ever will.
    """
    columns = _columns(a, b)
    return mean_interval(columns[:, 0] - columns[:, 1], extra=extra, seed=seed, resamples=resamples, level=level)


def _columns(*columns: Values) -> np.ndarray:
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    if any(array.ndim != 1 or array.shape != arrays[0].shape for array in arrays):
        raise ValueError(f"one value per document is expected, got shapes {[array.shape for array in arrays]}")
    stacked = np.stack(arrays, axis=1)  # (n, columns)
    if not len(stacked):
        raise ValueError("there are no documents to take an interval over")
    if not np.isfinite(stacked).all():
        raise ValueError("values must be finite")
    return stacked


def _check_denominators(denominators: np.ndarray) -> None:
    if not (denominators > 0).all():
        raise ValueError("denominators must be above zero")


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def _ratio_difference(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]


def _interval(value: float, low: float, high: float, n: int) -> Interval:
    return Interval(value, low, high, n) if n > 1 else Interval(value, -np.inf, np.inf, n)


def _bounds(columns: np.ndarray, statistic: Statistic, seed: int, resamples: int, level: float) -> tuple[float, float]:
    """Both ends of the expanded percentile interval of a statistic of column sums; columns: (n, k)."""
    tail = _tail(len(columns), level)
    values = statistic(_resampled_sums(columns, seed, resamples))  # (resamples,)
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _resampled_sums(columns: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Column sums of documents drawn with replacement, (resamples, k); memory does not grow with n.

    How often each document is drawn is one multinomial draw, here a histogram of n uniform indices,
    several times faster than `Generator.multinomial`.
    """
    rng = np.random.default_rng(seed)
    n = len(columns)
    chunk = max(1, _CELLS // n)
    sums = np.empty((resamples, columns.shape[1]))
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        cells = rng.integers(0, n, size=(rows, n)) + np.arange(rows)[:, None] * n
        counts = np.bincount(cells.ravel(), minlength=rows * n).reshape(rows, n)
        sums[start : start + rows] = counts @ columns
    return sums


def _tail(n: int, level: float) -> float:
    """The expanded tail probability a of the module's docstring; near (1 - level) / 2 for large n."""
    if n < 2:
        return 0.0
    quantile = _student_quantile(1 - (1 - level) / 2, n - 1)
    return NormalDist().cdf(-((n / (n - 1)) ** 0.5) * quantile)


def _student_quantile(probability: float, dof: int) -> float:
    """Student's t quantile by its expansion in 1/dof (Abramowitz & Stegun 26.7.5).

    0.01 too small at dof 4, within 0.001 from dof 9.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / dof**power for power, term in enumerate(terms))
