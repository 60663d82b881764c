"""The store: built once, complete or absent, and every damaged byte found."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fmcore.artifacts.files import read_json
from fmcore.artifacts.step import Step
from fmcore.artifacts.store import RECORD, Building, Store, load, load_any
from fmcore.artifacts.types import Checkpoint, EvalReport
from fmcore.errors import IntegrityError, StoreError

Builder = Callable[[Building], dict[str, Any]]

FILES = {"scores.bin": b"\x00" * 40, "per/document.txt": b"one\ntwo\n", "empty": b""}


@pytest.fixture
def builder(fields: dict[str, Any]) -> Builder:
    def builder(building: Building) -> dict[str, Any]:
        for name, content in FILES.items():
            (building.path / name).parent.mkdir(exist_ok=True)
            (building.path / name).write_bytes(content)
        return fields

    return builder


def refuse(building: Building) -> dict[str, Any]:
    raise AssertionError("built again")


def folders(store: Store) -> list[str]:
    return sorted(p.name for p in (store.root / "report").iterdir() if not p.name.startswith("."))


def test_built_once_then_a_hit(store: Store, step: Step, builder: Builder, fields: dict[str, Any]) -> None:
    assert store.find(step, EvalReport) is None
    built = store.build(step, EvalReport, builder)
    assert built.path == store.root / "report" / f"plays-{step.fingerprint[:8]}"
    assert {name: (built.path / name).read_bytes() for name in FILES} == FILES
    assert (built.config, built.parents, built.metrics) == (step.config, step.parents, fields["metrics"])
    assert store.build(step, EvalReport, refuse) == built
    assert store.get(step.fingerprint, EvalReport) == store.find(step, EvalReport) == built
    assert folders(store) == [built.path.name]


def test_the_same_step_under_another_name_is_a_hit(store: Store, step: Step, builder: Builder) -> None:
    built = store.build(step, EvalReport, builder)
    assert store.build(replace(step, name="renamed"), EvalReport, refuse) == built


def test_another_identity_is_built_beside_it(store: Store, step: Step, builder: Builder) -> None:
    store.build(step, EvalReport, builder)
    store.build(replace(step, config={"seq_len": 9}), EvalReport, builder)
    assert len(folders(store)) == 2
    assert [a.config["seq_len"] for a in store.all(EvalReport)] == [8, 9]


def test_two_identities_that_share_eight_digits(store: Store, step: Step, builder: Builder) -> None:
    first, second = step, replace(step, config={"seq_len": 9})
    for each, last in ((first, "1"), (second, "2")):
        each.__dict__["fingerprint"] = "ab" * 4 + last * 56  # the cached property
    one, two = (store.build(each, EvalReport, builder) for each in (first, second))
    assert one.path != two.path
    assert store.find(first, EvalReport) == one
    assert store.find(second, EvalReport) == two


def test_the_record_says_what_was_made_of_what(store: Store, step: Step, builder: Builder) -> None:
    record = read_json(store.build(step, EvalReport, builder).path / RECORD)
    assert (record["kind"], record["fingerprint"], record["code_version"]) == ("report", step.fingerprint, 1)
    assert {name: file["size"] for name, file in record["files"].items()} == {n: len(c) for n, c in FILES.items()}
    assert record["created"].endswith("+00:00")
    assert {"numpy", "pyarrow"} <= record["packages"].keys()
    assert "path" not in record


def test_an_artifact_that_moved_is_read_where_it_is(store: Store, step: Step, builder: Builder, tmp_path: Path) -> None:
    built = store.build(step, EvalReport, builder)
    (tmp_path / "home").rename(tmp_path / "moved")
    found = Store(tmp_path / "moved").get(step.fingerprint, EvalReport)
    assert found.path == tmp_path / "moved" / built.path.relative_to(tmp_path / "home")


def test_what_is_not_there_says_so(store: Store) -> None:
    with pytest.raises(StoreError, match=r"report artifact aaaaaaaa is not in .*Run its recipe again"):
        store.get("a" * 64, EvalReport)


# ---- failures


def test_a_failing_builder_leaves_nothing(store: Store, step: Step, builder: Builder) -> None:
    def failing(building: Building) -> dict[str, Any]:
        builder(building)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.build(step, EvalReport, failing)
    assert folders(store) == []
    assert store.find(step, EvalReport) is None
    assert store.build(step, EvalReport, builder).fingerprint == step.fingerprint


@pytest.mark.parametrize("missing", ["metrics", "counts"])
def test_a_builder_that_returns_too_little_makes_no_artifact(
    store: Store, step: Step, fields: dict[str, Any], missing: str
) -> None:
    with pytest.raises(ValueError, match=missing):
        store.build(step, EvalReport, lambda _: {k: v for k, v in fields.items() if k != missing})
    assert store.find(step, EvalReport) is None
    assert list(store.all(EvalReport)) == []
    assert store.build(step, EvalReport, lambda _: fields).metrics == fields["metrics"]


KILLED = """
import os, signal, sys
from pathlib import Path
from fmcore.artifacts import store as module
from fmcore.artifacts.step import Step
from fmcore.artifacts.types import EvalReport

home, when, resumable = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "resumable"
step = Step("report", "plays", {"seq_len": 8}, {"checkpoint": "c" * 64}, 1)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def builder(building):
    (building.path / "half.bin").write_bytes(b"half")
    if when == "building":
        die()
    return {"metrics": {"from": 0.0}, "counts": {}}

if when == "flushing":
    module.fsync_tree = die
if when == "recording":
    write_json = module.write_json
    module.write_json = lambda path, value: die() if path.name == module.RECORD else write_json(path, value)
if when == "renaming":
    replace = os.replace
    os.replace = lambda old, new: die() if str(old).endswith(".partial") else replace(old, new)
module.Store(home).build(step, EvalReport, builder, resumable=resumable)
"""

MOMENTS = ["building", "flushing", "recording", "renaming"]


def kill(home: Path, when: str, how: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(home), when, how], check=False)
    assert done.returncode == -9


@pytest.mark.parametrize("how", ["plain", "resumable"])
@pytest.mark.parametrize("when", MOMENTS)
def test_a_killed_builder_leaves_nothing_taken_for_complete(
    store: Store, step: Step, fields: dict[str, Any], when: str, how: str
) -> None:
    kill(store.root.parent, when, how)
    assert folders(store) == [f"plays-{step.fingerprint[:8]}.partial"]
    assert store.find(step, EvalReport) is None
    assert list(store.all(EvalReport)) == []
    built = store.build(step, EvalReport, lambda _: fields, resumable=how == "resumable")
    assert built.metrics == fields["metrics"]
    assert folders(store) == [built.path.name]
    assert not {"building.json", "half.bin"} & {p.name for p in built.path.iterdir()} or how == "resumable"
    assert list(store.problems(built.path)) == []


@pytest.mark.parametrize("when", MOMENTS)
def test_resumable_keeps_what_the_killed_builder_made(
    store: Store, step: Step, fields: dict[str, Any], when: str
) -> None:
    kill(store.root.parent, when, "resumable")
    found: list[bytes] = []

    def resume(building: Building) -> dict[str, Any]:
        found.append((building.path / "half.bin").read_bytes())
        return fields

    built = store.build(step, EvalReport, resume, resumable=True)
    assert found == [b"half"]
    assert set(read_json(built.path / RECORD)["files"]) == {"half.bin"}


def test_an_error_keeps_a_resumable_partial(store: Store, step: Step, fields: dict[str, Any]) -> None:
    def first(building: Building) -> dict[str, Any]:
        (building.path / "half.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.build(step, EvalReport, first, resumable=True)
    assert store.find(step, EvalReport) is None
    built = store.build(step, EvalReport, lambda _: fields, resumable=True)
    assert (built.path / "half.bin").read_bytes() == b"half"


def test_the_partial_of_another_identity_is_not_resumed(store: Store, step: Step, fields: dict[str, Any]) -> None:
    partial = store.path_for(step).with_suffix(".partial")
    partial.mkdir(parents=True)
    (partial / "building.json").write_text(json.dumps({"fingerprint": "0" * 64}))
    (partial / "foreign").touch()
    built = store.build(step, EvalReport, lambda _: fields, resumable=True)
    assert not (built.path / "foreign").exists()


def test_a_discarded_partial_is_gone(store: Store, step: Step, fields: dict[str, Any]) -> None:
    kill(store.root.parent, "building", "resumable")
    store.discard_partial(step)
    assert folders(store) == []
    store.discard_partial(step)  # nothing there is no error


# ---- two builders


TWO = """
import sys, time
from pathlib import Path
from fmcore.artifacts.step import Step
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import EvalReport

home, me = Path(sys.argv[1]), float(sys.argv[2])
step = Step("report", "plays", {"seq_len": 8}, {"checkpoint": "c" * 64}, 1)

def builder(building):
    print("building", flush=True)
    input()
    (building.path / "who").write_text(str(me))
    return {"metrics": {"who": me}, "counts": {}}

built = Store(home).build(step, EvalReport, builder, on_wait=lambda who: print("waiting for", who, flush=True))
print("got", built.metrics["who"], flush=True)
"""


def test_two_processes_that_build_one_artifact_give_one_result(store: Store, step: Step) -> None:
    def start(me: int) -> subprocess.Popen:
        command = [sys.executable, "-c", TWO, str(store.root.parent), str(me)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    first = start(1)
    assert first.stdout.readline() == "building\n"
    second = start(2)
    assert second.stdout.readline().startswith(f"waiting for process {first.pid} on ")
    assert store.find(step, EvalReport) is None
    assert first.communicate("\n", timeout=30)[0] == "got 1.0\n"
    assert second.communicate("\n", timeout=30)[0] == "got 1.0\n"
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(folders(store)) == 1


def test_the_second_builds_where_the_first_one_failed(store: Store, step: Step, fields: dict[str, Any]) -> None:
    waiting = threading.Event()
    results: list[EvalReport] = []

    def second() -> None:
        other = Store(store.root.parent)
        results.append(other.build(step, EvalReport, lambda _: fields, on_wait=lambda _: waiting.set()))

    thread = threading.Thread(target=second)

    def failing(_: Building) -> dict[str, Any]:
        thread.start()
        assert waiting.wait(20)
        raise OSError("first")

    with pytest.raises(OSError, match="first"):
        store.build(step, EvalReport, failing)
    thread.join(20)
    assert [r.metrics for r in results] == [fields["metrics"]]


# ---- damage


def test_another_class_is_refused(store: Store, step: Step, builder: Builder) -> None:
    built = store.build(step, EvalReport, builder)
    with pytest.raises(StoreError, match="holds 'report', expected 'checkpoint'"):
        load(built.path, Checkpoint)
    assert load_any(built.path) == built


def test_a_folder_without_a_record_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is no artifact: it has no artifact\.json"):
        load_any(tmp_path)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
def test_a_flipped_byte_is_found_and_its_file_named(store: Store, step: Step, builder: Builder, name: str) -> None:
    built = store.check(store.build(step, EvalReport, builder))
    path = built.path / name
    for position in range(len(FILES[name])):
        flip(path, position)
        (problem,) = store.problems(built.path)
        assert problem.startswith(f"{path} is damaged")
        with pytest.raises(IntegrityError) as refused:
            store.check(built)
        assert str(refused.value) == problem
        flip(path, position)
    assert store.check(built) == built


def test_a_flipped_byte_anywhere_in_the_record_is_found(store: Store, step: Step, builder: Builder) -> None:
    path = store.build(step, EvalReport, builder).path / RECORD
    whole = path.read_bytes()
    for position in range(len(whole)):
        flip(path, position)
        with pytest.raises(IntegrityError, match=r"artifact\.json"):
            load(path.parent, EvalReport)
        with pytest.raises(IntegrityError, match=r"artifact\.json"):
            load_any(path.parent)
        path.write_bytes(whole)
    assert load(path.parent, EvalReport).fingerprint == step.fingerprint


def test_a_damaged_record_is_one_of_the_problems(store: Store, step: Step, builder: Builder) -> None:
    built = store.build(step, EvalReport, builder)
    record = (built.path / RECORD).read_text()
    (built.path / RECORD).write_text(record.replace("2.25", "2.15"))
    (problem,) = store.problems(built.path)
    assert str(built.path / RECORD) in problem


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(store: Store, step: Step, builder: Builder, name: str) -> None:
    built = store.build(step, EvalReport, builder)
    (built.path / name).unlink()
    with pytest.raises(IntegrityError, match=f"{name} is missing"):
        store.check(built)


@pytest.mark.parametrize("content", [b"", b"longer than it was" * 9])
def test_a_file_of_another_length_is_found(store: Store, step: Step, builder: Builder, content: bytes) -> None:
    built = store.build(step, EvalReport, builder)
    (built.path / "scores.bin").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"scores\.bin is damaged"):
        store.check(built)


def test_damage_that_keeps_size_and_mtime_needs_rehash(store: Store, step: Step, builder: Builder) -> None:
    built = store.check(store.build(step, EvalReport, builder))
    path = built.path / "scores.bin"
    stat = path.stat()
    flip(path, 0)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (problem,) = Store(store.root.parent, rehash=True).problems(built.path)
    assert problem.startswith(str(path))


def test_a_removed_artifact_is_a_miss(store: Store, step: Step, builder: Builder) -> None:
    built = store.build(step, EvalReport, builder)
    store.remove(built)
    assert folders(store) == []
    assert store.find(step, EvalReport) is None


def test_a_half_removed_artifact_is_built_again(store: Store, step: Step, builder: Builder) -> None:
    """Killed while it was removed: the record goes first."""
    built = store.build(step, EvalReport, builder)
    (built.path / RECORD).unlink()
    assert store.find(step, EvalReport) is None
    assert store.build(step, EvalReport, builder) == built


def test_a_copy_of_an_artifact_folder_is_whole(store: Store, step: Step, builder: Builder, tmp_path: Path) -> None:
    built = store.build(step, EvalReport, builder)
    shutil.copytree(built.path, tmp_path / "copy")
    assert list(store.problems(tmp_path / "copy")) == []
