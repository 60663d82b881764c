"""Saves off the training thread: what they cost it, and what happens where they fail."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fmcore.errors import TrainingError
from fmcore.training import checkpoint, saving
from fmcore.training.checkpoint import TrainState, damage, initial_state, load_latest
from fmcore.training.child import drop_damaged
from fmcore.training.optimizer import make_adamw
from fmcore.training.saving import Saver
from fmcore.training.trainee import Snapshot, Trainee


@pytest.fixture
def trainee() -> Trainee:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4)
    optimizer = make_adamw(model.named_parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return Trainee(model, [optimizer])


def state(step: int) -> TrainState:
    return initial_state(threads=1, micro_batch=8).model_copy(update={"step": step})


class Gate:
    """Holds a write back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        write = saving.write_latest

        def held(*given: Any) -> None:
            assert self.opened.wait(60)
            write(*given)

        monkeypatch.setattr(saving, "write_latest", held)


def change(trainee: Trainee) -> None:
    with torch.no_grad():
        for parameter in trainee.parameters.values():
            parameter.add_(1)
            trainee.optimizers[0].state[parameter]["exp_avg"].add_(1)


def test_what_is_written_is_the_state_at_the_save(
    tmp_path: Path, trainee: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, saver, now = Gate(monkeypatch), Saver(tmp_path, trainee, 10), state(3)
    before = {name: p.detach().clone() for name, p in trainee.parameters.items()}
    saver.save_latest(now)
    change(trainee)
    now.step = 4
    assert saver.busy
    assert not (tmp_path / "latest").exists()
    gate.opened.set()
    saver.wait()
    assert not saver.busy
    loaded = load_latest(tmp_path / "latest", trainee)
    assert loaded is not None
    assert loaded.step == 3
    assert all(torch.equal(before[name], p) for name, p in trainee.parameters.items())


def test_a_second_save_waits_for_the_first(tmp_path: Path, trainee: Trainee, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, saver, now = Gate(monkeypatch), Saver(tmp_path, trainee, 10), state(1)
    saver.save_latest(now)
    threading.Timer(0.3, gate.opened.set).start()
    now.step = 2
    saver.save_latest(now)
    saver.wait()
    assert now.effort.saves == 2
    assert now.effort.save_stall_s >= 0.2
    assert sorted(p.name for p in (tmp_path / "latest").glob("step-*")) == ["step-00000001", "step-00000002"]


def test_stable_is_written_beside(tmp_path: Path, trainee: Trainee) -> None:
    saver = Saver(tmp_path, trainee, 10)
    saver.save_stable(state(5))
    saver.wait()
    assert damage(tmp_path / "stable") is None
    drop_damaged(tmp_path / "stable")
    assert damage(tmp_path / "stable") is None


def test_a_stable_state_is_read_back_when_it_is_written_and_before_it_is_sealed(
    tmp_path: Path, trainee: Trainee, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = Saver(tmp_path, trainee, 10)
    saver.save_stable(state(5))
    saver.wait()
    path = tmp_path / "stable" / "optimizer.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    drop_damaged(tmp_path / "stable")
    assert "WARNING: the stable state was damaged" in capsys.readouterr().out
    assert not (tmp_path / "stable").exists()

    monkeypatch.setattr(checkpoint, "damage", lambda folder, digest: "a bad disk")
    saver.save_stable(state(5))
    with pytest.raises(TrainingError, match="does not read back: a bad disk"):
        saver.wait()


def test_whatever_stops_a_write_is_raised_in_the_training_thread(
    tmp_path: Path, trainee: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> None:
        raise KeyError("a driver's own")

    monkeypatch.setattr(saving, "write_latest", broken)
    saver = Saver(tmp_path, trainee, 10)
    saver.save_latest(state(1))
    with pytest.raises(KeyError, match="a driver's own"):
        saver.wait()


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "free some space"), (errno.EIO, "see to it")])
def test_a_state_that_cannot_be_written_is_told_in_the_training_thread(
    tmp_path: Path, trainee: Trainee, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    saver = Saver(tmp_path, trainee, 10)
    saver.save_latest(state(1))
    saver.wait()

    def full(self: Snapshot, folder: Path, part: str) -> None:
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise OSError(number, "the disk says no")

    monkeypatch.setattr(Snapshot, "write", full)
    saver.save_latest(state(2))
    with pytest.raises(TrainingError, match=f"the disk says no. What was saved before is whole; {words}"):
        saver.wait()
    with pytest.raises(TrainingError):
        saver.save_latest(state(3))
    assert sorted(p.name for p in (tmp_path / "latest").iterdir()) == ["pointer.json", "step-00000001"]
    loaded = load_latest(tmp_path / "latest", trainee)
    assert loaded is not None
    assert loaded.step == 1
