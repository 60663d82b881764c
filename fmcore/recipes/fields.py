"""The blocks that recipes are made of.

Fields are part of a model's identity, but for `Execution`, names of recipes, and paths, which count by the
digests of what they lead to. Zero or an empty string means "chosen for you", so that the forms drawn from
these classes need no unions.
"""

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from fmcore.recipes.paths import where_credentials_go
from fmcore.redaction import holds_credentials

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
SPLIT_PATTERN = r"^[A-Za-z0-9_.-]+$"  # a plain name: slices such as train[:10%] are refused
PATH_HELP = (
    "A file, a folder or a glob, local or an address (s3://, https://); .gz and .zst are read as they are. "
    "Of a folder, the files whose names are those of the format. "
    "hf: a folder of save_to_disk, files that datasets can load, or a name on the hub."
)
SPLIT_HELP = "hf: the split to read."
CONFIG_HELP = "hf: which configuration of the data set; empty = its default."
REVISION_HELP = "hf: branch, tag or commit of a data set on the hub; empty = the newest."
OnBadInput = Literal["stop", "quarantine"]
ON_BAD_INPUT_HELP = (
    "What cannot be read (broken JSON, a missing field, bytes that are no UTF-8): stop at the first, or set it "
    "aside in quarantine.parquet and go on."
)


TITLES = {"lr": "Learning rate (lr)", "r": "Rank (r)"}


def _title(name: str, field: object) -> str:
    """How a form calls a field: its own name in words, so that the recipe file's name is found again."""
    return TITLES.get(name) or name.rstrip("_").replace("_", " ").capitalize()


_TRACKING_CREDENTIALS = (
    "into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN); a database's whole address "
    "into MLFLOW_TRACKING_URI"
)


class Block(BaseModel):
    """Frozen, and closed: an unknown field is an error, never ignored. No field takes credentials.

    A recipe is kept with its artifacts, in MLflow and as the parameter of a Prefect run.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, field_title_generator=_title
    )

    @field_validator("*", mode="after")
    @classmethod
    def _no_credentials(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str) and holds_credentials(value):
            where = _TRACKING_CREDENTIALS if info.field_name == "tracking_uri" else where_credentials_go(value)
            raise ValueError(
                f"the address holds credentials, and recipes are stored where many can read them; take them out and "
                f"put them {where}"
            )
        return value


class Source(Block):
    """Where text documents come from."""

    name: str = Field(pattern=NAME_PATTERN, description="Name of the source in metrics and counts.")
    path: str = Field(description=PATH_HELP)
    format: Literal["text", "json", "parquet", "hf"] = Field(
        "text", description="text, json (JSON lines or one JSON list), parquet, or hf (a Hugging Face data set)."
    )
    text_field: str = Field("text", description="json, parquet, hf: the field or column that holds the text.")
    split_on: Literal["file", "blank_line", "line"] = Field(
        "file",
        description="text: what ends a document. A file over 64 KiB is cut at blank lines into documents of "
        "at least 2,000 characters.",
    )
    weight: float = Field(
        0, ge=0, description="Share of the training samples, relative to the other sources; 0 = by tokens."
    )
    max_epochs: float = Field(0, ge=0, description="Refuse to repeat this source more often than this; 0 = no limit.")
    split: str = Field("train", pattern=SPLIT_PATTERN, description=SPLIT_HELP)
    config_name: str = Field("", description=CONFIG_HELP)
    revision: str = Field("", description=REVISION_HELP)

    @model_validator(mode="after")
    def _check(self) -> "Source":
        _check_hf(self)
        return self


class Filters(Block):
    """Which documents are dropped for their length or for repeating themselves."""

    min_chars: int = Field(20, ge=0, description="Shortest document kept, in characters.")
    max_chars: int = Field(5_000_000, ge=1, description="Longest document kept, in characters.")
    max_duplicate_lines: float = Field(
        0.3, ge=0, le=1, description="Largest share of characters in lines that occurred before."
    )
    max_top_ngram: float = Field(
        0.2, ge=0, le=1, description="Largest share of characters in the most frequent sequence of 4 words."
    )


class TextData(Block):
    """Text documents: cleaned, deduplicated by content, split by document."""

    sources: list[Source] = Field(min_length=1, description="One entry per source of documents.")
    holdout: float = Field(
        0.02, gt=0, lt=1, description="Fraction of the documents kept for evaluation, chosen by content hash."
    )
    eval_sources: list[Source] = Field(
        default=[], description="Sources that are only evaluated on; what they hold is never trained on."
    )
    filters: Filters = Field(Filters(), description="Length and repetition filters.")
    on_bad_input: OnBadInput = Field("stop", description=ON_BAD_INPUT_HELP)

    @model_validator(mode="after")
    def _check(self) -> "TextData":
        _unique([s.name for s in [*self.sources, *self.eval_sources]], "sources")
        weighted = [s.name for s in self.sources if s.weight > 0]
        if weighted and len(weighted) < len(self.sources):
            missing = [s.name for s in self.sources if s.weight == 0]
            raise ValueError(
                f"give every source a weight or none: {', '.join(missing)} has none, {weighted[0]} has one"
            )
        return self


class Task(Block):
    """Prompt/response records of one task."""

    name: str = Field(pattern=NAME_PATTERN, description="Name of the task in metrics and counts.")
    path: str = Field(description=PATH_HELP)
    format: Literal["json", "parquet", "hf"] = Field(
        "json", description="json (JSON lines or one JSON list), parquet, or hf (a Hugging Face data set)."
    )
    prompt_field: str = Field("prompt", description="The field that holds the prompt.")
    response_field: str = Field("response", description="The field that holds the response.")
    input_field: str = Field("input", description="A field appended to the prompt where it is not empty.")
    group_field: str = Field(
        "",
        description="Records that share this field's value stay on one side of the split; empty = the prompt.",
    )
    holdout: float = Field(0.1, gt=0, lt=1, description="Fraction of the groups kept for evaluation, chosen by hash.")
    eval_path: str = Field("", description="Records to evaluate on instead of a held-out fraction.")
    choices: list[str] = Field(
        default=[],
        description="The possible responses, scored by likelihood; empty = found where there are at most 20.",
    )
    split: str = Field("train", pattern=SPLIT_PATTERN, description=SPLIT_HELP)
    config_name: str = Field("", description=CONFIG_HELP)
    revision: str = Field("", description=REVISION_HELP)

    @model_validator(mode="after")
    def _check(self) -> "Task":
        _check_hf(self)
        return self


class TaskData(Block):
    """Prompt/response records of one or many tasks."""

    tasks: list[Task] = Field(min_length=1, description="One entry per task.")
    on_bad_input: OnBadInput = Field("stop", description=ON_BAD_INPUT_HELP)

    @model_validator(mode="after")
    def _check(self) -> "TaskData":
        _unique([task.name for task in self.tasks], "tasks")
        return self


class Tokenizer(Block):
    """Train a byte-level BPE, or load one."""

    vocab_size: int = Field(
        4096,
        ge=300,
        description="Vocabulary to train, 37 reserved ids included; unused where a path is given.",
    )
    path: str = Field("", description="A folder with a tokenizer in transformers' format, to load instead.")


class Model(Block):
    """A decoder of transformers, by preset or by its own config fields."""

    preset: Literal["tiny", "small", "125m", "1b"] = Field(
        "tiny", description="tiny: 4 layers of 192; small: 8 of 384; 125m: 12 of 768; 1b: 16 of 2048."
    )
    config: dict[str, Any] = Field(
        default={},
        description="Fields of transformers' config, laid over the preset; with another model_type they stand alone.",
    )


OPTIMIZER = "muon: for the matrices of the decoder's layers, adamw for the rest; in one process."


class Optimization(Block):
    """What all stages share of how weights are updated."""

    tokens: int = Field(0, ge=0, description="Training tokens; 0 = by epochs.")
    epochs: float = Field(0, ge=0, description="Passes over the training tokens; 0 = by tokens.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Of matrix products; weights and optimizer stay fp32. auto = bf16 on a GPU, fp32 on a CPU.",
    )
    weight_decay: float = Field(0.1, ge=0, description="Weight decay, on matrices alone.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta1.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW beta2.")
    grad_clip: float = Field(1.0, gt=0, description="Largest gradient norm.")
    spike_sigma: float = Field(
        6,
        ge=0,
        description="A step is skipped whose loss or gradient norm lies so many standard deviations above the "
        "mean of the last 128 steps; 0 = only one that is not finite.",
    )
    decay_fraction: float = Field(0.15, gt=0, le=1, description="wsd: share of the steps in which the rate decays.")

    @model_validator(mode="after")
    def _check(self) -> "Optimization":
        if self.tokens and self.epochs:
            raise ValueError("give tokens or epochs, not both")
        return self


class PretrainTrain(Optimization):
    """Training from scratch."""

    epochs: float = Field(0, ge=0, description="Passes over the training tokens; 0 = by tokens, or 1 without them.")
    seq_len: int = Field(256, ge=8, description="Context length in tokens.")
    batch_tokens: int = Field(8192, ge=8, description="Tokens in one optimizer step.")
    lr: float = Field(2e-3, gt=0, description="Peak learning rate.")
    schedule: Literal["wsd", "cosine"] = Field("wsd", description="wsd (warmup, stable, decay) or cosine.")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description=OPTIMIZER)
    warmup_fraction: float = Field(0.02, ge=0, lt=1, description="Share of the steps in which the rate rises.")


class FinetuneTrain(Optimization):
    """Training on a parent's final weights."""

    epochs: float = Field(0, ge=0, description="Passes over the records; 0 = by tokens, or 2 without them.")
    seq_len: int = Field(0, ge=0, description="Longest record in tokens; 0 = the parent's context length.")
    batch_tokens: int = Field(4096, ge=8, description="Token positions in one optimizer step.")
    lr: float = Field(0, ge=0, description="Peak learning rate; 0 = 3e-4 for full, 3e-3 for lora.")
    schedule: Literal["wsd", "cosine"] = Field("cosine", description="wsd (warmup, stable, decay) or cosine.")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description=OPTIMIZER)
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    weight_decay: float = Field(0, ge=0, description="Weight decay, on matrices alone.")


class ContinueTrain(Optimization):
    """Training on from a base's stable checkpoint, at its stable rate, then decay."""

    epochs: float = Field(0, ge=0, description="Passes over the new tokens; 0 = by tokens, or 1 without them.")
    seq_len: int = Field(0, ge=0, description="Context length in tokens; 0 = the parent's.")
    lr: float = Field(
        0, ge=0, description="Learning rate; 0 = the parent's stable rate, 1e-4 where that is not known (imported)."
    )
    batch_tokens: int = Field(
        0, ge=0, description="Tokens in one optimizer step; 0 = the parent's, 8192 where that is not known (imported)."
    )
    optimizer: Literal["", "adamw", "muon"] = Field(
        "", description="Empty = the parent's, whose state is gone on with; adamw where it has none."
    )


class Lora(Block):
    """Low-rank adapters, in peft's words."""

    r: int = Field(16, ge=1, description="Rank of the update.")
    lora_alpha: int = Field(32, ge=1, description="Scale: the update is multiplied by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter.")
    target_modules: str = Field("all-linear", description="all-linear, or names of modules joined by commas.")


class Replay(Block):
    """How much of the ancestors' data is seen again, against forgetting."""

    fraction: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of the training samples drawn from what the parent's weights saw. Left at its default, "
        "it is 0 for an imported parent, of which that is not known.",
    )


class Evaluation(Block):
    """How much is evaluated."""

    max_documents: int = Field(500, ge=10, description="Held-out documents scored per set, lowest hash first.")
    max_examples: int = Field(1000, ge=10, description="Held-out records scored per task, lowest hash first.")
    num_samples: int = Field(3, ge=0, description="Texts generated for the report.")
    sample_tokens: int = Field(48, ge=1, description="Longest generated text, in tokens.")


class Gate(Block):
    """When a version may replace the champion: paired bootstrap, 95 % intervals."""

    max_regression_bpb: float = Field(
        0.01,
        ge=0,
        description="Tolerated loss on a protected set, in bits per byte, from the best champion's score.",
    )
    max_regression_accuracy: float = Field(
        0.01,
        ge=0,
        description="Tolerated loss of accuracy on a task, as a fraction, from the best champion's score.",
    )
    min_documents: int = Field(20, ge=2, description="Fewer held-out documents than this decide nothing.")


class Register(Block):
    """Under which name the model is registered."""

    model: str = Field("", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$", description="Model name; empty = the recipe's.")


class Execution(Block):
    """How to run, never what comes out: no part of any identity."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one.")
    processes: int = Field(
        0,
        ge=0,
        description="Processes per node that train together; 0 = one per GPU, or one. A resumed run keeps its own.",
    )
    nodes: int = Field(1, ge=1, description="Machines that train together; on the others, run strata join.")
    rendezvous: str = Field(
        "", description="Where several nodes meet: host:port of the one that runs strata run. They share the home."
    )
    threads: int = Field(
        0, ge=0, description="CPU threads of each process; 0 = the cores, shared out. A resumed run keeps its own."
    )
    workers: int = Field(
        0, ge=0, description="Processes that read the data, and threads that encode it; 0 = as many as pay off."
    )
    micro_batch: int = Field(
        0,
        ge=0,
        description="Sequences per forward pass; 0 = about 2,048 tokens (8,192 on a GPU). A resumed run keeps its own.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="torch.compile, one decoder layer at a time. auto = where it saves more than it takes: long "
        "trainings. A resumed run keeps its own, unless this is off.",
    )
    recompute_layers: int = Field(
        -1,
        ge=-1,
        description="Decoder layers whose activations are computed again in the backward pass instead of kept; "
        "-1 = as many as the memory asks for.",
    )
    mirror: str = Field(
        "",
        description="Folder or address (s3://...) for copies of the training state, to go on from on another machine.",
    )
    save_interval_s: float = Field(30, ge=0, description="Seconds between two saves of the training state.")
    grace_s: float = Field(20, gt=0, description="Seconds that training has to save when it is stopped.")
    hang_timeout_s: float = Field(600, gt=0, description="Seconds without a heartbeat after which training is killed.")
    retries: int = Field(1, ge=0, description="How often a crashed training is resumed before the run fails.")
    tracking_uri: str = Field("", description="MLflow tracking URI; empty = MLFLOW_TRACKING_URI, or the home's own.")

    @model_validator(mode="after")
    def _check_nodes(self) -> "Execution":
        if self.rendezvous and not re.fullmatch(r"\S+:\d{1,5}", self.rendezvous):
            raise ValueError(f"rendezvous: expected host:port, as in 10.0.0.1:29400, given {self.rendezvous!r}")
        if self.nodes > 1 and not self.rendezvous:
            raise ValueError(f"nodes is {self.nodes}: set rendezvous, host:port of the machine that runs `strata run`")
        return self


def _check_hf(block: Source | Task) -> None:
    fields = type(block).model_fields
    changed = [n for n in ("split", "config_name", "revision") if getattr(block, n) != fields[n].default]
    if changed and block.format != "hf":
        raise ValueError(f"{changed[0]} is a setting of format: hf alone; format is {block.format}")


def _unique(names: list[str], what: str) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"names of {what} must differ: {', '.join(sorted(twice))} is given twice")
