"""Documents -> TokenShards: what is written, what is refused, and what its identity is."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Documents, TokenShards
from fmcore.data.prepare import documents_step, prepare_documents
from fmcore.data.tables import read_rows
from fmcore.errors import DataError, IntegrityError
from fmcore.recipes.fields import TaskData, TextData, Tokenizer
from fmcore.tokens import tokenize as module
from fmcore.tokens.bpe import Encoder, load_tokenizer
from fmcore.tokens.samples import open_samples
from fmcore.tokens.shards import Stream
from fmcore.tokens.tokenize import shards_step, tokenize_documents


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def documents(store: Store, tmp_path: Path) -> Documents:
    """Two sources of 40 texts."""
    sources = []
    for name in "ab":
        path = tmp_path / f"{name}.txt"
        path.write_text("".join(f"Line {n} of source {name} is not long <|eos|>\n" for n in range(40)))
        sources.append({"name": name, "path": str(path), "split_on": "line"})
    data = TextData(sources=sources, holdout=0.5)
    return prepare_documents(documents_step("x", data, None, store.digests), data, None, store)


@pytest.fixture
def records(store: Store, tmp_path: Path) -> Documents:
    """40 short records and 3 that are longer than 60 tokens."""
    rows = [{"prompt": f"question {n}?", "response": "yes <|eos|>" if n % 2 else "no"} for n in range(40)]
    rows += [{"prompt": f"{n} of them?", "response": "0123456789" * 9} for n in range(3)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = TaskData(tasks=[{"name": "qa", "path": str(tmp_path / "qa.jsonl"), "eval_path": str(exam(tmp_path))}])
    return prepare_documents(documents_step("x", data, None, store.digests), data, None, store)


def exam(folder: Path) -> Path:
    rows = [{"prompt": f"exam {n}?", "response": "yes"} for n in range(12)]
    (folder / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "exam.jsonl"


Tokenize = Callable[..., TokenShards]


@pytest.fixture
def tokenize(store: Store) -> Tokenize:
    def tokenize(documents: Documents, tokenizer: Tokenizer, seq_len: int | None = None) -> TokenShards:
        step = shards_step("x", documents.fingerprint, tokenizer, seq_len, None)
        return tokenize_documents(step, documents, tokenizer, None, store)

    return tokenize


@pytest.fixture
def saved(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Tokenizer:
    tokenizer.save_pretrained(str(tmp_path / "tok"))
    return Tokenizer(path=str(tmp_path / "tok"))


def test_each_document_is_start_tokens_eos(tokenize: Tokenize, documents: Documents, saved: Tokenizer) -> None:
    shards = tokenize(documents, saved)
    encoder = Encoder(load_tokenizer(Path(saved.path)))
    for source in "ab":
        stream = Stream(shards.path / source, shards.vocab_size)
        rows = list(read_rows(documents.path / "train" / f"{source}.parquet"))
        expected = [[0, *ids, 1] for ids in encoder.encode_batch([row["content"] for row in rows])]
        bounds = zip(stream.offsets[:-1], stream.offsets[1:], strict=True)
        assert [stream.tokens[first:last].tolist() for first, last in bounds] == expected
        assert [i.tobytes().hex() for i in stream.ids] == [row["id"] for row in rows]
        assert shards.num_tokens[source] == len(stream.tokens) == sum(map(len, expected))
        assert shards.counts["documents"][source] == len(rows)
        assert stream.mask is None


def test_a_tokenizer_is_trained_on_the_training_side_alone(tokenize: Tokenize, documents: Documents) -> None:
    words = {row["content"].split()[1] for row in read_rows(documents.path / "heldout" / "a.parquet")}
    assert words
    shutil.rmtree(documents.path / "heldout")
    seen = list(module._contents(documents))
    assert len(seen) == documents.num_train
    assert not any(f"Line {word} of source a" in text for word in words for text in seen)


def test_the_trained_tokenizer_lies_beside_the_shards(tokenize: Tokenize, documents: Documents) -> None:
    shards = tokenize(documents, Tokenizer(vocab_size=320))
    loaded = load_tokenizer(shards.tokenizer_path)
    assert len(loaded) == shards.vocab_size <= 320
    assert loaded.chat_template


def test_tokenizing_again_gives_the_same_bytes(documents: Documents, tmp_path: Path) -> None:
    made = []
    for home in ("one", "two"):
        store = Store(tmp_path / home)
        shutil.copytree(documents.path, copy := store.root / "documents" / documents.path.name)
        step = shards_step("x", documents.fingerprint, Tokenizer(vocab_size=320), None, None)
        moved = documents.model_copy(update={"path": copy})
        made.append(tokenize_documents(step, moved, Tokenizer(vocab_size=320), None, store))
    for name in ("a/tokens.bin", "b/offsets.bin", "tokenizer/tokenizer.json"):
        assert (made[0].path / name).read_bytes() == (made[1].path / name).read_bytes()


def test_records_are_masked_packed_and_refused(tokenize: Tokenize, records: Documents, saved: Tokenizer) -> None:
    shards = tokenize(records, saved, seq_len=60)
    stream = Stream(shards.path / "qa", shards.vocab_size)
    assert shards.counts["refused"]["qa"]["too_long"] == 3
    assert shards.counts["documents"] == {"qa": 40}
    samples = open_samples(shards.path, "qa", form="records", vocab_size=shards.vocab_size, seq_len=60, pad_id=2)
    assert len(samples) == shards.counts["samples"]["qa"] < 40
    assert sum(int((samples.row(n).input_ids != 2).sum()) for n in range(len(samples))) == len(stream.tokens)
    ends = np.flatnonzero(np.diff(stream.mask.astype(int), append=0) == -1)
    assert stream.tokens[ends].tolist() == [1] * 40  # the loss ends with the eos of the response
    assert (ends == stream.offsets[1:] - 1).all()


def test_records_that_are_all_too_long_say_what_to_do(tokenize: Tokenize, records: Documents, saved: Tokenizer) -> None:
    with pytest.raises(
        DataError, match=r"qa: every record was refused \(43 longer than 9 tokens.*set train.seq_len higher"
    ):
        tokenize(records, saved, seq_len=9)


def test_damaged_documents_are_refused(tokenize: Tokenize, documents: Documents, saved: Tokenizer) -> None:
    path = documents.path / "train" / "a.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"train/a\.parquet is damaged"):
        tokenize(documents, saved)


# ---- identity


def fingerprint(tokenizer: Tokenizer | None = None, **changes: Any) -> str:
    given = {"name": "x", "documents": "d" * 64, "seq_len": None, "parent": None} | changes
    return shards_step(tokenizer=tokenizer, **given).fingerprint


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"tokenizer": Tokenizer(vocab_size=400)}, {"tokenizer": Tokenizer(vocab_size=401)}),
        ({"tokenizer": Tokenizer()}, {"tokenizer": None}),
        ({"documents": "d" * 64}, {"documents": "e" * 64}),
        ({"parent": "p" * 64}, {"parent": "q" * 64}),
        ({"seq_len": 8}, {"seq_len": 9}),
        ({"seq_len": None}, {"seq_len": 0}),
    ],
)
def test_what_decides_the_shards_is_identity(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert fingerprint(**one) != fingerprint(**other)


def test_a_loaded_tokenizers_identity_is_its_files(saved: Tokenizer, tmp_path: Path) -> None:
    before = fingerprint(saved)
    shutil.copytree(saved.path, tmp_path / "copy")
    copy = Tokenizer(path=str(tmp_path / "copy"), vocab_size=999)  # unused where a path is given
    assert fingerprint(copy) == before == fingerprint(saved, name="y")
    template = tmp_path / "copy" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert fingerprint(copy) != before


def test_a_tokenizer_folder_without_one_names_the_field(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.path: .* holds no tokenizer\.json"):
        fingerprint(Tokenizer(path=str(tmp_path)))


# ---- threads and memory


def test_any_number_of_threads_makes_the_same_shards(documents: Documents, saved: Tokenizer, tmp_path: Path) -> None:
    before = dict(os.environ)
    made = []
    for workers in (1, 2, 0):
        store = Store(tmp_path / f"threads{workers}")
        step = shards_step("x", documents.fingerprint, saved, None, None)
        made.append(tokenize_documents(step, documents, saved, None, store, workers=workers))
    assert len({(shards.path / "a" / "tokens.bin").read_bytes() for shards in made}) == 1
    assert dict(os.environ) == before


def test_long_documents_are_encoded_a_few_at_a_time() -> None:
    rows = [{"content": "x" * size} for size in (10, module.BATCH_CHARS, 5, 5)] + [{"content": "x"}] * 300
    assert [len(batch) for batch in module._batches(iter(rows))] == [2, 256, 46]


def test_a_tokenizer_is_trained_on_a_sample_of_bounded_size(
    documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = list(module._contents(documents))
    assert module.sample_share(documents, 320) == 1.0
    assert len(everything) == documents.num_train
    monkeypatch.setattr(module, "SAMPLE_BYTES_PER_ENTRY", sum(documents.counts["train_bytes"].values()) / 320 / 2)
    share = module.sample_share(documents, 320)
    assert share == pytest.approx(0.5)
    sample = list(module._contents(documents, share))
    assert 0.2 * len(everything) < len(sample) < 0.8 * len(everything)
    assert sample == list(module._contents(documents, share))
    assert set(sample) < set(everything)
