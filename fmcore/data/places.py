"""Bad input: what cannot be used of a source, where it is, and why."""

import json
import math
from typing import Any, NamedTuple

from fmcore.data.normalize import encodable

MAX_UNIT_BYTES = 16 << 20  # the longest line, record or document that is read into memory
EXCERPT_CHARS = 200
METADATA_CHARS = 200  # a longer field is content of its own, not metadata


class Bad(NamedTuple):
    """One unit that cannot be used: a line, a record, a document, or the rest of a file.

    line: `12`, `[3]` (of a list), `row 7` (of a table), `byte 9000`; empty = the file as a whole.
    reason: a code, counted; detail: the reason in words, with the remedy; excerpt: how it begins.
    """

    line: str
    reason: str
    detail: str
    excerpt: str


def origin(path: str, line: str) -> str:
    """A place as people write it: `file:12`, `file[3]`, `file, row 7`."""
    if not line:
        return path
    return f"{path}:{line}" if line.isdigit() else f"{path}{line}" if line.startswith("[") else f"{path}, {line}"


def excerpt(text: str, chars: int = EXCERPT_CHARS) -> str:
    """How a text begins, in UTF-8 whatever it holds."""
    cut = text if len(text) <= chars else text[: chars - 3] + "..."
    return cut.encode("utf-8", "replace").decode()


def field_problem(line: str, field: str, fields: dict[str, Any], setting: str) -> Bad:
    """Why a record's field cannot be used, and which fields there are."""
    there = excerpt(", ".join(map(str, fields)) or "none", 300)
    if field not in fields:
        found = f"field {field!r} is missing"
        return Bad(line, "missing_field", f"{found}; fields here: {there}. Set {setting}", shortened(fields))
    found = f"field {field!r} holds {shortened(fields[field], 60)}, expected text"
    return Bad(line, "wrong_type", f"{found}; fields here: {there}. Set {setting}", shortened(fields))


def shortened(value: Any, chars: int = EXCERPT_CHARS) -> str:
    """A JSON value in a few characters."""
    try:
        return excerpt(json.dumps(value, ensure_ascii=False, default=str), chars)
    except RecursionError:
        return "a deeply nested value"


def is_small(value: Any) -> bool:
    """Whether a field's name or value can be metadata."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return len(value) <= METADATA_CHARS and encodable(value)
    return value is None or isinstance(value, (bool, int))
