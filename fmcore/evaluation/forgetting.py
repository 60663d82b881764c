"""Forgetting: what a training stage lost on sets that were scored before it and after it.

With R[i, j] the score on set j after stage i, higher better, backward transfer is the mean over the old
sets of R[T, j] - R[j, j] (Lopez-Paz & Ranzato 2017, arXiv 1706.08840); forgetting is the mean of
max over i < T of R[i, j] - R[T, j] (Chaudhry et al. 2018, arXiv 1801.10112). Here forgetting on set j is
`before` - `after` in accuracy, or `after` - `before` in bits per byte, where lower is better: positive
means forgot, negative that the stage helped. With `before` the parent's scores and one stage between, it is
minus backward transfer; with the best earlier stage's scores it is Chaudhry's forgetting.
"""

import math
from collections.abc import Sequence

from fmcore.evaluation.bootstrap import Interval
from fmcore.evaluation.gate import Kind, SetScores, loss_interval


def forgetting(before: SetScores, after: SetScores) -> Interval:
    """What was forgotten on one set, over the documents that both sides have, paired.

    In bits per byte or accuracy as a fraction; positive = forgot. Raises ValueError where the two are of
    different sets or share no document.
    """
    return loss_interval(after, before)


def summary(before: Sequence[SetScores], after: Sequence[SetScores]) -> dict[Kind, Interval]:
    """Mean forgetting over the sets that both sides have: text in bits per byte, tasks in accuracy.

    Each set counts the same, as in the papers. The two units are never averaged together; a kind with no
    set in common is left out. n is the number of documents of all sets. The interval combines those of
    the sets, which hold different documents (square-and-add, Zou & Donner 2008):

        mean - low = sqrt(sum over j of (value_j - low_j)^2) / J, and likewise for high.
    """
    earlier = {scores.name: scores for scores in before}
    losses: dict[Kind, list[Interval]] = {}
    for scores in after:
        if scores.name in earlier:
            losses.setdefault(scores.kind, []).append(forgetting(earlier[scores.name], scores))
    return {kind: _mean(intervals) for kind, intervals in losses.items()}


def _mean(intervals: Sequence[Interval]) -> Interval:
    num_sets = len(intervals)
    value = sum(i.value for i in intervals) / num_sets
    below = math.hypot(*(i.value - i.low for i in intervals)) / num_sets
    above = math.hypot(*(i.high - i.value for i in intervals)) / num_sets
    return Interval(value, value - below, value + above, sum(i.n for i in intervals))
