"""Takes credentials out of text before it is shown, logged or kept.

Two kinds: what stands in an address as user info or secret query value, and the values of this process's own
secret environment variables, wherever they turn up. Known to be imperfect where a secret is an ordinary word.
"""

import io
import logging
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TextIO

_TELLTALES = r"password|passwd|token(?!s|iz)|secret|api_?key|access_?key|signature|credential"
_USER_INFO = re.compile(r"(?<=://)[^/\s'\"]*@")
_SECRET_QUERY = re.compile(rf"(?<=[?&])([\w.-]*(?:{_TELLTALES}|\bsig\b)[\w.-]*=)[^&\s'\"]+", re.IGNORECASE)
# user:password@ in any address, and a bare token@ where there is no such thing as a user
_GIVEN_USER_INFO = re.compile(r"://[^/\s@]*:[^/\s]*@|(?:https?|s3)://[^/\s]*@", re.IGNORECASE)
_SECRET_NAME = re.compile(rf"{_TELLTALES}|auth_string|private_?key", re.IGNORECASE)
_NO_SECRET_NAME = re.compile(r"_(path|file|dir|uri|url)$", re.IGNORECASE)
_PASSWORD = re.compile(r"://([^/\s@:]*):([^/\s]*)@")
MIN_CHARACTERS = 8
# A shorter one of lower-case letters alone may be a word ("postgres"), and texts would lose it everywhere.
MIN_CHARACTERS_OF_A_WORD = 16


def without_credentials(text: str) -> str:
    """The text without user info and secret query values of addresses, and without this process's own secrets."""
    text = _SECRET_QUERY.sub(r"\1***", _USER_INFO.sub("", text))
    pattern = _pattern(tuple(sorted(set(_secrets(os.environ)))))
    return pattern.sub("***", text) if pattern else text


def holds_credentials(address: str) -> bool:
    """Whether an address carries a password, a token or a secret query value."""
    return bool(_GIVEN_USER_INFO.search(address) or _SECRET_QUERY.search(address))


def _secrets(environment: Mapping[str, str]) -> Iterator[str]:
    for name, value in environment.items():
        found = [part for match in _PASSWORD.finditer(value) for part in match.groups()[1:]]
        if _SECRET_NAME.search(name) and not _NO_SECRET_NAME.search(name):
            found += [value, value.rpartition(":")[2]]
        yield from (secret for secret in found if _is_telling(secret))


def _is_telling(secret: str) -> bool:
    is_word = secret.isalpha() and secret.islower()
    return len(secret) >= (MIN_CHARACTERS_OF_A_WORD if is_word else MIN_CHARACTERS)


@cache
def _pattern(secrets: tuple[str, ...]) -> re.Pattern[str] | None:
    longest_first = sorted(secrets, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if secrets else None


class Redacted(io.TextIOBase):
    """A stream that passes whole lines on without credentials."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line = ""

    def write(self, text: str) -> int:
        """Take text; what ends in a newline is passed on."""
        lines, newline, self._line = (self._line + text).rpartition("\n")
        if newline:
            self._stream.write(without_credentials(lines + newline))
        return len(text)

    def flush(self) -> None:
        """Pass on what there is."""
        rest, self._line = self._line, ""
        self._stream.write(without_credentials(rest))
        self._stream.flush()

    def fileno(self) -> int:
        """The descriptor beneath, for what writes past us."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding beneath."""
        return self._stream.encoding


def redact_logs() -> None:
    """Every log record of this process, from whatever library, loses the credentials in it; may be called again."""
    before = logging.getLogRecordFactory()
    if getattr(before, "redacts", False):
        return

    def factory(*given: Any, **named: Any) -> logging.LogRecord:
        record = before(*given, **named)
        message = record.getMessage()
        if (shown := without_credentials(message)) != message:
            record.msg, record.args = shown, None
        if record.exc_info and record.exc_info[1] is not None:
            text = "".join(traceback.format_exception(record.exc_info[1])).rstrip("\n")
            if (shown := without_credentials(text)) != text:
                record.exc_text = shown  # which a formatter takes instead of making its own
        return record

    factory.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(factory)
