"""Inside a child: stop when asked, stop when the parent is gone, show that we live, say what is wrong."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from fmcore.errors import StrataError
from fmcore.process.launch import ERROR, EXIT_INTERRUPTED, EXIT_REFUSED, HEARTBEAT, PARENT_VARIABLE, STOPPED
from fmcore.redaction import Redacted

WATCH_SECONDS = 0.5
TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"  # set in the processes that torchrun's agent starts
SERVING_VARIABLE = "STRATA_SERVING_PID"  # of the process that starts flow runs and must not leave them behind
END_SECONDS = 40  # a training's grace_s, and what Prefect and MLflow are told after it


class Stop:
    """Set by SIGTERM, SIGINT or the parent's death; looked at between two steps.

    torchrun's agent asks its workers again while they save, and ends them itself when their time is over.
    """

    def __init__(self) -> None:
        self.requested = False
        self._parent = int(os.environ.get(PARENT_VARIABLE) or os.getppid())
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        threading.Thread(target=self._watch_parent, name="parent-watch", daemon=True).start()

    def _on_signal(self, number: int, frame: object) -> None:
        if self.requested and TORCHRUN_VARIABLE not in os.environ:
            os._exit(128 + number)  # asked twice: the last verified checkpoint will do
        self.requested = True

    def _watch_parent(self) -> None:
        while os.getppid() == self._parent:
            time.sleep(WATCH_SECONDS)
        self.requested = True


@cache
def end_with_parent() -> None:
    """Have a served flow run end when the process that serves it is gone, even by kill -9.

    It is asked by SIGTERM, so that the training saves, and made to end where that takes too long. In any
    other process nothing happens.
    """
    if parent := os.environ.get(SERVING_VARIABLE):
        threading.Thread(target=_end_after, args=(int(parent),), name="parent-watch", daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_SECONDS)
    os._exit(1)


class Heartbeat:
    """Touches a file; the parent takes silence for a hang."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / HEARTBEAT

    def beat(self) -> None:
        """Show that we live."""
        self._path.touch()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Beat while the block runs: one that waits for others, and has time limits of its own."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(WATCH_SECONDS):
                self._path.touch()

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def run_main(main: Callable[[Path], bool]) -> None:
    """Run a child's main on the spec named on the command line.

    main returns False when it was interrupted after saving. An error of ours is left in error.txt for the
    parent to raise again.
    """
    spec = Path(sys.argv[1])
    sys.stdout, sys.stderr = Redacted(sys.stdout), Redacted(sys.stderr)  # they are the artifact's log
    try:
        done = main(spec)
    except StrataError as error:
        with suppress(OSError):  # on a disk that is full
            (spec.parent / ERROR).write_text(str(error))
        sys.exit(EXIT_REFUSED)
    if not done and TORCHRUN_VARIABLE in os.environ:
        (spec.parent / STOPPED).touch()  # torchrun takes any other exit code for a failure
        sys.exit(0)
    sys.exit(0 if done else EXIT_INTERRUPTED)
