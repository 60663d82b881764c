"""The processes of one training: started, started again, and joined from other machines."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from fmcore.artifacts.files import read_json
from fmcore.artifacts.step import Step
from fmcore.artifacts.store import Building, Store
from fmcore.artifacts.types import Checkpoint
from fmcore.errors import Interrupted, TrainingError
from fmcore.process.launch import LAYOUT, Child, Layout, TrainingRefused, num_gpus
from fmcore.recipes.fields import Execution

JOIN_POLL_S = 1.0


def run_with_retries(
    building: Building, execution: Execution, on_line: Callable[[str], None], on_poll: Callable[[], None]
) -> None:
    """Train in the folder that is being built, and go on from the last saved state when an attempt crashes."""
    child = Child(
        "fmcore.training.child", building.path, lock=building.lock, grace_s=execution.grace_s,
        hang_timeout_s=execution.hang_timeout_s, threads=execution.threads,
        layout=_layout(building.path / "latest", execution),
    )  # fmt: skip
    for attempt in range(execution.retries + 1):
        try:
            child.run(on_line=on_line, on_poll=on_poll)
            return
        except TrainingRefused:
            raise
        except TrainingError as error:
            if attempt == execution.retries:
                raise
            on_line(f"attempt {attempt + 1} failed, going on from the last saved state, if there is one: {error}")


def join_training(step: Step, execution: Execution, store: Store, *, on_line: Callable[[str], None], log: Path) -> None:
    """Take part in a training that another machine has begun, or will begin, in the same home, until it is done.

    log: of this machine's processes. Raises Interrupted where the training was stopped, TrainingRefused where
    it cannot be done.
    """
    waiting = ""
    while store.find(step, Checkpoint) is None:
        folder = store.partial_of(step.fingerprint, Checkpoint)
        if folder is None or not (folder / LAYOUT).exists():
            if waiting != (waiting := f"waiting for a machine to begin the training of {step.name}"):
                on_line(waiting)
            time.sleep(JOIN_POLL_S)
            continue
        waiting = ""
        try:
            _join(folder, execution, on_line, log)
        except (Interrupted, TrainingRefused):
            raise
        except TrainingError as error:
            on_line(f"this machine's part ended, joining again: {error}")
            time.sleep(JOIN_POLL_S)


def _join(folder: Path, execution: Execution, on_line: Callable[[str], None], log: Path) -> None:
    lock = os.open(os.devnull, os.O_RDONLY)  # the machine that began holds the artifact's
    try:
        Child(
            "fmcore.training.child", folder, lock=lock, grace_s=execution.grace_s,
            hang_timeout_s=execution.hang_timeout_s, threads=execution.threads,
            layout=_layout(folder / "latest", execution), log=log,
        ).run(on_line=on_line)  # fmt: skip
    finally:
        os.close(lock)


def _layout(latest: Path, execution: Execution) -> Layout:
    """The processes to start: as many as asked for, else as the training began with, else one, or one per GPU."""
    kept = max((read_json(path).get("processes", 1) for path in latest.glob("step-*/state.json")), default=0)
    found = kept // execution.nodes or (num_gpus() if execution.device != "cpu" else 1)
    return Layout(execution.processes or max(1, found), execution.nodes, execution.rendezvous)
