"""Plan, identities and run records: what makes a miss, what never does, what an interrupted run keeps."""

import os
from pathlib import Path
from typing import Any

import pytest

from fmcore.artifacts.types import Checkpoint, Documents, RegisteredModel
from fmcore.errors import DataError, UnknownModelError
from fmcore.planning.cost import estimate_cost
from fmcore.planning.explain import plan_steps, resume_note, small_holdouts
from fmcore.planning.shape import parent_shape
from fmcore.tracking.promote import promote

pytestmark = pytest.mark.usefixtures("inline")
TASKS = ["prepare", "tokenize", "train", "evaluate", "register"]


def planned(home: Any, recipe: dict[str, Any]) -> dict[str, str]:
    """Task -> "" for a hit, else why it is a miss."""
    return {p.task: p.because if not p.done else "" for p in plan_steps(home.resolve(recipe).steps, home.store)}


def fingerprints(home: Any, recipe: dict[str, Any]) -> list[str]:
    return [step.fingerprint for step in home.resolve(recipe).steps]


def test_all_hits(base_home: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    assert planned(base_home, tiny.pretrain(corpora["old"])) == dict.fromkeys(TASKS, "")


def test_all_misses_in_an_empty_home(fresh_home: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    because = planned(fresh_home, tiny.pretrain(corpora["old"]))
    assert because["prepare"] == "no documents yet"
    assert all(because.values())
    assert not list(fresh_home.store.root.glob("*/*/artifact.json"))  # planning builds nothing


@pytest.mark.parametrize(
    ("change", "first_miss", "named"),
    [
        ({"data": {"holdout": 0.25}}, "prepare", "holdout: 0.3 -> 0.25"),
        ({"data": {"filters": {"min_chars": 21}}}, "prepare", "filters.min_chars: 20 -> 21"),
        ({"tokenizer": {"vocab_size": 420}}, "tokenize", "tokenizer.vocab_size: 400 -> 420"),
        ({"train": {"lr": 4e-3}}, "train", "train.lr: 0.005 -> 0.004"),
        ({"seed": 1}, "train", "seed: 0 -> 1"),
        ({"model": {"config": {"hidden_size": 48}}}, "train", "model.hidden_size: 32 -> 48"),
        ({"evaluate": {"max_documents": 100}}, "evaluate", "max_documents: 500 -> 100"),
        ({"gate": {"min_documents": 6}}, "register", "gate.min_documents: 5 -> 6"),
        ({"register": {"model": "other"}}, "register", "model: plays -> other"),
    ],
)
def test_a_miss_names_the_field_and_what_follows_names_its_cause(
    base_home: Any, tiny: Any, corpora: dict[str, Path], change: dict[str, Any], first_miss: str, named: str
) -> None:
    because = planned(base_home, tiny.pretrain(corpora["old"], **change))
    at = TASKS.index(first_miss)
    assert [because[task] for task in TASKS[:at]] == [""] * at
    assert named in because[first_miss]
    for task in TASKS[at + 1 :]:
        assert "will run" in because[task], because
        assert any(upstream in because[task] for upstream in TASKS[at:])


def test_a_changed_source_file_is_named(base_home: Any, tiny: Any, tmp_path: Path, corpora: dict[str, Path]) -> None:
    path = tmp_path / "old.jsonl"
    path.write_text(corpora["old"].read_text() + '{"text": "one more text that is long enough"}\n')
    because = planned(base_home, tiny.pretrain(path))
    assert "sources.0.files.0" in because["prepare"]


@pytest.mark.parametrize(
    "execution",
    [
        {"threads": 2}, {"micro_batch": 3}, {"save_interval_s": 1}, {"grace_s": 3}, {"retries": 4},
        {"hang_timeout_s": 5}, {"device": "auto"},
    ],
)  # fmt: skip
def test_execution_never_changes_identity(
    base_home: Any, tiny: Any, corpora: dict[str, Path], execution: dict[str, Any]
) -> None:
    before = fingerprints(base_home, tiny.pretrain(corpora["old"]))
    assert fingerprints(base_home, tiny.pretrain(corpora["old"], execution=execution)) == before


def test_names_and_paths_never_change_identity(
    base_home: Any, tiny: Any, tmp_path: Path, corpora: dict[str, Path]
) -> None:
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(corpora["old"].read_bytes())
    before = fingerprints(base_home, tiny.pretrain(corpora["old"]))
    assert fingerprints(base_home, tiny.pretrain(copy)) == before
    renamed = tiny.pretrain(corpora["old"], name="other", register={"model": "plays"})
    assert fingerprints(base_home, renamed) == before
    assert fingerprints(base_home, tiny.pretrain(corpora["old"], seed=1)) != before
    source = {"name": "renamed", "path": str(corpora["old"]), "format": "json"}
    assert fingerprints(base_home, tiny.pretrain(corpora["old"], data={"sources": [source]}))[0] != before[0]


@pytest.mark.parametrize("stage", ["continued", "finetune"])
def test_the_parents_gate_and_registry_do_not_retrain_its_children(
    based: Any, tiny: Any, corpora: dict[str, Path], stage: str
) -> None:
    """The same weights registered again under another gate: a child of either is the same up to its report."""
    recipe = getattr(tiny, stage)(corpora["new" if stage == "continued" else "records"])
    [first] = based.store.all(RegisteredModel)
    before = fingerprints(based, recipe | {"parent": first.uri})
    again = based.run(tiny.pretrain(corpora["old"], gate={"max_regression_bpb": 0.02}))
    promote(based.client, again, "the same", lock=based.path / "lock")
    after = fingerprints(based, recipe | {"parent": again.uri})
    assert after[:4] == before[:4]
    assert after[4] != before[4]  # the version is another, its parent being another


def test_an_interrupted_run_keeps_its_parent(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    recipe = tiny.continued(corpora["new"])
    stage = based.resolve(recipe)
    stage.record.start(stage.parent.fingerprint)
    again = based.run(tiny.pretrain(corpora["old"], gate={"max_regression_bpb": 0.02}))
    promote(based.client, again, "moved", lock=based.path / "lock")
    assert based.resolve(recipe).parent.version == 1  # as it was begun
    assert based.resolve(recipe, fresh=True).parent.version == 2
    assert based.resolve(recipe).parent.version == 2  # --fresh forgot it for good


def test_a_finished_recipe_that_made_the_champion_is_a_hit(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    """plays@champion now leads to what this recipe made: the result is that run, not a child of itself."""
    recipe = tiny.continued(corpora["new"], gate={"max_regression_bpb": 100}, train={"epochs": 4, "lr": 1e-2})
    made = based.run(recipe)
    assert made.verdict == "PROMOTE", made.reasons
    assert based.resolve(recipe).parent.version == 1
    assert planned(based, recipe) == dict.fromkeys(TASKS, "")
    assert based.run(recipe) == made
    other = tiny.continued(corpora["new"], train={"epochs": 3})
    assert based.resolve(other).parent.version == 2  # another recipe takes the champion


def test_fresh_forgets_the_partial_training(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    recipe = tiny.continued(corpora["new"])
    partial = based.store.path_for(based.resolve(recipe).steps.checkpoint)
    partial = partial.with_name(partial.name + ".partial")
    (partial / "latest").mkdir(parents=True)
    for text, note in (
        ('{"folder": "step-00000123"}', "resumes after step 123"),
        ('{"folder": "step-00000123-2"}', "resumes after step 123"),
        ('{"folder": ', "resumes from its newest state that is whole"),
    ):
        (partial / "latest" / "pointer.json").write_text(text)
        assert resume_note(based.resolve(recipe).steps, based.store) == note
    based.resolve(recipe, fresh=True)
    assert not partial.exists()
    assert resume_note(based.resolve(recipe).steps, based.store) == ""


def test_costs(base_home: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    def cost(recipe: dict[str, Any]) -> Any:
        stage = base_home.resolve(recipe)
        above = parent_shape(None, stage.parent, base_home.store)
        return estimate_cost(stage.recipe, stage.steps, above, base_home.store)

    [checkpoint] = base_home.store.all(Checkpoint)
    exact = cost(tiny.pretrain(corpora["old"]))
    assert exact.tokens == 20 * 256
    assert exact.parameters == checkpoint.num_parameters
    reached = checkpoint.figures
    per_token = reached["mfu"] * reached["peak_flops"] / reached["mean_tokens_per_sec"]
    assert exact.flops == pytest.approx(per_token * exact.tokens)  # as the training itself counts them
    assert exact.seconds > 0
    assert "counted" in exact.basis
    shards = base_home.shards(tiny.pretrain(corpora["old"]))
    assert exact.epochs == pytest.approx(20 * 256 / sum(shards.num_tokens.values()))
    assert cost(tiny.pretrain(corpora["old"], train={"tokens": 0, "epochs": 2})).tokens == 2 * sum(
        shards.num_tokens.values()
    )
    guessed = cost(tiny.continued(corpora["new"]))
    assert "guessed" in guessed.basis
    assert guessed.epochs == pytest.approx(1, rel=0.01)


def test_another_models_artifacts_explain_nothing(
    based: Any, tiny: Any, corpora: dict[str, Path], tmp_path: Path
) -> None:
    """What of another recipe's settings differs is no reason; what is made of the same data is compared."""
    other = tiny.pretrain(
        tiny.corpus(tmp_path, "new"), name="other", evaluate={"max_documents": 50}, train={"lr": 4e-3}
    )
    because = planned(based, other)
    assert because["prepare"] == "no documents of this kind yet"
    assert because["evaluate"] == "no report of this kind yet"
    again = planned(based, tiny.pretrain(corpora["old"], name="again", train={"lr": 4e-3}))
    assert again["prepare"] == again["tokenize"] == ""
    assert "train.lr: 0.005 -> 0.004" in again["train"]
    assert again["evaluate"] == "train will run"


def test_tasks_on_one_base_do_not_explain_each_other(
    based: Any, tiny: Any, corpora: dict[str, Path], tmp_path: Path
) -> None:
    based.run(tiny.finetune(corpora["records"]))
    other = tiny.finetune(tiny.records(tmp_path, 60, "other"), name="other", evaluate={"max_examples": 20})
    other["data"]["tasks"][0]["name"] = "other"
    because = planned(based, other)
    assert because["train"] == "no checkpoint of this kind yet"
    assert because["evaluate"] == "no report of this kind yet"


def test_a_held_out_set_too_small_for_the_gate_is_foretold(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    def told(**changes: Any) -> list[str]:
        stage = based.resolve(tiny.pretrain(corpora["old"], **changes))
        return list(small_holdouts(stage.recipe, stage.steps, based.store))

    [documents] = based.store.all(Documents)
    num = documents.counts["heldout"]["old"]
    assert told(gate={"min_documents": num}) == []
    [warning] = told(gate={"min_documents": num + 1})
    assert f"old: {num} held-out documents" in warning
    assert "raise holdout" in warning
    [warning] = told(gate={"min_documents": 11}, evaluate={"max_documents": 10})
    assert "old: 10 held-out documents" in warning
    assert "raise evaluate.max_documents" in warning
    assert told(gate={"min_documents": 500}, data={"holdout": 0.2}) == []  # of documents that are not there yet


def test_what_is_not_there_is_one_clear_message(base_home: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    with pytest.raises(UnknownModelError, match="nobody"):
        base_home.resolve(tiny.finetune(corpora["records"], parent="nobody@champion"))
    with pytest.raises(UnknownModelError, match="9"):
        base_home.resolve(tiny.finetune(corpora["records"], parent="plays/9"))
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        base_home.resolve(tiny.pretrain(corpora["old"].with_name("missing.jsonl")))


def test_a_recipes_address_does_not_stick_to_the_process(
    base_home: Any, tiny: Any, tmp_path: Path, corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """execution.tracking_uri is that run's alone; the next one has the home's own again."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = base_home.workspace.tracking_uri
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    recipe = tiny.finetune(corpora["records"], execution={"tracking_uri": elsewhere})
    with pytest.raises(UnknownModelError):
        base_home.resolve(recipe)
    assert base_home.workspace.tracking_uri == before, os.environ.get("MLFLOW_TRACKING_URI")
