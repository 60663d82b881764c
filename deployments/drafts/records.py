"""The text of a finetune recipe, a task per file or glob: each line's comment says what was seen, or whence a size."""

import re
from collections.abc import Iterator
from pathlib import Path

from deployments.drafts.lines import (
    Line,
    enough_held_out,
    header,
    near,
    numbered,
    scalar,
    source_name,
    what_was_seen,
)
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import ACCEPTED, RegisteredModel
from fmcore.data.detect import DataFiles, data_files
from fmcore.data.files import SourceFile
from fmcore.data.look import RecordsLook, look_at_records
from fmcore.errors import DataError, UserInputError
from fmcore.planning.cost import BYTES_PER_TOKEN
from fmcore.planning.shape import Shape, folder_shape, parent_shape
from fmcore.planning.sizes import BUDGET_S, batch_for, holdout_for, rounded, usual_rate
from fmcore.recipes.fields import Task
from fmcore.recipes.parents import Folder, parse_parent

EVAL_NAMES = ("test", "eval", "validation", "valid", "dev", "val")
MAX_TASKS = 60
TEMPLATE_TOKENS = 12  # that the chat template adds to a record
TEMPLATE_MARKS = 8  # those of them that are no words
GENERATED_TOKENS = 20_000  # in evaluating free answers, as many as in a few minutes on two cores
MIN_SCORED = 20  # what the gate needs to decide (gate.min_documents)
FITTING_SHARE = 0.9  # of the records that should fit into seq_len
MAX_STRETCH = 4  # times the parent's context that records may take up
DEFAULT_HOLDOUT = 0.1


class RecordsDraft:
    """Writes recipes of prompt/response tasks for one folder: paths are written as seen from there."""

    def __init__(self, folder: Path, store: Store) -> None:
        self._folder = folder
        self._store = store

    def lines(self, name: str, paths: list[str], parent: str) -> list[Line]:
        """A finetune recipe, a task per file or glob. Raises DataError for unusable data."""
        tasks, left_out = self._tasks(paths, name)
        shape = self._parent_shape(parent)
        lines = [
            *header("finetune"),
            Line(f"name: {name}", "registered as <parent>-" + name),
            Line(f"parent: {scalar(parent)}", _context(shape)),
            Line("data:"),
            *(Line(f"  # left out: {line}") for line in left_out),
            Line("  tasks:"),
        ]
        for task, look, eval_path in tasks:
            lines += self._task(task, look, eval_path)
        looks = [look for _, look, _ in tasks]
        if any(look.missing or look.sample.problems for look in looks):
            lines.append(Line("  on_bad_input: quarantine", "records without prompt or response are set aside"))
        return [*lines, *self._sizes(looks, shape)]

    def _tasks(self, paths: list[str], name: str) -> tuple[list[tuple[str, RecordsLook, str]], list[str]]:
        """(name, what was seen, eval_path) of each task, and what of a folder cannot be used, with the reason."""
        parts = [part for path in paths for part in _one_per_task(data_files(path))]
        if len(parts) > MAX_TASKS:
            raise UserInputError(f"--data: {len(parts)} files would be {len(parts)} tasks; give them by several globs")
        alone = len(parts) == len(paths)
        looks: list[tuple[str, RecordsLook, str]] = []
        left_out: list[str] = []
        names = numbered([source_name(part.path, name) for part, _ in parts])
        for task, (part, eval_path) in zip(names, parts, strict=True):
            try:
                look = look_at_records(part)
                enough_held_out(_task_holdout(look), look)
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
        for line in what_was_seen(sample):
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
        yield Line(f"      path: {scalar(near(sample.data.path, self._folder))}")
        yield Line(f"      format: {sample.data.format}")
        if sample.data.split:
            yield Line(f"      split: {sample.data.split}")
        yield Line(f"      prompt_field: {scalar(look.prompt_field)}")
        yield Line(f"      response_field: {scalar(look.response_field)}")
        if look.input_field:
            yield Line(f"      input_field: {look.input_field}", "appended to the prompt where it is not empty")
        elif Task.model_fields["input_field"].default in (look.prompt_field, look.response_field):
            yield Line('      input_field: ""', "nothing is appended to the prompt")
        if look.group_field:
            yield Line(f"      group_field: {look.group_field}", "records of one stay on one side of the split")
        if eval_path:
            yield Line(f"      eval_path: {scalar(near(eval_path, self._folder))}", "evaluated on, never trained on")
        else:
            holdout = enough_held_out(_task_holdout(look), look)
            num = sum(place < holdout for place in look.places) * sample.scale
            yield Line(f"      holdout: {holdout:g}", f"{'' if sample.exact else 'about '}{num:,.0f} records")

    def _sizes(self, looks: list[RecordsLook], shape: Shape | None) -> Iterator[Line]:
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
            yield Line(f"  tokens: {budget:_}", f"an epoch is about {rounded(tokens * fitting):,}", timed=True)
        else:
            budget = rounded(whole)
            yield Line("  epochs: 2", f"about {budget:,} tokens", timed=True)
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


def _task_holdout(look: RecordsLook) -> float | None:
    return holdout_for(look.places, look.sample.scale, DEFAULT_HOLDOUT)


def _context(shape: Shape | None) -> str:
    if shape is None:
        return "name@alias, name/version, or a folder"
    return f"{shape.parameters:,} parameters, context {shape.seq_len}"


def _first_sentence(text: str) -> str:
    return re.sub(r"^(--data )?(.*/)?", "", text).split(". ")[0].split("; ")[0]


def _model_folder(parent: str) -> Path | None:
    """The folder that a parent reference names, where it holds a model's config."""
    named = parse_parent(parent)
    return named.path if isinstance(named, Folder) and (named.path / "config.json").is_file() else None
