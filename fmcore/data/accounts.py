"""What became of everything that was read: read = train + held out + dropped + quarantined, per source."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from fmcore.artifacts.types import Documents
from fmcore.data.places import origin
from fmcore.data.tables import DROPPED, QUARANTINE, TableWriter, read_rows
from fmcore.data.units import Shard, Unit, num_all_bad
from fmcore.errors import DataError

QUARANTINE_FILE = "quarantine.parquet"
SHOWN = 3  # places of bad input in a message
# what is wrong where all of a source is bad for the same reason; else the files are
MEND = {
    **dict.fromkeys(
        ("missing_field", "wrong_type"), "the recipe names another field than the files have, or the wrong files"
    ),
    **dict.fromkeys(
        ("broken_json", "not_an_object", "too_deep", "damaged_table", "not_text"),
        "the recipe's format is not that of the files, or they are damaged",
    ),
    "invalid_utf8": "convert the files to UTF-8",
}
# drops that say the input was usable: an ancestor or an evaluation had it before
HAD_BEFORE = ("seen", "heldout_by_ancestor", "in_eval_source", "in_eval_path")


class Accounts:
    """Counts what is read, and writes what is dropped or bad where it can be read back with its reason."""

    def __init__(self, folder: Path, shards: list[Shard], *, stop: bool) -> None:
        self._folder = folder
        self._shards = shards
        self._stop = stop
        self._dropped = TableWriter(folder / "dropped.parquet", DROPPED)
        self._quarantine: TableWriter | None = None
        self._first: list[str] = []
        self.read: Counter[str] = Counter()
        self.kept: dict[str, Counter[str]] = {"train": Counter(), "heldout": Counter()}
        self.dropped: dict[str, Counter[str]] = defaultdict(Counter)
        self.quarantined: dict[str, Counter[str]] = defaultdict(Counter)

    def drop(self, source: str, path: str, unit: Unit, reason: str) -> None:
        """A text or record that is left out for a reason."""
        content = f"{unit.text}\n{unit.response}" if unit.group else unit.text
        self._dropped.add(source=source, origin=origin(path, unit.line), reason=reason, content=content)
        self.dropped[source][reason] += 1

    def set_aside(self, source: str, path: str, unit: Unit) -> None:
        """What cannot be used; raises DataError where the recipe says so."""
        place = f"{origin(path, unit.line)}: {unit.detail}"
        if self._stop:
            raise DataError(f"{place.rstrip('.')}. {self._remedy(source, unit.bad)}")
        if len(self._first) < SHOWN:
            self._first.append(place)
        if self._quarantine is None:
            self._quarantine = TableWriter(self._folder / QUARANTINE_FILE, QUARANTINE)
        self._quarantine.add(
            source=source, file=path, line=unit.line, reason=unit.bad, detail=unit.detail, excerpt=unit.text
        )
        self.quarantined[source][unit.bad] += 1

    def _remedy(self, source: str, reason: str) -> str:
        """What to do about bad input: nothing is gained by setting aside what is wrong with all of a source."""
        num = num_all_bad([shard for shard in self._shards if shard.block.name == source], reason)
        if not num:
            return "Mend it, or set data.on_bad_input: quarantine to set such input aside and go on"
        alike = f"So is all that was looked at of {source} ({num})" if num > 1 else f"It is all of {source}"
        return f"{alike}, so that setting it aside would leave nothing: {MEND.get(reason, 'mend the files')}"

    def counts(self) -> dict[str, Any]:
        """{what: {source: number}}, and {what: {source: {reason: number}}} for dropped and quarantined."""
        counts: dict[str, Any] = {
            "read": dict(self.read),
            "train": dict(self.kept["train"]),
            "heldout": dict(self.kept["heldout"]),
            "dropped": {source: dict(sorted(reasons.items())) for source, reasons in self.dropped.items()},
            "quarantined": {source: dict(sorted(reasons.items())) for source, reasons in self.quarantined.items()},
        }
        for source in counts["read"]:
            read, *parts = _parts(counts, source)
            assert read == sum(parts), f"{source}: {read} read, {parts} accounted for"
        return counts

    def check_any(self) -> None:
        """Raise DataError where nothing was found that could be used, by this stage or an earlier one."""
        kept = sum(sum(side.values()) for side in self.kept.values())
        before = sum(reasons[reason] for reasons in self.dropped.values() for reason in HAD_BEFORE)
        if kept or before:
            return
        lines = "; ".join(account(self.counts())) or "there is nothing in them"
        first = f". First: {'; '.join(self._first)}" if self._first else ""
        raise DataError(f"the sources hold no documents that can be used: {lines}{first}")

    def __enter__(self) -> "Accounts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dropped.close()
        if self._quarantine:
            self._quarantine.close()


def _parts(counts: dict[str, Any], source: str) -> tuple[int, int, int, int, int]:
    dropped, quarantined = (sum(counts.get(what, {}).get(source, {}).values()) for what in ("dropped", "quarantined"))
    return (
        counts["read"][source], counts["train"].get(source, 0), counts["heldout"].get(source, 0), dropped, quarantined,
    )  # fmt: skip


def account(counts: dict[str, Any]) -> Iterator[str]:
    """One line per source: `plays: read 90 = 60 train + 20 held out + 10 dropped (duplicate 10) + 0 quarantined`."""
    for source in counts["read"]:
        read, train, heldout, dropped, quarantined = _parts(counts, source)
        yield (
            f"{source}: read {read:,} = {train:,} train + {heldout:,} held out + "
            f"{dropped:,} dropped{_reasons(counts, 'dropped', source)} + "
            f"{quarantined:,} quarantined{_reasons(counts, 'quarantined', source)}"
        )


def _reasons(counts: dict[str, Any], what: str, source: str) -> str:
    reasons = counts.get(what, {}).get(source, {})
    return f" ({', '.join(f'{reason} {number:,}' for reason, number in reasons.items())})" if reasons else ""


def quarantine_notes(documents: Documents) -> Iterator[str]:
    """Where the quarantined units of documents lie, and the first places; nothing where there are none."""
    path = documents.path / QUARANTINE_FILE
    if path.exists():
        yield f"set aside in {path}, among others:"
        for row in islice(read_rows(path), SHOWN):
            yield f"  {origin(row['file'], row['line'])}: {row['detail']}"
