"""Parquet files and Hugging Face data sets: the rows that JSON lines of the same content would give."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmcore.artifacts.files import DigestCache
from fmcore.artifacts.types import Documents
from fmcore.data.columns import hub_commit
from fmcore.data.prepare import documents_step
from fmcore.data.sources import total_bytes
from fmcore.data.tables import read_rows
from fmcore.errors import DataError
from fmcore.recipes.fields import Source, TaskData, TextData

Prepare = Callable[..., Documents]
COMMIT = "0123456789" * 4


def text(number: int) -> str:
    return f"This is document number {number}, as a row of a table."


ROWS = [{"text": text(n), "url": f"u{n}", "score": n / 2, "tags": ["a"]} for n in range(60)]


def data(path: Path | str, format: str, **changes: Any) -> TextData:
    fields = {key: changes.pop(key) for key in list(changes) if key in Source.model_fields}
    return TextData(sources=[{"name": "s", "path": str(path), "format": format} | fields], holdout=0.4, **changes)


def contents(documents: Documents) -> list[tuple[str, str]]:
    found = (read_rows(documents.path / side / "s.parquet") for side in ("train", "heldout"))
    return sorted((row["content"], row["metadata"]) for rows in found for row in rows)


@pytest.fixture
def expected(prepare: Prepare, tmp_path: Path) -> list[tuple[str, str]]:
    """What the rows give as JSON lines."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return contents(prepare(data(path, "json"), home="expected"))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("rows_per_group", [7, 1000])
def test_parquet(
    prepare: Prepare, tmp_path: Path, expected: list[tuple[str, str]], kind: pa.DataType, rows_per_group: int
) -> None:
    table = pa.Table.from_pylist(ROWS)
    table = table.set_column(0, "text", table["text"].cast(kind))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=rows_per_group)
    assert contents(prepare(data(tmp_path / "a.parquet", "parquet"))) == expected


def test_a_parquet_file_that_breaks_off_keeps_what_came_before(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=10, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(4).column(0).data_page_offset
    content[start : start + 60] = b"\xff" * 60
    path.write_bytes(content)
    documents = prepare(data(path, "parquet", on_bad_input="quarantine"))
    assert documents.counts["read"] == {"s": 41}
    (bad,) = read_rows(documents.path / "quarantine.parquet")
    assert (bad["line"], bad["reason"]) == ("row 41", "damaged_table")


def test_a_row_that_is_no_utf_8_spoils_no_other(prepare: Prepare, tmp_path: Path) -> None:
    values = [text(n).encode() for n in range(40)]
    values[7] = b"caf\xe9 in a column of text"
    column = pa.Array.from_buffers(pa.string(), 40, pa.array(values, pa.binary()).buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    documents = prepare(data(tmp_path / "a.parquet", "parquet", on_bad_input="quarantine"))
    assert documents.counts["quarantined"] == {"s": {"invalid_utf8": 1}}
    assert next(read_rows(documents.path / "quarantine.parquet"))["line"] == "row 8"


def test_records_of_a_table(prepare: Prepare, tmp_path: Path) -> None:
    rows = [{"q": f"question {n}?", "a": n % 3, "story": n % 9} for n in range(60)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    task = {"name": "qa", "path": str(tmp_path / "a.parquet"), "format": "parquet", "prompt_field": "q"}
    documents = prepare(TaskData(tasks=[task | {"response_field": "a", "group_field": "story", "holdout": 0.5}]))
    assert documents.counts["choices"] == {"qa": ["0", "1", "2"]}


# ---- Hugging Face data sets


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two splits, as save_to_disk writes them."""
    splits = {"train": datasets.Dataset.from_list(ROWS), "exam": datasets.Dataset.from_list(ROWS[:30])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_folder_of_save_to_disk(prepare: Prepare, saved: Path, expected: list[tuple[str, str]]) -> None:
    assert contents(prepare(data(saved, "hf"))) == expected
    assert contents(prepare(data(saved / "train", "hf"))) == expected
    assert prepare(data(saved, "hf", split="exam")).counts["read"] == {"s": 30}
    assert total_bytes(Source(name="s", path=str(saved), format="hf")) > 1000


@pytest.mark.parametrize("form", ["folder", "file", "glob", "json"])
def test_files_that_datasets_can_load(
    prepare: Prepare, tmp_path: Path, expected: list[tuple[str, str]], form: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for part in range(2):
        rows = ROWS[part * 30 : part * 30 + 30]
        if form == "json":
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{part}.parquet")
    where = {"file": folder / "0.parquet", "glob": folder / "*.parquet"}.get(form, folder)
    found = contents(prepare(data(where, "hf")))
    assert found == ([row for row in expected if row in found] if form == "file" else expected)
    assert len(found) == (30 if form == "file" else 60)


def test_bad_rows_of_a_data_set_are_set_aside(prepare: Prepare, tmp_path: Path) -> None:
    datasets.Dataset.from_list([*ROWS, {"text": None}]).save_to_disk(tmp_path / "saved")
    documents = prepare(data(tmp_path / "saved", "hf", on_bad_input="quarantine"))
    assert documents.counts["quarantined"] == {"s": {"wrong_type": 1}}
    with pytest.raises(DataError, match="row 61: field 'text' holds null, expected text"):
        prepare(data(tmp_path / "saved", "hf"), home="stop")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "test"}, "there is no split 'test'; splits here: train, exam. Set split"),
        ({"text_field": "body"}, "there is no column 'body'; columns here: text, url, score"),
        ({"text_field": "tags"}, "column 'tags' is list<"),
    ],
)
def test_a_split_or_column_that_is_not_there(
    prepare: Prepare, saved: Path, changes: dict[str, str], words: str
) -> None:
    with pytest.raises(DataError) as refused:
        prepare(data(saved, "hf", **changes))
    assert words in str(refused.value)


def test_an_hf_source_at_an_address_is_refused() -> None:
    with pytest.raises(DataError, match="reads a local folder or a name on the hub, given s3://"):
        total_bytes(Source(name="s", path="s3://data/x", format="hf"))


# ---- the hub, played by functions


def test_a_data_set_on_the_hub(
    prepare: Prepare, saved: Path, expected: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The revision is resolved once, to a commit, which is read and is the identity."""
    asked = []

    def load_dataset(path: str, name: str | None, **options: Any) -> Any:
        asked.append((path, name, options))
        return datasets.load_from_disk(saved)["train"]

    monkeypatch.setattr("fmcore.data.columns.hub_commit", lambda path, revision: COMMIT)
    monkeypatch.setattr("fmcore.data.sources.hub_commit", lambda path, revision: COMMIT)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = prepare(data("owner/name", "hf", config_name="en", revision="main"))
    assert contents(documents) == expected
    assert asked == [("owner/name", "en", {"split": "train", "revision": COMMIT, "streaming": True})]
    assert documents.config["sources"][0]["files"] == [COMMIT]
    assert "revision" not in documents.config["sources"][0]


def test_the_hub_that_is_away_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"owner/name: no folder of that name lies here, and the Hugging Face hub"):
        hub_commit("owner/name", "")
    assert hub_commit("owner/name", COMMIT) == COMMIT


# ---- identity


def test_new_settings_are_identity_only_where_they_are_used(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")

    def config(what: TextData) -> dict[str, Any]:
        return documents_step("x", what, None, DigestCache(tmp_path / "digests.json")).config

    plain = config(data(tmp_path / "a.jsonl", "json"))
    assert set(plain) == {"sources", "eval_sources", "holdout", "filters"}
    assert set(plain["sources"][0]) == {"name", "format", "text_field", "split_on", "files"}
    assert config(data(tmp_path / "a.jsonl", "json", on_bad_input="quarantine"))["on_bad_input"] == "quarantine"
    assert config(data(saved, "hf"))["sources"][0]["split"] == "train"


@pytest.mark.parametrize("field", ["split", "config_name", "revision"])
def test_settings_of_hf_are_refused_elsewhere(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is a setting of format: hf alone; format is json"):
        Source(name="s", path="x", format="json", **{field: "other"})
