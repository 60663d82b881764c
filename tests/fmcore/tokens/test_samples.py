"""Samples: every token predicted once, documents apart, and what a sample shows known from its number."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmcore.tokens.packing import pack_best_fit, write_plan
from fmcore.tokens.samples import IGNORE, RecordSamples, TextSamples, num_windows, open_samples
from fmcore.tokens.shards import Stream, StreamWriter, token_type

PAD = 0
SEQ_LEN = 8
DOCUMENTS = st.lists(st.integers(2, 25), min_size=1, max_size=8)  # start id and eos at least


def write(folder: Path, lengths: list[int], *, vocab_size: int = 1000, masked: bool = False) -> Stream:
    """Documents whose tokens count up from 1, so that each token tells its place in the stream.

    With a mask, the last third of each record is in the loss.
    """
    with StreamWriter(folder, vocab_size, masked=masked) as writer:
        first = 1
        for number, length in enumerate(lengths):
            mask = [place >= length - max(1, length // 3) for place in range(length)] if masked else None
            writer.add(f"{number:032x}", list(range(first, first + length)), mask)
            first += length
    return Stream(folder, vocab_size)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stream")


# ---- shards


@pytest.mark.parametrize(("vocab_size", "width"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_tokens_take_two_bytes_while_every_id_fits(tmp_path: Path, vocab_size: int, width: int) -> None:
    assert np.dtype(token_type(vocab_size)).itemsize == width
    with StreamWriter(tmp_path, vocab_size, masked=False) as writer:
        writer.add("00" * 16, [0, vocab_size - 1])
    assert Stream(tmp_path, vocab_size).tokens.tolist() == [0, vocab_size - 1]
    assert (tmp_path / "tokens.bin").stat().st_size == 2 * width


def test_a_stream_comes_back(tmp_path: Path) -> None:
    documents = {"00" * 16: ([5, 6, 7], [0, 1, 1]), "ff" * 16: ([8], [1])}
    with StreamWriter(tmp_path / "new" / "folder", 300, masked=True) as writer:
        for document_id, (tokens, mask) in documents.items():
            writer.add(document_id, tokens, mask)
    assert (writer.num_documents, writer.num_tokens) == (2, 4)
    stream = Stream(tmp_path / "new" / "folder", 300)
    assert stream.tokens.tolist() == [5, 6, 7, 8]
    assert stream.offsets.tolist() == [0, 3, 4]
    assert [i.tobytes().hex() for i in stream.ids] == list(documents)
    assert stream.mask.tolist() == [0, 1, 1, 1]


def test_an_empty_stream(tmp_path: Path) -> None:
    stream = write(tmp_path, [])
    assert (len(stream.tokens), stream.offsets.tolist(), len(stream.ids), stream.mask) == (0, [0], 0, None)
    assert len(TextSamples(stream, SEQ_LEN, PAD)) == 0
    assert TextSamples(stream, SEQ_LEN, PAD).documents(np.array([], dtype=np.int64)).tolist() == []


# ---- text


@settings(max_examples=60, deadline=None)
@given(lengths=DOCUMENTS)
def test_every_token_but_a_documents_first_is_a_label_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    samples = TextSamples(write(tmp_path_factory.mktemp("s"), lengths), SEQ_LEN, PAD)
    rows = [samples.row(index) for index in range(len(samples))]
    labels = [int(label) for row in rows for label in row.labels if label != IGNORE]
    starts = np.cumsum([1, *lengths[:-1]])
    assert labels == sorted(set(range(1, sum(lengths) + 1)) - set(starts.tolist()))
    for row in rows:
        real = row.labels != IGNORE
        assert (row.labels[real] == row.input_ids[real] + 1).all()  # the next token, and never another's


@settings(max_examples=60, deadline=None)
@given(lengths=DOCUMENTS)
def test_positions_restart_with_documents_and_with_padding(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    samples = TextSamples(write(tmp_path_factory.mktemp("s"), lengths), SEQ_LEN, PAD)
    starts = set(np.cumsum([1, *lengths[:-1]]).tolist())
    for row in map(samples.row, range(len(samples))):
        expected: list[int] = []
        for place, token in enumerate(row.input_ids.tolist()):
            fresh = place == 0 or token in starts or (token == PAD and row.input_ids[place - 1] != PAD)
            expected.append(0 if fresh else expected[-1] + 1)
        assert row.position_ids.tolist() == expected
        assert [len(column) for column in row] == [SEQ_LEN] * 3
        assert {column.dtype for column in row} == {np.dtype(np.int64)}


def test_rows_by_hand(folder: Path) -> None:
    samples = TextSamples(write(folder, [5, 6, 3]), SEQ_LEN, PAD)
    assert len(samples) == 2
    first, last = samples.row(0), samples.row(1)
    assert first.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert first.labels.tolist() == [2, 3, 4, 5, IGNORE, 7, 8, 9]
    assert first.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert last.input_ids.tolist() == [9, 10, 11, 12, 13, PAD, PAD, PAD]
    assert last.labels.tolist() == [10, 11, IGNORE, 13, 14, IGNORE, IGNORE, IGNORE]
    assert last.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]


def test_a_document_that_begins_where_a_window_does(folder: Path) -> None:
    first, second = map(TextSamples(write(folder, [8, 9]), SEQ_LEN, PAD).row, range(2))
    assert first.labels.tolist() == [2, 3, 4, 5, 6, 7, 8, IGNORE]
    assert second.labels.tolist() == [10, 11, 12, 13, 14, 15, 16, 17]


@pytest.mark.parametrize(("num_tokens", "windows"), [(0, 0), (1, 0), (2, 1), (9, 1), (10, 2), (17, 2), (18, 3)])
def test_the_number_of_windows(num_tokens: int, windows: int) -> None:
    assert num_windows(num_tokens, 8) == windows


@settings(max_examples=80, deadline=None)
@given(lengths=DOCUMENTS, data=st.data())
def test_which_documents_samples_show(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], data: st.DataObject
) -> None:
    stream = write(tmp_path_factory.mktemp("s"), lengths)
    samples = TextSamples(stream, SEQ_LEN, PAD)
    numbers = st.lists(st.integers(0, max(0, len(samples) - 1)), unique=True, max_size=len(samples))
    indices = np.array(data.draw(numbers), dtype=np.int64)
    shown = {token for index in indices for token in (*samples.row(index).input_ids, *samples.row(index).labels)}
    bounds = zip(stream.offsets[:-1], stream.offsets[1:], strict=True)
    expected = [any(token + 1 in shown for token in range(first, last)) for first, last in bounds]
    assert samples.documents(indices).tolist() == expected


# ---- records


def records(folder: Path, lengths: list[int]) -> tuple[Stream, RecordSamples]:
    stream = write(folder, lengths, masked=True)
    write_plan(folder, pack_best_fit(np.array(lengths), SEQ_LEN))
    return stream, RecordSamples(folder, stream, SEQ_LEN, PAD)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, SEQ_LEN), min_size=1, max_size=10))
def test_every_masked_token_of_every_record_is_a_label_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    stream, samples = records(tmp_path_factory.mktemp("r"), lengths)
    rows = [samples.row(index) for index in range(len(samples))]
    masked = (np.flatnonzero(stream.mask) + 1).tolist()
    assert sorted(int(label) for row in rows for label in row.labels if label != IGNORE) == masked
    for row in rows:
        real = row.labels != IGNORE
        assert (row.labels[real] == row.input_ids[real] + 1).all()
    shown = sorted(int(token) for row in rows for token in row.input_ids if token != PAD)
    assert shown == list(range(1, sum(lengths) + 1))


def test_records_of_a_row_are_kept_apart(folder: Path) -> None:
    _, samples = records(folder, [4, 3])
    (row,) = map(samples.row, range(len(samples)))
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, PAD]
    assert row.labels.tolist() == [IGNORE, IGNORE, 4, IGNORE, IGNORE, 7, IGNORE, IGNORE]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]


def test_which_records_samples_show(folder: Path) -> None:
    _, samples = records(folder, [8, 5, 3, 7])
    assert len(samples) == 3
    for index in range(3):
        shown = samples.documents(np.array([index]))
        firsts = np.array([1, 9, 14, 17])
        assert shown.tolist() == np.isin(firsts, samples.row(index).input_ids).tolist()
    assert samples.documents(np.arange(3)).all()


def test_open_samples_takes_the_shards_form(tmp_path: Path) -> None:
    records(tmp_path / "qa", [4, 3])
    options = {"vocab_size": 1000, "seq_len": SEQ_LEN, "pad_id": PAD}
    assert isinstance(open_samples(tmp_path, "qa", form="records", **options), RecordSamples)
    assert isinstance(open_samples(tmp_path, "qa", form="text", **options), TextSamples)
