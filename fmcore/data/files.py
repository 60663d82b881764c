"""Finds the files behind a source's path and opens them, compressed or not."""

import glob
import gzip
import io
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from fmcore.artifacts.files import DigestCache
from fmcore.errors import DataError


def find_files(path: str, *, field: str) -> list[Path]:
    """Files behind a file, folder or glob, sorted by path; hidden ones are left out.

    field: the recipe field that named it, for the message. Raises DataError where there is nothing.
    """
    root = Path(path)
    if root.is_file():
        return [root]
    if root.is_dir():
        files = [p for p in sorted(root.rglob("*")) if p.is_file() and not _hidden(p.relative_to(root))]
        if not files:
            raise DataError(f"{field}: the folder {path} holds no files")
        return files
    files = sorted(Path(p) for p in glob.glob(path, recursive=True) if Path(p).is_file())  # noqa: PTH207
    if not files:
        what = "no file matches" if glob.has_magic(path) else "there is no file or folder"
        raise DataError(f"{field}: {what} {path}; relative paths are read from the recipe's folder")
    return files


def files_by_digest(path: str, name: str, digests: DigestCache) -> list[tuple[str, Path]]:
    """(sha256, file) of a source's files in the order of their digests, so that names decide nothing."""
    return sorted((digests.sha256(file), file) for file in find_files(path, field=f"source {name}"))


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading; .gz and .zst are decompressed as they are read."""
    try:
        if path.suffix == ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        if path.suffix == ".zst":
            # unlike zstandard's own reader, pyarrow's says so when a file is cut short
            return cast(BinaryIO, pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
        return path.open("rb")
    except OSError as error:
        raise DataError(f"cannot open {path}: {error.strerror}") from error


def open_text(path: Path) -> io.TextIOWrapper:
    """Open a UTF-8 file as text; a byte-order mark is skipped, line ends become \\n."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="strict", newline=None)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
