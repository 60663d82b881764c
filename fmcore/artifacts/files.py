"""Durable files and their digests: atomic writes, flushes to disk, sha256 with a cache."""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value that is hashed: sorted keys, no blanks, UTF-8 as it is."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_text(text: str) -> str:
    """Hex sha256 of the text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and the folder itself."""
    for path in sorted(folder.rglob("*")):
        fsync_path(path)
    fsync_path(folder)


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, flush, rename: a reader sees the old file or the new one.

    The temporary name is the process's own, since two may write one file; the last one wins.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(as_json(value))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_path(path.parent)


def as_json(value: Any) -> str:
    """The text of a JSON file of ours."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Parse a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


class DigestCache:
    """Remembers a file's sha256 by path, size and mtime, so that a second look costs a stat.

    What lies behind an address is remembered by a stamp its server gives, such as an ETag.
    `rehash=True` mistrusts what is remembered and reads every file again.
    """

    def __init__(self, path: Path, *, rehash: bool = False) -> None:
        self._path = path
        self._learnt: dict[str, list[Any]] = {}
        self._entries: dict[str, list[Any]] = {} if rehash else self._read()

    def _read(self) -> dict[str, list[Any]]:
        try:
            return dict(read_json(self._path))
        except (OSError, ValueError):
            return {}  # without a cache we are only slower, never wrong

    def sha256(self, path: Path) -> str:
        """The file's digest, from the cache where size and mtime still match."""
        stat = path.stat()
        return self.remembered(str(path), [stat.st_size, stat.st_mtime_ns], lambda: sha256_file(path))

    def remembered(self, key: str, stamp: list[Any], read: Callable[[], str]) -> str:
        """The digest known for `key` while its stamp is the same, else what `read` returns.

        What has no stamp is read every time.
        """
        known = self._entries.get(key)
        if stamp and known and known[:-1] == stamp:
            return str(known[-1])
        digest = read()
        if stamp:
            self._entries[key] = self._learnt[key] = [*stamp, digest]
        return digest

    def save(self) -> None:
        """Keep what was learnt for the next process."""
        if self._learnt:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, {**self._read(), **self._learnt})
            self._learnt = {}

    def prune(self) -> int:
        """Forget local files that are gone; returns how many."""
        known = self._read()
        kept = {path: entry for path, entry in known.items() if "://" in path or Path(path).exists()}
        if len(kept) < len(known):
            write_json(self._path, kept)
        return len(known) - len(kept)
