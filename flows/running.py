"""Around the five calls: what is resolved before them, the MLflow run they share, and how it ends.

One stage at a time works on a model; others wait for its lock, and resolve their parent once they hold it.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from prefect import runtime
from prefect.exceptions import TerminationSignal

from fmcore.artifacts.lock import exclusive
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Documents, RegisteredModel
from fmcore.errors import DataError, Interrupted
from fmcore.planning.parents import fetch_parent
from fmcore.planning.resolve import import_parent, resolve_stage, tracking_uri
from fmcore.planning.runs import RunRecord
from fmcore.planning.steps import model_name
from fmcore.recipes.parents import base_name
from fmcore.recipes.stages import LifecycleRecipe, PretrainRecipe, StageRecipe
from fmcore.redaction import redact_logs
from fmcore.tracking import names
from fmcore.tracking.client import shown_uri
from fmcore.tracking.record import record_path
from fmcore.tracking.session import StageTracking, end_unfinished
from fmcore.workspace import Workspace
from tasks.context import Stage, logger, running

redact_logs()  # whoever imports the flows runs them, and Prefect keeps what they log
STOPPED = (KeyboardInterrupt, TerminationSignal, Interrupted)
EMBEDDED_VARIABLE = "STRATA_EMBEDDED_PREFECT"  # set while `strata run` has a Prefect server of its own
_PIPELINE: ContextVar[StageTracking | None] = ContextVar("pipeline", default=None)
_FRESH: ContextVar[bool] = ContextVar("fresh", default=False)


@dataclass
class StageRecord:
    """What a stage made, noted for the next run of the same recipe."""

    record: RunRecord

    def made(self, model: RegisteredModel) -> None:
        """The stage is done."""
        self.record.finish(model.fingerprint)

    def found_nothing_new(self, documents: Documents) -> None:
        """The stage is done: the next run looks at the champion anew. Without a parent it is a mistake."""
        self.record.forget()
        if "parent" not in documents.parents:
            raise DataError(f"no document is left to train on; dropped: {documents.counts['dropped'] or 'none'}")


@contextmanager
def starting_fresh() -> Iterator[None]:
    """`--fresh`: stages begun inside forget their unfinished runs."""
    token = _FRESH.set(True)
    try:
        yield
    finally:
        _FRESH.reset(token)


@contextmanager
def running_stage(recipe: StageRecipe) -> Iterator[tuple[StageRecord, RegisteredModel | None]]:
    """Resolve a recipe, open its MLflow run, make it the current stage, and end the run with its true status."""
    workspace = Workspace.current()
    store = Store(workspace.home)
    with _alone_on(recipe, workspace):
        fetch_parent(recipe)
        resolved = resolve_stage(recipe, workspace, store, fresh=_FRESH.get(), anew=_is_started_by_server())
        resolved = import_parent(resolved, workspace, store, on_line=logger.info)
        recipe = resolved.recipe
        registry = shown_uri(tracking_uri(recipe.execution, workspace))
        parent = resolved.parent
        resolved.record.start(parent.fingerprint if parent else None, resolved.steps, registry, name=recipe.name)
        tracking = StageTracking.start(
            tracking_uri(recipe.execution, workspace),
            workspace.home,
            name=f"{recipe.kind} {recipe.name}",
            identity=resolved.steps.model.fingerprint,
            tags=_tags(recipe),
            parent_run_id=None,
            record=record_path(workspace.runs, resolved.steps.model.fingerprint),
            recipe=recipe.model_dump(mode="json"),
            step=resolved.steps.model,
            recipe_identity=resolved.record.identity,
            pipeline=_PIPELINE.get(),
            page=_flow_run_page(),
        )
        stage = Stage(recipe, resolved.steps, store, tracking, _flow_run_page())
        with _ending(tracking), running(stage), _forgetting_bad_data(resolved.record):
            yield StageRecord(resolved.record), parent


@contextmanager
def _forgetting_bad_data(record: RunRecord) -> Iterator[None]:
    """Data that is wrong gets mended, and is then another recipe: nobody would come back for this record."""
    try:
        yield
    except DataError:
        record.forget()
        raise


@contextmanager
def _alone_on(recipe: StageRecipe, workspace: Workspace) -> Iterator[None]:
    """Hold the lock of the model that a stage is about to add a version to."""
    model = model_name(recipe, None if isinstance(recipe, PretrainRecipe) else base_name(recipe.parent))
    lock = workspace.home / "locks" / f"model-{model}"
    with exclusive(lock, on_wait=lambda holder: logger.info("waiting for %s, which works on %s", holder, model)):
        yield


def _is_started_by_server() -> bool:
    """Whether a schedule, a form or an API call asks for this run now; not so for a retry or a command."""
    return runtime.deployment.id is not None and runtime.flow_run.run_count == 1


def _tags(recipe: StageRecipe | LifecycleRecipe) -> dict[str, str]:
    outermost = runtime.flow_run.root_flow_run_id or runtime.flow_run.id
    return {names.STAGE: recipe.kind, **({names.FLOW_RUN: str(outermost)} if outermost else {})}


def _flow_run_page() -> str | None:
    """The flow run's page; None where the server is there for this run alone, and its address with it."""
    url = runtime.flow_run.ui_url
    lasting = EMBEDDED_VARIABLE not in os.environ
    return url if lasting and url and url.startswith("http") else None


@contextmanager
def running_pipeline(recipe: LifecycleRecipe, identity: str) -> Iterator[None]:
    """One MLflow run above those of the stages."""
    workspace = Workspace.current()
    tracking = StageTracking.start(
        tracking_uri(recipe.execution, workspace),
        workspace.home,
        name=f"{recipe.kind} {recipe.name}",
        identity=identity,
        tags=_tags(recipe),
        parent_run_id=None,
        record=record_path(workspace.runs, identity),
        recipe=recipe.model_dump(mode="json"),
        page=_flow_run_page(),
    )
    token = _PIPELINE.set(tracking)
    try:
        with _ending(tracking):
            yield
    finally:
        _PIPELINE.reset(token)


@contextmanager
def _ending(tracking: StageTracking) -> Iterator[None]:
    try:
        yield
    except STOPPED:
        tracking.finish("KILLED")
        raise
    except BaseException:
        tracking.finish("FAILED")
        raise
    tracking.finish("FINISHED")


def end_tracking(flow: Any, flow_run: Any, state: Any) -> None:
    """A hook, run elsewhere after a flow run's process died: what it left RUNNING in MLflow has FAILED.

    Prefect calls hooks with exactly these names.
    """
    recipe = flow_run.parameters.get("recipe")
    execution = recipe.get("execution") if isinstance(recipe, Mapping) else None
    named = execution.get("tracking_uri") if isinstance(execution, Mapping) else None
    end_unfinished(named or Workspace.current().tracking_uri, str(flow_run.id))
