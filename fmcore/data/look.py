"""Looks at data that has no recipe yet: which fields, how much, and what would be held out.

Reads at most SAMPLE_CHARS of text per path, through the readers that a run uses, so that what is said of a
document here (its id, the side it falls on, whether a filter drops it) is what a run will find.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fmcore.data.detect import DataFiles, about_chars, data_files
from fmcore.data.filters import drop_reason
from fmcore.data.holdout import fraction_of, group_fraction
from fmcore.data.normalize import content_id, normalize
from fmcore.data.places import Bad, origin
from fmcore.data.reading import read_records, read_texts
from fmcore.data.sources import names_of
from fmcore.errors import DataError
from fmcore.recipes.fields import Filters, Source

SAMPLE_CHARS = 64_000_000
EXAMPLES = 200

TEXT_FIELDS = ("text", "content", "body", "document", "article", "markdown")
PAIRS = (
    ("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response"),
    ("question", "answer"), ("query", "response"), ("query", "answer"), ("input", "output"), ("source", "target"),
    ("path", "text"),
)  # fmt: skip
GROUP_FIELDS = ("doc", "doc_id", "document_id", "group", "group_id", "article_id", "thread_id", "conversation_id")
CHAT_FIELDS = ("messages", "conversations")
MAX_CLASSES = 20
MOST_BAD = 0.1  # unreadable records for each readable one; with more, something is wrong
USUAL_SHARE = 0.9  # of the records have to have a field for it to be chosen


@dataclass(frozen=True)
class Sample:
    """Records (or documents, under the field `text`) read from the start of the files.

    exact: everything was read. scale: how many times as much there is. problems: what could not be read, and where.
    """

    data: DataFiles
    rows: list[dict[str, Any]]
    exact: bool
    scale: float
    problems: list[str]

    @property
    def num_records(self) -> int:
        """Records in all of the files, about where not `exact`."""
        return round(len(self.rows) * self.scale)

    @property
    def fields(self) -> list[str]:
        """The names of the fields, in the order in which they are met."""
        return list(dict.fromkeys(str(name) for row in self.rows for name in row))


@dataclass(frozen=True)
class TextLook:
    """Documents for training on text. places: where each kept one falls in [0, 1), for the choice of a holdout.

    num_bytes: UTF-8 bytes of the kept documents in all of the files; missing: records without the field.
    """

    sample: Sample
    text_field: str
    split_on: str
    places: list[float]
    num_bytes: int
    dropped: dict[str, int]
    missing: int


@dataclass(frozen=True)
class RecordsLook:
    """Prompt/response records. places: by group, of each kept record; chars: length of prompt and response together.

    examples: a few of the pairs, from all over the sample.
    """

    sample: Sample
    prompt_field: str
    response_field: str
    input_field: str
    group_field: str
    places: list[float]
    chars: list[int]
    examples: list[tuple[str, str]]
    num_classes: int
    repeated_prompts: int
    duplicates: int
    missing: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all prompts and responses, about."""
        return round(sum(self.chars) * self.sample.scale)


def read_sample(data: DataFiles, *, split_on: str = "file") -> Sample:
    """Records from the start of each of the files until SAMPLE_CHARS are read.

    Raises DataError for files that hold nothing, or too much that cannot be read.
    """
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    chars = 0
    exact = True
    for path in [data.path] if data.format == "hf" else map(str, data.files):
        for row in rows_of_file(path, data.format, split_on=split_on, split=data.split):
            if isinstance(row, Bad):
                problems.append(f"{origin(path, row.line)}: {row.detail}")
                continue
            rows.append(row)
            chars += sum(len(value) for value in row.values() if isinstance(value, str))
            exact = chars < SAMPLE_CHARS
            if not exact:
                break
        if not exact:
            break
    if problems and len(problems) > MOST_BAD * len(rows):
        raise DataError(f"--data {data.path}: {problems[0]}")
    if not rows:
        raise DataError(f"--data {data.path}: there is nothing in it: {names_of(list(data.files))}")
    return Sample(data, rows, exact, 1.0 if exact else max(1.0, about_chars(data.files) / chars), problems)


def rows_of_file(path: str, format: str, *, split_on: str = "file", split: str = "") -> Iterator[dict[str, Any] | Bad]:
    """Records of a file (of a whole data set, for hf), or the documents of a text file under `text`.

    What cannot be read is yielded as Bad, in its place. Raises DataError for a file that cannot be opened.
    """
    fields = {"split_on": split_on, **({"split": split} if split else {})}
    block = Source(name="data", path=path, format=format, **fields)
    if format == "text":
        for found in read_texts(block, path):
            yield found if isinstance(found, Bad) else {"text": found.text}
        return
    for record in read_records(block, path, []):
        if isinstance(record, Bad):
            yield record
        elif record.fields:  # else an empty file
            yield record.fields


def look_at_text(path: str) -> TextLook:
    """What a pretraining would find behind a path. Raises DataError where there is no field with text."""
    data = data_files(path)
    if data.format != "text":
        sample = read_sample(data)
        return _text_look(sample, text_field_of(sample), "file")
    looks = []
    for split_on in ("file", "blank_line", "line"):
        look = _text_look(read_sample(data, split_on=split_on), "text", split_on)
        if len(look.places) >= 40:
            return look
        looks.append(look)
    return max(looks, key=lambda look: len(look.places))


def _text_look(sample: Sample, field: str, split_on: str) -> TextLook:
    filters, ids, places = Filters(), set(), []
    dropped: Counter[str] = Counter()
    num_bytes = missing = 0
    for row in sample.rows:
        if not isinstance(row.get(field), str):
            missing += 1
            continue
        content = normalize(row[field])
        document_id = content_id(content)
        reason = "duplicate" if document_id in ids else drop_reason(content, filters)
        ids.add(document_id)
        if reason:
            dropped[reason] += 1
            continue
        places.append(fraction_of(document_id))
        num_bytes += len(content.encode())
    return TextLook(sample, field, split_on, places, round(num_bytes * sample.scale), dict(dropped), missing)


def text_field_of(sample: Sample) -> str:
    """The field that holds the text: by its name, else the one with the longest strings."""
    lengths = _mean_chars(sample)
    if not lengths:
        why = _chat_hint(sample) or "no field holds text"
        raise DataError(f"--data {sample.data.path}: {why}; fields: {_listed(sample)}")
    return next((name for name in TEXT_FIELDS if name in lengths), max(lengths, key=lambda name: lengths[name]))


def _mean_chars(sample: Sample) -> dict[str, float]:
    """Field -> mean length, of the fields that are strings in most records and empty in few."""
    found = {}
    for field in sample.fields:
        texts = [row[field] for row in sample.rows if isinstance(row.get(field), str) and row[field].strip()]
        if len(texts) >= USUAL_SHARE * len(sample.rows):
            found[field] = sum(map(len, texts)) / len(texts)
    return found


def look_at_records(data: DataFiles) -> RecordsLook:
    """What a fine-tuning would find in prompt/response records. Raises DataError where there are none."""
    if data.format == "text":
        raise DataError(
            f"--data {data.path}: fine-tuning takes records with a prompt and a response (JSON, Parquet or datasets); "
            f"this is plain text, which `strata init pretrain` takes"
        )
    sample = read_sample(data)
    prompt, response = record_fields(sample)
    extra = "input" if "input" in sample.fields and "input" not in (prompt, response) else ""
    group = _group_field(sample, {prompt, response, extra})
    ids: set[str] = set()
    prompts: set[str] = set()
    responses: Counter[str] = Counter()
    places, chars, pairs = [], [], []
    missing = duplicates = repeated = 0
    for row in sample.rows:
        pair = pair_of(row, prompt, response, extra)
        if pair is None:
            missing += 1
            continue
        record_id = content_id("\x00".join(pair))
        if record_id in ids:
            duplicates += 1
            continue
        ids.add(record_id)
        repeated += pair[0] in prompts
        prompts.add(pair[0])
        responses[pair[1]] += 1
        places.append(group_fraction(str(row.get(group)) if group else pair[0]))
        chars.append(len(pair[0]) + len(pair[1]))
        pairs.append(pair)
    few = 2 <= len(responses) <= MAX_CLASSES and len(sample.rows) >= 5 * len(responses)
    return RecordsLook(
        sample, prompt, response, extra, group, places, chars, pairs[:: max(1, len(pairs) // EXAMPLES)],
        len(responses) if few else 0, repeated, duplicates,
        missing,
    )  # fmt: skip


def record_fields(sample: Sample) -> tuple[str, str]:
    """(prompt, response): a known pair of names; else text and its class; else two strings, the shorter first."""
    usable = {f for f in sample.fields if _is_usable(sample, f)}
    for pair in PAIRS:
        if usable.issuperset(pair):
            return pair
    lengths = _mean_chars(sample)
    classes = [f for f in sorted(usable) if 2 <= len({str(row.get(f)) for row in sample.rows}) <= MAX_CLASSES]
    texts = [f for f in lengths if f not in classes]
    if len(classes) == 1 and texts and len(sample.rows) >= 5 * MAX_CLASSES:
        return max(texts, key=lambda f: lengths[f]), classes[0]
    if len(lengths) == 2:
        shorter, longer = sorted(lengths, key=lambda f: lengths[f])
        return shorter, longer
    if hint := _chat_hint(sample):
        raise DataError(f"--data {sample.data.path}: {hint}; fields: {_listed(sample)}")
    raise DataError(
        f"--data {sample.data.path}: which field is the prompt, which the response? Fields: {_listed(sample)}; known "
        f"pairs: {', '.join('/'.join(pair) for pair in PAIRS)}. Write prompt_field and response_field into a recipe "
        f"by hand"
    )


def _is_usable(sample: Sample, field: str) -> bool:
    found = sum(_is_text(row.get(field)) and str(row[field]).strip() != "" for row in sample.rows)
    return found >= USUAL_SHARE * len(sample.rows)


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _group_field(sample: Sample, taken: set[str]) -> str:
    """A field of a telling name that several records share."""
    for field in GROUP_FIELDS:
        if field in sample.fields and field not in taken and all(field in row for row in sample.rows):
            values = {str(row[field]) for row in sample.rows}
            if 2 * 10 <= len(values) <= USUAL_SHARE * len(sample.rows):
                return field
    return ""


def pair_of(row: dict[str, Any], prompt: str, response: str, extra: str) -> tuple[str, str] | None:
    """A record's prompt and response as prepare makes them, or None where one is missing or empty."""
    texts = [normalize(str(row[field])) if _is_text(row.get(field)) else "" for field in (prompt, response)]
    if not all(texts):
        return None
    more = row.get(extra)
    joined = f"{texts[0]}\n{normalize(more)}" if isinstance(more, str) and more.strip() else texts[0]
    return joined, texts[1]


def _listed(sample: Sample) -> str:
    return ", ".join(sample.fields) or "none"


def _chat_hint(sample: Sample) -> str:
    chat = [field for field in CHAT_FIELDS if field in sample.fields]
    return f"chat records ({chat[0]}) are not supported: turn each into a prompt and a response" if chat else ""
