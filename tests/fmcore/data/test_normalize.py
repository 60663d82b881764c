"""One spelling and one id per text."""

import hashlib
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmcore.data.normalize import content_id, encodable, normalize


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (unicodedata.normalize("NFC", "café Å 한국"), unicodedata.normalize("NFD", "café Å 한국")),
        ("one\ntwo", "one\r\ntwo"),
        ("one\ntwo", "one\rtwo"),
        ("one", "\ufeffone"),
        ("one", " \n\tone\n\n"),
    ],
)
def test_one_text_in_two_spellings_is_one_document(one: str, other: str) -> None:
    assert one != other
    assert normalize(one) == normalize(other)


@pytest.mark.parametrize(("one", "other"), [("one two", "one  two"), ("One", "one"), ("ﬁ", "fi"), ("a\nb", "a\n\nb")])
def test_two_texts_stay_two(one: str, other: str) -> None:
    assert content_id(normalize(one)) != content_id(normalize(other))


@settings(deadline=None)
@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once


def test_an_id_is_128_bits_of_sha256() -> None:
    assert content_id("ü") == hashlib.sha256("ü".encode()).hexdigest()[:32]


def test_a_lone_surrogate_has_an_id_but_no_utf_8() -> None:
    assert encodable("ü😀")
    assert not encodable("a\ud800")
    assert len(content_id("a\ud800")) == 32
