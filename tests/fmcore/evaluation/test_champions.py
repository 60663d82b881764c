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


def doctor(factor_of: Callable[[str], float | None], true: dict[str, float] | None = None) -> Callable[..., EvalReport]:
    """An evaluation whose report is changed: every document's bits times a factor, or the true bits of the
    documents in `true` times it."""
    build = evaluate_module._build

    def doctored(step: Any, checkpoint: Any, *given: Any) -> EvalReport:
        report = build(step, checkpoint, *given)
        factor = factor_of(checkpoint.name)
        if factor is None or (report.path / "doctored").exists():
            return report
        path = report.path / DOCUMENTS_FILE
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            if true is None or row["id"] in true:
                row["bits"] = (row["bits"] if true is None else true[row["id"]]) * factor
        pq.write_table(pa.Table.from_pylist(rows), path)
        (report.path / "doctored").touch()
        record = read_json(report.path / RECORD)
        record["files"][DOCUMENTS_FILE] = {"sha256": sha256_file(path), "size": path.stat().st_size}
        write_json(report.path / RECORD, {**record, "record_sha256": record_digest(record)})
        return report

    return doctored


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], None]:
    """Set by which factor a recipe's checkpoint needs more bits than it does."""
    factors: dict[str, float] = {}
    monkeypatch.setattr(evaluate_module, "_build", doctor(factors.get))
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


@pytest.mark.parametrize(
    ("factor", "verdicts"), [(1.2, {"REJECT"}), (0.8, {"PROMOTE"}), (1.0, {"HOLD", "INCONCLUSIVE", "PROMOTE"})]
)
def test_doctored_scores(
    based: Any, tiny: Any, corpora: dict[str, Path], scores: Any, factor: float, verdicts: set[str]
) -> None:
    scores("doctored", factor)
    recipe = tiny.pretrain(corpora["old"], name="doctored", register={"model": "plays"}, seed=3)
    model = based.run(recipe)
    assert model.verdict in verdicts, model.reasons


@pytest.fixture
def old_level(based: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], None]:
    """Set what a recipe's checkpoint needs for the texts in `old`: plays/1's own bits times a factor."""
    [first] = based.store.all(RegisteredModel)
    folder = based.store.get(first.parents["report"], EvalReport).path
    true = {row["id"]: row["bits"] for row in pq.read_table(folder / DOCUMENTS_FILE).to_pylist()}
    factors: dict[str, float] = {}
    monkeypatch.setattr(evaluate_module, "_build", doctor(lambda name: factors.get(name), true))
    return factors.__setitem__


def test_the_margin_is_measured_from_the_best_champion(based: Any, tiny: Any, tmp_path: Path, old_level: Any) -> None:
    """Weekly losses of 5 % (about 0.08 bpb), each within the margin of 0.12 bpb from the one before, add up: the
    second is refused. Accepted by a person it is the new level, and the third passes."""

    def week(number: int, level: float) -> RegisteredModel:
        name = f"week{number}"
        old_level(name, level)
        corpus = tiny.corpus(tmp_path, "new", first=1000 * number, name=name)
        recipe = tiny.continued(
            corpus, name=name, gate={"max_regression_bpb": 0.12}, train={"lr": 1e-2, "epochs": 4 + number}
        )
        recipe["data"]["sources"][0]["name"] = name
        return based.run(recipe)

    first = week(0, 1.05)
    assert first.verdict == "PROMOTE", first.reasons
    second = week(1, 1.10)
    assert second.verdict == "REJECT", second.reasons
    assert any("old" in reason and "best" in reason for reason in second.reasons)
    assert second.predecessor == first.fingerprint
    assert champion(based) == first.version
    accept(based, second)
    assert champion(based) == second.version
    third = week(2, 1.15)
    assert not any("old" in r and "regress" in r for r in third.reasons), third.reasons
    assert third.verdict != "REJECT", third.reasons


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
    assert not any(reason.startswith("old:") for reason in again.reasons)
