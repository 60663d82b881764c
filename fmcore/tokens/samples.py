"""Samples: fixed-length rows of a source's stream, ready for the model.

Text: sample i is tokens [i*S, i*S + S] of the stream. Records: sample i is bin i of the packing plan.
Documents that share a row are kept apart by position ids that start again at 0; no attention mask is made,
since transformers isolates packed documents only without one.
"""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from fmcore.tokens.packing import INDEX_TYPE
from fmcore.tokens.shards import Stream, map_array

IGNORE = -100  # torch's label for "not in the loss"


class Row(NamedTuple):
    """One sample: (S,) int64 each. labels hold the next token, or IGNORE."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray


def filler(seq_len: int, pad_id: int) -> Row:
    """A row of padding alone, without a label."""
    return Row(np.full(seq_len, pad_id), np.full(seq_len, IGNORE), np.arange(seq_len))


class Samples(Protocol):
    """Numbered samples of one source."""

    stream: Stream

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row:
        """The sample's tokens, labels and positions."""

    def documents(self, indices: np.ndarray) -> np.ndarray:
        """(D,) bool: which documents have a token in these samples."""


class TextSamples:
    """Windows of S tokens over the stream; the last one is padded."""

    def __init__(self, stream: Stream, seq_len: int, pad_id: int) -> None:
        self.stream = stream
        self._seq_len = seq_len
        self._pad_id = pad_id

    def __len__(self) -> int:
        return num_windows(len(self.stream.tokens), self._seq_len)

    def row(self, index: int) -> Row:
        """The window's tokens, labels and positions."""
        first = index * self._seq_len
        tokens = self.stream.tokens[first : first + self._seq_len + 1].astype(np.int64)
        offsets = self.stream.offsets
        begin = np.searchsorted(offsets, first, side="right")
        end = np.searchsorted(offsets, first + len(tokens), side="left")
        starts = offsets[begin:end] - first  # documents that begin inside the window
        labels = tokens[1:].copy()
        labels[starts - 1] = IGNORE  # what follows an end of document is another document
        return _padded(tokens[: len(labels)], labels, starts[starts < len(labels)], self._seq_len, self._pad_id)

    def documents(self, indices: np.ndarray) -> np.ndarray:
        """(D,) bool: which documents have a token in these windows."""
        first = indices * self._seq_len
        last = np.minimum(first + self._seq_len, len(self.stream.tokens)) - 1
        begin = np.searchsorted(self.stream.offsets, first, side="right") - 1
        end = np.searchsorted(self.stream.offsets, last, side="right") - 1
        changes = np.zeros(len(self.stream.ids) + 1, dtype=np.int64)
        np.add.at(changes, begin, 1)
        np.add.at(changes, end + 1, -1)
        return np.cumsum(changes)[:-1] > 0


class RecordSamples:
    """Bins of whole records, with the loss on the masked tokens alone."""

    def __init__(self, folder: Path, stream: Stream, seq_len: int, pad_id: int) -> None:
        self.stream = stream
        self._seq_len = seq_len
        self._pad_id = pad_id
        self._bins = map_array(folder / "plan_offsets.bin", INDEX_TYPE)
        self._records = map_array(folder / "plan_records.bin", INDEX_TYPE)

    def __len__(self) -> int:
        return len(self._bins) - 1

    def row(self, index: int) -> Row:
        """The bin's records side by side."""
        assert self.stream.mask is not None
        tokens: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        starts: list[int] = []
        for record in self._records[self._bins[index] : self._bins[index + 1]]:
            first, last = self.stream.offsets[record], self.stream.offsets[record + 1]
            ids = self.stream.tokens[first:last].astype(np.int64)
            masked = np.where(self.stream.mask[first:last] > 0, ids, IGNORE)
            starts.append(sum(len(part) for part in tokens))
            tokens.append(ids)
            labels.append(np.append(masked[1:], IGNORE))
        rows = np.concatenate(tokens), np.concatenate(labels)
        return _padded(*rows, np.array(starts[1:], dtype=np.int64), self._seq_len, self._pad_id)

    def documents(self, indices: np.ndarray) -> np.ndarray:
        """(D,) bool: which records are in these bins."""
        first = self._bins[indices].astype(np.int64)
        sizes = self._bins[indices + 1].astype(np.int64) - first
        before = np.cumsum(sizes) - sizes  # records in the bins before
        places = np.repeat(first - before, sizes) + np.arange(sizes.sum())
        seen = np.zeros(len(self.stream.ids), dtype=bool)
        seen[self._records[places]] = True
        return seen


def num_windows(num_tokens: int, seq_len: int) -> int:
    """Windows that cover a stream, so that every token but the first is predicted once."""
    return max(0, -(-(num_tokens - 1) // seq_len))


def open_samples(shards: Path, source: str, *, form: str, vocab_size: int, seq_len: int, pad_id: int) -> Samples:
    """The samples of one source of a shards artifact."""
    stream = Stream(shards / source, vocab_size)
    if form == "records":
        return RecordSamples(shards / source, stream, seq_len, pad_id)
    return TextSamples(stream, seq_len, pad_id)


def _padded(tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray, seq_len: int, pad_id: int) -> Row:
    """Fill up to seq_len; starts: where further documents begin. Padding is a document of its own."""
    missing = seq_len - len(tokens)
    if missing:
        starts = np.append(starts, len(tokens))
        tokens = np.append(tokens, np.full(missing, pad_id))
        labels = np.append(labels, np.full(missing, IGNORE))
    segment = np.zeros(seq_len, dtype=np.int64)
    segment[starts] = starts
    positions = np.arange(seq_len) - np.maximum.accumulate(segment)
    return Row(tokens, labels, positions)
