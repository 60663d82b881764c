"""Filters: each keeps a document (None) or drops it with a reason.

The repetition measures are those of Gopher (Rae et al. 2021, arXiv 2112.11446, table A1).
"""

from collections import Counter

from fmcore.data.normalize import encodable
from fmcore.recipes.fields import Filters

NGRAM_WORDS = 4
MIN_WORDS = 50  # below this a share of the text says nothing about repetition


def drop_reason(content: str, filters: Filters) -> str | None:
    """The first filter's reason against a normalised document, or None to keep it."""
    if not content:
        return "empty"
    if not encodable(content):
        return "not_unicode"
    if len(content) < filters.min_chars:
        return "too_short"
    if len(content) > filters.max_chars:
        return "too_long"
    words = content.split()
    if len(words) < MIN_WORDS:
        return None
    if duplicate_line_share(content) > filters.max_duplicate_lines:
        return "repeated_lines"
    if top_ngram_share(words) > filters.max_top_ngram:
        return "repeated_ngram"
    return None


def duplicate_line_share(content: str) -> float:
    """Share of the characters that stand in lines which occurred before; blank lines do not count."""
    lines = [line.strip() for line in content.split("\n") if line.strip()]
    total = sum(map(len, lines))
    seen: set[str] = set()
    repeated = 0
    for line in lines:
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return repeated / total if total else 0.0


def top_ngram_share(words: list[str]) -> float:
    """Share of the characters covered by the most frequent sequence of 4 words, if it occurs twice."""
    counts = Counter(zip(*(words[i:] for i in range(NGRAM_WORDS)), strict=False))
    if not counts:
        return 0.0
    ngram, count = counts.most_common(1)[0]
    return count * sum(map(len, ngram)) / sum(map(len, words)) if count > 1 else 0.0
