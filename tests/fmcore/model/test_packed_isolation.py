"""Documents packed into one row do not see each other, on the attention backend that training uses."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fmcore.model.build import ATTENTION, build_model, decoder_of
from fmcore.tokens.bpe import train_bpe
from fmcore.tokens.packing import pack_best_fit, write_plan
from fmcore.tokens.samples import IGNORE, RecordSamples, Row, TextSamples
from fmcore.tokens.shards import Stream, StreamWriter

SEQ_LEN = 64
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 64, "head_dim": 16,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SHAPE},
    "llama-grouped": {"model_type": "llama", **SHAPE, "num_key_value_heads": 1},
    "qwen2": {"model_type": "qwen2", **{name: value for name, value in SHAPE.items() if name != "head_dim"}},
    "qwen3": {"model_type": "qwen3", **SHAPE},
    "gemma3": {"model_type": "gemma3_text", **SHAPE, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "gpt2": {
        "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": SEQ_LEN,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny: Any) -> PreTrainedTokenizerBase:
    return train_bpe([tiny.text("old", i) for i in range(20)], 400)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    built = build_model(FAMILIES[request.param], tokenizer, SEQ_LEN, seed=0)
    with torch.no_grad():
        for parameter in built.parameters():  # tiny initial weights would hide a leak below the tolerance
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3)
    assert built.config._attn_implementation == ATTENTION
    return built.eval()


def rows(form: str, folder: Path, vocab_size: int) -> tuple[list[Row], Stream]:
    """Rows as training sees them: documents of 5 to 30 random ids, as text windows or as packed records."""
    random = np.random.default_rng(0)
    lengths = random.integers(5, 31, size=12)
    with StreamWriter(folder, vocab_size, masked=form == "records") as writer:
        for number, length in enumerate(lengths):
            ids = random.integers(40, vocab_size, size=length)
            mask = [False] * 2 + [True] * (int(length) - 2) if form == "records" else None
            writer.add(f"{number:032x}", ids.tolist(), mask)
    stream = Stream(folder, vocab_size)
    if form == "text":
        samples: Any = TextSamples(stream, SEQ_LEN, pad_id=2)
    else:
        write_plan(folder, pack_best_fit(lengths, SEQ_LEN))
        samples = RecordSamples(folder, stream, SEQ_LEN, pad_id=2)
    return [samples.row(i) for i in range(len(samples))], stream


def pieces(row: Row) -> list[slice]:
    """The documents of a row, by where its positions start again."""
    starts = [*np.flatnonzero(row.position_ids == 0), SEQ_LEN]
    return [slice(int(a), int(b)) for a, b in pairwise(starts)]


@torch.no_grad()
def hidden(model: PreTrainedModel, ids: np.ndarray, positions: np.ndarray, **options: Any) -> torch.Tensor:
    options = {"use_cache": False} | options
    output = decoder_of(model)(
        input_ids=torch.from_numpy(ids)[None], position_ids=torch.from_numpy(positions)[None], **options
    )
    return output.last_hidden_state[0]  # (T, D)


def leak(model: PreTrainedModel, row: Row, **options: Any) -> float:
    """Largest difference between a document in its row and the same document alone."""
    packed = hidden(model, row.input_ids, row.position_ids, **options)
    alone = [hidden(model, row.input_ids[p], np.arange(p.stop - p.start)) for p in pieces(row)]
    return float((packed - torch.cat(alone)).abs().max())


@pytest.mark.parametrize("form", ["text", "records"])
def test_a_packed_document_is_computed_as_if_alone(
    model: PreTrainedModel, form: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    made, _ = rows(form, tmp_path / "shard", len(tokenizer))
    assert max(len(pieces(row)) for row in made) >= 3
    assert max(leak(model, row) for row in made) < 1e-5


def test_in_training_mode_and_in_a_batch_too(
    model: PreTrainedModel, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """As the loop calls it: several rows at once, the model in train()."""
    made, _ = rows("text", tmp_path / "shard", len(tokenizer))
    model.train()
    try:
        with torch.no_grad():
            batch = decoder_of(model)(
                input_ids=torch.from_numpy(np.stack([row.input_ids for row in made])),
                position_ids=torch.from_numpy(np.stack([row.position_ids for row in made])),
                use_cache=False,
            ).last_hidden_state
    finally:
        model.eval()
    for row, packed in zip(made, batch, strict=True):
        alone = [hidden(model, row.input_ids[p], np.arange(p.stop - p.start)) for p in pieces(row)]
        assert float((packed - torch.cat(alone)).abs().max()) < 1e-5


@pytest.mark.parametrize("options", [{"use_cache": True}, {"attention_mask": torch.ones(1, SEQ_LEN, dtype=torch.long)}])
def test_control_a_mask_or_a_cache_would_leak(
    model: PreTrainedModel, options: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """If this fails, transformers isolates always, and the loop's care may be dropped."""
    made, _ = rows("text", tmp_path / "shard", len(tokenizer))
    assert max(leak(model, row, **options) for row in made) > 1e-2


def test_built_and_opened_models_have_no_cache_by_default(model: PreTrainedModel) -> None:
    assert model.config.use_cache is False


@pytest.mark.parametrize("form", ["text", "records"])
def test_labels_are_the_next_token_of_the_same_document(form: str, tmp_path: Path) -> None:
    """Every predicted token once, and never the first of a document from the last of the one before."""
    made, stream = rows(form, tmp_path / "shard", 400)
    for row in made:
        for piece in pieces(row):
            ids, labels = row.input_ids[piece], row.labels[piece]
            kept = np.flatnonzero(labels[:-1] != IGNORE)
            assert (labels[kept] == ids[kept + 1]).all()
    num_labels = sum(int((row.labels != IGNORE).sum()) for row in made)
    documents = len(stream.ids)
    masked_out = 2 * documents if form == "records" else documents  # the prompt's two; a document's first
    assert num_labels == len(stream.tokens) - masked_out
