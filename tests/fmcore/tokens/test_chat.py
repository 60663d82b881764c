"""One training example: the chat template around prompt and response, the loss on the response alone."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from fmcore.data.normalize import normalize
from fmcore.tokens.bpe import RESERVED, Encoder
from fmcore.tokens.chat import encode_example, encode_prompt

BOS, EOS, START = 0, 1, 3

# normalised and not empty, as prepare leaves them
TEXTS = (
    (st.text(max_size=40) | st.lists(st.sampled_from([*RESERVED[:6], "king", " ", "\n", "a"]), max_size=8).map("".join))
    .map(normalize)
    .filter(bool)
)


@settings(max_examples=100, deadline=None)
@given(prompt=TEXTS, response=TEXTS)
def test_the_mask_is_the_response_and_its_eos(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> None:
    example = encode_example(tokenizer, prompt, response)
    assert len(example.ids) == len(example.mask)
    learnt = [i for i, m in zip(example.ids, example.mask, strict=True) if m]
    assert learnt == [*Encoder(tokenizer).encode_batch([response])[0], EOS]
    assert example.mask == sorted(example.mask)  # nothing after the response
    given_ids = example.ids[: example.mask.index(True)]
    assert given_ids == encode_prompt(tokenizer, prompt)
    assert tokenizer.decode(given_ids) == f"<|bos|><|im_start|>user\n{prompt}<|eos|><|im_start|>assistant\n"


@pytest.mark.parametrize("token", RESERVED[:6])
def test_control_tokens_are_only_the_templates(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    ids = encode_example(tokenizer, f"{token}x{token}", f"y{token}").ids
    assert [i for i in ids if i < 37] == [BOS, START, EOS, START, EOS]


def test_a_template_that_renders_the_prompt_differently_masks_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    """As templates do that show the last turn in another way; the caller refuses such a record."""
    other = copy.deepcopy(tokenizer)
    show = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"
    other.chat_template = show + "{% if add_generation_prompt %}>{% endif %}"
    example = encode_example(other, "prompt", "response")
    assert example.ids
    assert not any(example.mask)
