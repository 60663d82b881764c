"""Text from a model: greedy, or sampled with a seed."""

from itertools import takewhile

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fmcore.tokens.bpe import Encoder, start_id
from fmcore.tokens.chat import encode_prompt, end_ids


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: torch.Tensor, *, max_new_tokens: int,
    temperature: float = 0.0, top_p: float = 1.0,
) -> list[list[int]]:  # fmt: skip
    """New token ids for prompts of one length, (B, P), up to the end of the turn. temperature 0 is greedy."""
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ends = end_ids(tokenizer)
    output = model.generate(
        prompts.to(next(model.parameters()).device), attention_mask=torch.ones_like(prompts),
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, use_cache=True,
        eos_token_id=ends, pad_token_id=pad, **sampling,
    )  # fmt: skip
    rows = output[:, prompts.shape[1] :].tolist()
    return [list(takewhile(lambda token: token not in ends, row)) for row in rows]


def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool, max_new_tokens: int,
    temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
) -> str:  # fmt: skip
    """Continue a text, or answer a prompt through the chat template."""
    torch.manual_seed(seed)
    ids = (
        encode_prompt(tokenizer, prompt)
        if chat
        else [start_id(tokenizer), *Encoder(tokenizer).encode_batch([prompt])[0]]
    )
    room = model.config.max_position_embeddings - 1
    rows = generate_ids(
        model,
        tokenizer,
        torch.tensor([ids[-room:]]),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
    )
    return str(tokenizer.decode(rows[0], skip_special_tokens=True))
