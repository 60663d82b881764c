"""Reads a file's bytes from start to end, gzip and zstd unpacked, within bounds of size and memory."""

import gzip
import io
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa

from fmcore.errors import DataError

CHUNK_BYTES = 64 * 1024
BOMB_BYTES = 64 << 20  # a file is given up when more than this came out of it ...
BOMB_RATIO = 100  # ... at more than so many times its size; text compresses 3 to 10 times
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# how files begin that hold no text, and what they are
FOREIGN = {
    b"PAR1": "a Parquet file: set format: parquet",
    b"ARROW1": "an Arrow file: for a data set of `datasets`, set format: hf and give its folder",
    b"PK\x03\x04": "a zip archive (or an office document): unpack it first",
    b"BZh": "compressed by bzip2: unpack it, or compress it with gzip or zstd",
    b"\xfd7zXZ": "compressed by xz: unpack it, or compress it with gzip or zstd",
    b"%PDF-": "a PDF: extract its text first",
    b"SQLite format 3": "an SQLite database: export its texts first",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"\xff\xfe": "UTF-16 text: convert it to UTF-8 first",
    b"\xfe\xff": "UTF-16 text: convert it to UTF-8 first",
}


class BrokenFile(Exception):
    """A file that cannot be read on from `byte` of its unpacked content.

    reason: its code in quarantine.parquet; detail: the reason in words.
    """

    def __init__(self, reason: str, detail: str, byte: int) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.byte = byte


class Unpacked:
    """The unpacked bytes of a file. Raises BrokenFile where it is damaged, cut short or a bomb."""

    def __init__(self, stored: BinaryIO, path: str) -> None:
        self._stored = _Counted(stored, path)
        self.head = self._stored.peek(16)
        self.byte = 0  # how many came out
        self._packed = self.head.startswith((GZIP, ZSTD))
        self._stream: Any = self._stored
        if self.head.startswith(GZIP):
            self._stream = gzip.GzipFile(fileobj=self._stored)
        elif self.head.startswith(ZSTD):
            # unlike zstandard's own reader, pyarrow's says so when a file is cut short
            self._stream = pa.CompressedInputStream(self._stored, "zstd")
        elif self.head and path.partition("?")[0].endswith((".gz", ".zst")):
            self._stream = None

    def __iter__(self) -> Iterator[bytes]:
        """The bytes, up to 64 KiB at a time.

        Chunks that came out of suspiciously little are held back until more was taken in, or it is a bomb: what
        follows here is slower than unpacking by far.
        """
        held: list[bytes] = []
        byte = count = 0
        try:
            while chunk := self._read():
                held.append(chunk)
                self.byte += len(chunk)
                came, taken = self.byte - byte, self._stored.count - count
                if not self._packed or came <= BOMB_RATIO * taken:
                    yield from held
                    held.clear()
                    byte, count = self.byte, self._stored.count
                elif came > BOMB_BYTES:
                    held.clear()
                    detail = f"{came >> 20} MiB came out of {taken >> 10} KiB: a decompression bomb"
                    raise BrokenFile("decompression_bomb", detail, byte)
        except BrokenFile:
            yield from held
            raise
        yield from held

    def _read(self) -> bytes:
        if self._stream is None:
            raise BrokenFile("damaged_archive", "the name says compressed, the bytes are not", 0)
        try:
            chunk: bytes = self._stream.read1(CHUNK_BYTES) if self._reads_singly() else self._stream.read(CHUNK_BYTES)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise self._damaged(error) from error
        except OSError as error:  # pyarrow's, about the compressed bytes; a failing disk is a DataError
            raise self._damaged(error) from error
        return chunk

    def _reads_singly(self) -> bool:
        # what came out before the damage is kept: a full read would lose it
        return isinstance(self._stream, gzip.GzipFile)

    def _damaged(self, error: Exception) -> BrokenFile:
        return BrokenFile("damaged_archive", f"the compressed file is damaged or cut short: {error}", self.byte)

    def close(self) -> None:
        """Close the file."""
        self._stored.close()

    def __enter__(self) -> "Unpacked":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Counted(io.RawIOBase):
    """A stored file, and how many of its bytes were taken."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file = file
        self._path = path
        self._ahead = b""
        self.count = 0

    def peek(self, size: int) -> bytes:
        """The first bytes, which stay to be read."""
        while len(self._ahead) < size and (more := self._take(size - len(self._ahead))):
            self._ahead += more
        return self._ahead

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self._ahead:
            size = size if size >= 0 else len(self._ahead)
            data, self._ahead = self._ahead[:size], self._ahead[size:]
        else:
            data = self._take(size)
        self.count += len(data)
        return data

    def _take(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:  # a disk or a server that fails; each driver has exceptions of its own
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DataError(f"cannot read on in {self._path}: {why}") from error

    def close(self) -> None:
        self._file.close()
        super().close()
