"""Where the weights of a registered model lie; knows no torch."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Checkpoint


class Weights(BaseModel):
    """folder: a transformers folder. adapters: LoRA folders merged onto it, in order.

    tensors: a safetensors file by parameter name that replaces the folder's own (a stable checkpoint).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    folder: Path
    adapters: tuple[Path, ...] = ()
    tensors: Path | None = None


def final_weights(store: Store, checkpoint: Checkpoint) -> Weights:
    """The final weights of a checkpoint: a folder of its own, or an adapter over its parent's weights."""
    store.check(checkpoint)
    if checkpoint.method == "full":
        return Weights(folder=checkpoint.final)
    below = final_weights(store, store.get(checkpoint.parents["parent"], Checkpoint))
    return below.model_copy(update={"adapters": (*below.adapters, checkpoint.final / "adapter")})


def start_weights(store: Store, checkpoint: Checkpoint) -> Weights:
    """What continuous pre-training starts from: the stable weights, or the final ones where there are none."""
    final = final_weights(store, checkpoint)
    if checkpoint.stable is None:
        return final
    return final.model_copy(update={"tensors": checkpoint.stable / "model.safetensors"})
