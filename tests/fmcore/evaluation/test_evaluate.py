"""Reports: which sets, what is left out, intervals, forgetting and gain with their signs."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fmcore.artifacts.ancestry import checkpoint_of, documents_of
from fmcore.artifacts.types import EvalReport, RegisteredModel
from fmcore.data.ledger import Ledger, pack_ids, write_ledger
from fmcore.data.tables import read_rows
from fmcore.evaluation.child import select_rows
from fmcore.evaluation.spec import ANSWERS_FILE, DOCUMENTS_FILE, SAMPLES_FILE, EvalSet, EvalSpec
from fmcore.model.weights import Weights

pytestmark = pytest.mark.usefixtures("inline")


def rows_of(report: EvalReport, name: str) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(report.path / DOCUMENTS_FILE).to_pylist()
    return {row["id"]: row for row in rows if row["set"] == name}


def test_a_report_holds_every_held_out_document(base_home: Any) -> None:
    [model] = base_home.store.all(RegisteredModel)
    report = base_home.store.get(model.parents["report"], EvalReport)
    held_out = documents_of(base_home.store, model).path / "heldout" / "old.parquet"
    contents = {row["id"]: row["content"] for row in read_rows(held_out)}
    rows = rows_of(report, "old")
    assert rows.keys() == contents.keys()
    assert all(rows[i]["bytes"] == len(contents[i].encode()) for i in rows)
    total = sum(r["bits"] for r in rows.values()) / sum(r["bytes"] for r in rows.values())
    metrics = report.metrics
    assert metrics["eval/old/bpb"] == pytest.approx(total)
    assert metrics["eval/old/bpb_low"] < metrics["eval/old/bpb"] < metrics["eval/old/bpb_high"]
    assert 0.5 < total < 8
    samples = json.loads((report.path / SAMPLES_FILE).read_text())
    assert [set(sample) for sample in samples] == [{"set", "prompt", "generated", "response"}]


def test_forgetting_and_gain_have_the_right_sign(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    """After training hard on the new alone, the old is worse (positive) and the new better (positive)."""
    recipe = tiny.continued(corpora["new"], train={"epochs": 6, "lr": 1e-2}, replay={"fraction": 0})
    parent = based.resolve(recipe).parent
    report = based.evaluate(recipe)
    before = based.store.get(parent.parents["report"], EvalReport).metrics["eval/old/bpb"]
    assert report.metrics["forgetting/old"] > 0.05
    assert report.metrics["forgetting/old"] == pytest.approx(report.metrics["eval/old/bpb"] - before, rel=1e-6)
    assert report.metrics["gain/new"] > 0.1
    assert report.metrics["gain/new_low"] < report.metrics["gain/new"] < report.metrics["gain/new_high"]
    with_replay = based.evaluate(tiny.continued(corpora["new"], train={"epochs": 6, "lr": 1e-2},
                                                replay={"fraction": 0.5}))  # fmt: skip
    assert with_replay.metrics["forgetting/old"] < report.metrics["forgetting/old"]


def test_ancestors_sets_are_scored_after_a_finetuning(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    report = based.evaluate(tiny.finetune(corpora["records"]))
    assert {"eval/kinds/accuracy", "eval/kinds/chance", "eval/old/bpb", "forgetting/old", "gain/kinds"} <= set(
        report.metrics
    )
    answers = pq.read_table(report.path / ANSWERS_FILE).to_pylist()
    assert report.metrics["eval/kinds/accuracy"] == pytest.approx(sum(a["correct"] for a in answers) / len(answers))
    counts = {r: sum(a["response"] == r for a in answers) for r in {a["response"] for a in answers}}
    assert report.metrics["eval/kinds/chance"] == pytest.approx(max(counts.values()) / len(answers))
    assert set(counts) == {"yes", "no", "perhaps tomorrow"}


def test_documents_that_the_weights_have_seen_are_left_out(base_home: Any, tmp_path: Path) -> None:
    [model] = base_home.store.all(RegisteredModel)
    path = documents_of(base_home.store, model).path / "heldout" / "old.parquet"
    every = sorted(row["id"] for row in read_rows(path))
    write_ledger(tmp_path / "ledger.bin", pack_ids(every[:3]))
    item = EvalSet(name="old", origin="x/old", kind="text", path=path)
    spec = EvalSpec(
        weights=Weights(folder=tmp_path), tokenizer=tmp_path, ledger=tmp_path / "ledger.bin", sets=(item,),
        seq_len=32, max_documents=10, max_examples=10, num_samples=0, sample_tokens=1, device="cpu", threads=1,
    )  # fmt: skip
    chosen = [row["id"] for row in select_rows(item, spec, Ledger(spec.ledger))]
    assert chosen == every[3:13]  # the lowest ids, whoever scores them


def test_no_held_out_document_is_in_the_models_own_ledger(base_home: Any) -> None:
    [model] = base_home.store.all(RegisteredModel)
    ledger = Ledger(checkpoint_of(base_home.store, model).ledger("final"))
    folder = documents_of(base_home.store, model).path
    held_out = [row["id"] for row in read_rows(folder / "heldout" / "old.parquet")]
    trained = [row["id"] for row in read_rows(folder / "train" / "old.parquet")]
    assert not any(i in ledger for i in held_out)
    assert sum(i in ledger for i in trained) > len(trained) / 2


def test_the_parent_is_scored_once_for_all_that_ask(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    """The report of the parent on the child's sets is an artifact, made once and found again."""
    recipe = tiny.continued(corpora["new"])
    based.evaluate(recipe)
    count = len(list(based.store.all(EvalReport)))
    based.run(recipe)  # the gate asks for the champion on the same sets: the parent is the champion
    assert len(list(based.store.all(EvalReport))) == count
