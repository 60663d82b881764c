"""The gate: may a new model replace the champion? Paired comparisons in, one verdict out.

Pure functions between `evaluate` and `register`; a name without a champion (FIRST) never comes here.
`loss` is how much worse the new model is, whatever the unit: bits per byte new - reference, accuracy
reference - new. Positive is worse. Every interval is paired by document id (`bootstrap`), 95 %.

Per set, with L the interval of the loss and M the margin:

    n < min_documents      unclear
    L.low > M              regressed    worse than tolerated, shown
    L.high <= M            safe         no worse than tolerated, shown
      a target, L.high < 0 gain         better than the champion, shown
    otherwise              unclear      the sample cannot tell

Targets (what this training was for) compare with the champion. Protected sets compare with the best
champion of the lineage, so that weekly losses within the margin cannot add up. For the same reason a
target that shows no gain must also be within the margin of its best champion: its second comparison.

With T targets one of them would show a gain by luck T times as often, so a gain needs the interval at
level 1 - 0.05 / T (Bonferroni): nominally 2.5 % false promotions, for any T. A false refusal has 2.5 % per
set; correcting that over many protected sets (Holm) is left for later.

Measured on 2,000 simulated pairs each (margin 0.01 bpb, documents differing by 0.02 bpb, lengths
log-normal), at n = 20, 60, 200 documents:

    the same model promoted          3.5 %   3.1 %   3.9 %
    0.011 bpb worse, found safe      2.3 %   1.5 %   1.3 %
    0.020 bpb worse, found safe      0.0 %   0.0 %   0.0 %
    0.020 bpb worse, REJECT         47.4 %  82.7 %  99.8 %    (the rest INCONCLUSIVE)

0/1 answers get one made-up example lost and one won (Bonett & Price 2012). Without them 20 answers of
which none changed would read as a loss of exactly zero; with them the same answers on fewer than 300
examples cannot tell a margin of one point.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from fmcore.artifacts.types import Verdict
from fmcore.errors import StrataError
from fmcore.evaluation.bootstrap import Interval, paired_mean_interval, paired_ratio_interval
from fmcore.recipes.fields import Gate

Kind = Literal["text", "task"]
Role = Literal["target", "protected"]
Outcome = Literal["gain", "safe", "regressed", "unclear"]

LEVEL = 0.95
LOST_AND_WON = (1.0, -1.0)
HARDLY = 100  # times as many documents as there are: nobody will hold out so many


@dataclass(frozen=True, eq=False)
class SetScores:
    """One model's scores on one held-out set, a row per document or example.

    text: numerators are bits, denominators UTF-8 bytes. task: 1 for a right answer, else 0, over ones.
    ids: unique; what is compared is paired by them, in no particular order. Raises StrataError where a
    score is not finite (a diverged model), ValueError where the rows do not fit.
    """

    name: str
    kind: Kind
    ids: list[str]
    numerators: np.ndarray  # (n,)
    denominators: np.ndarray  # (n,)

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.numerators) == len(self.denominators):
            raise ValueError(f"{self.name}: ids, numerators and denominators must be equally many")
        if len(set(self.ids)) < len(self.ids):
            twice = Counter(self.ids).most_common(1)[0][0]
            raise ValueError(f"{self.name}: id {twice} is given twice")
        lost = int(np.sum(~np.isfinite(self.numerators)))
        if lost:
            raise StrataError(f"{self.name}: {lost} of {len(self.ids)} scores are not finite; the model has diverged")


@dataclass(frozen=True)
class Comparison:
    """The new model against one reference on one set.

    delta: the loss, positive is worse (bits per byte, or accuracy as a fraction). margin: the same unit.
    n: paired documents; num_unpaired: documents that one side alone has, which count for nothing.
    """

    set: str
    role: Role
    delta: Interval
    margin: float
    n: int
    outcome: Outcome
    sentence: str
    num_unpaired: int = 0


@dataclass(frozen=True)
class Decision:
    """The verdict with its evidence; reasons holds one sentence per comparison."""

    verdict: Verdict
    comparisons: tuple[Comparison, ...]
    reasons: tuple[str, ...]


def judge(
    new: Sequence[SetScores],
    champion: Sequence[SetScores],
    best: Mapping[str, Sequence[SetScores]],
    gate: Gate,
    roles: Mapping[str, Role],
    follows_base: bool = False,
) -> Decision:
    """Compare a new model with the champion, and on protected sets with the lineage's best champion.

    new, champion: one entry per set. best: set name -> its scores by every champion of the lineage since
    the last accepted regression, the current one included. roles: which sets are compared; others are
    not. follows_base: the new model is a task model whose base has moved on, so that being no worse is
    enough. A set that one side was not scored on is unclear.
    """
    mine, theirs = _by_name(new), _by_name(champion)
    num_targets = sum(role == "target" for role in roles.values())
    comparisons: list[Comparison] = []
    for name, role in roles.items():
        champions = [*best.get(name, ()), *([theirs[name]] if name in theirs else [])]
        scores = mine.get(name) or _empty(name, champions[0] if champions else None)
        strongest = _strongest(scores, champions or [_empty(name, scores)], gate)
        if role == "protected":
            comparisons.append(compare(scores, strongest, role, gate))
            continue
        reference = theirs.get(name) or _empty(name, scores)
        target = compare(scores, reference, role, gate, num_targets)
        comparisons.append(target)
        if target.outcome in ("safe", "unclear") and strongest is not reference:
            guard = compare(scores, strongest, "protected", gate)
            comparisons += [guard] if guard.delta.value > target.delta.value else []
    reasons = tuple(c.sentence for c in comparisons) or ("no held-out set to compare on",)
    return Decision(verdict_of(comparisons, follows_base), tuple(comparisons), reasons)


def verdict_of(comparisons: Sequence[Comparison], follows_base: bool = False) -> Verdict:
    """The rule over all comparisons, first match.

    REJECT: any regressed. INCONCLUSIVE: nothing compared, or any protected unclear. PROMOTE: a target
    gain, where no other target is both unclear and worse by its point value. INCONCLUSIVE: any target
    unclear. PROMOTE: follows_base (so every target is safe). HOLD: no harm shown, and no gain either.
    """
    targets = [c for c in comparisons if c.role == "target"]
    unclear = [c for c in targets if c.outcome == "unclear"]
    if any(c.outcome == "regressed" for c in comparisons):
        return "REJECT"
    if not comparisons or any(c.outcome == "unclear" for c in comparisons if c.role == "protected"):
        return "INCONCLUSIVE"
    if any(c.outcome == "gain" for c in targets) and all(c.delta.value <= 0 for c in unclear):
        return "PROMOTE"
    if unclear:
        return "INCONCLUSIVE"
    return "PROMOTE" if follows_base and targets else "HOLD"


def compare(new: SetScores, reference: SetScores, role: Role, gate: Gate, num_targets: int = 1) -> Comparison:
    """One set: the loss over the documents that both sides have, its outcome, and a sentence in words."""
    margin = gate.max_regression_bpb if new.kind == "text" else gate.max_regression_accuracy
    n = len(paired_rows(new, reference)[0])
    num_unpaired = len(new.ids) + len(reference.ids) - 2 * n
    delta = loss_interval(new, reference) if n else Interval(math.nan, -math.inf, math.inf, 0)
    outcome = _outcome(delta, margin, gate.min_documents)
    if role == "target" and outcome == "safe" and delta.high < 0:
        strict = loss_interval(new, reference, 1 - (1 - LEVEL) / num_targets) if num_targets > 1 else delta
        outcome = "gain" if strict.high < 0 else "safe"
    sentence = _sentence(new, role, delta, margin, outcome, num_unpaired, gate.min_documents)
    return Comparison(new.name, role, delta, margin, n, outcome, sentence, num_unpaired)


def loss_interval(new: SetScores, reference: SetScores, level: float = LEVEL) -> Interval:
    """How much worse `new` is than `reference`, paired by id: bits per byte, or accuracy as a fraction.

    Rows are taken in the order of ids, so the order of documents never matters. Raises ValueError where
    the two share no document.
    """
    a, b = paired_rows(new, reference)
    if new.kind == "task":
        return paired_mean_interval(reference.numerators[b], new.numerators[a], extra=LOST_AND_WON, level=level)
    return paired_ratio_interval(
        new.numerators[a],
        new.denominators[a],
        reference.numerators[b],
        reference.denominators[b],
        level=level,
    )


def paired_rows(new: SetScores, reference: SetScores) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both for the ids that both have, in the order of ids; both (n,)."""
    if (new.name, new.kind) != (reference.name, reference.kind):
        raise ValueError(f"{new.name} ({new.kind}) cannot be compared with {reference.name} ({reference.kind})")
    rows_a = {identity: row for row, identity in enumerate(new.ids)}
    rows_b = {identity: row for row, identity in enumerate(reference.ids)}
    both = sorted(rows_a.keys() & rows_b.keys())
    return (
        np.array([rows_a[identity] for identity in both], dtype=np.intp),
        np.array([rows_b[identity] for identity in both], dtype=np.intp),
    )


def _by_name(sets: Sequence[SetScores]) -> dict[str, SetScores]:
    return {scores.name: scores for scores in sets}


def _empty(name: str, like: SetScores | None) -> SetScores:
    return SetScores(name, like.kind if like else "text", [], np.empty(0), np.empty(0))


def _strongest(new: SetScores, champions: Sequence[SetScores], gate: Gate) -> SetScores:
    """The champion that `new` loses most to, each over the documents it shares with `new`.

    With one held-out set throughout, that is the champion of the best score. One that shares fewer than
    min_documents (the set was another then) steps back where another shares enough.
    """

    def rank(champion: SetScores) -> tuple[bool, float, int]:
        a, b = paired_rows(new, champion)
        if not len(a):
            return False, -math.inf, 0
        mine = new.numerators[a].sum() / new.denominators[a].sum()
        theirs = champion.numerators[b].sum() / champion.denominators[b].sum()
        loss = mine - theirs if new.kind == "text" else theirs - mine
        return len(a) >= gate.min_documents, float(loss), len(a)

    return max(champions, key=rank)


def _outcome(loss: Interval, margin: float, min_documents: int) -> Outcome:
    if loss.n < min_documents:
        return "unclear"
    if loss.low > margin:
        return "regressed"
    return "safe" if loss.high <= margin else "unclear"


def _sentence(
    scores: SetScores,
    role: Role,
    loss: Interval,
    margin: float,
    outcome: Outcome,
    num_unpaired: int,
    min_documents: int,
) -> str:
    """E.g. `plays: 0.012 bpb worse than the champion (95 % interval 0.004 to 0.020 worse; ...): cannot tell, ...`."""
    text = scores.kind == "text"
    things = "documents" if text else "examples"
    unpaired = f", {num_unpaired} more on one side alone" if num_unpaired else ""
    if loss.n < min_documents:
        needed = f"gate.min_documents asks for {min_documents}: cannot tell (more of them: {_more(text)})"
        return f"{scores.name}: {loss.n} {things} in common{unpaired}, {needed}"
    unit = "bpb" if text else "points"
    difference = f"{_number(abs(loss.value), text)} {unit} {_direction(loss.value)} than"
    if loss.value == 0:
        difference = f"the same {'bpb' if text else 'accuracy'} as"
    reference = "the champion" if role == "target" else "the best champion"
    facts = f"95 % interval {_span(loss, text)}; margin {_number(margin, text)}; {loss.n} {things}{unpaired}"
    finding = _finding(role, loss, margin, outcome, text)
    return f"{scores.name}: {difference} {reference} ({facts}): {finding}"


def _finding(role: Role, loss: Interval, margin: float, outcome: Outcome, text: bool) -> str:
    if outcome == "gain":
        return "a gain"
    if outcome == "safe" and role == "target":
        by_itself = "a gain if it were the only target, but one of several may show one by luck"
        return f"{by_itself if loss.high < 0 else 'no gain shown'}; within the margin"
    if outcome == "safe":
        return "within the margin"
    if outcome == "regressed":
        return "worse than the margin allows"
    needed = _documents_needed(loss, margin, made_up=0 if text else len(LOST_AND_WON))
    if needed > HARDLY * loss.n:
        return "cannot tell, for the difference is the margin itself, about; more of them would hardly tell"
    things = "documents" if text else "examples"
    would = f"about {needed:,.0f} {things} would, if the difference stays (more of them: {_more(text)})"
    return f"cannot tell, for the margin lies inside the interval; {would}"


def _documents_needed(loss: Interval, margin: float, made_up: int) -> float:
    """So many of them, of the same difference and spread, that the interval just reaches the margin; about.

    Its reach z * sqrt(s2 * n + made_up) / (n + made_up), with s2 the variance of a real one and 1 that of a
    made-up one, is solved for s2, and then for n with the gap between difference and margin as its reach.
    """
    gap = abs(margin - loss.value)
    reach = loss.high - loss.value if loss.value < margin else loss.value - loss.low
    if gap == 0:
        return math.inf
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    s2 = max(0.0, ((reach * (loss.n + made_up) / z) ** 2 - made_up) / loss.n)
    k = (gap / z) ** 2
    root = math.sqrt(max(0.0, s2**2 + 4 * k * made_up * (1 - s2)))
    return max(loss.n + 1, math.ceil((s2 + root) / (2 * k) - made_up))


def _more(text: bool) -> str:
    return "evaluate.max_documents, data.holdout" if text else "evaluate.max_examples, the task's holdout"


def _span(loss: Interval, text: bool) -> str:
    """Both ends, the nearer to zero first, each with its direction where the two differ."""
    low, high = sorted((loss.low, loss.high), key=abs)
    near, far = _number(abs(low), text), _number(abs(high), text)
    if far == _number(0, text):
        return f"{near} to {far}"
    if loss.low * loss.high < 0:
        return f"{near} {_direction(low)} to {far} {_direction(high)}"
    return f"{near} to {far} {_direction(high)}"


def _direction(loss: float) -> str:
    return "better" if loss < 0 else "worse"


def _number(value: float, text: bool) -> str:
    """Bits per byte with 3 decimals, accuracy in points with 1, never as minus zero."""
    digits, shown = (3, value) if text else (1, 100 * value)
    return f"{round(shown, digits) + 0.0:.{digits}f}"
