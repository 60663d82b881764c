"""Held-out bits per byte: what a model needs to tell a document, per byte of its text.

Bits of all tokens, end of document included, over the UTF-8 bytes of the normalised text. Unlike loss per
token it compares across tokenizers. Documents are scored one by one, in windows of seq_len.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fmcore.model.build import decoder_of
from fmcore.tokens.bpe import Encoder, start_id

ROWS_PER_BATCH = 32
HEAD_ROWS = 512  # logits exist for so many positions at a time
DOCUMENTS_PER_BATCH = 64


class DocumentBits(NamedTuple):
    """One document's score."""

    id: str
    bits: float
    bytes: int
    tokens: int


def score_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[tuple[str, str]],
    seq_len: int,
) -> Iterator[DocumentBits]:
    """Score (id, content) pairs, in order."""
    encoder, start, end = Encoder(tokenizer), start_id(tokenizer), int(tokenizer.eos_token_id)
    remaining = iter(documents)
    while batch := list(islice(remaining, DOCUMENTS_PER_BATCH)):
        encoded = encoder.encode_batch([content for _, content in batch])
        windows, owners = [], []
        for owner, ids in enumerate(encoded):
            for window in cut_windows([start, *ids, end], seq_len):
                windows.append(window)
                owners.append(owner)
        nats = np.zeros(len(batch))
        np.add.at(nats, owners, window_nats(model, windows))
        for (document_id, content), ids, value in zip(batch, encoded, nats, strict=True):
            yield DocumentBits(document_id, float(value) / math.log(2), len(content.encode()), len(ids) + 1)


def cut_windows(ids: list[int], seq_len: int) -> list[list[int]]:
    """Windows of seq_len inputs and one token more, so that each token but the first is predicted once."""
    return [ids[i : i + seq_len + 1] for i in range(0, len(ids) - 1, seq_len)]


@torch.no_grad()
def window_nats(model: PreTrainedModel, windows: list[list[int]]) -> np.ndarray:
    """(N,) nats of predicting each window's tokens after its first, every window on its own."""
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))
    result = np.zeros(len(windows))
    for first in range(0, len(order), ROWS_PER_BATCH):
        chosen = order[first : first + ROWS_PER_BATCH]
        result[chosen] = _batch_nats(model, [windows[i] for i in chosen])
    return result


def _batch_nats(model: PreTrainedModel, windows: list[list[int]]) -> np.ndarray:
    """Windows side by side, padded on the right: causal attention never looks there, so no mask is needed."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(w) - 1 for w in windows])
    longest = int(lengths.max())
    tokens = torch.zeros(len(windows), longest + 1, dtype=torch.long)
    for row, window in enumerate(windows):
        tokens[row, : len(window)] = torch.tensor(window)
    hidden = decoder_of(model)(input_ids=tokens[:, :-1].to(device), use_cache=False).last_hidden_state
    inside = torch.arange(longest) < lengths[:, None]  # (B, T)
    nats = torch.zeros(inside.shape, dtype=torch.float64)
    nats[inside] = token_nats(model, hidden[inside.to(device)], tokens[:, 1:][inside].to(device)).cpu().double()
    return nats.sum(-1).numpy()


def token_nats(model: PreTrainedModel, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(N, D) hidden states, (N,) labels -> (N,) nats, with a few rows of logits at a time."""
    head = model.get_output_embeddings()
    parts = []
    for first in range(0, len(hidden), HEAD_ROWS):
        rows = slice(first, first + HEAD_ROWS)
        logits = head(hidden[rows]).float()
        parts.append(torch.nn.functional.cross_entropy(logits, labels[rows], reduction="none"))
    return torch.cat(parts)
