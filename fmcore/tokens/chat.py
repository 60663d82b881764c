"""Prompt and response as one training example: chat template, and a mask over the response alone."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase


class Example(NamedTuple):
    """Token ids of a whole conversation; mask is True where the token belongs to the loss."""

    ids: list[int]
    mask: list[bool]


def encode_example(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> Example:
    """Render prompt and response. The mask covers the response and the token that ends it.

    The mask is what the conversation adds to the prompt's own rendering: transformers can mark the
    assistant's tokens itself, but not while it keeps control tokens written in the texts plain text. It is
    empty where a template renders the two differently; the caller refuses such a record.
    """
    ids = _render(tokenizer, [_user(prompt), {"role": "assistant", "content": response}])
    start = encode_prompt(tokenizer, prompt)
    length = len(start) if ids[: len(start)] == start else len(ids)
    return Example(ids, [False] * length + [True] * (len(ids) - length))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids up to where the response begins."""
    return _render(tokenizer, [_user(prompt)], add_generation_prompt=True)


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a generated text: eos, and the control token with which the template ends a turn."""
    example = encode_example(tokenizer, "question", "answer")
    learnt = [i for i, inside in zip(example.ids, example.mask, strict=True) if inside]
    control = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i in learnt]
    return sorted({int(tokenizer.eos_token_id), *control})


def _user(prompt: str) -> dict[str, str]:
    return {"role": "user", "content": prompt}


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: bool) -> list[int]:
    rendered = tokenizer.apply_chat_template(messages, return_dict=True, sanitize_control_tokens=True, **options)
    return list(rendered["input_ids"])
