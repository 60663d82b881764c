"""Walks from a registered model to what it was made of, through the parents its records name."""

from collections.abc import Iterator

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

