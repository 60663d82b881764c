"""Copies of the training state on S3 and in a folder: whole or not there, fetched where a machine has none."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fmcore.errors import TrainingError
from fmcore.training import loop, mirror
from fmcore.training.checkpoint import damage, initial_state, load_latest, write_latest, write_state
from fmcore.training.mirror import Mirror
from fmcore.training.optimizer import make_adamw
from fmcore.training.trainee import Trainee


def trainee(seed: int = 0) -> Trainee:
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 4)
    return Trainee(model, [make_adamw(model.named_parameters(), betas=(0.9, 0.95), weight_decay=0.1)])


def save(folder: Path, step: int) -> None:
    state = initial_state(1, 1).model_copy(update={"step": step})
    write_latest(folder / "latest", trainee(step).snapshot(), state, 1000)
    (folder / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')


@pytest.fixture(params=["folder", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "mirror")
    bucket = request.getfixturevalue("bucket")
    for item in bucket.list_objects_v2(Bucket="data").get("Contents", []):
        bucket.delete_object(Bucket="data", Key=item["Key"])
    return "s3://data/states/x"


def names(address: str) -> set[str]:
    filesystem, root = mirror._open(address)
    return {path.removeprefix(root).lstrip("/") for path in filesystem.find(root)} if filesystem.exists(root) else set()


def test_what_is_pushed_is_what_is_kept_and_can_be_fetched(address: str, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    copies = Mirror(address, here)
    for step in (1, 2, 3):
        save(here, step)
        copies.push()
    state = {"manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"}
    expected = {f"latest/step-0000000{step}/{name}" for step in (2, 3) for name in state}
    assert names(address) == expected | {"latest/pointer.json", "metrics.jsonl"}
    write_state(here / "stable", trainee(9).snapshot(), initial_state(1, 1))
    copies.push()
    assert names(address) == expected | {"latest/pointer.json", "metrics.jsonl"} | {f"stable/{name}" for name in state}

    there.mkdir()
    assert Mirror(address, there).pull()
    other = trainee(99)
    loaded = load_latest(there / "latest", other)
    assert loaded is not None
    assert loaded.step == 3
    assert all(torch.equal(p, trainee(3).parameters[name]) for name, p in other.parameters.items())
    assert damage(there / "stable") is None
    assert (there / "metrics.jsonl").read_text() == '{"step": 3}\n'
    assert not Mirror(address, there).pull(), "what is here counts"
    copies.remove()
    assert names(address) == set()
    assert not Mirror(address, tmp_path / "nowhere").pull()


class Dying:
    """A storage whose connection ends after some writes."""

    def __init__(self, whole: Any, writes: int) -> None:
        self._whole = whole
        self._left = writes

    def __getattr__(self, name: str) -> Any:
        if name in ("put_file", "pipe_file"):
            self._left -= 1
            if self._left < 0:
                raise OSError("the line is dead")
        return getattr(self._whole, name)


def test_a_copy_cut_short_is_passed_over(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection ends at each of the writes of a push: what is fetched is the state before, or the new one."""
    open_storage, writes = mirror._open, 6  # three files and their manifest, metrics, the pointer
    for allowed in range(writes + 1):
        here, there = tmp_path / f"here{allowed}", tmp_path / f"there{allowed}"
        save(here, 1)
        Mirror(address, here).push()
        save(here, 2)
        filesystem, root = open_storage(address)
        with monkeypatch.context() as patch:
            dying = Dying(filesystem, allowed)
            patch.setattr(mirror, "_open", lambda address, found=(dying, root): found)
            if allowed < writes:
                with pytest.raises(OSError, match="the line is dead"):
                    Mirror(address, here).push()
            else:
                Mirror(address, here).push()
        there.mkdir()
        assert Mirror(address, there).pull()
        loaded = load_latest(there / "latest", trainee(99))
        assert loaded is not None
        assert loaded.step == (2 if allowed == writes else 1)
        Mirror(address, here).remove()


def test_an_address_that_fails_is_warned_about_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    save(here, 1)
    copies, push, failures = Mirror(str(tmp_path / "mirror"), here), Mirror.push, [3]

    def failing(self: Mirror) -> None:
        if failures[0]:
            failures[0] -= 1
            raise ConnectionError("no route")
        push(self)

    monkeypatch.setattr(Mirror, "push", failing)
    for _ in range(4):
        copies.push_soon()
        copies.close(finish=True)
    assert capsys.readouterr().out.count("is not copied") == 1
    assert "latest/pointer.json" in names(str(tmp_path / "mirror"))


def test_the_newest_and_its_pointer_are_there_before_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a line that is slower than saves come, the copy can be used all the same."""
    here, there, address = tmp_path / "here", tmp_path / "there", str(tmp_path / "mirror")
    for step in (1, 2):
        save(here, step)
    filesystem, root = mirror._open(address)
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "_open", lambda address: (Dying(filesystem, 6), root))  # three files, manifest, metrics
        with pytest.raises(OSError, match="the line is dead"):
            Mirror(address, here).push()
    there.mkdir()
    assert Mirror(address, there).pull()
    loaded = load_latest(there / "latest", trainee(99))
    assert loaded is not None
    assert loaded.step == 2


def test_a_state_that_is_copied_is_not_dropped_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there, address = tmp_path / "here", tmp_path / "there", str(tmp_path / "mirror")
    for step in (1, 2):
        save(here, step)
    filesystem, root = mirror._open(address)
    copies = Mirror(address, here)

    class Slow:
        """While a file is sent, two more states are saved."""

        def __getattr__(self, name: str) -> Any:
            if name == "put_file":
                for step in (3, 4):
                    state = initial_state(1, 1).model_copy(update={"step": step})
                    write_latest(here / "latest", trainee(step).snapshot(), state, 1000, held=copies.held_states)
            return getattr(filesystem, name)

    with monkeypatch.context() as patch:
        patch.setattr(mirror, "_open", lambda address: (Slow(), root))
        copies.push()
    there.mkdir()
    assert Mirror(address, there).pull()
    loaded = load_latest(there / "latest", trainee(99))
    assert loaded is not None
    assert loaded.step == 2
    assert not copies.held_states()


def test_what_is_done_waits_for_no_more_than_the_file_that_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, address = tmp_path / "here", str(tmp_path / "mirror")
    save(here, 1)
    filesystem, root = mirror._open(address)
    begun, go_on = threading.Event(), threading.Event()

    class Slow:
        def __getattr__(self, name: str) -> Any:
            if name == "put_file":
                begun.set()
                assert go_on.wait(60)
            return getattr(filesystem, name)

    monkeypatch.setattr(mirror, "_open", lambda address: (Slow(), root))
    copies = Mirror(address, here)
    copies.push_soon()
    assert begun.wait(60)
    threading.Timer(0.2, go_on.set).start()
    copies.close(finish=False)
    assert names_below(tmp_path / "mirror") == {"latest/step-00000001/model.safetensors"}
    assert not capsys.readouterr().out


def names_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_an_address_that_cannot_be_looked_at_stops_before_anything_is_trained_anew(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"execution\.mirror: cannot look for a saved state at nosuch://x"):
        Mirror("nosuch://x", tmp_path).pull()


@pytest.mark.usefixtures("inline")
def test_a_machine_lost_with_its_disk_is_gone_on_from_to_the_same_bits(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], address: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    recipe = tiny.pretrain(corpora["old"], execution={"save_interval_s": 0, "mirror": address})
    undisturbed = fresh_home.train(recipe)
    weights = {part: load_file(undisturbed.path / part / "model.safetensors") for part in ("final", "stable")}
    rows = [line.split('"tokens_per_sec"')[0] for line in (undisturbed.path / "metrics.jsonl").read_text().splitlines()]
    assert names(address) == set(), "what is done needs no copy"
    shutil.rmtree(undisturbed.path)

    class Lost(Exception):
        pass

    beats = 0

    def beat(self: Any) -> None:
        nonlocal beats
        beats += 1
        if beats == 21:  # two before the first step: in the decay, with a stable state behind it
            raise Lost

    with monkeypatch.context() as patch:
        patch.setattr(loop.Heartbeat, "beat", beat)
        with pytest.raises(Lost):
            fresh_home.train(recipe)
    for thread in threading.enumerate():
        if thread.name in ("saver", "mirror"):  # they would have been lost with the machine
            thread.join()
    [partial] = (fresh_home.path / "artifacts" / "checkpoint").glob("*.partial")
    Mirror(f"{address}/{fresh_home.resolve(recipe).steps.checkpoint.fingerprint}", partial).push()
    shutil.rmtree(partial)
    capfd.readouterr()
    again = fresh_home.train(recipe)
    said = capfd.readouterr().out
    assert "fetched the copy at" in said
    assert "resuming after step" in said
    for part, tensors in weights.items():
        resumed = load_file(again.path / part / "model.safetensors")
        assert all(torch.equal(tensors[name], resumed[name]) for name in tensors), part
    assert rows == [
        line.split('"tokens_per_sec"')[0] for line in (again.path / "metrics.jsonl").read_text().splitlines()
    ]
    assert names(address) == set()
