"""What a `parent` means, decided by its text, and what a folder beside the recipe changes."""

from pathlib import Path

import pytest

from fmcore.errors import UnknownModelError
from fmcore.recipes.load import load_recipe
from fmcore.recipes.parents import Folder, HubName, Registered, absolute_parent, base_name, parse_parent


@pytest.mark.parametrize("text", ["plays", "plays@champion", "plays/3", "models:/plays/3", "models:/plays@champion"])
def test_a_registered_version(text: str) -> None:
    assert parse_parent(text) == Registered(text)
    assert base_name(text) == "plays"


@pytest.mark.parametrize("text", ["./m", "../m", "/somewhere/m", "~/m", "./m/", "/a@b/m", "./models/3"])
def test_a_folder(text: str) -> None:
    assert isinstance(parse_parent(text), Folder)


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [("org/name", "org/name", ""), ("org/name@main", "org/name", "main"), ("o/n@refs/pr/1", "o/n", "refs/pr/1")],
)
def test_a_hub_name(text: str, repo: str, revision: str) -> None:
    assert parse_parent(text) == HubName(repo, revision)


@pytest.mark.parametrize("text", ["models/llama/big", "mymodel/", "a b/c", "https://somewhere/model"])
def test_what_is_neither(text: str) -> None:
    with pytest.raises(UnknownModelError, match="no folder beside the recipe, and no name of the hub"):
        parse_parent(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("./my model (v2)", "my-model-v2"),
        ("org/Qwen3-0.6B@main", "Qwen3-0.6B"),
        ("/x/.hidden", "hidden"),
        ("./_", "model"),
    ],
)
def test_the_name_is_the_last_one_cleaned(text: str, name: str) -> None:
    assert base_name(text) == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("./mymodel", "mymodel"),
        ("models/llama", "models/llama"),
        ("mymodel/", "mymodel"),
        ("../elsewhere", "../elsewhere"),
    ],
)
def test_folders_are_read_from_the_recipes_folder(tmp_path: Path, text: str, expected: str) -> None:
    home = tmp_path / "recipes"
    (home / "models" / "llama").mkdir(parents=True)
    (home / "mymodel").mkdir()
    assert Path(absolute_parent(text, home)) == (home / expected).resolve()


@pytest.mark.parametrize("text", ["mymodel", "plays/3", "org/name", "org/name@main", "models:/plays/3"])
def test_names_stay_names(tmp_path: Path, text: str) -> None:
    """A folder that has the name of a registered model, or of one of its versions, does not hide it."""
    for name in ("mymodel", "plays/3"):
        (tmp_path / name).mkdir(parents=True)
    assert absolute_parent(text, tmp_path) == text


def test_a_recipe_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "kind: finetune\nname: qa\nparent: ./mymodel\ndata: {tasks: [{name: t, path: t.json}]}\n"
    )
    assert load_recipe(tmp_path / "r.yaml").parent == str(tmp_path / "mymodel")
    assert load_recipe(tmp_path / "r.yaml", ["parent=plays@champion"]).parent == "plays@champion"
