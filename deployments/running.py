"""`strata run`: print what is done already, or run the recipe's flow and show how it goes."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from deployments.environment import addresses, prepare_environment
from deployments.servers import ensure_prefect
from deployments.summary import reasons, stage_table
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import ACCEPTED, ARTIFACT_TYPES, Documents, RegisteredModel
from fmcore.errors import Interrupted
from fmcore.recipes.stages import LifecycleRecipe, Recipe, StageRecipe
from fmcore.training.progress import Progress as TrainingProgress
from fmcore.workspace import Workspace

REFUSED = 3


@dataclass(frozen=True)
class Outcome:
    """What a run made, and the exit code that says so. An empty list of models: no new data."""

    models: list[RegisteredModel]
    code: int


def run_recipe(recipe: Recipe, console: Console, *, fresh: bool = False) -> Outcome:
    """Run a recipe to its end, or find it done already, and print what came out."""
    workspace = Workspace.current()
    prepare_environment(workspace)
    print_addresses(workspace, console)
    store = Store(workspace.home)
    models = None if fresh else finished_models(recipe, workspace, store)
    if models is not None:
        console.print("Every step is there already; nothing was started.")
    else:
        models = _run(recipe, workspace, console, fresh=fresh)
    _show(models, store, console)
    print_addresses(workspace, console)
    accepted = all(model.verdict in ACCEPTED for model in models)
    return Outcome(models, 0 if accepted else REFUSED)


def _run(recipe: Recipe, workspace: Workspace, console: Console, *, fresh: bool) -> list[RegisteredModel]:
    try:
        with _stopping_on_request(console):
            ensure_prefect(workspace)
            with _logging(console), _progress(console):
                return _run_flow(recipe, fresh=fresh)
    except KeyboardInterrupt as error:
        raise Interrupted("run the same command again to resume") from error


def _run_flow(recipe: Recipe, *, fresh: bool) -> list[RegisteredModel]:
    """Run the flow of the recipe's kind; an empty list where there was no new data."""
    # Prefect takes seconds to import: only a recipe that has work to do waits for it
    from flows.continue_pretrain import continue_pretrain
    from flows.finetune import finetune
    from flows.lifecycle import lifecycle
    from flows.pretrain import pretrain
    from flows.running import starting_fresh

    flows: dict[str, Any] = {f.name: f for f in (pretrain, finetune, continue_pretrain, lifecycle)}
    with starting_fresh() if fresh else nullcontext():
        result = flows[recipe.kind](recipe)
    if isinstance(result, list):
        return result
    return [result] if result else []


def finished_models(recipe: Recipe, workspace: Workspace, store: Store) -> list[RegisteredModel] | None:
    """What the recipe made, if its every step is done in this home and registry; else None.

    An empty list: there is no new data.
    """
    if not isinstance(recipe, LifecycleRecipe):
        return _finished(recipe, workspace, store)
    base = _finished(recipe.pretrain_recipe(), workspace, store)
    if not base:
        return None
    tuned = _finished(recipe.finetune_recipe(parent=base[0].uri), workspace, store)
    newer = _finished(recipe.continue_recipe(parent=base[0].uri), workspace, store) if tuned else None
    if tuned is None or newer is None:
        return None
    if not newer or newer[0].verdict not in ACCEPTED:
        return [*base, *tuned, *newer]
    last = _finished(recipe.finetune_recipe(parent=newer[0].uri), workspace, store)
    return None if last is None else [*base, *tuned, *newer, *last]


def _finished(recipe: StageRecipe, workspace: Workspace, store: Store) -> list[RegisteredModel] | None:
    from fmcore.model.outside import NotDownloadedError
    from fmcore.planning.resolve import resolve_stage, tracking_uri
    from fmcore.tracking.client import connect
    from fmcore.tracking.register import find_registered

    try:
        steps = resolve_stage(recipe, workspace, store).steps
    except NotDownloadedError:
        return None
    documents = store.find(steps.documents, Documents)
    if documents is not None and documents.num_train == 0 and documents.parents:
        return []
    if any(store.find(step, ARTIFACT_TYPES[step.kind]) is None for step in steps):
        return None
    model = find_registered(steps.model, store, connect(tracking_uri(recipe.execution, workspace)))
    return [model] if model else None


def _show(models: list[RegisteredModel], store: Store, console: Console) -> None:
    if not models:
        console.print("NoNewData: the parent's weights have seen every document of the sources.")
        return
    console.print(stage_table(models, store))
    for line in reasons(models):
        console.print(line, highlight=False, soft_wrap=True)
    uri = models[-1].uri
    console.print(f"next: strata lineage {uri} · strata generate {uri} --prompt TEXT · strata up", highlight=False)


def print_addresses(workspace: Workspace, console: Console) -> None:
    """Home, Prefect and MLflow: where to look for what was made."""
    for line in addresses(workspace):
        console.print(line, highlight=False, soft_wrap=True, style="dim")


@contextmanager
def _logging(console: Console) -> Iterator[None]:
    logger = logging.getLogger("strata")
    handler = RichHandler(console=console, show_path=False, show_level=False, markup=False, log_time_format="%H:%M:%S")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def _progress(console: Console) -> Iterator[None]:
    """A bar that follows the training of whatever stage runs."""
    from tasks.context import listening

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console, transient=True) as progress:
        bars: dict[str, TaskID] = {}

        def on_progress(state: TrainingProgress) -> None:
            if state.name not in bars:
                bars[state.name] = progress.add_task(state.name, total=state.num_steps, text="")
            progress.update(bars[state.name], completed=state.step, total=state.num_steps, text=str(state))
            if state.step >= state.num_steps:
                progress.remove_task(bars.pop(state.name))

        with listening(on_progress):
            yield


@contextmanager
def _stopping_on_request(console: Console) -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: it says so at once, training saves, and the exit code is 75."""

    def stop(number: int, frame: FrameType | None) -> None:
        console.print("stopping: a training finishes its step and saves", style="yellow", highlight=False)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(TypeError):
                signal.signal(number, handler)
