"""What the shell offers after <TAB>: recipe files, and models by the records of this home; no registry is asked."""

import json
from contextlib import suppress
from pathlib import Path

RECIPE_SUFFIXES = (".yaml", ".yml")
ACCEPTED = ("FIRST", "PROMOTE")


def complete_recipe(incomplete: str) -> list[str]:
    """YAML files and folders that begin so."""
    typed = Path(incomplete).expanduser()
    folder = typed if incomplete.endswith("/") or not incomplete else typed.parent
    start = "" if folder == typed else typed.name
    shown = incomplete[: len(incomplete) - len(start)]
    found = []
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            if path.name.startswith(start) and not path.name.startswith("."):
                if path.is_dir():
                    found.append(f"{shown}{path.name}/")
                elif path.suffix in RECIPE_SUFFIXES:
                    found.append(f"{shown}{path.name}")
    return found


def complete_model(incomplete: str) -> list[str]:
    """`name@champion` and `name/version` of the versions whose artifacts lie in this home."""
    from fmcore.workspace import Workspace

    references = set()
    for record in (Workspace.current().home / "artifacts" / "model").glob("*/artifact.json"):
        with suppress(OSError, ValueError, KeyError):
            model = json.loads(record.read_text(encoding="utf-8"))
            references.add(f"{model['model']}/{model['version']}")
            if model["verdict"] in ACCEPTED:
                references.add(f"{model['model']}@champion")
    return sorted(reference for reference in references if reference.startswith(incomplete))
