"""Finds the files behind a source's path, local or at an address, and opens them.

An address is whatever fsspec knows: s3://, https:// and others. Whether a file is compressed is told by its
first bytes, so that its name decides nothing.
"""

import glob
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import fsspec

from fmcore.artifacts.files import CHUNK_BYTES, DigestCache
from fmcore.data.unpacking import Unpacked
from fmcore.errors import DataError
from fmcore.recipes.paths import is_url, where_credentials_go
from fmcore.redaction import holds_credentials

BLOCK_BYTES = 4 << 20  # of an object that is read ahead; s3fs would hold 50 MiB
SOCKET_SECONDS = 60  # a server that is silent for longer is given up
WEB = ("http", "https")
# what a driver tells of an object that changes whenever its bytes do, the best first
ETAGS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5")
TIMES = ("LastModified", "last_modified", "Last-Modified", "mtime", "updated")
# by their names; text has none of its own, for code is text as well
SUFFIXES = {"json": (".json", ".jsonl", ".ndjson"), "parquet": (".parquet", ".pq")}
COMPRESSED = (".gz", ".zst")
DRIVERS = {"s3": "pip install 'strata[s3]'", "s3a": "pip install 'strata[s3]'"}


@dataclass(frozen=True)
class SourceFile:
    """A file of a source.

    path: local, or an address. size: in bytes, as it is stored; None where a server does not tell. stamp:
    changes when the bytes do; empty where a server tells nothing that does.
    """

    path: str
    size: int | None
    stamp: tuple[str | int, ...]

    def __str__(self) -> str:
        return self.path


def find_files(path: str, *, field: str, format: str = "") -> list[SourceFile]:
    """Files behind a file, folder or glob, sorted by path; hidden ones are left out.

    field: the recipe field that named it, for the message. format: of a folder, its files of this format alone
    (`of_format`). Raises DataError where there is nothing, or where it cannot be looked at.
    """
    found = _find(path, field)
    return found if glob.has_magic(path) else of_format(found, format)[0]


def of_format(files: list[SourceFile], format: str) -> tuple[list[SourceFile], list[SourceFile]]:
    """(files of a format by their names, the others of their folder): all of them where no name says anything.

    What lies beside the data, such as README, LICENSE or SOURCE, is no data. A text is any file that has a suffix.
    """
    if format not in ("text", *SUFFIXES):
        return files, []
    named = [file for file in files if _is_named_as(file, format)]
    return (named, [file for file in files if not _is_named_as(file, format)]) if named else (files, [])


def _is_named_as(file: SourceFile, format: str) -> bool:
    name = Path(file.path.partition("?")[0]).name.lower()
    if format == "text":
        return Path(name).suffix != ""
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return name.endswith(SUFFIXES[format])


def _find(path: str, field: str) -> list[SourceFile]:
    if is_url(path):
        if holds_credentials(path):  # no recipe can: this is a path of the command line
            raise DataError(
                f"{field}: {path} holds credentials (left out here), and recipes and records name it where many can "
                f"read it; take them out and put them {where_credentials_go(path)}"
            )
        with _reaching(path, field):
            return _find_remote(path, field)
    try:
        return [_local(file) for file in _find_local(path, field)]
    except OSError as error:
        raise DataError(f"{field}: cannot read {error.filename or path}: {error.strerror}") from error


def _local(path: str) -> SourceFile:
    stat = Path(path).stat()
    return SourceFile(path, stat.st_size, (stat.st_size, stat.st_mtime_ns))


def _find_local(path: str, field: str) -> list[str]:
    root = Path(path)
    if root.is_file():
        return [path]
    if root.is_dir():
        files = sorted(_below(root))
        if not files:
            raise DataError(f"{field}: the folder {path} holds no files")
        return [str(file) for file in files]
    found = sorted(p for p in glob.glob(path, recursive=True) if Path(p).is_file())  # noqa: PTH207
    if not found:
        what = "no file matches" if glob.has_magic(path) else "there is no file or folder"
        hint = "; a relative path is read from the recipe's folder, one of --set from the working directory"
        raise DataError(f"{field}: {what} {path}{'' if field.startswith('--') else hint}")
    return found


def _below(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(root, onerror=refuse):
        for file in (Path(folder, name) for name in names):
            if file.is_file() and not _hidden(file.relative_to(root).parts):
                yield file


def _find_remote(path: str, field: str) -> list[SourceFile]:
    filesystem, inner = _filesystem(path)
    if _protocol(path) in WEB:
        if "*" in path or urlsplit(path).path.endswith("/"):
            raise DataError(f"{field}: {path} names no single file, and web servers list none: give a source per file")
        return [_remote(path, filesystem.info(inner))]
    chain = "".join(path.partition("::")[1:])
    if filesystem.isfile(inner):
        found = {inner: filesystem.info(inner)}
    elif glob.has_magic(inner):
        found = filesystem.glob(inner, detail=True)
    else:
        found = filesystem.find(inner, detail=True)
    root = inner.rstrip("/").split("/")
    files = [
        _remote(filesystem.unstrip_protocol(name) + chain, info)
        for name, info in sorted(found.items())
        if info["type"] == "file" and not name.endswith("/") and not _hidden(name.split("/")[len(root) :])
    ]
    if not files:
        raise DataError(f"{field}: no file lies at {path}")
    return files


def _remote(path: str, info: dict[str, Any]) -> SourceFile:
    size = info.get("size")
    etag = next((str(info[key]) for key in ETAGS if info.get(key)), "")
    if etag and not etag.startswith("W/"):  # a weak one promises the meaning, not the bytes
        return SourceFile(path, size, (etag, size or 0))
    changed = next((str(info[key]) for key in TIMES if info.get(key)), "")
    return SourceFile(path, size, (size, changed) if changed and size else ())


def _hidden(parts: Any) -> bool:
    return any(part.startswith(".") for part in parts)


def files_by_digest(path: str, name: str, digests: DigestCache, format: str = "") -> list[tuple[str, SourceFile]]:
    """(sha256, file) of a source's files in the order of their digests, so that their order decides nothing."""
    files = find_files(path, field=f"source {name}", format=format)
    found = [(_digest(file, name, digests), file) for file in files]
    return sorted(found, key=lambda pair: (pair[0], pair[1].path))


def _digest(file: SourceFile, name: str, digests: DigestCache) -> str:
    with _reaching(file.path, f"source {name}"):
        return digests.remembered(file.path, list(file.stamp), lambda: _sha256(file.path))


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with _open_stored(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def open_bytes(file: SourceFile | Path | str) -> Unpacked:
    """Open a file for reading from its start to its end; gzip and zstd are unpacked as they are read.

    Raises DataError where it cannot be opened, BrokenFile while it is read.
    """
    path = str(file)
    return Unpacked(open_stored(path), path)


def open_stored(path: str) -> BinaryIO:
    """Open a file's bytes as they are stored, to be read once from start to end."""
    with _reaching(path):
        return _open_stored(path)


def _open_stored(path: str) -> BinaryIO:
    if not is_url(path):
        return Path(path).open("rb")
    filesystem, inner = _filesystem(path)
    return cast(BinaryIO, filesystem.open(inner, "rb", block_size=0 if _protocol(path) in WEB else BLOCK_BYTES))


@contextmanager
def _reaching(path: str, field: str = "") -> Iterator[None]:
    """Turns whatever a driver raises into one message that names the path, and the field that gave it."""
    where = f"{field}: " if field else ""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        remedy = DRIVERS.get(_protocol(path), str(error))
        raise DataError(f"{where}{path} needs a driver that is not installed: {remedy}") from error
    except OSError as error:
        cause = error.__cause__ or error
        why = error.strerror or str(cause) or type(cause).__name__
        raise DataError(f"{where}cannot read {path}: {why}{_login_hint(path, cause)}") from error
    except Exception as error:
        if not is_url(path):
            raise
        # each driver has exceptions of its own, and all of them say that the path cannot be read
        raise DataError(
            f"{where}cannot read {path}: {error or type(error).__name__}{_login_hint(path, error)}"
        ) from error


def _login_hint(path: str, error: BaseException) -> str:
    asked = getattr(error, "status", None) == 401
    return f"; user and password belong {where_credentials_go(path)}" if asked else ""


def _protocol(path: str) -> str:
    return path.partition("::")[0].partition("://")[0].lower()


def _filesystem(path: str) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    if _protocol(path) in WEB:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SOCKET_SECONDS, sock_read=SOCKET_SECONDS)
        options = {"client_kwargs": {"trust_env": True, "timeout": timeout}}  # proxies, ~/.netrc
    filesystem, inner = fsspec.core.url_to_fs(path, **options)
    filesystem.invalidate_cache()  # a listing of an hour ago would hide what has changed since
    return filesystem, inner
