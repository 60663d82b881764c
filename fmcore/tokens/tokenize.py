"""The second arrow: Documents -> TokenShards.

Trains or loads the tokenizer, or takes the parent's; writes one stream per source, and for records the plan
of which share a sample.
"""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fmcore.artifacts.ancestry import checkpoint_of, context_length, held_out_ids
from fmcore.artifacts.files import sha256_file
from fmcore.artifacts.step import Step
from fmcore.artifacts.store import Building, Fields, Store
from fmcore.artifacts.types import Documents, RegisteredModel, TokenShards
from fmcore.data.tables import read_rows
from fmcore.errors import DataError
from fmcore.recipes.fields import Tokenizer

CODE_VERSION = 1
BATCH_DOCUMENTS = 256
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
) -> TokenShards:
    """Build the shards of `step`; without a tokenizer of its own, with the parent's."""
    store.check(documents)

    def builder(building: Building) -> Fields:
        seq_len = step.config.get("seq_len") or (context_length(store, parent) if parent else 0)
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
        encoder = load_tokenizer(store.check(checkpoint_of(store, parent)).final)
    elif tokenizer.path:
        encoder = load_tokenizer(Path(tokenizer.path))
    else:
        encoder = train_bpe(_contents(documents), tokenizer.vocab_size)
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


def _contents(documents: Documents) -> Iterator[str]:
    for source in documents.sources:
        path = documents.path / "train" / f"{source}.parquet"
        if path.exists():
            yield from (row["content"] for row in read_rows(path, ["content"]))


def _write_text(folder: Path, path: Path, tokenizer: Any) -> dict[str, Any]:
    from fmcore.tokens.bpe import Encoder, start_id
    from fmcore.tokens.shards import StreamWriter

    encoder, start, end = Encoder(tokenizer), start_id(tokenizer), int(tokenizer.eos_token_id)
    rows = read_rows(path, ["id", "content"]) if path.exists() else iter(())
    with StreamWriter(folder, len(tokenizer), masked=False) as writer:
        while batch := list(islice(rows, BATCH_DOCUMENTS)):
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
