"""Where a model came from, down to its source files, and what was made of it; read from MLflow alone."""

from typing import Any

from mlflow import MlflowClient
from mlflow.entities import DatasetInput
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT
from rich.markup import escape
from rich.tree import Tree

from fmcore.tracking import names
from fmcore.tracking.client import is_absent, talking_to
from fmcore.tracking.runs import source_path
from fmcore.tracking.versions import ModelRef, quoted, ref_of, search_versions, version_numbered

SHOWN_DIGITS = 12


def lineage_tree(client: MlflowClient, ref: ModelRef) -> dict[str, Any]:
    """A version with its run, its sources and, nested, its parents; JSON values only.

    {model, version, fingerprint, verdict, stage, run_id, sources: [{name, digest, path, context}],
    parents: [the same again]}, and for an imported version `origin`: {place, licence, digest}. A parent that was
    deleted has `"missing": true` and nothing below it. Raises TrackingError.
    """
    with talking_to(client):
        return _node(client, ref.name, ref.version)


def children(client: MlflowClient, ref: ModelRef) -> list[ModelRef]:
    """The versions that started from this one, of any name, oldest first. Raises TrackingError."""
    with talking_to(client):
        found = search_versions(client, f"tags.`{names.PARENT_MODEL_ID}` = {quoted(ref.model_id)}")
    return [ref_of(version) for version in sorted(found, key=lambda v: (v.creation_timestamp, v.name))]


def as_rich(tree: dict[str, Any]) -> Tree:
    """A lineage tree for the terminal: the model, then its sources, then its parents."""
    root = Tree(_label(tree))
    if origin := tree.get("origin"):
        root.add(escape(f"origin: {origin['place']}  sha256 {origin['digest'][:SHOWN_DIGITS]}"))
        root.add(escape(f"licence: {origin['licence']}"))
        root.add("history unknown: what it was trained on is not known here")
    for source in tree["sources"]:
        digest = f"sha256 {source['digest'][:SHOWN_DIGITS]}"
        root.add(escape(f"{source['context']}: {source['name']}  {source['path']}  {digest}"))
    for parent in tree["parents"]:
        root.add(as_rich(parent))
    return root


def _node(client: MlflowClient, name: str, version: int) -> dict[str, Any]:
    found = version_numbered(client, name, version)
    if found is None:
        return {"model": name, "version": version, "missing": True, "sources": [], "parents": []}
    parent_name, _, parent_version = found.tags.get(names.PARENT_VERSION, "").rpartition("/")
    return {
        "model": name,
        "version": version,
        "fingerprint": found.tags.get(names.FINGERPRINT, ""),
        "verdict": found.tags.get(names.VERDICT, ""),
        "stage": found.tags.get(names.STAGE, ""),
        "run_id": found.run_id,
        **_origin(found.tags),
        "sources": _sources(client, found.run_id),
        "parents": [_node(client, parent_name, int(parent_version))] if parent_name else [],
    }


def _origin(tags: dict[str, str]) -> dict[str, dict[str, str]]:
    if names.ORIGIN not in tags:
        return {}
    place, licence = tags[names.ORIGIN], tags.get(names.LICENCE, "")
    return {"origin": {"place": place, "licence": licence, "digest": tags.get(names.ORIGIN_DIGEST, "")}}


def _sources(client: MlflowClient, run_id: str) -> list[dict[str, str]]:
    try:
        inputs = client.get_run(run_id).inputs.dataset_inputs
    except MlflowException as error:
        if is_absent(error):
            return []  # the run was deleted for good; the version outlives it
        raise
    return sorted((_source(item) for item in inputs), key=lambda s: (s["context"], s["name"]))


def _source(item: DatasetInput) -> dict[str, str]:
    tags = {tag.key: tag.value for tag in item.tags}
    return {
        "name": item.dataset.name,
        "digest": tags.get(names.SOURCE_DIGEST, item.dataset.digest),
        "path": source_path(item),
        "context": tags.get(MLFLOW_DATASET_CONTEXT, ""),
    }


def _label(tree: dict[str, Any]) -> str:
    title = f"[bold]{escape(tree['model'])}/{tree['version']}[/bold]"
    if tree.get("missing"):
        return f"{title}  deleted from the registry"
    parts = (title, tree["stage"], tree["verdict"], tree["fingerprint"][:8])
    return "  ".join(part for part in parts if part)
