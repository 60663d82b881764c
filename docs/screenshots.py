"""Writes docs/images/*.png from a running `strata up`: python docs/screenshots.py PREFECT_URL MLFLOW_URL

It shows what is there: run a lifecycle recipe first. Chromium is Debian's; the driver is playwright.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).with_name("images")
CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
SIZE = {"width": 1100, "height": 760}
SETTLE_MS = 6000  # both pages go on loading after the document is there
PAINT_MS = 500


def prefect_pages(address: str) -> Iterator[tuple[str, str]]:
    """(picture, address) of the form and of the newest completed run."""
    deployment = requests.get(f"{address}/api/deployments/name/pretrain/strata", timeout=30).json()
    yield "form", f"{address}/v2/deployments/deployment/{deployment['id']}/run"
    runs = requests.post(
        f"{address}/api/flow_runs/filter",
        json={
            "sort": "END_TIME_DESC",
            "limit": 1,
            "flows": {"name": {"any_": ["finetune", "continue-pretrain"]}},
            "flow_runs": {"state": {"name": {"any_": ["Completed"]}}},
        },
        timeout=30,
    ).json()
    for run in runs:
        yield "run", f"{address}/v2/runs/flow-run/{run['id']}"


def mlflow_pages(address: str) -> Iterator[tuple[str, str]]:
    """(picture, address) of the newest version that has a parent, and of the run that made it."""
    versions: list[dict[str, Any]] = requests.get(
        f"{address}/api/2.0/mlflow/model-versions/search", params={"max_results": 200}, timeout=30
    ).json()["model_versions"]
    children = [v for v in versions if any(tag["key"] == "strata.parent_version" for tag in v.get("tags", ()))]
    for version in sorted(children, key=lambda v: v["creation_timestamp"])[-1:]:
        yield "model", f"{address}/#/models/{version['name']}/versions/{version['version']}"
        run = requests.get(
            f"{address}/api/2.0/mlflow/runs/get", params={"run_id": version["run_id"]}, timeout=30
        ).json()["run"]["info"]  # fmt: skip
        yield "lineage", f"{address}/#/experiments/{run['experiment_id']}/runs/{run['run_id']}"


def take(page: Page, name: str, address: str) -> None:
    """One picture."""
    page.goto(address, wait_until="domcontentloaded")
    page.wait_for_timeout(SETTLE_MS)
    assistant = page.get_by_role("button", name="Close", exact=True)  # MLflow's, over a quarter of the page
    if assistant.count() and "/#/" in address:
        assistant.first.click()
    if name == "lineage":
        page.get_by_role("heading", name="Logged models").evaluate("heading => heading.scrollIntoView()")
    page.wait_for_timeout(PAINT_MS)
    page.screenshot(path=FOLDER / f"{name}.png")
    print(f"{name}: {address}")


def main() -> None:
    """All pictures."""
    prefect, mlflow = (address.rstrip("/") for address in sys.argv[1:3])
    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport=SIZE)
        for name, address in [*prefect_pages(prefect), *mlflow_pages(mlflow)]:
            take(page, name, address)
        browser.close()


if __name__ == "__main__":
    main()
