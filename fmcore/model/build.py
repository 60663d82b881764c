"""Builds a decoder from config fields, or opens one from a transformers folder, adapters merged."""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from fmcore.errors import RecipeError
from fmcore.model.weights import Weights

ATTENTION = "sdpa"
TRIED_TOKENS = 32
TOLERANCE = 1e-4  # of the largest value; fp32 noise stays below 1e-5


def build_model(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seq_len: int, seed: int) -> PreTrainedModel:
    """A decoder with fresh weights, fp32. Raises RecipeError where transformers refuses the fields."""
    fields = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": seq_len,
        **fields,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = fresh_model(fields, seed)
    if len(tokenizer) > model.config.vocab_size:
        raise RecipeError(
            f"model.config.vocab_size: {model.config.vocab_size} is less than the tokenizer's {len(tokenizer)}"
        )
    return model


def fresh_model(fields: dict[str, Any], seed: int) -> PreTrainedModel:
    """A decoder by all of its config fields, fp32. Raises RecipeError where it cannot be built, or trained."""
    torch.manual_seed(seed)
    try:
        config = AutoConfig.for_model(**fields)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=torch.float32)
    except (ValueError, TypeError, KeyError, RuntimeError, AssertionError, StrictDataclassError) as error:
        raise RecipeError(f"model.config: transformers cannot build this model: {error}") from error
    return check_supported(model)


def open_model(weights: Weights) -> PreTrainedModel:
    """Open weights for training or evaluation, fp32, adapters merged. Only safetensors are read."""
    model = AutoModelForCausalLM.from_pretrained(
        str(weights.folder), attn_implementation=ATTENTION, dtype=torch.float32, use_safetensors=True,
        trust_remote_code=False, local_files_only=True,
    )  # fmt: skip
    if weights.tensors:
        load_parameters(model, load_file(weights.tensors))
    for adapter in weights.adapters:
        model = PeftModel.from_pretrained(model, str(adapter), local_files_only=True).merge_and_unload()
    model.requires_grad_(True)  # peft had frozen what an adapter was merged into
    return check_supported(model)


def check_supported(model: PreTrainedModel) -> PreTrainedModel:
    """Refuse what the loss would silently get wrong, by the config where it says so, else by trying. Turns off
    the cache, with which transformers does not keep packed documents apart.
    """
    config = model.config
    if getattr(config, "final_logit_softcapping", None):
        raise RecipeError(
            f"model_type {config.model_type} caps its logits (final_logit_softcapping); the chunked loss "
            f"does not, set final_logit_softcapping: null or take another model_type"
        )
    if config.get_text_config() is not config or config.is_encoder_decoder:
        raise RecipeError(f"model_type {config.model_type} is no plain decoder of text; take another model_type")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise RecipeError(f"model_type {config.model_type} adds a bias to its logits, which the chunked loss does not")
    config.use_cache = False
    training = model.training
    _try(model.eval())
    return model.train(training)


@torch.no_grad()
def _try(model: PreTrainedModel) -> None:
    """Two documents of a few tokens: our logits against the model's own, packed against alone."""
    kind = model.config.model_type
    rows = model.get_input_embeddings().num_embeddings
    length = max(2, min(TRIED_TOKENS, getattr(model.config, "max_position_embeddings", None) or TRIED_TOKENS) // 2)
    ids = (torch.arange(2 * length) * 7 + 3)[None] % rows  # (1, 2L)
    positions = torch.arange(length).repeat(2)[None]
    second = slice(length, None)
    try:
        packed = decoder_of(model)(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        alone = decoder_of(model)(
            input_ids=ids[:, second], position_ids=positions[:, second], use_cache=False
        ).last_hidden_state
        theirs = model(input_ids=ids[:, second], use_cache=False).logits
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"model_type {kind} cannot be trained here: its forward pass takes more, or other, than ids and positions "
            f"({type(error).__name__}: {error})"
        ) from error
    if not theirs.isfinite().all():
        raise RecipeError(f"model_type {kind}: the logits of these weights are not finite numbers")
    if _differ(alone @ model.get_output_embeddings().weight.T, theirs):
        raise RecipeError(
            f"model_type {kind} does more to its logits than multiply by its head (a scale, a bias), which the chunked "
            f"loss does not; take another model_type"
        )
    if _differ(packed[:, second], alone):
        raise RecipeError(
            f"model_type {kind} lets documents that share a row see each other (a recurrent state, or an attention "
            f"that position ids do not part); it cannot be trained on packed rows"
        )


def _differ(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return not torch.allclose(ours, theirs, rtol=0, atol=TOLERANCE * float(theirs.abs().max()), equal_nan=True)


def load_parameters(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors into the parameters of the same names; every tensor has to find its place."""
    parameters = dict(model.named_parameters())
    missing = sorted(set(tensors) - set(parameters))
    if missing:
        raise RecipeError(f"the checkpoint holds parameters that this model lacks: {', '.join(missing[:3])}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """The part below the head: (B, T) ids -> (B, T, D) hidden states."""
    return getattr(model, model.base_model_prefix)
