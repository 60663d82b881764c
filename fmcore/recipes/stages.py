"""The recipes: one class per kind. Stages differ by these parts, never by copied code."""

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from fmcore.recipes.fields import (
    NAME_PATTERN,
    Block,
    ContinueTrain,
    Evaluation,
    Execution,
    FinetuneTrain,
    Gate,
    Lora,
    Model,
    PretrainTrain,
    Register,
    Replay,
    TaskData,
    TextData,
    Tokenizer,
)

Method = Literal["full", "lora"]
KIND = "The kind of recipe, which is the flow that runs it."
DEFAULT_FINETUNE_LR: dict[Method, float] = {"full": 3e-4, "lora": 3e-3}


class PretrainStage(Block):
    """Pretraining, as it stands inside a lifecycle."""

    # `register` itself is taken: pydantic's classes have a method of that name
    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    data: TextData = Field(description="The documents to train on.")
    tokenizer: Tokenizer = Field(Tokenizer(), description="Train a tokenizer, or load one.")
    model: Model = Field(Model(), description="The decoder to train.")
    train: PretrainTrain = Field(PretrainTrain(), description="How long and how fast to train.")
    evaluate: Evaluation = Field(Evaluation(), description="How much is evaluated.")
    gate: Gate = Field(Gate(), description="When the version may become champion.")
    register_: Register = Field(Register(), alias="register", description="Under which name it is registered.")


class FinetuneStage(Block):
    """Fine-tuning, as it stands inside a lifecycle."""

    data: TaskData = Field(description="The prompt/response records to train on.")
    method: Method = Field("full", description="full (all weights) or lora (low-rank adapters).")
    lora: Lora = Field(Lora(), description="Settings of method lora.")
    train: FinetuneTrain = Field(FinetuneTrain(), description="How long and how fast to train.")
    evaluate: Evaluation = Field(Evaluation(), description="How much is evaluated.")
    gate: Gate = Field(Gate(), description="When the version may become champion.")

    @property
    def lr(self) -> float:
        """The learning rate, the method's own where none is given."""
        return self.train.lr or DEFAULT_FINETUNE_LR[self.method]


class ContinueStage(Block):
    """Continuous pre-training, as it stands inside a lifecycle."""

    data: TextData = Field(description="Where new documents appear; only unseen ones are trained on.")
    replay: Replay = Field(Replay(), description="How much of the ancestors' data is seen again.")
    train: ContinueTrain = Field(ContinueTrain(), description="How long to train.")
    evaluate: Evaluation = Field(Evaluation(), description="How much is evaluated.")
    gate: Gate = Field(Gate(), description="When the version may become champion.")


# Forms show fields in the order of the classes below from the last base to the first.


class _Header(Block):
    name: str = Field(pattern=NAME_PATTERN, description="Name of the recipe, for people; no part of any identity.")
    seed: int = Field(0, ge=0, description="Seed of the initial weights and of the order of the data.")


class _ChildHeader(_Header):
    parent: str = Field(
        min_length=1,
        description="The model to start from: name@alias, name/version, a folder in transformers' format (./folder) "
        "or a hub name (org/name@revision); the last two are imported first.",
    )


class _Footer(Block):
    execution: Execution = Field(Execution(), description="How to run; never changes what comes out.")


def _check_muon(recipe: "StageRecipe") -> None:
    if recipe.train.optimizer != "muon":
        return
    if isinstance(recipe, FinetuneRecipe) and recipe.method == "lora":
        raise ValueError("train.optimizer: muon is for whole matrices; with method lora take adamw")
    if recipe.execution.processes > 1 or recipe.execution.nodes > 1:
        raise ValueError("train.optimizer: muon trains in one process; set execution.processes and nodes to 1")


class PretrainRecipe(_Footer, PretrainStage, _Header):
    """Raw text to a registered base model."""

    kind: Literal["pretrain"] = Field("pretrain", description=KIND)

    @model_validator(mode="after")
    def _check(self) -> "PretrainRecipe":
        _check_muon(self)
        return self

    @property
    def model_name(self) -> str:
        """The name the model is registered under."""
        return self.register_.model or self.name


class FinetuneRecipe(_Footer, FinetuneStage, _ChildHeader):
    """A registered model to a task model, named <base>-<name>."""

    kind: Literal["finetune"] = Field("finetune", description=KIND)

    @model_validator(mode="after")
    def _check(self) -> "FinetuneRecipe":
        _check_muon(self)
        return self


class ContinueRecipe(_Footer, ContinueStage, _ChildHeader):
    """A base and new documents to the base's next version."""

    kind: Literal["continue-pretrain"] = Field("continue-pretrain", description=KIND)

    @model_validator(mode="after")
    def _check(self) -> "ContinueRecipe":
        _check_muon(self)
        return self


StageRecipe = PretrainRecipe | FinetuneRecipe | ContinueRecipe


class _Stages(Block):
    pretrain: PretrainStage = Field(description="Stage recipe without kind and parent.")
    finetune: FinetuneStage = Field(description="Stage recipe without kind and parent.")
    continue_pretrain: ContinueStage = Field(description="Stage recipe without kind and parent.")


class LifecycleRecipe(_Footer, _Stages, _Header):
    """Pretrain, fine-tune, continue, fine-tune again on the new base, so that the task model follows it."""

    kind: Literal["lifecycle"] = Field("lifecycle", description=KIND)

    @model_validator(mode="after")
    def _check(self) -> "LifecycleRecipe":
        self.finetune_recipe("x/1")  # building them runs their validators
        return self

    def _header(self) -> dict[str, object]:
        return {"name": self.name, "seed": self.seed, "execution": self.execution}

    def pretrain_recipe(self) -> PretrainRecipe:
        """The first stage as a recipe of its own."""
        return PretrainRecipe(**self._header(), **_parts(self.pretrain))

    def finetune_recipe(self, parent: str) -> FinetuneRecipe:
        """The fine-tuning stage on a given parent."""
        return FinetuneRecipe(**self._header(), parent=parent, **_parts(self.finetune))

    def continue_recipe(self, parent: str) -> ContinueRecipe:
        """The continuous pre-training stage on a given parent."""
        return ContinueRecipe(**self._header(), parent=parent, **_parts(self.continue_pretrain))


Recipe = PretrainRecipe | FinetuneRecipe | ContinueRecipe | LifecycleRecipe
RECIPES: dict[str, type[Recipe]] = {
    "pretrain": PretrainRecipe,
    "finetune": FinetuneRecipe,
    "continue-pretrain": ContinueRecipe,
    "lifecycle": LifecycleRecipe,
}


def _parts(stage: Block) -> dict[str, object]:
    return {field.alias or name: getattr(stage, name) for name, field in type(stage).model_fields.items()}
