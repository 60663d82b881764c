"""Sizes for a recipe that has none yet, from the amount of data and the speed of the machine: `strata init`'s rules.

They aim at a first run of about five minutes; docs/commands.md has them in words.
"""

import os
from dataclasses import dataclass

from fmcore.artifacts.store import Store
from fmcore.data.holdout import MIN_HELDOUT
from fmcore.model.presets import PRESETS, estimate_parameters
from fmcore.planning.calibration import FLOPS_PER_CORE
from fmcore.planning.cost import BYTES_PER_TOKEN, nearest_training

BUDGET_S = 300.0
MAX_EPOCHS = 4  # repeated so often, data is nearly as good as new (Muennighoff et al. 2023, arXiv 2305.16264)
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, arXiv 2203.15556
VOCABULARIES = ((500e3, 1024), (5e6, 2048), (50e6, 4096), (500e6, 8192), (5e9, 16384), (float("inf"), 32768))
# preset -> context, tokens of a full batch, peak learning rate
SETTINGS = {
    "tiny": (256, 8192, 2e-3), "small": (512, 32768, 1e-3), "125m": (1024, 131072, 6e-4), "1b": (2048, 524288, 3e-4),
}  # fmt: skip
MIN_STEPS = 400  # smaller batches rather than fewer steps
SEQUENCES_PER_BATCH = 4  # at the least
HOLDOUTS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
GOOD_HELDOUT = 20  # what the gate needs to decide (gate.min_documents)
LARGEST_GOOD = 0.3  # rather ten held out than half of the data


@dataclass(frozen=True)
class PretrainSizes:
    """What a pretrain recipe says of sizes. epochs: about, at `tokens`."""

    vocab_size: int
    preset: str
    seq_len: int
    batch_tokens: int
    lr: float
    tokens: int
    epochs: float


def usual_rate(parameters: int, store: Store) -> float:
    """FLOP/s of training here: as earlier trainings reached, else 35 GFLOP/s per core, as two cores with AVX2 did.

    Counted as these rules count, 6 per parameter and token. Not measured on the spot, as the plan does: a machine
    that is busy just now would get a smaller recipe.
    """
    if earlier := nearest_training(parameters, store):
        return 6.0 * earlier.num_parameters * earlier.num_tokens / earlier.train_seconds
    return FLOPS_PER_CORE * (os.cpu_count() or 1)


def pretrain_sizes(num_bytes: int, flops_rate: float) -> PretrainSizes:
    """Sizes for so many bytes of text on a machine that trains at `flops_rate` FLOP/s.

    The vocabulary grows with the text. The model is the largest preset that can be given 20 tokens per
    parameter, within four passes over the data and five minutes; `tiny` where none can. Tokens: what five
    minutes hold, and no more than four passes.
    """
    vocab_size = next(size for limit, size in VOCABULARIES if num_bytes <= limit)
    data_tokens = num_bytes / BYTES_PER_TOKEN
    chosen = "tiny"
    for preset in PRESETS:
        parameters = estimate_parameters(PRESETS[preset], vocab_size)
        wanted = TOKENS_PER_PARAMETER * parameters
        if wanted <= MAX_EPOCHS * data_tokens and 6 * parameters * wanted <= BUDGET_S * flops_rate:
            chosen = preset
    parameters = estimate_parameters(PRESETS[chosen], vocab_size)
    seq_len, full_batch, lr = SETTINGS[chosen]
    tokens = rounded(min(BUDGET_S * flops_rate / (6 * parameters), MAX_EPOCHS * data_tokens))
    batch_tokens = batch_for(tokens, seq_len, full_batch)
    tokens = max(tokens, batch_tokens)
    return PretrainSizes(vocab_size, chosen, seq_len, batch_tokens, lr, tokens, tokens / max(1.0, data_tokens))


def batch_for(tokens: int, seq_len: int, full_batch: int) -> int:
    """Tokens of a step: a power of two times the context, for at least 400 steps where the tokens allow it."""
    batch = full_batch
    while batch > SEQUENCES_PER_BATCH * seq_len and tokens < MIN_STEPS * batch:
        batch //= 2
    return batch


def rounded(tokens: float) -> int:
    """Two significant digits, downwards; at least 1,000."""
    unit = int(10 ** max(0, len(str(int(tokens))) - 2))
    return max(1000, int(tokens) // unit * unit)


def holdout_for(places: list[float], scale: float, smallest: float) -> float | None:
    """The smallest usual fraction that holds out 20 documents; else the one that holds out at least 10, or None.

    places: where each document falls in [0, 1); scale: how many times as many there are.
    """
    num = {f: sum(place < f for place in places) for f in HOLDOUTS if f >= smallest}
    good = [f for f, held_out in num.items() if held_out * scale >= GOOD_HELDOUT and f <= LARGEST_GOOD]
    enough = [f for f, held_out in num.items() if held_out * scale >= MIN_HELDOUT and held_out < len(places)]
    return next(iter([*good, *enough]), None)
