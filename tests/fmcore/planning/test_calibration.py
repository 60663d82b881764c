"""Time and memory as measured: a few steps taken, kept, and taken again only where what they depend on changes."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fmcore.artifacts.files import read_json, write_json
from fmcore.artifacts.store import RECORD, record_digest
from fmcore.artifacts.types import Checkpoint
from fmcore.planning import calibration
from fmcore.planning.calibration import Calibrator
from fmcore.planning.cost import Cost, estimate_cost
from fmcore.planning.shape import parent_shape
from fmcore.process.launch import Child

pytestmark = pytest.mark.usefixtures("inline")


@pytest.fixture
def foretold() -> Callable[..., Cost]:
    """foretold(home, recipe) -> its cost, calibrated; lines: what it says meanwhile."""

    def call(home: Any, recipe: dict[str, Any], lines: list[str] | None = None) -> Cost:
        stage = home.resolve(recipe)
        above = parent_shape(stage.outside, stage.parent, home.store)
        said: list[str] = [] if lines is None else lines
        return estimate_cost(stage.recipe, stage.steps, above, home.store, Calibrator(home.store, said.append))

    return call


def kept(home: Any) -> list[Path]:
    return sorted((home.path / calibration.FOLDER).iterdir())


def change_record(checkpoint: Checkpoint, **changes: Any) -> None:
    """What a checkpoint would say of itself, had it been made in another way."""
    record = {**read_json(checkpoint.path / RECORD), **changes}
    write_json(checkpoint.path / RECORD, {**record, "record_sha256": record_digest(record)})


def test_a_calibration_measures_what_the_training_is(
    fresh_home: Any, foretold: Callable[..., Cost], tiny: Any, corpora: dict[str, Path]
) -> None:
    recipe = tiny.pretrain(corpora["old"])
    fresh_home.shards(recipe)
    lines: list[str] = []
    cost = foretold(fresh_home, recipe, lines)
    assert len(lines) == 1
    assert "calibrated on 3 steps" in cost.basis
    assert cost.memory is None
    made = fresh_home.train(recipe)
    assert cost.parameters == made.num_parameters
    figures = made.figures
    flops = figures["mfu"] * figures["peak_flops"] / figures["mean_tokens_per_sec"]
    assert cost.flops == pytest.approx(flops * made.num_tokens)
    assert 0.1 < cost.seconds / made.train_seconds < 10  # other work may have slowed either
    assert cost.peak_bytes == pytest.approx(figures["peak_memory_mb"] * 1e6, rel=0.2)  # of this test's process


def test_a_second_plan_takes_no_steps(
    fresh_home: Any, foretold: Callable[..., Cost], tiny: Any, corpora: dict[str, Path], monkeypatch: Any
) -> None:
    recipe = tiny.pretrain(corpora["old"])
    first = foretold(fresh_home, recipe)
    assert len(kept(fresh_home)) == 1  # and nothing of the process is left
    monkeypatch.setattr(Child, "run", lambda *_, **__: pytest.fail("steps were taken"))
    assert foretold(fresh_home, recipe) == first
    path = kept(fresh_home)[0]
    longer = foretold(fresh_home, tiny.pretrain(corpora["old"], train={"tokens": 40 * 256}))
    assert longer.seconds == pytest.approx(2 * first.seconds)
    monkeypatch.undo()
    path.write_text("{}")  # as another version may have left it
    assert "calibrated" in foretold(fresh_home, recipe).basis


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"seq_len": 16}}, {"execution": {"micro_batch": 2}}, {"execution": {"threads": 2}},
        {"model": {"config": {"hidden_size": 48}}}, {"train": {"batch_tokens": 32}},
    ],
)  # fmt: skip
def test_what_the_steps_depend_on_is_measured_anew(
    fresh_home: Any, foretold: Callable[..., Cost], tiny: Any, corpora: dict[str, Path], change: dict[str, Any]
) -> None:
    foretold(fresh_home, tiny.pretrain(corpora["old"], execution={"micro_batch": 4}))
    before = len(kept(fresh_home))
    base = {"execution": {"micro_batch": 4}}
    foretold(fresh_home, tiny.pretrain(corpora["old"], **(base | change)))
    assert len(kept(fresh_home)) == before + 1


def test_what_a_busy_machine_gave_holds_for_minutes_alone(
    fresh_home: Any, foretold: Callable[..., Cost], tiny: Any, corpora: dict[str, Path]
) -> None:
    recipe = tiny.pretrain(corpora["old"])
    foretold(fresh_home, recipe)
    [path] = kept(fresh_home)

    def changed(others: float, age_s: float) -> list[str]:
        body = read_json(path)
        write_json(path, {**body, "timing": {**body["timing"], "others": others}})
        os.utime(path, (time.time() - age_s, time.time() - age_s))
        lines: list[str] = []
        cost = foretold(fresh_home, recipe, lines)
        return [*lines, cost.basis]

    assert "while other work had 50% of the processors" in changed(0.5, 10)[0]
    assert len(changed(0.0, 1e6)) == 1
    assert len(changed(0.5, 1e6)) == 2


def test_adapters_are_calibrated_as_adapters(
    based: Any, foretold: Callable[..., Cost], tiny: Any, corpora: dict[str, Path]
) -> None:
    full = foretold(based, tiny.finetune(corpora["records"]))
    recipe = tiny.finetune(corpora["records"], method="lora", lora={"r": 2, "target_modules": "q_proj"})
    lora = foretold(based, recipe)
    assert "calibrated" in lora.basis
    made = based.train(recipe)
    assert lora.parameters == made.num_parameters
    figures = made.figures
    flops = figures["mfu"] * figures["peak_flops"] / figures["mean_tokens_per_sec"]
    assert lora.flops == pytest.approx(flops * lora.tokens)
    assert lora.save_seconds < full.save_seconds / 10
    assert lora.flops / lora.tokens < full.flops / full.tokens


def test_the_formulas_count_adapters_as_a_training_does(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    recipe = tiny.finetune(corpora["records"], method="lora", lora={"r": 2})
    stage = based.resolve(recipe)
    cost = estimate_cost(stage.recipe, stage.steps, parent_shape(None, stage.parent, based.store), based.store)
    made = based.train(recipe)
    figures = made.figures
    flops = figures["mfu"] * figures["peak_flops"] / figures["mean_tokens_per_sec"]
    assert cost.parameters == made.num_parameters
    assert cost.flops == pytest.approx(flops * cost.tokens)


def test_too_large_for_the_machine_is_said_and_not_tried(
    fresh_home: Any, foretold: Callable[..., Cost], tiny: Any, corpora: dict[str, Path], monkeypatch: Any
) -> None:
    monkeypatch.setattr(Child, "run", lambda *_, **__: pytest.fail("steps were taken"))
    recipe = tiny.pretrain(corpora["old"])
    monkeypatch.setattr(calibration, "FREE_SHARE", 1e-6)
    cost = foretold(fresh_home, recipe)
    assert "not calibrated: it needs about" in cost.basis
    assert cost.memory is not None
    assert cost.peak_bytes == cost.memory.peak
    monkeypatch.undo()
    monkeypatch.setattr(Child, "run", lambda *_, **__: pytest.fail("steps were taken"))
    monkeypatch.setattr(calibration, "STEPS_S", 0.0)
    assert "not calibrated: 3 micro-batches take about" in foretold(fresh_home, recipe).basis
    several = tiny.pretrain(corpora["old"], execution={"processes": 2})
    assert "not calibrated: 2 processes share the work" in foretold(fresh_home, several).basis


def test_a_calibration_that_fails_is_no_failed_plan(
    fresh_home: Any, foretold: Callable[..., Cost], tiny: Any, corpora: dict[str, Path]
) -> None:
    cost = foretold(fresh_home, tiny.pretrain(corpora["old"], model={"config": {"num_attention_heads": 3}}))
    assert "not calibrated: its process failed" in cost.basis
    assert cost.seconds > 0
    assert not kept(fresh_home)


def test_an_earlier_training_of_the_same_kind_is_better_than_steps(
    based: Any, foretold: Callable[..., Cost], tiny: Any, corpora: dict[str, Path]
) -> None:
    [base] = based.store.all(Checkpoint)
    recipe = tiny.pretrain(corpora["old"], train={"lr": 4e-3})
    assert "calibrated" in foretold(based, recipe).basis  # it took less than five seconds, which says little
    change_record(base, train_seconds=100.0)
    cost = foretold(based, recipe)
    assert f"as {base.name}-{base.short} went" in cost.basis
    assert cost.seconds == pytest.approx(cost.tokens / base.figures["mean_tokens_per_sec"])
    assert cost.peak_bytes == base.figures["peak_memory_mb"] * 1e6
    for other in (
        {"execution": {"threads": 2}}, {"train": {"batch_tokens": 512}}, {"execution": {"micro_batch": 1}},
        {"model": {"config": {"intermediate_size": 96}}}, {"train": {"seq_len": 64}},
    ):  # fmt: skip
        assert "calibrated" in foretold(based, tiny.pretrain(corpora["old"], **other)).basis, other
    assert "calibrated" in foretold(based, tiny.finetune(corpora["records"], method="lora")).basis
    change_record(base, train_seconds=100.0, conditions={**base.conditions, "machine": "another"})
    assert "calibrated" in foretold(based, recipe).basis
    change_record(base, train_seconds=100.0, conditions={})  # of before that was recorded
    assert "calibrated" in foretold(based, recipe).basis


def test_the_conditions_of_a_training_are_recorded(base_home: Any) -> None:
    [base] = base_home.store.all(Checkpoint)
    conditions = base.conditions
    assert (conditions["device"], conditions["processes"], conditions["threads"]) == ("cpu", 1, 1)
    assert conditions["micro_batch"] == 64  # 2,048 tokens
    assert conditions["machine"].endswith(f"{os.cpu_count()} cores")
    json.dumps(conditions)
