"""The first arrow: raw data -> Documents.

Text is read, normalised, filtered, deduplicated by content and split by content hash; prompt/response
records likewise, split by group. With a parent, what its weights have seen and what any ancestor held out
is dropped. Whatever is dropped stays readable, with its reason, in `dropped.parquet`, and what could not be
read in `quarantine.parquet`.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fmcore.artifacts.ancestry import checkpoint_of, held_out_ids
from fmcore.artifacts.files import DigestCache, sha256_text
from fmcore.artifacts.step import Step
from fmcore.artifacts.store import Building, Fields, Store
from fmcore.artifacts.types import Checkpoint, Documents, RegisteredModel
from fmcore.data.accounts import Accounts
from fmcore.data.dedup import SeenIds
from fmcore.data.holdout import HoldoutCheck, fraction_of
from fmcore.data.ledger import Ledger
from fmcore.data.records import prepare_records, task_identity
from fmcore.data.sources import data_identity, settings_identity, shards_of
from fmcore.data.tables import DOCUMENTS, TableWriter
from fmcore.data.units import Shard, Unit, reading_shards
from fmcore.errors import DataError
from fmcore.recipes.fields import Source, TaskData, TextData

CODE_VERSION = 1


def documents_step(name: str, data: TextData | TaskData, parent: str | None, digests: DigestCache) -> Step:
    """What `prepare_documents` would make; reads the sources' bytes for their digests.

    parent: fingerprint of the parent's checkpoint: it decides which text documents are new. Records are the
    same whatever is trained on them.
    """
    above = {}
    if isinstance(data, TextData):
        config: dict[str, Any] = {
            "sources": [_source_identity(s, digests) for s in data.sources],
            "eval_sources": [_source_identity(s, digests) for s in data.eval_sources],
            "holdout": data.holdout,
            "filters": data.filters.model_dump(),
        }
        above = {"parent": parent} if parent else {}
    else:
        config = {"tasks": [task_identity(task, digests) for task in data.tasks]}
    if data.on_bad_input != "stop":
        config["on_bad_input"] = data.on_bad_input
    digests.save()
    return Step("documents", name, config, above, CODE_VERSION)


def _source_identity(source: Source, digests: DigestCache) -> dict[str, Any]:
    return {**settings_identity(source), "files": data_identity(source, source.path, digests)}


def prepare_documents(
    step: Step, data: TextData | TaskData, parent: RegisteredModel | None, store: Store, *, workers: int = 0
) -> Documents:
    """Build the documents of `step`. Raises DataError for what cannot be read or is too little.

    workers: processes that read; 0 = as many as pay off. The result is the same for any number.
    """

    def builder(building: Building) -> Fields:
        if isinstance(data, TextData):
            fields = _prepare_text(building.path, data, Ancestors(store, parent), store.digests, workers)
        else:
            fields = prepare_records(building.path, data, store.digests, workers)
        above = step.parents.get("parent")
        if documents_step(step.name, data, above, store.digests).fingerprint != step.fingerprint:
            raise DataError("a source's files have changed while they were read; run the same command again")
        return fields

    return store.build(step, Documents, builder)


class Ancestors:
    """What a parent's lineage forbids to train on: documents seen, and documents held out."""

    def __init__(self, store: Store, parent: RegisteredModel | None) -> None:
        self._held_out = held_out_ids(store, parent) if parent else set()
        self._ledger = _start_ledger(checkpoint_of(store, parent)) if parent else None

    def held_out_ids(self) -> set[str]:
        """Ids of every document that an ancestor was evaluated on."""
        return self._held_out

    def has_seen(self, document_id: str) -> bool:
        """Whether a document's tokens entered a step of the checkpoint that training starts from."""
        return self._ledger is not None and document_id in self._ledger


def _start_ledger(checkpoint: Checkpoint) -> Ledger:
    return Ledger(checkpoint.ledger(checkpoint.start))


class _Split:
    """Writes documents to the side they belong on, and counts them."""

    def __init__(self, folder: Path, stack: ExitStack, accounts: Accounts) -> None:
        self._folder = folder
        self._stack = stack
        self._writers: dict[tuple[str, str], TableWriter] = {}
        self.accounts = accounts
        self.bytes: dict[str, Counter[str]] = {"train": Counter(), "heldout": Counter()}

    def keep(self, side: str, source: str, unit: Unit) -> None:
        if (side, source) not in self._writers:
            writer = TableWriter(self._folder / side / f"{source}.parquet", DOCUMENTS)
            self._writers[side, source] = self._stack.enter_context(writer)
        self._writers[side, source].add(
            id=unit.id, source=source, modality="text", content=unit.text, metadata=unit.metadata
        )
        self.accounts.kept[side][source] += 1
        self.bytes[side][source] += len(unit.text.encode())

    def counts(self) -> dict[str, Any]:
        sizes = {f"{side}_bytes": dict(sizes) for side, sizes in self.bytes.items()}
        return {**self.accounts.counts(), **sizes}


def _prepare_text(folder: Path, data: TextData, ancestors: Ancestors, digests: DigestCache, workers: int) -> Fields:
    sources = [*data.eval_sources, *data.sources]
    shards = [shard for source in sources for shard in shards_of(source, source.path, digests, data.filters)]
    with ExitStack() as stack:
        stop = data.on_bad_input == "stop"
        split = _Split(folder, stack, stack.enter_context(Accounts(folder, shards, stop=stop)))
        evaluated = stack.enter_context(SeenIds(folder / "evaluated.sqlite"))
        kept = stack.enter_context(SeenIds(folder / "kept.sqlite"))
        held_out = ancestors.held_out_ids()

        def forbidden(document_id: str) -> str | None:
            if document_id in evaluated:
                return "in_eval_source"
            if document_id in held_out:
                return "heldout_by_ancestor"
            return "seen" if ancestors.has_seen(document_id) else None

        checks = {source.name: HoldoutCheck(f"source {source.name}", data.holdout) for source in data.sources}
        reading = stack.enter_context(reading_shards(shards, folder, workers, stop=stop))
        for shard, units in reading:
            check = checks.get(shard.block.name)
            if check is None:
                _split_shard(shard, units, split, kept=evaluated, forbidden=lambda _: None, is_heldout=lambda _: True)
            else:
                _split_shard(shard, units, split, kept=kept, forbidden=forbidden, is_heldout=check.is_heldout)
        for source, check in checks.items():
            # what an ancestor held out of this source is evaluated on too, in the ancestor's own set
            by_ancestors = split.accounts.dropped.get(source, Counter())["heldout_by_ancestor"]
            check.check(split.accounts.kept["heldout"][source] + by_ancestors, setting="data.holdout")
        split.accounts.check_any()
        counts = split.counts()
    return {"form": "text", "sources": [s.name for s in data.sources], "counts": counts}


def _split_shard(
    shard: Shard, units: Iterable[Unit], split: _Split, *, kept: SeenIds, forbidden: Callable[[str], str | None],
    is_heldout: Callable[[float], bool],
) -> None:  # fmt: skip
    source, accounts = shard.block.name, split.accounts
    for unit in units:
        accounts.read[source] += 1
        if unit.bad:
            accounts.set_aside(source, shard.path, unit)
        elif reason := _drop_reason(unit, kept, forbidden):
            accounts.drop(source, shard.path, unit, reason)
        else:
            split.keep("heldout" if is_heldout(fraction_of(unit.id)) else "train", source, unit)


def _drop_reason(unit: Unit, kept: SeenIds, forbidden: Callable[[str], str | None]) -> str | None:
    if unit.dropped == "empty":  # the second one is empty, too, before it is a duplicate
        return unit.dropped
    duplicate = None if kept.add(unit.id) else "duplicate"
    return duplicate or unit.dropped or forbidden(unit.id)


def source_rows(documents: Documents, data: TextData | TaskData) -> list[tuple[str, str, str, str]]:
    """(name, digest, path, context) of each source, for tracking.

    The digest is the sha256 over the sorted sha256s of the source's files, as the documents' identity has them.
    """
    if isinstance(data, TaskData):
        recorded = zip(data.tasks, documents.config["tasks"], strict=True)
        return [(t.name, _joint_digest(c["path"] + c["eval_path"]), t.path, "training") for t, c in recorded]
    rows = []
    for field, context in (("sources", "training"), ("eval_sources", "evaluation")):
        for source, config in zip(getattr(data, field), documents.config[field], strict=True):
            rows.append((source.name, _joint_digest(config["files"]), source.path, context))
    return rows


def _joint_digest(digests: list[str]) -> str:
    return digests[0] if len(digests) == 1 else sha256_text("".join(digests))
