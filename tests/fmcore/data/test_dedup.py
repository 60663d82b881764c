"""Ids seen so far, on disk."""

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmcore.data.dedup import SeenIds
from fmcore.data.normalize import content_id

IDS = st.lists(st.integers(0, 30).map(lambda n: content_id(str(n))), max_size=60)


@settings(max_examples=20, deadline=None)
@given(ids=IDS, probes=IDS)
def test_like_a_set(tmp_path_factory: pytest.TempPathFactory, ids: list[str], probes: list[str]) -> None:
    expected: set[str] = set()
    with SeenIds(tmp_path_factory.mktemp("seen") / "ids") as seen:
        for document_id in ids:
            assert seen.add(document_id) == (document_id not in expected)
            expected.add(document_id)
        assert [probe in seen for probe in probes] == [probe in expected for probe in probes]


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), SeenIds(tmp_path / "ids") as seen:
        seen.add("00" * 16)
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_python_holds_no_id(tmp_path: Path) -> None:
    with SeenIds(tmp_path / "ids") as seen:
        tracemalloc.start()
        for number in range(20_000):
            seen.add(f"{number:032x}")
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert f"{19_999:032x}" in seen
    assert held < 100_000  # a set of them takes 3 MB
