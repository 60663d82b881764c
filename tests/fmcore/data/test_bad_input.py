"""Whatever is wrong with a file: one message that names the place, or set aside with file, line and reason."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fmcore.artifacts.types import Documents
from fmcore.data.tables import read_rows
from fmcore.errors import DataError
from fmcore.recipes.fields import TextData

_SPEC = importlib.util.spec_from_file_location("bad_inputs", Path(__file__).parents[2] / "bad_inputs.py")
assert _SPEC and _SPEC.loader
cases = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cases)

Prepare = Callable[..., Documents]


def data(path: Path, format: str, **changes: Any) -> TextData:
    source = {"name": "s", "path": str(path), "format": format}
    return TextData(**({"sources": [source], "holdout": 0.5} | changes))


def quarantined(documents: Documents) -> list[dict[str, Any]]:
    return list(read_rows(documents.path / "quarantine.parquet"))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str, str]]:
    """Each folder is made once."""
    folder = tmp_path_factory.mktemp("bad")
    known: dict[str, tuple[Path, str, str]] = {}

    def make(name: str) -> tuple[Path, str, str]:
        if name not in known:
            known[name] = cases.BAD_INPUTS[name](folder / name)
        return known[name]

    return make


@pytest.mark.parametrize("name", cases.BAD_INPUTS)
def test_stop_is_one_message_with_the_place_and_nothing_half_written(
    prepare: Prepare, made: Callable, tmp_path: Path, name: str
) -> None:
    path, format, words = made(name)
    with pytest.raises(DataError) as refused:
        prepare(data(path, format))
    message = str(refused.value)
    assert words in message
    assert "\n" not in message
    assert ("set data.on_bad_input: quarantine" in message) == (name in cases.REASONS)
    artifacts = tmp_path / "home" / "artifacts" / "documents"
    assert [p for p in artifacts.rglob("*") if p.is_file() and ".locks" not in p.parts] == []


@pytest.mark.parametrize("name", cases.REASONS)
def test_quarantine_sets_it_aside_and_goes_on(prepare: Prepare, made: Callable, name: str) -> None:
    path, format, _ = made(name)
    documents = prepare(data(path, format, on_bad_input="quarantine"))
    counts = documents.counts
    rows = quarantined(documents)
    assert counts["quarantined"] == {"s": {cases.REASONS[name]: len(rows)}}
    bad = rows[-1]
    assert (bad["source"], bad["reason"]) == ("s", cases.REASONS[name])
    assert Path(bad["file"]).name.startswith("bad.")
    assert len(bad["excerpt"]) <= 200
    kept = counts["train"]["s"] + counts["heldout"]["s"]
    assert kept >= cases.NUM_GOOD  # and what a file held before it broke
    dropped = sum(counts["dropped"].get("s", {}).values())
    assert counts["read"]["s"] == kept + dropped + len(rows)


@pytest.mark.parametrize("name", ["missing_path", "empty_glob", "empty_folder"])
def test_a_path_that_leads_nowhere_stops_either_way(prepare: Prepare, made: Callable, name: str) -> None:
    path, format, words = made(name)
    with pytest.raises(DataError, match=words):
        prepare(data(path, format, on_bad_input="quarantine"))
