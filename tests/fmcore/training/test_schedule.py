"""Learning rates over steps."""

import math

import pytest

from fmcore.training.schedule import Schedule


def wsd(**changes: object) -> Schedule:
    given = {"kind": "wsd", "peak_lr": 2.0, "num_steps": 100, "warmup_steps": 10, "decay_steps": 20}
    return Schedule(**(given | changes))


def test_wsd_values() -> None:
    lr = wsd().lr
    assert [lr(0), lr(4), lr(9)] == pytest.approx([0.2, 1.0, 2.0])
    assert {lr(step) for step in range(10, 81)} == {2.0}
    assert lr(81) == pytest.approx(2 * (1 - math.sqrt(1 / 20)))
    assert lr(99) == pytest.approx(2 * (1 - math.sqrt(19 / 20)))
    assert 0 < lr(99) < lr(90) < lr(81) < 2


def test_cosine_values() -> None:
    lr = wsd(kind="cosine").lr
    assert lr(9) == pytest.approx(2.0)
    assert lr(10) == pytest.approx(2.0)
    assert lr(55) == pytest.approx(2 * 0.55)  # half way down to a tenth
    assert lr(100) == pytest.approx(0.2)


def test_stable_step_is_where_the_decay_begins() -> None:
    schedule = wsd()
    assert schedule.stable_step == 80
    assert schedule.lr(79) == schedule.lr(80) == 2.0  # the step after it is taken at the peak, then it falls
    assert schedule.lr(81) < 2.0
    assert wsd(kind="cosine").stable_step is None
    assert wsd(num_steps=25, warmup_steps=10).stable_step is None  # it would lie inside the warmup
    assert wsd(num_steps=30, warmup_steps=10).stable_step == 10


def test_no_warmup_starts_at_the_peak() -> None:
    """Continuous pre-training starts at the stable rate."""
    assert wsd(warmup_steps=0).lr(0) == 2.0


def test_all_decay() -> None:
    schedule = wsd(warmup_steps=0, decay_steps=100)
    assert schedule.lr(0) == 2.0
    assert schedule.stable_step == 0
