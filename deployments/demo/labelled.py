"""Turns documents into prompt/response records: two tasks that a model of a few million parameters can learn.

`library`: which library is this documentation from? Libraries' names are struck out of the excerpt.
`kind`: does it describe a function, a class, a method or a module?
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from deployments.demo.docstrings import PYTHON, Document
from fmcore.data.normalize import content_id, normalize

LIBRARIES = ("matplotlib", "mlflow", "pandas", "prefect", PYTHON, "torch", "transformers")
KINDS = ("class", "function", "method", "module")
EXCERPT_CHARS = 200  # about 60 tokens; 300 characters tell a classifier no more
MAX_PER_GROUP = 4  # overloads and copies of one text say little; more of them would only weigh
STRUCK_OUT = "___"
# every library's names and customary aliases, in every excerpt: neither a name nor its absence is a hint
_NAMES = re.compile(
    r"(?:scikit.learn|sklearn|hugging ?face|matplotlib|transformers|networkx|pytorch|mlflow|pandas|prefect"
    r"|python|pyplot|numpy|scipy|sympy|torch)"
    r"|\b(?:mpl|np|pd|plt|sp)\b",
    re.IGNORECASE,
)


class Record(NamedTuple):
    """A prompt and its response; records of one `group` stay on one side of the split."""

    prompt: str
    response: str
    package: str
    group: str


def library_records(documents: Iterable[Document], per_class: int) -> list[Record]:
    """Records of the task `library`, as many of every library."""
    chosen = (d for d in documents if d.package in LIBRARIES and d.kind != "topic")
    question = "Which library is this from?"
    return _balanced(chosen, question, lambda document: document.package, per_class)


def kind_records(documents: Iterable[Document], per_class: int) -> list[Record]:
    """Records of the task `kind`, as many of every kind."""
    chosen = (d for d in documents if d.kind in KINDS)
    question = "Is this a class, a function, a method or a module?"
    return _balanced(chosen, question, lambda document: document.kind, per_class)


def excerpt(text: str) -> str:
    """The beginning of a text on one line, cut at a blank, with the names of libraries struck out."""
    line = " ".join(_NAMES.sub(STRUCK_OUT, text[: 3 * EXCERPT_CHARS]).split())
    return line if len(line) <= EXCERPT_CHARS else line[:EXCERPT_CHARS].rsplit(" ", 1)[0]


def group_of(text: str) -> str:
    """The first sentence in plain lower-case words: what near-copies of a docstring have in common."""
    first = excerpt(text).lower().split(". ")[0]
    return " ".join(re.findall(r"[a-z]{2,}", first)) or first


def _balanced(
    documents: Iterable[Document], question: str, label: Callable[[Document], str], per_class: int
) -> list[Record]:
    """Equally many records of every label, in an order that content alone decides.

    From the highest content id down: a base holds out the documents of the lowest ids, and no later stage
    may train on an excerpt of one.
    """
    records: dict[str, list[Record]] = defaultdict(list)
    seen: set[str] = set()
    group_sizes: Counter[str] = Counter()
    for document in sorted(documents, key=lambda d: content_id(normalize(d.text)), reverse=True):
        text, group = excerpt(document.text), group_of(document.text)
        if text in seen or group_sizes[group] >= MAX_PER_GROUP:
            continue
        seen.add(text)
        group_sizes[group] += 1
        record = Record(f"{question}\n\n{text}", label(document), document.package, group)
        records[record.response].append(record)
    num = min([per_class, *map(len, records.values())])
    chosen = [record for of_label in records.values() for record in of_label[:num]]
    return sorted(chosen, key=lambda record: content_id(record.prompt))
