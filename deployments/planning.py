"""`strata plan`: the steps of a recipe, what is to be done, and what that takes; as tables or as JSON."""

import json
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.table import Table

from deployments.environment import prepare_environment
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import RegisteredModel
from fmcore.data.sources import left_out_notes
from fmcore.planning.calibration import Calibrator
from fmcore.planning.cost import Cost, estimate_cost
from fmcore.planning.explain import PlannedStep, has_nothing_new, plan_steps, resume_note, small_holdouts
from fmcore.planning.shape import Shape, parent_shape, shape_of
from fmcore.planning.steps import ParentRef, StageSteps, stage_steps
from fmcore.recipes.stages import LifecycleRecipe, Recipe, StageRecipe
from fmcore.workspace import Workspace


@dataclass(frozen=True)
class StagePlan:
    """One stage. parent: `name/version` where it exists; cost: of the training, None where it is done already.

    warnings: what to expect of the gate.
    """

    recipe: StageRecipe
    parent: str
    steps: list[PlannedStep]
    nothing_new: bool
    cost: Cost | None
    resumes: str
    warnings: list[str]


def print_plan(recipe: Recipe, console: Console, *, as_json: bool = False, calibrate: bool = False) -> None:
    """One table per stage, and totals where there are several; builds nothing.

    calibrate: take a few steps of what is to be trained, where nothing in this home says what they take.
    """
    stages = plan_recipe(recipe, calibrate=calibrate)
    if as_json:
        console.print_json(json.dumps({"stages": [_as_json(stage) for stage in stages], **_totals(stages)}))
    else:
        print_stages(stages, console)


def print_stages(stages: list[StagePlan], console: Console) -> None:
    """The tables and totals of a plan that is made."""
    for stage in stages:
        _print_stage(stage, console)
    if len(stages) > 1:
        total = _totals(stages)
        console.print(
            f"in all: {total['tokens']:,} tokens, {total['flops']:.2e} FLOPs, about {_clock(total['seconds'])}, "
            f"memory up to {shown_bytes(total['memory_bytes'])}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if note := _refusals(stages):
        console.print(note, highlight=False, soft_wrap=True)


def plan_recipe(recipe: Recipe, *, calibrate: bool = False) -> list[StagePlan]:
    """The stages of a recipe in this home. Raises what resolving a recipe raises."""
    workspace = Workspace.current()
    prepare_environment(workspace)
    store = Store(workspace.home)
    calibrator = Calibrator(store, _say) if calibrate else None
    if isinstance(recipe, LifecycleRecipe):
        return _plan_lifecycle(recipe, store, calibrator)
    from fmcore.planning.resolve import resolve_stage

    resolved = resolve_stage(recipe, workspace, store)
    above = parent_shape(resolved.outside, resolved.parent, store)
    return [_plan_stage(resolved.recipe, resolved.steps, resolved.parent, above, store, calibrator)]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # what is printed with --json stays JSON


def _plan_lifecycle(recipe: LifecycleRecipe, store: Store, calibrator: Calibrator | None) -> list[StagePlan]:
    """Stages whose parent does not exist yet are planned on the fingerprint and the shape it will have."""
    plans: list[StagePlan] = []

    def add(stage: StageRecipe, parent: ParentRef | None, shape: Shape | None) -> tuple[ParentRef, Shape | None]:
        steps = stage_steps(stage, parent, store.digests)
        found = store.find_fingerprint(parent.fingerprint, RegisteredModel) if parent else None
        plans.append(_plan_stage(stage, steps, found, shape, store, calibrator))
        return steps.made, shape_of(stage, shape)

    base, shape = add(recipe.pretrain_recipe(), None, None)
    add(recipe.finetune_recipe(parent=base.model), base, shape)
    newer, shape = add(recipe.continue_recipe(parent=base.model), base, shape)
    add(recipe.finetune_recipe(parent=newer.model), newer, shape)
    return plans


def _plan_stage(
    recipe: StageRecipe, steps: StageSteps, parent: RegisteredModel | None, above: Shape | None, store: Store,
    calibrator: Calibrator | None,
) -> StagePlan:  # fmt: skip
    planned = plan_steps(steps, store)
    trained = next(item.done for item in planned if item.task == "train")
    nothing_new = has_nothing_new(steps, store)
    cost = None if trained or nothing_new else estimate_cost(recipe, steps, above, store, calibrator)
    judged = nothing_new or all(item.done for item in planned)
    return StagePlan(
        recipe, parent.uri if parent else "", planned, nothing_new, cost, resume_note(steps, store) if cost else "",
        [] if judged else list(small_holdouts(recipe, steps, store)),
    )  # fmt: skip


def _print_stage(stage: StagePlan, console: Console) -> None:
    recipe = stage.recipe
    on = f" on {stage.parent}" if stage.parent else ""
    table = Table("step", "artifact", "", "because", title=f"{recipe.kind} {recipe.name}{on}", title_justify="left")
    for item in stage.steps:
        name = f"{item.step.name}-{item.step.fingerprint[:8]}"
        table.add_row(item.task, name, "[green]hit[/]" if item.done else "[yellow]miss[/]", item.because)
    console.print(table)
    for line in (*left_out_notes(recipe.data), *_notes(stage)):
        console.print(line, highlight=False, soft_wrap=True)


def _notes(stage: StagePlan) -> list[str]:
    if stage.nothing_new:
        return ["nothing new: the parent's weights have seen every document of the sources"]
    return [*_cost_notes(stage), *(f"WARNING: {warning}" for warning in stage.warnings)]


def _cost_notes(stage: StagePlan) -> list[str]:
    cost = stage.cost
    if cost is None:
        return []
    tokens = f"train: {cost.tokens:,} tokens, {cost.epochs:.2f} epochs"
    if not cost.parameters:
        return [f"{tokens} ({cost.basis})"]
    grace = stage.recipe.execution.grace_s
    clock = _clock(cost.seconds)
    late = (
        f"a step and a save are foretold to take {cost.stop_seconds:.0f} s, more than execution.grace_s ({grace:g}): "
        f"a run that is stopped goes on from its last save; raise grace_s, or make batches smaller"
    )
    return [
        f"{tokens}, {cost.parameters:,} parameters, {cost.flops:.2e} FLOPs, about {clock} ({cost.basis})",
        f"memory: about {shown_bytes(cost.peak_bytes)} ({_parts(cost)})",
        *([f"{stage.resumes}"] if stage.resumes else []),
        *([late] if cost.stop_seconds > grace else []),
    ]


def _parts(cost: Cost) -> str:
    if cost.memory is None:
        return cost.measured
    parts = {
        "torch itself": cost.memory.base,
        "weights, gradients and moments": cost.memory.weights + cost.memory.gradients + cost.memory.moments,
        "copies of them": cost.memory.copies,
        "activations": cost.memory.activations,
        "logits": cost.memory.logits,
    }
    return ", ".join(f"{name} {shown_bytes(value)}" for name, value in parts.items())


def shown_bytes(value: float) -> str:
    """A number of bytes for people."""
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def _refusals(stages: list[StagePlan]) -> str:
    """What the plan of several stages takes for granted, while a base that others start from is still to be judged."""
    judged = all(stage.steps[-1].done for stage in stages if stage.recipe.kind != "finetune")
    if len(stages) == 1 or judged:
        return ""
    return "foretold as if the gate lets every base through: the lifecycle ends at a base that it holds or refuses"


def _clock(seconds: float) -> str:
    """minutes:seconds, and what that is in hours where it is many."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 100 else str(timedelta(seconds=round(seconds)))


def _totals(stages: list[StagePlan]) -> dict[str, Any]:
    costs = [stage.cost for stage in stages if stage.cost]
    return {
        "tokens": sum(cost.tokens for cost in costs),
        "flops": sum(cost.flops for cost in costs),
        "seconds": sum(cost.seconds for cost in costs),
        "memory_bytes": max((cost.peak_bytes for cost in costs), default=0.0),
    }


def _as_json(stage: StagePlan) -> dict[str, Any]:
    cost = stage.cost
    train = cost and {
        "tokens": cost.tokens, "epochs": cost.epochs, "parameters": cost.parameters, "flops": cost.flops,
        "seconds": cost.seconds, "steps": cost.num_steps, "stop_seconds": cost.stop_seconds,
        "memory_bytes": cost.peak_bytes, "basis": cost.basis, "resumes": stage.resumes,
    }  # fmt: skip
    return {
        "kind": stage.recipe.kind, "name": stage.recipe.name, "parent": stage.parent,
        "steps": [
            {
                "task": item.task, "artifact": f"{item.step.name}-{item.step.fingerprint[:8]}",
                "fingerprint": item.step.fingerprint, "hit": item.done, "because": item.because,
            }
            for item in stage.steps
        ],
        "nothing_new": stage.nothing_new, "train": train, "warnings": stage.warnings,
    }  # fmt: skip
