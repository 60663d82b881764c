"""Walks from a registered model to what it was made of, through the parents its records name."""

from collections.abc import Iterator

import pyarrow.parquet as pq

from fmcore.artifacts.files import read_json
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Checkpoint, Documents, RegisteredModel, TokenShards
from fmcore.errors import StoreError


def lineage(store: Store, model: RegisteredModel) -> Iterator[RegisteredModel]:
    """The model, its parent, its parent's parent, ..., the youngest first."""
    current: RegisteredModel | None = model
    while current is not None:
        yield current
        parent = current.parents.get("parent")
        current = store.get(parent, RegisteredModel) if parent else None


def checkpoint_of(store: Store, model: RegisteredModel) -> Checkpoint:
    """The weights behind a registered model."""
    return store.get(model.parents["checkpoint"], Checkpoint)


def documents_of(store: Store, model: RegisteredModel) -> Documents | None:
    """The documents a registered model was trained and evaluated on; None where it was imported."""
    return store.get(model.parents["documents"], Documents) if "documents" in model.parents else None


def shards_of(store: Store, model: RegisteredModel) -> TokenShards | None:
    """The token shards a registered model was trained on; None where it was imported."""
    return store.get(model.parents["shards"], TokenShards) if "shards" in model.parents else None


def full_checkpoint(store: Store, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with whole weights that a checkpoint's adapters lie on, or the checkpoint itself."""
    while checkpoint.method != "full":
        checkpoint = store.get(checkpoint.parents["parent"], Checkpoint)
    return checkpoint


def adapters_below(store: Store, model: RegisteredModel) -> list[RegisteredModel]:
    """The version with whole weights that a version rests on, then the adapters over it, itself the last."""
    chain = []
    for below in lineage(store, model):
        chain.append(below)
        if below.method == "full":
            break
    return chain[::-1]


def knows_texts(store: Store, model: RegisteredModel) -> bool:
    """Whether any text that the model or an ancestor of it was trained on is known, and could be replayed."""
    try:
        known = (shards_of(store, ancestor) for ancestor in lineage(store, model))
        return any(shards is not None and shards.form == "text" for shards in known)
    except StoreError:  # something of it was removed: whoever wants to replay is told what
        return True


def context_length(store: Store, model: RegisteredModel) -> int:
    """The context a registered model was trained with, or was imported for, in tokens."""
    return int(read_json(checkpoint_of(store, model).path / "spec.json")["seq_len"])


def held_out_ids(store: Store, model: RegisteredModel) -> set[str]:
    """Ids of every document and record that the model or an ancestor of it was evaluated on."""
    known = [documents_of(store, ancestor) for ancestor in lineage(store, model)]
    folders = [documents.path / "heldout" for documents in known if documents is not None]
    tables = [pq.read_table(path, columns=["id"]) for folder in folders for path in folder.glob("*.parquet")]
    return {document_id for table in tables for document_id in table["id"].to_pylist()}
