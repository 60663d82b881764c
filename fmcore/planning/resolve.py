"""From a recipe to what will run: its parent as a version, its steps as fingerprints."""

from dataclasses import dataclass

from mlflow import MlflowClient

from fmcore.artifacts.store import Store
from fmcore.artifacts.types import ACCEPTED, RegisteredModel
from fmcore.data.prepare import documents_step
from fmcore.errors import TrackingError, UnknownModelError
from fmcore.planning.offline import offline_parent
from fmcore.planning.runs import RunRecord, recipe_identity
from fmcore.planning.steps import ParentRef, StageSteps, stage_steps
from fmcore.recipes.fields import Execution
from fmcore.recipes.stages import PretrainRecipe, StageRecipe
from fmcore.tracking.client import connect
from fmcore.tracking.register import regression_accepted
from fmcore.tracking.registry import resolve
from fmcore.workspace import Workspace


@dataclass(frozen=True)
class ResolvedStage:
    """A stage ready to run. record: where its parent is written down, for the case of an interruption."""

    recipe: StageRecipe
    parent: RegisteredModel | None
    steps: StageSteps
    record: RunRecord


def tracking_uri(execution: Execution, workspace: Workspace) -> str:
    """execution.tracking_uri, else MLFLOW_TRACKING_URI, else the home's own database."""
    return execution.tracking_uri or workspace.tracking_uri


def resolve_stage(recipe: StageRecipe, workspace: Workspace, store: Store, *, fresh: bool = False) -> ResolvedStage:
    """Resolve a recipe. fresh: forget an unfinished run of it.

    Raises UnknownModelError where the parent does not exist or was refused, DataError for missing sources,
    TrackingError where the registry is needed and does not answer; see `offline_parent`.
    """
    uri = tracking_uri(recipe.execution, workspace)
    identity = recipe_identity(recipe, documents_step(recipe.name, recipe.data, None, store.digests))
    record = RunRecord(workspace.runs, identity)
    if fresh:
        record.forget()
    parent = None if isinstance(recipe, PretrainRecipe) else _find_parent(recipe.parent, uri, store, record)
    reference = ParentRef(parent.model, parent.fingerprint, parent.parents["checkpoint"]) if parent else None
    steps = stage_steps(recipe, reference, store.digests)
    if fresh:
        store.discard_partial(steps.checkpoint)
    return ResolvedStage(recipe, parent, steps, record)


def _find_parent(reference: str, uri: str, store: Store, record: RunRecord) -> RegisteredModel:
    try:
        return resolve_parent(reference, connect(uri), store, record)
    except TrackingError as error:
        return offline_parent(reference, store, record, error)


def resolve_parent(
    reference: str, client: MlflowClient, store: Store, record: RunRecord | None = None
) -> RegisteredModel:
    """The version a parent reference stands for, or the one that an unfinished run of the recipe found."""
    ref = resolve(client, reference)
    fingerprint = (record.parent_for(ref.fingerprint) if record else None) or ref.fingerprint
    parent = store.get(fingerprint, RegisteredModel)
    if parent.verdict not in ACCEPTED and not regression_accepted(client, parent):
        raise UnknownModelError(
            f"{reference} is {parent.uri}, which the gate did not let through ({parent.verdict}): a refused version "
            f"is nobody's parent. Take {parent.model}@champion, or accept it with "
            f"`strata promote {parent.uri} --accept-regression --reason TEXT`"
        )
    return parent
