"""The text on a model version's page: what it is, its parent and flow run as links, how to load it.

In MLflow only descriptions render links, tags never do; lists show a description's first line as it is,
so that one is plain text.
"""

from collections.abc import Sequence

from fmcore.artifacts.types import Verdict
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
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder + "/adapter")
tokenizer = AutoTokenizer.from_pretrained(base)"""


def describe(
    name: str,
    *,
    stage: str,
    method: str,
    parent: str | None = None,
    prefect_url: str | None = None,
    verdict: Verdict | None = None,
    reasons: Sequence[str] = (),
) -> str:
    """A version's description in markdown, for `publish`, which fills in the version's number.

    stage: the recipe kind. method: full or lora. parent: `name/version`, for lora the base of the
    adapter. prefect_url: the flow run's page. reasons: the verdict's, one sentence each.
    """
    first = f"{name} version {VERSION_PLACEHOLDER}, made by {stage}{f' from {parent}' if parent else ''}."
    facts = [f"Parent: {_link(parent)}"] if parent else []
    if prefect_url:
        facts.append(f"Prefect run: [{without_credentials(prefect_url)}]({without_credentials(prefect_url)})")
    if verdict:
        facts.append("\n".join([f"Verdict: **{verdict}**", *(f"- {reason}" for reason in reasons)]))
    loading = f"How to load it:\n```python\n{_loading(name, method, parent)}\n```"
    return "\n\n".join([first, *facts, loading])


def _link(parent: str) -> str:
    name, _, version = parent.partition("/")
    return f"[{parent}](#/models/{name}/versions/{version})"


def _loading(name: str, method: str, parent: str | None) -> str:
    snippet = _LORA if method == "lora" else _FULL
    return snippet.replace("{model}", f"{name}/{VERSION_PLACEHOLDER}").replace("{base}", parent or "")
