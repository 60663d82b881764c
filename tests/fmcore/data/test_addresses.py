"""Sources at addresses: an S3 server and web servers of the tests' own, digests remembered by what they tell."""

import base64
import datetime
import gzip
import http.server
import json
import os
import ssl
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmcore.artifacts.files import DigestCache
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Documents
from fmcore.data.files import files_by_digest, find_files, open_bytes
from fmcore.data.prepare import documents_step, prepare_documents
from fmcore.data.sources import total_bytes
from fmcore.errors import DataError
from fmcore.recipes.fields import Source, TextData

Prepare = Callable[..., Documents]


def text(number: int) -> str:
    return f"This is document number {number}, which lies somewhere else."


def lines(first: int, num: int = 40) -> bytes:
    return b"".join(json.dumps({"text": text(n)}).encode() + b"\n" for n in range(first, first + num))


def data(path: str, **changes: Any) -> TextData:
    return TextData(sources=[{"name": "s", "path": path, "format": "json"} | changes], holdout=0.4)


def paths(path: str) -> list[str]:
    return [file.path for file in find_files(path, field="x")]


# ---- S3


@pytest.fixture
def put(bucket: Any) -> Callable[[str, bytes], None]:
    return lambda key, body: bucket.put_object(Bucket="data", Key=key, Body=body)


def test_files_folders_and_globs_in_a_bucket(put: Callable[[str, bytes], None]) -> None:
    for key in ("look/a.jsonl", "look/sub/b.jsonl", "look/.hidden", "look/c.txt"):
        put(key, b"x")
    assert paths("s3://data/look/a.jsonl") == ["s3://data/look/a.jsonl"]
    assert paths("s3://data/look") == [f"s3://data/look/{name}" for name in ("a.jsonl", "c.txt", "sub/b.jsonl")]
    assert paths("s3://data/look/*.jsonl") == ["s3://data/look/a.jsonl"]
    assert paths("s3://data/look/**/*.jsonl") == ["s3://data/look/a.jsonl", "s3://data/look/sub/b.jsonl"]
    assert total_bytes(Source(name="s", path="s3://data/look")) == 3


def test_a_bucket_makes_the_documents_that_a_folder_makes(
    put: Callable[[str, bytes], None], prepare: Prepare, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        content = gzip.compress(lines(number * 40), mtime=0) if number else lines(0)
        (tmp_path / "in" / f"{number}.jsonl").write_bytes(content)
        put(f"same/{number}.jsonl", content)
    here, there = prepare(data(str(tmp_path / "in"))), prepare(data("s3://data/same"), home="other")
    assert here.fingerprint == there.fingerprint
    assert here.counts == there.counts
    for name in ("train/s.parquet", "heldout/s.parquet"):
        assert (here.path / name).read_bytes() == (there.path / name).read_bytes()


def test_parquet_in_a_bucket(put: Callable[[str, bytes], None], prepare: Prepare) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [text(n) for n in range(60)]}), sink)
    put("tables/a.parquet", sink.getvalue().to_pybytes())
    assert prepare(data("s3://data/tables/a.parquet", format="parquet")).counts["read"] == {"s": 60}


def test_an_objects_digest_is_remembered_by_its_etag(
    put: Callable[[str, bytes], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = __import__("fmcore.data.files", fromlist=["_sha256"])._sha256
    monkeypatch.setattr("fmcore.data.files._sha256", lambda path: read.append(path) or original(path))
    cache = DigestCache(tmp_path / "digests.json")
    put("etag/a.jsonl", b"one")
    first = files_by_digest("s3://data/etag/a.jsonl", "s", cache)[0][0]
    assert files_by_digest("s3://data/etag/a.jsonl", "s", cache)[0][0] == first
    assert len(read) == 1
    put("etag/a.jsonl", b"two")  # of the same size
    assert files_by_digest("s3://data/etag/a.jsonl", "s", cache)[0][0] != first
    cache.save()
    files_by_digest("s3://data/etag/a.jsonl", "s", DigestCache(tmp_path / "digests.json"))
    assert len(read) == 2
    files_by_digest("s3://data/etag/a.jsonl", "s", DigestCache(tmp_path / "digests.json", rehash=True))
    assert len(read) == 3


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("s3://data/nothing.jsonl", "no file lies at s3://data/nothing.jsonl"),
        ("s3://data/none*.jsonl", "no file lies at s3://data/none*.jsonl"),
        ("s3://nowhere/a.jsonl", "s3://nowhere"),
        ("nosuch://a/b", "cannot read nosuch://a/b: Protocol not known: nosuch"),
    ],
)
def test_an_address_that_leads_nowhere(bucket: Any, path: str, words: str) -> None:
    with pytest.raises(DataError) as refused:
        find_files(path, field="source s")
    assert words in str(refused.value)
    assert str(refused.value).startswith("source s: ")


def test_a_driver_that_is_not_there_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(DataError, match=r"needs a driver that is not installed: pip install 'strata\[s3\]'"):
        find_files("s3://data/x", field="source s")


# ---- the web


LOGIN = base64.b64encode(b"me:pa55word").decode()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`: name -> (content, headers). Counts the contents it sent."""

    files: dict[str, tuple[bytes, dict[str, str]]] = {}
    sent: Counter[str] = Counter()

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        name = self.path.partition("?")[0]
        if name not in self.files:
            self.send_error(403 if "secret" in name else 404)
            return
        if name == "/login.jsonl" and self.headers.get("Authorization") != f"Basic {LOGIN}":
            self.send_error(401)
            return
        content, headers = self.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.sent[name] += 1
            self.wfile.write(content[: len(content) // 2] if "cut" in name else content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module", params=["http", "https"])
def web(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of our own; https with a certificate that SSL_CERT_FILE vouches for."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "https":
            certificate = make_certificate(tmp_path_factory.mktemp("tls"))
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            # aiohttp reads SSL_CERT_FILE when it is imported, which another test may have done already
            patch.setenv("SSL_CERT_FILE", str(certificate))
            aiohttp.connector._SSL_CONTEXT_VERIFIED.load_verify_locations(certificate)
        thread = threading.Thread(target=partial(server.serve_forever, 0.05), daemon=True)
        thread.start()
        yield f"{request.param}://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        server.server_close()


def make_certificate(folder: Path) -> Path:
    """A certificate for 127.0.0.1 that signs itself, with its key, in one file."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        .add_extension(address, critical=False).add_extension(x509.BasicConstraints(True, 0), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    path = folder / "own.pem"
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(certificate.public_bytes(pem) + private)
    return path


@pytest.fixture
def serve() -> Iterator[Callable[..., None]]:
    Handler.files.clear()
    Handler.sent.clear()

    def serve(name: str, content: bytes, **headers: str) -> None:
        Handler.files[f"/{name}"] = (content, {key.replace("_", "-"): value for key, value in headers.items()})

    yield serve


def test_user_and_password_come_from_netrc_alone(
    web: str, serve: Callable[..., None], prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve("login.jsonl", lines(0), ETag='"1"')
    address = f"{web}/login.jsonl"
    with pytest.raises(DataError, match=r"401.*belong into ~/.netrc .*machine 127\.0\.0\.1 login USER"):
        paths(address)
    with pytest.raises(DataError, match=r"^--data: .*holds credentials .*put them into ~/.netrc") as caught:
        find_files(address.replace("://", "://me:pa55word@"), field="--data")
    assert "pa55word" not in str(caught.value)
    with pytest.raises(DataError, match="fetch the file, and name the copy"):
        paths(f"{address}?token=0123456789")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password pa55word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert prepare(data(address)).counts["read"]["s"] == 40


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl?version=3"])
def test_a_file_of_a_web_server(web: str, serve: Callable[..., None], prepare: Prepare, name: str) -> None:
    content = lines(0, 60)
    serve(name.partition("?")[0], gzip.compress(content) if name.endswith(".gz") else content, ETag='"1"')
    documents = prepare(data(f"{web}/{name}"))
    assert documents.counts["read"] == {"s": 60}
    assert total_bytes(Source(name="s", path=f"{web}/{name}")) > 0


def test_parquet_of_a_web_server_that_knows_no_ranges(web: str, serve: Callable[..., None], prepare: Prepare) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [text(n) for n in range(60)]}), sink)
    serve("a.parquet", sink.getvalue().to_pybytes(), ETag='"1"')
    assert prepare(data(f"{web}/a.parquet", format="parquet")).counts["read"] == {"s": 60}


@pytest.mark.parametrize(
    ("headers", "reads"),
    [
        ({"ETag": '"1"'}, 1),
        ({"Last_Modified": formatdate(0, usegmt=True)}, 1),
        ({"ETag": 'W/"1"'}, 2),  # a weak one promises the meaning, not the bytes
        ({}, 2),
    ],
)
def test_what_a_server_tells_decides_whether_a_file_is_read_again(
    web: str, serve: Callable[..., None], tmp_path: Path, headers: dict[str, str], reads: int
) -> None:
    serve("a.jsonl", b"one", **headers)
    for _ in range(2):
        cache = DigestCache(tmp_path / "digests.json")
        files_by_digest(f"{web}/a.jsonl", "s", cache)
        cache.save()
    assert Handler.sent["/a.jsonl"] == reads


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing.jsonl", "404"),
        ("secret.jsonl", "403"),
        ("*.jsonl", "names no single file, and web servers list none: give a source per file"),
        ("folder/", "names no single file"),
    ],
)
def test_what_a_web_server_does_not_give(web: str, serve: Callable[..., None], name: str, words: str) -> None:
    with pytest.raises(DataError) as refused:
        find_files(f"{web}/{name}", field="source s")
    assert str(refused.value).startswith("source s: ")
    assert words in str(refused.value)


def test_an_answer_that_is_cut_off_stops_and_is_never_set_aside(web: str, serve: Callable[..., None]) -> None:
    """A connection that breaks says nothing about the data."""
    serve("cut.jsonl", lines(0, 5_000), ETag='"1"')
    with pytest.raises(DataError, match=r"cannot read on in .*cut\.jsonl"), open_bytes(f"{web}/cut.jsonl") as file:
        list(file)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(DataError, match=r"source s: cannot read http://127\.0\.0\.1:9/a\.jsonl"):
        find_files("http://127.0.0.1:9/a.jsonl", field="source s")


def test_a_file_that_changes_at_its_address_is_noticed(
    put: Callable[[str, bytes], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fmcore.data import prepare as module

    put("changing/a.jsonl", lines(0, 60))
    original = module._prepare_text

    def changing(*args: Any) -> Any:
        fields = original(*args)
        put("changing/a.jsonl", lines(1, 60))
        return fields

    monkeypatch.setattr(module, "_prepare_text", changing)
    what, store = data("s3://data/changing"), Store(tmp_path / "home")
    with pytest.raises(DataError, match="have changed while they were read"):
        prepare_documents(documents_step("x", what, None, store.digests), what, None, store)


# ---- local files that cannot be read


@pytest.mark.parametrize("what", ["file", "folder"])
def test_an_unreadable_file_or_folder_stops(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "a.txt" if what == "file" else folder).chmod(0)
    message = message_of_nobody(folder)
    assert message.startswith("source s: cannot read")
    assert message.endswith("Permission denied")


NOBODY = """
import os, sys
from pathlib import Path
from fmcore.artifacts.files import DigestCache
from fmcore.data.files import files_by_digest
from fmcore.errors import DataError
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    files_by_digest(sys.argv[1], "s", DigestCache(Path("digests.json")))
except DataError as error:
    print(error, end="")
"""


def message_of_nobody(folder: Path) -> str:
    """What a process without root's rights is told."""
    for parent in [p for p in folder.parents if p.stat().st_uid == os.geteuid() and len(p.parts) > 2]:
        parent.chmod(parent.stat().st_mode | 0o055)  # pytest's own folders are root's alone
    done = subprocess.run([sys.executable, "-P", "-c", NOBODY, str(folder)], capture_output=True, text=True, check=True)
    return done.stdout
