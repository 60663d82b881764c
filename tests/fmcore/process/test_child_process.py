"""Starting, watching and stopping a child: exit codes, environment, a hang, no orphan."""

import os
import signal
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from fmcore.errors import Interrupted, TrainingError
from fmcore.process.launch import ALLOCATOR, Child, TrainingRefused, child_environment

HEADER = "import os, sys, time, signal, pathlib\nfolder = pathlib.Path(sys.argv[1]).parent\n"


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Child whose module is the given code."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "spec.json").write_text("{}")
    lock = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)

    def make(code: str, **settings: float) -> Child:
        (tmp_path / "made_child.py").write_text(HEADER + textwrap.dedent(code))
        given = {"grace_s": 10, "hang_timeout_s": 60, "threads": 1} | settings
        return Child("made_child", folder, lock=lock, **given)

    yield make
    os.close(lock)


def pid_in(folder: Path) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        path = folder / "work" / "pid"
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.02)
    raise AssertionError("the child did not start")


def test_lines_are_handed_on_and_kept(child: Any, tmp_path: Path) -> None:
    lines: list[str] = []
    child("print('one', flush=True)\ntime.sleep(0.5)\nprint('two')").run(on_line=lines.append)
    assert lines == ["one", "two"]
    assert (tmp_path / "work" / "log.txt").read_text() == "one\ntwo\n"


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        ("sys.exit(75)", Interrupted, "resume"),
        ("(folder / 'error.txt').write_text('no such field'); sys.exit(2)", TrainingRefused, "no such field"),
        ("sys.exit(2)", TrainingRefused, r"could not write why in .* MB are free. Free some space"),
        ("print('last words', flush=True); sys.exit(1)", TrainingError, "last words"),
        ("os.kill(os.getpid(), 9)", TrainingError, "SIGKILL"),
    ],
)
def test_how_it_ended(child: Any, code: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        child(code).run(on_line=lambda line: None)


def test_a_hang_is_ended_with_every_threads_stack(child: Any, tmp_path: Path) -> None:
    code = "import faulthandler; faulthandler.register(signal.SIGUSR1, all_threads=True)\ntime.sleep(100)"
    start = time.monotonic()
    with pytest.raises(TrainingError, match="SIGKILL"):
        child(code, hang_timeout_s=1.5).run(on_line=lambda line: None)
    assert time.monotonic() - start < 20
    assert "made_child.py" in (tmp_path / "work" / "log.txt").read_text()


@pytest.mark.parametrize("stubborn", [False, True])
def test_what_stops_the_parent_stops_the_child(child: Any, tmp_path: Path, stubborn: bool) -> None:
    """Asked to save first; a child that does not listen is killed after the grace time."""
    handler = "signal.SIG_IGN" if stubborn else "lambda *_: ((folder / 'saved').touch(), sys.exit(75))"
    code = f"signal.signal(signal.SIGTERM, {handler})\n(folder / 'pid').write_text(str(os.getpid()))\ntime.sleep(100)"

    def stop() -> None:
        if (tmp_path / "work" / "pid").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child(code, grace_s=1).run(on_line=lambda line: None, on_poll=stop)
    assert not psutil.pid_exists(pid_in(tmp_path))
    assert (tmp_path / "work" / "saved").exists() is not stubborn


def test_a_child_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    """The guard, without torch: a grandchild whose parent exits at once."""
    import subprocess
    import sys

    guarded = tmp_path / "guarded.py"
    guarded.write_text(
        "import sys, time\nfrom fmcore.process.guard import Stop\nstop = Stop()\n"
        "open(sys.argv[1], 'w').write('up')\n"
        "while not stop.requested: time.sleep(0.05)\nopen(sys.argv[1], 'w').write('ended')\n"
    )
    parent = (
        "import os, subprocess, sys, time, pathlib\n"
        "os.environ['STRATA_PARENT_PID'] = str(os.getpid())\n"
        f"p = subprocess.Popen([sys.executable, {str(guarded)!r}, {str(tmp_path / 'state')!r}])\n"
        f"state = pathlib.Path({str(tmp_path / 'state')!r})\n"
        "while not state.exists(): time.sleep(0.02)\nos._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", parent], check=True, timeout=60)
    deadline = time.monotonic() + 20
    while (tmp_path / "state").read_text() != "ended" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "state").read_text() == "ended"


def test_the_environment_of_a_child() -> None:
    made = child_environment({"MALLOC_TRIM_THRESHOLD_": "1", "OMP_NUM_THREADS": "7"}, threads=3, grace_s=20)
    assert made["MALLOC_TRIM_THRESHOLD_"] == "1"  # what the user set wins
    assert made["MALLOC_MMAP_THRESHOLD_"] == ALLOCATOR["MALLOC_MMAP_THRESHOLD_"]
    assert (made["OMP_NUM_THREADS"], made["MKL_NUM_THREADS"]) == ("3", "3")
    assert "MKL_NUM_THREADS" not in child_environment({}, threads=0, grace_s=20)


def test_the_foreign_working_directory_is_not_imported(
    child: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "tasks.py").write_text("raise RuntimeError('foreign')")
    monkeypatch.chdir(tmp_path / "foreign")
    lines: list[str] = []
    child("import tasks\nprint(tasks.__file__)").run(on_line=lines.append)
    assert lines
    assert "foreign" not in lines[-1]


def test_signals_are_left_as_they_were(child: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    child("pass").run(on_line=lambda line: None)
    assert signal.getsignal(signal.SIGTERM) is before
    assert threading.current_thread() is threading.main_thread()
