"""From a source in a recipe to its identity and the shards to read: files, or a Hugging Face data set."""

import json
from collections.abc import Iterator
from contextlib import suppress
from glob import has_magic
from pathlib import Path
from typing import Any

from fmcore.artifacts.files import DigestCache
from fmcore.data.columns import hub_commit, is_hub_path
from fmcore.data.files import SUFFIXES, SourceFile, files_by_digest, find_files, of_format, open_bytes
from fmcore.data.units import Shard
from fmcore.data.unpacking import BrokenFile
from fmcore.errors import DataError
from fmcore.recipes.fields import Filters, Source, Task, TaskData, TextData
from fmcore.recipes.paths import is_url

MAX_NAMED = 6
HF_FIELDS = {"split", "config_name"}


def settings_identity(block: Source | Task) -> dict[str, Any]:
    """What of a source's settings decides its documents; paths count by their digests, weights in training."""
    outside = {"path", "eval_path", "weight", "max_epochs", "revision"}
    return block.model_dump(exclude=outside if block.format == "hf" else outside | HF_FIELDS)


def data_identity(block: Source | Task, path: str, digests: DigestCache) -> list[str]:
    """The digests of the files behind a path, sorted; for a data set on the hub its commit."""
    if _is_hub(block, path):
        return [hub_commit(path, block.revision)]
    return [digest for digest, _ in files_by_digest(path, block.name, digests, block.format)]


def shards_of(block: Source | Task, path: str, digests: DigestCache, filters: Filters | None = None) -> list[Shard]:
    """What is read one after the other, in an order that follows from the bytes."""
    if _is_hub(block, path):
        pinned = block.model_copy(update={"revision": hub_commit(path, block.revision)})
        return [Shard(pinned, path, None, filters)]
    if block.format == "hf":
        return [Shard(block, path, total_bytes(block), filters)]
    files = [file for _, file in files_by_digest(path, block.name, digests, block.format)]
    if block.format == "text":
        _refuse_json(block, files)
    return [Shard(block, file.path, file.size, filters) for file in files]


def total_bytes(block: Source | Task) -> int:
    """Bytes of a source's files as they are stored; 0 where that is not known."""
    return sum(file.size or 0 for file in source_files(block))


def source_files(block: Source | Task) -> list[SourceFile]:
    """The files of a source or task; none for a data set on the hub."""
    if _is_hub(block, block.path):
        return []
    return find_files(block.path, field=f"source {block.name}", format=block.format)


def left_out_notes(data: TextData | TaskData) -> Iterator[str]:
    """What lies in the folders of sources and is not read, for its name is not that of the format."""
    blocks = data.tasks if isinstance(data, TaskData) else [*data.sources, *data.eval_sources]
    for block in blocks:
        for path in filter(None, (block.path, getattr(block, "eval_path", ""))):
            if others := _left_out(block, path):
                yield (
                    f"{block.name}: left out of {path}, for their names are not those of {block.format}: "
                    f"{names_of(others)}. A glob takes all that it matches"
                )


def _left_out(block: Source | Task, path: str) -> list[SourceFile]:
    if block.format == "hf" or has_magic(path) or path.lower().startswith(("http://", "https://")):
        return []
    with suppress(DataError):  # its files were there a moment ago, and a note ends no run
        return of_format(find_files(path, field=f"source {block.name}"), block.format)[1]
    return []


def names_of(files: list[SourceFile]) -> str:
    """The names of the first few, for a message."""
    more = f" and {len(files) - MAX_NAMED:,} more" if len(files) > MAX_NAMED else ""
    return ", ".join(Path(file.path).name for file in files[:MAX_NAMED]) + more


def _is_hub(block: Source | Task, path: str) -> bool:
    if block.format != "hf":
        return False
    if is_url(path):
        raise DataError(
            f"source {block.name}: format hf reads a local folder or a name on the hub, given {path}; for files at an "
            f"address set format: parquet or json"
        )
    return is_hub_path(path)


def _refuse_json(block: Source | Task, files: list[SourceFile]) -> None:
    """A source of nothing but JSON files that is read as plain text is a mistake."""
    names = (file.path.partition("?")[0].removesuffix(".gz").removesuffix(".zst") for file in files)
    if all(name.endswith(SUFFIXES["json"]) for name in names) and _holds_objects(files[0]):
        raise DataError(
            f"source {block.name}: its files hold JSON objects ({files[0]}), and format is text: set format: json and "
            f"text_field. To train on the JSON itself, name the files .txt"
        )


def _holds_objects(file: SourceFile) -> bool:
    with open_bytes(file) as stored:
        try:
            start = next(iter(stored), b"").decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
        except BrokenFile:
            return False
    if start.startswith("["):
        return start[1:].lstrip().startswith("{")
    try:
        return isinstance(json.loads(start.split("\n")[0]), dict)
    except (ValueError, RecursionError):
        return False
