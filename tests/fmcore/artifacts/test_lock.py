"""One builder at a time, for as long as it or its child lives."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fmcore.artifacts.lock import describe_holder, exclusive


def test_the_waiting_one_is_told_once_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "a"
    told: list[str] = []
    order: list[str] = []
    waiting = threading.Event()

    def on_wait(who: str) -> None:
        told.append(who)
        waiting.set()

    def second() -> None:
        with exclusive(path, on_wait=on_wait):
            order.append("second")

    with exclusive(path):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(20)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]
    assert len(told) == 1
    assert told[0].startswith(f"process {os.getpid()} on ")


def test_an_error_releases_it(tmp_path: Path) -> None:
    with pytest.raises(KeyError), exclusive(tmp_path / "a"):
        raise KeyError
    waits: list[str] = []
    with exclusive(tmp_path / "a", on_wait=waits.append):
        pass
    assert waits == []


def test_a_child_that_inherits_it_holds_it_after_its_parent(tmp_path: Path) -> None:
    with exclusive(tmp_path / "a") as descriptor:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[descriptor])
    waits: list[str] = []

    def on_wait(who: str) -> None:
        waits.append(who)
        child.communicate(b"\n", timeout=20)

    with exclusive(tmp_path / "a", on_wait=on_wait):
        assert child.poll() == 0
    assert len(waits) == 1


@pytest.mark.parametrize("content", ["", "{", "{}"])
def test_a_holder_that_left_no_note(tmp_path: Path, content: str) -> None:
    (tmp_path / "a").write_text(content)
    assert describe_holder(tmp_path / "a") == "another process"
