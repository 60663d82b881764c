"""Reading: every form a text can lie in, nothing lost, and one message for what cannot be read."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fmcore.data.files import find_files
from fmcore.data.places import Bad, origin
from fmcore.data.reading import JSON_CHUNK_CHARS, LONG_FILE_CHARS, MIN_PIECE_CHARS, read_records, read_texts
from fmcore.errors import DataError
from fmcore.recipes.fields import Source

MIB = 1 << 20


class Text(NamedTuple):
    """A text with its place as people write it."""

    origin: str
    text: str
    metadata: dict[str, Any]


def units(path: Path, **settings: Any) -> Iterator[Text | tuple[str, Bad]]:
    """What a source holds; (origin, Bad) for what cannot be used."""
    source = Source(name="x", path=str(path), **settings)
    for file in find_files(source.path, field="source x"):
        for unit in read_texts(source, file.path):
            place = origin(file.path, unit.line)
            yield (place, unit) if isinstance(unit, Bad) else Text(place, unit.text, unit.metadata)


def read(path: Path, **settings: Any) -> list[Text]:
    found = list(units(path, **settings))
    assert all(isinstance(unit, Text) for unit in found), found
    return found


def texts(path: Path, **settings: Any) -> list[str]:
    return [raw.text for raw in read(path, **settings)]


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path, **settings: Any) -> str:
    """The first bad place, as a message would name it."""
    return next(f"{unit[0]}: {unit[1].detail}" for unit in units(path, **settings) if not isinstance(unit, Text))


# ---- plain text


def compressed(suffix: str, content: bytes) -> bytes:
    return {".gz": gzip.compress, ".zst": zstandard.compress}.get(suffix, bytes)(content)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"one\ntwo\n", "one\ntwo\n"),
        (b"one\r\ntwo\r", "one\ntwo\n"),
        ("\ufeffänd\n".encode(), "änd\n"),
        (b"", ""),
    ],
)
def test_a_file_is_a_document(tmp_path: Path, suffix: str, content: bytes, text: str) -> None:
    path = put(tmp_path / f"a.txt{suffix}", compressed(suffix, content))
    assert read(path) == [Text(str(path), text, {})]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_several_compressed_parts_in_one_file_are_all_read(tmp_path: Path, suffix: str) -> None:
    content = compressed(suffix, b"one\n") + compressed(suffix, b"two\n")
    assert texts(put(tmp_path / f"a{suffix}", content)) == ["one\ntwo\n"]


def test_each_line_is_a_document(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "one\r\n\r\nthree\u2028still\x85three\nfour")
    assert [(raw.origin, raw.text.rstrip("\n")) for raw in read(path, split_on="line")] == [
        (f"{path}:1", "one"),
        (f"{path}:2", ""),
        (f"{path}:3", "three\u2028still\x85three"),
        (f"{path}:4", "four"),
    ]


def test_blank_lines_end_documents(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "\n\none\nmore\n \t\n\n\ntwo\n")
    assert [(raw.origin, raw.text) for raw in read(path, split_on="blank_line")] == [
        (f"{path}:3", "one\nmore\n"),
        (f"{path}:8", "two\n"),
    ]


def test_a_file_of_64_kib_is_one_document_and_a_longer_one_is_cut(tmp_path: Path) -> None:
    block = "x" * 1022 + "\n\n"
    assert len(texts(put(tmp_path / "whole", block * 64))) == 1
    assert len(texts(put(tmp_path / "longer", block * 64 + "y"))) > 1


def test_a_long_file_is_cut_at_blank_lines_into_pieces_of_at_least_2000_characters(tmp_path: Path) -> None:
    lines = [f"line {n} " + "w" * (n % 90) + ("\n\n" if n % 7 == 0 else "\n") for n in range(3000)]
    path = put(tmp_path / "a.txt", "".join(lines))
    pieces = read(path)
    assert all(len(raw.text) >= MIN_PIECE_CHARS for raw in pieces[:-1])
    assert len(pieces) > 20
    whole = path.read_text().split("\n")
    for raw in pieces:
        first = int(raw.origin.rpartition(":")[2])
        assert raw.text.split("\n")[0] == whole[first - 1]  # the origin's line is where the piece begins
    kept = [line for raw in pieces for line in raw.text.split("\n") if line]
    assert kept == [line for line in whole if line]


def test_a_long_file_without_blank_lines_stays_whole(tmp_path: Path) -> None:
    content = "word " * (LONG_FILE_CHARS // 4)
    assert texts(put(tmp_path / "a.txt", content)) == [content]


LINES = st.text(alphabet="ab \x0b\x0c\x1c\x85\u2028\u2029", max_size=30)


@settings(max_examples=30, deadline=None)
@given(lines=st.lists(LINES, min_size=1, max_size=12), shift=st.integers(-40, 2))
def test_no_character_of_a_long_file_is_lost_where_it_was_first_read(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], shift: int
) -> None:
    """The first 64 KiB are read before the lines are: nothing may happen at that seam."""
    content = "x" * (LONG_FILE_CHARS + shift) + "\n" + "\n".join([*lines, "y" * 60])
    joined = "".join(texts(put(tmp_path_factory.mktemp("long") / "a.txt", content)))
    assert re.sub(r"\s", "", joined) == re.sub(r"\s", "", content)


# ---- files, folders, globs


def test_a_folder_is_read_whole_and_sorted_but_for_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "sub/a.txt", ".hidden", ".git/config", "a.txt"):
        put(tmp_path / "in" / name, name)
    assert texts(tmp_path / "in") == ["a.txt", "b.txt", "sub/a.txt"]


def test_a_folder_below_a_hidden_one_is_read(tmp_path: Path) -> None:
    put(tmp_path / ".cache" / "in" / "a.txt", "one")
    assert texts(tmp_path / ".cache" / "in") == ["one"]


def test_globs(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "sub/c.txt"):
        put(tmp_path / name, name)
    assert texts(tmp_path / "*.txt") == ["a.txt"]
    assert texts(tmp_path / "**" / "*.txt") == ["a.txt", "sub/c.txt"]


def test_a_name_that_looks_like_a_glob_is_a_file_first(tmp_path: Path) -> None:
    assert texts(put(tmp_path / "a[1].txt", "one")) == ["one"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none*.txt", "source x: no file matches {}/none*.txt; a relative path is read from the recipe's"),
        ("none.txt", "source x: there is no file or folder {}/none.txt; a relative path is"),
        ("empty", "source x: the folder {}/empty holds no files"),
    ],
)
def test_nothing_to_read_names_source_and_path(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path / "empty" / ".hidden", "x")
    with pytest.raises(DataError) as refused:
        read(tmp_path / path)
    assert str(refused.value).startswith(message.format(tmp_path))


# ---- JSON


ROWS = [{"text": "one", "n": 1}, {"text": "tWo\n", "n": 2}, {"text": "", "n": 3}]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_json_lines(tmp_path: Path, suffix: str, ends: str) -> None:
    content = "\ufeff" + ends.join(json.dumps(row) for row in ROWS) + ends + ends
    path = put(tmp_path / f"a.jsonl{suffix}", compressed(suffix, content.encode()))
    assert [(raw.origin, raw.text, raw.metadata) for raw in read(path, format="json")] == [
        (f"{path}:{number}", row["text"], {"n": row["n"]}) for number, row in enumerate(ROWS, 1)
    ]


@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"separators": (",", ":")}])
def test_one_json_list(tmp_path: Path, style: dict[str, Any]) -> None:
    path = put(tmp_path / "a.json", "\ufeff \n" + json.dumps(ROWS, **style) + "\n")
    assert [(raw.origin, raw.text) for raw in read(path, format="json")] == [
        (f"{path}[{number}]", row["text"]) for number, row in enumerate(ROWS, 1)
    ]


@pytest.mark.parametrize("content", ["[]", " [ \n ] ", "", "\n\n"])
def test_a_file_that_holds_nothing_is_one_empty_text(tmp_path: Path, content: str) -> None:
    path = put(tmp_path / "a.json", content)
    assert read(path, format="json") == [Text(str(path), "", {})]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x7f"])
@pytest.mark.parametrize("before", [0, MIB])
def test_characters_that_python_takes_for_line_ends_but_json_does_not(
    tmp_path: Path, character: str, before: int
) -> None:
    rows = [{"text": "x" * before}, {"text": f"one{character}two"}, {"text": "three"}]
    path = put(tmp_path / "a.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert [raw.text for raw in read(path, format="json")] == [row["text"] for row in rows]
    assert [raw.origin for raw in read(path, format="json")][-1] == f"{path}:3"


@pytest.mark.parametrize("form", ["lines", "list"])
def test_elements_across_the_buffers_seam(tmp_path: Path, form: str) -> None:
    """Elements of 0.3, 1.2, 0.9 and 2.5 MiB, and small ones between, of two-byte characters."""
    sizes = [MIB * 3 // 10, 3, MIB * 12 // 10, 1, MIB * 9 // 10, 7, MIB * 25 // 10, 2]
    rows = [{"text": "ü" * size, "n": number} for number, size in enumerate(sizes)]
    dumped = [json.dumps(row, ensure_ascii=False) for row in rows]
    content = "\n".join(dumped) if form == "lines" else "[" + ",".join(dumped) + "]"
    found = read(put(tmp_path / "a.json", content), format="json")
    assert [(len(raw.text), raw.metadata["n"]) for raw in found] == [(size, n) for n, size in enumerate(sizes)]


@pytest.mark.parametrize("between", [",", "\n,\n", " , ", ",\n  "])
@pytest.mark.parametrize("seam", range(-2, 9))
def test_a_list_whose_buffer_ends_anywhere_between_two_elements(tmp_path: Path, between: str, seam: int) -> None:
    first = json.dumps({"text": "x" * (JSON_CHUNK_CHARS - seam - len('[{"text": ""}'))})
    content = f'[{first}{between}{{"text": "y"}}\n]'
    found = texts(put(tmp_path / "a.json", content), format="json")
    assert [text[0] for text in found] == ["x", "y"]


@pytest.mark.parametrize("seam", range(4))
def test_a_list_whose_buffer_ends_before_its_bracket(tmp_path: Path, seam: int) -> None:
    first = json.dumps({"text": "x" * (JSON_CHUNK_CHARS - seam - len('[{"text": ""}'))})
    assert len(texts(put(tmp_path / "a.json", f"[{first}\n\n\n]"), format="json")) == 1


def test_other_fields_become_metadata_where_they_are_small(tmp_path: Path) -> None:
    row = {"text": "x", "url": "u" * 200, "body": "b" * 201, "tags": ["a"], "score": 0.5, "none": None, "ok": True}
    (raw,) = read(put(tmp_path / "a.jsonl", json.dumps(row)), format="json")
    assert raw.metadata == {"url": "u" * 200, "score": 0.5, "none": None, "ok": True}


def test_the_text_field_can_be_named(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", '{"body": "b", "text": "t"}')
    assert texts(path, format="json", text_field="body") == ["b"]


# ---- what cannot be read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "{}:2: broken JSON: Expecting value at column"),
        ('{"text": "a"}\n\nplain text\n', "{}:3: broken JSON: Expecting value at column 1"),
        ('[{"text": "a"}, {"text": "b"', "{}[2]: broken JSON: "),
        ('[{"text": "a"}', "{}[1]: broken JSON: the list does not end"),
        ('[{"text": "a"},, {"text": "b"}]', "{}[2]: broken JSON: Expecting value"),
        ('[{"text": "a"}, 5]', "{}[2]: expected a JSON object with named fields, found 5"),
        ('{"text": "a"}\n"b"\n', '{}:2: expected a JSON object with named fields, found "b"'),
        ('{"body": "a", "n": 1}\n', "{}:1: field 'text' is missing; fields here: body, n. Set text_field of source x"),
        ('[{"text": null}]', "{}[1]: field 'text' holds null, expected text; fields here: text. Set text_field of"),
        ("{}", "{}:1: field 'text' is missing; fields here: none"),
        ("[" * 100_000, "{}[1]: "),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "{}:1: "),
    ],
)
def test_bad_json_names_file_place_and_remedy(tmp_path: Path, content: str, message: str) -> None:
    path = put(tmp_path / "a.json", content)
    assert refusal(path, format="json").startswith(message.replace("{}", str(path), 1))


def test_elements_without_a_comma_are_broken(tmp_path: Path) -> None:
    assert "broken JSON" in refusal(put(tmp_path / "a.json", '[{"text": "a"} {"text": "b"}]'), format="json")


def test_what_follows_the_list_is_not_dropped_in_silence(tmp_path: Path) -> None:
    assert "broken JSON" in refusal(put(tmp_path / "a.json", '[{"text": "a"}]\n[{"text": "b"}]\n'), format="json")


@pytest.mark.parametrize("format", ["text", "json"])
def test_bytes_that_are_no_utf_8(tmp_path: Path, format: str) -> None:
    path = put(tmp_path / "a", '{"text": "caf\xe9"}'.encode("latin-1"))
    assert refusal(path, format=format).startswith(f"{path}:1: not UTF-8 (")
    assert "convert it first" in refusal(path, format=format)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
@pytest.mark.parametrize("format", ["text", "json"])
def test_a_damaged_compressed_file(tmp_path: Path, suffix: str, damage: str, format: str) -> None:
    lines = "".join(f'{{"text": "{number * 7919}"}}\n' for number in range(20_000))
    whole = compressed(suffix, lines.encode())
    content = whole[: len(whole) // 2] if damage == "cut" else b"not compressed"
    path = put(tmp_path / f"a{suffix}", content)
    found = refusal(path, format=format)
    if damage == "cut":
        assert re.match(rf"{path}, byte \d+: the compressed file is damaged or cut short: ", found)
    else:
        assert found == f"{path}: the name says compressed, the bytes are not"


def test_a_compressed_file_with_a_wrong_checksum(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(b"one\n" * 100))
    content[-6] ^= 1
    path = put(tmp_path / "a.gz", bytes(content))
    assert "is damaged or cut short" in refusal(path)


def test_objects_stream(tmp_path: Path) -> None:
    """The first object comes before the last one is parsed."""
    path = put(tmp_path / "a.json", '[{"n": 1}, {"n": 2}, broken')
    rows = read_records(Source(name="x", path=str(path), format="json"), str(path), [])
    assert next(rows) == ("[1]", {"n": 1})
