"""The training state on disk: exact, verified, two kept, no pickle."""

import json
from pathlib import Path

import pytest
import torch

from fmcore.training import checkpoint as checkpoint_module
from fmcore.training.checkpoint import (
    Trainee,
    TrainState,
    damage,
    initial_state,
    load_latest,
    peek_latest,
    save_latest,
    write_state,
)
from fmcore.training.optimizer import make_adamw


def trainee(seed: int = 0) -> Trainee:
    """Some parameters, one frozen, and an optimizer that has taken a step."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    optimizer = make_adamw(model.named_parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return Trainee(model, optimizer)


def state(step: int) -> TrainState:
    return initial_state(threads=1, micro_batch=8).model_copy(
        update={"step": step, "tokens": step * 256, "smoothed_loss": 0.1 + 0.2}
    )


def saved(latest: Path, *steps: int) -> Path:
    for step in steps:
        save_latest(latest, trainee(step), state(step))
    return latest


def same(a: Trainee, b: Trainee) -> bool:
    weights = all(torch.equal(a.parameters[name], b.parameters[name]) for name in a.parameters)
    states = [
        torch.equal(a.optimizer.state[p][key], b.optimizer.state[b.parameters[name]][key])
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


def test_two_are_kept_and_the_pointer_names_the_newest(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    assert json.loads((tmp_path / "pointer.json").read_text()) == {"folder": "step-00000003"}


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
    monkeypatch.setattr(checkpoint_module, "damage", lambda folder: "a bad disk")
    with pytest.raises(OSError, match="does not read back"):
        save_latest(tmp_path, trainee(2), state(2))
    monkeypatch.undo()
    assert json.loads((tmp_path / "pointer.json").read_text()) == {"folder": "step-00000001"}
    assert load_latest(tmp_path, trainee()) == state(1)


def test_a_crash_before_the_pointer_moves_resumes_from_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1)

    def crash(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, "write_json", crash)
    with pytest.raises(KeyboardInterrupt):
        save_latest(tmp_path, trainee(2), state(2))
    monkeypatch.undo()
    assert load_latest(tmp_path, trainee()) == state(1)
    saved(tmp_path, 2, 3)  # what the crash left is no obstacle
    assert load_latest(tmp_path, trainee()) == state(3)


def test_no_pickle(tmp_path: Path) -> None:
    write_state(tmp_path / "stable", trainee(), state(1))
    found = sorted(p.name for p in (tmp_path / "stable").iterdir())
    assert found == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    for path in (tmp_path / "stable").glob("*.safetensors"):
        header = path.read_bytes()[:9]
        assert header[8:9] == b"{"  # safetensors: a length, then JSON; a pickle or zip starts otherwise
        assert not header.startswith((b"PK", b"\x80"))
    assert damage(tmp_path / "stable") is None


def test_an_overwritten_state_is_never_half_of_each(tmp_path: Path) -> None:
    write_state(tmp_path / "stable", trainee(1), state(1))
    write_state(tmp_path / "stable", trainee(2), state(2))
    assert damage(tmp_path / "stable") is None
    assert json.loads((tmp_path / "stable" / "state.json").read_text())["step"] == 2
    assert not (tmp_path / "stable.tmp").exists()
