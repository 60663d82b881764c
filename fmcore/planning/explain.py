"""`strata plan`: hit or miss for each step, which field makes a miss, and what the training will cost.

Tokens and epochs are exact where the shards exist; time and memory are estimates, which docs/commands.md
compares with measurements.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from fmcore.artifacts.files import read_json
from fmcore.artifacts.step import Step
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import (
    ARTIFACT_TYPES,
    Artifact,
    Checkpoint,
    Documents,
    RegisteredModel,
    TokenShards,
)
from fmcore.data.detect import about_chars
from fmcore.data.sources import source_files
from fmcore.planning.memory import Memory, estimate_memory
from fmcore.planning.shape import Shape, shape_of, trainable_parameters
from fmcore.planning.steps import StageSteps
from fmcore.recipes.fields import TextData
from fmcore.recipes.stages import ContinueRecipe, FinetuneRecipe, StageRecipe

BYTES_PER_TOKEN = 3.3  # English text at a vocabulary of 4,096; only until the shards exist
GEMM_SHARE = 0.5  # of a measured matrix product's rate that a small model's training reaches
STATE_BYTES = 12  # per trained parameter of a saved state: the weight and two moments, fp32
SAVE_BYTES_PER_S = 100e6  # written, flushed, and read back to be verified
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


@dataclass(frozen=True)
class Cost:
    """What a training takes. tokens: positions fed; epochs: passes over its own tokens; seconds: about.

    parameters, memory: 0 and None where the parent is not known here. save_seconds: of one saved state.
    """

    tokens: int
    epochs: float
    parameters: int
    flops: float
    seconds: float
    num_steps: int
    save_seconds: float
    memory: Memory | None
    basis: str

    @property
    def stop_seconds(self) -> float:
        """How long a training that is asked to stop takes at the most: to end its step, and to save."""
        return self.seconds / max(1, self.num_steps) + self.save_seconds


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
    alike = [other for other in others if _is_alike(other, step)]
    if not alike:
        return f"no {step.kind} {'of this form ' if others else ''}yet"
    nearest = min(alike, key=lambda other: len(list(_differences(other, step))))
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


def estimate_cost(recipe: StageRecipe, steps: StageSteps, parent: Shape | None, store: Store) -> Cost:
    """Tokens, epochs, time and memory of the training, exact where the shards exist, else from the sources' bytes.

    parent: the parent's shape, known or to come; without it, what follows from the tokens alone.
    """
    shards = store.find(steps.shards, TokenShards)
    own = sum(shards.num_tokens.values()) if shards else _guess_tokens(recipe, steps, store)
    tokens, epochs = _amount(recipe, own)
    counted = "tokens counted" if shards else "tokens guessed from bytes"
    shape = shape_of(recipe, parent, shards.vocab_size if shards else 0)
    if shape is None:
        return Cost(tokens, epochs, 0, 0.0, 0.0, 0, 0.0, None, f"its parent is not known here; {counted}")
    trained = trainable_parameters(recipe, shape)
    flops = (4.0 * shape.parameters + 2.0 * trained) * tokens
    rate, basis = flops_rate(shape.parameters, store)
    return Cost(
        tokens, epochs, shape.parameters, flops, flops / rate, ceil(tokens / shape.batch_tokens),
        STATE_BYTES * trained / SAVE_BYTES_PER_S,
        estimate_memory(shape, trained, micro_batch=recipe.execution.micro_batch), f"{basis}; {counted}",
    )  # fmt: skip


def _amount(recipe: StageRecipe, own: int) -> tuple[int, float]:
    """(tokens, epochs) of a training on `own` tokens, replay counted in the first alone."""
    train = recipe.train
    share = 1 - recipe.replay.fraction if isinstance(recipe, ContinueRecipe) else 1.0
    if train.tokens:
        return train.tokens, train.tokens * share / max(1, own)
    epochs = train.epochs or (2 if isinstance(recipe, FinetuneRecipe) else 1)
    return int(epochs * own / share), epochs


def _guess_tokens(recipe: StageRecipe, steps: StageSteps, store: Store) -> int:
    documents = store.find(steps.documents, Documents)
    if documents and "train_bytes" in documents.counts:
        return int(sum(documents.counts["train_bytes"].values()) / BYTES_PER_TOKEN)
    sources = recipe.data.sources if isinstance(recipe.data, TextData) else recipe.data.tasks
    files = [file for source in sources for file in source_files(source)]
    return int(about_chars(files) / BYTES_PER_TOKEN)


def flops_rate(parameters: int, store: Store) -> tuple[float, str]:
    """FLOP/s of training here: as the nearest earlier training reached, else from a matrix product."""
    if earlier := earlier_rate(parameters, store):
        return earlier
    return GEMM_SHARE * measure_gemm(), "at half the rate of a matrix product here"


def earlier_rate(parameters: int, store: Store) -> tuple[float, str] | None:
    """FLOP/s that the nearest earlier training in this home reached, and which that was."""
    earlier = [c for c in store.all(Checkpoint) if c.method == "full" and c.train_seconds > 5]
    if not earlier:
        return None
    nearest = min(earlier, key=lambda c: abs(np.log(c.num_parameters / max(1, parameters))))
    rate = 6.0 * nearest.num_parameters * nearest.num_tokens / nearest.train_seconds
    return rate, f"at the rate of {nearest.name}-{nearest.short}"


def measure_gemm(size: int = 768, repeats: int = 5) -> float:
    """FLOP/s of an fp32 matrix product, the best of a few."""
    left = np.ones((size, size), dtype=np.float32)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - start)
    return float(2 * size**3 / best)


def resume_note(steps: StageSteps, store: Store) -> str:
    """Where an interrupted training would go on, or nothing."""
    partial = store.path_for(steps.checkpoint)
    pointer = partial.with_name(partial.name + ".partial") / "latest" / "pointer.json"
    if not pointer.exists():
        return ""
    return f"resumes after step {int(read_json(pointer)['folder'].removeprefix('step-')):,}"
