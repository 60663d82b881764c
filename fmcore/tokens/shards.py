"""Token shards on disk: one stream of ids per source, document boundaries, document ids, loss mask.

<source>/tokens.bin   (T,) uint16 or uint32, each document as start id, tokens, eos
<source>/offsets.bin  (D + 1,) uint64, where each document starts
<source>/ids.bin      (D,) 16 bytes, the documents' ids
<source>/mask.bin     (T,) uint8, records only: 1 where the token belongs to the loss
<source>/plan_*.bin   records only: which documents share a sample (see packing.py)
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from fmcore.data.ledger import ID_TYPE

OFFSET_TYPE = np.uint64


def token_type(vocab_size: int) -> type[np.unsignedinteger]:
    """uint16 where every id fits, else uint32."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


class StreamWriter:
    """Appends documents to one source's stream; memory stays flat."""

    def __init__(self, folder: Path, vocab_size: int, *, masked: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._type = token_type(vocab_size)
        self._tokens = (folder / "tokens.bin").open("wb")
        self._offsets = (folder / "offsets.bin").open("wb")
        self._ids = (folder / "ids.bin").open("wb")
        self._mask = (folder / "mask.bin").open("wb") if masked else None
        self.num_tokens = 0
        self.num_documents = 0

    def add(self, document_id: str, tokens: Sequence[int], mask: Sequence[bool] | None = None) -> None:
        """Append one document, special tokens included."""
        self._offsets.write(OFFSET_TYPE(self.num_tokens).tobytes())
        self._tokens.write(np.asarray(tokens, dtype=self._type).tobytes())
        self._ids.write(bytes.fromhex(document_id))
        if self._mask:
            self._mask.write(np.asarray(mask, dtype=np.uint8).tobytes())
        self.num_tokens += len(tokens)
        self.num_documents += 1

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._offsets.write(OFFSET_TYPE(self.num_tokens).tobytes())
        for file in (self._tokens, self._offsets, self._ids, self._mask):
            if file:
                file.close()


def map_array(path: Path, dtype: np.dtype | type) -> np.ndarray:
    """Memory-map a flat array; an empty file is an empty array."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


class Stream:
    """One source's stream, memory-mapped."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.tokens = map_array(folder / "tokens.bin", token_type(vocab_size))
        self.offsets = map_array(folder / "offsets.bin", OFFSET_TYPE).view(np.int64)  # no copy, however many there are
        self.ids = map_array(folder / "ids.bin", ID_TYPE)
        mask = folder / "mask.bin"
        self.mask = map_array(mask, np.uint8) if mask.exists() else None
