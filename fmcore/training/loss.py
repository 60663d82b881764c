"""Next-token loss in chunks of rows: the logits of a whole batch never exist.

The gradient is computed in the forward pass, chunk by chunk, while the chunk's logits are at hand (as in
Wijmans et al. 2024, arXiv 2411.09009, and Liger); memory is one chunk's logits instead of the batch's.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from fmcore.model.build import decoder_of
from fmcore.tokens.samples import IGNORE

CHUNK_ROWS = 512


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum over rows of cross-entropy / denominator, with gradients for hidden states and head."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, denominator: float
    ) -> torch.Tensor:
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_head = torch.zeros_like(head) if need_head else None  # the head's gradient only where it is trained
        total = hidden.new_zeros(())
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = hidden[rows] @ head.T  # (R, V)
            log_sum = logits.logsumexp(-1, keepdim=True)
            picked = logits.gather(-1, labels[rows, None])
            total += (log_sum - picked).sum()
            if not (need_hidden or need_head):
                continue
            grad = logits.sub_(log_sum).exp_()  # softmax, in place
            grad.scatter_add_(-1, labels[rows, None], torch.full_like(picked, -1.0))
            grad.div_(denominator)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ head
            if grad_head is not None:
                grad_head.addmm_(grad.T, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_head)
        return total / denominator

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            grad_hidden * upstream if grad_hidden is not None else None,
            grad_head * upstream if grad_head is not None else None,
            None,
            None,
        )


class StepModel(torch.nn.Module):
    """A decoder and its loss as one module, so that a sharded head is whole while the loss needs it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor, denominator: float
    ) -> torch.Tensor:
        """The loss of (B, T) rows, see `next_token_loss`."""
        hidden = decoder_of(self.model)(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state  # (B, T, D); no attention mask: with one, packed documents would leak
        return next_token_loss(hidden, self.model.get_output_embeddings().weight, labels, denominator)


def next_token_loss(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, denominator: float) -> torch.Tensor:
    """Cross-entropy in nats, summed over the labelled positions and divided by `denominator`.

    hidden: (B, T, D). head: (V, D). labels: (B, T), the next token or -100. denominator: the labelled tokens
    of the global batch, so that accumulation over micro-batches and processes gives one mean.
    """
    kept = labels != IGNORE
    return _ChunkedCrossEntropy.apply(hidden[kept], head, labels[kept], denominator)
