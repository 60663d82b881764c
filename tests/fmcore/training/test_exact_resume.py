"""Killed at any moment and run again, a training ends in the bits of an undisturbed one.

A driver process stands for the flow, so that the parent can be killed too. Moments are steps seen in
metrics.jsonl plus a random fraction of a second, drawn anew in every run and printed.
"""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.resuming import (
    GRACE_S,
    PATIENCE_S,
    Case,
    child_of,
    copy_of,
    driver_of,
    finish,
    gone,
    prepare,
    result,
    training,
    wait_for,
)

STEPS = 400


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny: Any, corpora: dict[str, Path]) -> Case:
    """Documents and shards, made once."""
    execution = {"save_interval_s": 0.2, "grace_s": GRACE_S, "retries": 0}
    given = tiny.pretrain(corpora["old"], train={"tokens": STEPS * 256}, execution=execution)
    return prepare(tmp_path_factory.mktemp("prepared"), given)


@pytest.fixture
def case(prepared: Case, tmp_path: Path) -> Case:
    return copy_of(prepared, tmp_path)


def disturb(case: Case, log: Path, how: str, until: int, delay: float) -> None:
    """One attempt that is ended by `how`; nothing of it is left running."""
    with training(case, log, until=until) as (driver, child):
        time.sleep(delay)
        if how == "child":
            child.kill()
            driver.wait(PATIENCE_S)
        elif how == "parent":
            driver.kill()
            driver.wait()
        elif how == "both":
            driver.kill()
            child.kill()
            driver.wait()
        else:
            driver.send_signal(signal.SIGTERM)
            assert driver.wait(GRACE_S + 5) == 75
        wait_for(lambda: gone(child), "the child's end")


@pytest.fixture(scope="module")
def undisturbed(prepared: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    case = copy_of(prepared, folder)
    assert driver_of(case, folder / "log").wait(PATIENCE_S) == 0, (folder / "log").read_text()
    made = result(case)
    assert [row["step"] for row in made["rows"]] == list(range(1, STEPS + 1))
    assert {"final/model.safetensors", "stable/model.safetensors", "stable/optimizer.safetensors"} <= set(
        made["digests"]
    )
    return made


def test_killed_twice_it_ends_in_the_same_bits(case: Case, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """The parent alone first, whose child has to end by itself, then the child."""
    log = tmp_path / "log"
    delays = [random.random() * 0.3 for _ in range(2)]
    print("delays", delays)
    disturb(case, log, "parent", until=20, delay=delays[0])
    assert 20 <= case.steps_done() < STEPS
    disturb(case, log, "child", until=200, delay=delays[1])
    assert case.folder().suffix == ".partial"
    assert finish(case, log) == undisturbed
    text = (case.folder() / "log.txt").read_text()
    assert text.count("resuming after step") == 2
    assert "resuming after step 0" not in text


def test_sigterm_to_the_parent_saves_and_leaves_nobody(case: Case, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    log = tmp_path / "log"
    with training(case, log, until=10) as (driver, child):
        start = time.monotonic()
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(GRACE_S + 5) == 75
        assert time.monotonic() - start < GRACE_S
        assert gone(child)  # ended before its parent did
    folder = case.folder()
    done = case.steps_done()
    pointer = json.loads((folder / "latest" / "pointer.json").read_text())["folder"]
    assert pointer == f"step-{done:08d}"  # not one step is lost
    assert not (folder / "artifact.json").exists()
    assert finish(case, log) == undisturbed
    assert f"resuming after step {done}:" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("interval", [0, 0.2, 0, 0.2])
def test_five_random_moments(case: Case, tmp_path: Path, undisturbed: dict[str, Any], interval: float) -> None:
    """Child, parent, both, one of them again, and one that comes while the child still imports: 20 kills in four
    trainings. interval 0 saves after every step, so that most moments fall into a save."""
    case, log = copy_of(case, tmp_path, save_interval_s=interval), tmp_path / "log"
    hows = random.sample(["child", "parent", "both", "child"], 4)
    steps = sorted(random.sample(range(5, STEPS // 2), 4))
    moments = [
        ("both", -1, random.random() * 4),
        *((how, at, random.random() * 0.2) for how, at in zip(hows, steps, strict=True)),
    ]
    print("moments", moments)
    for how, until, delay in moments:
        disturb(case, log, how, until, delay)
    assert case.folder().suffix == ".partial"
    assert finish(case, log) == undisturbed


@pytest.mark.slow
def test_a_second_builder_waits_for_an_orphaned_child(case: Case, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """The parent is killed and the run started again at once, while the old child still saves."""
    log = tmp_path / "log"
    with training(case, log, until=30) as (driver, child):
        os.kill(child.pid, signal.SIGSTOP)
        driver.kill()
        driver.wait()
        second = driver_of(case, log)
        time.sleep(3)
        assert second.poll() is None
        assert child_of(second) is None  # it builds nothing while the lock is held
        os.kill(child.pid, signal.SIGCONT)
        assert second.wait(PATIENCE_S) == 0, log.read_text()
    assert "waiting for process" in log.read_text()
    assert result(case) == undisturbed


@pytest.mark.slow
def test_two_drivers_at_once_make_one_result(case: Case, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    drivers = [driver_of(case, tmp_path / f"log{i}") for i in range(2)]
    assert [driver.wait(PATIENCE_S) for driver in drivers] == [0, 0]
    logs = [(tmp_path / f"log{i}").read_text() for i in range(2)]
    assert sum("parameters" in text for text in logs) == 1  # one of them trained
    assert result(case) == undisturbed
    assert len(list((case.home / "artifacts" / "checkpoint").glob("plays-*"))) == 1
