"""Reads the raw texts and records of a source, one at a time, each with the place it came from."""

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from fmcore.data.files import open_text
from fmcore.data.normalize import encodable
from fmcore.errors import DataError
from fmcore.recipes.fields import Source

LONG_FILE_CHARS = 64 * 1024  # a longer file is cut at blank lines ...
MIN_PIECE_CHARS = 2_000  # ... into documents of at least this size
JSON_CHUNK_CHARS = 1 << 20
BLANKS = re.compile(r"[ \t\r\n]*")
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
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: the compressed file is damaged or cut short: {error}") from error
    except OSError as error:
        if error.errno is None:  # pyarrow's, about the compressed bytes
            raise DataError(f"{path}: the compressed file is damaged or cut short: {error}") from error
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _json_texts(path: Path, source: Source) -> Iterator[RawText]:
    for origin, value in read_json_objects(path):
        text = value.get(source.text_field)
        if not isinstance(text, str):
            raise DataError(field_message(origin, source.text_field, value, f"text_field of source {source.name}"))
        rest = {k: v for k, v in value.items() if k != source.text_field and encodable(k) and _is_small(v)}
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
    """Cut at blank lines, once a piece has min_chars; a shorter end belongs to the piece before it."""
    ready: RawText | None = None
    piece: list[str] = []
    size, first = 0, 1
    for number, line in enumerate(lines, 1):
        if not line.strip() and size >= min_chars:
            if ready:
                yield ready
            ready = RawText(f"{path}:{first}", "".join(piece), {})
            piece, size, first = [], 0, number + 1
        elif line.strip() or piece:
            piece.append(line)
            size += len(line)
        else:
            first = number + 1
    if ready and piece and size < min_chars:
        ready, piece = ready._replace(text=ready.text + "\n" + "".join(piece)), []
    if ready:
        yield ready
    if piece:
        yield RawText(f"{path}:{first}", "".join(piece), {})


def _lines(file: TextIO, start: str) -> Iterator[str]:
    """The file's lines, of which `start` was read already."""
    *held, last = start.split("\n")  # not splitlines: U+2028 and the like may stand inside a JSON string
    yield from (f"{line}\n" for line in held)
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
        raise DataError(f"{origin}: broken JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from error
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise DataError(f"{origin}: {error}") from error
    except RecursionError as error:
        raise DataError(f"{origin}: JSON nested too deeply") from error


def _json_list(path: Path, text: str, file: TextIO) -> Iterator[tuple[str, Any]]:
    """Elements of one JSON list, decoded one at a time so that memory stays flat."""
    unread = _Unread(text.lstrip()[1:], file)
    number = 0
    while (char := unread.next_char()) != "]":
        number += 1
        origin = f"{path}[{number}]"
        if number > 1:
            if char != ",":
                what = "expected a comma or ]" if char else "the list does not end"
                raise DataError(f"{origin}: broken JSON: {what}")
            unread.at += 1
            unread.next_char()
        yield origin, _next_element(unread, origin)
    unread.at += 1
    if unread.next_char():
        raise DataError(f"{path}: broken JSON: the list of {number} ends, but the file goes on")


class _Unread:
    """What is left of a file: `text` from `at` on, and what was not read yet."""

    def __init__(self, text: str, file: TextIO) -> None:
        self.text = text
        self.at = 0
        self._file = file

    def more(self) -> bool:
        """Read on; False at the file's end."""
        left = self.text[self.at :]
        more = self._file.read(max(JSON_CHUNK_CHARS, len(left)))  # doubling keeps long elements linear
        self.text, self.at = left + more, 0
        return bool(more)

    def next_char(self) -> str:
        """Skip blanks; the character after them, not taken, or nothing at the file's end."""
        while True:
            self.at = BLANKS.match(self.text, self.at).end()  # type: ignore[union-attr]  # matches nothing, too
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""


def _next_element(unread: _Unread, origin: str) -> Any:
    decoder = json.JSONDecoder()
    while True:
        problem = "the list does not end"
        try:
            value, end = decoder.raw_decode(unread.text, unread.at)
            if end < len(unread.text):  # a number or word that touches the buffer's end may go on
                unread.at = end
                return value
        except json.JSONDecodeError as error:
            problem = error.msg
        except ValueError as error:
            raise DataError(f"{origin}: {error}") from error
        except RecursionError as error:
            raise DataError(f"{origin}: JSON nested too deeply") from error
        if not unread.more():
            raise DataError(f"{origin}: broken JSON: {problem}")


def _is_small(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return len(value) <= METADATA_CHARS and encodable(value)
    return value is None or isinstance(value, (bool, int))


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
