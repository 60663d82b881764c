"""Fresh processes that run one function on many jobs; results come back in the jobs' order.

Each process is a new interpreter that imports the function's module and nothing of ours: no fork, no second
copy of the program that started it. Jobs and results are JSON lines over its pipes. A process ends itself as
soon as its input is closed, so none outlives the one that started it, however that one ends.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from itertools import islice
from typing import IO, Any

from fmcore.errors import DataError, WorkerError

AHEAD = 2  # jobs per process that may be done before their turn


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_in_processes(function: str, jobs: Iterable[Any], num: int) -> Generator[Any, None, None]:
    """The results of `module:name` for each job, in order, worked out by `num` processes.

    Few jobs are begun ahead of the one whose result is waited for, so that results need not be held. Raises
    what a job raised, or WorkerError where its process died; every process is gone when the iterator ends,
    is closed or raises.
    """
    workers = _Workers(function)
    waiting: deque[Future[Any]] = deque()
    rest = iter(jobs)
    with ThreadPoolExecutor(num, thread_name_prefix="worker") as threads:
        try:
            waiting.extend(threads.submit(workers.call, job) for job in islice(rest, num * AHEAD))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(threads.submit(workers.call, job) for job in islice(rest, 1))
                yield result
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            workers.kill()


class _Workers:
    """One process per calling thread, started at its first job."""

    def __init__(self, function: str) -> None:
        self._function = function
        self._mine = threading.local()
        self._all: list[_Worker] = []
        self._lock = threading.Lock()
        self._killed = False

    def call(self, job: Any) -> Any:
        if not hasattr(self._mine, "worker"):
            with self._lock:
                if self._killed:
                    raise WorkerError("stopped")
                self._mine.worker = _Worker(self._function)
                self._all.append(self._mine.worker)
        return self._mine.worker.call(job)

    def kill(self) -> None:
        with self._lock:
            self._killed = True
            for worker in self._all:
                worker.kill()


class _Worker:
    def __init__(self, function: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        # -P: a foreign module in the working directory must not shadow ours; a session of its own: Ctrl-C in
        # the terminal reaches the parent alone, which ends us
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fmcore.process.pool", function],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True,
            env={**os.environ, "USE_TORCH": "0", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def call(self, job: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = b""
        if not answer:
            raise self._died()
        result = json.loads(answer)
        if "refused" in result:
            raise DataError(result["refused"])
        if "failed" in result:
            raise WorkerError(f"a process that works on the data failed:\n{result['failed']}")
        return result["done"]

    def _died(self) -> WorkerError:
        code = self._process.wait()
        cause = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = "; if memory ran out, set execution.workers lower" if code == -signal.SIGKILL else ""
        self._errors.seek(0)
        said = self._errors.read()[-2000:].decode("utf-8", "replace").strip()
        return WorkerError(
            f"a process that works on the data {cause}{hint}; run the same command again\n{said}".strip()
        )

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            _close(stream)


def _close(stream: IO[bytes] | None) -> None:
    try:
        if stream:
            stream.close()
    except OSError:
        pass  # what was not sent to a process that is gone


def _serve(function: Callable[[Any], Any]) -> None:
    """Answer the jobs that come in until there are no more, or nobody is there to send them."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    jobs: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_receive, args=(jobs,), daemon=True).start()
    while True:
        job = jobs.get()
        try:
            answer = {"done": function(json.loads(job))}
        except DataError as error:
            answer = {"refused": str(error)}
        except Exception:
            answer = {"failed": traceback.format_exc()}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _receive(jobs: "queue.Queue[bytes]") -> None:
    for line in sys.stdin.buffer:
        jobs.put(line)
    os._exit(0)


if __name__ == "__main__":
    module, name = sys.argv[1].split(":")
    _serve(getattr(import_module(module), name))
