"""The rules behind `strata init`: what follows from bytes and speed."""

import pytest

from fmcore.model.presets import PRESETS, estimate_parameters
from fmcore.planning.sizes import batch_for, holdout_for, pretrain_sizes, rounded

TWO_CORES = 70e9


def test_a_small_text_on_two_cores_is_a_tiny_model_for_minutes() -> None:
    sizes = pretrain_sizes(1_100_000, TWO_CORES)
    assert (sizes.preset, sizes.vocab_size, sizes.seq_len) == ("tiny", 2048, 256)
    assert sizes.epochs <= 4
    assert sizes.tokens // sizes.batch_tokens >= 400
    seconds = 6 * estimate_parameters(PRESETS["tiny"], 2048) * sizes.tokens / TWO_CORES
    assert 60 < seconds <= 300


def test_more_data_and_speed_give_a_larger_model() -> None:
    presets = [pretrain_sizes(10**n, rate).preset for n, rate in ((7, 7e10), (9, 2e14), (11, 2e16), (12, 5e18))]
    assert presets == ["tiny", "small", "125m", "1b"]


def test_much_data_on_a_slow_machine_stays_within_the_budget() -> None:
    sizes = pretrain_sizes(10**12, TWO_CORES)
    assert sizes.preset == "tiny"
    assert 6 * estimate_parameters(PRESETS["tiny"], sizes.vocab_size) * sizes.tokens <= 300 * TWO_CORES


def test_the_least_text_still_makes_a_step() -> None:
    sizes = pretrain_sizes(3_000, TWO_CORES)
    assert sizes.tokens >= sizes.batch_tokens >= 4 * sizes.seq_len


@pytest.mark.parametrize(("tokens", "expected"), [(1_384_123, 1_300_000), (999, 1_000), (45_678, 45_000), (0.5, 1_000)])
def test_rounded(tokens: float, expected: int) -> None:
    assert rounded(tokens) == expected


def test_batches_shrink_until_there_are_steps_enough() -> None:
    assert batch_for(10_000_000, 256, 8192) == 8192
    assert batch_for(1_000_000, 256, 8192) == 2048
    assert batch_for(1_000, 256, 8192) == 1024


def test_holdout() -> None:
    thousand = [i / 1000 for i in range(1000)]
    assert holdout_for(thousand, 1, 0.02) == 0.02
    assert holdout_for(thousand, 1, 0.1) == 0.1
    assert holdout_for(thousand[::10], 1, 0.02) == 0.2
    assert holdout_for(thousand[::10], 100, 0.02) == 0.02  # a hundred times as many are there
    assert holdout_for(thousand[::45], 1, 0.02) == 0.5  # 10 of 23 take more than 0.3
    assert holdout_for(thousand[::100], 1, 0.02) is None
    assert holdout_for([], 1, 0.02) is None
