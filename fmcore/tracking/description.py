"""The text on a model version's page: what it is, its parent and flow run as links, how to load it.

In MLflow only descriptions render links, tags never do; lists show a description's first line as it is,
so that one is plain text.
"""

from collections.abc import Sequence

from fmcore.artifacts.types import Verdict
from fmcore.model.outside import Origin
from fmcore.redaction import without_credentials

# The version's number is known when it has been created: `publish` puts it in here.
VERSION_PLACEHOLDER = "{version}"

_FULL = """import mlflow
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = mlflow.artifacts.download_artifacts("models:/{model}")
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)"""
_LORA = """import mlflow
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = mlflow.artifacts.download_artifacts("models:/{base}")
folder = mlflow.artifacts.download_artifacts("models:/{model}")
model = AutoModelForCausalLM.from_pretrained(base)
{merges}model = PeftModel.from_pretrained(model, folder + "/adapter")
tokenizer = AutoTokenizer.from_pretrained(folder)"""
_MERGE = """below = mlflow.artifacts.download_artifacts("models:/{adapter}")
model = PeftModel.from_pretrained(model, below + "/adapter").merge_and_unload()
"""


def describe(
    name: str,
    *,
    stage: str,
    method: str,
    parent: str | None = None,
    bases: Sequence[str] = (),
    origin: Origin | None = None,
    prefect_url: str | None = None,
    verdict: Verdict | None = None,
    reasons: Sequence[str] = (),
) -> str:
    """A version's description in markdown, for `publish`, which fills in the version's number.

    stage: the recipe kind, or `imported`. method: full or lora. parent: `name/version`. bases: what an adapter
    lies on, the version with whole weights first, then adapters that are merged into it; without any, the parent.
    origin: where an imported version came from. prefect_url: the flow run's page. reasons: the verdict's, one
    sentence each.
    """
    made = f"made by {stage}{f' from {parent}' if parent else ''}"
    if origin is not None:
        made = f"imported from {without_credentials(origin.shown)}"
    first = f"{name} version {VERSION_PLACEHOLDER}, {made}."
    facts = [f"Parent: {_link(parent)}"] if parent else []
    if origin is not None:
        facts.append(
            f"Licence: {origin.licence}\n\nDigest of weights, config and tokenizer: `sha256 {origin.digest}`\n\n"
            f"History: unknown. What it was trained on is not known here, so nothing of it is replayed or held back; "
            f"there is no optimizer state, so continuous pre-training warms up again."
        )
    if prefect_url:
        facts.append(f"Prefect run: [{without_credentials(prefect_url)}]({without_credentials(prefect_url)})")
    if verdict:
        facts.append("\n".join([f"Verdict: **{verdict}**", *(f"- {reason}" for reason in reasons)]))
    loading = f"How to load it:\n```python\n{_loading(name, method, bases or [parent or ''])}\n```"
    return "\n\n".join([first, *facts, loading])


def _link(parent: str) -> str:
    name, _, version = parent.partition("/")
    return f"[{parent}](#/models/{name}/versions/{version})"


def _loading(name: str, method: str, bases: Sequence[str]) -> str:
    merges = "".join(_MERGE.replace("{adapter}", adapter) for adapter in bases[1:])
    snippet = _LORA.replace("{base}", bases[0]).replace("{merges}", merges) if method == "lora" else _FULL
    return snippet.replace("{model}", f"{name}/{VERSION_PLACEHOLDER}")
