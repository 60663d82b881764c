"""A person's decision over the gate's: make a version champion, and keep why."""

from pathlib import Path

from mlflow import MlflowClient

from fmcore.artifacts.lock import exclusive
from fmcore.artifacts.types import RegisteredModel
from fmcore.redaction import without_credentials
from fmcore.tracking import names
from fmcore.tracking.client import talking_to


def promote(client: MlflowClient, model: RegisteredModel, reason: str, *, lock: Path) -> None:
    """Move `champion` to this version. Its accepted losses reset the margin: see `judge_contender`."""
    with exclusive(lock), talking_to(client):
        version = str(model.version)
        client.set_model_version_tag(model.model, version, names.REGRESSION_ACCEPTED, without_credentials(reason))
        client.set_registered_model_alias(model.model, names.CHAMPION, version)
        challenger = client.get_registered_model(model.model).aliases.get(names.CHALLENGER)
        if challenger is not None and int(challenger) == model.version:
            client.delete_registered_model_alias(model.model, names.CHALLENGER)
