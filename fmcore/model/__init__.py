"""Models: presets, building, adapters, loading, generation. Leans on transformers and peft."""

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load"]
# peft 0.21 asks transformers 5 for a property by its old name, whenever an adapter is put on
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def load(reference: str, tracking_uri: str = "") -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Open a registered version of any kind, adapters merged: `model, tokenizer = load("plays-qa@champion")`.

    tracking_uri: MLflow's address; empty = MLFLOW_TRACKING_URI, or the home's own database.
    """
    # presets and weights, in this package too, are read by a planner that must not wait for torch
    from fmcore.tracking.loading import load_registered

    return load_registered(reference, tracking_uri)
