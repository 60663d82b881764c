"""Versions in the model registry: what a reference stands for, which is champion, what there is.

Everything that says where a version came from stands in its tags (`fmcore.tracking.names`).
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from fmcore.errors import UnknownModelError
from fmcore.tracking import names
from fmcore.tracking.client import is_absent, shown_uri, talking_to

PAGE_SIZE = 1000
MAX_SHOWN_VERSIONS = 10


@dataclass(frozen=True)
class ModelRef:
    """A version in the registry that Strata made.

    fingerprint: hex sha256, the identity of what made it. model_id: MLflow's logged model, its files.
    """

    name: str
    version: int
    fingerprint: str
    model_id: str

    @property
    def uri(self) -> str:
        """`name/version`, as the command line takes it."""
        return f"{self.name}/{self.version}"


@dataclass(frozen=True)
class ModelRow:
    """A version as a list shows it; verdict and parent are empty where there is none (yet)."""

    model: str
    version: int
    stage: str
    verdict: str
    aliases: tuple[str, ...]
    parent: str
    fingerprint: str
    created: datetime


def resolve(client: MlflowClient, reference: str) -> ModelRef:
    """The version that `name@alias`, `name/version`, either after `models:/`, or a bare `name` stands for.

    A bare name is its champion. Raises UnknownModelError, which lists what there is, and TrackingError.
    """
    name, alias, version = _parse(reference)
    with talking_to(client):
        registered = registered_model(client, name)
        if registered is None:
            raise UnknownModelError(_no_such_name(client, reference, name))
        number = version if version is not None else registered.aliases.get(alias)
        found = version_numbered(client, name, int(number)) if number is not None else None
        if found is None:
            raise UnknownModelError(_no_such_version(client, reference, registered))
    return ref_of(found)


def champion(client: MlflowClient, name: str) -> ModelRef | None:
    """The version that holds the alias `champion` of a name, or None. Raises TrackingError."""
    with talking_to(client):
        registered = registered_model(client, name)
        number = registered.aliases.get(names.CHAMPION) if registered else None
        found = version_numbered(client, name, int(number)) if number is not None else None
    return ref_of(found) if found else None


def find_version(client: MlflowClient, name: str, fingerprint: str) -> ModelRef | None:
    """The version of a name that has this fingerprint, or None. Raises TrackingError."""
    with talking_to(client):
        found = version_with(client, name, fingerprint)
    return ref_of(found) if found else None


def ref_of(version: ModelVersion) -> ModelRef:
    """A registry entry as a reference. Raises UnknownModelError where Strata did not make it."""
    if names.FINGERPRINT not in version.tags or names.MODEL_ID not in version.tags:
        raise UnknownModelError(
            f"{version.name}/{version.version} is in the registry, but Strata did not register it: its tags "
            f"{names.FINGERPRINT} and {names.MODEL_ID} are missing. Name a version that `strata list` shows."
        )
    return ModelRef(version.name, int(version.version), version.tags[names.FINGERPRINT], version.tags[names.MODEL_ID])


def list_models(client: MlflowClient) -> list[ModelRow]:
    """Every version that Strata registered, by name and version. Raises TrackingError."""
    with talking_to(client):
        aliases = {model.name: model.aliases for model in _all_names(client)}
        made_here = [v for v in search_versions(client) if names.FINGERPRINT in v.tags]
    rows = [_row(version, aliases.get(version.name, {})) for version in made_here]
    return sorted(rows, key=lambda row: (row.model, row.version))


def search_versions(client: MlflowClient, filter_string: str = "") -> list[ModelVersion]:
    """All model versions that a filter of MLflow's search syntax finds, every page of them."""
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(filter_string, max_results=PAGE_SIZE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def quoted(value: str) -> str:
    """A value as a string in MLflow's search syntax."""
    return f'"{value}"' if "'" in value else f"'{value}'"


def _parse(reference: str) -> tuple[str, str, int | None]:
    """(name, alias, version): the version is None where the alias counts."""
    path = reference.removeprefix("models:/")
    name, at, alias = path.rpartition("@")
    if at:
        wellformed = bool(name and alias)
        version = None
    else:
        name, slash, number = path.partition("/")
        alias = names.CHAMPION
        wellformed = bool(name) and (not slash or number.isdecimal())
        version = int(number) if wellformed and slash else None
    if not wellformed:
        raise UnknownModelError(
            f"{reference!r} is no model reference; expected name@alias, name/version or name, as in plays@champion"
        )
    return name, alias, version


def registered_model(client: MlflowClient, name: str) -> RegisteredModel | None:
    """The registry's entry of a name, with its aliases, or None."""
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if is_absent(error):
            return None
        raise


def version_numbered(client: MlflowClient, name: str, number: int) -> ModelVersion | None:
    """The registry's entry of a version, or None."""
    try:
        return client.get_model_version(name, str(number))
    except MlflowException as error:
        if is_absent(error):
            return None
        raise


def version_with(client: MlflowClient, name: str, fingerprint: str) -> ModelVersion | None:
    """The registry's entry of the name's version that has this fingerprint, or None."""
    wanted = f"name = {quoted(name)} and tags.`{names.FINGERPRINT}` = {quoted(fingerprint)}"
    return min(search_versions(client, wanted), key=lambda v: int(v.version), default=None)


def _all_names(client: MlflowClient) -> list[RegisteredModel]:
    found: list[RegisteredModel] = []
    token = None
    while True:
        page = client.search_registered_models(max_results=PAGE_SIZE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _no_such_name(client: MlflowClient, reference: str, name: str) -> str:
    known = sorted(model.name for model in _all_names(client))
    text = f"{reference}: the registry at {shown_uri(client.tracking_uri)} has no model {name!r}."
    if not known:
        return f"{text} It has no models yet; a pretrain recipe makes the first."
    nearest = difflib.get_close_matches(name, known, n=1)
    suggestion = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"{text}{suggestion} Models there: {', '.join(known)}."


def _no_such_version(client: MlflowClient, reference: str, registered: RegisteredModel) -> str:
    numbers = sorted(int(v.version) for v in search_versions(client, f"name = {quoted(registered.name)}"))
    shown = ", ".join(str(number) for number in numbers[-MAX_SHOWN_VERSIONS:]) or "none"
    earlier = "..., " if len(numbers) > MAX_SHOWN_VERSIONS else ""
    aliases = ", ".join(f"@{alias} = {number}" for alias, number in sorted(registered.aliases.items()))
    return (
        f"{reference}: model {registered.name!r} has no such version or alias. "
        f"Versions: {earlier}{shown}. Aliases: {aliases or 'none'}."
    )


def _row(version: ModelVersion, aliases: Mapping[str, int]) -> ModelRow:
    number = int(version.version)
    return ModelRow(
        model=version.name,
        version=number,
        stage=version.tags.get(names.STAGE, ""),
        verdict=version.tags.get(names.VERDICT, ""),
        aliases=tuple(sorted(alias for alias, holder in aliases.items() if int(holder) == number)),
        parent=version.tags.get(names.PARENT_VERSION, ""),
        fingerprint=version.tags[names.FINGERPRINT],
        created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
    )
