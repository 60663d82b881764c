"""Inside a child: stop when asked, stop when the parent is gone, show that we live, say what is wrong."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fmcore.errors import StrataError
from fmcore.process.launch import EXIT_INTERRUPTED, EXIT_REFUSED, PARENT_VARIABLE
from fmcore.redaction import Redacted

WATCH_SECONDS = 0.5


class Stop:
    """Set by SIGTERM, SIGINT or the parent's death; looked at between two steps."""

    def __init__(self) -> None:
        self.requested = False
        self._parent = int(os.environ.get(PARENT_VARIABLE) or os.getppid())
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        threading.Thread(target=self._watch_parent, name="parent-watch", daemon=True).start()

    def _on_signal(self, number: int, frame: object) -> None:
        if self.requested:
            os._exit(128 + number)  # asked twice: the last verified checkpoint will do
        self.requested = True

    def _watch_parent(self) -> None:
        while os.getppid() == self._parent:
            time.sleep(WATCH_SECONDS)
        self.requested = True


class Heartbeat:
    """Touches a file; the parent takes silence for a hang."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "heartbeat"

    def beat(self) -> None:
        """Show that we live."""
        self._path.touch()


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
        (spec.parent / "error.txt").write_text(str(error))
        sys.exit(EXIT_REFUSED)
    sys.exit(0 if done else EXIT_INTERRUPTED)
