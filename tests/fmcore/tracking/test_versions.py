from collections.abc import Callable

import pytest
from mlflow import MlflowClient

from fmcore.errors import UnknownModelError
from fmcore.tracking.registry import ModelRef, champion, find_version, list_models, resolve

Publish = Callable[..., ModelRef]


@pytest.fixture
def plays(client: MlflowClient, put: Publish) -> list[ModelRef]:
    """Three versions, the second of them champion."""
    refs = [put(fingerprint=digit * 64) for digit in "abc"]
    client.set_registered_model_alias("plays", "champion", "2")
    return refs


@pytest.mark.parametrize(
    ("reference", "version"),
    [
        ("plays", 2),
        ("plays@champion", 2),
        ("plays@challenger", 3),
        ("plays/1", 1),
        ("models:/plays/3", 3),
        ("models:/plays@champion", 2),
        ("models:/plays", 2),
    ],
)
def test_every_spelling_of_a_reference(
    client: MlflowClient, plays: list[ModelRef], reference: str, version: int
) -> None:
    assert resolve(client, reference) == plays[version - 1]
    assert plays[version - 1].uri == f"plays/{version}"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("play@champion", "no model 'play'. Did you mean 'plays'? Models there: plays."),
        ("unrelated", "no model 'unrelated'. Models there: plays."),
        ("plays/9", "no such version or alias. Versions: 1, 2, 3. Aliases: @challenger = 3, @champion = 2."),
        (
            "plays@best",
            "no such version or alias. Versions: 1, 2, 3. Aliases: @challenger = 3, @champion = 2.",
        ),
        ("plays/latest", "'plays/latest' is no model reference; expected name@alias, name/version or name"),
        ("plays@", "is no model reference"),
        ("@champion", "is no model reference"),
        ("", "is no model reference"),
        ('it\'s "odd"', "has no model"),
    ],
)
def test_a_reference_that_leads_nowhere_says_what_there_is(
    client: MlflowClient, plays: list[ModelRef], reference: str, message: str
) -> None:
    with pytest.raises(UnknownModelError) as caught:
        resolve(client, reference)
    assert message in str(caught.value)


def test_many_versions_are_not_all_listed(client: MlflowClient) -> None:
    client.create_registered_model("many")
    for _ in range(12):
        client.create_model_version("many", "s3://bucket/x")
    with pytest.raises(UnknownModelError, match=r"Versions: \.\.\., 3, 4, .*, 12\. Aliases: none\."):
        resolve(client, "many")


def test_an_empty_registry_says_how_to_begin(client: MlflowClient) -> None:
    with pytest.raises(UnknownModelError, match="no models yet; a pretrain recipe makes the first"):
        resolve(client, "plays")
    assert list_models(client) == []


def test_a_version_that_strata_did_not_make_is_refused(client: MlflowClient) -> None:
    client.create_registered_model("their own")
    client.create_model_version("their own", "s3://bucket/x")
    with pytest.raises(UnknownModelError, match="their own/1 is in the registry, but Strata did not register"):
        resolve(client, "their own/1")
    assert list_models(client) == []


def test_the_champion_is_none_until_there_is_one(client: MlflowClient, put: Publish) -> None:
    assert champion(client, "plays") is None
    ref = put()
    assert champion(client, "plays") is None
    client.set_registered_model_alias("plays", "champion", "1")
    assert champion(client, "plays") == ref


def test_a_version_is_found_by_its_fingerprint_under_its_own_name(client: MlflowClient, plays: list[ModelRef]) -> None:
    assert find_version(client, "plays", "b" * 64) == plays[1]
    assert find_version(client, "plays", "d" * 64) is None
    assert find_version(client, "other", "b" * 64) is None


def test_the_list_tells_each_version(client: MlflowClient, plays: list[ModelRef], put: Publish) -> None:
    put("plays-qa", "e" * 64, stage="finetune", parent=plays[1])
    client.set_model_version_tag("plays", "1", "strata.verdict", "FIRST")
    rows = [(r.model, r.version, r.stage, r.verdict, r.aliases, r.parent) for r in list_models(client)]
    assert rows == [
        ("plays", 1, "pretrain", "FIRST", (), ""),
        ("plays", 2, "pretrain", "", ("champion",), ""),
        ("plays", 3, "pretrain", "", ("challenger",), ""),
        ("plays-qa", 1, "finetune", "", ("challenger",), "plays/2"),
    ]
    assert list_models(client)[0].fingerprint == "a" * 64
    assert list_models(client)[0].created.year >= 2025
