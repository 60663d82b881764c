"""The connection to MLflow: one address, short patience, errors that name it without its password."""

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from fmcore.errors import TrackingError
from fmcore.redaction import without_credentials

# A server that hangs holds nothing up for long; what the user set in the environment wins.
HTTP_DEFAULTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
QUIET_DEFAULTS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# An upload of n bytes may take as long as this many seconds and n at this many bytes a second, up to the longest.
UPLOAD_SECONDS, UPLOAD_BYTES_PER_SECOND, UPLOAD_LONGEST_SECONDS = 30, 1_000_000, 600
PROBE_SECONDS = 5.0  # in which an address has to show that somebody is there
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
# urllib3 warns of every retry, though the error that follows says it all.
LOG_LEVELS = {"mlflow": logging.WARNING, "alembic": logging.WARNING, "urllib3.connectionpool": logging.ERROR}

_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
_ENVIRONMENT = threading.RLock()  # the uploader's thread connects, too


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
    probe(uri)
    with talking_to(uri):
        if (database := local_database(uri)) is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
        with _ENVIRONMENT, _environment_kept("MLFLOW_TRACKING_URI"), _environment_kept("MLFLOW_REGISTRY_URI"):
            mlflow.set_tracking_uri(uri)
            mlflow.set_registry_uri(uri)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    return client


def probe(uri: str) -> None:
    """Ask whether somebody is there; takes PROBE_SECONDS at most, whatever hangs: name look-up, connection, answer.

    Any answer but a failure of the server's own counts, also one that asks for a password. Raises TrackingError.
    """
    if not uri.startswith(("http://", "https://")):
        if _database_host(uri) is None:
            return
        with talking_to(uri):
            make_url(uri).get_dialect().import_dbapi()  # a missing driver is another mistake than a missing server
    answers: SimpleQueue[Exception | None] = SimpleQueue()

    def ask() -> None:
        try:
            _ask(uri)
            answers.put(None)
        except Exception as error:  # whatever it is, the caller turns it into a message
            answers.put(error)

    threading.Thread(target=ask, name="mlflow-probe", daemon=True).start()
    try:
        error = answers.get(timeout=PROBE_SECONDS)
    except Empty:
        raise TrackingError(_no_answer(uri, f"nothing within {PROBE_SECONDS:g} s")) from None
    if error is not None:
        raise TrackingError(_no_answer(uri, _innermost(without_credentials(str(error))))) from None


def _ask(uri: str) -> None:
    if (address := _database_host(uri)) is not None:
        # MLflow itself would try a database that is away for minutes
        socket.create_connection(address, timeout=PROBE_SECONDS).close()
        return
    answer = http_request(
        get_default_host_creds(uri), "/health", "GET", timeout=PROBE_SECONDS, max_retries=0, raise_on_status=False
    )
    if answer.status_code >= 500:
        raise TrackingError(f"it answers {answer.status_code}")


def _database_host(uri: str) -> tuple[str, int] | None:
    kind = uri.partition(":")[0].partition("+")[0]
    if kind not in DATABASE_PORTS:
        return None
    url = make_url(uri)
    return (url.host, url.port or DATABASE_PORTS[kind]) if url.host else None


def _no_answer(uri: str, why: str) -> str:
    return (
        f"MLflow at {shown_uri(uri)} does not answer; is the server running, and is this the address that "
        f"MLFLOW_TRACKING_URI or execution.tracking_uri should name? ({why})"
    )


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
    found = find_experiment(client, name)
    if found is not None:
        return found
    with talking_to(client):
        return _create_experiment(client, name, home)


def find_experiment(client: MlflowClient, name: str) -> str | None:
    """The id of the experiment `name`, or None. Raises TrackingError where it was deleted."""
    with talking_to(client):
        experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return None
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
            raise TrackingError(_no_answer(uri, _innermost(text))) from cause
        raise TrackingError(f"MLflow at {shown_uri(uri)} failed: {text}") from cause


def _innermost(text: str) -> str:
    """The last clause of a connection error, which says what went wrong: `[Errno 111] Connection refused`."""
    return text.rsplit("failed with ", 1)[-1].rsplit(": ", 1)[-1].strip("()\"' ")


@contextmanager
def patient_http(num_bytes: int) -> Iterator[None]:
    """Let single requests take as long as an upload may: a server answers when its object store has it all."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    seconds = min(UPLOAD_LONGEST_SECONDS, UPLOAD_SECONDS + num_bytes // UPLOAD_BYTES_PER_SECOND)
    with _environment_kept(name):
        os.environ[name] = str(max(int(os.environ.get(name) or 0), seconds))
        yield
