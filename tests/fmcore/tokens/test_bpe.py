"""Byte-level BPE: reserved ids inside the vocabulary, any text and back, control tokens only where we put them."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from fmcore.errors import DataError
from fmcore.tokens.bpe import (
    BOS,
    EOS,
    IM_END,
    IM_START,
    NUM_SPARE,
    PAD,
    RESERVED,
    Encoder,
    load_tokenizer,
    start_id,
    train_bpe,
)


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    return Encoder(tokenizer)


def test_reserved_ids_come_first_inside_the_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == 350
    assert [tokenizer.convert_tokens_to_ids(token) for token in RESERVED] == list(range(37))
    assert RESERVED[:5] == [BOS, EOS, PAD, IM_START, IM_END]
    assert len(RESERVED) == 5 + NUM_SPARE == 37
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)


def test_training_is_deterministic() -> None:
    texts = ["one two three two one", "three two two one"] * 3
    assert train_bpe(texts, 310).get_vocab() == train_bpe(texts, 310).get_vocab()


def test_a_corpus_too_small_for_the_vocabulary_makes_a_smaller_one() -> None:
    assert len(train_bpe(["ab"], 5000)) == 37 + 256 + 1


TEXTS = st.text(max_size=60) | st.lists(
    st.sampled_from([*RESERVED[:6], "<|", "|>", " ", "\n", "king", "é", "한", "😀"]), max_size=12
).map("".join)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_any_text_comes_back_and_never_holds_a_reserved_id(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    (ids,) = Encoder(tokenizer).encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert all(37 <= i < 350 for i in ids)


@pytest.mark.parametrize("token", RESERVED[:6])
def test_a_control_token_in_a_text_stays_text(encoder: Encoder, tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    (ids,) = encoder.encode_batch([f"a {token} b"])
    assert len(ids) > 5
    assert tokenizer.convert_tokens_to_ids(token) not in ids


def test_the_encoder_leaves_the_tokenizer_as_it_is(tokenizer: PreTrainedTokenizerBase) -> None:
    Encoder(tokenizer).encode_batch([EOS])
    assert tokenizer(EOS, add_special_tokens=False)["input_ids"] == [1]


def test_no_text_is_too_long(encoder: Encoder) -> None:
    (ids,) = encoder.encode_batch(["x y " * 20_000])
    assert len(ids) >= 40_000


def test_saved_and_loaded_it_is_the_same(encoder: Encoder, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(str(tmp_path))
    loaded = load_tokenizer(tmp_path)
    text = ["The king's  ghost\n\tasked für 3 😀 <|eos|>"]
    assert Encoder(loaded).encode_batch(text) == encoder.encode_batch(text)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)


def test_documents_start_with_bos_or_eos_where_there_is_none(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert start_id(tokenizer) == 0
    tokenizer.save_pretrained(str(tmp_path))
    without = load_tokenizer(tmp_path)
    without.bos_token = None
    assert start_id(without) == 1


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tokenizer in transformers' format"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_eos_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(str(tmp_path))
    config = (tmp_path / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config.replace('"eos_token"', '"unused_token"'))
    with pytest.raises(DataError, match="needs an eos token"):
        load_tokenizer(tmp_path)
