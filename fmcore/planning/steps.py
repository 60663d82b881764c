"""The five steps of a stage, known by fingerprint before anything is built."""

from collections.abc import Iterator
from dataclasses import dataclass

from fmcore.artifacts.files import DigestCache
from fmcore.artifacts.step import Step
from fmcore.data.prepare import documents_step
from fmcore.evaluation.evaluate import report_step
from fmcore.recipes.fields import Gate, Tokenizer
from fmcore.recipes.stages import FinetuneRecipe, PretrainRecipe, StageRecipe
from fmcore.tokens.tokenize import shards_step
from fmcore.training.train import checkpoint_step

CODE_VERSION = 1  # of the register step


@dataclass(frozen=True)
class ParentRef:
    """A parent as identities need it, whether it exists yet or not.

    What a child trains on and from follows from the parent's checkpoint; under which gate and in which
    registry that was registered does not matter to it. fingerprint: the registered model's.
    """

    model: str
    fingerprint: str
    checkpoint: str


@dataclass(frozen=True)
class StageSteps:
    """The steps of one stage, in order. imported: what is made before them where the parent is from outside."""

    documents: Step
    shards: Step
    checkpoint: Step
    report: Step
    model: Step
    imported: tuple[Step, ...] = ()

    def __iter__(self) -> Iterator[Step]:
        return iter((self.documents, self.shards, self.checkpoint, self.report, self.model))

    @property
    def made(self) -> ParentRef:
        """What a next stage would name as its parent."""
        return ParentRef(str(self.model.config["model"]), self.model.fingerprint, self.checkpoint.fingerprint)


def model_name(recipe: StageRecipe, parent: str | None) -> str:
    """The name a stage registers under: a base's own, `<base>-<name>` for a task model."""
    if isinstance(recipe, PretrainRecipe):
        return recipe.model_name
    assert parent is not None
    return f"{parent}-{recipe.name}" if isinstance(recipe, FinetuneRecipe) else parent


def tokenizer_of(recipe: StageRecipe) -> Tokenizer | None:
    """The tokenizer a stage brings; None takes the parent's."""
    return recipe.tokenizer if isinstance(recipe, PretrainRecipe) else None


def record_length(recipe: StageRecipe) -> int | None:
    """The longest record in tokens where records are packed (0 = the parent's context), None for text."""
    return recipe.train.seq_len if isinstance(recipe, FinetuneRecipe) else None


def model_step(model: str, gate: Gate, parents: dict[str, str | None]) -> Step:
    """What registering would make: a version of `model`, judged by one gate. parents: fingerprints by role."""
    config = {"model": model, "gate": gate.model_dump()}
    known = {role: fingerprint for role, fingerprint in parents.items() if fingerprint}
    return Step("model", model, config, known, CODE_VERSION)


def stage_steps(
    recipe: StageRecipe, parent: ParentRef | None, digests: DigestCache, *, imported: tuple[Step, ...] = ()
) -> StageSteps:
    """All steps of a stage. Reads the sources' bytes (or remembers their digests), builds nothing."""
    above = parent.checkpoint if parent else None
    documents = documents_step(recipe.name, recipe.data, above, digests)
    shards = shards_step(recipe.name, documents.fingerprint, tokenizer_of(recipe), record_length(recipe), above)
    checkpoint = checkpoint_step(recipe, shards.fingerprint, above)
    report = report_step(recipe.name, recipe.evaluate, checkpoint.fingerprint, documents.fingerprint, above)
    model = model_step(
        model_name(recipe, parent.model if parent else None),
        recipe.gate,
        {
            "documents": documents.fingerprint,
            "shards": shards.fingerprint,
            "checkpoint": checkpoint.fingerprint,
            "report": report.fingerprint,
            "parent": parent.fingerprint if parent else None,
        },
    )
    return StageSteps(documents, shards, checkpoint, report, model, imported)
