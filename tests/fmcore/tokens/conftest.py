import pytest
from transformers import PreTrainedTokenizerBase

from fmcore.tokens.bpe import train_bpe

CORPUS = [
    f"The {noun} of the castle asked the {other} for bread, a horse and {number} songs."
    for number, (noun, other) in enumerate(
        (noun, other) for noun in ("king", "queen", "sailor", "ghost") for other in ("knight", "miller", "bishop")
    )
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """400 entries, trained on twelve sentences."""
    return train_bpe(CORPUS, 400)
