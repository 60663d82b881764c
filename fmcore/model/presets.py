"""Decoder sizes by name, in the words of transformers' config; knows no torch."""

from typing import Any

from fmcore.recipes.fields import Model

_COMMON = {"model_type": "llama", "rope_theta": 10_000.0, "rms_norm_eps": 1e-5, "attention_bias": False}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_COMMON, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": 512, "tie_word_embeddings": True,
    },
    "small": {
        **_COMMON, "hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6,
        "num_key_value_heads": 6, "intermediate_size": 1024, "tie_word_embeddings": True,
    },
    "125m": {
        **_COMMON, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 12, "intermediate_size": 2048, "tie_word_embeddings": False,
    },
    "1b": {
        **_COMMON, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 8, "intermediate_size": 8192, "tie_word_embeddings": False,
    },
}  # fmt: skip


def model_fields(model: Model) -> dict[str, Any]:
    """The config fields of a recipe's model: the preset, with the recipe's own laid over it."""
    preset = PRESETS[model.preset]
    if model.config.get("model_type", preset["model_type"]) != preset["model_type"]:
        return dict(model.config)
    return {**preset, **model.config}


def estimate_parameters(fields: dict[str, Any], vocab_size: int) -> int:
    """Parameters of a Llama-like decoder from its config fields (exact for the presets)."""
    width = int(fields.get("hidden_size", fields.get("n_embd", 768)))
    layers = int(fields.get("num_hidden_layers", fields.get("n_layer", 12)))
    inner = int(fields.get("intermediate_size", 4 * width))
    heads = int(fields.get("num_attention_heads", 12))
    shared = int(fields.get("num_key_value_heads", heads)) / heads
    attention = width * width * (2 + 2 * shared)
    block = attention + 3 * width * inner + 2 * width
    heads_of_vocabulary = 1 if fields.get("tie_word_embeddings", True) else 2
    return int(layers * block + width + heads_of_vocabulary * vocab_size * width)
