"""What the four deployments are, seen without a server: form, defaults, schedule, and the errors of `strata deploy`."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.deploy import check_cron, deploy, deployments_of, form_recipes
from fmcore.errors import RecipeError, UserInputError
from fmcore.recipes.load import parse_recipe, recipe_from_parameters
from fmcore.recipes.stages import RECIPES

CRON = "30 2 * * *"


@pytest.fixture(scope="module")
def made(tiny: Any, corpora: dict[str, Path]) -> dict[str, Any]:
    """Kind -> deployment, filled in with tiny recipes."""
    old, new, records = corpora["old"], corpora["new"], corpora["records"]
    given = (tiny.pretrain(old), tiny.finetune(records), tiny.continued(new), tiny.lifecycle(old, new, records))
    recipes = {recipe["kind"]: parse_recipe(recipe) for recipe in given}
    return asyncio.run(deployments_of(recipes, CRON, schedule_active=False))


def nodes(value: Any, place: str = "$") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield place, value
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from nodes(child, f"{place}.{key}")


@pytest.mark.parametrize("kind", RECIPES)
def test_the_form(made: dict[str, Any], kind: str) -> None:
    """One parameter; no unions; every list is filled in or has a default; every field has a title."""
    schema = made[kind]._parameter_openapi_schema.model_dump()
    assert list(schema["properties"]) == schema["required"] == ["recipe"]
    for place, node in nodes(schema):
        assert not node.keys() & {"anyOf", "oneOf"}, place
    for block, body in schema["definitions"].items():
        for name, field in body["properties"].items():
            # a block that is called as its class has no second title
            title = field.get("title") or schema["definitions"][field["$ref"].rsplit("/", 1)[-1]]["title"]
            assert title[0].isupper() and "_" not in title, f"{block}.{name}"
            if field.get("type") == "array":
                assert "default" in field or name in body["required"], f"{block}.{name}"
    assert "Batch tokens" in {node.get("title") for _, node in nodes(schema)}


@pytest.mark.parametrize("kind", RECIPES)
def test_the_form_sent_back_unchanged_is_the_recipe(made: dict[str, Any], kind: str) -> None:
    parameters = json.loads(json.dumps(made[kind].parameters))
    recipe = recipe_from_parameters(parameters["recipe"], kind)
    assert recipe.model_dump(mode="json") == parameters["recipe"]
    parameters["recipe"].pop("kind")
    assert recipe_from_parameters(parameters["recipe"], kind) == recipe


def test_what_a_deployment_says_of_itself(made: dict[str, Any]) -> None:
    for kind, deployment in made.items():
        assert deployment.full_name == f"{kind}/strata"
        assert deployment.tags == ["strata", kind]
        assert deployment.entrypoint == f"flows.{kind.replace('-', '_')}.{kind.replace('-', '_')}"
        assert deployment.version
        assert not deployment.description.startswith(("#", "-", "|"))
        assert [s.slug for s in deployment.schedules or ()] == (["nightly"] if kind == "continue-pretrain" else [])


def test_the_nightly_schedule_is_paused_and_has_its_own_parameters(made: dict[str, Any]) -> None:
    [nightly] = made["continue-pretrain"].schedules
    assert (nightly.schedule.cron, nightly.schedule.timezone, nightly.active) == (CRON, "UTC", False)
    assert nightly.parameters["recipe"]["name"] == "weekly"


def test_given_recipes_fill_in_their_forms_and_examples_the_rest(
    tmp_path: Path, tiny: Any, corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.yaml"
    mine.write_text(json.dumps(tiny.pretrain(corpora["old"], name="mine")))
    recipes = form_recipes([mine])
    assert list(recipes) == list(RECIPES)
    assert recipes["pretrain"].name == "mine"
    for kind in ("finetune", "continue-pretrain", "lifecycle"):
        paths = [n["path"] for _, n in nodes(recipes[kind].model_dump(mode="json")) if n.get("format")]
        assert paths
        assert all(path.startswith(f"{tmp_path}/") for path in paths)
    with pytest.raises(UserInputError, match="second recipe of kind pretrain"):
        form_recipes([mine, mine])


@pytest.mark.parametrize("path", ["input.txt", "./input.txt", "../x/*.jsonl"])
def test_a_relative_path_in_a_parameter_is_refused(tiny: Any, path: str) -> None:
    with pytest.raises(RecipeError, match=r"data\.sources\.0\.path.*absolute path or a URL"):
        recipe_from_parameters(tiny.pretrain(Path("/x"), data={"sources": [{"name": "a", "path": path}]}), "pretrain")


def test_a_relative_parent_in_a_parameter_is_refused(tiny: Any) -> None:
    with pytest.raises(RecipeError, match=r"parent: '\./model' is a relative path"):
        recipe_from_parameters(tiny.finetune(Path("/x"), parent="./model"), "finetune")


def test_another_flows_recipe_is_refused(tiny: Any) -> None:
    with pytest.raises(RecipeError, match="this flow runs recipes of kind pretrain"):
        recipe_from_parameters(tiny.finetune(Path("/x")), "pretrain")


def test_cron_lines() -> None:
    check_cron("*/5 * * * 1-5")
    with pytest.raises(UserInputError, match="'every night' is no cron line"):
        check_cron("every night")


def test_deploy_needs_a_server_that_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STRATA_HOME", str(tmp_path))
    for name in ("PREFECT_API_URL", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserInputError, match="PREFECT_API_URL is not set"):
        deploy([], "strata", CRON, None)  # type: ignore[arg-type]
    monkeypatch.setenv("PREFECT_API_URL", "http://user:hidden@127.0.0.1:9/api")
    with pytest.raises(UserInputError, match="does not answer") as caught:
        deploy([], "strata", CRON, None)  # type: ignore[arg-type]
    assert "hidden" not in str(caught.value)
