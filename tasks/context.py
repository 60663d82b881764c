"""What the five tasks of a running stage share: recipe, steps, store, tracking, and who hears of progress."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from prefect.states import Completed, State

from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Artifact
from fmcore.planning.steps import StageSteps
from fmcore.recipes.stages import StageRecipe
from fmcore.tracking.session import StageTracking
from fmcore.training.progress import Progress

logger = logging.getLogger("strata")
logger.setLevel(logging.INFO)  # Prefect gives it a handler, but no level
ArtifactT = TypeVar("ArtifactT", bound=Artifact)


@dataclass(frozen=True)
class Stage:
    """One stage while it runs. steps: what each task is about to make, by identity."""

    recipe: StageRecipe
    steps: StageSteps
    store: Store
    tracking: StageTracking
    prefect_url: str | None


_STAGE: ContextVar[Stage] = ContextVar("stage")
_LISTENER: ContextVar[Callable[[Progress], None] | None] = ContextVar("listener", default=None)


def current_stage() -> Stage:
    """The stage that the calling task belongs to."""
    return _STAGE.get()


@contextmanager
def running(stage: Stage) -> Iterator[None]:
    """Make a stage the current one."""
    token = _STAGE.set(stage)
    try:
        yield
    finally:
        _STAGE.reset(token)


@contextmanager
def listening(listener: Callable[[Progress], None]) -> Iterator[None]:
    """Have training's progress told to `listener`, a few times a second at most."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def tell(progress: Progress) -> None:
    """Hand progress to whoever listens."""
    if listener := _LISTENER.get():
        listener(progress)


def finished(artifact: ArtifactT, *, cached: bool) -> ArtifactT | State[ArtifactT]:
    """What a task returns: the artifact, in a state named Cached where it was there already."""
    if not cached:
        return artifact
    logger.info("%s %s is there already", artifact.kind, artifact.short)
    return Completed(name="Cached", message=f"{artifact.kind} {artifact.short} was there already", data=artifact)
