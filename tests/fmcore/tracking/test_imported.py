"""An imported version in the registry: what it says of itself, how often it is there, what may follow from it."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fmcore import model as model_package
from fmcore.artifacts.ancestry import checkpoint_of
from fmcore.artifacts.types import RegisteredModel
from fmcore.errors import IntegrityError
from fmcore.model.build import open_model
from fmcore.model.weights import final_weights
from fmcore.tracking import names
from fmcore.tracking.lineage import as_rich, children, lineage_tree
from fmcore.tracking.promote import promote
from fmcore.tracking.registry import champion, list_models, resolve
from fmcore.tracking.runs import StageRun

pytestmark = pytest.mark.usefixtures("inline")


@pytest.fixture
def folder(outside_folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(outside_folders["llama"], tmp_path / "mine"))


def recipe(tiny: Any, corpora: dict[str, Path], parent: Any, **changes: Any) -> dict[str, Any]:
    return tiny.finetune(corpora["records"], parent=str(parent), **changes)


def test_a_version_that_says_where_it_is_from(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], folder: Path
) -> None:
    imported = fresh_home.ready(recipe(tiny, corpora, folder)).parent
    assert (imported.uri, imported.stage, imported.verdict) == ("mine/1", "imported", "FIRST")
    assert imported.parents == {"checkpoint": checkpoint_of(fresh_home.store, imported).fingerprint}
    version = fresh_home.client.get_model_version("mine", "1")
    assert version.tags[names.STAGE] == "imported"
    assert version.tags[names.ORIGIN] == str(folder)
    assert version.tags[names.LICENCE] == "apache-2.0"
    assert len(version.tags[names.ORIGIN_DIGEST]) == 64
    assert version.description.splitlines()[0] == f"mine version 1, imported from {folder}."
    assert "Licence: apache-2.0" in version.description
    assert "History: unknown" in version.description
    assert version.tags[names.ORIGIN_DIGEST] in version.description
    run = fresh_home.client.get_run(imported.run_id)
    assert (run.info.run_name, run.info.status) == ("import mine", "FINISHED")
    assert run.data.tags[names.STAGE] == "imported"
    assert [output.model_id for output in run.outputs.model_outputs] == [imported.model_id]
    assert champion(fresh_home.client, "mine").fingerprint == imported.fingerprint


def test_twice_is_once(fresh_home: Any, tiny: Any, corpora: dict[str, Path], folder: Path) -> None:
    first = fresh_home.ready(recipe(tiny, corpora, folder)).parent
    moved = Path(shutil.copytree(folder, folder.parent / "elsewhere" / "mine"))
    assert fresh_home.ready(recipe(tiny, corpora, moved)).parent == first
    assert [row.version for row in list_models(fresh_home.client)] == [1]


def test_an_import_that_was_stopped_goes_on(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Champion already, but not recorded: the same version, not a second."""
    with monkeypatch.context() as patch:

        def stop(self: StageRun, values: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(StageRun, "set_tags", stop)
        with pytest.raises(KeyboardInterrupt):
            fresh_home.ready(recipe(tiny, corpora, folder))
    assert not list(fresh_home.store.all(RegisteredModel))
    imported = fresh_home.ready(recipe(tiny, corpora, folder)).parent
    assert (imported.version, imported.verdict) == (1, "FIRST")


def test_lineage(fresh_home: Any, tiny: Any, corpora: dict[str, Path], folder: Path) -> None:
    tuned = fresh_home.run(recipe(tiny, corpora, folder))
    tree = lineage_tree(fresh_home.client, resolve(fresh_home.client, tuned.uri))
    [above] = tree["parents"]
    assert (above["model"], above["stage"], above["sources"]) == ("mine", "imported", [])
    assert above["origin"]["place"] == str(folder)
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(as_rich(tree))
    text = console.export_text()
    assert all(words in text for words in (f"origin: {folder}", "licence: apache-2.0", "history unknown"))
    assert [ref.uri for ref in children(fresh_home.client, resolve(fresh_home.client, "mine/1"))] == ["mine-kinds/1"]


def test_the_gate_where_the_champion_is_imported(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], folder: Path
) -> None:
    """It has no report of its own; it is scored on the contender's sets. And a person may promote over it."""
    changes = {"parent": str(folder), "replay": {"fraction": 0}}
    worse = fresh_home.run(tiny.continued(corpora["new"], **changes) | {"train": {"tokens": 256, "batch_tokens": 256}})
    assert worse.uri == "mine/2"
    assert worse.verdict in ("REJECT", "PROMOTE", "HOLD", "INCONCLUSIVE")
    assert worse.predecessor == fresh_home.store.get(worse.parents["parent"], RegisteredModel).fingerprint
    imported = fresh_home.store.get(worse.parents["parent"], RegisteredModel)
    promote(fresh_home.client, imported, "back to what it was", lock=fresh_home.path / "lock")
    assert champion(fresh_home.client, "mine").version == 1
    task_model = fresh_home.run(recipe(tiny, corpora, "mine@champion"))
    assert task_model.parents["parent"] == imported.fingerprint


def test_load_opens_all_kinds(fresh_home: Any, tiny: Any, corpora: dict[str, Path], folder: Path) -> None:
    lora = fresh_home.run(recipe(tiny, corpora, folder, method="lora", lora={"r": 4}))
    over = fresh_home.run(recipe(tiny, corpora, lora.uri, name="again", method="lora", lora={"r": 2}))
    ids = torch.arange(30, 50)[None]
    for model in (fresh_home.store.get(lora.parents["parent"], RegisteredModel), lora, over):
        loaded, tokenizer = model_package.load(model.uri, fresh_home.workspace.own_tracking_uri)
        here = open_model(final_weights(fresh_home.store, checkpoint_of(fresh_home.store, model)))
        with torch.no_grad():
            torch.testing.assert_close(loaded(input_ids=ids).logits, here.eval()(input_ids=ids).logits)
        assert tokenizer.chat_template
    fresh_home.client.set_model_version_tag("mine", "1", names.CHECKPOINT, "0" * 64)
    with pytest.raises(IntegrityError, match="another model of that name"):
        model_package.load(lora.uri, fresh_home.workspace.own_tracking_uri)


def run_alone(code: str, folder: Path, **environment: str) -> str:
    """In a fresh process that has none of our packages on its path."""
    ours = {"PYTHONPATH", "STRATA_HOME", "MLFLOW_TRACKING_URI"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    code += "\nimport sys; assert not any(name.split('.')[0] == 'fmcore' for name in sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=folder, check=False,
        env={**kept, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_snippets_on_the_versions_pages_run_as_they_are(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    lora = fresh_home.run(recipe(tiny, corpora, folder, method="lora", lora={"r": 4}))
    over = fresh_home.run(recipe(tiny, corpora, lora.uri, name="again", method="lora", lora={"r": 2}))
    full = fresh_home.run(recipe(tiny, corpora, folder, name="whole"))
    imported = fresh_home.store.get(lora.parents["parent"], RegisteredModel)
    for model in (imported, lora, over, full):
        description = fresh_home.client.get_model_version(model.model, str(model.version)).description
        snippet = description.split("```python\n")[1].split("```")[0]
        check = (
            "\nimport torch\nwith torch.no_grad(): out = model.eval()(input_ids=torch.arange(30, 50)[None]).logits\n"
            "print(float(out.abs().sum()), len(tokenizer))"
        )
        address = fresh_home.workspace.own_tracking_uri
        total, size = run_alone(snippet + check, tmp_path, MLFLOW_TRACKING_URI=address).split()[-2:]
        here = open_model(final_weights(fresh_home.store, checkpoint_of(fresh_home.store, model))).eval()
        with torch.no_grad():
            expected = float(here(input_ids=torch.arange(30, 50)[None]).logits.abs().sum())
        assert float(total) == pytest.approx(expected, rel=1e-4)
        assert int(size) == 350


@pytest.mark.slow
def test_base_and_adapter_open_with_transformers_and_peft_alone(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    lora = fresh_home.run(recipe(tiny, corpora, folder, method="lora", lora={"r": 4}))
    weights = final_weights(fresh_home.store, checkpoint_of(fresh_home.store, lora))
    [adapter] = weights.adapters
    code = f"""
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(adapter.parent)!r})
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(weights.folder)!r}), {str(adapter)!r})
messages = [{{"role": "user", "content": "river stone?"}}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] - ids["input_ids"].shape[1])
import sys; assert "mlflow" not in sys.modules
"""
    assert 1 <= int(run_alone(code, tmp_path).split()[-1]) <= 4
