"""One file of a source as cleaned units: what prepare does to a file without knowing of any other.

A pure function of the file and the source's settings, so that files can be read by many processes at once and
the result is the same for any number of them.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pyarrow as pa

from fmcore.artifacts.files import canonical_json
from fmcore.data.filters import drop_reason
from fmcore.data.normalize import content_id, encodable, normalize
from fmcore.data.places import Bad, excerpt, field_problem
from fmcore.data.reading import RawText, Record, read_records, read_texts
from fmcore.data.tables import TableWriter, read_rows
from fmcore.errors import DataError
from fmcore.process.pool import num_cores, run_in_processes
from fmcore.recipes.fields import Filters, Source, Task

SMALL_BYTES = 32 << 20  # so much is read sooner than a process has started
LOOKED_AT = 200  # units of a source, for whether what is wrong with one is wrong with all ...
MIN_LOOKED_AT = 20  # ... and of each of its files
WORK = "fmcore.data.units:write_part"


class Unit(NamedTuple):
    """One text or record, cleaned.

    bad: the code of why it cannot be used, with detail in words and text as excerpt. dropped: the filter that
    drops it. text: a document, or a record's prompt; response and group are a record's alone.
    """

    line: str
    bad: str = ""
    dropped: str = ""
    detail: str = ""
    id: str = ""
    text: str = ""
    response: str = ""
    group: str = ""
    metadata: str = "{}"


PARTS = pa.schema([(name, pa.string()) for name in Unit._fields])


class Shard(NamedTuple):
    """A file of a source, or a whole data set of format hf. size: bytes, None where it is not known."""

    block: Source | Task
    path: str
    size: int | None
    filters: Filters | None = None


def units(shard: Shard) -> Iterator[Unit]:
    """What a shard holds, in order."""
    if isinstance(shard.block, Source):
        assert shard.filters is not None
        yield from (_text_unit(raw, shard.filters) for raw in read_texts(shard.block, shard.path))
    else:
        task = shard.block
        required = [field for field in (task.prompt_field, task.response_field, task.group_field) if field]
        yield from (_record_unit(record, task) for record in read_records(task, shard.path, required))


def _bad_unit(bad: Bad) -> Unit:
    return Unit(bad.line, bad=bad.reason, detail=bad.detail, text=bad.excerpt)


def _text_unit(raw: RawText | Bad, filters: Filters) -> Unit:
    if isinstance(raw, Bad):
        return _bad_unit(raw)
    if "\x00" in raw.text:
        return _bad_unit(_nul_bytes(raw.line, raw.text))
    content = normalize(raw.text)
    dropped = drop_reason(content, filters) or ""
    return Unit(
        raw.line, dropped=dropped, id=content_id(content), text=_utf8(content), metadata=canonical_json(raw.metadata)
    )


def _nul_bytes(line: str, text: str) -> Bad:
    return Bad(line, "nul_bytes", "the text holds NUL bytes: no text, or UTF-16, to be converted first", excerpt(text))


def _utf8(text: str) -> str:
    return text if encodable(text) else text.encode("utf-8", "replace").decode()


def _record_unit(record: Record | Bad, task: Task) -> Unit:
    if isinstance(record, Bad):
        return _bad_unit(record)
    line, fields = record
    if not line:
        return Unit("", dropped="empty", id=content_id(""))
    parts: list[str] = []
    for setting in ("prompt_field", "response_field", "group_field"):
        found = _field(line, fields, getattr(task, setting), f"{setting} of task {task.name}", free="group" in setting)
        if isinstance(found, Bad):
            return _bad_unit(found)
        parts.append(found)
    prompt, response, group = parts
    extra = fields.get(task.input_field)
    if isinstance(extra, str) and extra.strip():
        prompt = f"{prompt}\n{normalize(extra)}"
    if "\x00" in prompt + response:
        return _bad_unit(_nul_bytes(line, f"{prompt}\n{response}"))
    dropped = _record_drop_reason(prompt, response)
    return Unit(
        line, dropped=dropped, id=content_id(f"{prompt}\x00{response}"), text=_utf8(prompt), response=_utf8(response),
        group=content_id(group if task.group_field else prompt),
    )  # fmt: skip


def _field(line: str, fields: dict[str, Any], name: str, setting: str, *, free: bool) -> str | Bad:
    """A field as text; free: of any type."""
    if not name:
        return ""
    found = fields.get(name)
    if free and name in fields:
        return str(found)
    if isinstance(found, float) and found - found != 0:  # NaN and the infinities are no answers
        return field_problem(line, name, fields, setting)
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        return str(found)
    return normalize(found) if isinstance(found, str) else field_problem(line, name, fields, setting)


def _record_drop_reason(prompt: str, response: str) -> str:
    if not prompt:
        return "empty_prompt"
    if not response:
        return "empty_response"
    return "" if encodable(prompt + response) else "not_unicode"


# ---- many shards


def num_all_bad(shards: list[Shard], reason: str) -> int:
    """How many units were looked at, where all at the start of these shards are bad for this reason; else 0."""
    each = max(MIN_LOOKED_AT, LOOKED_AT // len(shards))
    num = 0
    with suppress(DataError):  # of a file that cannot be opened, which is told when its turn comes
        for shard in shards[:LOOKED_AT]:
            for unit in islice(units(shard), each):
                if unit.bad != reason:
                    return 0
                num += 1
    return num


def choose_workers(shards: list[Shard], asked: int) -> int:
    """How many processes read these shards; 1 = none but this one."""
    if asked:
        return min(asked, len(shards))
    small = sum(shard.size or 0 for shard in shards) < SMALL_BYTES
    return 1 if small or len(shards) < 2 else min(num_cores(), len(shards))


@contextmanager
def reading_shards(
    shards: list[Shard], folder: Path, asked: int, *, stop: bool
) -> Iterator[Iterator[tuple[Shard, Iterator[Unit]]]]:
    """Each shard with its units, in order, read here or by several processes, which are gone at the end.

    folder: for what other processes have read, under names that are removed again. stop: nobody wants to know
    what follows a bad unit.
    """
    workers = choose_workers(shards, asked)
    if workers <= 1:
        yield ((shard, units(shard)) for shard in shards)
        return
    with TemporaryDirectory(dir=folder, prefix="parts-") as parts:
        jobs = [_job(shard, Path(parts, f"{number}.parquet"), stop=stop) for number, shard in enumerate(shards)]
        with closing(run_in_processes(WORK, jobs, workers)) as done:
            yield zip(shards, (_read_part(Path(part)) for part in done), strict=True)


def _read_part(path: Path) -> Iterator[Unit]:
    yield from (Unit(**row) for row in read_rows(path))
    path.unlink()


def _job(shard: Shard, part: Path, *, stop: bool) -> dict[str, Any]:
    return {
        "form": type(shard.block).__name__,
        "block": shard.block.model_dump(),
        "path": shard.path,
        "filters": shard.filters.model_dump() if shard.filters else None,
        "part": str(part),
        "stop": stop,
    }


def write_part(job: dict[str, Any]) -> str:
    """Read one shard into a table, in a process of its own; returns the table's path."""
    block = Source(**job["block"]) if job["form"] == "Source" else Task(**job["block"])
    filters = Filters(**job["filters"]) if job["filters"] else None
    with TableWriter(Path(job["part"]), PARTS) as part:
        for unit in units(Shard(block, job["path"], None, filters)):
            part.add(**unit._asdict())
            if unit.bad and job["stop"]:
                break
    return str(job["part"])
