"""The JSON spec that the evaluation process reads, and the names of the files it writes."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from fmcore.model.weights import Weights

DOCUMENTS_FILE = "documents.parquet"  # set, id, bits, bytes, tokens
ANSWERS_FILE = "answers.parquet"  # set, id, correct, answer, response
SAMPLES_FILE = "samples.json"


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EvalSet(_Block):
    """One held-out set. name: as in metrics. choices: the task's possible responses, if it has few.

    origin: which set it is, under whatever name: `<documents fingerprint>/<source>`.
    """

    name: str
    origin: str
    kind: Literal["text", "task"]
    path: Path
    choices: tuple[str, ...] = ()
    own: bool = True


class EvalSpec(_Block):
    """One model on some sets. Lengths in tokens; ledger: what the weights have seen."""

    weights: Weights
    tokenizer: Path
    ledger: Path
    sets: tuple[EvalSet, ...]
    seq_len: int
    max_documents: int
    max_examples: int
    num_samples: int
    sample_tokens: int
    device: Literal["auto", "cpu", "cuda"]
    threads: int
