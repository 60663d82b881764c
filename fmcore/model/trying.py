"""The process that tries an imported model: `python -m fmcore.model.trying SPEC.json`, in its partial folder.

It opens the model as training will, and refuses what would be trained wrongly: tensors that are missing, a
tokenizer larger than the embeddings, logits that our loss would not reproduce, packed documents that leak.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from fmcore.artifacts.files import write_json
from fmcore.errors import RecipeError
from fmcore.model.build import ATTENTION, check_supported
from fmcore.process.guard import Heartbeat, Stop, run_main
from fmcore.tokens.bpe import load_tokenizer


def main(path: Path) -> bool:
    """Try the model in `final/` beside the spec; False if stopped."""
    stop, heartbeat = Stop(), Heartbeat(path.parent)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = path.parent / "final"
    model = open_imported(folder)
    heartbeat.beat()
    if stop.requested:
        return False
    largest = max(load_tokenizer(folder).get_vocab().values())
    rows = model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise RecipeError(
            f"parent: its tokenizer has ids up to {largest}, but its embeddings have {rows} rows; "
            f"resize them (resize_token_embeddings) or give the tokenizer that the model was trained with"
        )
    write_json(path.parent / "summary.json", {"num_parameters": sum(p.numel() for p in model.parameters())})
    return True


def open_imported(folder: Path) -> PreTrainedModel:
    """Open the model and check that it is whole, and one that we train rightly. Raises RecipeError."""
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(str(folder), **options)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise RecipeError(f"parent: transformers has no causal language model for model_type {config.model_type}")
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(folder), attn_implementation=ATTENTION, dtype="float32", use_safetensors=True,
            output_loading_info=True, **options,
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, OSError, RuntimeError, ImportError) as error:
        raise RecipeError(f"parent: transformers cannot open it: {_in_short(error)}") from error
    lacking = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if lacking:
        raise RecipeError(
            f"parent: its weights lack {len(lacking)} tensors of this config's {type(model).__name__}, or hold them "
            f"in another shape: {', '.join(lacking[:3])}"
        )
    return check_supported(model)


def _in_short(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it needs code of its own (trust_remote_code), which is never run here"
    return " ".join(str(error).split())[:500]


if __name__ == "__main__":
    run_main(main)
