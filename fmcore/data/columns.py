"""Reads the rows of tables: Parquet files, and Hugging Face data sets on disk or on the hub."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from fmcore.artifacts.files import CHUNK_BYTES
from fmcore.data.files import open_stored
from fmcore.data.places import Bad, excerpt
from fmcore.errors import DataError
from fmcore.recipes.paths import is_hub_name, is_url

BATCH_BYTES = 4 << 20
BATCH_ROWS = 1_000
HF_BATCH_ROWS = 100  # their row sizes are not known before
COMMIT = re.compile(r"[0-9a-f]{40}")

Row = tuple[str, dict[str, Any] | Bad]


def parquet_rows(path: str, required: list[str], *, rest: bool) -> Iterator[Row]:
    """(`row N`, fields) for each row. rest: read the other columns of plain values as well."""
    with _seekable(path) as stored:
        try:
            file = pq.ParquetFile(stored, pre_buffer=False, buffer_size=CHUNK_BYTES)
        except (pa.ArrowException, OSError) as error:
            yield "", Bad("", "damaged_table", f"no Parquet file, or a damaged one: {_first_line(error)}", "")
            return
        columns, bad = _columns(file.schema_arrow, required, rest=rest)
        if bad:
            yield "", bad
            return
        yield from _numbered(_batches(file, columns))


def _batches(file: pq.ParquetFile, columns: list[str]) -> Iterator[Any]:
    """Row group by row group, so that a damaged one costs no row before it; few rows where rows are long."""
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        rows = BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)
        size = min(BATCH_ROWS, max(1, rows))
        yield from file.iter_batches(batch_size=size, row_groups=[group], columns=columns, use_threads=False)


def hf_rows(
    path: str, split: str, config_name: str, revision: str, required: list[str], *, rest: bool
) -> Iterator[Row]:
    """(`row N`, fields) for each row of a data set's split, batch by batch."""
    data = _load(path, split, config_name, revision)
    columns = None
    if data.features is not None:
        columns, bad = _columns(data.features.arrow_schema, required, rest=rest)
        if bad:
            yield "", bad
            return
    data = (data.select_columns(columns) if columns else data).with_format("arrow")
    yield from _numbered(data.iter(batch_size=HF_BATCH_ROWS))


def _numbered(batches: Iterator[Any]) -> Iterator[Row]:
    number = 0
    while True:
        try:
            batch = next(batches, None)
        except DataError:
            raise
        except Exception as error:  # of pyarrow, or whatever loader `datasets` has chosen
            place = f"row {number + 1}"
            yield place, Bad(place, "damaged_table", f"cannot be read on: {_first_line(error)}", "")
            return
        if batch is None:
            return
        for row in _rows(batch):
            number += 1
            place = f"row {number}"
            yield place, row if row is not None else Bad(place, "invalid_utf8", "not UTF-8", "")


def _rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch; None for one whose text is no UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


def _columns(schema: pa.Schema, required: list[str], *, rest: bool) -> tuple[list[str], Bad | None]:
    """Which columns to read, or why the table cannot be used."""
    there = excerpt(", ".join(schema.names) or "none", 300)
    plain = [field.name for field in schema if _is_plain(field.type)]
    for name in required:
        if name not in schema.names:
            return [], Bad("", "missing_field", f"there is no column {name!r}; columns here: {there}", "")
        if name not in plain:
            kind = schema.field(name).type
            return [], Bad("", "wrong_type", f"column {name!r} is {kind}, expected text; columns here: {there}", "")
    return (plain if rest else required), None


def _is_plain(kind: pa.DataType) -> bool:
    tests = (
        pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer,
        pa.types.is_floating, pa.types.is_boolean, pa.types.is_null,
    )  # fmt: skip
    if pa.types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    return any(test(kind) for test in tests)


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error  # `datasets` says what went wrong in the cause
    return excerpt((str(cause) or type(cause).__name__).strip().split("\n")[0])


@contextmanager
def _seekable(path: str) -> Iterator[BinaryIO]:
    """A table's file, to be read in any order; one at an address is copied to disk first."""
    with open_stored(path) as stored:
        if not is_url(path):
            yield stored
            return
        with tempfile.TemporaryFile() as copy:
            try:
                shutil.copyfileobj(stored, copy, CHUNK_BYTES)
            except Exception as error:  # each driver has exceptions of its own
                raise DataError(f"cannot read on in {path}: {error or type(error).__name__}") from error
            copy.seek(0)
            yield copy


# ---- Hugging Face data sets


def is_hub_path(path: str) -> bool:
    """Whether an hf path names a data set on the hub. Recipes, once read, name what lies here by absolute paths."""
    return not is_url(path) and is_hub_name(path)


def hub_commit(path: str, revision: str) -> str:
    """The commit that a revision of a data set on the hub stands for now. Raises DataError without a network."""
    if COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(path, revision=revision or None).sha)
    except Exception as error:  # of the hub, of its HTTP client, of the network
        raise DataError(
            f"{path}: no folder of that name lies here, and the Hugging Face hub does not tell its "
            f"{revision or 'newest'} revision: {_first_line(error)}. Give the path of a folder, or a full commit "
            f"as revision"
        ) from error


def _load(path: str, split: str, config_name: str, revision: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    folder = Path(path)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return _saved(datasets.load_from_disk(path), path, split)
        if is_hub_path(path):
            return datasets.load_dataset(path, config_name or None, split=split, revision=revision, streaming=True)
        base, pattern = (path, None) if folder.is_dir() else _base(path)
        return datasets.load_dataset(base, config_name or None, data_files=pattern, split=split, streaming=True)
    except DataError:
        raise
    except Exception as error:  # `datasets` raises whatever its loaders raise
        raise DataError(f"{path}: `datasets` cannot load it (split {split}): {_first_line(error)}") from error


def _saved(data: Any, path: str, split: str) -> Any:
    """The split of what save_to_disk wrote, which is one split or a mapping of them."""
    splits = dict(data) if isinstance(data, dict) else {str(data.split or "train"): data}
    if split in splits:
        return splits[split]
    raise DataError(f"{path}: there is no split {split!r}; splits here: {', '.join(splits)}. Set split")


def _base(path: str) -> tuple[str, str]:
    """A file or glob as (folder, pattern below it)."""
    parts = Path(path).parts
    first = next((n for n, part in enumerate(parts) if has_magic(part)), len(parts) - 1)
    return str(Path(*parts[:first])), str(Path(*parts[first:]))
