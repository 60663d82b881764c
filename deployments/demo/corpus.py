"""Makes the demo's corpus from the packages that are installed anyway: text without any download.

    OUT/corpus/base.jsonl             today's documents, for pretraining
    OUT/corpus/unseen_packages.jsonl  whole packages that are only evaluated on
    OUT/corpus/tomorrow.jsonl         packages kept back, the new data of continuous pre-training
    OUT/tasks/library.jsonl           which library is this documentation from?
    OUT/tasks/kind.jsonl              function, class, method or module?
    OUT/corpus.json                   what the files were made from; written last

The same packages give the same bytes, whatever the number of workers or the order of a folder's files.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from deployments.demo import docstrings
from deployments.demo.docstrings import PYTHON, Document
from deployments.demo.labelled import kind_records, library_records
from fmcore.artifacts.files import read_json, write_json
from fmcore.data.normalize import content_id
from fmcore.errors import DataError

logger = logging.getLogger(__name__)

MAKER_VERSION = 1  # raise it when other bytes come out of the same packages
STAMP = "corpus.json"
RECORDS_PER_LIBRARY = 800
RECORDS_PER_KIND = 1500

Size = Literal["full", "fast"]


class Packages(NamedTuple):
    """Which packages go into which file; documents found twice stay in the first."""

    base: tuple[str, ...]
    tomorrow: tuple[str, ...]
    unseen_packages: tuple[str, ...]


# All come with the project's own dependencies, some through others (sqlalchemy through prefect).
_FAST = (PYTHON, "matplotlib", "mlflow", "numpy", "pandas", "prefect", "transformers")
# Far from the base in words and form: trained on it alone, a tiny model lost 0.4 bits per byte on the base.
_TOMORROW = ("sqlalchemy",)
_UNSEEN = ("click", "httpx", "jinja2")
PACKAGES: dict[Size, Packages] = {
    "full": Packages((*_FAST, "datasets", "huggingface_hub", "peft", "torch"), _TOMORROW, _UNSEEN),
    "fast": Packages(_FAST, _TOMORROW, _UNSEEN),
}


def make_corpus(
    out: Path,
    *,
    workers: int = 2,
    size: Size = "full",
    packages: Packages | None = None,
    search_path: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Write the corpus and the tasks below `out`, unless the same ones are there already.

    Two sizes need two folders: each replaces what the other wrote.

    workers: processes that parse; no part of what comes out.
    packages: instead of the size's own. search_path: folders to find them in; None = this Python's.

    Returns {"made": whether files were written, "packages": {name: version}, "missing": [names],
    "files": {path below out: {"records": number, "bytes": size}}}. Raises DataError where a file would be
    empty because none of its packages is installed.
    """
    packages = packages or PACKAGES[size]
    roots = {name: docstrings.find_package(name, search_path) for group in packages for name in group}
    installed = {name: root for name, root in roots.items() if root}
    identity = {
        "maker_version": MAKER_VERSION,
        "parsed_by": docstrings.package_version(PYTHON),
        "groups": packages._asdict(),
        "packages": {name: docstrings.package_version(name, search_path) for name in installed},
        "missing": [name for name, root in roots.items() if not root],
    }
    identity = json.loads(json.dumps(identity))  # tuples as lists, as the stamp is read back
    made = _same_as_before(out, identity)
    if not made:
        files = _write_all(out, _contents(packages, installed, workers))
        write_json(out / STAMP, identity | {"files": files})
    stamp = read_json(out / STAMP)
    return {"made": not made, **{key: stamp[key] for key in ("packages", "missing", "files")}}


def _same_as_before(out: Path, identity: dict[str, Any]) -> bool:
    try:
        stamp = read_json(out / STAMP)
        files = stamp.pop("files")
        complete = all((out / name).stat().st_size == file["bytes"] for name, file in files.items())
    except (OSError, ValueError, KeyError):
        return False
    return complete and bool(stamp == identity)


def _contents(packages: Packages, installed: dict[str, Path], workers: int) -> dict[str, list[dict[str, Any]]]:
    """Path below the corpus folder -> its lines."""
    documents = _documents(packages, installed, workers)
    base = documents["base"]
    lines = {f"corpus/{name}.jsonl": [d._asdict() for d in found] for name, found in documents.items()}
    lines["tasks/library.jsonl"] = [r._asdict() for r in library_records(base, RECORDS_PER_LIBRARY)]
    lines["tasks/kind.jsonl"] = [r._asdict() for r in kind_records(base, RECORDS_PER_KIND)]
    return lines


def _documents(packages: Packages, installed: dict[str, Path], workers: int) -> dict[str, list[Document]]:
    """Name of each group of packages -> its documents, none twice in all of them."""
    groups = packages._asdict()
    for group, names in groups.items():
        for name in names:
            if name not in installed:
                logger.warning("%s is not installed: %s goes without it", name, group)
        if not any(name in installed for name in names):
            raise DataError(f"the demo's {group} needs one of {', '.join(names)}: run `make setup` first")
    files = [
        file
        for names in groups.values()
        for name in names
        if name in installed
        for file in docstrings.source_files(name, installed[name])
    ]
    topics = docstrings.read_topics(installed[PYTHON]) if PYTHON in installed else []
    group_of = {name: group for group, names in groups.items() for name in names}
    documents: dict[str, list[Document]] = {group: [] for group in groups}
    for document in _without_duplicates([*topics, *docstrings.read_documents(files, workers)]):
        documents[group_of[document.package]].append(document)
    return documents


def _without_duplicates(documents: Iterable[Document]) -> Iterator[Document]:
    seen: set[str] = set()
    for document in documents:
        key = content_id(document.text)
        if key not in seen:
            seen.add(key)
            yield document


def _write_all(out: Path, contents: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, int]]:
    """Write every file under a temporary name, then rename them; until all stand, there is no stamp."""
    for name, lines in contents.items():
        path = _temporary(out / name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
    (out / STAMP).unlink(missing_ok=True)
    for name in contents:
        _temporary(out / name).replace(out / name)
    return {name: {"records": len(lines), "bytes": (out / name).stat().st_size} for name, lines in contents.items()}


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
