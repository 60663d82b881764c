"""Reads a recipe file (YAML 1.2) into its class; every mistake becomes one message with file, line and field."""

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarfloat import ScalarFloat
from ruamel.yaml.scalarint import ScalarInt
from ruamel.yaml.scalarstring import ScalarString

from fmcore.errors import RecipeError
from fmcore.recipes.parents import absolute_parent
from fmcore.recipes.paths import is_hub_name, is_url
from fmcore.recipes.stages import RECIPES, Recipe

# Words of other tools -> ours.
SYNONYMS = {
    "learning_rate": "lr",
    "base_model": "parent",
    "model_name_or_path": "parent",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "sequence_len": "seq_len",
    "max_seq_length": "seq_len",
    "max_length": "seq_len",
    "block_size": "seq_len",
    "global_batch_size": "batch_tokens",
    "batch_size": "batch_tokens",
    "per_device_train_batch_size": "micro_batch",
    "micro_batch_size": "micro_batch",
    "gradient_clipping": "grad_clip",
    "max_grad_norm": "grad_clip",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup_fraction",
    "lora_r": "r",
    "lora_rank": "r",
    "rank": "r",
    "alpha": "lora_alpha",
    "lora_target_modules": "target_modules",
    "dataset": "data",
    "datasets": "data",
    "val_split": "holdout",
    "val_set_size": "holdout",
    "test_size": "holdout",
    "stage": "kind",
}
PATH_FIELDS = {"path", "eval_path", "mirror"}


def load_recipe(path: Path, overrides: Iterable[str] = (), *, folder: Path | None = None) -> Recipe:
    """Read and validate a recipe file.

    overrides: `dotted.field=value` strings, values in YAML. folder: where relative paths of the file are read
    from, its own when None; those in overrides are read from the working directory. Raises RecipeError,
    naming the file, the line, the field and the remedy.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    try:
        tree = YAML(typ="rt").load(text)
    except (YAMLError, ValueError) as error:
        raise RecipeError(f"{path} is not valid YAML: {_first_problem(error)}") from error
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of fields; the first one says its kind, as in `kind: pretrain`"
        )
    places = {location: f"line {line}" for location, line in _lines(tree, ())}
    data = _plain(tree)
    for override in overrides:
        places[_override(data, override)] = "--set"
    folder = folder or path.resolve().parent
    data = _absolute(data, folder)
    if isinstance(data.get("parent"), str):
        data["parent"] = absolute_parent(data["parent"], folder)
    return parse_recipe(data, where=str(path), places=places)


def _first_problem(error: Exception) -> str:
    """What YAML's parser stumbled over, in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None) or 'unreadable'}"


def parse_recipe(data: dict[str, Any], *, where: str = "recipe", places: dict[tuple, str] | None = None) -> Recipe:
    """Validate a mapping into the recipe class its `kind` names; places: where each field was given."""
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in RECIPES:
        given = f"kind is {kind!r}" if kind else "kind is missing"
        raise RecipeError(f"{where}: {given}; expected one of {', '.join(RECIPES)}")
    try:
        return RECIPES[kind].model_validate(data)
    except ValidationError as error:
        problems = "\n  ".join(_explain(e, RECIPES[kind], places or {}) for e in error.errors())
        raise RecipeError(f"{where} is not a valid {kind} recipe:\n  {problems}") from error


def recipe_from_parameters(data: Any, kind: str) -> Recipe:
    """Validate what a form or an API call sent as the recipe of a flow, whose name is its kind.

    Raises RecipeError, also for relative paths: a server knows no recipe folder to read them from.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"recipe: expected the fields of a {kind} recipe, given {data!r}")
    given = data.get("kind") or kind
    if given != kind:
        raise RecipeError(f"recipe: kind is {given!r}; this flow runs recipes of kind {kind}")
    parameters = {**data, "kind": kind}
    if relative := list(_relative_paths(parameters, "")):
        where, path = relative[0]
        raise RecipeError(
            f"{where}: {path!r} is a relative path, and a run on a server has no recipe folder to read it from; "
            f"give an absolute path or a URL"
        )
    return parse_recipe(_absolute(parameters, Path("/")))


def _relative_paths(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """(dotted place, path) of each path that only a recipe's folder would complete."""
    entries = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for key, item in entries:
        place = f"{where}.{key}" if where else str(key)
        if not isinstance(item, str):
            yield from _relative_paths(item, place)
        elif _is_relative(str(key), item, value):
            yield place, item


def _is_relative(key: str, path: str, block: Any) -> bool:
    if key == "parent":
        return path.startswith(".")
    hub = isinstance(block, dict) and block.get("format") == "hf" and is_hub_name(path)
    return key in PATH_FIELDS and bool(path) and not hub and not is_url(path) and path[0] not in "/~"


def _explain(error: Any, cls: type[BaseModel], places: dict[tuple, str]) -> str:
    location = tuple(error["loc"])
    dotted = ".".join(str(part) for part in location) or "recipe"
    given_at = places.get(location) or places.get(location[:-1])
    place = f"{given_at}{' ' if given_at == '--set' else ', '}{dotted}" if given_at else dotted
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown field.{_suggest(str(location[-1]), location[:-1], cls)}"
    if error["type"] == "missing":
        return f"{place}: missing. {_describe(location, cls)}".rstrip()
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    shown = "" if isinstance(given, (dict, list)) or error["type"] == "value_error" else f", given {given!r}"
    return f"{place}: {message}{shown}"


def _suggest(name: str, parent: tuple, cls: type[BaseModel]) -> str:
    block = _class_at(parent, cls)
    fields = _names(block) if block else []
    synonym = SYNONYMS.get(name)
    if synonym in fields:
        return f" Strata calls it {synonym!r}."
    elsewhere = {field: dotted for dotted, field in _all_fields(cls)}
    close = difflib.get_close_matches(name, fields, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    for candidate in (synonym, name):
        if candidate in elsewhere:
            return f" Did you mean {elsewhere[candidate]!r}?"
    return f" Fields here: {', '.join(sorted(fields))}." if fields else ""


def _describe(location: tuple, cls: type[BaseModel]) -> str:
    block = _class_at(location[:-1], cls)
    for name, field in block.model_fields.items() if block else ():
        if (field.alias or name) == location[-1]:
            return field.description or ""
    return ""


def _class_at(location: tuple, cls: type[BaseModel]) -> type[BaseModel] | None:
    current: type[BaseModel] | None = cls
    for part in location:
        if isinstance(part, int) or current is None:
            continue
        fields = {f.alias or n: f for n, f in current.model_fields.items()}
        current = _block_in(fields[part].annotation) if part in fields else None
    return current


def _block_in(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _names(cls: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in cls.model_fields.items()]


def _all_fields(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in cls.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        yield dotted, field.alias or name
        if block := _block_in(field.annotation):
            yield from _all_fields(block, f"{dotted}.")


def _override(data: dict[str, Any], override: str) -> tuple[str | int, ...]:
    """Set one field, and return its location."""
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise RecipeError(f"--set {override}: expected FIELD=VALUE, as in --set train.lr=1e-3")
    try:
        value = _plain(YAML(typ="rt").load(text))
    except YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not valid YAML: {error}") from error
    *parents, last = dotted.split(".")
    target: Any = data
    for part in parents:
        target = _child(target, part, override)
    value = _typed_in_a_shell(value, last, target)
    if isinstance(target, list):
        target[_index(target, last, override)] = value
    else:
        target[last] = value
    return tuple(int(part) if re.fullmatch("[0-9]+", part) else part for part in dotted.split("."))


def _typed_in_a_shell(value: Any, name: str, block: Any) -> Any:
    """A path on the command line is meant from the working directory, not from the recipe's folder."""
    if name == "parent" and isinstance(value, str):
        return absolute_parent(value, Path.cwd())
    format = block.get("format") if isinstance(block, dict) else None
    return _absolute({"format": format, name: value}, Path.cwd())[name]


def _child(target: Any, part: str, override: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, part, override)]
    child = target.setdefault(part, {})
    if not isinstance(child, (dict, list)):
        raise RecipeError(f"--set {override}: {part!r} is a value, it has no fields")
    return child


def _index(target: list, part: str, override: str) -> int:
    if not (part.isascii() and part.isdigit()) or int(part) >= len(target):
        raise RecipeError(f"--set {override}: {part!r} is no entry of a list of {len(target)} (the first is 0)")
    return int(part)


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_absolute(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    hub = value.get("format") == "hf"
    return {
        key: _absolute_path(item, folder, hub=hub)
        if key in PATH_FIELDS and isinstance(item, str)
        else _absolute(item, folder)
        for key, item in value.items()
    }


def _absolute_path(path: str, folder: Path, *, hub: bool) -> str:
    if not path or is_url(path):
        return path
    # normpath, not resolve: a symbolic link is the user's name for the data, and a glob is no real path
    local = os.path.normpath(folder / Path(path).expanduser())
    return path if hub and is_hub_name(path) and not Path(local).exists() else local


def _lines(node: Any, location: tuple) -> Iterator[tuple[tuple, int]]:
    """Location of every node -> its line, counted from 1."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key not in (node.lc.data or {}):  # type: ignore[attr-defined]
                continue  # merged in from another mapping by `<<`
            yield (*location, key), node.lc.key(key)[0] + 1  # type: ignore[attr-defined]
            yield from _lines(value, (*location, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield (*location, index), node.lc.item(index)[0] + 1  # type: ignore[attr-defined]
            yield from _lines(value, (*location, index))


def _plain(node: Any) -> Any:
    """ruamel's round-trip nodes as plain Python values."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for rich, plain in ((ScalarFloat, float), (ScalarInt, int), (ScalarString, str)):
        if isinstance(node, rich):
            return plain(node)
    return node
