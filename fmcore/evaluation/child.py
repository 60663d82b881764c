"""The evaluation process: `python -m fmcore.evaluation.child SPEC.json`, in the report's partial folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fmcore.artifacts.files import read_json, write_json
from fmcore.data.ledger import Ledger
from fmcore.data.tables import read_rows
from fmcore.evaluation.answers import Record, answer_records
from fmcore.evaluation.bits import score_documents
from fmcore.evaluation.spec import ANSWERS_FILE, DOCUMENTS_FILE, SAMPLES_FILE, EvalSet, EvalSpec
from fmcore.model.build import open_model
from fmcore.model.generate import generate_text
from fmcore.process.guard import Heartbeat, Stop, run_main
from fmcore.tokens.bpe import load_tokenizer
from fmcore.training.child import prepare_torch
from fmcore.training.parallel import pick_device

DOCUMENTS = pa.schema(
    [
        ("set", pa.string()),
        ("id", pa.string()),
        ("bits", pa.float64()),
        ("bytes", pa.int64()),
        ("tokens", pa.int64()),
    ]
)
ANSWERS = pa.schema(
    [
        ("set", pa.string()),
        ("id", pa.string()),
        ("correct", pa.int64()),
        ("answer", pa.string()),
        ("response", pa.string()),
    ]
)
PROMPT_WORDS = 12
RowT = TypeVar("RowT")


def main(path: Path) -> bool:
    """Score the model on every set; False if stopped between two sets (nothing is kept then)."""
    stop, heartbeat = Stop(), Heartbeat(path.parent)
    spec = EvalSpec.model_validate(read_json(path))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    prepare_torch(spec.threads)
    tokenizer = load_tokenizer(spec.tokenizer)
    model = open_model(spec.weights).to(pick_device(spec.device)).eval()
    seen = Ledger(spec.ledger)
    documents: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for item in spec.sets:
        rows = select_rows(item, spec, seen)
        if item.kind == "text":
            scored = score_documents(model, tokenizer, ((r["id"], r["content"]) for r in rows), spec.seq_len)
            documents += [{"set": item.name, **score._asdict()} for score in _beating(scored, heartbeat)]
        else:
            records = [Record(r["id"], r["prompt"], r["response"]) for r in rows]
            answered = answer_records(model, tokenizer, records, item.choices, spec.seq_len)
            answers += [{"set": item.name, **answer._asdict()} for answer in _beating(answered, heartbeat)]
        print(
            f"evaluated {item.name}: {len(rows)} {'documents' if item.kind == 'text' else 'records'}",
            flush=True,
        )
        if stop.requested:
            return False
    folder = path.parent
    pq.write_table(pa.Table.from_pylist(documents, schema=DOCUMENTS), folder / DOCUMENTS_FILE)
    pq.write_table(pa.Table.from_pylist(answers, schema=ANSWERS), folder / ANSWERS_FILE)
    write_json(folder / SAMPLES_FILE, samples(spec, model, tokenizer))
    return True


def _beating(rows: Iterator[RowT], heartbeat: Heartbeat) -> Iterator[RowT]:
    for row in rows:
        heartbeat.beat()
        yield row


def select_rows(item: EvalSet, spec: EvalSpec, seen: Ledger) -> list[dict[str, Any]]:
    """The held-out rows with the lowest ids, without any that the weights have been trained on."""
    limit = spec.max_documents if item.kind == "text" else spec.max_examples
    rows = sorted(read_rows(item.path), key=lambda row: row["id"])
    return [row for row in rows if row["id"] not in seen][:limit]


def samples(spec: EvalSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Generated text for the first rows of the stage's own sets: what a person looks at first."""
    made: list[dict[str, str]] = []
    own = [item for item in spec.sets if item.own]
    for index in range(spec.num_samples if own else 0):
        item = own[index % len(own)]
        rows = sorted(read_rows(item.path), key=lambda row: row["id"])
        row = rows[index // len(own) % len(rows)]
        chat = item.kind == "task"
        prompt = row["prompt"] if chat else " ".join(row["content"].split(" ")[:PROMPT_WORDS])
        text = generate_text(model, tokenizer, prompt, chat=chat, max_new_tokens=spec.sample_tokens)
        made.append({"set": item.name, "prompt": prompt, "generated": text, "response": row.get("response", "")})
    return made


if __name__ == "__main__":
    run_main(main)
