"""A second copy of the training state at an address, for a machine that is lost together with its disk.

<address>/latest/step-.../  <address>/latest/pointer.json  <address>/stable/  <address>/metrics.jsonl

Training does not wait for it before its end: a thread copies what was saved and verified here, the newest first, and
what is being copied is not dropped here meanwhile. A state is whole there when its manifest is; the pointer comes after
it. Who fetches it checks every sha256 as for a state of its own.
"""

import json
import shutil
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import fsspec

from fmcore.errors import TrainingError
from fmcore.training.checkpoint import MANIFEST, POINTER, damage
from fmcore.training.metrics import FILE_NAME as METRICS

LATEST, STABLE = "latest", "stable"


class Mirror:
    """The copy of one training's state. address: of any storage that fsspec knows; folder: the training's own."""

    def __init__(self, address: str, folder: Path) -> None:
        self._address = address.rstrip("/")
        self._folder = folder
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._again = False
        self._failing = False
        self._closed = False
        self._held: frozenset[str] = frozenset()

    def held_states(self) -> Collection[str]:
        """Names of state folders that must stay for now, for they are being copied."""
        return self._held

    def push_soon(self) -> None:
        """Have a thread copy what is new; what is saved meanwhile is copied after it."""
        with self._lock:
            self._again = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._push_all, name="mirror", daemon=True)
                self._thread.start()

    def close(self, *, finish: bool) -> None:
        """Return when nothing is on its way any more: all is copied, or cannot be, or the file that was begun is.

        finish: whether what is not yet copied is to be.
        """
        self._closed = not finish
        thread = self._thread
        if thread is not None:
            thread.join()

    def _push_all(self) -> None:
        while True:
            with self._lock:
                if self._closed or not self._again:
                    self._thread = None
                    return
                self._again = False
            try:
                self.push()
                self._failing = False
            except Exception as error:  # a driver may raise anything; the state here is what counts
                if not self._failing and not self._closed:
                    print(f"WARNING: the state is not copied to {self._address} for now: {_why(error)}", flush=True)
                self._failing = True

    def push(self) -> None:
        """Copy the newest state, then the pointer to it, then the others; drop what is no longer kept."""
        filesystem, root = _open(self._address)
        latest = self._folder / LATEST
        self._held = frozenset(path.name for path in latest.glob("step-*"))  # before it is known which of them count
        try:
            pointer = (latest / POINTER).read_bytes()
            newest, kept = json.loads(pointer)["folder"], json.loads(pointer)["manifests"]
            if (self._folder / STABLE / MANIFEST).exists():  # which a resume from the newest would not write again
                self._put_state(filesystem, self._folder / STABLE, f"{root}/{STABLE}")
            self._put_state(filesystem, latest / newest, f"{root}/{LATEST}/{newest}")
            if (self._folder / METRICS).exists():  # not before the first step
                filesystem.pipe_file(f"{root}/{METRICS}", (self._folder / METRICS).read_bytes())
            filesystem.pipe_file(f"{root}/{LATEST}/{POINTER}", pointer)
            for name in sorted(kept, reverse=True):
                self._put_state(filesystem, latest / name, f"{root}/{LATEST}/{name}")
        finally:
            self._held = frozenset()
        for old in _names(filesystem, f"{root}/{LATEST}"):
            if old.startswith("step-") and old not in kept:
                filesystem.rm(f"{root}/{LATEST}/{old}", recursive=True)

    def _put_state(self, filesystem: Any, folder: Path, target: str) -> None:
        """Copy a state folder, its manifest last, unless the same one is there, or nobody wants it any more."""
        manifest = (folder / MANIFEST).read_bytes()
        if filesystem.exists(f"{target}/{MANIFEST}") and filesystem.cat_file(f"{target}/{MANIFEST}") == manifest:
            return
        filesystem.makedirs(target, exist_ok=True)
        for path in sorted(folder.iterdir()):
            if self._closed:
                raise InterruptedError("the training is done")
            if path.name != MANIFEST:
                filesystem.put_file(str(path), f"{target}/{path.name}")
                there = filesystem.info(f"{target}/{path.name}")["size"]
                if there != path.stat().st_size:
                    raise OSError(f"{target}/{path.name} has {there} bytes instead of {path.stat().st_size}")
        filesystem.pipe_file(f"{target}/{MANIFEST}", manifest)

    def pull(self) -> bool:
        """Fetch the states where there are none here; whether there were any. Raises TrainingError."""
        if (self._folder / LATEST / POINTER).exists():
            return False
        try:
            filesystem, root = _open(self._address)
            if not filesystem.exists(f"{root}/{LATEST}/{POINTER}"):
                return False
            self._fetch(filesystem, root)
        except Exception as error:
            raise TrainingError(
                f"execution.mirror: cannot look for a saved state at {self._address}: {_why(error)}. Mend that, or "
                f"leave the field out to start without it"
            ) from error
        return True

    def _fetch(self, filesystem: Any, root: str) -> None:
        """The states last: with them, all is there."""
        if filesystem.exists(f"{root}/{METRICS}"):
            filesystem.get_file(f"{root}/{METRICS}", str(self._folder / METRICS))
        if filesystem.exists(f"{root}/{STABLE}/{MANIFEST}"):
            _get_tree(filesystem, f"{root}/{STABLE}", self._folder / STABLE)
            if problem := damage(self._folder / STABLE):
                print(f"WARNING: the stable state at {self._address} is damaged ({problem}) and left out", flush=True)
                shutil.rmtree(self._folder / STABLE)
        _get_tree(filesystem, f"{root}/{LATEST}", self._folder / LATEST)

    def remove(self) -> None:
        """Drop the copy of a training that is done."""
        filesystem, root = _open(self._address)
        if filesystem.exists(root):
            filesystem.rm(root, recursive=True)


def _open(address: str) -> tuple[Any, str]:
    filesystem, root = fsspec.core.url_to_fs(address)
    filesystem.invalidate_cache()
    return filesystem, root.rstrip("/")


def _get_tree(filesystem: Any, source: str, folder: Path) -> None:
    """Fetch a folder whole, in place of what stands there, or not at all."""
    temporary = folder.with_name(folder.name + ".fetched")
    shutil.rmtree(temporary, ignore_errors=True)
    for path in filesystem.find(source):
        target = temporary / path.removeprefix(source).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        filesystem.get_file(path, str(target))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def _names(filesystem: Any, folder: str) -> Iterator[str]:
    filesystem.invalidate_cache()
    for path in filesystem.ls(folder, detail=False):
        yield str(path).rstrip("/").rsplit("/", 1)[-1]


def _why(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split()) or type(error).__name__
