"""The demo's base model against xz on the same held-out text: alone, and primed with the training text.

    python benchmarks/compression.py        (after `make demo`, in the same STRATA_HOME)

Primed means: the bytes that the held-out text adds to the compressed training text. xz then knows every
document the model could have trained on (with a dictionary of 64 MiB), which a small model does not repeat.
"""

import lzma
import sys
from pathlib import Path

from fmcore.artifacts.ancestry import documents_of
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import EvalReport, RegisteredModel
from fmcore.data.tables import read_rows
from fmcore.evaluation.scores import read_scores
from fmcore.workspace import Workspace

SOURCE = "docs"


def joined(table: Path, ids: set[str] | None) -> bytes:
    return "\n".join(row["content"] for row in read_rows(table) if ids is None or row["id"] in ids).encode()


def main() -> None:
    store = Store(Workspace.current().home)
    base = next((m for m in store.all(RegisteredModel) if m.uri == "docs/1"), None)
    if base is None:
        sys.exit("no model docs/1 in this home: run `make demo` first")
    documents = documents_of(store, base)
    assert documents is not None  # it was pretrained here
    report = store.get(base.parents["report"], EvalReport)
    metrics, scored = report.metrics, set(read_scores(report.path)[SOURCE].ids)
    heldout = joined(documents.path / "heldout" / f"{SOURCE}.parquet", scored)
    train = joined(documents.path / "train" / f"{SOURCE}.parquet", None)
    alone = 8 * len(lzma.compress(heldout, preset=9)) / len(heldout)
    primed = 8 * (len(lzma.compress(train + heldout, preset=9)) - len(lzma.compress(train, preset=9))) / len(heldout)
    value, low, high = (metrics[f"eval/{SOURCE}/bpb{end}"] for end in ("", "_low", "_high"))
    print("| held-out text of docs | bits per byte |\n|---|---|")
    print(f"| docs/1 | {value:.3f} (95 % {low:.3f} to {high:.3f}) |")
    print(f"| xz -9 | {alone:.3f} |")
    print(f"| xz -9, primed with the training text ({len(train) / 1e6:.1f} MB) | {primed:.3f} |")


if __name__ == "__main__":
    main()
