"""The second arrow: Documents -> TokenShards.

Trains or loads the tokenizer, or takes the parent's; writes one stream per source, and for records the plan
of which share a sample.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fmcore.artifacts.ancestry import context_length, held_out_ids, shards_of
from fmcore.artifacts.files import sha256_file
from fmcore.artifacts.step import Step
from fmcore.artifacts.store import Building, Fields, Store
from fmcore.artifacts.types import Documents, RegisteredModel, TokenShards
from fmcore.data.tables import read_rows
from fmcore.errors import DataError
from fmcore.recipes.fields import Tokenizer

CODE_VERSION = 1
BATCH_DOCUMENTS = 256
BATCH_CHARS = 1_000_000  # so that long documents do not fill the memory
# A tokenizer is trained on all documents up to so many bytes for each entry of its vocabulary, beyond on a
# sample of that size: the words it counts are held in memory, and their number grows with the text.
SAMPLE_BYTES_PER_ENTRY = 8192
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def shards_step(
    name: str, documents: str, tokenizer: Tokenizer | None, seq_len: int | None, parent: str | None
) -> Step:
    """What `tokenize_documents` would make.

    documents, parent: fingerprints. tokenizer: None takes the parent's. seq_len: longest record in tokens
    (0 = the parent's context length), None for text.
    """
    config: dict[str, Any] = {"tokenizer": _tokenizer_identity(tokenizer)}
    if seq_len is not None:
        config["seq_len"] = seq_len
    parents = {"documents": documents}
    if parent:
        parents["parent"] = parent
    return Step("shards", name, config, parents, CODE_VERSION)


def _tokenizer_identity(tokenizer: Tokenizer | None) -> Any:
    if tokenizer is None:
        return "parent"
    if not tokenizer.path:
        return {"vocab_size": tokenizer.vocab_size}
    folder = Path(tokenizer.path)
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise DataError(f"tokenizer.path: {folder} holds no tokenizer.json; expected a folder in transformers' format")
    return {"digest": hashlib.sha256("".join(sha256_file(f) for f in files).encode()).hexdigest()}


def tokenize_documents(
    step: Step,
    documents: Documents,
    tokenizer: Tokenizer | None,
    parent: RegisteredModel | None,
    store: Store,
    *,
    workers: int = 0,
) -> TokenShards:
    """Build the shards of `step`; without a tokenizer of its own, with the parent's.

    workers: threads that train and encode; 0 = one per core. The result is the same for any number.
    """
    store.check(documents)

    def builder(building: Building) -> Fields:
        seq_len = step.config.get("seq_len") or (context_length(store, parent) if parent else 0)
        with encoding_threads(workers):
            return _tokenize(building.path, documents, tokenizer, seq_len, parent, store)

    return store.build(step, TokenShards, builder)


def _tokenize(
    folder: Path,
    documents: Documents,
    tokenizer: Tokenizer | None,
    seq_len: int,
    parent: RegisteredModel | None,
    store: Store,
) -> Fields:
    # transformers takes a second to import; a planner that only asks for identities need not wait for it
    from fmcore.tokens.bpe import load_tokenizer, train_bpe

    if tokenizer is None:
        assert parent is not None
        encoder = load_tokenizer(shards_of(store, parent).tokenizer_path)
    elif tokenizer.path:
        encoder = load_tokenizer(Path(tokenizer.path))
    else:
        encoder = train_bpe(_contents(documents, sample_share(documents, tokenizer.vocab_size)), tokenizer.vocab_size)
    encoder.save_pretrained(str(folder / "tokenizer"))
    counts: dict[str, Any] = {"documents": {}, "refused": {}, "samples": {}}
    num_tokens = {}
    held_out = held_out_ids(store, parent) if parent else set()
    for source in documents.sources:
        path = documents.path / "train" / f"{source}.parquet"
        if documents.form == "records":
            result = _write_records(folder / source, path, encoder, seq_len, held_out)
        else:
            result = _write_text(folder / source, path, encoder)
        num_tokens[source] = result.pop("num_tokens")
        for key, value in result.items():
            counts[key][source] = value
    return {
        "form": documents.form, "sources": list(documents.sources), "vocab_size": len(encoder),
        "num_tokens": num_tokens, "counts": counts,
    }  # fmt: skip


def sample_share(documents: Documents, vocab_size: int) -> float:
    """Which share of the documents a tokenizer of this size is trained on; 1 = all."""
    size = sum(documents.counts.get("train_bytes", {}).values())
    return min(1.0, SAMPLE_BYTES_PER_ENTRY * vocab_size / max(1, size))


def _contents(documents: Documents, share: float = 1.0) -> Iterator[str]:
    """The training documents, or those of them whose id, of which any digits are uniform, lies in the share."""
    for source in documents.sources:
        path = documents.path / "train" / f"{source}.parquet"
        if path.exists():
            rows = read_rows(path, ["id", "content"])
            # not the first digits: those have decided already which side of the split a document is on
            yield from (row["content"] for row in rows if int(row["id"][8:16], 16) < share * 2**32)


@contextmanager
def encoding_threads(num: int) -> Iterator[None]:
    """Let the tokenizers library use so many threads; it looks at the environment at each call.

    Threads are as fast here as processes, and need no second copy of anything. How many there are is settled
    at the library's first parallel call; afterwards one or all of them is the choice.
    """
    wanted = {"TOKENIZERS_PARALLELISM": "false" if num == 1 else "true"}
    if num > 1:
        wanted["RAYON_NUM_THREADS"] = str(num)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row["content"])
        if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_text(folder: Path, path: Path, tokenizer: Any) -> dict[str, Any]:
    from fmcore.tokens.bpe import Encoder, start_id
    from fmcore.tokens.shards import StreamWriter

    encoder, start, end = Encoder(tokenizer), start_id(tokenizer), int(tokenizer.eos_token_id)
    rows = read_rows(path, ["id", "content"]) if path.exists() else iter(())
    with StreamWriter(folder, len(tokenizer), masked=False) as writer:
        for batch in _batches(rows):
            for row, ids in zip(batch, encoder.encode_batch([r["content"] for r in batch]), strict=True):
                writer.add(row["id"], [start, *ids, end])
    return {"documents": writer.num_documents, "num_tokens": writer.num_tokens}


def _write_records(folder: Path, path: Path, tokenizer: Any, seq_len: int, held_out: set[str]) -> dict[str, Any]:
    from fmcore.tokens.chat import encode_example
    from fmcore.tokens.packing import pack_best_fit, write_plan
    from fmcore.tokens.shards import StreamWriter

    refused = {"empty_mask": 0, "too_long": 0, "heldout_by_ancestor": 0}
    lengths = []
    with StreamWriter(folder, len(tokenizer), masked=True) as writer:
        for row in read_rows(path, ["id", "prompt", "response"]):
            if row["id"] in held_out:
                refused["heldout_by_ancestor"] += 1
                continue
            example = encode_example(tokenizer, row["prompt"], row["response"])
            if not any(example.mask):
                refused["empty_mask"] += 1
            elif len(example.ids) > seq_len:
                refused["too_long"] += 1
            else:
                writer.add(row["id"], example.ids, example.mask)
                lengths.append(len(example.ids))
    if not lengths:
        raise DataError(
            f"{folder.name}: every record was refused ({refused['too_long']} longer than {seq_len} tokens, "
            f"{refused['empty_mask']} without a response in the loss); set train.seq_len higher, or use a "
            f"tokenizer whose chat template marks {{% generation %}}"
        )
    bins = pack_best_fit(np.array(lengths), seq_len)
    write_plan(folder, bins)
    return {
        "documents": writer.num_documents, "num_tokens": writer.num_tokens, "refused": refused, "samples": len(bins)
    }  # fmt: skip
