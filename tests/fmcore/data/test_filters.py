"""Filters keep a document or say why not."""

import pytest

from fmcore.data.filters import drop_reason, duplicate_line_share, top_ngram_share
from fmcore.recipes.fields import Filters

WORDS = [f"word{number}" for number in range(60)]
CHANT = " ".join(["all work and no"] * 6 + WORDS[:30])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "empty"),
        ("a\ud800" * 20, "not_unicode"),
        ("x" * 19, "too_short"),
        ("x" * 20, None),
        ("x" * 100, None),
        ("x" * 101, "too_long"),
    ],
)
def test_lengths(content: str, reason: str | None) -> None:
    assert drop_reason(content, Filters(min_chars=20, max_chars=100)) == reason


def test_repetition() -> None:
    assert drop_reason(" ".join(WORDS), Filters()) is None
    lines = "\n".join(f"a{number} b{number} c{number}" for number in range(20))
    assert drop_reason(lines, Filters()) is None
    assert drop_reason(lines + "\n" + lines, Filters()) == "repeated_lines"
    assert drop_reason(CHANT, Filters()) == "repeated_ngram"


def test_short_texts_may_repeat() -> None:
    assert drop_reason("\n".join(["to be or not to be"] * 8), Filters()) is None  # 48 words
    assert drop_reason("\n".join(["to be or not to be"] * 9), Filters()) == "repeated_lines"  # 54


@pytest.mark.parametrize(
    ("setting", "content", "reason"),
    [
        ({"min_chars": 0}, "x", "too_short"),
        ({"max_chars": 6_000_000}, "x" * 5_000_001, "too_long"),
        ({"max_duplicate_lines": 1.0}, "\n".join([*WORDS, *WORDS]), "repeated_lines"),
        ({"max_top_ngram": 1.0}, CHANT, "repeated_ngram"),
    ],
)
def test_each_setting_has_an_effect(setting: dict[str, float], content: str, reason: str) -> None:
    assert drop_reason(content, Filters()) == reason
    assert drop_reason(content, Filters(**setting)) is None


@pytest.mark.parametrize(
    ("content", "share"),
    [("ab\nab\ncdef", 0.25), ("ab\n\n\nab", 0.5), ("ab\n ab ", 0.5), ("ab\ncd", 0.0), ("", 0.0), ("a\na\na\na", 0.75)],
)
def test_the_share_of_repeated_lines(content: str, share: float) -> None:
    assert duplicate_line_share(content) == share


@pytest.mark.parametrize(
    ("text", "share"),
    [("a b c d e f g h", 0.0), ("a b c d a b c d", 1.0), ("a b c d xx a b c d xx", 8 / 12), ("a b c", 0.0), ("", 0.0)],
)
def test_the_share_of_the_most_frequent_four_words(text: str, share: float) -> None:
    assert top_ngram_share(text.split()) == pytest.approx(share)
