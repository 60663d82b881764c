"""Bits per byte against a computation token by token."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fmcore.evaluation import bits as bits_module
from fmcore.evaluation.bits import DocumentBits, cut_windows, score_documents
from fmcore.model.build import build_model
from fmcore.tokens.bpe import Encoder, train_bpe

SEQ_LEN = 16
SHAPE = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny: Any) -> PreTrainedTokenizerBase:
    return train_bpe([tiny.text("old", i) for i in range(20)], 400)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    built = build_model(SHAPE, tokenizer, SEQ_LEN, seed=0)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3)
    return built.eval()


def documents_of_lengths(tokenizer: PreTrainedTokenizerBase, tiny: Any, lengths: list[int]) -> list[tuple[str, str]]:
    """Texts of exactly so many tokens."""
    encoder, made = Encoder(tokenizer), []
    for number, length in enumerate(lengths):
        ids = encoder.encode_batch([tiny.text("old", number, 80)])[0][:length]
        text = tokenizer.decode(ids)
        assert len(encoder.encode_batch([text])[0]) == length
        made.append((f"{number:032x}", text))
    return made


@torch.no_grad()
def brute_force(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Bits of each token given at most what stands in its window before it, one forward pass per token."""
    ids = [tokenizer.bos_token_id, *Encoder(tokenizer).encode_batch([text])[0], tokenizer.eos_token_id]
    bits = 0.0
    for place in range(1, len(ids)):
        window = (place - 1) // SEQ_LEN * SEQ_LEN
        logits = model(input_ids=torch.tensor([ids[window:place]]), use_cache=False).logits[0, -1].double()
        bits -= float(logits.log_softmax(-1)[ids[place]]) / math.log(2)
    return bits


# documents have two tokens more than their text (start and end), of which all but the first are predicted
LENGTHS = [1, 14, 15, 16, 17, 30, 31, 32, 33, 47, 48]


def test_equals_brute_force_around_multiples_of_the_window(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tiny: Any
) -> None:
    documents = documents_of_lengths(tokenizer, tiny, LENGTHS)
    scored = list(score_documents(model, tokenizer, documents, SEQ_LEN))
    assert [s.id for s in scored] == [document_id for document_id, _ in documents]
    for score, (_, text), length in zip(scored, documents, LENGTHS, strict=True):
        assert score.bits == pytest.approx(brute_force(model, tokenizer, text), rel=1e-5)
        assert score.bytes == len(text.encode())
        assert score.tokens == length + 1  # the end of the document included


def test_independent_of_what_else_is_in_the_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = documents_of_lengths(tokenizer, tiny, LENGTHS)
    together = {s.id: s.bits for s in score_documents(model, tokenizer, documents, SEQ_LEN)}
    reverse = {s.id: s.bits for s in score_documents(model, tokenizer, documents[::-1], SEQ_LEN)}
    alone = {s.id: s.bits for d in documents for s in score_documents(model, tokenizer, [d], SEQ_LEN)}
    monkeypatch.setattr(bits_module, "ROWS_PER_BATCH", 3)
    monkeypatch.setattr(bits_module, "HEAD_ROWS", 5)
    monkeypatch.setattr(bits_module, "DOCUMENTS_PER_BATCH", 2)
    small = {s.id: s.bits for s in score_documents(model, tokenizer, documents, SEQ_LEN)}
    for other in (reverse, alone, small):
        assert other == pytest.approx(together, rel=1e-6)


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token(tokenizer: PreTrainedTokenizerBase, tiny: Any) -> None:
    uniform = build_model(SHAPE, tokenizer, SEQ_LEN, seed=0).eval()
    with torch.no_grad():
        uniform.get_output_embeddings().weight.zero_()
    documents = [("0" * 32, "ä ö ü €" + tiny.text("old", 3)), ("1" * 32, tiny.text("new", 4))]
    for score, (_, text) in zip(score_documents(uniform, tokenizer, documents, SEQ_LEN), documents, strict=True):
        assert score.bits == pytest.approx(math.log2(len(tokenizer)) * score.tokens, rel=1e-6)
        assert score.bytes == len(text.encode()) >= len(text)


def test_no_documents(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert list(score_documents(model, tokenizer, [], SEQ_LEN)) == []


def test_windows_predict_every_token_but_the_first_once() -> None:
    for length in range(2, 70):
        ids = list(range(length))
        predicted = [token for window in cut_windows(ids, SEQ_LEN) for token in window[1:]]
        assert predicted == ids[1:]
        assert max(len(window) for window in cut_windows(ids, SEQ_LEN)) <= SEQ_LEN + 1


def test_control_tokens_in_a_text_are_plain_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A document that holds `<|eos|>` is not cut short by it."""
    [score] = score_documents(model, tokenizer, [("0" * 32, "a <|eos|> b")], SEQ_LEN)
    assert isinstance(score, DocumentBits)
    assert score.tokens > 6
    assert np.isfinite(score.bits)
