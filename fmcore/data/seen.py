"""Whose weights have seen a document: asked of the ledgers, and where they say no, of what became of it instead.

A document is known by the id of its normalised content, so a file is read the way its source was: cut into
the pieces that the source's settings give, or record by record.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fmcore.artifacts.ancestry import checkpoint_of, lineage
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Documents, RegisteredModel
from fmcore.data.detect import format_of
from fmcore.data.files import SourceFile, open_bytes
from fmcore.data.ledger import Ledger
from fmcore.data.look import pair_of, rows_of_file
from fmcore.data.normalize import content_id, normalize
from fmcore.data.places import Bad, origin
from fmcore.data.tables import read_rows
from fmcore.data.unpacking import BrokenFile
from fmcore.errors import DataError, IntegrityError

SEEN, HELD_OUT, UNSAMPLED, ABSENT = "seen", "held out", "prepared, never sampled", "not in its data"
IMPORTED = "imported"  # the stage of a model whose history is not known


@dataclass(frozen=True)
class Asked:
    """A document that is asked about. dropped_id: under which it would stand among what was dropped."""

    origin: str
    id: str
    dropped_id: str


@dataclass(frozen=True)
class Reading:
    """One way to read a file as documents. how: in words."""

    how: str
    documents: tuple[Asked, ...]


@dataclass(frozen=True)
class Settings:
    """How the sources of the known models are read: fields of text, ways of cutting, fields of records."""

    text_fields: tuple[str, ...] = ("text",)
    splits: tuple[str, ...] = ("file",)
    records: tuple[tuple[str, str, str], ...] = (("prompt", "response", "input"),)


@dataclass(frozen=True)
class Answer:
    """Of one version: how many of the documents have which fate, in the reading that fits best.

    unknown_before: the imported ancestor (or the version itself) whose own history nobody here knows.
    """

    version: str
    verdict: str
    how: str
    fates: dict[str, int]
    unknown_before: str

    @property
    def num_seen(self) -> int:
        """Documents whose tokens entered a training step of these weights or of what they came from."""
        return self.fates.get(SEEN, 0)

    @property
    def num_documents(self) -> int:
        """Documents asked about."""
        return sum(self.fates.values())


def known_settings(documents: Iterable[Documents]) -> Settings:
    """The settings that the sources of these artifacts were read with, after the usual ones."""
    fields, splits, records = (dict.fromkeys(values) for values in vars(Settings()).values())
    for artifact in documents:
        for source in [*artifact.config.get("sources", []), *artifact.config.get("eval_sources", [])]:
            fields |= {source.get("text_field", "text"): None}
            splits |= {source.get("split_on", "file"): None}
        for task in artifact.config.get("tasks", []):
            records |= {(task["prompt_field"], task["response_field"], task["input_field"]): None}
    return Settings(tuple(fields), tuple(splits), tuple(records))


def read_text(text: str) -> list[Reading]:
    """A literal text as one document."""
    return [Reading("as one document", (_asked("text", text),))]


def read_file(file: SourceFile, settings: Settings) -> list[Reading]:
    """All the ways in which a file may have been read as documents. Raises DataError for a file that cannot be read."""
    format = format_of(file)
    if format == "binary":
        raise DataError(f"{file} holds no text")
    if format == "text":
        found = [_as_whole(file), *(_as_text(file, split) for split in settings.splits)]
    else:
        rows = list(enumerate(_readable(file, rows_of_file(str(file), format)), 1))
        found = [_as_field(file, rows, field) for field in settings.text_fields]
        found += [_as_records(file, rows, fields) for fields in settings.records]
    unlike = {tuple(document.id for document in reading.documents): reading for reading in reversed(found)}
    readings = [reading for reading in reversed(unlike.values()) if reading.documents]
    if not readings:
        fields = ", ".join(settings.text_fields)
        raise DataError(f"{file}: no record has a field that a known source takes ({fields}) or a task's two")
    return readings


def _readable(file: SourceFile, rows: Iterable[dict[str, Any] | Bad]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if isinstance(row, Bad):
            raise DataError(f"{origin(str(file), row.line)}: {row.detail}")
        yield row


def _as_whole(file: SourceFile) -> Reading:
    try:
        with open_bytes(file) as opened:
            return Reading("as one document", (_asked(str(file), b"".join(opened).decode()),))
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason})") from error
    except BrokenFile as error:
        raise DataError(f"{file}: {error.detail}") from error


def _as_text(file: SourceFile, split_on: str) -> Reading:
    rows = enumerate(_readable(file, rows_of_file(str(file), "text", split_on=split_on)), 1)
    return Reading(f"split_on: {split_on}", tuple(_asked(f"{file}, piece {n}", row["text"]) for n, row in rows))


def _as_field(file: SourceFile, rows: list[tuple[int, dict[str, Any]]], field: str) -> Reading:
    texts = [(n, row[field]) for n, row in rows if isinstance(row.get(field), str)]
    return Reading(f"text_field: {field}", tuple(_asked(f"{file}, record {n}", text) for n, text in texts))


def _as_records(file: SourceFile, rows: list[tuple[int, dict[str, Any]]], fields: tuple[str, str, str]) -> Reading:
    pairs = [(n, pair_of(row, *fields)) for n, row in rows]
    asked = (
        Asked(f"{file}, record {n}", content_id(f"{pair[0]}\x00{pair[1]}"), content_id(f"{pair[0]}\n{pair[1]}"))
        for n, pair in pairs
        if pair
    )
    return Reading(f"records: {fields[0]}, {fields[1]}", tuple(asked))


def _asked(origin: str, text: str) -> Asked:
    document_id = content_id(normalize(text))
    return Asked(origin, document_id, document_id)


class Witness:
    """Answers for one registered version. What is asked about is told at once, so that tables are read once."""

    def __init__(self, store: Store, model: RegisteredModel, fates: "Fates") -> None:
        self._store = store
        self._model = model
        self._fates = fates
        self._line = list(lineage(store, model))

    def answer(self, readings: list[Reading]) -> Answer:
        """How many documents were seen, in the reading of which most are known."""
        counted = [(reading, Counter(self._fate(document) for document in reading.documents)) for reading in readings]
        reading, fates = max(counted, key=lambda item: (item[1][SEEN], -item[1][ABSENT]))
        unknown = [model.uri for model in self._line if model.stage == IMPORTED]
        return Answer(self._model.uri, self._model.verdict, reading.how, dict(fates), unknown[0] if unknown else "")

    def _fate(self, document: Asked) -> str:
        if document.id in self._ledger:
            return SEEN
        told = [(model, self._fates.of(model)) for model in self._line if "documents" in model.parents]
        for model, fates in told:
            if document.id in fates.held_out:
                return HELD_OUT if model is self._model else f"{HELD_OUT} by {model.uri}"
        if any(document.id in fates.prepared for _, fates in told):
            return UNSAMPLED
        dropped = [fates.dropped[document.dropped_id] for _, fates in told if document.dropped_id in fates.dropped]
        return f"dropped: {dropped[0]}" if dropped else ABSENT

    @cached_property
    def _ledger(self) -> Ledger:
        checkpoint = checkpoint_of(self._store, self._model)
        path = checkpoint.ledger("final")
        for problem in self._store.problems(checkpoint.path, only=path.relative_to(checkpoint.path).as_posix()):
            raise IntegrityError(problem)
        return Ledger(path)


@dataclass(frozen=True)
class _Known:
    held_out: set[str]
    prepared: set[str]
    dropped: dict[str, str]


class Fates:
    """What became of the documents asked about in each Documents artifact; every artifact is read once."""

    def __init__(self, store: Store, readings: Iterable[Reading]) -> None:
        asked = [document for reading in readings for document in reading.documents]
        self._store = store
        self._ids = pa.array(sorted({document.id for document in asked}), pa.string())
        self._dropped_ids = {document.dropped_id for document in asked}
        self._known: dict[str, _Known] = {}

    def of(self, model: RegisteredModel) -> _Known:
        """What the version's own documents say."""
        fingerprint = model.parents["documents"]
        if fingerprint not in self._known:
            folder = self._store.get(fingerprint, Documents).path
            self._known[fingerprint] = _Known(
                self._among(folder / "heldout"), self._among(folder / "train"), self._dropped(folder)
            )
        return self._known[fingerprint]

    def _among(self, folder: Path) -> set[str]:
        found: set[str] = set()
        for path in sorted(folder.glob("*.parquet")):
            ids = pq.read_table(path, columns=["id"])["id"]
            found.update(ids.filter(pc.is_in(ids, value_set=self._ids)).to_pylist())
        return found

    def _dropped(self, folder: Path) -> dict[str, str]:
        rows = ((content_id(row["content"]), row["reason"]) for row in _dropped_rows(folder / "dropped.parquet"))
        return {document_id: reason for document_id, reason in rows if document_id in self._dropped_ids}


def _dropped_rows(path: Path) -> Iterator[dict[str, Any]]:
    return read_rows(path, ["content", "reason"]) if path.exists() else iter(())
