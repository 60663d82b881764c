"""Looks at a model from outside, a local transformers folder or a hub name, before it is imported.

What is looked at are names, JSON and safetensors headers; no weights are loaded and torch is not needed, so that
a plan knows what an import would make. Whether the model computes what we train is seen by the import itself.
"""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from safetensors import SafetensorError, safe_open

from fmcore.artifacts.files import DigestCache, canonical_json, sha256_text
from fmcore.errors import RecipeError, UnknownModelError
from fmcore.recipes.parents import Folder, HubName, base_name
from fmcore.tokens.tokenize import TOKENIZER_FILES

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
CAUSAL = ("ForCausalLM", "LMHeadModel")  # how transformers names the classes that predict the next token
EXTRAS = (
    "generation_config.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
    "LICENSE*", "LICENCE*", "NOTICE*", "README.md",
)  # fmt: skip
HUB_PATTERNS = [CONFIG, "model*.safetensors", INDEX, *TOKENIZER_FILES, *EXTRAS]
HEAD_BYTES = 64 << 10  # of a README, in which its licence stands
UNKNOWN_LICENCE = "unknown"


class NotDownloadedError(UnknownModelError):
    """A hub name whose files are not on this machine yet; planning does not fetch them."""


class Origin(BaseModel):
    """Where an imported model came from. place: a folder's path or a hub name; digest: sha256 of what counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["folder", "hub"]
    place: str
    revision: str
    licence: str
    digest: str

    @property
    def shown(self) -> str:
        """The folder's path, or `org/name@revision`."""
        return f"{self.place}@{self.revision}" if self.revision else self.place


class Outside(BaseModel):
    """A model folder from outside that looks like one we can import.

    name: what it is registered as. digests: sha256 of each file that makes the model: weights, config, tokenizer.
    extras: files that are copied with them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    kind: Literal["folder", "hub"]
    place: str
    revision: str
    folder: Path
    config: dict[str, Any]
    digests: dict[str, str]
    extras: tuple[str, ...]
    num_parameters: int

    @cached_property
    def digest(self) -> str:
        """One sha256 over weights, config and tokenizer: the model, wherever it lies."""
        return sha256_text(canonical_json(self.digests))

    @property
    def origin(self) -> Origin:
        """What is kept about where it came from."""
        licence = find_licence(self.folder)
        return Origin(kind=self.kind, place=self.place, revision=self.revision, licence=licence, digest=self.digest)


def look_at(parent: Folder | HubName, digests: DigestCache) -> Outside:
    """What would be imported. Raises UnknownModelError or RecipeError, saying which file is wrong and what to do."""
    folder = parent.path.absolute() if isinstance(parent, Folder) else _downloaded(parent)
    place = str(folder) if isinstance(parent, Folder) else parent.repo
    config = _read_config(folder)
    _check_config(folder, config)
    weights, num_parameters = _read_weights(folder)
    tokenizer = _tokenizer_files(folder)
    found = {name: digests.sha256(folder / name) for name in (CONFIG, *weights, *tokenizer)}
    digests.save()
    extras = sorted({p.name for pattern in EXTRAS for p in folder.glob(pattern) if p.is_file()} - found.keys())
    return Outside(
        name=base_name(place), kind="folder" if isinstance(parent, Folder) else "hub", place=place,
        revision="" if isinstance(parent, Folder) else folder.name, folder=folder, config=config, digests=found,
        extras=tuple(extras), num_parameters=num_parameters,
    )  # fmt: skip


def fetch(parent: HubName) -> Path:
    """Download a hub model's safetensors, config and tokenizer into the hub's own cache, or find them there.

    Returns the snapshot's folder, whose name is the commit. Raises UnknownModelError.
    """
    return _snapshot(parent, local_files_only=False)


def _downloaded(parent: HubName) -> Path:
    try:
        return _snapshot(parent, local_files_only=True)
    except UnknownModelError as error:
        raise NotDownloadedError(
            f"parent: {parent.shown} is read as a name of the Hugging Face hub, and is not downloaded yet: what it "
            f"would be imported as is known after `strata run` has fetched it. There is no folder of that name "
            f"beside the recipe."
        ) from error


def _snapshot(parent: HubName, *, local_files_only: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = huggingface_hub.snapshot_download(
            parent.repo, revision=parent.revision or None, allow_patterns=HUB_PATTERNS,
            local_files_only=local_files_only,
        )  # fmt: skip
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UnknownModelError(
            f"parent: {parent.shown} could not be fetched from the Hugging Face hub: {type(error).__name__}: {reason}. "
            f"Check the name and the network (a private or gated model needs HF_TOKEN), or give a local folder in "
            f"transformers' format, as in parent: ./{base_name(parent.repo)}"
        ) from error
    return Path(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UnknownModelError(
            f"parent: the folder {folder} {what}; expected a folder in transformers' format "
            f"({CONFIG}, {WEIGHTS}, tokenizer.json). Relative folders are read from the recipe's folder"
        )
    if not (folder / CONFIG).is_file():
        if (folder / "adapter_config.json").is_file():
            raise RecipeError(
                f"parent: {folder} holds a peft adapter without its base; merge it first (peft: merge_and_unload, "
                f"then save_pretrained), and give the merged folder"
            )
        raise RecipeError(f"parent: {folder} is no folder in transformers' format: {CONFIG} is missing")
    config = _read_object(folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise RecipeError(f"parent: {folder / CONFIG} names no model_type; it is no config of transformers")
    return config


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"parent: {path} is no JSON file: {error}") from error
    if not isinstance(value, dict):
        raise RecipeError(f"parent: {path} is no JSON object")
    return value


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    classes = config.get("architectures") or []
    if config.get("is_encoder_decoder"):
        raise RecipeError(
            f"parent: {folder} is an encoder-decoder ({config['model_type']}); expected a causal language model, which "
            f"predicts the next token"
        )
    if classes and not str(classes[0]).endswith(CAUSAL):
        raise RecipeError(
            f"parent: {folder} holds a {classes[0]}; expected a causal language model ({' or '.join(CAUSAL)} at the "
            f"end of `architectures` in {CONFIG})"
        )
    if config.get("quantization_config"):
        raise RecipeError(f"parent: the weights in {folder} are quantized, which cannot be trained; give the original")


def _read_weights(folder: Path) -> tuple[list[str], int]:
    """(the names of the weight files, index included; how many parameters they hold), from their headers."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS], sum(_shapes(folder / WEIGHTS).values())
    if not (folder / INDEX).is_file():
        raise RecipeError(_no_weights(folder))
    places = _read_object(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise RecipeError(f"parent: {folder / INDEX} has no weight_map")
    shards = {name: _shard(folder, name) for name in sorted(set(places.values()))}
    lost = sorted(tensor for tensor, name in places.items() if tensor not in shards[name])
    if lost:
        raise RecipeError(f"parent: {folder / places[lost[0]]} lacks the tensor {lost[0]} that {INDEX} says it holds")
    return [INDEX, *shards], sum(sum(shapes.values()) for shapes in shards.values())


def _shard(folder: Path, name: str) -> dict[str, int]:
    if Path(name).name != name:
        raise RecipeError(f"parent: {folder / INDEX} names {name!r}, which is no file of that folder")
    if not (folder / name).is_file():
        raise RecipeError(f"parent: {folder / INDEX} names {name}, which is missing; download it again")
    return _shapes(folder / name)


def _shapes(path: Path) -> dict[str, int]:
    """Tensor -> its number of values."""
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: _product(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"parent: {path} is damaged or cut short ({error}); download or save it again") from error


def _product(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _no_weights(folder: Path) -> str:
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if not pickled:
        return f"parent: {folder} holds no weights: {WEIGHTS} (or {INDEX}) is missing"
    return (
        f"parent: {folder} holds its weights as pickle alone ({pickled[0]}), which can run code when it is read and is "
        f'never opened here. Where you trust it, convert it once: python -c "from transformers import '
        f"AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )


def _tokenizer_files(folder: Path) -> list[str]:
    if not (folder / "tokenizer.json").is_file():
        raise RecipeError(
            f'parent: {folder} has no tokenizer.json, the form of a fast tokenizer; make one with: python -c "from '
            f"transformers import AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()]


def find_licence(folder: Path) -> str:
    """The licence a model card names, else the title of a licence file, else `unknown`."""
    if named := _licence_of_card(folder / "README.md"):
        return named
    for path in sorted(p for pattern in ("LICENSE*", "LICENCE*") for p in folder.glob(pattern)):
        lines = path.read_text(encoding="utf-8", errors="replace")[:HEAD_BYTES].splitlines()
        title = next((line.strip() for line in lines if line.strip()), "")
        return f"{title[:80]} ({path.name})" if title else path.name
    return UNKNOWN_LICENCE


def _licence_of_card(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        head = re.match(r"---\s*\n(.*?)\n---", file.read(HEAD_BYTES), re.DOTALL)
    try:
        fields = YAML(typ="safe").load(head[1]) if head else None
    except (YAMLError, ValueError):
        return ""  # a card is for people; a broken one names no licence
    if not isinstance(fields, dict):
        return ""
    given = [str(fields[key]) for key in ("license", "license_name") if isinstance(fields.get(key), str)]
    return ": ".join(given) if given and given[0] == "other" else "".join(given[:1])


def max_positions(config: dict[str, Any]) -> int:
    """The longest context a config declares, in tokens; 0 where it declares none."""
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
    found: Iterator[Any] = (config.get(name) for name in names)
    return next((int(value) for value in found if isinstance(value, int)), 0)


def has_learned_positions(config: dict[str, Any]) -> bool:
    """Whether positions past the declared context have no embedding at all: no rotary field is named."""
    return max_positions(config) > 0 and not any(name.startswith(("rope", "rotary")) for name in config)
