"""What a recipe's `parent` means, decided by its text alone: a registered version, a folder, or a hub name.

| written | read as |
|---|---|
| `plays`, `plays@champion`, `plays/3`, `models:/plays/3` | a version in the registry |
| `./model`, `../model`, `/path/model`, `~/model` | a folder in transformers' format |
| `models/llama`, where the recipe's folder holds such a folder | that folder |
| `org/name`, `org/name@revision` | a model of the Hugging Face hub |
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fmcore.errors import UnknownModelError

_FOLDER_STARTS = ("/", "./", "../", "~")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Registered:
    """A reference for the model registry."""

    reference: str


@dataclass(frozen=True)
class Folder:
    """A model folder outside of Strata."""

    path: Path


@dataclass(frozen=True)
class HubName:
    """A model of the Hugging Face hub; an empty revision is the hub's own default."""

    repo: str
    revision: str

    @property
    def shown(self) -> str:
        """`org/name` or `org/name@revision`."""
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def parse_parent(text: str) -> Registered | Folder | HubName:
    """Read a parent reference. Raises UnknownModelError for one that looks like a path and is neither."""
    if text.startswith(_FOLDER_STARTS):
        return Folder(Path(text).expanduser())
    if not _is_path_like(text):
        return Registered(text)
    repo, _, revision = text.partition("@")
    if not _HUB_NAME.fullmatch(repo):
        raise UnknownModelError(
            f"parent: {text!r} is no folder beside the recipe, and no name of the hub, which is written org/name or "
            f"org/name@revision; a folder elsewhere is written ./{text.strip('/')} or with its whole path"
        )
    return HubName(repo, revision)


def absolute_parent(text: str, folder: Path) -> str:
    """A parent reference with a relative folder made absolute from the recipe's folder; others as they are."""
    beside = _is_path_like(text) and (folder / text).is_dir()
    if not (text.startswith(_FOLDER_STARTS) or beside):
        return text
    # normpath, not resolve: a symbolic link is the user's name for the folder
    return os.path.normpath(folder / Path(text).expanduser())


def base_name(text: str) -> str:
    """The `<base>` a model from this parent is named by: the registered name, or the last one of a path."""
    parent = parse_parent(text)
    if isinstance(parent, Registered):
        return parent.reference.removeprefix("models:/").partition("@")[0].partition("/")[0]
    last = parent.path.name if isinstance(parent, Folder) else parent.repo.rpartition("/")[2]
    return _NOT_IN_A_NAME.sub("-", last).strip("._-") or "model"


def _is_path_like(text: str) -> bool:
    """Whether a name has a folder's slash in it, rather than that of `name/3` or `models:/name/3`."""
    before, slash, last = text.partition("@")[0].rpartition("/")
    return bool(slash) and not before.startswith("models:") and not last.isdecimal()
