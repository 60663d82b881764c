"""Tasks: the likeliest of the possible responses, or the generated response taken at its word."""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fmcore.evaluation.bits import token_nats
from fmcore.model.build import decoder_of
from fmcore.model.generate import generate_ids
from fmcore.tokens.chat import encode_example, encode_prompt

PROMPTS_PER_BATCH = 16
ANSWER_TOKENS = 64  # an exact match longer than this is not found


class Answer(NamedTuple):
    """One record's outcome. correct: 1 or 0; response: what was asked for."""

    id: str
    correct: int
    answer: str
    response: str


class Record(NamedTuple):
    """A held-out prompt with the response asked for."""

    id: str
    prompt: str
    response: str


def answer_records(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[Record],
    choices: tuple[str, ...],
    seq_len: int,
) -> Iterator[Answer]:
    """Answer each record: by likelihood where the task has choices, else by greedy generation.

    A record whose prompt leaves no room in seq_len counts as wrong.
    """
    encoded = [(record, encode_prompt(tokenizer, record.prompt)) for record in records]
    for record, ids in encoded:
        if len(ids) >= seq_len:
            yield Answer(record.id, 0, "", record.response)
    fitting = sorted(
        ((r, ids) for r, ids in encoded if len(ids) < seq_len), key=lambda pair: (len(pair[1]), pair[0].id)
    )
    # prompts of one length share a batch without padding, and so without an attention mask
    for _, group in groupby(fitting, key=lambda pair: len(pair[1])):
        pairs = list(group)
        for first in range(0, len(pairs), PROMPTS_PER_BATCH):
            batch = pairs[first : first + PROMPTS_PER_BATCH]
            prompts = torch.tensor([ids for _, ids in batch])
            if choices:
                answers = _choose(model, tokenizer, prompts, choices)
            else:
                answers = _generate(model, tokenizer, prompts, seq_len)
            for (record, _), answer in zip(batch, answers, strict=True):
                yield Answer(record.id, int(answer.strip() == record.response.strip()), answer, record.response)


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: torch.Tensor, seq_len: int
) -> list[str]:
    room = min(ANSWER_TOKENS, seq_len - prompts.shape[1])
    rows = generate_ids(model, tokenizer, prompts, max_new_tokens=room)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


@torch.no_grad()
def _choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: torch.Tensor,
    choices: tuple[str, ...],
) -> list[str]:
    """For each prompt the choice with the highest likelihood, its end-of-turn token included.

    prompts: (B, P), run once; the choices follow from its cache, one by one.
    """
    device = next(model.parameters()).device
    scores = []
    for choice in choices:
        ids = torch.tensor(choice_ids(tokenizer, choice)).expand(len(prompts), -1)  # (B, C)
        scores.append((ids, choice))
    prompt = decoder_of(model)(input_ids=prompts.to(device), use_cache=True)
    cache = prompt.past_key_values
    if hasattr(cache, "activate_past_recording"):  # of newer versions of transformers
        cache.activate_past_recording()  # else a sliding window forgets what cropping has to bring back
    last = prompt.last_hidden_state[:, -1:]  # (B, 1, D)
    nats = []
    for ids, _ in scores:
        targets = ids.to(device)
        hidden = last
        if targets.shape[1] > 1:
            more = decoder_of(model)(input_ids=targets[:, :-1], past_key_values=cache, use_cache=True).last_hidden_state
            cache.crop(1 - targets.shape[1])  # the next choice starts from the prompt again
            hidden = torch.cat([last, more], dim=1)  # (B, C, D)
        flat = token_nats(model, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
        nats.append(flat.view(targets.shape).sum(-1))
    best = torch.stack(nats).argmin(0)  # (B,)
    return [choices[int(i)] for i in best]


def choice_ids(tokenizer: PreTrainedTokenizerBase, choice: str) -> list[int]:
    """The tokens of a response as the template renders it, with the token that ends the turn."""
    example = encode_example(tokenizer, "", choice)
    return [i for i, inside in zip(example.ids, example.mask, strict=True) if inside]
