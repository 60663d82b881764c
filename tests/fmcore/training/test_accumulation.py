"""Micro-batches, learning, data order over processes: what the loop computes in a step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fmcore.model.build import build_model, decoder_of
from fmcore.tokens.bpe import load_tokenizer
from fmcore.tokens.samples import IGNORE
from fmcore.training.batches import Batches
from fmcore.training.loop import micro_batches, step_seed
from fmcore.training.loss import chunked_loss

pytestmark = pytest.mark.usefixtures("inline")


@pytest.fixture(params=["text", "records"])
def spec(request: pytest.FixtureRequest, based: Any, tiny: Any, corpora: dict[str, Path]) -> Any:
    """Text rows, of which few labels are missing; packed records, of which most are, unevenly over the rows."""
    if request.param == "text":
        return based.spec(tiny.pretrain(corpora["old"]))
    return based.spec(tiny.finetune(corpora["records"]))


def gradients(spec: Any, size: int) -> dict[str, torch.Tensor]:
    """Of one step of eight rows in micro-batches of `size`, summed as the loop sums them."""
    tokenizer = load_tokenizer(spec.tokenizer)
    model = build_model({"model_type": "llama", **SHAPE}, tokenizer, spec.seq_len, seed=0)
    batch = Batches(spec, pad_id=2).at(0)
    assert len(batch.input_ids) == 8
    for micro in micro_batches(batch, size, torch.device("cpu")):
        hidden = decoder_of(model)(
            input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False
        ).last_hidden_state
        chosen = hidden.flatten(0, 1)[micro.rows]
        chunked_loss(chosen, model.get_output_embeddings().weight, micro.targets, batch.num_labels).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 64, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_sum_to_the_same_gradient(spec: Any, size: int) -> None:
    whole, pieces = gradients(spec, 8), gradients(spec, size)
    torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-5)
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-3


def test_micro_batch_changes_no_loss(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    """The same through the whole loop: execution.micro_batch is how, not what."""
    from fmcore.training.metrics import read_metrics

    curves = []
    for size in (1, 8):
        recipe = tiny.finetune(corpora["records"], execution={"micro_batch": size})
        checkpoint = based.train(recipe)
        curves.append([row["loss"] for row in read_metrics(checkpoint.path / "metrics.jsonl")])
        based.store.remove(checkpoint)
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert len(curves[0]) >= 3


@pytest.mark.parametrize("world", [2, 3, 5, 50])
def test_ranks_hold_together_what_one_process_holds(spec: Any, world: int) -> None:
    batches = Batches(spec, pad_id=2)
    last = spec.schedule.num_steps - 1
    for step in (0, 1, last):
        whole = batches.at(step)
        parts = [batches.at(step, rank=rank, world=world) for rank in range(world)]
        rows = len(whole.input_ids)
        assert {len(part.input_ids) for part in parts} == {-(-rows // world)}, "all work in step"
        for name in ("input_ids", "labels", "position_ids"):
            dealt = torch.stack([getattr(part, name) for part in parts], dim=1).flatten(
                0, 1
            )  # row n is rank n % world's
            assert torch.equal(dealt[:rows], getattr(whole, name))
            assert name != "labels" or bool((dealt[rows:] == IGNORE).all()), "what fills up has no label"
        assert sum(part.num_labels for part in parts) == whole.num_labels
        assert {(part.num_tokens, tuple(part.sources.items())) for part in parts} == {
            (whole.num_tokens, tuple(whole.sources.items()))
        }
        assert whole.num_tokens == whole.input_ids.numel()


def test_step_seeds_differ() -> None:
    assert len({step_seed(seed, step) for seed in range(3) for step in range(1000)}) == 3000


# the log of a training that raises stays open until its process ends
def test_a_diverged_training_stops_with_advice(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    with pytest.raises(Exception, match=r"lower train\.lr"):
        based.train(tiny.finetune(corpora["records"], train={"lr": 1e30, "grad_clip": 1e30}))


def test_records_that_are_too_long_are_told_and_left_out(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    said: list[str] = []
    recipe = tiny.finetune(corpora["records"], train={"seq_len": 32})
    made = based.train(recipe, on_line=said.append)
    refused = based.shards(recipe).counts["refused"]["kinds"]["too_long"]
    assert 0 < refused < 90
    assert f"WARNING: kinds: {refused} records are longer than 32 tokens and left out, for none is cut" in str(said)
    assert made.figures["utilization"] <= 1
