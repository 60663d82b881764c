"""From a recipe's `parent` to a version: one of the registry, or a model from outside that is imported first."""

from collections.abc import Callable
from dataclasses import dataclass

from mlflow import MlflowClient

from fmcore.artifacts.ancestry import checkpoint_of, full_checkpoint, knows_texts
from fmcore.artifacts.files import read_json
from fmcore.artifacts.step import Step
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import ACCEPTED, RegisteredModel
from fmcore.errors import RecipeError, TrackingError, UnknownModelError
from fmcore.model.importing import import_checkpoint, import_step
from fmcore.model.outside import CONFIG, Outside, fetch, has_learned_positions, look_at, max_positions
from fmcore.planning.offline import offline_parent
from fmcore.planning.runs import RunRecord
from fmcore.planning.steps import ParentRef
from fmcore.recipes.fields import Replay
from fmcore.recipes.parents import HubName, Registered, parse_parent
from fmcore.recipes.stages import ContinueRecipe, FinetuneRecipe, PretrainRecipe, StageRecipe
from fmcore.tracking.client import connect
from fmcore.tracking.imported import IMPORTED, imported_step, register_imported
from fmcore.tracking.register import regression_accepted
from fmcore.tracking.registry import resolve
from fmcore.workspace import Workspace


@dataclass(frozen=True)
class FoundParent:
    """A parent by identity. model: its version, None where it is still to be imported from `outside`."""

    ref: ParentRef
    model: RegisteredModel | None
    outside: Outside | None

    @property
    def steps(self) -> tuple[Step, ...]:
        """What an import would make: the checkpoint, and the version. Empty for a registered parent."""
        return outside_steps(self.outside) if self.outside else ()


def outside_steps(outside: Outside) -> tuple[Step, Step]:
    """The checkpoint that importing makes, and the version it is registered as."""
    checkpoint = import_step(outside)
    return checkpoint, imported_step(outside.name, checkpoint.fingerprint)


def find_parent(reference: str, uri: str, store: Store, record: RunRecord) -> FoundParent:
    """What a recipe's parent stands for, or what an unfinished run of the recipe found. Imports nothing."""
    wanted = parse_parent(reference)
    if isinstance(wanted, Registered):
        model = _resolve(wanted.reference, uri, store, record)
        return FoundParent(_ref(model), model, None)
    outside = look_at(wanted, store.digests)
    checkpoint, version = outside_steps(outside)
    recorded = record.parent_for(version.fingerprint) or version.fingerprint
    if recorded != version.fingerprint:  # the folder has changed since an unfinished run imported it
        model = store.get(recorded, RegisteredModel)
        return FoundParent(_ref(model), model, None)
    ref = ParentRef(outside.name, version.fingerprint, checkpoint.fingerprint)
    return FoundParent(ref, store.find(version, RegisteredModel), outside)


def _ref(model: RegisteredModel) -> ParentRef:
    return ParentRef(model.model, model.fingerprint, model.parents["checkpoint"])


def _resolve(reference: str, uri: str, store: Store, record: RunRecord) -> RegisteredModel:
    try:
        return resolve_parent(reference, connect(uri), store, record)
    except TrackingError as error:
        return offline_parent(reference, store, record, error)


def resolve_parent(
    reference: str, client: MlflowClient, store: Store, record: RunRecord | None = None
) -> RegisteredModel:
    """The version a registry reference stands for, or the one that an unfinished run of the recipe found."""
    ref = resolve(client, reference)
    fingerprint = (record.parent_for(ref.fingerprint) if record else None) or ref.fingerprint
    parent = store.get(fingerprint, RegisteredModel)
    if parent.verdict not in ACCEPTED and parent.stage != IMPORTED and not regression_accepted(client, parent):
        raise UnknownModelError(
            f"{reference} is {parent.uri}, which the gate did not let through ({parent.verdict}): a refused version "
            f"is nobody's parent. Take {parent.model}@champion, or accept it with "
            f"`strata promote {parent.uri} --accept-regression --reason TEXT`"
        )
    return parent


def with_known_history(recipe: StageRecipe, parent: FoundParent, store: Store) -> StageRecipe:
    """The recipe without its default replay where nothing that the parent was trained on is known.

    Raises RecipeError where replay was asked for.
    """
    if not isinstance(recipe, ContinueRecipe) or recipe.replay.fraction == 0:
        return recipe
    if parent.model is not None and knows_texts(store, parent.model):
        return recipe
    if "fraction" in recipe.replay.model_fields_set:
        raise RecipeError(
            f"replay.fraction: {recipe.replay.fraction:g} of the samples shall be what the parent was trained on, but "
            f"what {recipe.parent} was trained on is not known here; set it to 0, or leave it out"
        )
    return recipe.model_copy(update={"replay": Replay(fraction=0)})


def check_length(recipe: StageRecipe, parent: FoundParent, store: Store) -> None:
    """Refuse a context for which the parent has no position embeddings. Raises RecipeError."""
    if isinstance(recipe, PretrainRecipe) or not recipe.train.seq_len:
        return
    if parent.outside is not None:
        config = parent.outside.config
    else:
        assert parent.model is not None
        config = read_json(full_checkpoint(store, checkpoint_of(store, parent.model)).final / CONFIG)
    if has_learned_positions(config) and recipe.train.seq_len > max_positions(config):
        raise RecipeError(
            f"train.seq_len: {recipe.train.seq_len} is more than the {max_positions(config)} positions that "
            f"{recipe.parent} has embeddings for"
        )


def fetch_parent(recipe: StageRecipe) -> None:
    """Download the parent, where it is a hub name, so that it can be looked at. Raises UnknownModelError."""
    if isinstance(recipe, FinetuneRecipe | ContinueRecipe):
        wanted = parse_parent(recipe.parent)
        if isinstance(wanted, HubName):
            fetch(wanted)


def import_model(
    outside: Outside, recipe: StageRecipe, uri: str, workspace: Workspace, store: Store, on_line: Callable[[str], None]
) -> RegisteredModel:
    """Import a model from outside and register it, or find both done."""
    step, version = outside_steps(outside)
    checkpoint = import_checkpoint(step, outside, recipe.execution, store, on_line=on_line)
    return register_imported(version, checkpoint, store, uri, workspace, on_line=on_line)
