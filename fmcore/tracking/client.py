"""The connection to MLflow: one address, short patience, errors that name it without its password."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from fmcore.errors import TrackingError

# A server that hangs holds nothing up for long; what the user set in the environment wins.
HTTP_DEFAULTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
QUIET_DEFAULTS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
UPLOAD_TIMEOUT_SECONDS = 600
# urllib3 warns of every retry, though the error that follows says it all.
LOG_LEVELS = {"mlflow": logging.WARNING, "alembic": logging.WARNING, "urllib3.connectionpool": logging.ERROR}

_USER_INFO = re.compile(r"(?<=://)[^/\s]*@")
_SECRET_QUERY = re.compile(r"(?<=[?&])((?:password|token|secret|api_key)=)[^&\s'\"]+", re.IGNORECASE)
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")


def connect(uri: str) -> MlflowClient:
    """A client for the tracking store and registry at `uri`, which answered a first question.

    Sets the process's global tracking and registry URI: creating a model version looks its source up
    there. Raises TrackingError, naming the address without credentials.
    """
    for name, value in (HTTP_DEFAULTS | QUIET_DEFAULTS).items():
        os.environ.setdefault(name, value)
    for logger, level in LOG_LEVELS.items():
        logging.getLogger(logger).setLevel(level)
    try:
        return _client(uri)
    except ModuleNotFoundError as error:
        raise TrackingError(
            f"the MLflow address {shown_uri(uri)} needs the Python package {error.name!r}; install it, or "
            f"give an http:// address or a sqlite:/// one"
        ) from error


def _client(uri: str) -> MlflowClient:
    with talking_to(uri):
        if (database := local_database(uri)) is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
        with _environment_kept("MLFLOW_TRACKING_URI"), _environment_kept("MLFLOW_REGISTRY_URI"):
            mlflow.set_tracking_uri(uri)
            mlflow.set_registry_uri(uri)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    return client


@contextmanager
def _environment_kept(name: str) -> Iterator[None]:
    """MLflow writes the address into the environment, where it would pass for the user's own setting."""
    before = os.environ.get(name)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def experiment_id(client: MlflowClient, name: str, home: Path) -> str:
    """The id of the experiment `name`, created where it is missing.

    In a local database its artifacts go below `<home>/mlartifacts/`; a server decides for itself.
    """
    with talking_to(client):
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            return _create_experiment(client, name, home)
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"the MLflow experiment {name!r} at {shown_uri(client.tracking_uri)} was deleted; restore it "
            f"with `mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    return str(experiment.experiment_id)


def _create_experiment(client: MlflowClient, name: str, home: Path) -> str:
    local = local_database(client.tracking_uri) is not None
    # as a URI, because a path with `#` or `?` in it is refused
    location = (home.absolute() / "mlartifacts" / name).as_uri() if local else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:
        other = client.get_experiment_by_name(name)  # another process may have created it just now
        if other is None:
            raise
        return str(other.experiment_id)


def local_database(uri: str) -> Path | None:
    """The file behind a `sqlite:///` address; None for any other address."""
    if not uri.startswith("sqlite:"):
        return None
    name = make_url(uri).database
    return Path(name) if name else None


def shown_uri(uri: str) -> str:
    """The address as it may be shown: without user, password or secret query values."""
    return without_credentials(uri)


def without_credentials(text: str) -> str:
    """Any text with the user info and secret query values of the addresses in it taken out."""
    return _SECRET_QUERY.sub(r"\1***", _USER_INFO.sub("", text))


def is_absent(error: MlflowException) -> bool:
    """Whether an error says that the thing asked for does not exist, rather than that asking failed."""
    return error.error_code in _ABSENT


@contextmanager
def talking_to(where: MlflowClient | str) -> Iterator[None]:
    """Turn what MLflow, its database, the network or the disk raise into a TrackingError."""
    uri = where if isinstance(where, str) else where.tracking_uri
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        text = without_credentials(str(error))
        # a traceback prints the cause's own message: where that holds a password, it is left out
        cause = error if text == str(error) else None
        if text.startswith("API request to"):
            raise TrackingError(
                f"MLflow at {shown_uri(uri)} does not answer; is the server running, and is this the address "
                f"that MLFLOW_TRACKING_URI or execution.tracking_uri should name? ({_innermost(text)})"
            ) from cause
        raise TrackingError(f"MLflow at {shown_uri(uri)} failed: {text}") from cause


def _innermost(text: str) -> str:
    """The last clause of a connection error, which says what went wrong: `[Errno 111] Connection refused`."""
    return text.rsplit("failed with ", 1)[-1].rsplit(": ", 1)[-1].strip("()\"' ")


@contextmanager
def patient_http() -> Iterator[None]:
    """Let single requests take minutes: a server answers an upload only when its object store has it."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    with _environment_kept(name):
        os.environ[name] = str(max(int(os.environ.get(name) or 0), UPLOAD_TIMEOUT_SECONDS))
        yield
