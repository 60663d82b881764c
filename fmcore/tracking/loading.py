"""Opens a registered version from the registry's own files, on any machine that reaches it."""

from pathlib import Path

import mlflow
from mlflow import MlflowClient
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fmcore.artifacts.files import read_json
from fmcore.errors import IntegrityError
from fmcore.model.build import open_model
from fmcore.model.weights import Weights
from fmcore.tokens.bpe import load_tokenizer
from fmcore.tracking import names
from fmcore.tracking.client import connect, patient_http, talking_to
from fmcore.tracking.versions import ModelRef, resolve
from fmcore.workspace import Workspace

ADAPTER_RECORD = "strata.json"


def load_registered(reference: str, tracking_uri: str = "") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A version's model, adapters merged, and its tokenizer.

    reference: name@alias, name/version or models:/... tracking_uri: MLflow's address; empty = MLFLOW_TRACKING_URI, or
    the home's own database. Raises UnknownModelError, TrackingError, IntegrityError where a base is another than the
    one an adapter was trained on.
    """
    client = connect(tracking_uri or Workspace.current().tracking_uri)
    folder, weights = _weights(client, resolve(client, reference))
    return open_model(weights).eval(), load_tokenizer(folder)


def _weights(client: MlflowClient, ref: ModelRef) -> tuple[Path, Weights]:
    """The version's folder, and the whole weights and adapters that make its model."""
    with talking_to(client), patient_http(0):
        folder = Path(mlflow.artifacts.download_artifacts(f"models:/{ref.uri}", tracking_uri=client.tracking_uri))
    if not (folder / ADAPTER_RECORD).is_file():
        return folder, Weights(folder=folder)
    record = read_json(folder / ADAPTER_RECORD)
    base = resolve(client, record["base"])
    with talking_to(client):
        found = client.get_model_version(base.name, str(base.version)).tags.get(names.CHECKPOINT)
    expected = record.get("base_fingerprint", found)  # adapters of before it was recorded name their base alone
    if found != expected:
        raise IntegrityError(
            f"{ref.uri} is an adapter over {base.uri} with the checkpoint {expected[:8]}, but {base.uri} in this "
            f"registry has the checkpoint {str(found)[:8]}: it is another model of that name"
        )
    _, below = _weights(client, base)
    return folder, below.model_copy(update={"adapters": (*below.adapters, folder / "adapter")})
