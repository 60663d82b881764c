"""Documents and records on disk: Parquet tables, written and read in batches."""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BATCH_ROWS = 1_000
BATCH_CHARS = 4_000_000

DOCUMENTS = pa.schema(
    [("id", pa.string()), ("source", pa.string()), ("modality", pa.string()), ("content", pa.string()),
     ("metadata", pa.string())]
)  # fmt: skip
RECORDS = pa.schema(
    [("id", pa.string()), ("source", pa.string()), ("modality", pa.string()), ("prompt", pa.string()),
     ("response", pa.string()), ("metadata", pa.string())]
)  # fmt: skip
DROPPED = pa.schema(
    [("source", pa.string()), ("origin", pa.string()), ("reason", pa.string()), ("content", pa.string())]
)
# line: `12`, `[3]` of a list, `row 7` of a table, `byte 9000` of a file that cannot be read on; empty = all of it
QUARANTINE = pa.schema(
    [("source", pa.string()), ("file", pa.string()), ("line", pa.string()), ("reason", pa.string()),
     ("detail", pa.string()), ("excerpt", pa.string())]
)  # fmt: skip


class TableWriter:
    """Appends rows to one Parquet file, a row group per batch, so that memory stays flat."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []
        self._chars = 0
        self.num_rows = 0

    def add(self, **row: str) -> None:
        """Append one row."""
        self._rows.append(row)
        self._chars += sum(map(len, row.values()))
        self.num_rows += 1
        if len(self._rows) >= BATCH_ROWS or self._chars >= BATCH_CHARS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows, self._chars = [], 0

    def close(self) -> None:
        """Write what is left and end the file."""
        self._flush()
        self._writer.close()

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_rows(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a table, one row group in memory at a time."""
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for group in range(file.num_row_groups):
            yield from file.read_row_group(group, columns=columns, use_threads=False).to_pylist()
