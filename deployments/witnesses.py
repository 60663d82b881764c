"""`strata lineage --document`: which registered versions' weights have seen a text, a file, or a folder's files."""

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deployments.models import open_home
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Documents, RegisteredModel
from fmcore.data.files import find_files
from fmcore.data.seen import SEEN, Answer, Fates, Reading, Witness, known_settings, read_file, read_text

LARGEST_TABLE = 20  # files shown one by one


def print_witnesses(path: str, text: str, reference: str, console: Console, *, as_json: bool) -> None:
    """For each document, which versions saw it, and of the others why not. Raises DataError for what is unreadable."""
    store, models, absent = _models(reference)
    if text:
        asked = {"text": read_text(text)}
    else:
        settings = known_settings(_documents(store, models))
        asked = {str(file): read_file(file, settings) for file in find_files(path, field="--document")}
    fates = Fates(store, [reading for readings in asked.values() for reading in readings])
    witnesses = [Witness(store, model, fates) for model in models]
    answers = {name: [witness.answer(readings) for witness in witnesses] for name, readings in asked.items()}
    if as_json:
        console.print_json(json.dumps({"documents": [_as_json(name, given) for name, given in answers.items()]}))
        return
    if len(answers) == 1:
        _print_one(*answers.popitem(), asked, console)
    else:
        _print_many(answers, console)
    for uri in absent:
        console.print(f"{uri}: its artifacts are not in this home, so nothing is known here", highlight=False)


def _models(reference: str) -> tuple[Store, list[RegisteredModel], list[str]]:
    """The version named, or every one of the registry; and those whose artifacts lie elsewhere."""
    _, store, client = open_home()
    from fmcore.tracking.registry import list_models, resolve

    if reference:
        return store, [store.get(resolve(client, reference).fingerprint, RegisteredModel)], []
    rows = [(row, store.find_fingerprint(row.fingerprint, RegisteredModel)) for row in list_models(client)]
    return store, [m for _, m in rows if m], [f"{row.model}/{row.version}" for row, m in rows if m is None]


def _documents(store: Store, models: list[RegisteredModel]) -> list[Documents]:
    fingerprints = dict.fromkeys(m.parents["documents"] for m in models if "documents" in m.parents)
    return [store.get(fingerprint, Documents) for fingerprint in fingerprints]


def _print_one(name: str, answers: list[Answer], asked: dict[str, list[Reading]], console: Console) -> None:
    seen_by = [answer for answer in answers if answer.num_seen]
    most = max(len(reading.documents) for reading in asked[name])
    verdict = f"seen by {_versions(seen_by)}" if seen_by else "seen by no registered version"
    console.print(f"{name}: {verdict}", markup=False, highlight=False, soft_wrap=True)
    table = Table("version", "verdict", "documents" if most > 1 else "document", "read")
    for answer in answers:
        table.add_row(answer.version, answer.verdict, _fates(answer), answer.how)
    console.print(table)


def _print_many(answers: dict[str, list[Answer]], console: Console) -> None:
    table = Table("file", "seen by")
    for name, given in list(answers.items())[:LARGEST_TABLE]:
        table.add_row(
            escape(name), _versions([answer for answer in given if answer.num_seen]) or "no registered version"
        )
    console.print(table)
    if len(answers) > LARGEST_TABLE:
        console.print(f"and {len(answers) - LARGEST_TABLE:,} files more; --json has them all")
    for column in zip(*answers.values(), strict=True):
        whole, seen = sum(a.num_documents for a in column), sum(a.num_seen for a in column)
        files = sum(a.num_seen > 0 for a in column)
        console.print(
            f"{column[0].version}: {seen:,} of {whole:,} documents, in {files:,} of {len(column):,} files"
            f"{_unknown(column[0])}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _versions(answers: list[Answer]) -> str:
    def one(answer: Answer) -> str:
        share = f" ({answer.num_seen:,} of {answer.num_documents:,})" if answer.num_documents > 1 else ""
        return answer.version + share

    return ", ".join(one(answer) for answer in answers)


def _fates(answer: Answer) -> str:
    ordered = sorted(answer.fates.items(), key=lambda item: (item[0] != SEEN, item[0]))
    if answer.num_documents == 1:
        return ordered[0][0] + _unknown(answer)
    return ", ".join(f"{count:,} {fate}" for fate, count in ordered) + _unknown(answer)


def _unknown(answer: Answer) -> str:
    if not answer.unknown_before or answer.num_seen == answer.num_documents:
        return ""
    itself = answer.unknown_before == answer.version
    return (
        f"; {'imported, its' if itself else f'what {answer.unknown_before} saw before its import is'} history unknown"
    )


def _as_json(name: str, answers: list[Answer]) -> dict[str, Any]:
    return {
        "name": name,
        "seen_by": [answer.version for answer in answers if answer.num_seen],
        "versions": [
            {
                "version": a.version, "verdict": a.verdict, "seen": a.num_seen, "documents": a.num_documents,
                "fates": a.fates, "read": a.how, "history_unknown_before": a.unknown_before,
            }
            for a in answers
        ],
    }  # fmt: skip
