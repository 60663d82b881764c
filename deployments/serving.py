"""The serving process of `strata up`: registers the four deployments and runs what is asked of them.

`python -P -m deployments.serving READY CRON RECIPE...`; READY is written when runs can be asked for. Each flow
run is a process of its own, which ends when this one is gone (fmcore/process/guard.py).
"""

import asyncio
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.runner import Runner
from prefect.states import Crashed

from deployments.deploy import NAME, deployments_of, form_recipes, is_schedule_active
from fmcore.artifacts.files import write_json
from fmcore.process.guard import SERVING_VARIABLE

POLL_SECONDS = 2.0  # how long a run that was asked for waits at most
UNDER_WAY = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


async def serve(ready: Path, cron: str, files: list[Path]) -> None:
    """Serve until SIGTERM; runs under way are cancelled then, and save.

    Where `strata up` was ended by kill -9 its servers end, too, and nobody is left to tell: the runs see that
    this process is gone, save and end by themselves.
    """
    up = os.getppid()
    runner = Runner(name=NAME, query_seconds=POLL_SECONDS, pause_on_shutdown=False)
    loop = asyncio.get_running_loop()

    def stop(*given: Any) -> None:
        if os.getppid() != up:
            os._exit(1)
        loop.call_soon_threadsafe(lambda: loop.create_task(runner.astop()))

    runner.handle_sigterm = stop  # Prefect's own leaves the event loop by an exception before its runs have ended
    made = await deployments_of(form_recipes(files), cron, schedule_active=await is_schedule_active())
    ids = [await runner.aadd_deployment(deployment) for deployment in made.values()]
    await close_abandoned(ids)
    write_json(ready, {"pid": os.getpid(), "deployments": [f"{kind}/{NAME}" for kind in made]})
    await runner.start()


async def close_abandoned(deployments: Iterable[UUID]) -> None:
    """Mark runs Crashed that an earlier serving process, ended by kill -9, left under way: they can be retried."""
    under_way = FlowRunFilterState(type=FlowRunFilterStateType(any_=UNDER_WAY))
    async with get_client() as client:
        wanted = FlowRunFilter(state=under_way, deployment_id=FlowRunFilterDeploymentId(any_=list(deployments)))
        left = await client.read_flow_runs(flow_run_filter=wanted)
        if left:
            parents = FlowRunFilterParentFlowRunId(any_=[run.id for run in left])
            left += await client.read_flow_runs(
                flow_run_filter=FlowRunFilter(state=under_way, parent_flow_run_id=parents)
            )
        for run in left:
            state = Crashed(message="what served this run has ended; Retry goes on from what was saved")
            await client.set_flow_run_state(run.id, state, force=True)


def main() -> None:
    """Serve what the command line names."""
    ready, cron, *files = sys.argv[1:]
    os.environ[SERVING_VARIABLE] = str(os.getpid())
    asyncio.run(serve(Path(ready), cron, [Path(file) for file in files]))


if __name__ == "__main__":
    main()
