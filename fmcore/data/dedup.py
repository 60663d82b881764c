"""Exact deduplication with flat memory: the ids seen so far live in a temporary SQLite table."""

import sqlite3
from pathlib import Path
from types import TracebackType


class SeenIds:
    """A set of document ids on disk; memory stays flat as the corpus grows.

    SQLite keeps a page cache of fixed size; the file is removed when the context ends.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("PRAGMA synchronous=OFF")  # the table is rebuilt, never recovered
        self._db.execute("CREATE TABLE ids (id BLOB PRIMARY KEY) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def add(self, document_id: str) -> bool:
        """Remember an id (hex); False if it was there already."""
        cursor = self._db.execute("INSERT OR IGNORE INTO ids VALUES (?)", (bytes.fromhex(document_id),))
        return cursor.rowcount == 1

    def __contains__(self, document_id: str) -> bool:
        row = self._db.execute("SELECT 1 FROM ids WHERE id = ?", (bytes.fromhex(document_id),)).fetchone()
        return row is not None

    def __enter__(self) -> "SeenIds":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()
        self._path.unlink()
