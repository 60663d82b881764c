"""What the training process will need at its peak, in bytes; how it compares with measurements is in docs/commands.md.

    peak = base + weights + gradients + moments + copies + activations + logits

in fp32: 4 bytes per parameter of weights; per trained one 4 of gradients, 8 of AdamW's two moments, and 12 of the
copy that is saved, which is kept for the next save. Activations are those of one micro-batch.
"""

from dataclasses import dataclass

from fmcore.planning.shape import Shape, block_sizes
from fmcore.training.workload import MICRO_TOKENS

FLOAT_BYTES = 4
BASE_BYTES = 530e6  # Python with torch (CPU), transformers and peft, the tokenizer, the trial of model and machine
COPIED_BYTES = 12  # per trained parameter: 4 of the weights and 8 of the moments
# floats of a Llama-like block per token, of the width and of the inner width: what the backward pass needs, and
# what the allocator keeps besides; fitted to benchmarks/training_memory.py. The mask takes seq_len more
WIDTHS_PER_LAYER = 20
INNERS_PER_LAYER = 6.5
# widths outside the blocks, per token: embedding, last norm, hidden states and their gradient
WIDTHS_OUTSIDE = 6
LOGITS_ROWS = 1024  # that exist at once, as logits and as their gradient in turn (fmcore.training.loss)


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for."""

    base: float
    weights: float
    gradients: float
    moments: float
    copies: float
    activations: float
    logits: float

    @property
    def peak(self) -> float:
        """Resident bytes at the most."""
        return float(sum(vars(self).values()))


def estimate_memory(shape: Shape, trainable: int, *, micro_batch: int) -> Memory:
    """Memory of training `shape` in fp32. trainable: parameters trained; micro_batch: sequences, 0 = chosen."""
    width, layers, inner, shared = block_sizes(shape.fields)
    tokens = micro_batch_of(shape, micro_batch) * shape.seq_len
    per_layer = (WIDTHS_PER_LAYER - 4 * (1 - shared)) * width + INNERS_PER_LAYER * inner + shape.seq_len
    head_gradient = shape.vocab_size * width if trainable >= shape.parameters else 0
    return Memory(
        base=BASE_BYTES,
        weights=FLOAT_BYTES * shape.parameters,
        gradients=FLOAT_BYTES * trainable,
        moments=2 * FLOAT_BYTES * trainable,
        copies=COPIED_BYTES * trainable,
        activations=FLOAT_BYTES * tokens * (layers * per_layer + WIDTHS_OUTSIDE * width),
        logits=FLOAT_BYTES * (LOGITS_ROWS * shape.vocab_size + head_gradient),
    )


def micro_batch_of(shape: Shape, micro_batch: int, device: str = "cpu") -> int:
    """Sequences of a forward pass. micro_batch: as the recipe says, 0 = chosen; device: cpu or cuda."""
    return min(rows_of(shape), micro_batch or max(1, MICRO_TOKENS[device] // shape.seq_len))


def rows_of(shape: Shape) -> int:
    """Sequences of an optimizer step."""
    return max(1, shape.batch_tokens // shape.seq_len)
