"""Figures of a training: the formula against a count by torch itself, and sums that are right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from fmcore.model.adapters import add_lora
from fmcore.recipes.fields import Lora
from fmcore.training.checkpoint import initial_state
from fmcore.training.figures import count_restart, figures, flops_per_token, in_words, measure_peak

SHAPE = {
    "vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 160, "max_position_embeddings": 64,
}  # fmt: skip


def counted(model: torch.nn.Module, seq_len: int) -> float:
    """FLOPs per token of a forward and a backward pass, as torch counts those of matrix products and attention."""
    tokens = torch.randint(0, 500, (2, seq_len))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    return counter.get_total_flops() / tokens.numel()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("seq_len", [16, 64])
def test_the_formula_is_what_torch_counts(tied: bool, seq_len: int) -> None:
    config = AutoConfig.for_model("llama", **SHAPE, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert flops_per_token(model, config, seq_len) == pytest.approx(counted(model, seq_len), rel=0.02)


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    config = AutoConfig.for_model("llama", **SHAPE, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    whole = flops_per_token(model, config, 32)
    lora = add_lora(model, Lora(r=2))
    formula = flops_per_token(lora, config, 32)
    assert formula < 0.75 * whole
    assert formula == pytest.approx(counted(lora, 32), rel=0.1)  # nothing flows below the first adapter


def test_peak_is_what_the_matrix_product_takes() -> None:
    assert 1e9 < measure_peak(torch.device("cpu")) < 1e14


def test_shares_and_sums(tmp_path: Path) -> None:
    state = initial_state(threads=1, micro_batch=1)
    state.tokens, state.seconds = 1000, 8.0
    state.effort.wall_s, state.effort.data_wait_s, state.effort.save_stall_s, state.effort.saves = 9.0, 0.1, 0.05, 3
    lost = [{"step": 5, "tokens_per_sec": 200.0}, {"step": 6, "tokens_per_sec": 200.0}]
    count_restart(state, tmp_path / "attempts.json", lost, batch_tokens=100)
    reached = figures(state, flops=10.0, peak=2500.0, device=torch.device("cpu"))
    assert reached["mean_tokens_per_sec"] == 125
    assert reached["mfu"] == 0.5
    assert (reached["goodput"], reached["data_wait"], reached["save_stall"]) == (0.8, 0.01, 0.005)
    assert (reached["restarts"], reached["lost_steps"], reached["saves"]) == (1, 2, 3)
    assert reached["peak_memory_mb"] > 100
    assert in_words(reached).startswith("125 tokens/s, MFU 50.0% of 0 GFLOP/s")


def test_attempts_that_ended_before_they_saved_are_counted(tmp_path: Path) -> None:
    """Three begin from the same state; the last one saves, and a fourth goes on from there."""
    attempts, lost = tmp_path / "attempts.json", [{"step": 5, "tokens_per_sec": 200.0}]
    for number in range(1, 4):
        state = initial_state(threads=1, micro_batch=1)
        count_restart(state, attempts, lost * number, batch_tokens=100)
    for expected in ((3, 6, 3.0), (4, 7, 3.5)):
        assert (state.effort.restarts, state.effort.lost_steps, state.effort.wall_s) == expected
        count_restart(state, attempts, lost, batch_tokens=100)


@pytest.mark.usefixtures("inline")
def test_a_training_has_them(fresh_home: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    made = fresh_home.train(tiny.pretrain(corpora["old"]))
    assert 0 < made.figures["mfu"] < 1
    assert 0 < made.figures["goodput"] <= 1
    assert made.figures["saves"] == 3  # at the start, at step 10, and the stable state
    assert made.figures["skipped_steps"] == made.figures["restarts"] == 0
