"""The text of a recipe for data that was looked at: each line's comment says what was seen or where a size is from."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fmcore.artifacts.store import Store
from fmcore.artifacts.types import ACCEPTED, RegisteredModel
from fmcore.data.detect import DataFiles, data_files
from fmcore.data.files import SourceFile
from fmcore.data.look import RecordsLook, Sample, TextLook, look_at_records, look_at_text
from fmcore.errors import DataError, UserInputError
from fmcore.model.presets import PRESETS, estimate_parameters
from fmcore.planning.cost import BYTES_PER_TOKEN
from fmcore.planning.shape import Shape, folder_shape, parent_shape
from fmcore.planning.sizes import BUDGET_S, batch_for, holdout_for, pretrain_sizes, rounded, usual_rate
from fmcore.recipes.fields import Task
from fmcore.recipes.parents import Folder, parse_parent

GENERIC_NAMES = re.compile(
    r"^(train|training|data|dataset|input|part|shard|all|index|documents)[-_.\d]*$", re.IGNORECASE
)
EVAL_NAMES = ("test", "eval", "validation", "valid", "dev", "val")
MAX_TASKS = 60
MAX_UPS = 2  # `..`s in a path that still reads as "near the recipe"
TEMPLATE_TOKENS = 12  # that the chat template adds to a record
GENERATED_TOKENS = 20_000  # in evaluating free answers, as many as in a few minutes on two cores
MIN_SCORED = 20  # what the gate needs to decide (gate.min_documents)
TEMPLATE_MARKS = 8  # those of them that are no words
FITTING_SHARE = 0.9  # of the records that should fit into seq_len
MAX_STRETCH = 4  # times the parent's context that records may take up
DEFAULT_HOLDOUT = {"text": 0.02, "records": 0.1}
COMMENT_COLUMN = 44
MINUTES = f"meant for {BUDGET_S / 60:.0f} minutes at the most"
TINY = estimate_parameters(PRESETS["tiny"], 4096)


@dataclass(frozen=True)
class Line:
    """A line of the recipe and what stands behind it."""

    text: str
    comment: str = ""

    def __str__(self) -> str:
        """Field and file names come from the data: a line break in one must not end a comment."""
        text, comment = (re.sub(r"[\x00-\x1f\x85\u2028\u2029]+", " ", part) for part in (self.text, self.comment))
        return f"{text:<{COMMENT_COLUMN}} # {comment}" if comment else text


class Draft:
    """Writes recipes for one folder: paths are written as seen from there."""

    def __init__(self, folder: Path, store: Store) -> None:
        self._folder = folder
        self._store = store

    def text(self, kind: str, name: str, paths: list[str], parent: str) -> list[Line]:
        """A pretrain recipe, or with a parent a continue-pretrain one. Raises DataError for unusable data."""
        looks = [look_at_text(path) for path in paths]
        for look in looks:
            if not look.places:
                raise DataError(f"--data {look.sample.data.path}: no document is left; dropped: {look.dropped}")
        fractions = [holdout_for(look.places, look.sample.scale, DEFAULT_HOLDOUT["text"]) for look in looks]
        holdout = max(_enough(fraction, look) for fraction, look in zip(fractions, looks, strict=True))
        sources = list(_numbered([source_name(look.sample.data.path, name) for look in looks]))
        lines = [
            *_header(kind),
            Line(f"name: {name}"),
            *([Line(f"parent: {_scalar(parent)}", "its next version is made")] if parent else []),
            Line("data:"),
            Line("  sources:"),
        ]
        for source, look in zip(sources, looks, strict=True):
            lines += self._source(source, look)
        num = sum(sum(place < holdout for place in look.places) * look.sample.scale for look in looks)
        lines.append(Line(f"  holdout: {holdout:g}", f"of the documents, by content: {_about(looks)}{num:,.0f} here"))
        if any(look.missing or look.sample.problems for look in looks):
            lines.append(Line("  on_bad_input: quarantine", "what has no text is set aside, not fatal"))
        num_bytes = sum(look.num_bytes for look in looks)
        return [*lines, *(self._continue_sizes(num_bytes) if parent else self._pretrain_sizes(name, num_bytes))]

    def _source(self, name: str, look: TextLook) -> Iterator[Line]:
        sample = look.sample
        for line in _seen(sample):
            yield Line(f"    # {line}")
        if look.dropped:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(look.dropped.items()))
            yield Line(f"    # {len(look.places):,} are kept; dropped will be: {reasons}")
        if look.missing:
            yield Line(f"    # {look.missing:,} have no text in {look.text_field}")
        yield Line(f"    - name: {name}")
        yield Line(f"      path: {_scalar(self._near(sample.data.path))}")
        if sample.data.format == "text":
            comment = {"file": "a long file is cut at blank lines", "blank_line": "", "line": "a line, a document"}
            yield Line("      format: text")
            yield Line(f"      split_on: {look.split_on}", comment[look.split_on])
            return
        yield Line(f"      format: {sample.data.format}")
        if sample.data.split:
            yield Line(f"      split: {sample.data.split}")
        others = [field for field in sample.fields if field != look.text_field]
        yield Line(f"      text_field: {_scalar(look.text_field)}", f"of {look.text_field}, {_joined(others)}")

    def _pretrain_sizes(self, name: str, num_bytes: int) -> Iterator[Line]:
        sizes = pretrain_sizes(num_bytes, usual_rate(TINY, self._store))
        yield Line(f"tokenizer: {{vocab_size: {sizes.vocab_size}}}", f"for {_size(num_bytes)} of text")
        yield Line(f"model: {{preset: {sizes.preset}}}", "tiny | small | 125m | 1b")
        yield Line("train:")
        yield Line(f"  tokens: {sizes.tokens:_}", f"{sizes.epochs:.2g} epochs; {MINUTES}")
        yield Line(f"  seq_len: {sizes.seq_len}", "context, in tokens")
        yield Line(f"  batch_tokens: {sizes.batch_tokens}", f"{sizes.tokens // sizes.batch_tokens:,} steps")
        yield Line(f"  lr: {sizes.lr:g}")
        yield Line(f"register: {{model: {name}}}")

    def _continue_sizes(self, num_bytes: int) -> Iterator[Line]:
        yield Line("replay: {fraction: 0.05}", "share of the samples from what the parent has seen")
        tokens = num_bytes / BYTES_PER_TOKEN
        affordable = rounded(BUDGET_S * usual_rate(TINY, self._store) / (6 * TINY))
        if tokens <= affordable:
            yield Line("train: {epochs: 1}", f"{_size(num_bytes)}, about {rounded(tokens):,} tokens, if all is new")
        else:
            yield Line(f"train: {{tokens: {affordable:_}}}", f"of about {rounded(tokens):,}; what is left stays new")
        yield Line("gate: {max_regression_bpb: 0.01}", "tolerated loss on old data, in bits per byte")

    def finetune(self, name: str, paths: list[str], parent: str) -> list[Line]:
        """A finetune recipe, a task per file or glob. Raises DataError for unusable data."""
        tasks, left_out = self._tasks(paths, name)
        shape = self._parent_shape(parent)
        lines = [
            *_header("finetune"),
            Line(f"name: {name}", "registered as <parent>-" + name),
            Line(f"parent: {_scalar(parent)}", _context(shape)),
            Line("data:"),
            *(Line(f"  # left out: {line}") for line in left_out),
            Line("  tasks:"),
        ]
        for task, look, eval_path in tasks:
            lines += self._task(task, look, eval_path)
        looks = [look for _, look, _ in tasks]
        if any(look.missing or look.sample.problems for look in looks):
            lines.append(Line("  on_bad_input: quarantine", "records without prompt or response are set aside"))
        return [*lines, *self._finetune_sizes(looks, shape)]

    def _tasks(self, paths: list[str], name: str) -> tuple[list[tuple[str, RecordsLook, str]], list[str]]:
        """(name, what was seen, eval_path) of each task, and what of a folder cannot be used, with the reason."""
        parts = [part for path in paths for part in _one_per_task(data_files(path))]
        if len(parts) > MAX_TASKS:
            raise UserInputError(f"--data: {len(parts)} files would be {len(parts)} tasks; give them by several globs")
        alone = len(parts) == len(paths)
        looks: list[tuple[str, RecordsLook, str]] = []
        left_out: list[str] = []
        names = _numbered([source_name(part.path, name) for part, _ in parts])
        for task, (part, eval_path) in zip(names, parts, strict=True):
            try:
                look = look_at_records(part)
                _enough(_task_holdout(look), look)
                looks.append((task, look, eval_path))
            except DataError as error:
                if alone:
                    raise
                left_out.append(f"{Path(part.path).name}: {_first_sentence(str(error))}")
        if not looks:
            raise DataError(f"--data: none of the files holds records with prompt and response: {'; '.join(left_out)}")
        return looks, left_out

    def _task(self, name: str, look: RecordsLook, eval_path: str) -> Iterator[Line]:
        sample = look.sample
        for line in _seen(sample):
            yield Line(f"    # {line}")
        noticed = [
            *([f"{look.num_classes} classes, scored by likelihood"] if look.num_classes else []),
            *([f"{look.duplicates:,} duplicates will be dropped"] if look.duplicates else []),
            *(
                [f"{look.repeated_prompts:,} prompts occur again, with other responses"]
                if look.repeated_prompts
                else []
            ),
            *([f"{look.missing:,} lack a prompt or response"] if look.missing else []),
        ]
        if noticed:
            yield Line(f"    # {'; '.join(noticed)}")
        yield Line(f"    - name: {name}")
        yield Line(f"      path: {_scalar(self._near(sample.data.path))}")
        yield Line(f"      format: {sample.data.format}")
        if sample.data.split:
            yield Line(f"      split: {sample.data.split}")
        yield Line(f"      prompt_field: {_scalar(look.prompt_field)}")
        yield Line(f"      response_field: {_scalar(look.response_field)}")
        if look.input_field:
            yield Line(f"      input_field: {look.input_field}", "appended to the prompt where it is not empty")
        elif Task.model_fields["input_field"].default in (look.prompt_field, look.response_field):
            yield Line('      input_field: ""', "nothing is appended to the prompt")
        if look.group_field:
            yield Line(f"      group_field: {look.group_field}", "records of one stay on one side of the split")
        if eval_path:
            yield Line(f"      eval_path: {_scalar(self._near(eval_path))}", "evaluated on, never trained on")
        else:
            holdout = _enough(_task_holdout(look), look)
            num = sum(place < holdout for place in look.places) * sample.scale
            yield Line(f"      holdout: {holdout:g}", f"{'' if sample.exact else 'about '}{num:,.0f} records")

    def _finetune_sizes(self, looks: list[RecordsLook], shape: Shape | None) -> Iterator[Line]:
        per_token, template = _token_sizes(looks, shape)
        lengths = sorted(chars / per_token + template for look in looks for chars in look.chars)
        tokens = sum(look.num_bytes / per_token + look.sample.num_records * template for look in looks)
        wanted = [_long_enough(sorted(chars / per_token + template for chars in look.chars)) for look in looks]
        seq_len = _record_length(max(wanted), shape)
        longest = seq_len or (shape.seq_len if shape else lengths[-1])
        fitting = sum(length <= longest for length in lengths) / len(lengths)
        yield Line("method: full", "full | lora (adapters; for larger parents)")
        yield Line("train:")
        affordable = BUDGET_S * usual_rate(shape.parameters, self._store) / (6 * shape.parameters) if shape else 0
        whole = 2 * tokens * fitting
        if shape and whole > affordable:
            budget = rounded(affordable)
            yield Line(f"  tokens: {budget:_}", f"{MINUTES}; an epoch is about {rounded(tokens * fitting):,}")
        else:
            budget = rounded(whole)
            yield Line("  epochs: 2", f"about {budget:,} tokens")
        if seq_len:
            yield Line(
                f"  seq_len: {seq_len}", f"tokens; about {100 * fitting:.0f} % of the records fit, the rest is left out"
            )
            yield Line(f"  batch_tokens: {batch_for(budget, seq_len, max(4096, 4 * seq_len))}")
        if num_scored := _scored_answers(looks, longest):
            yield Line(f"evaluate: {{max_examples: {num_scored}}}", "per task; free answers take long to generate")

    def _parent_shape(self, parent: str) -> Shape | None:
        """The parent's shape where the home or a folder has it; nobody is asked over the network."""
        made = {model.uri: model for model in self._store.all(RegisteredModel)}
        named = [model for model in made.values() if parent in (model.model, f"{model.model}@champion", model.uri)]
        accepted = [model for model in named if model.verdict in ACCEPTED] or named
        if newest := max(accepted, key=lambda m: m.version, default=None):
            return parent_shape(None, newest, self._store)
        folder = _model_folder(parent)
        return folder_shape(folder) if folder else None

    def _near(self, path: str) -> str:
        """The path as seen from the recipe's folder, where that is short; URLs and far paths as they are, absolute."""
        if "://" in path:
            return path
        whole = os.path.normpath(Path.cwd() / Path(path).expanduser())
        relative = os.path.relpath(whole, self._folder)
        ups = Path(relative).parts.count("..")
        reaches_root = len(self._folder.parts) - ups <= 1
        return whole if ups > MAX_UPS or (ups and reaches_root) else relative


def _token_sizes(looks: list[RecordsLook], shape: Shape | None) -> tuple[float, int]:
    """(characters per token, tokens that the chat template adds), by the parent's tokenizer where it is at hand."""
    file = shape.folder / "tokenizer.json" if shape and shape.folder else None
    if file is None or not file.is_file():
        return BYTES_PER_TOKEN, TEMPLATE_TOKENS
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    texts = ["\n".join(pair) for look in looks for pair in look.examples]
    num_tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
    template = len(tokenizer.encode("user\nassistant\n", add_special_tokens=False).ids) + TEMPLATE_MARKS
    return sum(map(len, texts)) / max(1, num_tokens), template


def _scored_answers(looks: list[RecordsLook], seq_len: float) -> int:
    """How many held-out records are worth the time that their answers take to generate; 0 where they are chosen."""
    free = [look for look in looks if not look.num_classes]
    if not free:
        return 0
    return min(1000, max(MIN_SCORED, int(GENERATED_TOKENS / seq_len / len(free)) // 10 * 10))


def _long_enough(lengths: list[float]) -> float:
    """The length that most of a task's records (given in order) stay within."""
    return lengths[int(FITTING_SHARE * (len(lengths) - 1))]


def _record_length(wanted: float, shape: Shape | None) -> int:
    """seq_len in which most records fit, in steps of 64; 0 takes the parent's context.

    Beyond the parent's context only where positions are relative (RoPE), and then up to four times.
    """
    if shape is None or wanted <= shape.seq_len:
        return 0
    stretch = MAX_STRETCH if "rope_theta" in shape.fields or "rope_parameters" in shape.fields else 1
    return min(-(-int(wanted) // 64) * 64, stretch * shape.seq_len)


def source_name(path: str, otherwise: str) -> str:
    """A name from a path: the file's, or its folder's where the file's says nothing (train.jsonl.gz)."""
    for part in reversed([p for p in re.split(r"[/\\]", path.split("?")[0]) if p and "*" not in p]):
        stem = re.sub(r"(\.(jsonl|ndjson|json|txt|md|rst|parquet|arrow|csv|gz|zst))+$", "", part, flags=re.IGNORECASE)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")
        if name and ":" not in part and not GENERIC_NAMES.match(name):
            return name
    return otherwise


def _numbered(names: list[str]) -> Iterator[str]:
    """The names, with -2, -3, ... behind those that came before."""
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name}-{seen[name]}"


def _one_per_task(data: DataFiles) -> list[tuple[DataFiles, str]]:
    """(files, eval_path) for each task: a file each, unless they are numbered parts or splits of one."""
    stems = {_stem(file) for file in data.files}
    if len(data.files) == 1 or data.format == "hf" or len({re.sub(r"\d+", "#", stem) for stem in stems}) == 1:
        nested = len({Path(file.path).parent for file in data.files}) == len(data.files) > 1
        if not nested:
            return [(data, "")]
    held_out = [file for file in data.files if _is_evaluation(_stem(file))]
    trained = [file for file in data.files if file not in held_out]
    if len(trained) == 1 and len(held_out) >= 1:
        return [(DataFiles(str(trained[0]), data.format, (trained[0],)), str(held_out[0]))]
    return [(DataFiles(str(file), data.format, (file,)), "") for file in data.files]


def _stem(file: SourceFile) -> str:
    return Path(str(file)).name.split(".")[0].lower()


def _is_evaluation(stem: str) -> bool:
    return any(word in EVAL_NAMES for word in re.split(r"[-_\d]+", stem))


def _header(kind: str) -> list[Line]:
    return [
        Line(f"# Written by `strata init {kind}` from a look at the data. Change what you like; then"),
        Line("#   strata plan FILE   what it will do and take"),
        Line("#   strata run FILE    interrupted, the same command resumes"),
        Line(f"kind: {kind}"),
    ]


def _task_holdout(look: RecordsLook) -> float | None:
    return holdout_for(look.places, look.sample.scale, DEFAULT_HOLDOUT["records"])


def _enough(holdout: float | None, look: TextLook | RecordsLook) -> float:
    if holdout is None:
        raise DataError(
            f"--data {look.sample.data.path}: {len(look.places)} usable records or documents are too few: "
            f"10 have to be held out for evaluation and as many trained on. Give more data, or cut text smaller"
        )
    return holdout


def _seen(sample: Sample) -> Iterator[str]:
    """What was looked at, for a comment."""
    files = f"{len(sample.data.files):,} files, " if len(sample.data.files) > 1 else ""
    what = "documents" if sample.data.format == "text" else "records"
    chars = sum(len(v) for row in sample.rows for v in row.values() if isinstance(v, str)) * sample.scale
    fields = f"; fields: {_joined(sample.fields)}" if sample.data.format != "text" else ""
    about = "" if sample.exact else "about "
    yield f"{files}{about}{sample.num_records:,} {what}, {_size(chars)}{fields}"
    if sample.problems:
        yield f"{len(sample.problems):,} cannot be read, the first: {sample.problems[0]}"
    if sample.data.left_out:
        yield f"left out, of another format: {_joined(list(sample.data.left_out))}"


def _joined(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _about(looks: list[TextLook]) -> str:
    return "" if all(look.sample.exact for look in looks) else "about "


def _context(shape: Shape | None) -> str:
    if shape is None:
        return "name@alias, name/version, or a folder"
    return f"{shape.parameters:,} parameters, context {shape.seq_len}"


def _first_sentence(text: str) -> str:
    return re.sub(r"^(--data )?(.*/)?", "", text).split(". ")[0].split("; ")[0]


def _size(num_bytes: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.{0 if num_bytes >= 10 * unit else 1}f} {name}"
    return f"{num_bytes:.0f} bytes"


def _scalar(value: str) -> str:
    """A string as YAML: as it is where that reads as the same string, else in double quotes."""
    plain = re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./@~-]*", value)
    special = value.lower() in ("true", "false", "null", "yes", "no", "on", "off", "~")
    number = re.fullmatch(r"[-+.\d][\d_.eE+-]*", value)
    return value if plain and not special and not number else json.dumps(value, ensure_ascii=False)


def _model_folder(parent: str) -> Path | None:
    """The folder that a parent reference names, where it holds a model's config."""
    named = parse_parent(parent)
    return named.path if isinstance(named, Folder) and (named.path / "config.json").is_file() else None
