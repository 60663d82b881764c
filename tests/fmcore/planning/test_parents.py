"""Parents from outside in a plan: identity before anything is built, what their unknown history rules out."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fmcore.artifacts.types import Checkpoint, RegisteredModel
from fmcore.errors import RecipeError, TrackingError, UnknownModelError
from fmcore.planning import parents
from fmcore.planning.cost import estimate_cost
from fmcore.planning.explain import plan_steps
from fmcore.planning.shape import parent_shape
from fmcore.recipes.load import parse_recipe

pytestmark = pytest.mark.usefixtures("inline")


@pytest.fixture
def folder(outside_folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(outside_folders["gpt2"], tmp_path / "mine"))


def planned(home: Any, recipe: dict[str, Any]) -> dict[str, str]:
    return {p.task: p.because for p in plan_steps(home.resolve(recipe).steps, home.store)}


def test_a_plan_imports_nothing_and_knows_what_would_be_made(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], folder: Path
) -> None:
    recipe = tiny.finetune(corpora["records"], parent=str(folder))
    before = fresh_home.resolve(recipe)
    because = planned(fresh_home, recipe)
    assert because["import"] == "mine is not imported yet"
    assert all(because.values())
    assert not list(fresh_home.store.root.glob("*/*/artifact.json"))
    assert before.parent is None
    cost = estimate_cost(
        before.recipe, before.steps, parent_shape(before.outside, None, fresh_home.store), fresh_home.store
    )
    made = fresh_home.run(recipe)
    [imported] = [c for c in fresh_home.store.all(Checkpoint) if c.imported]
    assert cost.parameters == imported.num_parameters
    after = fresh_home.resolve(recipe)
    assert [s.fingerprint for s in after.steps] == [s.fingerprint for s in before.steps]
    assert made.fingerprint == before.steps.model.fingerprint
    assert planned(fresh_home, recipe) == dict.fromkeys(
        ["import", *"prepare tokenize train evaluate register".split()], ""
    )
    assert after.parent.uri == "mine/1"


def test_a_miss_downstream_names_the_import(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], outside_folders: dict[str, Path], folder: Path
) -> None:
    fresh_home.documents(tiny.continued(corpora["new"], parent=str(outside_folders["llama"]), replay={"fraction": 0}))
    recipe = tiny.continued(corpora["new"], parent=str(folder), replay={"fraction": 0})
    assert planned(fresh_home, recipe)["prepare"] == "import will run"


def test_replay_asked_for_is_refused_and_left_out_is_none(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], folder: Path
) -> None:
    recipe = tiny.continued(corpora["new"], parent=str(folder))
    with pytest.raises(RecipeError, match=r"replay\.fraction: 0\.25 .* not known here; set it to 0"):
        fresh_home.resolve(recipe)
    del recipe["replay"]
    left_out = fresh_home.resolve(recipe)
    assert left_out.recipe.replay.fraction == 0
    recipe["replay"] = {"fraction": 0}
    assert [s.fingerprint for s in fresh_home.resolve(recipe).steps] == [s.fingerprint for s in left_out.steps]


def test_replay_stays_where_texts_are_known(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    recipe = tiny.continued(corpora["new"])
    del recipe["replay"]
    assert based.resolve(recipe).recipe.replay.fraction == 0.05
    tuned = based.run(tiny.finetune(corpora["records"], method="lora"))
    recipe["parent"] = tuned.uri
    assert based.resolve(recipe).recipe.replay.fraction == 0.05  # the base's texts, below the task model


def test_a_context_without_positions(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], folder: Path, outside_folders: dict[str, Path]
) -> None:
    recipe = tiny.finetune(corpora["records"], parent=str(folder), train={"seq_len": 65})
    with pytest.raises(RecipeError, match=r"train\.seq_len: 65 is more than the 64 positions"):
        fresh_home.resolve(recipe)
    fresh_home.resolve(tiny.finetune(corpora["records"], parent=str(folder), train={"seq_len": 64}))
    rotary = tiny.finetune(corpora["records"], parent=str(outside_folders["llama"]), train={"seq_len": 65})
    assert fresh_home.resolve(rotary)
    fresh_home.ready(tiny.finetune(corpora["records"], parent=str(folder)))
    with pytest.raises(RecipeError, match="64 positions"):
        fresh_home.resolve({**recipe, "parent": "mine/1"})


def test_a_context_of_ones_own_for_a_continued_base(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    """0, the default, is no part of what decides, as before there was the field."""
    recipe = tiny.continued(corpora["new"])
    assert "seq_len" not in based.resolve(recipe).steps.checkpoint.config["train"]
    longer = tiny.continued(corpora["new"], train={"epochs": 1, "seq_len": 16})
    assert based.resolve(longer).steps.checkpoint.config["train"]["seq_len"] == 16
    assert based.spec(longer).seq_len == 16
    assert based.spec(recipe).seq_len == 32


def test_an_interrupted_run_keeps_what_it_imported(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], folder: Path
) -> None:
    recipe = tiny.finetune(corpora["records"], parent=str(folder))
    stage = fresh_home.ready(recipe)
    stage.record.start(stage.parent.fingerprint)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_pdrop": 0.2}))
    assert fresh_home.resolve(recipe).parent == stage.parent
    assert fresh_home.resolve(recipe).outside is None
    anew = fresh_home.resolve(recipe, fresh=True)
    assert anew.parent is None
    assert anew.outside is not None


def test_a_hub_name_is_not_fetched_by_a_plan(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    here: list[Path] = []

    def download(repo: str, *, local_files_only: bool, **options: Any) -> str:
        if local_files_only and not here:
            raise LocalEntryNotFoundError("nothing in the cache")
        here.append(folder)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    recipe = tiny.finetune(corpora["records"], parent="someone/small")
    with pytest.raises(UnknownModelError, match="not downloaded yet"):
        fresh_home.resolve(recipe)
    parents.fetch_parent(parse_recipe(recipe))
    assert fresh_home.resolve(recipe).outside.name == "small"


def away(uri: str) -> Any:
    raise TrackingError(f"MLflow at {uri} does not answer")


def test_a_registry_that_is_away(
    based: Any, tiny: Any, corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """What this home knows for certain goes on without it; an alias does not."""
    by_alias = tiny.finetune(corpora["records"])
    unfinished = tiny.continued(corpora["new"])
    stage = based.resolve(unfinished)
    stage.record.start(stage.parent.fingerprint)
    outside = tiny.finetune(corpora["records"], parent=str(folder))
    based.ready(outside)
    monkeypatch.setattr(parents, "connect", away)
    monkeypatch.setattr("fmcore.tracking.imported.connect", away)
    assert based.resolve(tiny.finetune(corpora["records"], parent="plays/1")).parent.uri == "plays/1"
    assert based.resolve(unfinished).parent == stage.parent
    assert based.ready(outside).parent.uri == "mine/1"
    with pytest.raises(TrackingError, match=r"plays@champion has to be looked up .*as in plays/1\. .* does not answer"):
        based.resolve(by_alias)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_pdrop": 0.2}))
    with pytest.raises(TrackingError, match="does not answer"):
        based.ready(outside)


def test_planning_needs_no_torch(fresh_home: Any, tiny: Any, corpora: dict[str, Path], folder: Path) -> None:
    recipe = tiny.finetune(corpora["records"], parent=str(folder))
    (folder.parent / "recipe.json").write_text(json.dumps(recipe))
    code = (
        "import json, sys; from pathlib import Path\n"
        "from fmcore.artifacts.store import Store; from fmcore.workspace import Workspace\n"
        "from fmcore.planning.resolve import resolve_stage; from fmcore.recipes.load import parse_recipe\n"
        f"home = Path({str(fresh_home.path)!r})\n"
        "recipe = parse_recipe(json.loads(Path('recipe.json').read_text()))\n"
        "stage = resolve_stage(recipe, Workspace(home), Store(home))\n"
        "print(stage.outside.name, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=folder.parent, check=False
    )
    assert done.stdout.split() == ["mine", "False"], done.stderr


def test_a_second_import_of_the_name_does_not_take_its_place(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], folder: Path, outside_folders: dict[str, Path]
) -> None:
    first = fresh_home.ready(tiny.finetune(corpora["records"], parent=str(folder))).parent
    shutil.rmtree(folder)
    shutil.copytree(outside_folders["llama"], folder)
    recipe = tiny.finetune(corpora["records"], parent=str(folder))
    second = fresh_home.ready(recipe).parent
    assert (first.uri, first.verdict, second.uri, second.verdict) == ("mine/1", "FIRST", "mine/2", "HOLD")
    assert fresh_home.resolve({**recipe, "parent": "mine@champion"}).parent == first
    assert fresh_home.resolve({**recipe, "parent": "mine/2"}).parent == second  # asked for by name, it is a parent
    assert [m.fingerprint for m in fresh_home.store.all(RegisteredModel)] == [first.fingerprint, second.fingerprint]
