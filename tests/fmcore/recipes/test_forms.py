"""The JSON schema of a recipe draws a form: nested flat models, Literal choices, static defaults, no unions."""

from collections.abc import Iterator
from typing import Any

import pytest

from fmcore.recipes.stages import RECIPES

SECRETS = ("password", "secret", "token_", "api_key", "credential")


def nodes(value: Any, place: str = "$") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping of a schema with its place."""
    if isinstance(value, dict):
        yield place, value
        for key, child in value.items():
            yield from nodes(child, f"{place}.{key}")
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from nodes(child, f"{place}.{index}")


def blocks(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield schema["title"], schema
    yield from schema["$defs"].items()


@pytest.fixture(params=sorted(RECIPES))
def schema(request: pytest.FixtureRequest) -> dict[str, Any]:
    return RECIPES[request.param].model_json_schema()


def test_no_unions(schema: dict[str, Any]) -> None:
    assert [place for place, node in nodes(schema) if node.keys() & {"anyOf", "oneOf", "allOf"}] == []


def test_every_field_is_required_or_has_a_static_default(schema: dict[str, Any]) -> None:
    for block, body in blocks(schema):
        for name, field in body["properties"].items():
            assert (name in body.get("required", ())) != ("default" in field), f"{block}.{name}"


def test_every_field_is_described_and_every_block_titled(schema: dict[str, Any]) -> None:
    for block, body in blocks(schema):
        assert body["title"] and body["description"], block
        for name, field in body["properties"].items():
            assert "title" in field or "$ref" in field, f"{block}.{name}"
            # a nested block whose own description says the same has none of its own
            shown = field.get("description") or schema["$defs"].get(field.get("$ref", "")[8:], {}).get("description")
            assert name == "kind" or shown, f"{block}.{name}"


def test_descriptions_are_plain_text_for_a_form_shows_them_as_they_are(schema: dict[str, Any]) -> None:
    shown = [(place, node["description"]) for place, node in nodes(schema) if isinstance(node.get("description"), str)]
    assert [(place, text) for place, text in shown if "`" in text] == []


def test_closed_and_without_secrets(schema: dict[str, Any]) -> None:
    for block, body in blocks(schema):
        assert body["additionalProperties"] is False, block
        assert not [n for n in body["properties"] if any(word in n.lower() for word in SECRETS)], block


def test_register_is_called_register(schema: dict[str, Any]) -> None:
    stage = schema if "data" in schema["properties"] else schema["$defs"]["PretrainStage"]
    assert "register_" not in stage["properties"]


def test_the_schemas_defaults_are_the_classes(schema: dict[str, Any]) -> None:
    """A form that sends every default back unchanged must validate to the same recipe."""
    cls = next(cls for cls in RECIPES.values() if cls.__name__ == schema["title"])
    text = {"sources": [{"name": "x", "path": "y"}]}
    records = {"tasks": [{"name": "x", "path": "y"}]}
    given: dict[str, Any] = {"name": "a"}
    properties = schema["properties"]
    if "data" in properties:
        given["data"] = records if cls.__name__ == "FinetuneRecipe" else text
    else:
        given |= {"pretrain": {"data": text}, "finetune": {"data": records}, "continue_pretrain": {"data": text}}
    if "parent" in properties:
        given["parent"] = "x@champion"
    filled = given | {name: field["default"] for name, field in properties.items() if "default" in field}
    assert cls.model_validate(filled) == cls.model_validate(given)
