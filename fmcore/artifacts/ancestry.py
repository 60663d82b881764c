"""Walks from a registered model to what it was made of, through the parents its records name."""

from collections.abc import Iterator

import pyarrow.parquet as pq

from fmcore.artifacts.files import read_json
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Checkpoint, Documents, RegisteredModel, TokenShards


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


def documents_of(store: Store, model: RegisteredModel) -> Documents:
    """The documents a registered model was trained and evaluated on."""
    return store.get(model.parents["documents"], Documents)


def shards_of(store: Store, model: RegisteredModel) -> TokenShards:
    """The token shards a registered model was trained on, with its tokenizer."""
    return store.get(model.parents["shards"], TokenShards)


def context_length(store: Store, model: RegisteredModel) -> int:
    """The context a registered model was trained with, in tokens."""
    return int(read_json(checkpoint_of(store, model).path / "spec.json")["seq_len"])


def held_out_ids(store: Store, model: RegisteredModel) -> set[str]:
    """Ids of every document and record that the model or an ancestor of it was evaluated on."""
    folders = [documents_of(store, ancestor).path / "heldout" for ancestor in lineage(store, model)]
    tables = [pq.read_table(path, columns=["id"]) for folder in folders for path in folder.glob("*.parquet")]
    return {document_id for table in tables for document_id in table["id"].to_pylist()}
