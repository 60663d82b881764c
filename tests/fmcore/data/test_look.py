"""Looking at data: formats, fields, and that what is foretold of documents is what prepare finds."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmcore.data.detect import data_files
from fmcore.data.look import look_at_records, look_at_text
from fmcore.errors import DataError


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def questions(num: int) -> list[dict[str, Any]]:
    return [
        {"doc": f"d{i // 4}", "question": f"What is number {i}?", "answer": f"It is {i}.", "topic": f"t{i % 3}"}
        for i in range(num)
    ]


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("a.jsonl", b'{"text": "x"}\n', "json"),
        ("a.json", b'[{"text": "x"}]', "json"),
        ("a.txt", b"plain text\n", "text"),
        ("a", b'{"text": "x"}\n', "json"),
        ("b", "naïve ".encode() * 1000, "text"),
        ("c", b"\xef\xbb\xbfwith a mark\n", "text"),
        ("d.jsonl.gz", gzip.compress(b'{"text": "x"}\n'), "json"),
    ],
)
def test_the_format_follows_from_name_or_content(tmp_path: Path, name: str, content: bytes, format: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert data_files(str(tmp_path / name)).format == format


def test_a_character_cut_by_the_end_of_the_first_block_is_no_binary(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 4095 + "é".encode() * 10)
    assert data_files(str(tmp_path / "a")).format == "text"


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\xff\xfe" * 100, b"text with a \0 byte"])
def test_binary_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.bin holds no text"):
        data_files(str(tmp_path / "x.bin"))


@pytest.mark.parametrize(
    ("names", "path"), [(("a.txt",), "a.txt"), (("a.txt", "b.txt"), "*.txt"), (("a.txt", "b.md"), "")]
)
def test_what_lies_beside_texts_is_no_document(tmp_path: Path, names: tuple[str, ...], path: str) -> None:
    for name in (*names, "SOURCE"):
        (tmp_path / name).write_text(f"this is {name}")
    found = data_files(str(tmp_path))
    assert (found.path, found.left_out) == (str(tmp_path / path), ("SOURCE",))
    assert [Path(file.path).name for file in found.files] == list(names)


def test_other_files_of_a_folder_are_left_out_and_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "data.jsonl.gz", questions(200))
    (tmp_path / "SOURCE").write_text("from somewhere")
    found = data_files(str(tmp_path))
    assert found.path == str(tmp_path / "data.jsonl.gz")
    assert found.left_out == ("SOURCE",)
    write_lines(tmp_path / "more.jsonl.gz", questions(200))
    assert data_files(str(tmp_path)).path == str(tmp_path / "*.jsonl.gz")
    write_lines(tmp_path / "deep" / "again.jsonl.gz", questions(200))
    found = data_files(str(tmp_path))
    assert found.path == str(tmp_path / "**" / "*.jsonl.gz")
    assert len(data_files(found.path).files) == 3  # the glob finds what was looked at


def test_the_text_field_is_known_by_name_else_the_longest(tmp_path: Path) -> None:
    rows = [{"path": f"p{i}", "text": f"number {i} " * 3, "notes": "much longer than the text " * 9} for i in range(50)]
    assert look_at_text(str(write_lines(tmp_path / "a.jsonl", rows))).text_field == "text"
    assert look_at_text(str(write_lines(tmp_path / "b.jsonl", questions(50)))).text_field == "question"


def test_what_is_foretold_is_what_prepare_finds(tmp_path: Path, fresh_home: Any, tiny: Any) -> None:
    rows = [{"text": tiny.text("old", i % 150)} for i in range(200)] + [{"text": "short"}, {"text": "again and " * 90}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    look = look_at_text(str(path))
    source = {"name": "old", "path": str(path), "format": "json"}
    documents = fresh_home.documents(tiny.pretrain(path, data={"sources": [source]}))
    assert look.dropped == documents.counts["dropped"]["old"] == {"duplicate": 50, "repeated_ngram": 1, "too_short": 1}
    assert sum(place < 0.3 for place in look.places) == documents.counts["heldout"]["old"]
    assert look.num_bytes == documents.counts["train_bytes"]["old"] + documents.counts["heldout_bytes"]["old"]


def test_one_big_text_is_cut_so_that_there_are_documents(tmp_path: Path, tiny: Any) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("".join(tiny.text("old", i) + "\n" for i in range(100)))
    look = look_at_text(str(path))
    assert (look.split_on, len(look.places)) == ("line", 100)
    path.write_text("".join(tiny.text("old", i) + "\n\n" for i in range(100)))
    assert look_at_text(str(path)).split_on == "blank_line"


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"prompt": "p", "response": "r", "text": "t"}, ("prompt", "response", "")),
        ({"instruction": "i", "input": "x", "output": "o"}, ("instruction", "output", "input")),
        ({"question": "q", "answer": "a"}, ("question", "answer", "")),
        ({"prompt": "q", "completion": "a"}, ("prompt", "completion", "")),
        ({"input": "q", "output": "a"}, ("input", "output", "")),
        ({"path": "q", "text": "a"}, ("path", "text", "")),
        ({"command": "q", "what it does": "a much longer text"}, ("command", "what it does", "")),
    ],
)
def test_known_pairs(tmp_path: Path, row: dict[str, str], fields: tuple[str, str, str]) -> None:
    rows = [{key: f"{value} {i}" for key, value in row.items()} for i in range(40)]
    look = look_at_records(data_files(str(write_lines(tmp_path / "a.jsonl", rows))))
    assert (look.prompt_field, look.response_field, look.input_field) == fields


def test_text_and_its_class(tmp_path: Path) -> None:
    rows = [{"id": f"{i:06}", "review": f"a long review, number {i}", "stars": i % 5} for i in range(200)]
    look = look_at_records(data_files(str(write_lines(tmp_path / "a.jsonl", rows))))
    assert (look.prompt_field, look.response_field, look.num_classes) == ("review", "stars", 5)


def test_groups_repeats_and_duplicates_are_noticed(tmp_path: Path) -> None:
    rows = questions(200)
    rows += [rows[0], {**rows[1], "answer": "another answer"}, {"doc": "d9", "question": "?", "answer": None}]
    look = look_at_records(data_files(str(write_lines(tmp_path / "a.jsonl", rows))))
    assert (look.group_field, look.duplicates, look.repeated_prompts, look.missing) == ("doc", 1, 1, 1)


def test_chat_records_are_refused_with_the_reason(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}]} for _ in range(30)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"chat records \(messages\) are not supported"):
        look_at_records(data_files(str(path)))
    with pytest.raises(DataError, match=r"chat records \(messages\) are not supported"):
        look_at_text(str(path))


def test_bad_data_is_one_message_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: broken JSON"):
        look_at_text(str(path))
    path.write_text("")
    with pytest.raises(DataError, match="there is nothing in it"):
        look_at_text(str(path))
    with pytest.raises(DataError, match="no file"):
        look_at_text(str(tmp_path / "nowhere"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and then nothing of it")
    with pytest.raises(DataError, match="not a parquet file"):
        look_at_text(str(tmp_path / "b.parquet"))


def test_parquet_and_saved_datasets(tmp_path: Path) -> None:
    import datasets

    rows = questions(60)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    look = look_at_records(data_files(str(tmp_path / "a.parquet")))
    assert (look.sample.data.format, look.prompt_field, len(look.places)) == ("parquet", "question", 60)
    saved = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": saved, "test": saved.select(range(20))}).save_to_disk(str(tmp_path / "both"))
    look = look_at_records(data_files(str(tmp_path / "both")))
    data = look.sample.data
    assert (data.format, data.split, data.left_out, len(look.places)) == ("hf", "train", ("test",), 60)
    saved.save_to_disk(str(tmp_path / "one"))
    assert look_at_text(str(tmp_path / "one")).text_field == "question"


def test_a_sample_of_a_large_file_says_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    monkeypatch.setattr("fmcore.data.look.SAMPLE_CHARS", 5_000)
    path = write_lines(tmp_path / "a.jsonl", [{"text": tiny.text("old", i)} for i in range(400)])
    look = look_at_text(str(path))
    assert not look.sample.exact
    assert len(look.sample.rows) < 100
    assert look.sample.num_records == pytest.approx(400, rel=0.2)


def test_a_deeply_nested_line_is_looked_at_as_text(tmp_path: Path) -> None:
    """By the name it would be JSON; without one, what does not parse is text, and never a crash."""
    (tmp_path / "deep").write_text('{"text": ' + "[" * 100_000)
    assert data_files(str(tmp_path)).format == "text"
