import ast

from fmcore.tracking.description import VERSION_PLACEHOLDER, describe


def code(text: str) -> str:
    return text.split("```python\n")[1].split("```")[0].replace(VERSION_PLACEHOLDER, "3")


def test_a_first_version() -> None:
    text = describe("plays", stage="pretrain", method="full", verdict="FIRST", reasons=("nothing to beat",))
    assert text.splitlines()[0] == "plays version {version}, made by pretrain."
    assert "Parent" not in text
    assert "Verdict: **FIRST**\n- nothing to beat" in text
    ast.parse(code(text))
    assert 'download_artifacts("models:/plays/3")' in code(text)


def test_a_child_links_its_parent_and_its_flow_run() -> None:
    text = describe(
        "plays-qa",
        stage="finetune",
        method="lora",
        parent="plays/2",
        prefect_url="http://me:secret@prefect:4200/runs/flow-run/1",
    )
    first, *rest = text.split("\n\n")
    assert first == "plays-qa version {version}, made by finetune from plays/2."
    assert "[plays/2](#/models/plays/versions/2)" in rest[0]
    link = "http://prefect:4200/runs/flow-run/1"
    assert f"[{link}]({link})" in rest[1]
    ast.parse(code(text))
    assert 'base = mlflow.artifacts.download_artifacts("models:/plays/2")' in code(text)
    assert "{" not in code(text)
