"""Starts a child process, or several that train together, on a JSON spec; streams its log, watches its heartbeat,
and never leaves it behind.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import ceil
from pathlib import Path

import psutil

from fmcore.artifacts.files import write_json
from fmcore.errors import Interrupted, TrainingError
from fmcore.redaction import without_credentials

POLL_SECONDS = 0.2
BEGINS_VARIABLE = "STRATA_BEGINS"  # 1 in the processes of the machine that began a training
PARENT_VARIABLE = "STRATA_PARENT_PID"  # a parent that dies while the child still imports must be missed, too
HEARTBEAT = "heartbeat"  # in the folder of the spec: touched by a child that lives
ERROR = "error.txt"  # in the folder of the spec: what is wrong, where a child refuses
STOPPED = "stopped"  # in the folder of the spec: several processes saved on request
LAYOUT = "layout.json"  # in the folder of the spec: which processes torchrun's agent starts
MEETING = "meeting"  # folder where several processes of one machine find each other
EXIT_INTERRUPTED = 75  # saved on request, to be resumed
EXIT_REFUSED = 2  # the child says in error.txt what is wrong; another attempt would end the same way

# glibc gives large blocks back to the kernel at once and faults every page again in the next step; keeping
# them makes a small model's step on a CPU up to 1.3 times faster. Read by the allocator at start.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # or cuBLAS refuses to work in torch's deterministic mode


@dataclass(frozen=True)
class Layout:
    """Processes that train together: so many on each node. rendezvous: host:port where several nodes meet."""

    processes: int = 1
    nodes: int = 1
    rendezvous: str = ""

    @property
    def world(self) -> int:
        """Processes on all nodes together."""
        return self.processes * self.nodes


def num_gpus() -> int:
    """GPUs that this process may use, none with a torch for CPUs; told without torch, which takes seconds to import."""
    if version("torch").endswith("+cpu"):
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()])


class Child:
    """One child process in a working folder that holds spec.json, log.txt, heartbeat and error.txt.

    lock: a descriptor that the child inherits, so that the artifact stays locked while it lives. layout: of several
    processes the child is torchrun's agent, and they are its children. log: where a child that joins what another
    machine has begun writes; that one's files in the folder it leaves alone.
    """

    def __init__(
        self, module: str, folder: Path, *, lock: int, grace_s: float, hang_timeout_s: float, threads: int,
        layout: Layout = Layout(), log: Path | None = None,
    ) -> None:  # fmt: skip
        self._layout = layout
        self._joins = log is not None
        self._log = log or folder / "log.txt"
        self._workers: dict[int, psutil.Process] = {}
        self._module = module
        self._folder = folder
        self._lock = lock
        self._grace_s = grace_s
        self._hang_timeout_s = hang_timeout_s
        self._threads = threads

    def run(self, *, on_line: Callable[[str], None], on_poll: Callable[[], None] = lambda: None) -> None:
        """Run to the end. Raises Interrupted, TrainingError, or whatever stopped the caller meanwhile."""
        if not self._joins:
            _end_leftovers(self._folder / "spec.json")
            for name in (ERROR, STOPPED):
                (self._folder / name).unlink(missing_ok=True)
        with self._log.open("ab") as sink:
            offset = sink.tell()
            heartbeat = self._folder / HEARTBEAT
            heartbeat.touch()
            process: subprocess.Popen | None = None
            tail = _Tail(self._log, offset, on_line)
            try:
                process = subprocess.Popen(
                    self._command(),
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    env=child_environment(os.environ, self._threads, self._grace_s),
                    pass_fds=(self._lock,),
                    start_new_session=True,
                )
                self._watch(process, heartbeat, tail, on_poll)
            finally:
                if process is not None:
                    self._stop(process)
                tail.read()
        on_poll()
        self._raise_for(process.returncode, tail.last_lines)

    def _command(self) -> list[str]:
        # -P: a foreign tasks.py in the working directory must not shadow ours
        python, spec = [sys.executable, "-P", "-m"], str(self._folder / "spec.json")
        if self._layout.world == 1:
            return [*python, self._module, spec]
        layout = self._folder / LAYOUT
        if not self._joins:
            write_json(layout, asdict(self._layout))
        role = "joins" if self._joins else "begins"
        return [*python, "fmcore.process.agent", str(layout), self._module, spec, role]

    def _watch(self, process: subprocess.Popen, heartbeat: Path, tail: "_Tail", on_poll: Callable[[], None]) -> None:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            self._note_workers(process)
            tail.read()
            on_poll()
            if self._silence(heartbeat) > self._hang_timeout_s:
                self._kill_hung(process)

    def _silence(self, heartbeat: Path) -> float:
        """Seconds since the last heartbeat; none where the machine that began has put the result in its place."""
        try:
            return time.time() - heartbeat.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _stop(self, process: subprocess.Popen) -> None:
        """Ask the child to save and go, then make it and its workers go."""
        try:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(self._grace_s)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also when a second signal ends our waiting
            self._kill(process)

    def _kill_hung(self, process: subprocess.Popen) -> None:
        process.send_signal(signal.SIGUSR1)  # faulthandler writes every thread's stack into the log
        time.sleep(1)
        self._kill(process)

    def _kill(self, process: subprocess.Popen) -> None:
        self._note_workers(process)
        if process.poll() is None:
            process.kill()
            process.wait()
        for worker in self._workers.values():
            with suppress(psutil.NoSuchProcess):
                worker.kill()  # psutil looks first whether the pid is still that process's
                worker.wait()

    def _note_workers(self, process: subprocess.Popen) -> None:
        if self._layout.world > 1:
            with suppress(psutil.NoSuchProcess):
                self._workers |= {worker.pid: worker for worker in psutil.Process(process.pid).children(recursive=True)}

    def _raise_for(self, code: int, last_lines: list[str]) -> None:
        if code == 0:
            return
        if code == EXIT_INTERRUPTED:
            raise Interrupted("training was stopped after saving; run the same command again to resume")
        if code == EXIT_REFUSED:
            error = self._folder / ERROR
            raise TrainingRefused((error.read_text().strip() if error.exists() else "") or self._cannot_write())
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        end = "\n".join(last_lines[-12:])
        raise TrainingError(f"the process {self._module} ended with {cause}; its log is {self._log}:\n{end}")

    def _cannot_write(self) -> str:
        free = shutil.disk_usage(self._folder).free
        return (
            f"the training ended, and could not write why in {self._folder}, where {free / 1e6:,.0f} MB are free. "
            f"Free some space, and run the same command again to go on from the last saved state"
        )


class TrainingRefused(TrainingError):
    """The child found that it cannot do what it was asked; a retry would not help."""


def _end_leftovers(spec: Path) -> None:
    """End what an attempt left behind whose agent was killed: its processes do not hold the artifact's lock."""
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.pid != os.getpid() and process.cmdline()[-1:] == [str(spec)]:
                process.kill()
                process.wait()


def child_environment(environment: Mapping[str, str], threads: int, grace_s: float) -> dict[str, str]:
    """The environment of a child: allocator settings and thread counts, unless the user set their own.

    grace_s: what torchrun's agent gives its workers when it is stopped.
    """
    defaults = {**ALLOCATOR, **DETERMINISTIC, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {}
    own = {
        PARENT_VARIABLE: str(os.getpid()),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(ceil(grace_s)),
        "PYTHONSAFEPATH": "1",  # torchrun starts its workers without -P
    }
    return {**defaults, **environment, **counts, **own}


class _Tail:
    """Hands on the lines a log file has gained."""

    def __init__(self, path: Path, offset: int, on_line: Callable[[str], None]) -> None:
        self._path = path
        self._offset = offset
        self._on_line = on_line
        self.last_lines: list[str] = []

    def read(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in without_credentials(complete.decode("utf-8", "replace")).splitlines():
            self.last_lines = [*self.last_lines[-49:], line]
            self._on_line(line)
