"""`strata lineage --document`: which versions' weights saw a text, a file, a folder; and of the others why not."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fmcore.artifacts.types import Documents
from fmcore.data.ledger import Ledger

pytestmark = pytest.mark.usefixtures("inline")


def asked(cli: Any, home: Any, *arguments: object) -> dict[str, dict[str, Any]]:
    """Version -> its answer, of a question about one document."""
    said = cli(home, "lineage", *arguments, "--json")
    assert said.code == 0, said.err
    [document] = json.loads(said.out)["documents"]
    return {answer["version"]: answer for answer in document["versions"]}


def fate(cli: Any, home: Any, *arguments: object) -> str:
    """What plays/1 says of one document."""
    [found] = asked(cli, home, *arguments)["plays/1"]["fates"]
    return found


def texts(home: Any, side: str) -> list[str]:
    [documents] = home.store.all(Documents)
    return [row["content"] for row in pq.read_table(documents.path / side / "old.parquet").to_pylist()]


def test_every_fate_of_a_literal_text(cli: Any, base_home: Any, tiny: Any) -> None:
    assert fate(cli, base_home, "--text", texts(base_home, "train")[0]) == "seen"
    assert fate(cli, base_home, "--text", "  " + texts(base_home, "train")[0] + "\r\n") == "seen"  # normalised alike
    assert fate(cli, base_home, "--text", texts(base_home, "heldout")[0]) == "held out"
    assert fate(cli, base_home, "--text", tiny.text("new", 7)) == "not in its data"
    said = cli(base_home, "lineage", "--text", tiny.text("new", 7))
    assert said.code == 0
    assert "seen by no registered version" in said.out


def test_prepared_but_never_sampled_and_dropped(cli: Any, fresh_home: Any, tiny: Any, tmp_path: Path) -> None:
    rows = [{"text": tiny.text("old", i)} for i in range(60)] + [{"text": "too short"}]
    path = tmp_path / "old.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fresh_home.run(tiny.pretrain(path, train={"tokens": 256, "batch_tokens": 64}))
    answer = asked(cli, fresh_home, "--document", path)["plays/1"]
    assert answer["documents"] == 61
    assert set(answer["fates"]) == {"seen", "held out", "prepared, never sampled", "dropped: too_short"}
    [checkpoint] = (fresh_home.path / "artifacts" / "checkpoint").glob("plays-*")
    assert answer["seen"] == answer["fates"]["seen"] == len(Ledger(checkpoint / "ledger" / "final.bin"))


def test_a_file_is_cut_as_its_source_was(cli: Any, fresh_home: Any, tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("".join(tiny.text("old", i) + "\n" for i in range(60)))
    source = {"name": "old", "path": str(path), "format": "text", "split_on": "line"}
    fresh_home.run(tiny.pretrain(path, data={"sources": [source]}))
    answer = asked(cli, fresh_home, "--document", path)["plays/1"]
    assert (answer["read"], answer["documents"]) == ("split_on: line", 60)
    assert answer["seen"] > 30
    one = tmp_path / "one.txt"
    one.write_text(tiny.text("old", 0) + "\n\n")
    assert fate(cli, fresh_home, "--document", one) in ("seen", "held out")


def test_records_by_prompt_and_response(cli: Any, based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    based.run(tiny.finetune(corpora["records"]))
    answers = asked(cli, based, "--document", corpora["records"])
    tuned = answers["plays-kinds/1"]
    assert tuned["read"] == "records: prompt, response"
    assert tuned["fates"].keys() >= {"seen", "held out"}
    assert sum(tuned["fates"].values()) == 90
    assert "not in its data" not in tuned["fates"]
    assert answers["plays/1"]["seen"] == 0
    inherited = asked(cli, based, "plays-kinds/1", "--document", corpora["old"])
    assert list(inherited) == ["plays-kinds/1"]
    assert inherited["plays-kinds/1"]["seen"] > 0  # what its base saw, its weights saw
    assert "held out by plays/1" in inherited["plays-kinds/1"]["fates"]


def test_a_folder_is_a_table_with_sums(cli: Any, base_home: Any, tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "asked"
    tiny.corpus(folder, "old")
    tiny.corpus(folder, "new")
    said = cli(base_home, "lineage", "--document", folder)
    assert said.code == 0, said.err
    [row] = [line for line in said.out.splitlines() if "old.jsonl" in line]
    assert "plays/1 (" in row
    assert "of 60)" in row
    assert any("new.jsonl" in line and "no registered version" in line for line in said.out.splitlines())
    assert "of 120 documents, in 1 of 2 files" in said.out


def test_an_imported_ancestor_says_that_its_history_is_unknown(
    cli: Any, based: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fmcore.data import seen

    monkeypatch.setattr(seen, "IMPORTED", "pretrain")  # as if plays/1 had come from outside
    said = cli(based, "lineage", "--text", tiny.text("new", 7))
    assert said.code == 0
    assert "history unknown" in said.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--document", "nowhere.txt"], "nowhere.txt"),
        (["--document", "binary"], "holds no text"),
        (["--document", "broken.jsonl"], "broken.jsonl:2"),
        (["--document", "other.jsonl"], "no record has a field"),
        (["--document", "binary", "--text", "x"], "one of the two"),
        (["nobody@champion", "--text", "x"], "nobody"),
        ([], "give a model"),
    ],
)
def test_bad_input_is_one_message(cli: Any, base_home: Any, arguments: list[str], message: str) -> None:
    Path("binary").write_bytes(b"\x00\xff\xfe" * 50)
    Path("broken.jsonl").write_text('{"text": "x"}\n{"text"\n')
    Path("other.jsonl").write_text('{"title": "x"}\n')
    said = cli(base_home, "lineage", *arguments)
    assert said.code == 2
    assert message in said.err


def test_a_damaged_ledger_is_refused(cli: Any, based: Any) -> None:
    [ledger] = (based.path / "artifacts" / "checkpoint").glob("*/ledger/final.bin")
    data = bytearray(ledger.read_bytes())
    data[0] ^= 1
    ledger.write_bytes(data)
    said = cli(based, "lineage", "--text", "x")
    assert said.code == 1
    assert "final.bin is damaged" in said.err
