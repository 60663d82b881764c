"""`strata plan`: costs, memory, totals of a lifecycle, and the same for programs; it builds nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fmcore.artifacts.types import Checkpoint
from fmcore.planning.memory import BASE_BYTES, estimate_memory
from fmcore.planning.shape import Shape, folder_shape, parent_shape, shape_of, trainable_parameters
from fmcore.recipes.load import parse_recipe


@pytest.fixture
def plan(cli: Any, tmp_path: Path) -> Any:
    """plan(home, recipe, *arguments) -> what it says, or its JSON; by formulas, which take no time."""

    def call(home: Any, recipe: dict[str, Any], *arguments: str) -> Any:
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        said = cli(home, "plan", path, "--no-calibration", *arguments)
        assert said.code == 0, said.err
        return json.loads(said.out) if "--json" in arguments else said.out

    return call


def test_a_lifecycle_has_costs_for_every_stage_and_totals(
    plan: Any, fresh_home: Any, tiny: Any, corpora: dict[str, Path]
) -> None:
    recipe = tiny.lifecycle(corpora["old"], corpora["new"], corpora["records"])
    told = plan(fresh_home, recipe, "--json")
    costs = [stage["train"] for stage in told["stages"]]
    assert len(costs) == 4
    assert {cost["parameters"] for cost in costs} == {33_440}  # a parent to come has its shape already
    assert all(cost["memory_bytes"] > 0 and cost["seconds"] > 0 for cost in costs)
    assert told["tokens"] == sum(cost["tokens"] for cost in costs)
    assert told["flops"] == pytest.approx(sum(cost["flops"] for cost in costs))
    assert told["memory_bytes"] == max(cost["memory_bytes"] for cost in costs)
    shown = plan(fresh_home, recipe)
    assert "in all: " in shown
    assert shown.count("foretold as if the gate lets every base through") == 1
    assert shown.count("memory: about") == 4
    assert not list((fresh_home.path / "artifacts").glob("*/*/artifact.json"))


@pytest.mark.usefixtures("inline")
def test_every_stage_of_a_lifecycle_is_calibrated_and_json_stays_json(
    cli: Any, fresh_home: Any, tiny: Any, corpora: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(tiny.lifecycle(corpora["old"], corpora["new"], corpora["records"])))
    said = cli(fresh_home, "plan", path, "--json")
    stages = json.loads(said.out)["stages"]
    assert ["calibrated on" in stage["train"]["basis"] for stage in stages] == [True] * 4
    assert said.err.count("taking a few steps") == 1  # the four have one shape and one context
    assert {stage["train"]["parameters"] for stage in stages} == {33_440}
    again = cli(fresh_home, "plan", path)
    assert again.out.count("measured with optimizer and copies for a save") == 4
    assert not again.err


def test_steps_are_taken_in_a_process_of_their_own(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], tmp_path: Path
) -> None:
    """As a user has it: the plan itself imports no torch."""
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(tiny.pretrain(corpora["old"])))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "deployments.cli", "plan", str(path)],
        env={**os.environ, "STRATA_HOME": str(fresh_home.path), "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "calibrated on" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "torch" not in imported
    assert "psutil" in imported


def test_hits_cost_nothing(plan: Any, base_home: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    told = plan(base_home, tiny.pretrain(corpora["old"]), "--json")
    assert [step["hit"] for step in told["stages"][0]["steps"]] == [True] * 5
    assert told["stages"][0]["train"] is None
    assert told["tokens"] == 0


def test_a_miss_names_its_field_in_json_too(plan: Any, base_home: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    told = plan(base_home, tiny.pretrain(corpora["old"]), "--set", "train.lr=1e-3", "--json")
    steps = {step["task"]: step for step in told["stages"][0]["steps"]}
    assert "train.lr: 0.005 -> 0.001" in steps["train"]["because"]
    assert "train will run" in steps["evaluate"]["because"]


def test_nothing_new_is_said_and_costs_nothing(plan: Any, based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    recipe = tiny.continued(corpora["old"], data={"holdout": 0.3})
    documents = based.documents(recipe)
    if documents.num_train == 0:
        assert "nothing new" in plan(based, recipe)
    else:
        assert "train: " in plan(based, recipe)


@pytest.mark.usefixtures("inline")
def test_a_held_out_set_that_decides_nothing_is_a_warning(
    plan: Any, fresh_home: Any, tiny: Any, corpora: dict[str, Path]
) -> None:
    recipe = tiny.pretrain(corpora["old"], gate={"min_documents": 40})
    assert "WARNING" not in plan(fresh_home, recipe)  # nobody knows yet
    fresh_home.documents(recipe)
    assert plan(fresh_home, recipe).count("WARNING: old: ") == 1
    assert len(plan(fresh_home, recipe, "--json")["stages"][0]["warnings"]) == 1


def test_a_save_longer_than_the_grace_is_foretold(
    plan: Any, fresh_home: Any, tiny: Any, corpora: dict[str, Path]
) -> None:
    recipe = tiny.pretrain(corpora["old"])
    assert "grace_s" not in plan(fresh_home, recipe)
    assert "more than execution.grace_s (0.0001)" in plan(fresh_home, recipe, "--set", "execution.grace_s=0.0001")


def test_set_reads_paths_from_the_working_directory(
    plan: Any, fresh_home: Any, tiny: Any, corpora: dict[str, Path], tmp_path: Path
) -> None:
    """The recipe's own relative paths are read from its folder, one typed in the shell from where it is typed."""
    recipe = tiny.pretrain(corpora["old"])
    recipe["data"]["sources"][0]["path"] = "nowhere.jsonl"
    Path("here.jsonl").write_bytes(corpora["old"].read_bytes())
    assert Path.cwd() != tmp_path
    told = plan(fresh_home, recipe, "--set", "data.sources.0.path=here.jsonl", "--json")
    assert told["stages"][0]["train"]["tokens"] == 20 * 256
    sources = "data.sources=[{name: old, path: here.jsonl, format: json}]"
    again = plan(fresh_home, recipe, "--set", sources, "--json")
    assert again["stages"][0]["steps"] == told["stages"][0]["steps"]


def test_a_path_of_set_that_leads_nowhere_says_where_it_was_read_from(
    cli: Any, fresh_home: Any, tiny: Any, corpora: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(tiny.pretrain(corpora["old"])))
    said = cli(fresh_home, "plan", tmp_path / "recipe.yaml", "--set", "data.sources.0.path=nowhere.jsonl")
    assert said.code == 2
    assert f"there is no file or folder {Path.cwd() / 'nowhere.jsonl'}; " in said.err
    assert "one of --set from the working directory" in said.err


def test_a_parents_shape_and_what_of_it_is_trained(base_home: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    [checkpoint] = base_home.store.all(Checkpoint)
    recipe = tiny.finetune(corpora["records"], method="lora", lora={"r": 2})
    stage = base_home.resolve(recipe)
    above = parent_shape(None, stage.parent, base_home.store)
    assert above is not None
    assert (above.parameters, above.seq_len, above.vocab_size) == (checkpoint.num_parameters, 32, 400)
    shape = shape_of(stage.recipe, above)
    assert shape is not None
    assert (shape.seq_len, shape.batch_tokens) == (32, 256)
    # q, k, v, o of 32 x 32, gate and up of 32 x 64, down of 64 x 32, in two layers, of rank 2
    assert trainable_parameters(stage.recipe, shape) == 2 * 2 * (4 * (32 + 32) + 3 * (32 + 64))
    assert trainable_parameters(parse_recipe(tiny.finetune(corpora["records"])), shape) == shape.parameters  # type: ignore[arg-type]


@pytest.mark.usefixtures("inline")
def test_trainable_parameters_are_the_adapters_own(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    recipe = tiny.finetune(corpora["records"], method="lora", lora={"r": 2})
    stage = based.resolve(recipe)
    shape = shape_of(stage.recipe, parent_shape(None, stage.parent, based.store))
    assert shape is not None
    assert based.train(recipe).num_trainable == trainable_parameters(stage.recipe, shape)


def test_a_folder_in_transformers_format_has_a_shape(tmp_path: Path, fresh_home: Any) -> None:
    fields = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 128, "vocab_size": 500, "max_position_embeddings": 4096}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    shape = folder_shape(tmp_path)
    assert (shape.vocab_size, shape.seq_len) == (500, 1024)
    assert shape.parameters > 500 * 64
    assert parent_shape(None, None, fresh_home.store) is None


def test_memory_grows_with_what_it_is_made_of() -> None:
    fields = {"hidden_size": 192, "num_hidden_layers": 4, "intermediate_size": 512, "num_attention_heads": 4}
    shape = Shape(fields, 2_500_000, 4096, 256, 8192)
    whole = estimate_memory(shape, shape.parameters, micro_batch=0)
    assert whole.peak == pytest.approx(880e6, rel=0.05)  # measured
    assert estimate_memory(shape, shape.parameters, micro_batch=1).peak == pytest.approx(637e6, rel=0.05)  # measured
    most = estimate_memory(shape, shape.parameters, micro_batch=32)  # as many sequences as a batch holds
    assert estimate_memory(shape, shape.parameters, micro_batch=100).peak == most.peak > whole.peak
    adapters = estimate_memory(shape, 100_000, micro_batch=0)
    assert adapters.activations == whole.activations
    assert adapters.peak < whole.peak - 15e6
    assert adapters.base == BASE_BYTES
