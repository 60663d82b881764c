"""The size of a decoder as planning needs it: from a recipe, from a parent in the store, or from a parent to come."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fmcore.artifacts.ancestry import checkpoint_of
from fmcore.artifacts.files import read_json
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Checkpoint, RegisteredModel
from fmcore.model.outside import CONFIG, Outside
from fmcore.model.presets import estimate_parameters, model_fields
from fmcore.recipes.stages import FinetuneRecipe, PretrainRecipe, StageRecipe
from fmcore.training.train import inherited_spec

FOLDER_SEQ_LEN = 1024  # of a parent from outside, whose own context may be far longer than what is trained
FOLDER_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Shape:
    """fields: transformers' config. seq_len, batch_tokens: tokens in a sequence and in an optimizer step.

    folder: where its tokenizer lies, if it exists already.
    """

    fields: dict[str, Any]
    parameters: int
    vocab_size: int
    seq_len: int
    batch_tokens: int
    folder: Path | None = None


def shape_of(recipe: StageRecipe, parent: Shape | None, vocab_size: int = 0) -> Shape | None:
    """What a recipe will train; None where its parent is not known here.

    vocab_size: of the shards, where they exist, for a tokenizer may come out smaller than it was asked for.
    """
    if isinstance(recipe, PretrainRecipe):
        fields = model_fields(recipe.model)
        vocabulary = vocab_size or recipe.tokenizer.vocab_size
        return Shape(
            fields, estimate_parameters(fields, vocabulary), vocabulary, recipe.train.seq_len,
            recipe.train.batch_tokens,
        )  # fmt: skip
    if parent is None:
        return None
    batch_tokens = recipe.train.batch_tokens or parent.batch_tokens
    return replace(parent, seq_len=recipe.train.seq_len or parent.seq_len, batch_tokens=batch_tokens)


def trainable_parameters(recipe: StageRecipe, shape: Shape) -> int:
    """Parameters that the optimizer sees: all, or the adapters' on every linear layer of a Llama-like block."""
    if not isinstance(recipe, FinetuneRecipe) or recipe.method != "lora":
        return shape.parameters
    width, layers, inner, shared = block_sizes(shape.fields)
    attention = 2 * (2 * width) + 2 * (width + int(width * shared))
    return recipe.lora.r * layers * (attention + 3 * (width + inner))


def flops_per_token(shape: Shape, trained: int) -> float:
    """Of a forward and a backward pass: the formula of `fmcore.training.figures`, from the config alone.

    4 per parameter in matrix products, 2 more where it is trained, 12 x layers x width x context.
    """
    width, layers, _, _ = block_sizes(shape.fields)
    looked_up = 0 if shape.fields.get("tie_word_embeddings", True) else shape.vocab_size * width
    product = shape.parameters - looked_up - (2 * layers + 1) * width
    adapters = adapter_parameters(shape, trained)
    return 4.0 * (product + adapters) + 2.0 * (adapters or product) + 12.0 * layers * width * shape.seq_len


def adapter_parameters(shape: Shape, trained: int) -> int:
    """Of the parameters trained, those that come on top of the model's: all of them, or none."""
    return trained if trained < shape.parameters else 0


def block_sizes(fields: dict[str, Any]) -> tuple[int, int, int, float]:
    """Width, layers, inner width of the feed-forward part, key and value heads per head."""
    width = int(fields.get("hidden_size", fields.get("n_embd", 768)))
    layers = int(fields.get("num_hidden_layers", fields.get("n_layer", 12)))
    inner = int(fields.get("intermediate_size") or fields.get("n_inner") or 4 * width)
    heads = int(fields.get("num_attention_heads", fields.get("n_head", 12)))
    return width, layers, inner, int(fields.get("num_key_value_heads", heads)) / heads


def parent_shape(outside: Outside | None, parent: RegisteredModel | None, store: Store) -> Shape | None:
    """The parent's shape: as it was trained here, or by its files where it comes from outside."""
    if parent is not None:
        return _trained_shape(checkpoint_of(store, parent), store)
    return replace(folder_shape(outside.folder), parameters=outside.num_parameters) if outside else None


def _trained_shape(checkpoint: Checkpoint, store: Store) -> Shape:
    whole = checkpoint
    while whole.method == "lora":
        whole = store.get(whole.parents["parent"], Checkpoint)
    fields = read_json(whole.final / CONFIG)
    trained = inherited_spec(checkpoint)
    return Shape(
        fields, whole.num_parameters, int(fields["vocab_size"]), trained["seq_len"], trained["batch_tokens"],
        whole.final,
    )  # fmt: skip


def folder_shape(folder: Path) -> Shape:
    """The shape of a model in transformers' format by its config; its parameters are estimated."""
    fields = read_json(folder / CONFIG)
    vocabulary = int(fields.get("vocab_size", 0))
    longest = int(fields.get("max_position_embeddings") or fields.get("n_positions") or FOLDER_SEQ_LEN)
    return Shape(
        fields, estimate_parameters(fields, vocabulary), vocabulary, min(longest, FOLDER_SEQ_LEN),
        FOLDER_BATCH_TOKENS, folder,
    )  # fmt: skip
