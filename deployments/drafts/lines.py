"""What drafted recipes have in common: lines with a comment, YAML strings, names and paths, words for what was seen."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fmcore.data.look import RecordsLook, Sample, TextLook
from fmcore.errors import DataError

GENERIC_NAMES = re.compile(
    r"^(train|training|data|dataset|input|part|shard|all|index|documents)[-_.\d]*$", re.IGNORECASE
)
MAX_UPS = 2  # `..`s in a path that still reads as "near the recipe"
COMMENT_COLUMN = 44


@dataclass(frozen=True)
class Line:
    """A line of the recipe and what stands behind it. timed: it decides how long the training takes."""

    text: str
    comment: str = ""
    timed: bool = False

    def __str__(self) -> str:
        """Field and file names come from the data: a line break in one must not end a comment."""
        text, comment = (re.sub(r"[\x00-\x1f\x85\u2028\u2029]+", " ", part) for part in (self.text, self.comment))
        return f"{text:<{COMMENT_COLUMN}} # {comment}" if comment else text

    def foretold(self, seconds: float) -> "Line":
        """The line with the time that the plan of the recipe foretells, where it is the one that decides it."""
        return replace(self, comment=f"{self.comment}; {shown_time(seconds)} by the plan") if self.timed else self


def header(kind: str) -> list[Line]:
    """How each of them begins."""
    return [
        Line(f"# Written by `strata init {kind}` from a look at the data. Change what you like; then"),
        Line("#   strata plan FILE   what it will do and take"),
        Line("#   strata run FILE    interrupted, the same command resumes"),
        Line(f"kind: {kind}"),
    ]


def near(path: str, folder: Path) -> str:
    """The path as seen from the recipe's folder, where that is short; URLs and far paths as they are, absolute."""
    if "://" in path:
        return path
    whole = os.path.normpath(Path.cwd() / Path(path).expanduser())
    relative = os.path.relpath(whole, folder)
    ups = Path(relative).parts.count("..")
    reaches_root = len(folder.parts) - ups <= 1
    return whole if ups > MAX_UPS or (ups and reaches_root) else relative


def source_name(path: str, otherwise: str) -> str:
    """A name from a path: the file's, or its folder's where the file's says nothing (train.jsonl.gz)."""
    for part in reversed([p for p in re.split(r"[/\\]", path.split("?")[0]) if p and "*" not in p]):
        stem = re.sub(r"(\.(jsonl|ndjson|json|txt|md|rst|parquet|arrow|csv|gz|zst))+$", "", part, flags=re.IGNORECASE)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")
        if name and ":" not in part and not GENERIC_NAMES.match(name):
            return name
    return otherwise


def numbered(names: list[str]) -> Iterator[str]:
    """The names, with -2, -3, ... behind those that came before."""
    times: dict[str, int] = {}
    for name in names:
        times[name] = times.get(name, 0) + 1
        yield name if times[name] == 1 else f"{name}-{times[name]}"


def enough_held_out(holdout: float | None, look: TextLook | RecordsLook) -> float:
    """The holdout. Raises DataError where there is none for so few documents."""
    if holdout is None:
        raise DataError(
            f"--data {look.sample.data.path}: {len(look.places)} usable records or documents are too few: "
            f"10 have to be held out for evaluation and as many trained on. Give more data, or cut text smaller"
        )
    return holdout


def what_was_seen(sample: Sample) -> Iterator[str]:
    """What was looked at, for a comment."""
    files = f"{len(sample.data.files):,} files, " if len(sample.data.files) > 1 else ""
    what = "documents" if sample.data.format == "text" else "records"
    chars = sum(len(v) for row in sample.rows for v in row.values() if isinstance(v, str)) * sample.scale
    fields = f"; fields: {joined(sample.fields)}" if sample.data.format != "text" else ""
    about = "" if sample.exact else "about "
    yield f"{files}{about}{sample.num_records:,} {what}, {shown_size(chars)}{fields}"
    if sample.problems:
        yield f"{len(sample.problems):,} cannot be read, the first: {sample.problems[0]}"
    if sample.data.left_out:
        yield f"left out, no data by name or format: {joined(list(sample.data.left_out))}"


def joined(names: list[str], most: int = 8) -> str:
    """The first few names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shown_size(num_bytes: float) -> str:
    """A number of bytes for people."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.{0 if num_bytes >= 10 * unit else 1}f} {name}"
    return f"{num_bytes:.0f} bytes"


def shown_time(seconds: float) -> str:
    """About how long something takes, for people."""
    minutes = round(seconds / 60)
    if minutes >= 120:
        return f"about {minutes / 60:.0f} hours"
    return f"about {minutes} minute{'s' if minutes > 1 else ''}" if minutes else "less than a minute"


def scalar(value: str) -> str:
    """A string as YAML: as it is where that reads as the same string, else in double quotes."""
    plain = re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./@~-]*", value)
    special = value.lower() in ("true", "false", "null", "yes", "no", "on", "off", "~")
    number = re.fullmatch(r"[-+.\d][\d_.eE+-]*", value)
    return value if plain and not special and not number else json.dumps(value, ensure_ascii=False)
