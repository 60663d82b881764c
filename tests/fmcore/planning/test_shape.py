"""Shapes by config alone: their FLOPs are those that a training counts on the model itself."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from fmcore.model.adapters import add_lora
from fmcore.planning.shape import Shape, flops_per_token, parent_shape, shape_of
from fmcore.recipes.fields import Lora
from fmcore.training import figures

LLAMA = {
    "model_type": "llama", "vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 160, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 500, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}


def built(fields: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), attn_implementation="eager")


@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [(LLAMA | {"tie_word_embeddings": True}, 0), (LLAMA | {"tie_word_embeddings": False}, 0), (GPT2, 0.03)],
)
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("seq_len", [16, 64])
def test_flops_are_the_figures_own(fields: dict[str, Any], tolerance: float, rank: int, seq_len: int) -> None:
    model = built(fields)
    whole = sum(p.numel() for p in model.parameters())
    trained = add_lora(model, Lora(r=rank)) if rank else model
    num = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    shape = Shape(fields, whole, fields["vocab_size"], seq_len, 256)
    counted = figures.flops_per_token(trained, model.config, seq_len)
    assert flops_per_token(shape, num) == pytest.approx(counted, rel=tolerance or 1e-9)


def test_a_context_of_its_own_counts_in_every_stage(base_home: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    for recipe in (
        tiny.continued(corpora["new"], train={"seq_len": 16}), tiny.finetune(corpora["records"], train={"seq_len": 16}),
    ):  # fmt: skip
        stage = base_home.resolve(recipe)
        shape = shape_of(stage.recipe, parent_shape(None, stage.parent, base_home.store))
        assert shape is not None
        assert shape.seq_len == 16
