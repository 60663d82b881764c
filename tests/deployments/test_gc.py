"""`strata gc`: what is registered or unfinished stays whole; the rest goes, and a kill in the middle harms nothing."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from fmcore.artifacts.files import write_json
from fmcore.artifacts.gc import Roots, find_garbage, remove_garbage
from fmcore.artifacts.lock import exclusive
from fmcore.artifacts.store import RECORD
from fmcore.artifacts.types import Checkpoint, Documents, RegisteredModel, TokenShards
from fmcore.errors import StoreError

pytestmark = pytest.mark.usefixtures("inline")


def folders(home: Any) -> set[str]:
    return {f"{p.parent.name}/{p.name}" for p in (home.path / "artifacts").glob("*/[!.]*")}


def delete_version(home: Any, name: str, version: int) -> None:
    home.client.delete_model_version(name, str(version))


def hits(home: Any, recipe: dict[str, Any]) -> list[bool]:
    from fmcore.planning.explain import plan_steps

    return [step.done for step in plan_steps(home.resolve(recipe).steps, home.store)]


def test_a_whole_lifecycle_stays_and_can_be_gone_on_with(
    cli: Any, based: Any, tiny: Any, corpora: dict[str, Path], tmp_path: Path
) -> None:
    """A refused version too; what was compared on the way goes; replay still finds its shards."""
    base, tuned, continued = (
        tiny.pretrain(corpora["old"]), tiny.finetune(corpora["records"], method="lora"),
        tiny.continued(corpora["new"], parent="plays/1", train={"lr": 1.0, "epochs": 2}),
    )  # fmt: skip
    based.run(tuned)
    refused = based.run(continued)
    assert refused.verdict == "REJECT"
    said = cli(based, "gc")
    assert said.code == 0, said.err
    assert "registered versions, all kept: 3" in said.out
    for recipe in (base, tuned, continued):
        assert all(hits(based, recipe))
    assert cli(based, "verify").code == 0
    again = tiny.corpus(tmp_path, "new", first=60)
    assert based.run(tiny.continued(again, parent="plays/1", replay={"fraction": 0.5})).version == 3
    assert cli(based, "gc").code == 0
    assert "removed: 0 of the home's folders" in cli(based, "gc").out


def test_a_deleted_version_becomes_garbage_and_a_dry_run_removes_nothing(
    cli: Any, based: Any, tiny: Any, corpora: dict[str, Path]
) -> None:
    based.run(tiny.finetune(corpora["records"]))
    kept = {f"{a.kind}/{a.path.name}" for a in based.store.all(RegisteredModel) if a.model == "plays"}
    delete_version(based, "plays-kinds", 1)
    before = folders(based)
    dry = cli(based, "gc", "--dry-run")
    assert dry.code == 0, dry.err
    assert "would remove" in dry.out
    assert folders(based) == before
    wet = cli(based, "gc")
    assert wet.code == 0, wet.err
    gone = before - folders(based)
    assert {name.split("/")[0] for name in gone} == {"documents", "shards", "checkpoint", "report", "model"}
    assert all(name.split("/")[1] in wet.out for name in gone)
    assert kept <= folders(based)
    assert all(hits(based, tiny.pretrain(corpora["old"])))


def test_a_deleted_ancestor_stays_for_its_descendants(
    cli: Any, based: Any, tiny: Any, corpora: dict[str, Path], tmp_path: Path
) -> None:
    recipe = tiny.continued(corpora["new"], gate={"max_regression_bpb": 100}, train={"epochs": 4, "lr": 1e-2})
    assert based.run(recipe).verdict == "PROMOTE"
    delete_version(based, "plays", 1)
    assert cli(based, "gc").code == 0
    later = tiny.continued(tiny.corpus(tmp_path, "new", first=60), parent="plays/2", replay={"fraction": 0.5})
    assert based.run(later).version == 3


def test_unfinished_runs_keep_what_they_have_made(cli: Any, based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    recipe = tiny.finetune(corpora["records"])
    stage = based.resolve(recipe)
    stage.record.start(stage.parent.fingerprint, stage.steps, based.workspace.own_tracking_uri)
    shards = based.shards(recipe)
    partial = based.store.path_for(stage.steps.checkpoint)
    partial = partial.with_name(partial.name + ".partial")
    (partial / "latest").mkdir(parents=True)
    write_json(
        partial / "building.json",
        {"fingerprint": stage.steps.checkpoint.fingerprint, "config": {}, "parents": stage.steps.checkpoint.parents},
    )
    stale = partial.with_name("other-00000000.partial")
    stale.mkdir()
    (stale / "half").write_text("x")
    said = cli(based, "gc")
    assert said.code == 0, said.err
    assert partial.exists()
    assert shards.path.exists()
    assert not stale.exists()
    assert "kept for an unfinished run" in said.out
    stage.record.forget()
    assert cli(based, "gc").code == 0
    assert not partial.exists()
    assert not shards.path.exists()


def test_a_registration_that_waits_keeps_its_artifacts(
    cli: Any, based: Any, tiny: Any, corpora: dict[str, Path]
) -> None:
    recipe = tiny.finetune(corpora["records"])
    report = based.evaluate(recipe)
    (based.path / "pending").mkdir()
    write_json(based.path / "pending" / "0123456789abcdef.json", {"report": report.fingerprint, "recipe": recipe})
    assert cli(based, "gc").code == 0
    assert all(hits(based, recipe)[:4])


def test_versions_of_another_registry_stay(cli: Any, based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    recipe = tiny.finetune(corpora["records"])
    model = based.run(recipe)
    record = based.resolve(recipe).record
    record.start(model.parents["parent"], based.resolve(recipe).steps, "http://registry.example:5000")
    record.finish(model.fingerprint)
    delete_version(based, "plays-kinds", 1)
    assert cli(based, "gc").code == 0
    assert model.path.exists()


def test_nothing_is_removed_where_the_registry_is_away_or_empty(
    cli: Any, based: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = folders(based)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    away = cli(based, "gc")
    assert away.code == 1
    assert "does not answer" in away.err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'new.db'}")
    empty = cli(based, "gc")
    assert empty.code == 1
    assert "Nothing was removed" in empty.err
    assert not (tmp_path / "new.db").exists()
    assert folders(based) == before


def test_killed_in_the_middle_the_store_verifies_and_the_rest_goes_next_time(
    cli: Any, based: Any, tiny: Any, corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    based.run(tiny.finetune(corpora["records"]))
    delete_version(based, "plays-kinds", 1)

    class Killed(BaseException):
        pass

    def die(path: Path, **_: Any) -> None:
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(Killed):
        cli(based, "gc")
    monkeypatch.undo()
    os.chdir(based.path)
    halves = [path for path in (based.path / "artifacts").glob("*/[!.]*") if not (path / RECORD).exists()]
    assert len(halves) == 1
    assert cli(based, "verify").code == 0
    assert all(hits(based, tiny.pretrain(corpora["old"])))
    assert cli(based, "gc").code == 0
    assert not halves[0].exists()
    assert cli(based, "verify").code == 0


def test_what_is_being_built_or_has_come_to_be_wanted_stays(based: Any) -> None:
    nothing = Roots(frozenset(), frozenset())
    [garbage] = [g for g in find_garbage(based.store, nothing) if g.kind == "shards"]
    with exclusive(based.store.lock_path(garbage.kind, garbage.fingerprint)):
        assert not remove_garbage(based.store, garbage, is_wanted=lambda _: False)
    assert not remove_garbage(based.store, garbage, is_wanted=lambda f: f == garbage.fingerprint)
    assert garbage.path.exists()
    assert remove_garbage(based.store, garbage, is_wanted=lambda _: False)
    assert not garbage.path.exists()


def test_descendants_go_before_what_they_were_made_from(based: Any) -> None:
    kinds = [garbage.kind for garbage in find_garbage(based.store, Roots(frozenset(), frozenset()))]
    assert kinds == ["model", "report", "checkpoint", "shards", "documents"]
    [model] = based.store.all(RegisteredModel)
    assert find_garbage(based.store, Roots(frozenset({model.fingerprint}), frozenset())) == []
    [checkpoint] = based.store.all(Checkpoint)
    kept = find_garbage(based.store, Roots(frozenset({checkpoint.fingerprint}), frozenset()))
    assert [garbage.kind for garbage in kept] == ["model", "report"]


def test_digests_of_files_that_are_gone_are_forgotten(cli: Any, based: Any, tmp_path: Path) -> None:
    gone = tmp_path / "gone.txt"
    gone.write_text("x")
    based.store.digests.sha256(gone)
    based.store.digests.save()
    gone.unlink()
    assert "forgot the digests of" in cli(based, "gc").out
    assert str(gone) not in json.loads(based.workspace.digests.read_text())


def test_replay_that_misses_its_shards_stops_and_names_them(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    [shards] = based.store.all(TokenShards)
    recipe = tiny.continued(corpora["new"])
    based.shards(recipe)
    shutil.rmtree(shards.path)
    with pytest.raises(StoreError, match=rf"plays/1.*{shards.short}.*Run its recipe again.*set it to 0"):
        based.spec(recipe)
    assert [d.name for d in based.store.all(Documents)]
