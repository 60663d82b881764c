"""`strata join`: takes part in a training that `strata run` does on another machine, in a home they share."""

import socket

from rich.console import Console

from deployments.environment import prepare_environment
from fmcore.artifacts.store import Store
from fmcore.errors import RecipeError
from fmcore.recipes.stages import LifecycleRecipe, Recipe
from fmcore.workspace import Workspace


def join_recipe(recipe: Recipe, console: Console) -> None:
    """Wait for the training, take part, and return when it is done. Raises Interrupted where it was stopped."""
    if isinstance(recipe, LifecycleRecipe):
        raise RecipeError(
            "a lifecycle trains several models one after another: join its stages, as recipes of their own"
        )
    if recipe.execution.nodes == 1:
        raise RecipeError("execution.nodes is 1: set nodes and rendezvous as in the recipe that the others run")
    from fmcore.planning.resolve import resolve_stage
    from fmcore.training.running import join_training

    workspace = Workspace.current()
    prepare_environment(workspace)
    store = Store(workspace.home)
    step = resolve_stage(recipe, workspace, store).steps.checkpoint
    log = workspace.home / "logs" / f"join-{socket.gethostname()}-{step.fingerprint[:8]}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)

    def show(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    join_training(step, recipe.execution, store, on_line=show, log=log)
    show(f"{step.name} is trained; evaluation and registration go on where it was begun")
