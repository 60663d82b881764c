"""Registering with a verdict, from trained models to the registry: FIRST, A/A, regressions, the best champion."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmcore.artifacts.files import read_json, sha256_file, write_json
from fmcore.artifacts.store import RECORD, record_digest
from fmcore.artifacts.types import EvalReport, RegisteredModel
from fmcore.errors import UnknownModelError
from fmcore.evaluation import evaluate as evaluate_module
from fmcore.evaluation.spec import DOCUMENTS_FILE
from fmcore.tracking import registry
from fmcore.tracking.promote import promote
from fmcore.tracking.register import find_registered

pytestmark = pytest.mark.usefixtures("inline")


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], None]:
    """Doctor what evaluation finds: bits of every document of a recipe's checkpoint times a factor."""
    factors: dict[str, float] = {}
    build = evaluate_module._build

    def doctored(step: Any, checkpoint: Any, *given: Any) -> EvalReport:
        report = build(step, checkpoint, *given)
        factor = factors.get(checkpoint.name)
        if factor is None or (report.path / "doctored").exists():
            return report
        rows = pq.read_table(report.path / DOCUMENTS_FILE).to_pylist()
        table = pa.Table.from_pylist([{**row, "bits": row["bits"] * factor} for row in rows])
        pq.write_table(table, report.path / DOCUMENTS_FILE)
        (report.path / "doctored").touch()
        record = read_json(report.path / RECORD)
        path = report.path / DOCUMENTS_FILE
        record["files"][DOCUMENTS_FILE] = {"sha256": sha256_file(path), "size": path.stat().st_size}
        record["record_sha256"] = record_digest(record)
        write_json(report.path / RECORD, record)
        return report

    monkeypatch.setattr(evaluate_module, "_build", doctored)
    return factors.__setitem__


def champion(home: Any, name: str = "plays") -> int:
    found = registry.champion(home.client, name)
    assert found is not None
    return found.version


def accept(home: Any, model: RegisteredModel) -> None:
    promote(home.client, model, "as planned", lock=home.path / "lock")


def test_the_first_of_its_name(based: Any) -> None:
    [model] = based.store.all(RegisteredModel)
    assert (model.verdict, model.version, model.predecessor) == ("FIRST", 1, "")
    assert champion(based) == 1


def test_an_a_a_pair_is_not_promoted(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    """The same weights again, under another gate so that it is another version."""
    again = based.run(tiny.pretrain(corpora["old"], gate={"max_regression_bpb": 0.02}))
    assert again.version == 2
    assert again.verdict in ("HOLD", "INCONCLUSIVE"), again.reasons
    assert champion(based) == 1
    [first, second] = based.store.all(RegisteredModel)
    assert first.parents["checkpoint"] == second.parents["checkpoint"]
    assert second.predecessor == first.fingerprint


def test_another_seed_is_not_promoted_by_luck(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    other = based.run(tiny.pretrain(corpora["old"], seed=1, gate={"max_regression_bpb": 0.001}))
    assert other.verdict != "FIRST"
    if other.verdict == "PROMOTE":  # then it is better indeed
        report = based.store.get(other.parents["report"], EvalReport).metrics
        [first, *_] = based.store.all(RegisteredModel)
        before = based.store.get(first.parents["report"], EvalReport).metrics
        assert report["eval/old/bpb"] < before["eval/old/bpb"]


def test_a_better_one_is_promoted(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    better = based.run(tiny.pretrain(corpora["old"], name="longer", register={"model": "plays"},
                                     train={"tokens": 200 * 256}))  # fmt: skip
    assert better.verdict == "PROMOTE", better.reasons
    assert champion(based) == 2


def test_really_worse_weights_are_refused_and_are_nobodys_parent(
    based: Any, tiny: Any, corpora: dict[str, Path]
) -> None:
    """Trained on with a rate that destroys the old, and no replay."""
    worse = based.run(tiny.continued(corpora["new"], train={"lr": 1.0, "epochs": 2}, replay={"fraction": 0}))
    assert worse.verdict == "REJECT", worse.reasons
    assert any("old" in reason for reason in worse.reasons)
    assert champion(based) == 1
    child = tiny.finetune(corpora["records"], parent=worse.uri)
    with pytest.raises(UnknownModelError, match=r"plays/2.*REJECT.*nobody's parent.*accept-regression"):
        based.resolve(child)
    accept(based, worse)
    assert champion(based) == 2
    assert based.resolve(child).parent.fingerprint == worse.fingerprint


@pytest.mark.parametrize(("factor", "verdicts"), [(1.2, {"REJECT"}), (0.8, {"PROMOTE"}), (1.0, {"HOLD", "INCONCLUSIVE", "PROMOTE"})])
def test_doctored_scores(
    based: Any, tiny: Any, corpora: dict[str, Path], scores: Any, factor: float, verdicts: set[str]
) -> None:
    scores("doctored", factor)
    recipe = tiny.pretrain(corpora["old"], name="doctored", register={"model": "plays"}, seed=3)
    model = based.run(recipe)
    assert model.verdict in verdicts, model.reasons


def test_the_margin_is_measured_from_the_best_champion(
    based: Any, tiny: Any, tmp_path: Path, scores: Any
) -> None:
    """Weekly losses, each within the margin of the one before, are refused once they add up; an accepted
    regression resets the level."""
    level, verdicts, models = 1.0, [], []
    # bits on the old set grow 2 % a week (about 0.1 bpb), the margin is 0.15 bpb; the new sets gain a lot
    for week in range(3):
        corpus = tiny.corpus(tmp_path, "new", first=1000 * week, name=f"week{week}")
        recipe = tiny.continued(
            corpus, name=f"week{week}", gate={"max_regression_bpb": MARGIN}, train={"lr": 1e-2, "epochs": 4}
        )
        recipe["data"]["sources"][0]["name"] = f"week{week}"
        level *= 1.02
        only_old(scores, f"week{week}", level)
        model = based.run(recipe)
        verdicts.append(model.verdict)
        models.append(model)
        if model.verdict == "REJECT":
            break
    assert verdicts[0] == "PROMOTE", models[0].reasons
    assert "REJECT" in verdicts or "INCONCLUSIVE" in verdicts, [m.reasons for m in models]


MARGIN = 0.15


def only_old(scores: Any, name: str, level: float) -> None:
    scores(name, level)


def test_registering_twice_makes_one_version(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    recipe = tiny.pretrain(corpora["old"])
    first = based.run(recipe)
    assert based.run(recipe) == first
    assert [row.version for row in registry.list_models(based.client)] == [1]


def test_a_version_lost_by_the_registry_is_registered_again(
    based: Any, tiny: Any, corpora: dict[str, Path], empty_home: Path
) -> None:
    recipe = tiny.pretrain(corpora["old"])
    step = based.resolve(recipe).steps.model
    assert find_registered(step, based.store, based.client) is not None
    database = based.path / "mlflow.db"
    other = type(based)(based.path.with_name("other"))
    shutil.copytree(based.path / "artifacts", other.path / "artifacts")
    shutil.copy(empty_home / "mlflow.db", other.path / "mlflow.db")
    assert database.exists()
    assert find_registered(step, other.store, other.client) is None
    again = other.run(recipe)
    assert (again.version, again.verdict) == (1, "FIRST")


def test_a_task_model_is_judged_by_its_tasks(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    """What it forgot of the base's texts is reported, not refused."""
    first = based.run(tiny.finetune(corpora["records"]))
    assert (first.model, first.verdict) == ("plays-kinds", "FIRST")
    report = based.store.get(first.parents["report"], EvalReport)
    assert {"eval/kinds/accuracy", "eval/kinds/chance", "eval/old/bpb", "forgetting/old"} <= set(report.metrics)
    again = based.run(tiny.finetune(corpora["records"], train={"lr": 1e-5, "epochs": 1}))
    assert again.version == 2
    assert again.verdict in ("HOLD", "INCONCLUSIVE", "REJECT"), again.reasons
    assert not any("old" in reason for reason in again.reasons)
