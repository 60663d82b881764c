"""The nouns of the pipeline, each a frozen class and a folder of bytes with an `artifact.json`.

Documents -> TokenShards -> Checkpoint -> EvalReport -> RegisteredModel. Tasks hand each other these
small references, never tensors, models or data frames.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Verdict = Literal["FIRST", "PROMOTE", "HOLD", "REJECT", "INCONCLUSIVE"]
ACCEPTED: tuple[Verdict, ...] = ("FIRST", "PROMOTE")  # the others are refusals: nobody's parent, exit code 3


class Artifact(BaseModel):
    """What every artifact records about itself.

    path: the folder. fingerprint: the step's identity. config: the identity part of its settings.
    parents: role -> fingerprint. counts: what was counted while it was made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str]

    path: Path = Field(exclude=True)
    name: str
    fingerprint: str
    config: dict[str, Any]
    parents: dict[str, str]
    counts: dict[str, Any]

    @property
    def short(self) -> str:
        """The first 8 hex digits of the fingerprint, as in the path."""
        return self.fingerprint[:8]


class Documents(Artifact):
    """Cleaned, deduplicated, split text documents or prompt/response records.

    form: text or records. sources: the names of the sources or tasks, in order.
    """

    kind: ClassVar[str] = "documents"
    form: Literal["text", "records"]
    sources: tuple[str, ...]

    @property
    def num_train(self) -> int:
        """Documents on the training side of the split."""
        return sum(self.counts["train"].values())


class TokenShards(Artifact):
    """Token ids with document boundaries, one folder per source, and the tokenizer that made them.

    form: text (one stream per source) or records (packed by a plan, loss on the response alone).
    num_tokens: training tokens per source.
    """

    kind: ClassVar[str] = "shards"
    form: Literal["text", "records"]
    sources: tuple[str, ...]
    vocab_size: int
    num_tokens: dict[str, int]

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer in transformers' format, chat template included."""
        return self.path / "tokenizer"


class Checkpoint(Artifact):
    """Trained weights: `final/` (registered), `stable/` (where the decay begins, with optimizer state).

    method: full (a transformers folder) or lora (an adapter over its parent). num_parameters counts the
    whole model, num_trainable what the optimizer saw. figures: what training reached of its machine, by name;
    conditions: which machine that was, and how it was used.
    """

    kind: ClassVar[str] = "checkpoint"
    method: Literal["full", "lora"]
    num_parameters: int
    num_trainable: int
    num_steps: int
    num_tokens: int
    train_seconds: float
    final_loss: float
    figures: dict[str, float] = {}
    conditions: dict[str, Any] = {}

    @property
    def imported(self) -> bool:
        """Whether the weights came from outside: nothing they were trained on is known, nor how."""
        return "shards" not in self.parents

    @property
    def final(self) -> Path:
        """The weights that are evaluated and registered, and the tokenizer."""
        return self.path / "final"

    @property
    def stable(self) -> Path | None:
        """Weights and optimizer where the decay begins; None where there is no such point."""
        path = self.path / "stable"  # an adapter has none: continuing it goes on from the merged weights
        return path if self.method == "full" and path.is_dir() else None

    @property
    def start(self) -> Literal["stable", "final"]:
        """Which weights continuous pre-training starts from."""
        return "stable" if self.stable else "final"

    def ledger(self, which: Literal["stable", "final"]) -> Path:
        """The ids of all documents that these weights have seen, ancestors' included."""
        return self.path / "ledger" / f"{which}.bin"

    def seen_samples(self, which: Literal["stable", "final"], source: str) -> Path:
        """Which of this training's own samples of a source these weights have seen, (n,) uint32."""
        return self.path / "seen" / which / f"{source}.bin"


class EvalReport(Artifact):
    """Scores of one model on held-out sets, with per-document values kept for paired comparison.

    metrics: `eval/<source>/bpb`, `eval/<task>/accuracy`, `forgetting/<set>` and their intervals.
    """

    kind: ClassVar[str] = "report"
    metrics: dict[str, float]


class RegisteredModel(Artifact):
    """A version in the model registry, with the verdict it came in with.

    model: the registered name; version: its number there; model_id: MLflow's logged model;
    stage: the recipe kind that made it (or `imported`); reasons: one sentence per compared set; predecessor:
    fingerprint of the champion it was compared with, empty for the first.
    """

    kind: ClassVar[str] = "model"
    model: str
    version: int
    model_id: str
    run_id: str
    stage: str
    method: Literal["full", "lora"]
    verdict: Verdict
    reasons: tuple[str, ...]
    predecessor: str

    @property
    def uri(self) -> str:
        """`name/version`, as the command line takes it."""
        return f"{self.model}/{self.version}"


ARTIFACT_TYPES: dict[str, type[Artifact]] = {
    cls.kind: cls for cls in (Documents, TokenShards, Checkpoint, EvalReport, RegisteredModel)
}
