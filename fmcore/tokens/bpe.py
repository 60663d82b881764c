"""Byte-level BPE: trained with `tokenizers`, or loaded; saved in transformers' format with a chat template."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fmcore.artifacts.files import read_json
from fmcore.errors import DataError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
NUM_SPARE = 32  # for modalities and roles to come, so that a vocabulary need not grow
RESERVED = [BOS, EOS, PAD, IM_START, IM_END, *(f"<|spare_{i}|>" for i in range(NUM_SPARE))]

# Turns end with eos, which pretraining has taught the model to end on.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# For a tokenizer without im_start: roles as plain text, since a token it lacks would be an untrained row.
PLAIN_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("<|im_start|>assistant", "### assistant").replace(
    "'<|im_start|>' + message['role']", "'### ' + message['role']"
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` entries, 37 reserved ids and 256 bytes included."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=RESERVED,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        additional_special_tokens=[IM_START, IM_END], chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Open a tokenizer in transformers' format; one without a chat template gets ours.

    Raises DataError where there is none, or none with an eos token and in the fast form.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no tokenizer in transformers' format: {error}") from error
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise DataError(f"the tokenizer in {folder} needs an eos token and a fast (tokenizer.json) form")
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE if IM_START in tokenizer.get_vocab() else PLAIN_CHAT_TEMPLATE
    return tokenizer


def brings_chat_template(folder: Path) -> bool:
    """Whether a saved tokenizer has a chat template of its own; knows no more than the files say."""
    if (folder / "chat_template.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(read_json(config).get("chat_template"))


def start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id every document starts with: bos, or eos where a tokenizer has no bos."""
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


class Encoder:
    """Text -> ids without special tokens; `<|im_end|>` and the like in a text stay plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._raw = RawTokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._raw.encode_special_tokens = True
        self._raw.no_truncation()  # a saved tokenizer may have either set
        self._raw.no_padding()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [e.ids for e in self._raw.encode_batch_fast(texts, add_special_tokens=False)]
