"""Two machines train as one: two agents on one machine, and two network namespaces whose link is cut midway."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.resuming import DRIVER, GRACE_S, PATIENCE_S, Case, copy_of, finish, prepare, result, wait_for

STEPS = 120
EARLY, TOLERANCE = 40, 1e-5  # of the loss: sums in another order, whose difference grows with the steps
LATE_TOLERANCE = 1e-4
EXECUTION = {"save_interval_s": 0.5, "grace_s": GRACE_S, "retries": 0, "threads": 1}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny: Any, corpora: dict[str, Path]) -> Case:
    train = {"tokens": STEPS * 256, "batch_tokens": 256, "seq_len": 32}
    given = tiny.pretrain(corpora["old"], train=train, execution=EXECUTION)
    return prepare(tmp_path_factory.mktemp("prepared"), given)


@pytest.fixture(scope="module")
def alone(prepared: Case, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process on one machine."""
    folder = tmp_path_factory.mktemp("alone")
    return losses(finish(copy_of(prepared, folder, processes=1), folder / "log"))


def losses(made: dict[str, Any]) -> list[float]:
    return [row["loss"] for row in made["rows"]]


def assert_alike(ours: list[float], theirs: list[float]) -> None:
    assert ours[:EARLY] == pytest.approx(theirs[:EARLY], abs=TOLERANCE)
    assert ours == pytest.approx(theirs, abs=LATE_TOLERANCE)


def start(command: list[str], home: Path, log: Path, machine: list[str] | None = None) -> subprocess.Popen:
    environment = {**os.environ, "STRATA_HOME": str(home)}
    with log.open("ab") as sink:
        return subprocess.Popen(
            [*(machine or []), sys.executable, *command], stdout=sink, stderr=subprocess.STDOUT, env=environment
        )


def driver_on(case: Case, log: Path, machine: list[str] | None = None) -> subprocess.Popen:
    return start([str(DRIVER), str(case.home), str(case.recipe)], case.home, log, machine)


def join_on(case: Case, log: Path, machine: list[str] | None = None) -> subprocess.Popen:
    return start(["-P", "-m", "deployments.cli", "join", str(case.recipe)], case.home, log, machine)


def end(*processes: subprocess.Popen) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_agents_meet_train_as_one_and_stop_together(prepared: Case, tmp_path: Path, alone: list[float]) -> None:
    meet = {"processes": 1, "nodes": 2, "rendezvous": f"127.0.0.1:{free_port()}"}
    case = copy_of(prepared, tmp_path, **meet)
    log, other_log = tmp_path / "log", tmp_path / "other"
    other = join_on(case, other_log)
    driver = driver_on(case, log)
    try:
        wait_for(lambda: case.steps_done() >= 10 or driver.poll() is not None, "training")
        other.send_signal(signal.SIGTERM)  # stopping one stops all
        assert driver.wait(GRACE_S + 10) == 75, log.read_text()
        assert other.wait(GRACE_S + 10) != 0
        assert 10 <= case.steps_done() < STEPS
        other, driver = join_on(case, other_log), driver_on(case, log)
        assert driver.wait(PATIENCE_S) == 0, log.read_text()
        assert other.wait(PATIENCE_S) == 0, other_log.read_text()
    finally:
        end(driver, other)
    assert_alike(losses(result(case)), alone)
    assert "2 processes of 1 threads" in log.read_text()
    assert "resuming after step" in log.read_text()
    assert "is trained" in other_log.read_text()


@pytest.fixture
def machines() -> Iterator[tuple[list[str], list[str]]]:
    """How to run a command on either of two machines: network namespaces with a link between them.

    torch sorts addresses as texts, so that the second machine's process is the first of the two.
    """
    program = shutil.which("ip")
    if os.geteuid() != 0 or program is None:
        pytest.skip("two network namespaces need root and the program ip (iproute2)")
    names = [f"strata-{os.getpid()}-{side}" for side in "ab"]

    def ip(*words: str) -> None:
        subprocess.run([program, *words], check=True, capture_output=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip(
                "link",
                "add",
                "strata-a",
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                "strata-b",
                "netns",
                names[1],
            )
            for name, side, last in zip(names, "ab", (9, 10), strict=True):
                ip("-n", name, "addr", "add", f"10.77.0.{last}/24", "dev", f"strata-{side}")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", f"strata-{side}", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode().strip()}")
        first, second = (["ip", "netns", "exec", name] for name in names)
        yield first, second
    finally:
        for name in names:
            subprocess.run([program, "netns", "del", name], capture_output=True, check=False)


def set_link(machine: list[str], state: str) -> None:
    subprocess.run([*machine, "ip", "link", "set", "strata-b", state], check=True, capture_output=True)


def test_a_cut_link_is_survived(
    prepared: Case, tmp_path: Path, alone: list[float], machines: tuple[list[str], list[str]]
) -> None:
    first, second = machines
    case = copy_of(prepared, tmp_path, processes=1, nodes=2, rendezvous="10.77.0.9:29411", hang_timeout_s=15, retries=5)
    log, other_log = tmp_path / "log", tmp_path / "other"
    driver, other = driver_on(case, log, first), join_on(case, other_log, second)
    try:
        wait_for(lambda: case.saved_step() or driver.poll() is not None, "training and saving")
        set_link(second, "down")
        time.sleep(1)
        reached = case.steps_done()
        assert reached < STEPS, "too fast to be cut"
        wait_for(lambda: "Current thread" in log.read_text(), "noticing the hang")  # its stacks are in the log
        assert case.steps_done() == reached
        set_link(second, "up")
        assert driver.wait(2 * PATIENCE_S) == 0, log.read_text()
        assert other.wait(PATIENCE_S) == 0, other_log.read_text()
    finally:
        end(driver, other)
    assert_alike(losses(result(case)), alone)
    assert "attempt 1 failed" in log.read_text()
    assert "resuming after step" in log.read_text()
    assert "tokens/s, MFU" in log.read_text(), "what is said is said where the training was begun"
    assert "joining again" in other_log.read_text()
