"""The training state on disk: exact, verified, two kept, no pickle."""

import itertools
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fmcore.artifacts.files import sha256_file
from fmcore.training import checkpoint as checkpoint_module
from fmcore.training.checkpoint import (
    TrainState,
    damage,
    initial_state,
    load_anchor,
    load_latest,
    peek_latest,
    write_latest,
    write_state,
)
from fmcore.training.health import Health
from fmcore.training.optimizer import make_adamw
from fmcore.training.trainee import Trainee

ANCHOR = 10


def trainee(seed: int = 0) -> Trainee:
    """Some parameters, one frozen, and an optimizer that has taken a step."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    optimizer = make_adamw(model.named_parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return Trainee(model, [optimizer])


def state(step: int) -> TrainState:
    return initial_state(threads=1, micro_batch=8).model_copy(
        update={"step": step, "tokens": step * 256, "smoothed_loss": 0.1 + 0.2}
    )


def save_latest(latest: Path, trainee: Trainee, state: TrainState, anchor_steps: int) -> None:
    write_latest(latest, trainee.snapshot(), state, anchor_steps)


def saved(latest: Path, *steps: int) -> Path:
    for step in steps:
        save_latest(latest, trainee(step), state(step), ANCHOR)
    return latest


def same(a: Trainee, b: Trainee) -> bool:
    weights = all(torch.equal(a.parameters[name], b.parameters[name]) for name in a.parameters)
    states = [
        torch.equal(a.optimizers[0].state[p][key], b.optimizers[0].state[b.parameters[name]][key])
        for name, p in a.parameters.items()
        for key in ("step", "exp_avg", "exp_avg_sq")
    ]
    return weights and all(states)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    saved(tmp_path, 7)
    other = trainee(99)
    assert load_latest(tmp_path, other) == state(7)
    assert same(trainee(7), other)
    assert not same(trainee(8), other)


def test_going_back_to_before_the_first_step_leaves_no_moments(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 4)
    fresh = Trainee(model, [make_adamw(model.named_parameters(), betas=(0.9, 0.95), weight_decay=0.1)])
    save_latest(tmp_path, fresh, state(0), ANCHOR)
    model(torch.randn(5, 3)).square().sum().backward()
    fresh.optimizers[0].step()
    assert fresh.snapshot().optimizer
    assert load_latest(tmp_path, fresh) == state(0)
    assert not fresh.optimizers[0].state
    assert not fresh.snapshot().optimizer


def test_two_are_kept_and_the_pointer_names_the_newest(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    pointer = json.loads((tmp_path / "pointer.json").read_text())
    assert pointer["folder"] == "step-00000003"
    assert pointer["manifests"] == {
        name: sha256_file(tmp_path / name / "manifest.json") for name in ("step-00000002", "step-00000003")
    }


def test_anchors_are_kept_too_and_the_last_but_one_is_gone_back_to(tmp_path: Path) -> None:
    saved(tmp_path, 0, 10, 17, 20, 23, 24, 25)
    assert [int(p.name[5:]) for p in sorted(tmp_path.glob("step-*"))] == [10, 20, 24, 25]
    other = trainee(99)
    assert load_anchor(tmp_path, other, ANCHOR) == state(10)
    assert same(trainee(10), other)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000010"]
    assert load_latest(tmp_path, other) == state(10)
    saved(tmp_path, 12)
    assert load_anchor(tmp_path, other, ANCHOR) == state(10)
    assert load_anchor(tmp_path / "nowhere", other, ANCHOR) is None


def gone_back(step: int, rollbacks: int) -> TrainState:
    return state(step).model_copy(update={"health": Health(rollbacks=rollbacks)})


def test_a_state_after_going_back_takes_the_place_of_the_one_gone_back_to(tmp_path: Path) -> None:
    saved(tmp_path, 0, 10, 20)
    other = trainee(99)
    assert load_anchor(tmp_path, other, ANCHOR) == state(10)
    save_latest(tmp_path, other, gone_back(10, 1), ANCHOR)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000010-1"]
    save_latest(tmp_path, trainee(20), gone_back(20, 1), ANCHOR)
    assert load_latest(tmp_path, other) == gone_back(20, 1)
    assert load_anchor(tmp_path, other, ANCHOR) == gone_back(10, 1)
    save_latest(tmp_path, other, gone_back(10, 2), ANCHOR)
    assert load_latest(tmp_path, other) == gone_back(10, 2)


def test_what_was_passed_over_as_damaged_is_dropped_and_not_a_whole_one(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "model.safetensors").write_bytes(b"")
    (tmp_path / "step-00000009.tmp").mkdir()  # of a save that was killed
    assert load_latest(tmp_path, trainee()) == state(1)
    save_latest(tmp_path, trainee(1), state(1).model_copy(update={"step": 1, "tokens": 3}), ANCHOR)
    saved(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pointer.json", "step-00000001", "step-00000003"]


def test_what_somebody_reads_is_dropped_another_time(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    write_latest(tmp_path, trainee(3).snapshot(), state(3), ANCHOR, held=lambda: {"step-00000001"})
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == [f"step-0000000{step}" for step in (1, 2, 3)]
    saved(tmp_path, 4)
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == ["step-00000003", "step-00000004"]


def test_going_back_leaves_alone_how_this_attempt_runs() -> None:
    now, then = state(20), state(10)
    now.processes, now.compiled, now.effort.saves = 1, True, 5
    then.processes, then.compiled = 2, False
    now.become(then)
    assert (now.step, now.processes, now.compiled, now.effort.saves) == (10, 1, True, 5)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_a_damaged_newest_falls_back_with_a_warning(
    tmp_path: Path, name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, 1, 2)
    path = tmp_path / "step-00000002" / name
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[:-1] if name != "manifest.json" else data[:20])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    other = trainee(99)
    assert load_latest(tmp_path, other) == state(1)
    assert same(trainee(1), other)
    assert "WARNING: step-00000002 is damaged" in capsys.readouterr().out
    assert peek_latest(tmp_path)["step"] == 1


def test_nothing_readable_starts_anew(tmp_path: Path) -> None:
    assert load_latest(tmp_path, trainee()) is None
    saved(tmp_path, 1)
    (tmp_path / "step-00000001" / "model.safetensors").write_bytes(b"")
    assert load_latest(tmp_path, trainee()) is None
    assert peek_latest(tmp_path) is None


def test_the_pointer_moves_after_the_new_state_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)
    monkeypatch.setattr(checkpoint_module, "damage", lambda folder, digest: "a bad disk")
    with pytest.raises(OSError, match="does not read back"):
        save_latest(tmp_path, trainee(2), state(2), ANCHOR)
    monkeypatch.undo()
    assert json.loads((tmp_path / "pointer.json").read_text())["folder"] == "step-00000001"
    assert load_latest(tmp_path, trainee()) == state(1)


def test_a_crash_before_the_pointer_moves_resumes_from_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1)

    def crash(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, "write_json", crash)
    with pytest.raises(KeyboardInterrupt):
        save_latest(tmp_path, trainee(2), state(2), ANCHOR)
    monkeypatch.undo()
    assert load_latest(tmp_path, trainee()) == state(1)
    saved(tmp_path, 2, 3)  # what the crash left is no obstacle
    assert load_latest(tmp_path, trainee()) == state(3)


def test_no_pickle(tmp_path: Path) -> None:
    write_state(tmp_path / "stable", trainee().snapshot(), state(1))
    found = sorted(p.name for p in (tmp_path / "stable").iterdir())
    assert found == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    for path in (tmp_path / "stable").glob("*.safetensors"):
        header = path.read_bytes()[:9]
        assert header[8:9] == b"{"  # safetensors: a length, then JSON; a pickle or zip starts otherwise
        assert not header.startswith((b"PK", b"\x80"))
    assert damage(tmp_path / "stable") is None


def test_an_overwritten_state_is_never_half_of_each(tmp_path: Path) -> None:
    write_state(tmp_path / "stable", trainee(1).snapshot(), state(1))
    write_state(tmp_path / "stable", trainee(2).snapshot(), state(2))
    assert damage(tmp_path / "stable") is None
    assert json.loads((tmp_path / "stable" / "state.json").read_text())["step"] == 2
    assert not (tmp_path / "stable.tmp").exists()


# ---- crashes and damage


FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate")


def die_in(latest: Path, at: int, work: Callable[[], object]) -> bool:
    """Work in a forked process that ends at its `at`-th operation on a file; whether it got there."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = at

    def count(event: str, given: tuple) -> None:
        nonlocal left
        if event in FILE_EVENTS and str(latest) in str(given[:2]):
            left -= 1
            if left == 0:
                os._exit(9)

    sys.addaudithook(count)  # cannot be taken off again: hence the process
    work()
    os._exit(0)


def test_a_crash_at_any_operation_on_files_leaves_a_state_to_load(tmp_path: Path) -> None:
    """Three states in a row, the third of which drops the first; each save dies at each of its operations."""
    at = crashes = 0
    for step in (2, 3):
        at = 1
        while True:
            latest = saved(tmp_path / f"{step}-{at}", *range(1, step))
            new = trainee(step)
            if not die_in(latest, at, lambda: save_latest(latest, new, state(step), ANCHOR)):  # noqa: B023
                break
            other = trainee(99)
            loaded = load_latest(latest, other)
            assert loaded in (state(step - 1), state(step))
            assert same(trainee(loaded.step), other)
            saved(latest, step, step + 1)  # and what the crash left is no obstacle
            assert load_latest(latest, other) == state(step + 1)
            at += 1
        crashes += at - 1
        assert load_latest(latest, trainee()) == state(step)
    assert crashes > 30


def test_a_crash_at_any_operation_on_files_while_going_back_leaves_a_state_to_load(tmp_path: Path) -> None:
    """Two anchors and a later state; training goes back to the first, and saves there what it leaves out."""
    for at in itertools.count(1):
        latest = saved(tmp_path / str(at), 0, 10, 20, 21)
        new = trainee(10)

        def go_back() -> None:
            load_anchor(latest, new, ANCHOR)  # noqa: B023
            save_latest(latest, new, gone_back(10, 1), ANCHOR)  # noqa: B023

        if not die_in(latest, at, go_back):
            break
        other = trainee(99)
        loaded = load_latest(latest, other)
        assert loaded in (state(21), state(20), state(10), gone_back(10, 1)), at
        assert same(trainee(loaded.step), other)
        again = load_anchor(latest, other, ANCHOR)  # what the crash left is no obstacle
        assert again in (state(10), gone_back(10, 1))
        save_latest(latest, other, gone_back(10, 1), ANCHOR)
        assert load_latest(latest, other) == gone_back(10, 1)
    assert at > 30


def test_one_byte_changed_in_any_file_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A hundred random bytes of a hundred fresh copies; never is what is loaded anything but what was saved."""
    latest = saved(tmp_path / "latest", 1, 2)
    files = sorted(path for path in latest.rglob("*") if path.is_file() and "step-00000001" not in path.parts)
    assert [path.name for path in files] == [
        "pointer.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    chance = random.Random(0)
    for number in range(100):
        path = files[number % len(files)]
        whole = path.read_bytes()
        place = chance.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ chance.randrange(1, 256)]) + whole[place + 1 :])
        other = trainee(99)
        loaded = load_latest(latest, other)
        said = capsys.readouterr().out
        if path.name == "pointer.json":
            assert loaded == state(2), number  # found without it
            assert "WARNING: pointer.json is damaged" in said, place
        else:
            assert loaded == state(1), (path.name, place)
            assert "WARNING: step-00000002 is damaged" in said
        assert same(trainee(loaded.step), other)
        path.write_bytes(whole)
