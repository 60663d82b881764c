"""Reads a report's per-document rows back, for intervals and paired comparison."""

from collections import defaultdict
from pathlib import Path

import numpy as np

from fmcore.data.tables import read_rows
from fmcore.evaluation.gate import Kind, SetScores
from fmcore.evaluation.spec import ANSWERS_FILE, DOCUMENTS_FILE


def read_scores(folder: Path) -> dict[str, SetScores]:
    """Set name -> scores: bits over bytes for text, correct over one for tasks."""
    rows: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for row in read_rows(folder / DOCUMENTS_FILE):
        rows[row["set"]].append((row["id"], row["bits"], row["bytes"]))
    texts = {name: _scores(name, "text", values) for name, values in rows.items()}
    rows = defaultdict(list)
    for row in read_rows(folder / ANSWERS_FILE):
        rows[row["set"]].append((row["id"], row["correct"], 1.0))
    return texts | {name: _scores(name, "task", values) for name, values in rows.items()}


def _scores(name: str, kind: Kind, rows: list[tuple[str, float, float]]) -> SetScores:
    ids, numerators, denominators = zip(*rows, strict=True)
    return SetScores(name, kind, list(ids), np.array(numerators, dtype=float), np.array(denominators, dtype=float))


def chance_levels(folder: Path) -> dict[str, float]:
    """Task -> share of the most frequent response among its evaluated records."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in read_rows(folder / ANSWERS_FILE):
        counts[row["set"]][row["response"]] += 1
    return {task: max(found.values()) / sum(found.values()) for task, found in counts.items()}
