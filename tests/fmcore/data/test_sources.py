"""Which files a source stands for, and what is said of those that lie beside them."""

from pathlib import Path
from typing import Any

import pytest

from fmcore.artifacts.files import DigestCache
from fmcore.data.sources import data_identity, left_out_notes, shards_of, source_files
from fmcore.recipes.fields import Filters, Source, TextData


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("format", "names", "kept"),
    [
        ("text", "a.txt b.md README SOURCE", "a.txt b.md"),
        ("text", "Makefile 1342-0", "1342-0 Makefile"),
        ("json", "a.jsonl.gz b.JSON c.ndjson.zst README.md SOURCE", "a.jsonl.gz b.JSON c.ndjson.zst"),
        ("json", "part-0 part-1", "part-0 part-1"),
        ("parquet", "a.parquet LICENSE dump.json", "a.parquet"),
    ],
)
def test_a_folder_stands_for_its_files_of_the_format(tmp_path: Path, format: str, names: str, kept: str) -> None:
    for name in names.split():
        _put(tmp_path / "in" / name, "{}")
    source: Any = {"name": "x", "path": str(tmp_path / "in"), "format": format}
    found = sorted(Path(file.path).name for file in source_files(Source(**source)))
    assert found == kept.split()
    notes = list(left_out_notes(TextData(sources=[source])))
    others = sorted(set(names.split()) - set(found))
    assert len(notes) == bool(others)
    assert all(name in notes[0] for name in others)
    everything = Source(**source | {"path": str(tmp_path / "in" / "*")})
    assert len(source_files(everything)) == len(names.split())


def test_what_lies_beside_the_data_is_no_part_of_its_identity(tmp_path: Path) -> None:
    _put(tmp_path / "in" / "a.txt", "a text")
    source = Source(name="x", path=str(tmp_path / "in"))
    before = data_identity(source, source.path, DigestCache(tmp_path / "digests"))
    _put(tmp_path / "in" / "LICENSE", "do what you like")
    assert data_identity(source, source.path, DigestCache(tmp_path / "digests")) == before
    shards = shards_of(source, source.path, DigestCache(tmp_path / "digests"), Filters())
    assert [Path(shard.path).name for shard in shards] == ["a.txt"]
