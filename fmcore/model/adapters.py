"""LoRA through peft: put on, and saved in peft's own format."""

from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fmcore.errors import RecipeError
from fmcore.recipes.fields import Lora


def add_lora(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """Freeze the model and put trainable low-rank adapters on it; the result equals the base at first."""
    targets: str | list[str] = lora.target_modules
    if targets != "all-linear":
        targets = [name.strip() for name in lora.target_modules.split(",")]
        heads = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
        if any(f".{head}".endswith(f".{target}") for head in heads for target in targets):
            raise RecipeError(
                f"lora.target_modules: {heads[0]}, the output head, cannot have an adapter, for the loss is computed "
                f"in chunks from the head's own weight; leave it out (all-linear does)"
            )
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout, target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 keeps W transposed
    )  # fmt: skip
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(f"lora.target_modules: {error}") from error


def save_adapter(model: PeftModel, folder: Path, base: str, revision: str | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    base: the base's name and version here, or its hub name with the revision, which peft alone can fetch.
    """
    model.peft_config["default"].base_model_name_or_path = base
    model.peft_config["default"].revision = revision
    # without False peft asks the hub for the base's config, to see whether the embeddings have grown
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    readme = folder / "README.md"
    readme.unlink(missing_ok=True)  # peft's template is empty; the version has a card of its own
