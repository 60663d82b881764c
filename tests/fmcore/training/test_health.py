"""Steps that must not change the weights: found, skipped, gone back from, and left out of the order and the ledger."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fmcore.artifacts.files import read_json
from fmcore.data.ledger import Ledger
from fmcore.errors import TrainingError
from fmcore.process.launch import TrainingRefused
from fmcore.training import loop, loss
from fmcore.training.batches import Batches
from fmcore.training.health import MIN_STEPS, WINDOW, Health
from fmcore.training.spec import TrainSpec

# ---- what is found


def after(num: int, value: Callable[[int], float] = lambda n: 3 + 0.1 * math.sin(n)) -> Health:
    health = Health()
    for number in range(num):
        assert health.begin().problem(value(number), 1.0, 6) == ""
        health.passed(value(number), 1.0)
    return health


def problem(health: Health, loss: float, grad_norm: float, sigma: float) -> str:
    """Of a step that knows all before it."""
    return health.expected[-1].problem(loss, grad_norm, sigma)


def test_a_step_does_not_wait_for_the_one_before() -> None:
    """What it is held against is known before its predecessor ends, and the same whenever that one is asked."""
    waiting, lagging = Health(), Health()
    before: float | None = None
    for number in range(100):
        loss = 3 + 0.1 * math.sin(number)
        assert (expected := waiting.begin()) == lagging.begin()
        assert len(lagging.expected) == (1 if before is None else 0)
        assert expected.loss.steps == (0 if number < MIN_STEPS + 1 else number - 1)
        waiting.passed(loss, 1.0)
        if before is not None:
            lagging.passed(before, 1.0)
        before = loss


@pytest.mark.parametrize("loss", [3.0, 3.7, math.nan, math.inf])
@pytest.mark.parametrize("sigma", [0, 6])
def test_the_device_and_the_words_agree(loss: float, sigma: float) -> None:
    expected = after(100).expected[0]
    [highest, highest_norm] = expected.limits(sigma)
    may = math.isfinite(loss) and loss <= highest and highest_norm >= 1
    assert may == (expected.problem(loss, 1.0, sigma) == "")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found_from_the_first_step_on(bad: float) -> None:
    assert problem(Health(), bad, 1.0, 0) == f"loss is {bad}"
    assert problem(Health(), 1.0, bad, 6) == f"gradient norm is {bad}"


def test_a_spike_is_found_once_enough_is_known() -> None:
    spread = np.std([0.1 * math.sin(n) for n in range(MIN_STEPS)])
    assert problem(after(MIN_STEPS - 1), 99, 1, 6) == ""
    known = after(MIN_STEPS)
    mean = np.mean(known.losses)
    assert problem(known, mean + 5.9 * spread, 1, 6) == ""
    assert problem(known, mean + 6.1 * spread, 1, 6).startswith("loss is 3.4")
    assert "6.1 standard deviations above the mean of the last 64 steps" in problem(known, mean + 6.1 * spread, 1, 6)
    assert problem(known, 99, 1, 0) == ""  # switched off
    assert problem(known, -99, 1, 6) == ""  # it may fall as it likes
    assert problem(known, 3, 1.05, 6) == ""  # norms that never moved: one in a hundred is no outlier
    assert problem(known, 3, 1.07, 6).startswith("gradient norm is 1.07")


def test_the_window_rolls_and_survives_being_saved() -> None:
    health = after(300)
    assert len(health.losses) == len(health.grad_norms) == WINDOW
    again = Health.model_validate(json.loads(health.model_dump_json()))
    assert again == health
    assert problem(again, 3.7, 1, 6) == problem(health, 3.7, 1, 6) != ""


def test_when_to_go_back() -> None:
    health = Health()
    assert [health.failed(step, 1000) for step in range(10)] == [False] * 9 + [True]
    assert health.skipped == list(range(10))
    health.passed(1, 1)
    assert [health.failed(step, 20) for step in range(20, 22)] == [False, True]


# ---- what training does


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], float]], list[int]]:
    """Lets a function of the number of the call (one micro-batch a step here) multiply the loss."""

    def install(factor: Callable[[int], float]) -> list[int]:
        whole, calls = loss.chunked_loss, []

        def changed(*given: Any) -> torch.Tensor:
            calls.append(len(calls))
            return whole(*given) * factor(calls[-1])

        monkeypatch.setattr(loss, "chunked_loss", changed)
        return calls

    return install


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], losses: Any, factor: float, capfd: pytest.CaptureFixture[str]
) -> None:
    losses(lambda call: factor if call == 7 else 1.0)
    recipe = tiny.pretrain(corpora["old"])
    made = fresh_home.train(recipe)
    written = rows(made.path)
    assert [row["step"] for row in written] == list(range(1, 21))
    assert [row["step"] for row in written if row["skipped"]] == [8]
    assert written[7]["loss"] is None
    assert all(math.isfinite(row["loss"]) for row in written[8:])
    assert "step 8 changes nothing: its loss is" in capfd.readouterr().out
    assert all(torch.isfinite(tensor).all() for tensor in load_file(made.final / "model.safetensors").values())


@pytest.mark.usefixtures("inline")
def test_what_only_a_skipped_step_held_is_not_seen(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], losses: Any
) -> None:
    recipe = tiny.pretrain(corpora["old"], train={"tokens": 3 * 256})  # less than an epoch
    losses(lambda call: math.nan if call == 1 else 1.0)
    made = fresh_home.train(recipe)
    spec = fresh_home.spec(recipe)
    batches = Batches(spec, pad_id=2)
    [(source, without)] = batches.seen_samples(3, [1])
    [(_, everything)] = batches.seen_samples(3)
    assert len(everything) > len(without)
    ids = {bytes(row) for row in Ledger(made.ledger("final")).ids}
    seen = {bytes(row) for row in np.unique(source.samples.stream.ids[source.samples.documents(without)], axis=0)}
    assert ids == seen


@pytest.mark.usefixtures("inline")
def test_trouble_goes_back_and_leaves_the_data_out(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], losses: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """40 steps: from step 13 on four are bad in a row, which is how many a run of 40 bears."""
    calls = losses(lambda call: math.nan if 12 <= call < 16 else 1.0)
    made = fresh_home.train(tiny.pretrain(corpora["old"], train={"tokens": 40 * 256}))
    said = capfd.readouterr().out
    assert "4 steps in a row had to be skipped; going back to step 0, without the data of the 16 steps since" in said
    written = rows(made.path)
    assert [row["step"] for row in written] == list(range(1, 41))
    assert not any(row["skipped"] for row in written)  # those rows were cut back
    assert len(calls) == 40 + 16
    counted = {name: made.figures[name] for name in ("skipped_steps", "lost_steps", "rollbacks", "restarts")}
    assert counted == {"skipped_steps": 0, "lost_steps": 16, "rollbacks": 1, "restarts": 0}


@pytest.mark.usefixtures("inline")
def test_what_was_left_out_is_not_seen(fresh_home: Any, tiny: Any, corpora: dict[str, Path], losses: Any) -> None:
    recipe = tiny.pretrain(corpora["old"], train={"tokens": 3 * 256})  # with what is left out less than an epoch
    losses(lambda call: math.nan if call in (1, 2) else 1.0)
    made = fresh_home.train(recipe)
    assert made.figures["rollbacks"] == 1
    batches = Batches(fresh_home.spec(recipe), pad_id=2)
    [(source, disturbed)] = batches.seen_samples(3)
    batches.order = batches.order.without(0, 3)
    [(_, seen)] = batches.seen_samples(3)
    assert not set(seen) & set(batches_of(fresh_home.spec(recipe), range(3)))
    assert set(seen) != set(disturbed)
    [path] = (made.path / "seen" / "final").glob("*.bin")
    assert np.fromfile(path, dtype=np.uint32).tolist() == seen.tolist()
    ids = {bytes(row) for row in Ledger(made.ledger("final")).ids}
    assert ids == {bytes(row) for row in source.samples.stream.ids[source.samples.documents(seen)]}


def batches_of(spec: TrainSpec, steps: range) -> list[int]:
    """The numbers of the samples in some steps of the undisturbed order."""
    [(_, numbers)] = Batches(spec, pad_id=2).seen_samples(len(steps))
    return numbers.tolist()


@pytest.mark.usefixtures("inline")
def test_it_fails_clearly_when_going_back_does_not_help(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], losses: Any
) -> None:
    losses(lambda call: math.nan if call >= 5 else 1.0)
    with pytest.raises(TrainingRefused, match=r"its loss is nan, .* after going back 3 times\..*lower train\.lr"):
        fresh_home.train(tiny.pretrain(corpora["old"], train={"tokens": 40 * 256}))
    assert issubclass(TrainingRefused, TrainingError)


@pytest.mark.usefixtures("inline")
def test_killed_after_going_back_it_ends_in_the_same_bits(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trouble by what the data is, not by when: every batch that holds a certain row is bad."""
    recipe = tiny.pretrain(corpora["old"], train={"tokens": 40 * 256}, execution={"save_interval_s": 0})
    spec = fresh_home.spec(recipe)
    order = Batches(spec, pad_id=2)
    bad = {order.at(step).input_ids.numpy().tobytes() for step in range(12, 16)}
    whole = loss.chunked_loss
    current: list[bytes] = []

    class Watched(Batches):
        def at(self, step: int, **given: Any) -> Any:
            batch = super().at(step, **given)
            current[:] = [batch.input_ids.numpy().tobytes()]
            return batch

    monkeypatch.setattr("fmcore.training.child.Batches", Watched)
    monkeypatch.setattr(loss, "chunked_loss", lambda *g: whole(*g) * (math.nan if current[0] in bad else 1.0))
    first = fresh_home.train(recipe)
    weights = load_file(first.final / "model.safetensors")
    state_kept = read_json(first.path / "spec.json")
    assert state_kept["spike_sigma"] == 6

    class Killed(Exception):
        pass

    beats = 0
    when = random.Random(1).randrange(20, 30)

    def beat(self: Any) -> None:
        nonlocal beats
        beats += 1
        if beats == when:
            raise Killed

    shutil.rmtree(first.path)
    monkeypatch.setattr(loop.Heartbeat, "beat", beat)
    with pytest.raises(Killed):
        fresh_home.train(recipe)
    again = fresh_home.train(recipe)
    resumed = load_file(again.final / "model.safetensors")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert again.figures["restarts"] == 1
    assert again.figures["lost_steps"] >= first.figures["lost_steps"] == 16
