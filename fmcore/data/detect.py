"""Which files lie behind a path that has no recipe yet, and of which format they are, by names and first bytes."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path

from fmcore.data.files import COMPRESSED, SourceFile, find_files, of_format, open_bytes
from fmcore.data.sources import names_of
from fmcore.data.unpacking import BrokenFile
from fmcore.errors import DataError

SNIFFED_BYTES = 4096
ASSUMED_COMPRESSION = 4  # of text by gzip or zstd, where a file is too long to be read to its end
FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".arrow": "hf"}
HF_MARKERS = ("state.json", "dataset_info.json", "dataset_dict.json")  # what save_to_disk writes beside the data


@dataclass(frozen=True)
class DataFiles:
    """The files of one format behind a path. path: as a recipe would give it; left_out: other files that lie there.

    split: of a folder that holds several (hf).
    """

    path: str
    format: str
    files: tuple[SourceFile, ...]
    left_out: tuple[str, ...] = ()
    split: str = ""


def data_files(path: str) -> DataFiles:
    """The files behind a path, of the format that most of their bytes have. Raises DataError where none is text."""
    files = find_files(path, field="--data")
    if _is_saved_dataset(path):
        return _saved_dataset(path, files)
    groups: dict[str, list[SourceFile]] = {}
    for file in files:
        groups.setdefault(format_of(file), []).append(file)
    chosen = max(groups, key=lambda name: sum(map(file_size, groups[name])))
    if chosen == "binary":
        raise DataError(
            f"--data {path}: {names_of(groups[chosen])} holds no text; expected text, JSON lines or a JSON list, "
            f"Parquet, or a folder that datasets' save_to_disk wrote (.gz and .zst are read as they are)"
        )
    kept = groups[chosen] if has_magic(path) else of_format(groups[chosen], chosen)[0]
    taken = {file.path for file in kept}
    others = [file for file in files if file.path not in taken]
    as_a_folder = files if has_magic(path) else of_format(files, chosen)[0]  # what a recipe with this path would read
    alone = _path_of(path, kept, is_the_folder=as_a_folder == kept) if others else path
    return DataFiles(alone, chosen, tuple(kept), tuple(map(_name, others)))


def _is_saved_dataset(path: str) -> bool:
    folder = Path(path)
    marked = folder.is_dir() and any((folder / name).is_file() for name in HF_MARKERS)
    return marked and any(folder.rglob("*.arrow"))


def _saved_dataset(path: str, files: list[SourceFile]) -> DataFiles:
    arrows = [file for file in files if str(file).endswith(".arrow")]
    splits = {Path(str(file)).relative_to(path).parts[0] for file in arrows if Path(str(file)).parent != Path(path)}
    split = "train" if "train" in splits else min(splits, default="")
    chosen = tuple(file for file in arrows if not split or Path(str(file)).relative_to(path).parts[0] == split)
    return DataFiles(path, "hf", chosen, tuple(sorted(splits - {split})), split)


def _path_of(path: str, files: list[SourceFile], *, is_the_folder: bool) -> str:
    """A path for some of the files below `path` alone: one file, or a glob by their suffix.

    is_the_folder: they are what the folder stands for in a recipe, whatever their suffixes.
    """
    if len(files) == 1:
        return str(files[0])
    folder = Path(path)
    endings = {"".join(Path(str(file)).suffixes[-2:]) for file in files}
    if len(endings) > 1 and is_the_folder:
        return path
    if not folder.is_dir() or len(endings) > 1:
        raise DataError(
            f"--data {path}: files of several formats lie there; give those of one format, as in {path}/*.jsonl.gz"
        )
    nested = any(Path(str(file)).parent != folder for file in files)
    return str(folder / ("**" if nested else "") / f"*{endings.pop()}")


def format_of(file: SourceFile) -> str:
    """text, json, parquet, hf (an Arrow file) or binary, by the name, else by the first bytes."""
    suffixes = [s for s in Path(str(file)).suffixes if s not in COMPRESSED]
    if suffixes and suffixes[-1].lower() in FORMATS:
        return FORMATS[suffixes[-1].lower()]
    try:
        with open_bytes(file) as opened:
            start = next(iter(opened), b"")[:SNIFFED_BYTES]
    except BrokenFile:
        return "binary"
    if start[:4] == b"PAR1":
        return "parquet"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    try:
        text.decode()
    except UnicodeDecodeError as error:
        if error.start < len(text) - 4:  # not merely a character cut in two by the end of the block
            return "binary"
    if b"\0" in start:
        return "binary"
    first = text.split(b"\n", 1)[0]
    return "json" if first.startswith(b"{") and _parses(first) else "text"


def _parses(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def file_size(file: SourceFile) -> int:
    """Bytes of a file as it is stored; 0 where a server does not tell."""
    return file.size or 0


def _name(file: SourceFile) -> str:
    return Path(str(file)).name


def about_chars(files: Iterable[SourceFile]) -> int:
    """Characters in files, JSON's own included, by their sizes on disk."""
    packed = (*COMPRESSED, ".parquet")
    return sum(file_size(f) * (ASSUMED_COMPRESSION if str(f).endswith(packed) else 1) for f in files)
