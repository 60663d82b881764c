"""Files read by many processes: the same bytes for any number of them, one clear error, nobody left behind."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Documents
from fmcore.data.prepare import documents_step, prepare_documents
from fmcore.data.units import SMALL_BYTES, Shard, choose_workers
from fmcore.errors import DataError
from fmcore.process import pool
from fmcore.recipes.fields import Source, TaskData, TextData

FILES = ("train/s.parquet", "heldout/s.parquet", "dropped.parquet", "quarantine.parquet")


def text(number: int) -> str:
    return f"This is document number {number}, of which there are some others."


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Eight files of overlapping texts, with something bad in each."""
    folder = tmp_path / "in"
    folder.mkdir()
    for file in range(8):
        rows = [json.dumps({"text": text(n), "n": n}) for n in range(file * 30, file * 30 + 45)]
        rows[file] = rows[file][:-1]
        content = "\n".join(rows).encode()
        path = folder / f"{file}.jsonl"
        path.write_bytes(content if file % 2 else gzip.compress(content, mtime=0))
    return folder


def data(corpus: Path, **changes: Any) -> TextData:
    source = {"name": "s", "path": str(corpus), "format": "json"}
    return TextData(**({"sources": [source], "holdout": 0.3, "on_bad_input": "quarantine"} | changes))


def prepare(what: TextData | TaskData, home: Path, workers: int) -> Documents:
    store = Store(home)
    return prepare_documents(documents_step("x", what, None, store.digests), what, None, store, workers=workers)


BEFORE: set[psutil.Process] = set()  # what earlier tests of the session have left running, as a server


@pytest.fixture(autouse=True)
def _remember_others() -> None:
    BEFORE.clear()
    BEFORE.update(psutil.Process().children(recursive=True))


def children() -> list[psutil.Process]:
    """Processes that a test has started and that live."""
    now = psutil.Process().children(recursive=True)
    return [p for p in now if p not in BEFORE and p.status() != psutil.STATUS_ZOMBIE]


def test_any_number_of_processes_makes_the_same_documents(corpus: Path, tmp_path: Path) -> None:
    made = [prepare(data(corpus), tmp_path / f"home{workers}", workers) for workers in (1, 2, 3)]
    assert made[0].counts == made[1].counts == made[2].counts
    assert made[0].counts["quarantined"] == {"s": {"broken_json": 8}}
    for name in FILES:
        assert len({(documents.path / name).read_bytes() for documents in made}) == 1, name
    assert {p.name for p in made[1].path.iterdir()} == {p.name for p in made[0].path.iterdir()}
    assert children() == []


def test_records_too(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for file in range(4):
        rows = [{"prompt": f"question {n}?", "response": "yes"} for n in range(file * 20, file * 20 + 30)]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    what = TaskData(tasks=[{"name": "s", "path": str(folder), "holdout": 0.3}])
    made = [prepare(what, tmp_path / f"home{workers}", workers) for workers in (1, 2)]
    assert made[0].counts == made[1].counts
    assert made[0].counts["dropped"] == {"s": {"duplicate": 30}}
    for name in FILES[:3]:
        assert (made[0].path / name).read_bytes() == (made[1].path / name).read_bytes()


def test_the_first_bad_place_is_the_same_too(corpus: Path, tmp_path: Path) -> None:
    messages = []
    for workers in (1, 2):
        with pytest.raises(DataError) as refused:
            prepare(data(corpus, on_bad_input="stop"), tmp_path / f"home{workers}", workers)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]
    assert "broken JSON" in messages[0]
    assert children() == []


def soon(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def _kill_first_child() -> None:
    os.kill(soon(children)[0].pid, signal.SIGKILL)


def test_a_process_that_dies_is_one_error(corpus: Path, tmp_path: Path) -> None:
    killer = threading.Thread(target=_kill_first_child)
    killer.start()
    with pytest.raises(pool.WorkerError, match=r"was ended by SIGKILL; if memory ran out, set execution\.work"):
        prepare(data(corpus), tmp_path / "home", 2)
    killer.join()
    assert children() == []
    artifacts = tmp_path / "home" / "artifacts" / "documents"
    assert [p.name for p in artifacts.iterdir() if p.name != ".locks"] == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell has what it runs in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_ends_them(corpus: Path, tmp_path: Path) -> None:
    def interrupt() -> None:
        soon(children)
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=interrupt)
    stopper.start()
    with pytest.raises(KeyboardInterrupt):
        prepare(data(corpus), tmp_path / "home", 2)
    stopper.join()
    assert soon(lambda: not children())


def test_a_worker_imports_no_torch() -> None:
    code = "import sys, fmcore.data.units, fmcore.process.pool; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "mlflow", "prefect"}


def test_what_fails_in_a_process_is_named() -> None:
    with pytest.raises(pool.WorkerError, match="KeyError: 'form'"):
        list(pool.run_in_processes("fmcore.data.units:write_part", [{}], 1))
    assert children() == []


def test_results_come_in_the_order_of_the_jobs() -> None:
    jobs = [f'{{"n": {number}}}' for number in range(20)]
    assert list(pool.run_in_processes("json:loads", jobs, 3)) == [{"n": number} for number in range(20)]


@pytest.mark.parametrize(
    ("sizes", "asked", "workers"),
    [
        ([10, 10], 0, 1),
        ([SMALL_BYTES], 0, 1),
        ([SMALL_BYTES, 10], 0, 2),
        ([SMALL_BYTES] * 9, 0, 4),
        ([10, 10], 1, 1),
        ([10, 10, 10], 2, 2),
        ([10, None], 9, 2),
    ],
)
def test_how_many_pay_off(monkeypatch: pytest.MonkeyPatch, sizes: list[int | None], asked: int, workers: int) -> None:
    monkeypatch.setattr("fmcore.data.units.num_cores", lambda: 4)
    shards = [Shard(Source(name="s", path="x"), str(n), size) for n, size in enumerate(sizes)]
    assert choose_workers(shards, asked) == workers
