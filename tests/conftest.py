"""Shared by all tests: texts made by arithmetic, tiny recipes, and a home with a tiny pretrained base.

The models are as small as they can be (2 layers of 32, 400 words, context 32). Most tests run the training and
evaluation children inside the test process (`inline`), which saves the seconds that torch takes to import.
"""

import hashlib
import importlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Checkpoint, Documents, EvalReport, RegisteredModel, TokenShards
from fmcore.errors import Interrupted, StrataError
from fmcore.process.launch import Child, TrainingRefused
from fmcore.recipes.load import parse_recipe
from fmcore.workspace import Workspace

WORDS = {
    "old": "river stone castle winter sword king night horse bread song tower letter queen forest bridge candle "
    "sailor mirror garden thunder shadow crown feather village road moon silver answer promise daughter".split(),
    "new": "kernel thread packet buffer socket vector matrix tensor cursor schema branch commit module syntax "
    "pointer string float array queue stack lambda closure iterator decorator compiler linker runtime opcode".split(),
}
SMALL = " the a of and with under over near".split()


def made_text(topic: str, number: int, num_words: int = 30) -> str:
    """A text that follows from its topic and number alone, on any platform."""
    words = []
    for place in range(num_words):
        digest = hashlib.sha256(f"{topic}/{number}/{place}".encode()).digest()
        lexicon = SMALL if digest[0] < 90 else WORDS[topic]
        words.append(lexicon[int.from_bytes(digest[1:5], "big") % len(lexicon)])
    return " ".join(words)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` laid over `base`, mapping by mapping."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


class Tiny:
    """Texts, records and recipes (as mappings, which are valid recipe files as they are)."""

    execution = {"threads": 1, "device": "cpu", "save_interval_s": 30, "retries": 0}
    model = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 64,
    }  # fmt: skip
    evaluate = {"num_samples": 1, "sample_tokens": 4}
    gate = {"min_documents": 5}
    text = staticmethod(made_text)

    @staticmethod
    def corpus(folder: Path, topic: str = "old", num: int = 60, first: int = 0, name: str = "") -> Path:
        """A JSONL file of texts number `first` and following."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name or topic}.jsonl"
        rows = (json.dumps({"text": made_text(topic, i)}) for i in range(first, first + num))
        path.write_text("\n".join(rows) + "\n")
        return path

    @staticmethod
    def records(folder: Path, num: int = 90, name: str = "kinds") -> Path:
        """Prompts of which the first word tells the response, one of three of different length."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.jsonl"
        choices = ["yes", "no", "perhaps tomorrow"]
        rows = [
            {"prompt": f"{WORDS['old'][i % 3]} {made_text('old', i, 4)}?", "response": choices[i % 3]}
            for i in range(num)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def pretrain(self, path: Path, **changes: Any) -> dict[str, Any]:
        """20 steps of 256 tokens on a corpus."""
        return merged(
            {
                "kind": "pretrain",
                "name": "plays",
                "data": {"sources": [{"name": "old", "path": str(path), "format": "json"}], "holdout": 0.3},
                "tokenizer": {"vocab_size": 400},
                "model": {"config": self.model},
                "train": {"tokens": 20 * 256, "seq_len": 32, "batch_tokens": 256, "lr": 5e-3},
                "evaluate": self.evaluate,
                "gate": self.gate,
                "execution": self.execution,
            },
            changes,
        )

    def finetune(self, path: Path, **changes: Any) -> dict[str, Any]:
        """Records on the champion of plays."""
        return merged(
            {
                "kind": "finetune",
                "name": "kinds",
                "parent": "plays@champion",
                "data": {"tasks": [{"name": "kinds", "path": str(path), "holdout": 0.3}]},
                "train": {"epochs": 1, "batch_tokens": 256},
                "evaluate": self.evaluate,
                "gate": self.gate,
                "execution": self.execution,
            },
            changes,
        )

    def continued(self, path: Path, **changes: Any) -> dict[str, Any]:
        """New documents on the champion of plays."""
        return merged(
            {
                "kind": "continue-pretrain",
                "name": "weekly",
                "parent": "plays@champion",
                "data": {"sources": [{"name": "new", "path": str(path), "format": "json"}], "holdout": 0.3},
                "replay": {"fraction": 0.25},
                "train": {"epochs": 1},
                "evaluate": self.evaluate,
                "gate": self.gate,
                "execution": self.execution,
            },
            changes,
        )

    def lifecycle(self, old: Path, new: Path, records: Path, **changes: Any) -> dict[str, Any]:
        """All four stages."""
        header = ("kind", "name", "parent", "execution")

        def stage(recipe: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in recipe.items() if key not in header}

        return merged(
            {
                "kind": "lifecycle",
                "name": "life",
                "pretrain": stage(self.pretrain(old)),
                "finetune": stage(self.finetune(records)),
                "continue_pretrain": stage(self.continued(new)),
                "execution": self.execution,
            },
            changes,
        )


class OutsideModels:
    """Folders as transformers writes them, each with 2 layers of 32 and a tokenizer of 350 or so words."""

    shape = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 64, "head_dim": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    families: dict[str, dict[str, Any]] = {
        "llama": {"model_type": "llama", **shape, "tie_word_embeddings": False},
        "qwen2": {"model_type": "qwen2", **{k: v for k, v in shape.items() if k != "head_dim"}},
        "qwen3": {"model_type": "qwen3", **shape},
        "gpt2": {"model_type": "gpt2", **gpt2},
        "gemma3": {"model_type": "gemma3_text", **shape, "sliding_window": 8, "query_pre_attn_scalar": 16},
    }

    def make(self, folder: Path, family: str = "llama", *, spread: float = 0.2, **fields: Any) -> Path:
        """Random weights, of which `spread` says how much the model has to say."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        tokenizer = self.tokenizer(family)
        tokenizer.save_pretrained(str(folder))
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        config = AutoConfig.for_model(**{"vocab_size": len(tokenizer) + 3, **self.families[family], **ids, **fields})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0, spread)
        model.save_pretrained(str(folder))
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model from elsewhere\n")
        return folder

    @staticmethod
    def tokenizer(family: str) -> Any:
        """GPT-2's way for gpt2 (one control token, no template, no padding), with a turn's end of its own for qwen."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        control = ["<|endoftext|>"] if family == "gpt2" else ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=350, special_tokens=control, initial_alphabet=alphabet, show_progress=False
        )
        raw.train_from_iterator((made_text("old", number) for number in range(40)), trainer)
        if family == "gpt2":
            return PreTrainedTokenizerFast(
                tokenizer_object=raw, bos_token=control[0], eos_token=control[0], model_max_length=16
            )
        template = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=raw, bos_token=None if family.startswith("qwen") else "<s>", eos_token="</s>",
            additional_special_tokens=["<|im_start|>", "<|im_end|>"],
            chat_template=template if family.startswith("qwen") else None,
        )  # fmt: skip


class Home:
    """A home folder, and the five steps run in it without Prefect."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.workspace = Workspace(path)
        self.store = Store(path)

    @property
    def client(self) -> Any:
        """MLflow's client for the home's own database."""
        from fmcore.tracking.client import connect

        return connect(self.workspace.own_tracking_uri)

    def resolve(self, recipe: dict[str, Any], **options: Any) -> Any:
        """Recipe as a mapping -> ResolvedStage."""
        from fmcore.planning.resolve import resolve_stage

        return resolve_stage(parse_recipe(recipe), self.workspace, self.store, **options)

    def ready(self, recipe: dict[str, Any]) -> Any:
        """The same with a parent from outside imported."""
        from fmcore.planning.resolve import import_parent

        return import_parent(self.resolve(recipe), self.workspace, self.store, on_line=lambda line: None)

    def documents(self, recipe: dict[str, Any]) -> Documents:
        """Run the first step."""
        from fmcore.data.prepare import prepare_documents

        stage = self.ready(recipe)
        return prepare_documents(
            stage.steps.documents, stage.recipe.data, stage.parent, self.store, workers=stage.recipe.execution.workers
        )

    def shards(self, recipe: dict[str, Any]) -> TokenShards:
        """Run the first two steps."""
        from fmcore.planning.steps import tokenizer_of
        from fmcore.tokens.tokenize import tokenize_documents

        documents, stage = self.documents(recipe), self.ready(recipe)
        return tokenize_documents(
            stage.steps.shards, documents, tokenizer_of(stage.recipe), stage.parent, self.store,
            workers=stage.recipe.execution.workers,
        )  # fmt: skip

    def spec(self, recipe: dict[str, Any]) -> Any:
        """The spec of the training."""
        from fmcore.training.train import make_spec

        shards, stage = self.shards(recipe), self.ready(recipe)
        return make_spec(shards, stage.recipe, stage.parent, self.store)

    def train(self, recipe: dict[str, Any], **options: Any) -> Checkpoint:
        """Run the first three steps."""
        from fmcore.training.train import train_checkpoint

        shards, stage = self.shards(recipe), self.ready(recipe)
        return train_checkpoint(stage.steps.checkpoint, shards, stage.recipe, stage.parent, self.store, **options)

    def evaluate(self, recipe: dict[str, Any]) -> EvalReport:
        """Run the first four steps."""
        from fmcore.evaluation.evaluate import evaluate_checkpoint

        checkpoint, documents, stage = self.train(recipe), self.documents(recipe), self.ready(recipe)
        return evaluate_checkpoint(
            stage.steps.report, checkpoint, documents, stage.parent, stage.recipe.evaluate, stage.recipe.execution,
            self.store,
        )  # fmt: skip

    def run(self, recipe: dict[str, Any]) -> RegisteredModel:
        """Run all five steps."""
        from fmcore.evaluation.champions import Contender
        from fmcore.tracking.register import register_model
        from fmcore.tracking.session import StageTracking

        stage = self.ready(recipe)
        registry = self.workspace.own_tracking_uri
        stage.record.start(stage.parent.fingerprint if stage.parent else None, stage.steps, registry)
        identity = stage.steps.model.fingerprint
        tracking = StageTracking.start(
            self.workspace.own_tracking_uri, self.path, name=stage.recipe.name, identity=identity, tags={},
            parent_run_id=None, record=self.workspace.runs / f"{identity[:16]}.mlflow.json",
            recipe=stage.recipe.model_dump(mode="json"),
        )  # fmt: skip
        report, checkpoint, documents = self.evaluate(recipe), self.train(recipe), self.documents(recipe)
        from fmcore.data.prepare import source_rows

        client, run = tracking.required()
        run.log_sources(source_rows(documents, stage.recipe.data))
        contender = Contender(checkpoint, report, documents, stage.parent)
        model = register_model(stage.steps.model, contender, stage.recipe, self.store, client, run)
        tracking.finish("FINISHED")
        stage.record.finish(model.fingerprint)
        return model


@contextmanager
def children_inline() -> Iterator[None]:
    """Run the children's `main` in this process instead of starting it."""

    def run(self: Child, *, on_line: Callable[[str], None], on_poll: Callable[[], None] = lambda: None) -> None:
        (self._folder / "heartbeat").touch()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            done = importlib.import_module(self._module).main(self._folder / "spec.json")
        except StrataError as error:
            raise TrainingRefused(str(error)) from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        on_poll()
        if not done:
            raise Interrupted("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Child, "run", run)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="write the loss curves in tests/golden anew")


def pytest_configure(config: pytest.Config) -> None:
    """Warnings raised inside libraries about themselves."""
    for line in (
        # peft 0.21 asks transformers 5 for a property of its old name
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def quiet_environment() -> Iterator[None]:
    """What the command line sets before Prefect and MLflow are imported; no address of the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "STRATA_HOME"):
            patch.delenv(name, raising=False)
        for name, value in {
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR",
            "PREFECT_LOGGING_EXTRA_LOGGERS": "strata",
            "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }.items():
            patch.setenv(name, os.environ.get(name, value))
        yield


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture(scope="session")
def outside() -> OutsideModels:
    return OutsideModels()


@pytest.fixture(scope="session")
def outside_folders(tmp_path_factory: pytest.TempPathFactory, outside: OutsideModels) -> dict[str, Path]:
    """A model folder of each family. Read only; tests copy what they damage."""
    folder = tmp_path_factory.mktemp("outside")
    return {family: outside.make(folder / f"small-{family}", family) for family in outside.families}


@pytest.fixture
def inline() -> Iterator[None]:
    """Children run inside the test process."""
    with children_inline():
        yield


@pytest.fixture(scope="session")
def inline_children() -> Callable[[], Any]:
    """The same as a context manager, for fixtures of a longer life."""
    return children_inline


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> dict[str, Path]:
    """old: what the base is trained on; new: tomorrow's texts; records: a task."""
    folder = tmp_path_factory.mktemp("corpora")
    return {
        "old": tiny.corpus(folder, "old"),
        "new": tiny.corpus(folder, "new"),
        "records": tiny.records(folder),
    }


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose MLflow database is laid out, which takes seconds; to be copied."""
    home = Home(tmp_path_factory.mktemp("empty") / "home")
    home.path.mkdir()
    assert home.client.search_experiments(max_results=1)
    return home.path


@pytest.fixture(scope="session")
def base_home(tmp_path_factory: pytest.TempPathFactory, empty_home: Path, tiny: Tiny, corpora: dict[str, Path]) -> Home:
    """A home with plays/1, the champion, trained for 20 steps on `old`. Read only; tests copy it."""
    path = tmp_path_factory.mktemp("base") / "home"
    shutil.copytree(empty_home, path)
    home = Home(path)
    with children_inline():
        home.run(tiny.pretrain(corpora["old"]))
    return home


@pytest.fixture
def based(tmp_path: Path, base_home: Home) -> Home:
    """A home of the test's own with plays/1 in it."""
    return Home(Path(shutil.copytree(base_home.path, tmp_path / "home")))


@pytest.fixture
def fresh_home(tmp_path: Path, empty_home: Path) -> Home:
    """A home of the test's own with nothing but a database."""
    return Home(Path(shutil.copytree(empty_home, tmp_path / "home")))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server of our own; one for all, since s3fs remembers it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def bucket(s3_server: str) -> Iterator[Any]:
    """An empty bucket `data` on it; its client."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": s3_server,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="data")
        yield client
        for item in client.list_objects_v2(Bucket="data").get("Contents", []):
            client.delete_object(Bucket="data", Key=item["Key"])
