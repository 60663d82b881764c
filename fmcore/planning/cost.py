"""What a training will take: tokens, FLOPs, time and memory.

Tokens and epochs are exact where the shards exist. Time and memory are measured, on an earlier training of the same
kind or a few steps (`fmcore.planning.calibration`), else worked out by formulas, which docs/commands.md compares with
measurements.
"""

import time
from dataclasses import dataclass
from math import ceil

import numpy as np

from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Checkpoint, Documents, TokenShards
from fmcore.data.detect import about_chars
from fmcore.data.sources import source_files
from fmcore.planning.calibration import MIN_TRAIN_S, Calibrator, NotCalibrated, StepCost
from fmcore.planning.memory import Memory, estimate_memory
from fmcore.planning.shape import Shape, adapter_parameters, flops_per_token, shape_of, trainable_parameters
from fmcore.planning.steps import StageSteps
from fmcore.recipes.fields import TextData
from fmcore.recipes.stages import ContinueRecipe, FinetuneRecipe, StageRecipe

BYTES_PER_TOKEN = 3.3  # English text at a vocabulary of 4,096; only until the shards exist
GEMM_SHARE = 0.5  # of a measured matrix product's rate that a small model's training reaches
STATE_BYTES = 12  # per trained parameter of a saved state: the weight and two moments, fp32
SAVE_BYTES_PER_S = 100e6  # written, flushed, and read back to be verified


@dataclass(frozen=True)
class Cost:
    """What a training takes. tokens: positions fed; epochs: passes over its own tokens; seconds: of its steps, about.

    parameters: of the whole model, adapters included, 0 where the parent is not known here. peak_bytes: of memory;
    memory: what it is for, None where it was measured as a whole, and measured says how. save_seconds: of one saved
    state. basis: where all of it is from.
    """

    tokens: int
    epochs: float
    parameters: int
    flops: float
    seconds: float
    num_steps: int
    save_seconds: float
    peak_bytes: float
    memory: Memory | None
    basis: str
    measured: str = ""

    @property
    def stop_seconds(self) -> float:
        """How long a training that is asked to stop takes at the most: to end its step, and to save."""
        return self.seconds / max(1, self.num_steps) + self.save_seconds


def estimate_cost(
    recipe: StageRecipe, steps: StageSteps, parent: Shape | None, store: Store, calibrator: Calibrator | None = None
) -> Cost:
    """Tokens, epochs, time and memory of the training, exact where the shards exist, else from the sources' bytes.

    parent: the parent's shape, known or to come; without it, what follows from the tokens alone. calibrator: finds
    or measures what a step takes; without it the formulas say.
    """
    shards = store.find(steps.shards, TokenShards)
    own = sum(shards.num_tokens.values()) if shards else _guess_tokens(recipe, steps, store)
    tokens, epochs = _amount(recipe, own)
    counted = "tokens counted" if shards else "tokens guessed from bytes"
    shape = shape_of(recipe, parent, shards.vocab_size if shards else 0)
    if shape is None:
        return Cost(tokens, epochs, 0, 0.0, 0.0, 0, 0.0, 0.0, None, f"its parent is not known here; {counted}")
    memory = estimate_memory(shape, trainable_parameters(recipe, shape), micro_batch=recipe.execution.micro_batch)
    step = _step_cost(recipe, shape, memory, store, calibrator)
    return Cost(
        tokens, epochs, step.parameters, step.flops * tokens, step.seconds * tokens, ceil(tokens / shape.batch_tokens),
        STATE_BYTES * step.trained / SAVE_BYTES_PER_S, step.peak_bytes, None if step.measured else memory,
        f"{step.basis}; {counted}", step.measured,
    )  # fmt: skip


def _step_cost(
    recipe: StageRecipe, shape: Shape, memory: Memory, store: Store, calibrator: Calibrator | None
) -> StepCost:
    """What a token takes, as measured if it can be."""
    why = ""
    if calibrator:
        try:
            return calibrator.measure(recipe, shape, memory.peak)
        except NotCalibrated as error:
            why = f", not calibrated: {error}"
    trained = trainable_parameters(recipe, shape)
    flops = flops_per_token(shape, trained)
    rate, basis = flops_rate(shape.parameters, store)
    parameters = shape.parameters + adapter_parameters(shape, trained)
    return StepCost(flops / rate, flops, parameters, trained, memory.peak, basis + why)


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
    if earlier := nearest_training(parameters, store):
        return flops_reached(earlier), f"at the rate of {earlier.name}-{earlier.short}"
    return GEMM_SHARE * measure_gemm(), "at half the rate of a matrix product here"


def nearest_training(parameters: int, store: Store) -> Checkpoint | None:
    """The earlier training in this home, of all weights, that is nearest in size."""
    earlier = [c for c in store.all(Checkpoint) if c.method == "full" and c.train_seconds > MIN_TRAIN_S and c.figures]
    return min(earlier, key=lambda c: abs(np.log(c.num_parameters / max(1, parameters))), default=None)


def flops_reached(checkpoint: Checkpoint) -> float:
    """FLOP/s of a training, by the formula of its figures."""
    return checkpoint.figures["mfu"] * checkpoint.figures["peak_flops"]


def measure_gemm(size: int = 768, repeats: int = 20) -> float:
    """FLOP/s of an fp32 matrix product, the best of a few, for other work slows some."""
    left = np.ones((size, size), dtype=np.float32)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - start)
    return float(2 * size**3 / best)
