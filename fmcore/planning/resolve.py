"""From a recipe to what will run: its parent as a version, its steps as fingerprints."""

from dataclasses import dataclass

from mlflow import MlflowClient

from fmcore.artifacts.store import Store
from fmcore.artifacts.types import ACCEPTED, RegisteredModel
from fmcore.data.prepare import documents_step
from fmcore.errors import UnknownModelError
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


def base_name(reference: str) -> str:
    """The model's name in a parent reference of any form: name@alias, name/2, models:/name/2, org/name, a folder."""
    path = reference.removeprefix("models:/").partition("@")[0].rstrip("/")
    *above, last = path.split("/")
    return above[-1] if above and last.isdecimal() else last


def resolve_stage(
    recipe: StageRecipe, workspace: Workspace, store: Store, *, fresh: bool = False, anew: bool = False
) -> ResolvedStage:
    """Resolve a recipe. fresh: forget an unfinished run of it. anew: forget a finished one, so that a champion
    it made is the parent now; an unfinished one goes on.

    Raises UnknownModelError where the parent does not exist or was refused, DataError for missing sources,
    TrackingError where the registry is needed and does not answer.
    """
    uri = tracking_uri(recipe.execution, workspace)
    identity = recipe_identity(recipe, documents_step(recipe.name, recipe.data, None, store.digests))
    record = RunRecord(workspace.runs, identity)
    if fresh or (anew and record.is_finished):
        record.forget()
    parent = None if isinstance(recipe, PretrainRecipe) else resolve_parent(recipe.parent, connect(uri), store, record)
    reference = ParentRef(parent.model, parent.fingerprint, parent.parents["checkpoint"]) if parent else None
    steps = stage_steps(recipe, reference, store.digests)
    if fresh:
        store.discard_partial(steps.checkpoint)
    return ResolvedStage(recipe, parent, steps, record)


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
