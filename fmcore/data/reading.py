"""Reads the raw texts and records of a source's file, one at a time, each with the line it came from.

What cannot be used comes out too, as a `Bad` in its place: nothing read is lost without a word. Lines are
taken apart as bytes, so that a bad one spoils nothing but itself.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from fmcore.data.columns import Row, hf_rows, parquet_rows
from fmcore.data.files import open_bytes
from fmcore.data.places import EXCERPT_CHARS, MAX_UNIT_BYTES, Bad, excerpt, field_problem, is_small
from fmcore.data.unpacking import FOREIGN, BrokenFile
from fmcore.recipes.fields import Source, Task

LONG_FILE_CHARS = 64 * 1024  # a longer file is cut at blank lines ...
MIN_PIECE_CHARS = 2_000  # ... into documents of at least this size
JSON_CHUNK_CHARS = 1 << 20
BLANKS = re.compile(r"[ \t\r\n]*")
BOM = b"\xef\xbb\xbf"
ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8, as surrogateescape decodes them
TOO_LONG = f"longer than {MAX_UNIT_BYTES >> 20} MiB, the most that is read at a time; cut it up"


class RawText(NamedTuple):
    """A text before any cleaning. line: where in the file it begins; empty = the file as a whole."""

    line: str
    text: str
    metadata: dict[str, Any]


class Record(NamedTuple):
    """An object with named fields. line: `12`, `[3]` (of a list) or `row 7`; empty for a file that is empty."""

    line: str
    fields: dict[str, Any]


def read_texts(source: Source, path: str) -> Iterator[RawText | Bad]:
    """The texts of one file of a source (of a whole data set, for hf). One that holds nothing is one empty text."""
    if source.format == "text":
        yield from _or_empty(_plain_texts(path, source.split_on), RawText("", "", {}))
        return
    for record in read_records(source, path, [source.text_field]):
        yield record if isinstance(record, Bad) else _text_of(record, source)


def read_records(block: Source | Task, path: str, required: list[str]) -> Iterator[Record | Bad]:
    """The objects or rows of one file. required: fields without which no row of a table can be used.

    A file that holds none is one empty record, so that it is not passed over without a word.
    """
    whole = isinstance(block, Source)  # the other columns are its metadata
    if block.format == "json":
        records = _json_objects(path)
    elif block.format == "parquet":
        records = _from_rows(parquet_rows(path, required, rest=whole))
    else:
        rows = hf_rows(path, block.split, block.config_name, block.revision, required, rest=whole)
        records = _from_rows(rows)
    yield from _or_empty(records, Record("", {}))


def _from_rows(rows: Iterator[Row]) -> Iterator[Record | Bad]:
    for line, row in rows:
        yield row if isinstance(row, Bad) else Record(line, row)


def _or_empty(units: Iterator[Any], empty: RawText | Record) -> Iterator[Any]:
    first = next(units, empty)
    yield first
    yield from units


def _text_of(record: Record, source: Source) -> RawText | Bad:
    if not record.line:
        return RawText("", "", {})
    text = record.fields.get(source.text_field)
    if not isinstance(text, str):
        setting = f"text_field of source {source.name}"
        return field_problem(record.line, source.text_field, record.fields, setting)
    rest = {k: v for k, v in record.fields.items() if k != source.text_field and is_small(k) and is_small(v)}
    return RawText(record.line, text, rest)


# ---- lines


class Line(NamedTuple):
    """A line with its end as \\n. bad: why it cannot be used; last: the file cannot be read on."""

    number: int
    text: str
    bad: Bad | None = None
    last: bool = False


def _lines(chunks: Iterable[bytes]) -> Iterator[Line]:
    """The lines of a file, in bounded memory."""
    number = 0
    try:
        for content, long in _split(chunks):
            # \r ends lines as well: it may stand inside no line of text and no JSON string
            body = content.removesuffix(b"\n").removesuffix(b"\r")
            *parts, last = body.replace(b"\r\n", b"\n").split(b"\r")
            for part in [*(part + b"\n" for part in parts), last + b"\n" if body != content else last]:
                number += 1
                yield _line(number, part.removeprefix(BOM), long=long)
    except BrokenFile as error:
        yield Line(number + 1, "", _rest(error), last=True)


def _rest(error: BrokenFile) -> Bad:
    return Bad(f"byte {error.byte}" if error.byte else "", error.reason, error.detail, "")


def _split(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """(line, whether it was too long and is cut off); each with its \\n but perhaps the last."""
    held = bytearray()
    long = False
    for chunk in chunks:
        *whole, last = chunk.split(b"\n")
        for part in whole:
            held += part[: EXCERPT_CHARS * 4] if long else part
            yield bytes(held) + b"\n", long
            held.clear()
            long = False
        if not long:
            held += last
        if len(held) > MAX_UNIT_BYTES:
            long = True
            del held[EXCERPT_CHARS * 4 :]
    if held:
        yield bytes(held), long


def _line(number: int, content: bytes, *, long: bool) -> Line:
    try:
        text = content.decode("utf-8", "replace" if long else "strict")
    except UnicodeDecodeError as error:
        text = content.decode("utf-8", "replace")
        detail = f"not UTF-8 ({error.reason} at byte {error.start} of the line); convert it first"
        return Line(number, text, Bad(str(number), "invalid_utf8", detail, excerpt(text)))
    return Line(number, text, Bad(str(number), "too_long", TOO_LONG, excerpt(text)) if long else None)


def _checked(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks of a file; refuses what is no text at all."""
    rest = iter(chunks)
    first = next(rest, b"")
    for magic, what in FOREIGN.items():
        if first.startswith(magic):
            raise BrokenFile("not_text", f"this is {what}", 0)
    yield from chain([first], rest) if first else ()


# ---- plain text


def _plain_texts(path: str, split_on: str) -> Iterator[RawText | Bad]:
    with open_bytes(path) as file:
        lines = _lines(_checked(file))
        if split_on == "line":
            yield from (line.bad or RawText(str(line.number), line.text, {}) for line in lines)
        elif split_on == "blank_line":
            yield from _pieces(lines, 1)
        else:
            yield from _file_or_pieces(lines)


def _file_or_pieces(lines: Iterator[Line]) -> Iterator[RawText | Bad]:
    start = _Piece(1)
    held: list[Line] = []
    for line in lines:
        held.append(line)
        start.add(line)
        if start.size > LONG_FILE_CHARS:
            yield from _pieces(chain(held, lines), MIN_PIECE_CHARS)
            return
    if held:
        done = start.done()
        yield done if isinstance(done, Bad) else done._replace(line="")


class _Piece:
    """Lines that become one document, or one bad unit where a line of them is bad."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.size = 0
        self.bad: Bad | None = None
        self._lines: list[str] = []

    def add(self, line: Line) -> None:
        self.size += len(line.text)
        if self.bad is None and line.bad is None and self.size > MAX_UNIT_BYTES:
            self.bad = Bad(str(self.first), "too_long", TOO_LONG, excerpt("".join(self._lines[:9])))
        self.bad = self.bad or line.bad
        if self.bad:
            self._lines.clear()
        else:
            self._lines.append(line.text)

    def text(self) -> str:
        return "".join(self._lines)

    def done(self) -> RawText | Bad:
        return self.bad or RawText(str(self.first), self.text(), {})


def _pieces(lines: Iterable[Line], min_chars: int) -> Iterator[RawText | Bad]:
    """Cut at blank lines, once a piece has min_chars; a shorter end belongs to the piece before it."""
    ready: RawText | Bad | None = None
    piece = _Piece(1)
    for line in lines:
        blank = not line.text.strip()
        if line.last:  # what was read before stands, the rest is one bad unit
            yield from (unit for unit in (ready, line.bad) if unit)
            return
        if blank and piece.size >= min_chars:
            if ready:
                yield ready
            ready, piece = piece.done(), _Piece(line.number + 1)
        elif not blank or piece.size:
            piece.add(line)
        else:
            piece = _Piece(line.number + 1)
    if isinstance(ready, RawText) and piece.size and piece.size < min_chars and not piece.bad:
        ready, piece = ready._replace(text=ready.text + "\n" + piece.text()), _Piece(0)
    if ready:
        yield ready
    if piece.size:
        yield piece.done()


# ---- JSON


def _json_objects(path: str) -> Iterator[Record | Bad]:
    with open_bytes(path) as file:
        chunks = _checked(file)
        try:
            start = next(chunks, b"")
        except BrokenFile as error:
            yield _rest(error)
            return
        all_chunks = chain([start], chunks)
        is_list = start.removeprefix(BOM).lstrip().startswith(b"[")
        for line, value in _json_list(all_chunks) if is_list else _json_lines(all_chunks):
            if isinstance(value, Bad):
                yield value
            elif isinstance(value, dict):
                yield Record(line, value)
            else:
                found = excerpt(json.dumps(value, ensure_ascii=False), 60)
                detail = f"expected a JSON object with named fields, found {found}"
                yield Bad(line, "not_an_object", detail, found)


def _json_lines(chunks: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    for line in _lines(chunks):
        if line.bad:
            yield line.bad.line, line.bad
        elif line.text.strip():
            yield str(line.number), _parse(line)


def _parse(line: Line) -> Any:
    try:
        return json.loads(line.text)
    except (ValueError, RecursionError) as error:
        return _broken(str(line.number), error, line.text)


def _broken(line: str, error: Exception, text: str) -> Bad:
    if isinstance(error, RecursionError):
        return Bad(line, "too_deep", "JSON nested too deeply", excerpt(text))
    if "\x00" in text:
        return Bad(line, "nul_bytes", "broken JSON: it holds NUL bytes", excerpt(text))
    if isinstance(error, json.JSONDecodeError):
        detail = f"broken JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        return Bad(line, "broken_json", detail, excerpt(text))
    return Bad(line, "broken_json", f"broken JSON: {error}", excerpt(text))  # a number of more than 4,300 digits


def _json_list(chunks: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    """Elements of one JSON list, decoded one at a time so that memory stays flat.

    Where the list itself is broken there is no telling where the next element begins: the rest is one bad unit.
    """
    unread = _Unread(chunks)
    unread.next_char()
    unread.at += 1
    number = 0
    while (char := unread.next_char()) != "]":
        number += 1
        line = f"[{number}]"
        if number > 1:
            if char != ",":
                what = "expected a comma or ]" if char else "the list does not end"
                yield line, unread.broken or Bad(line, "broken_json", f"broken JSON: {what}", unread.excerpt())
                return
            unread.at += 1
            unread.next_char()
        value, goes_on = _next_element(unread, line)
        yield line, value
        if not goes_on:
            return
    unread.at += 1
    if unread.next_char():
        detail = f"broken JSON: the list of {number} ends, but the file goes on"
        yield "", Bad(f"[{number + 1}]", "broken_json", detail, unread.excerpt())


class _Unread:
    """What is left of a file: `text` from `at` on, and what was not read yet. broken: why no more can be."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.text = ""
        self.at = 0
        self.broken: Bad | None = None
        self._chunks = iter(chunks)
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._ended = False
        self.more()
        self.text = self.text.removeprefix("\ufeff")

    def more(self) -> bool:
        """Read on; False at the file's end."""
        parts = [self.text[self.at :]]
        wanted = max(JSON_CHUNK_CHARS, len(parts[0]))  # doubling keeps long elements linear
        before = wanted
        while wanted > 0 and not self._ended:
            parts.append(self._take())
            wanted -= len(parts[-1])
        self.text, self.at = "".join(parts), 0
        return wanted < before

    def _take(self) -> str:
        try:
            chunk = next(self._chunks, b"")
        except BrokenFile as error:
            self.broken = _rest(error)
            chunk = b""
        self._ended = not chunk
        return self._decode(chunk, final=self._ended)

    def next_char(self) -> str:
        """Skip blanks; the character after them, not taken, or nothing at the file's end."""
        while True:
            self.at = BLANKS.match(self.text, self.at).end()  # type: ignore[union-attr]  # matches nothing, too
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def excerpt(self) -> str:
        """How what is left begins."""
        return excerpt(self.text[self.at : self.at + EXCERPT_CHARS])


def _next_element(unread: _Unread, line: str) -> tuple[Any, bool]:
    """(the next element or a Bad, whether the list can be read on)."""
    decoder = json.JSONDecoder()
    while True:
        problem: Exception = json.JSONDecodeError("the list does not end", unread.text[:1], 0)
        try:
            value, end = decoder.raw_decode(unread.text, unread.at)
            if end < len(unread.text):  # a number or word that touches the buffer's end may go on
                raw, unread.at = unread.text[unread.at : end], end
                return (_not_utf8(line, raw) if ESCAPED.search(raw) else value), True
        except json.JSONDecodeError as error:
            problem = error
        except (ValueError, RecursionError) as error:
            return _broken(line, error, unread.excerpt()), False
        if len(unread.text) - unread.at > MAX_UNIT_BYTES:
            ends = str(problem).startswith("Unterminated") or getattr(problem, "pos", 0) >= len(unread.text)
            if ends:
                return Bad(line, "too_long", TOO_LONG, unread.excerpt()), False
            return _broken(line, problem, unread.excerpt()), False
        if not unread.more():
            return unread.broken or _broken(line, problem, unread.excerpt()), False


def _not_utf8(line: str, raw: str) -> Bad:
    return Bad(line, "invalid_utf8", "not UTF-8; convert it first", excerpt(raw[:EXCERPT_CHARS]))
