"""Folders of good documents with one thing wrong, for whoever tests how that ends.

`BAD_INPUTS[name](folder)` makes one and returns (path, format, words): what a recipe would name, and words that
the message of `on_bad_input: stop` holds. `REASONS[name]` is the code that quarantine.parquet gives it; a name
without one leads nowhere, and stops either way.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

NUM_GOOD = 60
Case = tuple[Path, str, str]
Content = bytes | Callable[[], bytes]  # what is large is made when it is asked for


def good_text(number: int) -> str:
    return f"This is the good document number {number}, which nothing is wrong with."


def _line(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def _good_lines(num: int = NUM_GOOD) -> bytes:
    return b"".join(_line(text=good_text(n)) for n in range(num))


def _json(name: str, content: Content, words: str) -> Callable[[Path], Case]:
    """A file of good JSON lines, and one with `content`."""

    def make(folder: Path) -> Case:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "good.jsonl").write_bytes(_good_lines())
        (folder / name).write_bytes(content if isinstance(content, bytes) else content())
        return folder, "json", words

    return make


def _text(name: str, content: Content, words: str) -> Callable[[Path], Case]:
    """Good files, and one with `content`."""

    def make(folder: Path) -> Case:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(NUM_GOOD):
            (folder / f"{number:02}.txt").write_text(good_text(number))
        (folder / name).write_bytes(content if isinstance(content, bytes) else content())
        return folder, "text", words

    return make


def _parquet(content: Callable[[Path], None], words: str) -> Callable[[Path], Case]:
    def make(folder: Path) -> Case:
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": [good_text(n) for n in range(NUM_GOOD)]}), folder / "good.parquet")
        content(folder / "bad.parquet")
        return folder, "parquet", words

    return make


def _nowhere(name: str, words: str) -> Callable[[Path], Case]:
    def make(folder: Path) -> Case:
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name, "json", words

    return make


def _many_lines(num: int = 5_000) -> bytes:
    return b"".join(_line(text=f"{number * 7919} lines went by before this one came") for number in range(num))


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


BAD_INPUTS: dict[str, Callable[[Path], Case]] = {
    "invalid_utf8_line": _json("bad.jsonl", b'{"text": "caf\xe9 and more of it"}\n', "bad.jsonl:1: not UTF-8"),
    "invalid_utf8_file": _text("bad.txt", b"A caf\xe9 that is no UTF-8, in a file.\n", "bad.txt:1: not UTF-8"),
    "utf16_file": _text(
        "bad.txt", "A text in UTF-16, as Windows writes it.".encode("utf-16"), "bad.txt: this is UTF-16"
    ),
    "nul_bytes": _text("bad.txt", b"A text with a \x00 in its middle.\n", "bad.txt: the text holds NUL bytes"),
    "nul_bytes_json": _json(
        "bad.jsonl", b'{"text": "a \x00 in its middle"}\n', "bad.jsonl:1: broken JSON: it holds NUL"
    ),
    "nul_escaped": _json("bad.jsonl", b'{"text": "a \\u0000 in its middle"}\n', "bad.jsonl:1: the text holds NUL"),
    "long_line": _json(
        "bad.jsonl", lambda: b'{"text": "' + b"x" * (100 << 20) + b'"}\n', "bad.jsonl:1: longer than 16 MiB"
    ),
    "truncated_gzip": _json("bad.jsonl.gz", lambda: _cut(gzip.compress(_many_lines())), "damaged or cut short"),
    "truncated_zstd": _json("bad.jsonl.zst", lambda: _cut(zstandard.compress(_many_lines())), "damaged or cut short"),
    "gzip_bomb": _json("bad.jsonl.gz", lambda: gzip.compress(bytes(100 << 20)), "a decompression bomb"),
    "zstd_bomb": _text("bad.txt.zst", lambda: zstandard.compress(b"\n" * (200 << 20)), "a decompression bomb"),
    "not_compressed": _json("bad.jsonl.gz", _line(text=good_text(99)), "the name says compressed"),
    "broken_json": _json(
        "bad.jsonl", _line(text=good_text(98)) + b'{"text": \n' + _line(text=good_text(99)), "bad.jsonl:2: broken JSON"
    ),
    "broken_json_list": _json("bad.json", b'[{"text": "a"}, {"text" "b"}, {"text": "c"}]', "bad.json[2]: broken JSON"),
    "missing_field": _json(
        "bad.jsonl", _line(body="b", title="t"), "field 'text' is missing; fields here: body, title"
    ),
    "wrong_field": _json("bad.jsonl", _line(text=["a", "b"]), 'field \'text\' holds ["a", "b"], expected text'),
    "nan_text": _json("bad.jsonl", b'{"text": NaN}\n', "field 'text' holds NaN, expected text"),
    "not_an_object": _json("bad.jsonl", b"5\n", "bad.jsonl:1: expected a JSON object with named fields, found 5"),
    "deep_json": _json("bad.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "bad.jsonl:1: JSON nested too deeply"),
    "deep_json_list": _json("bad.json", b"[" * 100_000, "bad.json[1]: JSON nested too deeply"),
    "parquet_as_text": _text("bad.txt", b"PAR1 and so on", "bad.txt: this is a Parquet file: set format: parquet"),
    "no_parquet": _parquet(
        lambda path: path.write_bytes(b"PAR1 and nothing more"), "no Parquet file, or a damaged one"
    ),
    "parquet_column": _parquet(
        lambda path: pq.write_table(pa.table({"body": ["x"]}), path), "there is no column 'text'; columns here: body"
    ),
    "parquet_type": _parquet(
        lambda path: pq.write_table(pa.table({"text": [["x"]]}), path), "column 'text' is list<element: string>"
    ),
    "parquet_null": _parquet(
        lambda path: pq.write_table(pa.table({"text": pa.array([None], pa.string())}), path),
        "bad.parquet, row 1: field 'text' holds null, expected text",
    ),
    "unreadable": lambda folder: (Path("/proc/self/mem"), "text", "cannot read /proc/self/mem"),
    "missing_path": _nowhere("nowhere.jsonl", "there is no file or folder"),
    "empty_glob": _nowhere("*.jsonl", "no file matches"),
    "empty_folder": _nowhere("", "holds no files"),
}

REASONS = {
    "invalid_utf8_line": "invalid_utf8",
    "invalid_utf8_file": "invalid_utf8",
    "utf16_file": "not_text",
    "nul_bytes": "nul_bytes",
    "nul_bytes_json": "nul_bytes",
    "nul_escaped": "nul_bytes",
    "long_line": "too_long",
    "truncated_gzip": "damaged_archive",
    "truncated_zstd": "damaged_archive",
    "gzip_bomb": "decompression_bomb",
    "zstd_bomb": "decompression_bomb",
    "not_compressed": "damaged_archive",
    "broken_json": "broken_json",
    "broken_json_list": "broken_json",
    "missing_field": "missing_field",
    "wrong_field": "wrong_type",
    "nan_text": "wrong_type",
    "not_an_object": "not_an_object",
    "deep_json": "too_deep",
    "deep_json_list": "too_deep",
    "parquet_as_text": "not_text",
    "no_parquet": "damaged_table",
    "parquet_column": "missing_field",
    "parquet_type": "wrong_type",
    "parquet_null": "wrong_type",
}
