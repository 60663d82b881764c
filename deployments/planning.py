"""`strata plan`: the steps of a recipe and what is to be done, as a table."""

from rich.console import Console
from rich.table import Table

from deployments.environment import prepare_environment
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import RegisteredModel
from fmcore.planning.steps import ParentRef, StageSteps, stage_steps
from fmcore.recipes.stages import LifecycleRecipe, Recipe, StageRecipe
from fmcore.workspace import Workspace


def print_plan(recipe: Recipe, console: Console) -> None:
    """One table per stage; builds nothing and starts nothing."""
    workspace = Workspace.current()
    prepare_environment(workspace)
    store = Store(workspace.home)
    if isinstance(recipe, LifecycleRecipe):
        _print_lifecycle(recipe, store, console)
    else:
        _print_stage(recipe, workspace, store, console)


def _print_stage(recipe: StageRecipe, workspace: Workspace, store: Store, console: Console) -> None:
    from fmcore.model.outside import NotDownloadedError
    from fmcore.planning.resolve import resolve_stage

    try:
        resolved = resolve_stage(recipe, workspace, store)
    except NotDownloadedError as error:
        console.print(str(error), highlight=False, markup=False, soft_wrap=True)
        return
    _print_steps(resolved.recipe, resolved.steps, resolved.parent, store, console)


def _print_lifecycle(recipe: LifecycleRecipe, store: Store, console: Console) -> None:
    """Stages whose parent does not exist yet are planned on the fingerprint it will have."""

    def show(stage: StageRecipe, parent: ParentRef | None) -> StageSteps:
        steps = stage_steps(stage, parent, store.digests)
        found = store.find_fingerprint(parent.fingerprint, RegisteredModel) if parent else None
        _print_steps(stage, steps, found, store, console)
        return steps

    base = show(recipe.pretrain_recipe(), None).made
    show(recipe.finetune_recipe(parent=base.model), base)
    newer = show(recipe.continue_recipe(parent=base.model), base).made
    show(recipe.finetune_recipe(parent=newer.model), newer)


def _print_steps(
    recipe: StageRecipe, steps: StageSteps, parent: RegisteredModel | None, store: Store, console: Console
) -> None:
    from fmcore.planning.explain import estimate_cost, plan_steps, resume_note

    on = f" on {parent.uri}" if parent else ""
    table = Table("step", "artifact", "", "because", title=f"{recipe.kind} {recipe.name}{on}", title_justify="left")
    planned = plan_steps(steps, store)
    for item in planned:
        name = f"{item.step.name}-{item.step.fingerprint[:8]}"
        table.add_row(item.task, name, "[green]hit[/]" if item.done else "[yellow]miss[/]", item.because)
    console.print(table)
    if not next(item for item in planned if item.task == "train").done:
        cost = estimate_cost(recipe, steps, parent, store)
        minutes, seconds = divmod(round(cost.seconds), 60)
        parameters = f"{cost.parameters:,} parameters, " if cost.parameters else ""
        console.print(
            f"train: {cost.tokens:,} tokens, {cost.epochs:.2f} epochs, {parameters}{cost.flops:.2e} FLOPs, "
            f"about {minutes}:{seconds:02d} ({cost.basis}) {resume_note(steps, store)}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
