"""Starts a child process on a JSON spec, streams its log, watches its heartbeat, and never leaves it behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fmcore.errors import Interrupted, TrainingError
from fmcore.redaction import without_credentials

POLL_SECONDS = 0.2
PARENT_VARIABLE = "STRATA_PARENT_PID"  # a parent that dies while the child still imports must be missed, too
EXIT_INTERRUPTED = 75  # saved on request, to be resumed
EXIT_REFUSED = 2  # the child says in error.txt what is wrong; another attempt would end the same way

# glibc gives large blocks back to the kernel at once and faults every page again in the next step; keeping
# them makes a small model's step on a CPU up to 1.3 times faster. Read by the allocator at start.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


class Child:
    """One child process in a working folder that holds spec.json, log.txt, heartbeat and error.txt.

    lock: a descriptor that the child inherits, so that the artifact stays locked while it lives.
    """

    def __init__(
        self, module: str, folder: Path, *, lock: int, grace_s: float, hang_timeout_s: float, threads: int
    ) -> None:
        self._module = module
        self._folder = folder
        self._lock = lock
        self._grace_s = grace_s
        self._hang_timeout_s = hang_timeout_s
        self._threads = threads

    def run(self, *, on_line: Callable[[str], None], on_poll: Callable[[], None] = lambda: None) -> None:
        """Run to the end. Raises Interrupted, TrainingError, or whatever stopped the caller meanwhile."""
        log = self._folder / "log.txt"
        with log.open("ab") as sink:
            offset = sink.tell()
            heartbeat = self._folder / "heartbeat"
            heartbeat.touch()
            # -P: a foreign tasks.py in the working directory must not shadow ours
            command = [sys.executable, "-P", "-m", self._module, str(self._folder / "spec.json")]
            process: subprocess.Popen | None = None
            tail = _Tail(log, offset, on_line)
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    env=child_environment(os.environ, self._threads),
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

    def _watch(self, process: subprocess.Popen, heartbeat: Path, tail: "_Tail", on_poll: Callable[[], None]) -> None:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            tail.read()
            on_poll()
            if time.time() - heartbeat.stat().st_mtime > self._hang_timeout_s:
                self._kill_hung(process)

    def _stop(self, process: subprocess.Popen) -> None:
        """Ask the child to save and go, then make it go."""
        if process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(self._grace_s)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also when a second signal ends our waiting
            if process.poll() is None:
                process.kill()
                process.wait()

    def _kill_hung(self, process: subprocess.Popen) -> None:
        process.send_signal(signal.SIGUSR1)  # faulthandler writes every thread's stack into the log
        time.sleep(1)
        process.kill()
        process.wait()

    def _raise_for(self, code: int, last_lines: list[str]) -> None:
        if code == 0:
            return
        if code == EXIT_INTERRUPTED:
            raise Interrupted("training was stopped after saving; run the same command again to resume")
        if code == EXIT_REFUSED and (self._folder / "error.txt").exists():
            raise TrainingRefused((self._folder / "error.txt").read_text().strip())
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        end = "\n".join(last_lines[-12:])
        raise TrainingError(
            f"the process {self._module} ended with {cause}; its log is {self._folder / 'log.txt'}:\n{end}"
        )


class TrainingRefused(TrainingError):
    """The child found that it cannot do what it was asked; a retry would not help."""


def child_environment(environment: Mapping[str, str], threads: int) -> dict[str, str]:
    """The environment of a child: allocator settings and thread counts, unless the user set their own."""
    defaults = {**ALLOCATOR, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {}
    return {**defaults, **environment, **counts, PARENT_VARIABLE: str(os.getpid())}


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
