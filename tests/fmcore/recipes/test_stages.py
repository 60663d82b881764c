"""What the recipe classes hold besides fields: frozen trees, rates and names that follow from them."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from fmcore.recipes.fields import TextData
from fmcore.recipes.stages import FinetuneRecipe, PretrainRecipe

TEXT = {"sources": [{"name": "x", "path": "y"}]}
RECORDS = {"tasks": [{"name": "x", "path": "y"}]}


def test_recipes_are_frozen() -> None:
    recipe = PretrainRecipe(name="a", data=TEXT)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.lr = 1.0


def test_two_recipes_share_no_default() -> None:
    first, second = (PretrainRecipe(name="a", data=TEXT) for _ in range(2))
    first.model.config["hidden_size"] = 1
    assert second.model.config == {}
    first.data.eval_sources.append(first.data.sources[0])
    assert TextData(**TEXT).eval_sources == []


@pytest.mark.parametrize(("method", "lr"), [("full", 3e-4), ("lora", 3e-3)])
def test_the_learning_rate_of_a_method(method: str, lr: float) -> None:
    assert FinetuneRecipe(name="a", parent="b", data=RECORDS, method=method).lr == lr
    given = FinetuneRecipe(name="a", parent="b", data=RECORDS, method=method, train={"lr": 0.5})
    assert given.lr == 0.5


def test_a_model_is_named_after_its_recipe_unless_told() -> None:
    assert PretrainRecipe(name="a", data=TEXT).model_name == "a"
    assert PretrainRecipe(name="a", data=TEXT, register={"model": "b"}).model_name == "b"


@pytest.mark.parametrize("holdout", [0, 1, -0.1, 1.5])
def test_a_holdout_lies_between_0_and_1(holdout: float) -> None:
    with pytest.raises(ValidationError, match="holdout"):
        TextData(**TEXT, holdout=holdout)


def test_recipes_and_artifacts_load_without_the_heavy_packages() -> None:
    code = (
        "import sys, fmcore.recipes.load, fmcore.artifacts.ancestry, fmcore.artifacts.store\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'peft', 'datasets', 'mlflow', 'prefect'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
