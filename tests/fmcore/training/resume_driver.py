"""A parent process to be killed: trains a recipe (JSON) in a home, whose documents and shards are there.

python resume_driver.py HOME RECIPE.json; exits 0 when done, 75 when interrupted, as `strata run` does.
"""

import json
import signal
import sys
from pathlib import Path

from fmcore.artifacts.store import Store
from fmcore.artifacts.types import TokenShards
from fmcore.errors import Interrupted
from fmcore.planning.steps import stage_steps
from fmcore.recipes.load import parse_recipe
from fmcore.training.train import train_checkpoint


def stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    store, recipe = Store(Path(sys.argv[1])), parse_recipe(json.loads(Path(sys.argv[2]).read_text()))
    signal.signal(signal.SIGTERM, stop)
    steps = stage_steps(recipe, None, store.digests)
    shards = store.get(steps.shards.fingerprint, TokenShards)
    try:
        train_checkpoint(steps.checkpoint, shards, recipe, None, store, on_line=lambda line: print(line, flush=True))
    except (KeyboardInterrupt, Interrupted):
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
