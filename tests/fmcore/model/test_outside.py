"""What is no model to import is told at a look: which file, what is wrong, what to do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fmcore.artifacts.files import DigestCache
from fmcore.errors import RecipeError, UnknownModelError, UserInputError
from fmcore.model.outside import NotDownloadedError, fetch, find_licence, look_at
from fmcore.recipes.parents import Folder, HubName


@pytest.fixture
def folder(outside_folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(outside_folders["llama"], tmp_path / "mine"))


@pytest.fixture
def digests(tmp_path: Path) -> DigestCache:
    return DigestCache(tmp_path / "cache.json")


def told(folder: Path, digests: DigestCache) -> str:
    with pytest.raises(UserInputError) as caught:
        look_at(Folder(folder), digests)
    return str(caught.value)


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def test_a_good_one(folder: Path, digests: DigestCache) -> None:
    found = look_at(Folder(folder), digests)
    assert (found.name, found.kind, found.place) == ("mine", "folder", str(folder))
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= found.digests.keys()
    assert "README.md" in found.extras
    assert found.num_parameters > 10_000


def test_a_missing_folder_and_a_file(tmp_path: Path, digests: DigestCache) -> None:
    with pytest.raises(UnknownModelError, match="does not exist"):
        look_at(Folder(tmp_path / "nowhere"), digests)
    (tmp_path / "file").touch()
    assert "is a file" in told(tmp_path / "file", digests)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", ["config.json is missing"]),
        ("model.safetensors", ["holds no weights", "model.safetensors"]),
        ("tokenizer.json", ["no tokenizer.json", "save_pretrained"]),
    ],
)
def test_a_missing_file_is_named(folder: Path, digests: DigestCache, missing: str, words: list[str]) -> None:
    (folder / missing).unlink()
    message = told(folder, digests)
    assert all(word in message for word in words), message


def test_pickled_weights_are_not_opened(folder: Path, digests: DigestCache) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = told(folder, digests)
    assert "pickle" in message
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_an_adapter_alone(tmp_path: Path, digests: DigestCache) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    assert "merge it first" in told(tmp_path / "a", digests)


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_truncated_weights(folder: Path, digests: DigestCache, keep: int) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    assert "model.safetensors is damaged or cut short" in told(folder, digests)


@pytest.mark.parametrize("text", ["", "not json", "[1]", '{"vocab_size": 3}', "[" * 100_000])
def test_a_broken_config(folder: Path, digests: DigestCache, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in told(folder, digests)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "causal language model"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_what_is_no_causal_language_model(
    folder: Path, digests: DigestCache, fields: dict[str, Any], words: str
) -> None:
    change(folder, **fields)
    assert words in told(folder, digests)


def sharded(folder: Path) -> dict[str, str]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(str(folder), max_shard_size="40KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return dict(index["weight_map"])


def test_shards(folder: Path, digests: DigestCache) -> None:
    whole = look_at(Folder(folder), digests).num_parameters
    places = sharded(folder)
    found = look_at(Folder(folder), digests)
    assert set(places.values()) <= found.digests.keys()
    assert len(set(places.values())) > 1
    assert found.num_parameters == whole


def test_shards_that_do_not_fit_their_index(folder: Path, digests: DigestCache) -> None:
    places = sharded(folder)
    index = folder / "model.safetensors.index.json"
    tensor, shard = sorted(places.items())[0]
    index.write_text(json.dumps({"weight_map": {**places, "model.extra.weight": shard}}))
    assert "lacks the tensor model.extra.weight" in told(folder, digests)
    index.write_text(json.dumps({"weight_map": {**places, tensor: "../elsewhere.safetensors"}}))
    assert "no file of that folder" in told(folder, digests)
    index.write_text(json.dumps({"weight_map": places}))
    (folder / shard).unlink()
    assert f"names {shard}, which is missing" in told(folder, digests)


def test_the_hub_without_a_network(digests: DigestCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(NotDownloadedError, match="not downloaded yet"):
        look_at(HubName("someone/nothing", ""), digests)
    with pytest.raises(UnknownModelError, match="or give a local folder"):
        fetch(HubName("someone/nothing", "v1"))


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlicense: mit\n---\n"}, "mit"),
        ({"README.md": "---\nlicense: other\nlicense_name: house\n---\n"}, "other: house"),
        ({"README.md": "# no front matter", "LICENSE": "\n  Apache License  \nVersion 2"}, "Apache License (LICENSE)"),
        ({"README.md": "---\nlicense: [\n---\n"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_licences(tmp_path: Path, files: dict[str, str], licence: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert find_licence(tmp_path) == licence


def test_a_look_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fmcore.artifacts.files import DigestCache\n"
        "from fmcore.model.outside import look_at; from fmcore.recipes.parents import Folder\n"
        f"look_at(Folder(Path({str(folder)!r})), DigestCache(Path('unused.json')))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=folder, check=True)
    assert done.stdout.strip() == "False"


def test_too_little_is_a_recipe_error(folder: Path, digests: DigestCache) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RecipeError):
        look_at(Folder(folder), digests)
