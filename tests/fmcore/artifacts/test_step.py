"""A step's identity: what decides its result, and nothing else."""

import hashlib
from dataclasses import replace

import pytest

from fmcore.artifacts.step import Step

STEP = Step("documents", "plays", {"holdout": 0.1, "filters": {"min_chars": 20}}, {"parent": "a" * 64}, 1)


@pytest.mark.parametrize(
    "other",
    [
        replace(STEP, kind="shards"),
        replace(STEP, config={**STEP.config, "holdout": 0.2}),
        replace(STEP, config={**STEP.config, "filters": {"min_chars": 21}}),
        replace(STEP, config={**STEP.config, "more": None}),
        replace(STEP, parents={"parent": "b" * 64}),
        replace(STEP, parents={"base": "a" * 64}),
        replace(STEP, parents={}),
        replace(STEP, code_version=2),
    ],
)
def test_whatever_decides_the_result_changes_the_fingerprint(other: Step) -> None:
    assert other.fingerprint != STEP.fingerprint


@pytest.mark.parametrize(
    "other",
    [
        replace(STEP, name="another"),
        replace(STEP, config={"filters": {"min_chars": 20}, "holdout": 0.1}),
    ],
)
def test_names_and_the_order_of_fields_do_not(other: Step) -> None:
    assert other.fingerprint == STEP.fingerprint


def test_the_fingerprint_is_the_same_in_every_process_and_version() -> None:
    """A changed value here makes every artifact that users have a miss: bump CODE_VERSIONs instead."""
    written = '{"code_version":1,"config":{"ä":[1,0.5,null]},"kind":"documents","parents":{}}'
    step = Step("documents", "x", {"ä": [1, 0.5, None]}, {}, 1)
    assert step.fingerprint == hashlib.sha256(written.encode()).hexdigest()


def test_a_config_that_json_has_no_value_for_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        _ = Step("documents", "x", {"holdout": float("nan")}).fingerprint
