import pytest
from transformers import PreTrainedTokenizerBase

from fmcore.tokens.bpe import train_bpe

CORPUS = [
    f"The {noun} of the castle asked the {other} for bread, a horse and {number} songs."
    for number, (noun, other) in enumerate(
        (noun, other)
        for noun in ("king", "queen", "sailor", "ghost", "shepherd")
        for other in ("knight", "miller", "bishop", "gardener")
    )
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """350 entries, trained on twenty sentences."""
    return train_bpe(CORPUS, 350)
