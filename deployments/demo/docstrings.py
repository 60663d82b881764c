"""Reads the docstrings of installed packages without importing them: files are found and parsed, never run.

First step of the demo's corpus; what is read here becomes documents and labelled records in corpus.py.
"""

import ast
import functools
import importlib.machinery
import importlib.metadata
import multiprocessing
import os
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from fmcore.data.normalize import encodable, normalize

PYTHON = "python"  # the name under which the standard library and its documentation topics go
MIN_CHARS = 120  # a docstring that is not longer says too little to be a document
FILES_PER_JOB = 16
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where package and distribution differ
# bundled copies, tests, and what is not the standard library although it lies in its folder
SKIPPED_FOLDERS = {
    "__pycache__", "_vendor", "dist-packages", "idlelib", "site-packages",
    "test", "tests", "turtledemo", "vendored",
}  # fmt: skip
# folders of near-copies: held-out documents would have twins in training
SKIPPED_MODULES = {"mlflow.store.db_migrations", "prefect.server.database._migrations", "transformers.models"}

Kind = Literal["module", "class", "function", "method", "topic"]


class Document(NamedTuple):
    """One docstring or documentation topic, cleaned."""

    text: str
    package: str
    module: str
    name: str  # qualified within the module; the module's own name for kind module
    kind: Kind


class SourceFile(NamedTuple):
    """A Python file and the module it would be imported as."""

    package: str
    module: str
    path: Path


def find_package(package: str, search_path: Sequence[str] | None = None) -> Path | None:
    """The folder or file of a top-level package, or None where it is not installed. Imports nothing.

    search_path: folders to look in; None = where this Python imports from.
    """
    if package == PYTHON:
        return Path(sysconfig.get_path("stdlib"))
    # the path finder alone: other finders on sys.meta_path could run code of the packages they serve
    spec = importlib.machinery.PathFinder.find_spec(package, search_path)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


def package_version(package: str, search_path: Sequence[str] | None = None) -> str:
    """The installed version of a package's distribution, from its metadata."""
    if package == PYTHON:
        return platform.python_version()
    name = DISTRIBUTIONS.get(package, package)
    folders = sys.path if search_path is None else list(search_path)
    for distribution in importlib.metadata.distributions(name=name, path=folders):
        return str(distribution.version)
    return "unknown"


def source_files(package: str, root: Path) -> list[SourceFile]:
    """All Python files of a package, in an order that no file system decides."""
    prefix = [] if package == PYTHON else [package]
    if root.is_file():
        return [SourceFile(package, package, root)]
    found = []
    for folder, subfolders, names in os.walk(root):
        parts = [*prefix, *Path(folder).relative_to(root).parts]
        subfolders[:] = [sub for sub in subfolders if not _is_skipped([*parts, sub])]
        for name in names:
            if name.endswith(".py"):
                stem = [] if name == "__init__.py" else [name.removesuffix(".py")]
                found.append(SourceFile(package, ".".join([*parts, *stem]), Path(folder, name)))
    return sorted(found, key=lambda file: (file.module, file.path.name))


def read_documents(files: Sequence[SourceFile], workers: int) -> Iterator[Document]:
    """The docstrings of all files, in the order of the files whatever the number of worker processes."""
    if workers <= 1:
        yield from (document for file in files for document in docstrings(file))
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for documents in pool.imap(docstrings, files, chunksize=FILES_PER_JOB):
            yield from documents


def docstrings(file: SourceFile) -> list[Document]:
    """The docstrings of one file, top to bottom. A file that does not parse has none."""
    try:
        source = file.path.read_bytes()
        tree = _parse(source) if b'"""' in source or b"'''" in source else None
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []  # templates and files for another Python version; one is no loss among thousands
    return list(_documents_of(tree, file)) if tree else []


def read_topics(root: Path) -> list[Document]:
    """The reference manual's pages that come with the standard library: `pydoc_data.topics`, read as text."""
    path = root / "pydoc_data" / "topics.py"
    if not path.exists():  # some systems package it apart
        return []
    for node in _parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [
                Document(normalize(text), PYTHON, "pydoc_data.topics", name, "topic")
                for name, text in sorted(topics.items())
                if len(text) > MIN_CHARS
            ]
    return []


def _is_skipped(parts: list[str]) -> bool:
    return parts[-1] in SKIPPED_FOLDERS or ".".join(parts) in SKIPPED_MODULES


def _parse(source: bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes are their authors' business
        return ast.parse(source)


def _documents_of(tree: ast.Module, file: SourceFile) -> Iterator[Document]:
    document = functools.partial(Document, package=file.package, module=file.module)
    if text := _docstring(tree):
        yield document(text=text, name=file.module, kind="module")
    for node, name, kind in _definitions(tree.body, "", "function"):
        if text := _docstring(node):
            yield document(text=text, name=name, kind=kind)


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(body: Iterable[ast.AST], prefix: str, function: Kind) -> Iterator[tuple[Definition, str, Kind]]:
    """Classes and functions at any depth, with their qualified names.

    function: what a function found here is, `method` inside a class.
    """
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield node, prefix + node.name, "class"
            yield from _definitions(node.body, f"{prefix}{node.name}.", "method")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, prefix + node.name, function
            yield from _definitions(node.body, f"{prefix}{node.name}.<locals>.", "function")
        elif isinstance(node, ast.stmt | ast.ExceptHandler):  # if, try, with: the same scope
            yield from _definitions(ast.iter_child_nodes(node), prefix, function)


def _docstring(node: Definition | ast.Module) -> str | None:
    text = normalize(ast.get_docstring(node, clean=True) or "")
    # NUL bytes: in code that writes them unescaped into a docstring; reading a source stops at such a text
    return text if len(text) > MIN_CHARS and encodable(text) and "\0" not in text else None
