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
    torch.manual_seed(seed)
    try:
        config = AutoConfig.for_model(**fields)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=torch.float32)
    except (ValueError, TypeError, KeyError, RuntimeError, AssertionError, StrictDataclassError) as error:
        raise RecipeError(f"model.config: transformers cannot build this model: {error}") from error
    if len(tokenizer) > config.vocab_size:
        raise RecipeError(f"model.config.vocab_size: {config.vocab_size} is less than the tokenizer's {len(tokenizer)}")
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
    """Refuse what the loss would silently get wrong."""
    if getattr(model.config, "final_logit_softcapping", None):
        raise RecipeError(
            f"model_type {model.config.model_type} caps its logits (final_logit_softcapping); the chunked loss "
            f"does not, set final_logit_softcapping: null or take another model_type"
        )
    model.config.use_cache = False  # with a cache, transformers does not keep packed documents apart
    return model


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
