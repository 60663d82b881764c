"""Saves off the training thread: training waits for a copy in memory, a thread writes and verifies it."""

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from fmcore.errors import TrainingError
from fmcore.training.checkpoint import (
    TrainState,
    check_written,
    load_anchor,
    write_latest,
    write_state,
)
from fmcore.training.mirror import Mirror
from fmcore.training.parallel import ALONE, Processes
from fmcore.training.trainee import Snapshot, Trainee

Write = Callable[[Snapshot, TrainState], object]


class Saver:
    """Writes the states of one training below its folder, one at a time.

    A state that could not be written raises TrainingError in the training thread, at its next call here.
    """

    def __init__(self, folder: Path, trainee: Trainee, anchor_steps: int, processes: Processes = ALONE,
        mirror: Mirror | None = None,
    ) -> None:  # fmt: skip
        self._mirror = mirror
        self._processes = processes
        self._folder = folder
        self._latest = folder / "latest"
        self._anchor_steps = anchor_steps
        self._trainee = trainee
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._since = time.perf_counter()

    @property
    def busy(self) -> bool:
        """Whether a state is still being written."""
        return self._writer is not None and self._writer.is_alive()

    def save_latest(self, state: TrainState) -> None:
        """Begin to write the state to resume from. Waits for the one before it, if that is not written yet."""
        self._save(state, self._snapshot, self._write_latest)

    def _snapshot(self) -> Snapshot:
        return self._trainee.snapshot(first=self._processes.is_first)

    def _write_latest(self, snapshot: Snapshot, state: TrainState) -> None:
        if self._mirror is None:
            write_latest(self._latest, snapshot, state, self._anchor_steps, self._processes)
            return
        held = self._mirror.held_states
        write_latest(self._latest, snapshot, state, self._anchor_steps, self._processes, held)
        self._mirror.push_soon()

    def save_stable(self, state: TrainState) -> None:
        """Begin to write the state that continuous pre-training will start from."""
        self._save(state, self._snapshot if self._processes.world == 1 else self._whole, self._write_stable)

    def _whole(self) -> Snapshot:
        return self._trainee.whole(keep=self._processes.is_first)

    def _write_stable(self, snapshot: Snapshot, state: TrainState) -> None:
        if self._processes.is_first:
            check_written(self._folder / "stable", write_state(self._folder / "stable", snapshot, state))

    def is_anchor(self, state: TrainState) -> bool:
        """Whether a state has to be saved, to be gone back to."""
        return state.step % self._anchor_steps == 0

    def load_anchor(self) -> TrainState | None:
        """Put the trainee back to an anchor."""
        self.wait()
        return load_anchor(self._latest, self._trainee, self._anchor_steps, self._processes)

    def wait(self) -> None:
        """Return when all is written. Raises TrainingError where it could not be."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if isinstance(self._error, OSError | SafetensorError):
            raise TrainingError(could_not_save(self._error, self._folder)) from self._error
        if self._error is not None:
            raise self._error

    def count_time(self, state: TrainState) -> None:
        """Add the time since the last count to what the training has cost."""
        now = time.perf_counter()
        state.effort.wall_s += now - self._since
        self._since = now

    def _save(self, state: TrainState, copy: Callable[[], Snapshot], write: Write) -> None:
        start = time.perf_counter()
        self.wait()
        snapshot = copy()
        state.effort.saves += 1
        state.effort.save_stall_s += time.perf_counter() - start
        self.count_time(state)
        self._writer = threading.Thread(
            target=self._write, args=(write, snapshot, state.model_copy(deep=True)), name="saver", daemon=True
        )
        self._writer.start()

    def _write(self, write: Write, snapshot: Snapshot, state: TrainState) -> None:
        try:
            write(snapshot, state)
        except Exception as error:  # raised in the training thread, which must not take the state for written
            self._error = error


def could_not_save(error: Exception, folder: Path) -> str:
    """What to do about a state, or a line of metrics, that could not be written."""
    why = getattr(error, "strerror", None) or str(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in why
    return (
        f"the training cannot be saved in {folder}: {why}. What was saved before is whole; "
        f"{'free some space' if full else 'see to it'}, and run the same command again to go on from there"
    )
