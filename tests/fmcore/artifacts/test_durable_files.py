"""Files written whole or not at all, and digests that are remembered only while they hold."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fmcore.artifacts import files
from fmcore.artifacts.files import DigestCache, canonical_json, read_json, sha256_file, write_json


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_sha256_of_a_file_longer_than_a_chunk(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # 1.2 MiB
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == digest(content)


def test_canonical_json_is_one_spelling() -> None:
    assert canonical_json({"b": [1, "ü"], "a": None}) == '{"a":null,"b":[1,"ü"]}'
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"a": float("inf")})


def test_write_json_replaces_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for value in ({"n": 1}, {"n": [2, "ü"]}):
        write_json(path, value)
        assert read_json(path) == value
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"n": object()})
    assert read_json(tmp_path / "a.json") == 1


WRITER = """
import sys
from pathlib import Path
from fmcore.artifacts.files import write_json
for n in range(150):
    write_json(Path(sys.argv[1]), {"writer": sys.argv[2], "n": n, "filler": sys.argv[2] * 20_000})
"""


def test_a_reader_sees_one_whole_file_while_two_processes_write_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"writer": "", "n": 0, "filler": ""})
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "ab"]
    try:
        seen = set()
        while any(writer.poll() is None for writer in writers):
            value = json.loads(path.read_text())
            assert set(value["filler"]) <= {value["writer"]}
            seen.add(value["writer"])
    finally:
        codes = [writer.wait(timeout=60) for writer in writers]
    assert codes == [0, 0]
    assert seen >= {"a", "b"}
    assert list(tmp_path.iterdir()) == [path]


# ---- the digest cache


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read for their digest."""
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return sha256_file(path)

    monkeypatch.setattr(files, "sha256_file", counted)
    return read


def test_a_second_look_reads_nothing_even_in_another_process(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    cache = DigestCache(tmp_path / "cache" / "digests.json")
    assert [cache.sha256(path), cache.sha256(path)] == [digest(b"one")] * 2
    cache.save()
    assert DigestCache(tmp_path / "cache" / "digests.json").sha256(path) == digest(b"one")
    assert reads == [path]


def test_what_was_not_saved_is_not_remembered(tmp_path: Path, reads: list[Path]) -> None:
    (tmp_path / "a").write_bytes(b"one")
    for _ in range(2):
        DigestCache(tmp_path / "digests.json").sha256(tmp_path / "a")
    assert len(reads) == 2


def test_another_size_or_mtime_is_another_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    cache = DigestCache(tmp_path / "digests.json")
    path.write_bytes(b"one")
    os.utime(path, ns=(0, 1_000_000_000))
    cache.sha256(path)
    path.write_bytes(b"longer")
    os.utime(path, ns=(0, 1_000_000_000))
    assert cache.sha256(path) == digest(b"longer")
    path.write_bytes(b"LONGER")
    os.utime(path, ns=(0, 1_000_000_001))
    assert cache.sha256(path) == digest(b"LONGER")


def test_rehash_mistrusts_what_is_remembered_and_corrects_it(tmp_path: Path) -> None:
    path, where = tmp_path / "a", tmp_path / "digests.json"

    def put(content: bytes) -> None:
        path.write_bytes(content)
        os.utime(path, ns=(0, 1_000_000_000))

    put(b"one")
    cache = DigestCache(where)
    cache.sha256(path)
    cache.save()
    put(b"two")
    assert DigestCache(where).sha256(path) == digest(b"one")  # what a cache by size and mtime cannot see
    mistrusting = DigestCache(where, rehash=True)
    assert mistrusting.sha256(path) == digest(b"two")
    mistrusting.save()
    assert DigestCache(where).sha256(path) == digest(b"two")


def test_two_caches_keep_what_each_learnt(tmp_path: Path) -> None:
    where = tmp_path / "digests.json"
    first, second = DigestCache(where), DigestCache(where)
    for name, cache in (("a", first), ("b", second)):
        (tmp_path / name).write_text(name)
        cache.sha256(tmp_path / name)
        cache.save()
    assert {Path(key).name for key in read_json(where)} == {"a", "b"}


@pytest.mark.parametrize("content", ["", "{", "[1, 2", "\x00"])
def test_a_broken_cache_file_is_no_cache(tmp_path: Path, content: str) -> None:
    (tmp_path / "digests.json").write_text(content)
    (tmp_path / "a").write_bytes(b"one")
    assert DigestCache(tmp_path / "digests.json").sha256(tmp_path / "a") == digest(b"one")
