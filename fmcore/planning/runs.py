"""Run records: which parent an unfinished run was started with, what it is about to make, and where it registers.

`<home>/runs/<identity>.json`, the identity being the recipe's (its parent as it is written, its sources by
digest). An alias such as `plays@champion` is resolved once; an interrupted run goes on with what it found.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fmcore.artifacts.files import canonical_json, read_json, sha256_text, write_json
from fmcore.artifacts.step import Step
from fmcore.recipes.stages import FinetuneRecipe, PretrainRecipe, StageRecipe


def recipe_identity(recipe: StageRecipe, documents: Step) -> str:
    """Hex sha256 over the recipe without its name and execution, its sources taken by digest.

    documents: the documents step without a parent, which holds those digests.
    """
    body = recipe.model_dump(mode="json", exclude={"name", "execution", "data"})
    if isinstance(recipe, PretrainRecipe | FinetuneRecipe):
        body["registered_as"] = recipe.name  # the model's name follows from the recipe's
    return sha256_text(canonical_json({"recipe": body, "data": documents.config}))


class RunRecord:
    """One recipe's record. parent: fingerprint it was resolved to; model: fingerprint of what it made.

    steps: fingerprints of what it is about to make; registry: where it registers, without credentials.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.path = folder / f"{identity[:16]}.json"
        self.identity = identity
        self.values: dict[str, Any] = {}
        if self.path.exists() and (found := read_json(self.path))["identity"] == identity:
            self.values = found

    def parent_for(self, champion: str | None) -> str | None:
        """The recorded parent, where this recipe has not finished, or made the champion itself.

        champion: fingerprint of what the recipe's parent reference leads to now.
        """
        if not self.values:
            return None
        made = self.values.get("model")
        return self.values["parent"] if made is None or made == champion else None

    @property
    def is_finished(self) -> bool:
        """Whether a run of this recipe has made its model."""
        return "model" in self.values

    def start(self, parent: str | None, steps: Iterable[Step] = (), registry: str = "", *, name: str = "") -> None:
        """Note the parent, the steps, the registry and the recipe's name before any work."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fingerprints = [step.fingerprint for step in steps]
        self.values = {
            "identity": self.identity, "name": name, "parent": parent, "steps": fingerprints, "registry": registry,
        }  # fmt: skip
        write_json(self.path, self.values)

    def finish(self, model: str) -> None:
        """Note what came out."""
        self.values["model"] = model
        write_json(self.path, self.values)

    def forget(self) -> None:
        """`--fresh`: the next run resolves its parent anew."""
        self.path.unlink(missing_ok=True)
        self.values = {}


def run_records(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(file, values) of every run record of a home; one without `model` belongs to an unfinished run."""
    for path in sorted(folder.glob(f"{'[0-9a-f]' * 16}.json")):
        values = read_json(path)
        if "parent" in values:
            yield path, values
