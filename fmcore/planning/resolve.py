"""From a recipe to what will run: its parent as a version, its steps as fingerprints."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from fmcore.artifacts.store import Store
from fmcore.artifacts.types import RegisteredModel
from fmcore.data.prepare import documents_step
from fmcore.model.outside import Outside
from fmcore.planning.parents import check_length, find_parent, import_model, with_known_history
from fmcore.planning.runs import RunRecord, recipe_identity
from fmcore.planning.steps import StageSteps, stage_steps
from fmcore.recipes.fields import Execution
from fmcore.recipes.stages import PretrainRecipe, StageRecipe
from fmcore.workspace import Workspace


@dataclass(frozen=True)
class ResolvedStage:
    """A stage ready to run. record: where its parent is written down, for the case of an interruption.

    recipe: with what follows from the parent filled in. outside: a parent that is to be imported first.
    """

    recipe: StageRecipe
    parent: RegisteredModel | None
    steps: StageSteps
    record: RunRecord
    outside: Outside | None = None


def tracking_uri(execution: Execution, workspace: Workspace) -> str:
    """execution.tracking_uri, else MLFLOW_TRACKING_URI, else the home's own database."""
    return execution.tracking_uri or workspace.tracking_uri


def resolve_stage(
    recipe: StageRecipe, workspace: Workspace, store: Store, *, fresh: bool = False, anew: bool = False
) -> ResolvedStage:
    """Resolve a recipe; builds and downloads nothing.

    fresh: forget an unfinished run of it. anew: forget a finished one, so that a champion it made is the parent
    now; an unfinished one goes on.

    Raises UnknownModelError where the parent does not exist or was refused (NotDownloadedError for a hub name that
    `fetch_parent` has not fetched), DataError for missing sources, RecipeError for what the parent cannot give,
    TrackingError where the registry is needed and does not answer; see `offline_parent`.
    """
    uri = tracking_uri(recipe.execution, workspace)
    identity = recipe_identity(recipe, documents_step(recipe.name, recipe.data, None, store.digests))
    record = RunRecord(workspace.runs, identity)
    if fresh or (anew and record.is_finished):
        record.forget()
    found = None
    if not isinstance(recipe, PretrainRecipe):
        found = find_parent(recipe.parent, uri, store, record)
        check_length(recipe, found, store)
        recipe = with_known_history(recipe, found, store)
    steps = stage_steps(recipe, found.ref if found else None, store.digests, imported=found.steps if found else ())
    if fresh:
        store.discard_partial(steps.checkpoint)
    return ResolvedStage(recipe, found.model if found else None, steps, record, found.outside if found else None)


def import_parent(
    stage: ResolvedStage, workspace: Workspace, store: Store, *, on_line: Callable[[str], None] = print
) -> ResolvedStage:
    """The stage with its parent in the store and the registry: one from outside is imported now.

    Raises RecipeError where it cannot be trained, TrackingError where the registry does not answer.
    """
    if stage.outside is None:
        return stage
    uri = tracking_uri(stage.recipe.execution, workspace)
    return replace(stage, parent=import_model(stage.outside, stage.recipe, uri, workspace, store, on_line))
