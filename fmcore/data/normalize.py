"""One spelling per text, and the id that follows from it."""

import hashlib
import unicodedata

ID_HEX_DIGITS = 32  # 128 bits: no two documents of a corpus meet by chance


def normalize(text: str) -> str:
    """Unicode NFC, \\n line ends, no byte-order mark, no blanks around the text."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")
    return unicodedata.normalize("NFC", text).strip()


def content_id(content: str) -> str:
    """A document's id: the first 32 hex digits of the sha256 of its normalised content."""
    # surrogates cannot be encoded; JSON allows them escaped, so they are replaced rather than refused
    return hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()[:ID_HEX_DIGITS]


def encodable(content: str) -> bool:
    """Whether the text has a UTF-8 form at all (a lone surrogate, as JSON can escape it, has none)."""
    try:
        content.encode()
    except UnicodeEncodeError:
        return False
    return True
