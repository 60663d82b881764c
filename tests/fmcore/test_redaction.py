import io
import logging
from collections.abc import Iterator

import pytest

from fmcore.errors import DataError, StrataError
from fmcore.recipes.load import parse_recipe
from fmcore.redaction import Redacted, holds_credentials, redact_logs, without_credentials

SECRET = "Zx9-planted-4711"


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MY_DB_PASSWORD", "PREFECT_API_KEY"])
def test_the_values_of_secret_variables_are_taken_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert without_credentials(f"it is {SECRET}!") == f"it is {SECRET}!"
    monkeypatch.setenv(name, SECRET)
    assert without_credentials(f"it is {SECRET}!") == "it is ***!"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PREFECT_API_AUTH_STRING", f"admin:{SECRET}"),
        ("DATABASE", f"postgresql://me:{SECRET}@db/x"),
        ("https_proxy", f"http://me:{SECRET}@proxy:3128"),
    ],
)
def test_passwords_inside_values_are_taken_out(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert SECRET not in without_credentials(f"the password {SECRET} in {value}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("POSTGRES_PASSWORD", "postgres"),
        ("TOKENIZERS_PARALLELISM", "false-and-nothing-else-1"),
        ("HF_TOKEN_PATH", "/home/me/.token-1"),
        ("EDITOR", "vi-of-4711-lines"),
    ],
)
def test_words_and_paths_stay(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert without_credentials(f"about {value}") == f"about {value}"


def test_a_value_of_an_address_is_taken_out_by_its_name() -> None:
    text = "GET https://b.s3/x?X-Amz-Signature=abc&X-Amz-Security-Token=d%2F&max_tokens=5&part=2 failed"
    assert without_credentials(text) == (
        "GET https://b.s3/x?X-Amz-Signature=***&X-Amz-Security-Token=***&max_tokens=5&part=2 failed"
    )


def test_our_errors_carry_none() -> None:
    error = DataError("https://me:pw@host/x cannot be read")
    assert str(error) == "https://host/x cannot be read"
    assert StrataError().args == ()


@pytest.mark.parametrize(
    ("address", "holds"),
    [
        ("http://me:pw@host", True),
        ("https://token@host", True),
        ("s3://KEY:SECRET@bucket/x", True),
        ("https://bucket/x?X-Amz-Signature=1", True),
        ("postgresql://me:pw@db/x", True),
        ("sftp://me@host/x", False),
        ("s3://bucket/a@b/*.gz", False),
        ("/data/a:b@c", False),
        ("https://host/x?part=1&max_tokens=2", False),
    ],
)
def test_which_addresses_hold_credentials(address: str, holds: bool) -> None:
    assert holds_credentials(address) is holds


RECIPES = {
    "data.sources.0.path": {"kind": "pretrain", "data": {"sources": [{"name": "x", "path": "s3://K:{}@b/x"}]}},
    "tokenizer.path": {
        "kind": "pretrain", "data": {"sources": [{"name": "x", "path": "x"}]},
        "tokenizer": {"path": "https://me:{}@host/t"},
    },
    "data.tasks.0.eval_path": {
        "kind": "finetune", "parent": "x/1",
        "data": {"tasks": [{"name": "x", "path": "x", "eval_path": "https://h/x?token={}"}]},
    },
    "parent": {"kind": "finetune", "parent": "https://{}@hub/x", "data": {"tasks": [{"name": "x", "path": "x"}]}},
    "execution.tracking_uri": {
        "kind": "pretrain", "data": {"sources": [{"name": "x", "path": "x"}]},
        "execution": {"tracking_uri": "http://me:{}@mlflow:5000"},
    },
}  # fmt: skip


def filled(value: object) -> object:
    if isinstance(value, dict):
        return {key: filled(child) for key, child in value.items()}
    if isinstance(value, list):
        return [filled(child) for child in value]
    return value.format(SECRET) if isinstance(value, str) else value


@pytest.mark.parametrize("place", RECIPES)
def test_a_recipe_takes_no_credentials(place: str) -> None:
    with pytest.raises(StrataError) as caught:
        parse_recipe({"name": "x", **filled(RECIPES[place])})
    message = str(caught.value)
    assert f"{place}: the address holds credentials" in message
    assert ("MLFLOW_TRACKING_PASSWORD" in message) is (place == "execution.tracking_uri")
    assert ("AWS_SECRET_ACCESS_KEY" in message) is ("s3://" in str(RECIPES[place]))
    assert SECRET not in message
    assert caught.value.exit_code == 2


def test_a_stream_passes_on_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    sink = io.StringIO()
    stream = Redacted(sink)
    print("one", end="", file=stream)
    assert sink.getvalue() == ""
    print(f" {SECRET[:5]}", end="", file=stream)
    print(f"{SECRET[5:]}\nrest", end="", file=stream, flush=True)
    assert sink.getvalue() == "one ***\nrest"


@pytest.fixture
def logs() -> Iterator[io.StringIO]:
    before = logging.getLogRecordFactory()
    sink = io.StringIO()
    handler = logging.StreamHandler(sink)
    logging.getLogger("test.redaction").addHandler(handler)
    redact_logs()
    yield sink
    logging.setLogRecordFactory(before)
    logging.getLogger("test.redaction").removeHandler(handler)


def test_logs_and_tracebacks_lose_them(logs: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    factory = logging.getLogRecordFactory()
    redact_logs()
    assert logging.getLogRecordFactory() is factory
    logger = logging.getLogger("test.redaction")
    try:
        try:
            raise OSError(f"http://me:pw@host refused {SECRET}")
        except OSError as error:
            raise RuntimeError("later") from error
    except RuntimeError:
        logger.exception("with %s and %d", SECRET, 5)
    shown = logs.getvalue()
    assert "with *** and 5" in shown
    assert "OSError: http://host refused ***" in shown
    assert "RuntimeError: later" in shown
    assert SECRET not in shown
