"""Whatever is wrong with a file: one message that names the place, or set aside with file, line and reason."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fmcore.artifacts.types import Documents
from fmcore.data.accounts import account, quarantine_notes
from fmcore.data.tables import read_rows
from fmcore.errors import DataError
from fmcore.recipes.fields import TaskData, TextData

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


@pytest.mark.parametrize("name", sorted(cases.BAD_INPUTS.keys() - cases.REASONS.keys()))
def test_a_path_that_leads_nowhere_stops_either_way(prepare: Prepare, made: Callable, name: str) -> None:
    path, format, words = made(name)
    with pytest.raises(DataError, match=words):
        prepare(data(path, format, on_bad_input="quarantine"))


def lines(folder: Path, *contents: bytes) -> Path:
    """Sixty good JSON lines, and a file of the given ones."""
    path, _, _ = cases.BAD_INPUTS["broken_json"](folder)
    (path / "bad.jsonl").write_bytes(b"\n".join(contents))
    return path


def good(number: int) -> bytes:
    return json.dumps({"text": cases.good_text(number)}).encode()


def test_one_bad_line_spoils_no_other(prepare: Prepare, tmp_path: Path) -> None:
    bad = [b"{", b"\xff\xfe{}", b'{"text": 5}', b'{"text": "' + b"x" * (17 << 20) + b'"}', b"[" * 2_000]
    mixed = [line for n, one in enumerate(bad) for line in (good(100 + n), one)]
    documents = prepare(data(lines(tmp_path / "in", *mixed), "json", on_bad_input="quarantine"))
    assert [(row["line"], row["reason"]) for row in quarantined(documents)] == [
        ("2", "broken_json"), ("4", "invalid_utf8"), ("6", "wrong_type"), ("8", "too_long"), ("10", "too_deep"),
    ]  # fmt: skip
    assert documents.counts["train"]["s"] + documents.counts["heldout"]["s"] == 65


def test_in_a_list_what_is_broken_ends_it_and_what_is_only_wrong_does_not(prepare: Prepare, tmp_path: Path) -> None:
    path = lines(tmp_path / "in")
    elements = [good(100), b'{"text": "caf\xe9 au lait"}', b"5", good(101), b'{"text" 1}', good(102)]
    (path / "bad.jsonl").write_bytes(b"[" + b",\n".join(elements) + b"]")
    documents = prepare(data(path, "json", on_bad_input="quarantine"))
    assert [(row["line"], row["reason"]) for row in quarantined(documents)] == [
        ("[2]", "invalid_utf8"), ("[3]", "not_an_object"), ("[5]", "broken_json"),
    ]  # fmt: skip
    assert documents.counts["train"]["s"] + documents.counts["heldout"]["s"] == 62


def test_what_is_odd_but_readable_is_read(prepare: Prepare, tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    odd = [bom + good(100), bom + good(101) + b"\r", b" ", b"", good(102)[:-1] + b', "score": NaN}']
    documents = prepare(data(lines(tmp_path / "in", *odd), "json"))
    assert documents.counts["read"] == {"s": 63}
    assert documents.counts["quarantined"] == {}


def test_a_file_is_unpacked_whatever_its_name(prepare: Prepare, tmp_path: Path) -> None:
    import gzip

    path = lines(tmp_path / "in")
    (path / "bad.jsonl").write_bytes(gzip.compress(good(100)))
    assert prepare(data(path, "json")).counts["read"] == {"s": 61}


@pytest.mark.parametrize("split_on", ["line", "blank_line"])
def test_a_bad_line_of_a_text_spoils_its_document_alone(prepare: Prepare, tmp_path: Path, split_on: str) -> None:
    ends = b"\n" if split_on == "line" else b"\n\n"
    parts = [cases.good_text(n).encode() for n in range(60)]
    parts[7] = b"caf\xe9 in a line of its own"
    (tmp_path / "a.txt").write_bytes(ends.join(parts))
    source = {"name": "s", "path": str(tmp_path / "a.txt"), "split_on": split_on}
    documents = prepare(TextData(sources=[source], holdout=0.5, on_bad_input="quarantine"))
    (bad,) = quarantined(documents)
    assert (bad["line"], bad["reason"]) == ("8" if split_on == "line" else "15", "invalid_utf8")
    assert documents.counts["read"] == {"s": 60}


def test_empty_files_are_empty_documents(prepare: Prepare, tmp_path: Path) -> None:
    path = lines(tmp_path / "in")
    for name in ("bad.jsonl", "b.jsonl"):
        (path / name).write_bytes(b"")
    documents = prepare(data(path, "json"))
    assert documents.counts["dropped"] == {"s": {"empty": 2}}  # the second is no duplicate


def test_nothing_usable_at_all_says_what_there_was(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n{\n{\n{\n")
    with pytest.raises(DataError) as refused:
        prepare(data(tmp_path / "a.jsonl", "json", on_bad_input="quarantine"))
    message = str(refused.value)
    counted = "s: read 4 = 0 train + 0 held out + 0 dropped + 4 quarantined (broken_json 4)"
    assert message.startswith(f"the sources hold no documents that can be used: {counted}. First: ")
    assert message.count("a.jsonl:") == 3


@pytest.mark.parametrize(
    ("content", "format", "remedy"),
    [
        (b'{"body": "a text", "id": 1}\n' * 50, "json", "names another field"),
        (b"id,body\n1,a text\n" * 50, "json", "format is not that of the files"),
        (b"PAR1", "text", "format is not that of the files"),
        (b"a caf\xe9\n", "text", "convert the files to UTF-8"),
    ],
)
@pytest.mark.parametrize("num_files", [1, 3])
def test_nothing_is_to_be_set_aside_where_all_of_a_source_is_wrong(
    prepare: Prepare, tmp_path: Path, content: bytes, format: str, remedy: str, num_files: int
) -> None:
    for number in range(num_files):
        (tmp_path / f"{number}.in").write_bytes(content + b"\n" * number)
    with pytest.raises(DataError) as refused:
        prepare(data(tmp_path / "*.in", format))
    assert "quarantine" not in str(refused.value)
    assert remedy in str(refused.value)
    assert "of s" in str(refused.value)


def test_what_is_wrong_in_many_files_but_one_is_set_aside(prepare: Prepare, tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.in").write_text(json.dumps({"body": str(number)}) + "\n")
    (tmp_path / "good.in").write_text("".join(json.dumps({"text": cases.good_text(n)}) + "\n" for n in range(60)))
    with pytest.raises(DataError, match=r"or set data\.on_bad_input: quarantine"):
        prepare(data(tmp_path / "*.in", "json"))


def test_the_same_is_told_of_records_that_lack_a_field(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps({"question": "what?", "answer": "this"}) + "\n")
    tasks = TaskData(tasks=[{"name": "t", "path": str(tmp_path / "r.jsonl")}])
    with pytest.raises(DataError, match=r"Set prompt_field of task t\. It is all of t, .*names another field"):
        prepare(tasks)


def test_json_that_is_read_as_text_is_a_mistake(prepare: Prepare, tmp_path: Path) -> None:
    path = lines(tmp_path / "in", good(1))
    with pytest.raises(DataError, match=r"its files hold JSON objects .* set format: json and text_field"):
        prepare(data(path, "text"))
    (path / "code.py").write_text("print()")  # JSON among other files is text like theirs
    with pytest.raises(DataError, match="held out"):
        prepare(data(path, "text"))


def test_records_go_the_same_way(prepare: Prepare, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"question {n}?", "response": "yes"}) for n in range(60)]
    bad = ["{", '{"prompt": "q"}', '{"prompt": "q", "response": NaN}', '{"prompt": "q", "response": "a\\u0000"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows + bad))
    (tmp_path / "b.jsonl").write_text("")
    task = {"name": "qa", "path": str(tmp_path / "*.jsonl"), "holdout": 0.5}
    with pytest.raises(DataError, match=r"a\.jsonl:61: broken JSON: .* set data\.on_bad_input: quarantine"):
        prepare(TaskData(tasks=[task]))
    counts = prepare(TaskData(tasks=[task], on_bad_input="quarantine")).counts
    assert counts["quarantined"] == {"qa": {"broken_json": 1, "missing_field": 1, "nul_bytes": 1, "wrong_type": 1}}
    assert counts["dropped"] == {"qa": {"empty": 1}}
    assert counts["read"]["qa"] == 65 == counts["train"]["qa"] + counts["heldout"]["qa"] + 5


# ---- shown


def test_what_was_read_is_accounted_for_in_one_line_per_source() -> None:
    counts = {
        "read": {"a": 1234, "b": 1}, "train": {"a": 1000}, "heldout": {"a": 200},
        "dropped": {"a": {"duplicate": 30}, "b": {"empty": 1}}, "quarantined": {"a": {"broken_json": 4}},
    }  # fmt: skip
    assert list(account(counts)) == [
        "a: read 1,234 = 1,000 train + 200 held out + 30 dropped (duplicate 30) + 4 quarantined (broken_json 4)",
        "b: read 1 = 0 train + 0 held out + 1 dropped (empty 1) + 0 quarantined",
    ]


def test_the_first_three_places_are_shown(prepare: Prepare, tmp_path: Path) -> None:
    path = lines(tmp_path / "in", *[b"{"] * 5)
    documents = prepare(data(path, "json", on_bad_input="quarantine"))
    where, *places = quarantine_notes(documents)
    assert str(documents.path / "quarantine.parquet") in where
    assert [place.split(": ")[0].strip() for place in places] == [f"{path}/bad.jsonl:{n}" for n in (1, 2, 3)]
    assert list(quarantine_notes(prepare(data(lines(tmp_path / "fine"), "json")))) == []


# ---- memory


@pytest.mark.slow
@pytest.mark.parametrize("name", ["long_line", "gzip_bomb", "zstd_bomb", "deep_json", "blank_lines"])
def test_memory_stays_below_a_gigabyte(made: Callable, tmp_path: Path, name: str) -> None:
    if name == "blank_lines":
        path, format = lines(tmp_path / "in", *[b""] * 1_000_000), "json"
    else:
        path, format, _ = made(name)
    code = f"""
from pathlib import Path
from fmcore.artifacts.store import Store
from fmcore.data.prepare import documents_step, prepare_documents
from fmcore.recipes.fields import TextData
source = {{"name": "s", "path": {str(path)!r}, "format": {format!r}}}
data, store = TextData(sources=[source], holdout=0.5, on_bad_input="quarantine"), Store(Path("home"))
prepare_documents(documents_step("x", data, None, store.digests), data, None, store)
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])  # getrusage counts the parent's, too
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=os.environ
    )
    assert int(done.stdout) < 512 * 1024
