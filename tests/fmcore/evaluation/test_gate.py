import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmcore.errors import StrataError
from fmcore.evaluation.bootstrap import Interval
from fmcore.evaluation.gate import (
    Comparison,
    Decision,
    Outcome,
    Role,
    SetScores,
    compare,
    judge,
    loss_interval,
    verdict_of,
)
from fmcore.recipes.fields import Gate

GATE = Gate()
TRIALS = 100


def text(rng: np.random.Generator, n: int = 60, name: str = "plays") -> SetScores:
    num_bytes = np.clip(np.exp(rng.normal(8.3, 0.8, n)), 2000, 65_536)
    bits = num_bytes * (1.6 + rng.gamma(2, 0.15, n))
    return SetScores(name, "text", [f"{i:04x}" for i in range(n)], bits, num_bytes)


def worse(scores: SetScores, loss: float, rng: np.random.Generator | None = None, noise: float = 0.02) -> SetScores:
    """The same documents, `loss` bpb worse, each document noisily so where an rng is given."""
    per_document = np.full(len(scores.ids), loss)
    if rng is not None:
        per_document += rng.normal(0, noise, len(scores.ids))
    return dataclasses.replace(scores, numerators=scores.numerators + per_document * scores.denominators)


def task(correct: np.ndarray, name: str = "boolq") -> SetScores:
    n = len(correct)
    return SetScores(name, "task", [f"{i:04x}" for i in range(n)], correct.astype(float), np.ones(n))


def judge_one(new: SetScores, champion: SetScores, role: Role = "target", **rest: bool) -> Decision:
    return judge([new], [champion], {new.name: [champion]}, GATE, {new.name: role}, **rest)


def comparison(role: Role, outcome: Outcome, value: float = 0.0) -> Comparison:
    return Comparison("x", role, Interval(value, value - 0.1, value + 0.1, 50), 0.01, 50, outcome, "")


# Error rates over many simulated promotions


def test_same_model_measured_with_noise_is_promoted_by_luck_at_most_five_times_in_a_hundred():
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(TRIALS):
        champion = {name: text(rng, 100, name) for name in ("new", "old")}
        contender = [worse(scores, 0.0, rng) for scores in champion.values()]
        best = {name: [scores] for name, scores in champion.items()}
        roles: dict[str, Role] = {"new": "target", "old": "protected"}
        verdicts.append(judge(contender, list(champion.values()), best, GATE, roles).verdict)
    assert verdicts.count("PROMOTE") <= 5
    assert verdicts.count("REJECT") <= 5
    assert verdicts.count("HOLD") >= 85


def test_many_targets_give_luck_no_more_chances():
    """Eight targets at 2.5 % each would promote the same model 18 times in a hundred."""
    rng = np.random.default_rng(1)
    names = [f"t{i}" for i in range(8)]
    promoted = lucky = 0
    for _ in range(TRIALS):
        champion = [text(rng, 24, name) for name in names]
        contender = [worse(scores, 0.0, rng, noise=0.005) for scores in champion]
        decision = judge(contender, champion, {}, GATE, dict.fromkeys(names, "target"))
        promoted += decision.verdict == "PROMOTE"
        lucky += any(c.role == "target" and c.delta.high < 0 for c in decision.comparisons)
    assert lucky > 10
    assert promoted <= 5


def test_same_answers_by_luck_promote_a_task_model_at_most_five_times_in_a_hundred():
    rng = np.random.default_rng(2)
    promoted = 0
    for _ in range(TRIALS):
        ability = rng.beta(2, 1, 100)  # chance of a right answer, per example
        promoted += judge_one(task(rng.random(100) < ability), task(rng.random(100) < ability)).verdict == "PROMOTE"
    assert promoted <= 5


@pytest.mark.parametrize("role", ["target", "protected"])
def test_planted_regression_is_rejected(role: Role):
    """Twice the margin, on 150 documents: enough to show it 99 times in a hundred."""
    rng = np.random.default_rng(3)
    rejected = 0
    for _ in range(TRIALS):
        champion = text(rng, 150)
        rejected += judge_one(worse(champion, 0.02, rng), champion, role).verdict == "REJECT"
    assert rejected >= 95


@pytest.mark.parametrize("n", [20, 60])
def test_planted_regression_never_gets_through_where_the_sample_cannot_show_it(n: int):
    rng = np.random.default_rng(21)
    for _ in range(TRIALS):
        champion = text(rng, n)
        verdict = judge_one(worse(champion, 0.02, rng), champion, follows_base=True).verdict
        assert verdict in ("REJECT", "INCONCLUSIVE")


def test_planted_regression_on_a_protected_set_outweighs_a_gain():
    rng = np.random.default_rng(4)
    rejected = 0
    for _ in range(TRIALS):
        new, old = text(rng, 150, "new"), text(rng, 150, "old")
        contender = [worse(new, -0.2, rng), worse(old, 0.02, rng)]
        roles: dict[str, Role] = {"new": "target", "old": "protected"}
        decision = judge(contender, [new, old], {"old": [old]}, GATE, roles)
        assert decision.comparisons[0].outcome == "gain"
        rejected += decision.verdict == "REJECT"
    assert rejected >= 95


def test_real_gain_is_promoted():
    rng = np.random.default_rng(5)
    promoted = 0
    for _ in range(TRIALS):
        champion = text(rng)
        promoted += judge_one(worse(champion, -0.02, rng), champion).verdict == "PROMOTE"
    assert promoted >= 95


def test_loss_just_above_the_margin_is_never_shown_to_be_safe_too_often():
    rng = np.random.default_rng(6)
    safe = 0
    for _ in range(TRIALS):
        champion = text(rng, 50)
        safe += judge_one(worse(champion, 0.011, rng), champion, "protected").verdict == "HOLD"
    assert safe <= 8


# Single decisions


def test_identical_text_scores_hold():
    champion = text(np.random.default_rng(7))
    decision = judge_one(champion, champion)
    assert decision.verdict == "HOLD"
    assert decision.comparisons[0].delta == Interval(0.0, 0.0, 0.0, 60)
    assert decision.reasons[0].startswith(
        "plays: the same bpb as the champion (95 % interval 0.000 to 0.000; margin 0.010"
    )


@pytest.mark.parametrize(("n", "verdict"), [(100, "INCONCLUSIVE"), (400, "HOLD")])
def test_identical_answers_hold_only_where_there_are_enough(n: int, verdict: str):
    champion = task(np.arange(n) % 3 > 0)
    assert judge_one(champion, champion).verdict == verdict


def test_small_sample_is_inconclusive_however_large_the_gain():
    champion = text(np.random.default_rng(8), n=19)
    decision = judge_one(worse(champion, -1.0), champion)
    assert decision.verdict == "INCONCLUSIVE"
    assert decision.reasons == (
        "plays: 19 documents in common, gate.min_documents asks for 20: cannot tell "
        "(more of them: evaluate.max_documents, data.holdout)",
    )
    assert judge_one(worse(champion, 1.0), champion, "protected").verdict == "INCONCLUSIVE"
    assert judge([champion], [champion], {}, Gate(min_documents=19), {"plays": "target"}).verdict == "HOLD"


def test_wide_interval_is_inconclusive_and_says_what_would_do():
    rng = np.random.default_rng(9)
    champion = text(rng, n=40)
    decision = judge_one(worse(champion, 0.0, rng, noise=0.2), champion, "protected")
    assert decision.verdict == "INCONCLUSIVE"
    [compared] = decision.comparisons
    assert compared.delta.low < 0.01 < compared.delta.value
    needed = np.ceil(40 * ((compared.delta.value - compared.delta.low) / (compared.delta.value - 0.01)) ** 2)
    assert decision.reasons[0].endswith(
        f"cannot tell, for the margin lies inside the interval; about {needed:,.0f} documents would, "
        f"if the difference stays (more of them: evaluate.max_documents, data.holdout)"
    )


def test_a_narrow_interval_about_the_margin_does_not_read_as_a_contradiction():
    """It could detect far less than the margin, and still cannot tell on which side of it the loss is."""
    rng = np.random.default_rng(9)
    champion = text(rng, n=150)
    sentence = compare(worse(champion, 0.045, rng, noise=0.1), champion, "protected", Gate(max_regression_bpb=0.05))
    assert sentence.outcome == "unclear"
    assert "can detect" not in sentence.sentence
    assert "; margin 0.050; 150 documents): cannot tell, for the margin lies inside" in sentence.sentence


def test_the_documents_asked_for_are_enough():
    """The same answers, as many as the sentence asks for, are shown to be no worse; a few less are not."""
    champion = task(np.arange(100) % 3 > 0)
    sentence = judge_one(champion, champion, "protected").reasons[0]
    needed = int(sentence.split("about ")[1].split()[0].replace(",", ""))
    assert 298 <= needed < 400  # 298 is the fewest that can; reckoned with squares, it would be 865
    for n, verdict in (needed, "HOLD"), (needed * 3 // 4, "INCONCLUSIVE"):
        many = task(np.arange(n) % 3 > 0)
        assert judge_one(many, many, "protected").verdict == verdict


def test_a_difference_of_the_margin_asks_for_no_documents():
    champion = text(np.random.default_rng(20), n=40)
    noise = np.resize([0.02, -0.02], 40)
    noise[-1] -= np.sum(noise * champion.denominators) / champion.denominators[-1]
    new = dataclasses.replace(
        worse(champion, 0.01), numerators=worse(champion, 0.01).numerators + noise * champion.denominators
    )
    assert judge_one(new, champion, "protected").reasons[0].endswith("more of them would hardly tell")


def test_weekly_losses_within_the_margin_cannot_add_up():
    """Three weeks, each 0.006 bpb worse on the old set: the second week is 0.012 from the best."""
    rng = np.random.default_rng(10)
    fresh, old = text(rng, name="new"), text(rng, name="old")
    roles: dict[str, Role] = {"new": "target", "old": "protected"}
    first = [worse(fresh, -0.1), worse(old, 0.006)]
    second = [worse(fresh, -0.2), worse(old, 0.012)]
    assert judge(first, [fresh, old], {"old": [old]}, GATE, roles).verdict == "PROMOTE"
    assert judge(second, first, {"old": [old, first[1]]}, GATE, roles).verdict == "REJECT"
    assert judge(second, first, {"old": [first[1]]}, GATE, roles).verdict == "PROMOTE"  # after a reset


def test_best_is_the_best_of_the_lineage_and_not_the_first_or_last():
    old = text(np.random.default_rng(11), name="old")
    lineage = [old, worse(old, -0.1), worse(old, -0.05)]
    decision = judge([worse(old, -0.05)], [lineage[-1]], {"old": lineage}, GATE, {"old": "protected"})
    assert decision.comparisons[0].delta.value == pytest.approx(0.05)
    assert decision.verdict == "REJECT"


def test_a_champion_of_few_shared_documents_steps_back():
    old = text(np.random.default_rng(12), name="old")
    few = SetScores("old", "text", old.ids[:5], old.numerators[:5] * 0.5, old.denominators[:5])
    decision = judge([old], [old], {"old": [few, old]}, GATE, {"old": "protected"})
    assert decision.comparisons[0].n == 60
    assert decision.verdict == "HOLD"


@pytest.mark.parametrize("follows_base", [False, True])
def test_targets_without_a_gain_are_held_to_their_best_champion_too(follows_base: bool):
    """Else a task model that follows its base each week could lose a little each week."""
    best = text(np.random.default_rng(13))
    champion, new = worse(best, 0.006), worse(best, 0.012)
    lineage = {"plays": [best, champion]}
    decision = judge([new], [champion], lineage, GATE, {"plays": "target"}, follows_base)
    assert [(c.role, c.outcome) for c in decision.comparisons] == [
        ("target", "safe"),
        ("protected", "regressed"),
    ]
    assert decision.verdict == "REJECT"


def test_follows_base_promotes_what_is_no_worse():
    champion = text(np.random.default_rng(14))
    assert judge_one(worse(champion, 0.005), champion).verdict == "HOLD"
    assert judge_one(worse(champion, 0.005), champion, follows_base=True).verdict == "PROMOTE"
    assert judge_one(worse(champion, 0.015), champion, follows_base=True).verdict == "REJECT"
    assert judge_one(champion, champion, "protected", follows_base=True).verdict == "HOLD"


def test_nothing_to_compare_is_inconclusive():
    champion = text(np.random.default_rng(15))
    assert judge([champion], [champion], {}, GATE, {}, follows_base=True).verdict == "INCONCLUSIVE"
    for new, old in ([], [champion]), ([champion], []), ([], []):
        for role in "target", "protected":
            assert judge(new, old, {}, GATE, {"plays": role}).verdict == "INCONCLUSIVE"


def test_margins_come_from_the_gate():
    champion = text(np.random.default_rng(16))
    new = worse(champion, 0.015)
    assert judge([new], [champion], {}, GATE, {"plays": "protected"}).verdict == "REJECT"
    assert judge([new], [champion], {}, Gate(max_regression_bpb=0.02), {"plays": "protected"}).verdict == "HOLD"
    right = np.ones(1000)
    lost = task(np.where(np.arange(1000) < 60, 0.0, 1.0))
    assert judge([lost], [task(right)], {}, GATE, {"boolq": "protected"}).verdict == "REJECT"
    assert judge([lost], [task(right)], {}, Gate(max_regression_accuracy=0.1), {"boolq": "protected"}).verdict == "HOLD"


def test_pairing_ignores_unmatched_documents_and_counts_them():
    champion = text(np.random.default_rng(17), 60)
    new = worse(champion, 0.004)
    extra = SetScores(
        "plays",
        "text",
        ["f0", *reversed(new.ids[10:])],
        np.array([1e9, *new.numerators[:9:-1]]),
        np.array([1.0, *new.denominators[:9:-1]]),
    )
    result = compare(extra, champion, "target", GATE)
    assert (result.n, result.num_unpaired) == (50, 11)
    assert result.delta.value == pytest.approx(0.004)
    assert "50 documents, 11 more on one side alone" in result.sentence


def test_sentences_in_words():
    champion = text(np.random.default_rng(18))
    sentence = compare(worse(champion, 0.012), champion, "protected", GATE).sentence
    assert sentence == (
        "plays: 0.012 bpb worse than the best champion (95 % interval 0.012 to 0.012 worse; margin 0.010; "
        "60 documents): worse than the margin allows"
    )
    better = compare(task(np.ones(500)), task(np.arange(500) >= 100), "target", GATE).sentence
    assert better.startswith("boolq: 20.0 points better than the champion (95 % interval 16.")
    assert better.endswith("better; margin 1.0; 500 examples): a gain")
    rng = np.random.default_rng(22)
    mixed = compare(worse(champion, -0.001, rng), champion, "target", Gate(max_regression_bpb=0.1)).sentence
    assert re.search(r"interval 0\.\d{3} (better|worse) to 0\.\d{3} (better|worse); margin 0\.100; 60", mixed)
    assert mixed.endswith("no gain shown; within the margin")


def test_a_gain_that_several_targets_do_not_let_count_says_so():
    champion = text(np.random.default_rng(24))
    rng = np.random.default_rng(25)
    new = next(
        made
        for made in (worse(champion, -0.006, rng) for _ in range(100))
        if compare(made, champion, "target", GATE).outcome == "gain"
        and compare(made, champion, "target", GATE, 20).outcome == "safe"
    )
    sentence = compare(new, champion, "target", GATE, 20).sentence
    assert sentence.endswith("one of several may show one by luck; within the margin")


def test_loss_is_positive_where_the_new_model_is_worse():
    champion = text(np.random.default_rng(19))
    assert loss_interval(worse(champion, 0.3), champion).value == pytest.approx(0.3)
    assert loss_interval(task(np.zeros(30)), task(np.ones(30))).value == 1.0


@pytest.mark.parametrize(
    ("comparisons", "verdict"),
    [
        ([comparison("target", "gain", -1)], "PROMOTE"),
        ([comparison("target", "gain", -1), comparison("protected", "safe")], "PROMOTE"),
        ([comparison("target", "gain", -1), comparison("protected", "unclear", -1)], "INCONCLUSIVE"),
        ([comparison("target", "gain", -1), comparison("target", "regressed", 1)], "REJECT"),
        ([comparison("target", "gain", -1), comparison("target", "safe", 0.001)], "PROMOTE"),
        ([comparison("target", "gain", -1), comparison("target", "unclear", -0.01)], "PROMOTE"),
        ([comparison("target", "gain", -1), comparison("target", "unclear", 0.01)], "INCONCLUSIVE"),
        ([comparison("target", "gain", -1), comparison("target", "unclear", float("nan"))], "INCONCLUSIVE"),
        ([comparison("target", "safe"), comparison("target", "unclear")], "INCONCLUSIVE"),
        ([comparison("target", "unclear"), comparison("protected", "regressed")], "REJECT"),
        ([comparison("target", "safe"), comparison("protected", "safe")], "HOLD"),
        ([comparison("protected", "safe")], "HOLD"),
        ([], "INCONCLUSIVE"),
    ],
)
def test_verdict_over_several_sets(comparisons: list[Comparison], verdict: str):
    assert verdict_of(comparisons) == verdict


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-0.03, 0.03), st.integers(15, 60))
def test_order_of_documents_changes_nothing(seed: int, loss: float, n: int):
    rng = np.random.default_rng(seed)
    champion = text(rng, n)
    new = worse(champion, loss, rng)
    order = rng.permutation(n)
    shuffled = SetScores("plays", "text", [new.ids[i] for i in order], new.numerators[order], new.denominators[order])
    assert judge_one(shuffled, champion) == judge_one(new, champion)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 0.05))
def test_a_worse_model_never_gets_a_better_verdict(seed: int, loss: float):
    rng = np.random.default_rng(seed)
    champion = text(rng, 40)
    new = worse(champion, -0.01, rng)
    rank = {"REJECT": 0, "INCONCLUSIVE": 1, "HOLD": 2, "PROMOTE": 3}
    assert rank[judge_one(worse(new, loss), champion).verdict] <= rank[judge_one(new, champion).verdict]


def test_scores_that_cannot_be_judged_are_refused():
    with pytest.raises(StrataError, match="1 of 2 scores are not finite"):
        SetScores("plays", "text", ["a", "b"], np.array([1.0, np.nan]), np.ones(2))
    with pytest.raises(ValueError, match="id a is given twice"):
        SetScores("plays", "text", ["a", "a"], np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="equally many"):
        SetScores("plays", "text", ["a"], np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="cannot be compared"):
        loss_interval(task(np.ones(20), "plays"), text(np.random.default_rng(20)))
