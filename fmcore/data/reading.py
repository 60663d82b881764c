"""Reads the raw texts and records of a source, one at a time, each with the place it came from."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import zstandard

from fmcore.data.files import open_text
from fmcore.errors import DataError
from fmcore.recipes.fields import Source

LONG_FILE_CHARS = 64 * 1024  # a longer file is cut at blank lines ...
MIN_PIECE_CHARS = 2_000  # ... into documents of at least this size
JSON_CHUNK_CHARS = 1 << 20
METADATA_CHARS = 200  # a longer field is content of its own, not metadata


class RawText(NamedTuple):
    """A text before any cleaning; origin is `file:line` or `file`."""

    origin: str
    text: str
    metadata: dict[str, Any]


def read_source(source: Source, paths: Iterable[Path]) -> Iterator[RawText]:
    """The texts of a source's files, one after the other. Raises DataError at the first bad place."""
    for path in paths:
        with _readable(path):
            if source.format == "json":
                yield from _json_texts(path, source)
            else:
                with open_text(path) as file:
                    yield from _plain_texts(path, file, source.split_on)


def read_json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(origin, object) for each object of a JSON-lines file or of one JSON list."""
    with _readable(path), open_text(path) as file:
        start = file.read(JSON_CHUNK_CHARS)
        if start.lstrip().startswith("["):
            values: Iterable[tuple[str, Any]] = _json_list(path, start, file)
        else:
            values = _json_lines(path, start, file)
        for origin, value in values:
            if not isinstance(value, dict):
                raise DataError(f"{origin}: expected a JSON object with named fields, found {_shorten(value)}")
            yield origin, value


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what can be wrong with a file's bytes into one message that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start} of a block); convert it first"
        ) from error
    except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
        raise DataError(f"{path}: the compressed file is damaged or cut short: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _json_texts(path: Path, source: Source) -> Iterator[RawText]:
    for origin, value in read_json_objects(path):
        text = value.get(source.text_field)
        if not isinstance(text, str):
            raise DataError(field_message(origin, source.text_field, value, f"text_field of source {source.name}"))
        rest = {k: v for k, v in value.items() if k != source.text_field and _is_small(v)}
        yield RawText(origin, text, rest)


def field_message(origin: str, field: str, value: dict[str, Any], setting: str) -> str:
    """Why a record's field cannot be used, and which fields there are."""
    found = f"holds {_shorten(value[field])}, expected text" if field in value else "is missing"
    return f"{origin}: field {field!r} {found}; fields here: {', '.join(map(str, value)) or 'none'}. Set {setting}."


def _plain_texts(path: Path, file: TextIO, split_on: str) -> Iterator[RawText]:
    if split_on == "line":
        for number, line in enumerate(file, 1):
            yield RawText(f"{path}:{number}", line, {})
        return
    if split_on == "blank_line":
        yield from _pieces(path, _lines(file, ""), 1)
        return
    start = file.read(LONG_FILE_CHARS + 1)
    if len(start) <= LONG_FILE_CHARS:
        yield RawText(str(path), start, {})
    else:
        yield from _pieces(path, _lines(file, start), MIN_PIECE_CHARS)


def _pieces(path: Path, lines: Iterator[str], min_chars: int) -> Iterator[RawText]:
    """Cut at blank lines, once a piece has min_chars."""
    piece: list[str] = []
    size, first = 0, 1
    for number, line in enumerate(lines, 1):
        if not line.strip() and size >= min_chars:
            yield RawText(f"{path}:{first}", "".join(piece), {})
            piece, size, first = [], 0, number + 1
        elif line.strip() or piece:
            piece.append(line)
            size += len(line)
        else:
            first = number + 1
    if piece:
        yield RawText(f"{path}:{first}", "".join(piece), {})


def _lines(file: TextIO, start: str) -> Iterator[str]:
    """The file's lines, of which `start` was read already."""
    held = start.splitlines(keepends=True)
    last = held.pop() if held and not held[-1].endswith("\n") else ""
    yield from held
    rest = file.readline()
    if last or rest:
        yield last + rest
    yield from file


def _json_lines(path: Path, start: str, file: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(file, start), 1):
        if line.strip():
            yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _parse(line: str, origin: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: broken JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{origin}: JSON nested too deeply") from error


def _json_list(path: Path, text: str, file: TextIO) -> Iterator[tuple[str, Any]]:
    """Elements of one JSON list, decoded one at a time so that memory stays flat."""
    decoder = json.JSONDecoder()
    text = text.lstrip()[1:]
    number = 0
    while True:
        text = text.lstrip().removeprefix(",").lstrip()
        if text.startswith("]"):
            return
        number += 1
        value, text = _next_element(decoder, text, file, f"{path}[{number}]")
        yield f"{path}[{number}]", value


def _next_element(decoder: json.JSONDecoder, text: str, file: TextIO, origin: str) -> tuple[Any, str]:
    while True:
        problem = "the list does not end"
        if text:
            try:
                value, end = decoder.raw_decode(text)
                if end < len(text):  # a number or word that touches the buffer's end may go on
                    return value, text[end:]
            except json.JSONDecodeError as error:
                problem = error.msg
            except RecursionError as error:
                raise DataError(f"{origin}: JSON nested too deeply") from error
        more = file.read(max(JSON_CHUNK_CHARS, len(text)))  # doubling keeps long elements linear
        if not more:
            raise DataError(f"{origin}: broken JSON: {problem}")
        text = (text + more).lstrip() if not text else text + more


def _is_small(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float)) or (
        isinstance(value, str) and len(value) <= METADATA_CHARS
    )  # fmt: skip


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
