"""Attention over packed documents without a mask, by torch's variable-length kernel, where a GPU has it.

A mask costs memory and time that grow with the square of the row, and transformers waits for the GPU to find out
whether it needs one. The kernel is told where documents begin instead. It is taken only after a trial on the device
itself has given what masked attention gives; else the mask stays.
"""

import inspect
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from fmcore.model.build import ATTENTION, decoder_of

VARLEN = "strata_varlen"  # a name that transformers makes no mask for
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")  # as configs name it
NEEDED = {"scale", "window_size", "enable_gqa"}  # which the first versions of the kernel lacked
PADDED_TO = 256  # boundaries, so that their number seldom changes, for which layers would be compiled again
TRIED_TOKENS = 64
TOLERANCE = 0.05  # of the largest value, in bf16


def varlen_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, *, scaling: float, boundaries: torch.Tensor, longest: int,
    dropout: float = 0.0, sliding_window: int | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """As transformers calls it: (B, H, T, D) in, (B, T, H, D) out; causal within each document.

    boundaries, longest: see `document_boundaries`.
    """
    if dropout:
        raise NotImplementedError("torch's variable-length kernel has no dropout")
    rows, heads = query.shape[:2]
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in fp32
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))  # (B*T, H, D)
    window = (sliding_window - 1 if sliding_window else -1, 0)
    mixed: Any = varlen_attn(
        query, key, value, boundaries, boundaries, longest, longest, scale=scaling, window_size=window,
        enable_gqa=heads != key.shape[1],
    )  # fmt: skip
    return mixed.unflatten(0, (rows, -1)), None


AttentionInterface.register(VARLEN, varlen_attention)


def document_boundaries(position_ids: torch.Tensor) -> dict[str, Any]:
    """Where documents begin in (B, T) rows, as the kernel wants it: int32 numbers in the flattened rows.

    The end is repeated until their number is a multiple of PADDED_TO: empty documents cost nothing.
    """
    rows, tokens = position_ids.shape
    begins = position_ids == 0
    begins[:, 0] = True
    starts = begins.flatten().nonzero()[:, 0].to(torch.int32)
    num = -(-(len(starts) + 1) // PADDED_TO) * PADDED_TO
    boundaries = torch.full((num,), rows * tokens, dtype=torch.int32)
    boundaries[: len(starts)] = starts
    return {"boundaries": boundaries, "longest": tokens}


def may_use_varlen(device: torch.device, precision: str) -> bool:
    """The kernel is one of GPUs, and of 16 bits."""
    return device.type == "cuda" and precision == "bf16"


def use_varlen(model: PreTrainedModel, seq_len: int) -> bool:
    """Have a model on its device use the kernel, if it is there and gives there what masked attention gives.

    False where it does not, or the model's attention does more than the kernel: dropout, capped scores, and windows
    shorter than seq_len, which some models put into the mask alone.
    """
    config, training = model.config, model.training
    if not set(inspect.signature(varlen_attn).parameters) >= NEEDED:
        return False
    if any(getattr(config, name, 0.0) for name in (*DROPOUTS, "attn_logit_softcapping", "attention_chunk_size")):
        return False
    if (getattr(config, "sliding_window", None) or seq_len) < seq_len:
        return False
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
        masked = _hidden(model)
        model.set_attn_implementation(VARLEN)
        try:
            kernel = _hidden(model)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):  # a kernel missing for device or shape
            kernel = torch.full_like(masked, torch.nan)
    model.train(training)
    if torch.allclose(kernel, masked, rtol=0, atol=TOLERANCE * float(masked.abs().max())):
        return True
    model.set_attn_implementation(ATTENTION)
    return False


def _hidden(model: PreTrainedModel) -> torch.Tensor:
    """(1, T, D) of two documents in one row."""
    positions = torch.cat([torch.arange(TRIED_TOKENS // 3), torch.arange(TRIED_TOKENS - TRIED_TOKENS // 3)])[None]
    ids = (torch.arange(TRIED_TOKENS) * 7 + 3)[None] % model.get_input_embeddings().num_embeddings
    documents = document_boundaries(positions)
    given = {"boundaries": documents["boundaries"].to(model.device), "longest": documents["longest"]}
    return (
        decoder_of(model)(
            input_ids=ids.to(model.device), position_ids=positions.to(model.device), use_cache=False, **given
        )
        .last_hidden_state.float()
    )  # fmt: skip
