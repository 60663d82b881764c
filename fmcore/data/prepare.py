"""The first arrow: raw data -> Documents.

Text is read, normalised, filtered, deduplicated by content and split by content hash; prompt/response
records likewise, split by group. With a parent, what its weights have seen and what any ancestor held out
is dropped. Whatever is dropped stays readable, with its reason, in `dropped.parquet`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fmcore.artifacts.ancestry import checkpoint_of, held_out_ids
from fmcore.artifacts.files import DigestCache, canonical_json, sha256_text
from fmcore.artifacts.step import Step
from fmcore.artifacts.store import Building, Fields, Store
from fmcore.artifacts.types import Checkpoint, Documents, RegisteredModel
from fmcore.data.dedup import SeenIds
from fmcore.data.files import files_by_digest
from fmcore.data.filters import drop_reason
from fmcore.data.holdout import HoldoutCheck, fraction_of
from fmcore.data.ledger import Ledger
from fmcore.data.normalize import content_id, normalize
from fmcore.data.reading import RawText, read_source
from fmcore.data.records import prepare_records, task_identity
from fmcore.data.tables import DOCUMENTS, DROPPED, TableWriter
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
    digests.save()
    return Step("documents", name, config, above, CODE_VERSION)


def _source_identity(source: Source, digests: DigestCache) -> dict[str, Any]:
    identity = source.model_dump(exclude={"path", "weight", "max_epochs"})  # those two belong to training
    return {**identity, "files": [digest for digest, _ in files_by_digest(source.path, source.name, digests)]}


def prepare_documents(step: Step, data: TextData | TaskData, parent: RegisteredModel | None, store: Store) -> Documents:
    """Build the documents of `step`. Raises DataError for what cannot be read or is too little."""

    def builder(building: Building) -> Fields:
        if isinstance(data, TextData):
            fields = _prepare_text(building.path, data, Ancestors(store, parent), store.digests)
        else:
            fields = prepare_records(building.path, data, store.digests)
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

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._writers: dict[tuple[str, str], TableWriter] = {}
        self._dropped = stack.enter_context(TableWriter(folder / "dropped.parquet", DROPPED))
        self.read: Counter[str] = Counter()
        self.kept: dict[str, Counter[str]] = {"train": Counter(), "heldout": Counter()}
        self.dropped: dict[str, Counter[str]] = defaultdict(Counter)
        self.bytes: dict[str, Counter[str]] = {"train": Counter(), "heldout": Counter()}

    def keep(self, side: str, source: str, document_id: str, content: str, metadata: dict[str, Any]) -> None:
        if (side, source) not in self._writers:
            writer = TableWriter(self._folder / side / f"{source}.parquet", DOCUMENTS)
            self._writers[side, source] = self._stack.enter_context(writer)
        self._writers[side, source].add(
            id=document_id, source=source, modality="text", content=content, metadata=canonical_json(metadata)
        )
        self.kept[side][source] += 1
        self.bytes[side][source] += len(content.encode())

    def drop(self, source: str, origin: str, reason: str, content: str) -> None:
        self._dropped.add(
            source=source, origin=origin, reason=reason, content=content.encode("utf-8", "replace").decode()
        )
        self.dropped[source][reason] += 1

    def counts(self) -> dict[str, Any]:
        return {
            "read": dict(self.read),
            "train": dict(self.kept["train"]),
            "heldout": dict(self.kept["heldout"]),
            "dropped": {source: dict(sorted(reasons.items())) for source, reasons in self.dropped.items()},
            "train_bytes": dict(self.bytes["train"]),
            "heldout_bytes": dict(self.bytes["heldout"]),
        }


def _prepare_text(folder: Path, data: TextData, ancestors: Ancestors, digests: DigestCache) -> Fields:
    with ExitStack() as stack:
        split = _Split(folder, stack)
        evaluated = stack.enter_context(SeenIds(folder / "evaluated.sqlite"))
        kept = stack.enter_context(SeenIds(folder / "kept.sqlite"))
        held_out = ancestors.held_out_ids()
        for source in data.eval_sources:
            rows = read_source(source, _paths(source, digests))
            _split_source(source.name, rows, data, split, kept=evaluated, forbidden=lambda _: None, holdout=1.0)

        def forbidden(document_id: str) -> str | None:
            if document_id in evaluated:
                return "in_eval_source"
            if document_id in held_out:
                return "heldout_by_ancestor"
            return "seen" if ancestors.has_seen(document_id) else None

        for source in data.sources:
            rows = read_source(source, _paths(source, digests))
            _split_source(source.name, rows, data, split, kept=kept, forbidden=forbidden, holdout=data.holdout)
        counts = split.counts()
    if not any(counts["read"].values()):
        raise DataError("the sources hold no documents: every file is empty")
    return {"form": "text", "sources": [s.name for s in data.sources], "counts": counts}


def _paths(source: Source, digests: DigestCache) -> list[Path]:
    return [path for _, path in files_by_digest(source.path, source.name, digests)]


def _split_source(
    source: str, rows: Iterable[RawText], data: TextData, split: _Split, *, kept: SeenIds,
    forbidden: Callable[[str], str | None], holdout: float,
) -> None:  # fmt: skip
    check = HoldoutCheck(f"source {source}", holdout)
    for raw in rows:
        split.read[source] += 1
        content = normalize(raw.text)
        document_id = content_id(content)
        duplicate = None if kept.add(document_id) else "duplicate"
        reason = duplicate or drop_reason(content, data.filters) or forbidden(document_id)
        if reason:
            split.drop(source, raw.origin, reason, content)
            continue
        side = "heldout" if check.is_heldout(fraction_of(document_id)) else "train"
        split.keep(side, source, document_id, content, raw.metadata)
    # what an ancestor held out of this source is evaluated on too, in the ancestor's own set
    by_ancestors = split.dropped[source]["heldout_by_ancestor"] if source in split.dropped else 0
    check.check(split.kept["heldout"][source] + by_ancestors, setting="data.holdout")


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
