"""The ledger answers like a set, from a sorted file."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmcore.data.ledger import ID_TYPE, Ledger, pack_ids, sorted_unique, write_ledger

# few different bytes, so that ids share prefixes, and both of the words that are sorted come to matter
IDS = st.lists(
    st.builds(lambda a, b: (bytes([a]) * 8 + bytes([b]) * 8).hex(), *[st.sampled_from([0, 1, 127, 128, 255])] * 2)
    | st.binary(min_size=16, max_size=16).map(bytes.hex),
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(ids=IDS, probes=IDS)
def test_membership_is_a_sets(tmp_path_factory: pytest.TempPathFactory, ids: list[str], probes: list[str]) -> None:
    path = tmp_path_factory.mktemp("ledger") / "final.bin"
    write_ledger(path, pack_ids(ids))
    ledger = Ledger(path)
    assert len(ledger) == len(set(ids))
    assert [probe in ledger for probe in [*ids, *probes]] == [probe in set(ids) for probe in [*ids, *probes]]


@settings(deadline=None)
@given(ids=IDS)
def test_sorted_unique_is_pythons(ids: list[str]) -> None:
    assert [row.tobytes().hex() for row in sorted_unique(pack_ids(ids))] == sorted(set(ids))


def test_sorted_unique_of_many_random_ids_in_any_memory_order() -> None:
    raw = np.random.default_rng(0).bytes(16 * 2000)
    ids = np.frombuffer(raw, dtype=ID_TYPE)
    expected = sorted({raw[i : i + 16] for i in range(0, len(raw), 16)})
    assert [row.tobytes() for row in sorted_unique(ids)] == expected
    assert [row.tobytes() for row in sorted_unique(np.repeat(ids, 2)[::-1])] == expected


def test_ids_survive_the_file(tmp_path: Path) -> None:
    write_ledger(tmp_path / "a", pack_ids(["ff" * 16, "00" * 16, "ff" * 16]))
    assert (tmp_path / "a").read_bytes() == b"\x00" * 16 + b"\xff" * 16


def test_an_empty_ledger_holds_nothing(tmp_path: Path) -> None:
    write_ledger(tmp_path / "a", pack_ids([]))
    assert len(Ledger(tmp_path / "a")) == 0
    assert "00" * 16 not in Ledger(tmp_path / "a")
