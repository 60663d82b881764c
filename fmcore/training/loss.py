"""Next-token loss in chunks of rows: the logits of a whole batch never exist.

The gradient is computed in the forward pass, chunk by chunk, while the chunk's logits are at hand (as in
Wijmans et al. 2024, arXiv 2411.09009, and Liger); memory is one chunk's logits instead of the batch's.
"""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from fmcore.model.build import decoder_of
from fmcore.tokens.samples import IGNORE

CHUNK_ROWS = 1024  # smaller ones make slower matrix products (benchmarks/README.md)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum over rows of cross-entropy / denominator, with gradients for hidden states and head."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, denominator: float
    ) -> torch.Tensor:
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        exact = torch.promote_types(hidden.dtype, torch.float32)  # bf16 products are added up in fp32
        # the head's gradient only where it is trained
        grad_head = torch.zeros_like(head, dtype=exact) if need_head else None
        total = hidden.new_zeros((), dtype=exact)
        # (R, V), used again for every chunk: fresh memory of this size costs more than the arithmetic; in fp32 one
        # buffer is logits, log-probabilities and gradient in turn
        logits = hidden.new_empty(min(CHUNK_ROWS, len(hidden)), len(head))
        log_probs = logits if exact == logits.dtype else torch.empty_like(logits, dtype=exact)
        numbers = torch.arange(len(logits), device=hidden.device)
        weight = head.to(hidden.dtype)
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows, targets = hidden[start : start + CHUNK_ROWS], labels[start : start + CHUNK_ROWS]
            torch.mm(rows, weight.T, out=logits[: len(rows)])
            torch.log_softmax(logits[: len(rows)], -1, exact, out=log_probs[: len(rows)])
            total -= log_probs[: len(rows)][numbers[: len(rows)], targets].sum()
            if not (need_hidden or need_head):
                continue
            grad = log_probs[: len(rows)].exp_()  # softmax, in place
            grad[numbers[: len(rows)], targets] -= 1.0
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + CHUNK_ROWS])
            if grad_head is not None:
                if grad_head.dtype == rows.dtype:
                    grad_head.addmm_(grad.T, rows)
                else:
                    grad_head += grad.T @ rows
        ctx.head_dtype = head.dtype
        ctx.save_for_backward(grad_hidden, grad_head, total.new_full((), 1.0 / denominator))
        return total / denominator

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        grad_hidden, grad_head, scale = ctx.saved_tensors
        scale = upstream * scale
        return (
            (grad_hidden * scale).to(grad_hidden.dtype) if grad_hidden is not None else None,
            (grad_head * scale).to(ctx.head_dtype) if grad_head is not None else None,
            None,
            None,
        )


class Micro(NamedTuple):
    """A micro-batch of (B, T) rows on the device.

    rows, targets: (N,) the positions in the loss, as numbers in the flattened (B, T), and their next tokens;
    found on the CPU, for on a GPU training would have to wait to know how many they are. documents: for an
    attention that wants to be told where documents begin.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    documents: dict[str, Any]


class StepModel(torch.nn.Module):
    """A decoder and its loss as one module, so that a sharded head is whole while the loss needs it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.varlen = False  # whether its attention wants to know where documents begin

    def forward(self, micro: Micro, denominator: float) -> torch.Tensor:
        """The loss of a micro-batch, see `chunked_loss`."""
        hidden = decoder_of(self.model)(
            input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False, **micro.documents
        ).last_hidden_state.flatten(0, 1)  # (B, T, D); no attention mask: with one, packed documents would leak
        if len(micro.rows) < len(hidden):
            hidden = hidden[micro.rows]
        return chunked_loss(hidden, self.model.get_output_embeddings().weight, micro.targets, denominator)


def chunked_loss(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, denominator: float) -> torch.Tensor:
    """Cross-entropy in nats, summed and divided by `denominator`.

    hidden: (N, D), of labelled positions. head: (V, D). targets: (N,) token ids. denominator: the labelled tokens
    of the global batch, so that accumulation over micro-batches and processes gives one mean.
    """
    return _ChunkedCrossEntropy.apply(hidden, head, targets, denominator)


def labelled(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) numbers of the positions in the loss of (B, T) labels, and (N,) their labels."""
    flat = labels.flatten()
    rows = (flat != IGNORE).nonzero()[:, 0]
    return rows, flat[rows]


def next_token_loss(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, denominator: float) -> torch.Tensor:
    """`chunked_loss` of (B, T, D) hidden states and (B, T) labels, the next token or -100."""
    rows, targets = labelled(labels)
    return chunked_loss(hidden.flatten(0, 1)[rows], head, targets, denominator)
