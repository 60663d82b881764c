"""Task 3: TokenShards -> Checkpoint, in a process of its own."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect import task

from fmcore.artifacts.types import Checkpoint, RegisteredModel, TokenShards
from fmcore.tracking.contents import log_checkpoint
from fmcore.training.progress import ProgressReader
from fmcore.training.spec import TrainSpec
from fmcore.training.train import train_checkpoint
from tasks.cards import move_progress, start_progress
from tasks.context import Stage, current_stage, finished, logger, tell
from tasks.failing import failing_in_words

CARD_SECONDS = 3.0  # between two updates of the progress artifact
LOG_SECONDS = 15.0  # between two lines of progress in the run's log


@task(name="train")
@failing_in_words
def train(shards: TokenShards, parent: RegisteredModel | None) -> Checkpoint:
    """Train from scratch or from the parent; an interrupted training goes on where it was saved.

    Called directly, never submitted: only then does a cancellation reach it, and through it the process.
    """
    stage = current_stage()
    hit = stage.store.find(stage.steps.checkpoint, Checkpoint)
    checkpoint = hit or train_checkpoint(
        stage.steps.checkpoint, shards, stage.recipe, parent, stage.store,
        on_line=logger.info, watch=lambda metrics, spec: _watching(stage, metrics, spec),
    )  # fmt: skip
    stage.tracking.log(lambda run: log_checkpoint(run, checkpoint))
    return finished(checkpoint, cached=hit is not None)


@contextmanager
def _watching(stage: Stage, metrics: Path, spec: TrainSpec) -> Iterator[Callable[[], None]]:
    reader = ProgressReader(stage.recipe.name, metrics, spec.schedule.num_steps)
    card = start_progress()
    shown = logged = time.monotonic()

    def look() -> None:
        nonlocal shown, logged
        progress = reader.read()
        if progress is None:
            return
        tell(progress)
        now = time.monotonic()
        if now - shown >= CARD_SECONDS:
            move_progress(card, 100 * progress.step / progress.num_steps)
            shown = now
        if now - logged >= LOG_SECONDS:
            logger.info("%s", progress)
            logged = now

    with stage.tracking.uploading(metrics):
        yield look
    move_progress(card, 100.0)
