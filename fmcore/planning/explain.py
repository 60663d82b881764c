"""`strata plan`: hit or miss for each step, which field makes a miss, and what is to be expected of the gate."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fmcore.artifacts.files import read_json
from fmcore.artifacts.step import Step
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import ARTIFACT_TYPES, Artifact, Checkpoint, Documents, RegisteredModel
from fmcore.planning.steps import StageSteps
from fmcore.recipes.stages import StageRecipe

STEP_NAMES = {
    "documents": "prepare",
    "shards": "tokenize",
    "checkpoint": "train",
    "report": "evaluate",
    "model": "register",
}


@dataclass(frozen=True)
class PlannedStep:
    """task: its name in the run graph. done: the artifact is there. because: why it is not."""

    task: str
    step: Step
    done: bool
    because: str


def plan_steps(steps: StageSteps, store: Store) -> list[PlannedStep]:
    """Each step of a stage, done or not, and for a miss the field that differs and its upstream cause."""
    planned = _plan_import(steps, store)
    for step in steps:
        cls = ARTIFACT_TYPES[step.kind]
        done = store.find(step, cls) is not None
        because = "" if done else explain_miss(step, list(store.all(cls)), planned)
        planned.append(PlannedStep(STEP_NAMES[step.kind], step, done, because))
    return planned


def _plan_import(steps: StageSteps, store: Store) -> list[PlannedStep]:
    """One line for a parent from outside: done when its checkpoint and its version both are."""
    if not steps.imported:
        return []
    checkpoint, version = steps.imported
    done = store.find(checkpoint, Checkpoint) is not None and store.find(version, RegisteredModel) is not None
    return [PlannedStep("import", checkpoint, done, "" if done else f"{version.name} is not imported yet")]


def explain_miss(step: Step, others: list[Artifact], before: list[PlannedStep]) -> str:
    """Why a step is a miss: the fields that differ from the nearest artifact, or the step upstream."""
    alike = [other for other in others if _is_alike(other, step) and _is_related(other, step)]
    if not alike:
        return f"no {step.kind} {'of this kind ' if others else ''}yet"
    nearest = min(alike, key=lambda other: (len(list(_differences(other, step))), other.name != step.name))
    changed = list(_differences(nearest, step))
    own = [text for role, text in changed if role is None]
    if own:
        more = f" (and {len(own) - 3} more)" if len(own) > 3 else ""
        return f"{'; '.join(own[:3])}{more}, compared with {nearest.name}-{nearest.short}"
    upstream = [p for p in before if not p.done and p.step.kind in {role for role, _ in changed}]
    if upstream:
        return f"{upstream[0].task} will run"
    if any(role == "parent" for role, _ in changed):
        imports = [p for p in before if p.task == "import" and not p.done]
        return "import will run" if imports else "another parent"
    return (
        "the code of this step has changed"
        if not changed
        else f"other {', '.join(sorted({r for r, _ in changed if r}))}"
    )


def _is_alike(other: Artifact, step: Step) -> bool:
    """Whether comparing settings says anything: records have hardly a setting in common with texts."""
    old, new = other.config.keys(), step.config.keys()
    return 2 * len(old & new) > len(old | new)


def _is_related(other: Artifact, step: Step) -> bool:
    """Whether it is of the same recipe, or made of something that this step is made of, a common parent apart."""
    own = step.parents.items() - {("parent", step.parents.get("parent"))}
    return other.name == step.name or bool(own & other.parents.items())


def _differences(other: Artifact, step: Step) -> Iterator[tuple[str | None, str]]:
    """(None, field: old -> new) for each setting that differs, (role, "") for each parent that does."""
    old, new = dict(_flat(other.config)), dict(_flat(step.config))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield None, f"{name}: {_short(old.get(name))} -> {_short(new.get(name))}"
    for role in sorted(other.parents.keys() | step.parents.keys()):
        if other.parents.get(role) != step.parents.get(role):
            yield role, ""


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _flat(child, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _flat(child, f"{prefix}.{index}")
    else:
        yield prefix, value


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 20 else f"{text[:8]}..."


def has_nothing_new(steps: StageSteps, store: Store) -> bool:
    """Whether the documents are there already, and none of them is left to train on."""
    documents = store.find(steps.documents, Documents)
    return documents is not None and documents.num_train == 0


def small_holdouts(recipe: StageRecipe, steps: StageSteps, store: Store) -> Iterator[str]:
    """A sentence for each held-out set, of documents that are there already, on which the gate cannot decide."""
    documents = store.find(steps.documents, Documents)
    if documents is None:
        return
    text = documents.form == "text"
    limit = recipe.evaluate.max_documents if text else recipe.evaluate.max_examples
    needed = recipe.gate.min_documents
    for name, num in sorted(documents.counts["heldout"].items()):
        if 0 < min(num, limit) < needed:
            setting = (
                ("holdout" if text else "the task's holdout")
                if num < needed
                else (f"evaluate.max_{'documents' if text else 'examples'}")
            )
            yield (
                f"{name}: {min(num, limit)} held-out {'documents' if text else 'examples'} will be scored, and the "
                f"gate decides nothing on fewer than {needed} (gate.min_documents); raise {setting}"
            )


def resume_note(steps: StageSteps, store: Store) -> str:
    """Where an interrupted training would go on, or nothing."""
    partial = store.path_for(steps.checkpoint)
    pointer = partial.with_name(partial.name + ".partial") / "latest" / "pointer.json"
    if not pointer.exists():
        return ""
    try:
        step = int(read_json(pointer)["folder"].split("-")[1])  # step-00000123, after going back step-00000123-1
    except (ValueError, LookupError, TypeError, AttributeError):  # damaged, which training does without
        return "resumes from its newest state that is whole"
    return f"resumes after step {step:,}"
