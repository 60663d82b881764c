"""The order of the data is a pure function: every sample once an epoch, shares as weighted, any number of ranks."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmcore.tokens.order import BLOCK, Order, Pool, bijection, block_layout, quotas, slots_for


def order(*pools: tuple[float, int], seed: int = 0, batch: int = 7, num_samples: int = 1000) -> Order:
    return Order(seed, tuple(Pool(*pool) for pool in pools), batch, num_samples)


def pairs(steps: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    return list(zip(steps[0].tolist(), steps[1].tolist(), strict=True))


# ---- the bijection


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4095, 4096, 4097, 65537])
def test_a_permutation_of_any_size(size: int) -> None:
    assert np.array_equal(np.sort(bijection(np.arange(size), size, key=12345)), np.arange(size))


@settings(deadline=None)
@given(size=st.integers(2, 300), key=st.integers(0, 2**64 - 1))
def test_a_permutation_under_any_key(size: int, key: int) -> None:
    assert len(set(bijection(np.arange(size), size, key).tolist())) == size


@settings(deadline=None)
@given(size=st.integers(2, 2**40), key=st.integers(0, 2**64 - 1), data=st.data())
def test_a_position_is_drawn_alone_as_among_others(size: int, key: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8, unique=True)))
    together = bijection(positions, size, key)
    assert [int(bijection(positions[i : i + 1], size, key)[0]) for i in range(len(positions))] == together.tolist()
    assert len(set(together.tolist())) == len(positions)
    assert ((together >= 0) & (together < size)).all()


def test_keys_give_different_orders_that_look_random() -> None:
    size = 1000
    orders = [bijection(np.arange(size), size, key) for key in range(20)]
    for one, other in pairwise(orders):
        assert (one == other).sum() < 10  # one in expectation
    for one in orders:
        assert abs(np.corrcoef(one, np.arange(size))[0, 1]) < 0.15
        assert (np.diff(one) == 1).sum() < 10


# ---- an epoch


def test_steps_partition_an_epoch() -> None:
    one = order((1, 100), num_samples=100)
    assert one.num_steps == 15
    drawn = [pair for step in range(one.num_steps) for pair in pairs(one.step(step))]
    assert sorted(drawn) == [(0, index) for index in range(100)]
    assert [len(one.step(step)[0]) for step in (0, 13, 14)] == [7, 7, 2]  # the last step takes what is left


def test_every_epoch_draws_every_sample_in_another_order() -> None:
    _, samples = order((1, 50), num_samples=150).slots(np.arange(150))
    epochs = samples.reshape(3, 50).tolist()
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_pools_and_seeds_have_orders_of_their_own() -> None:
    pools, samples = order((1, 64), (1, 64), num_samples=128).slots(np.arange(128))
    first, second = (samples[pools == pool].tolist() for pool in (0, 1))
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second
    assert (
        order((1, 64), seed=1).slots(np.arange(64))[1].tolist()
        != order((1, 64), seed=2).slots(np.arange(64))[1].tolist()
    )


ORDERS = st.builds(
    lambda pools, seed, batch, num: order(*pools, seed=seed, batch=batch, num_samples=num),
    pools=st.lists(st.tuples(st.floats(0.01, 10), st.integers(1, 300)), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 20),
    num=st.integers(1, 200),
)


@settings(max_examples=25, deadline=None)
@given(one=ORDERS)
def test_no_call_changes_another(one: Order) -> None:
    forwards = [pairs(one.step(step)) for step in range(one.num_steps)]
    again = Order(one.seed, one.pools, one.batch_samples, one.num_samples)
    backwards = [pairs(again.step(step)) for step in reversed(range(one.num_steps))]
    assert forwards == backwards[::-1]


def test_the_batch_size_only_cuts_the_same_sequence() -> None:
    small, large = order((1, 40), (2, 30), batch=3, num_samples=90), order((1, 40), (2, 30), batch=10, num_samples=90)
    assert [p for s in range(30) for p in pairs(small.step(s))] == [p for s in range(9) for p in pairs(large.step(s))]


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    """Resuming depends on it: whoever changes these numbers bumps the train step's CODE_VERSION."""
    pools, samples = order((0.7, 1000), (0.3, 50), seed=3, num_samples=8).slots(np.arange(8))
    assert pools.tolist() == [0, 1, 0, 0, 1, 0, 0, 0]
    assert samples.tolist() == [365, 41, 630, 557, 48, 957, 694, 661]


# ---- weights


@settings(deadline=None)
@given(weights=st.lists(st.integers(1, 100), min_size=1, max_size=8))
def test_a_blocks_quotas_are_its_weights_rounded(weights: list[int]) -> None:
    slots = quotas(tuple(map(float, weights)))
    assert sum(slots) == BLOCK
    assert max(abs(s - w / sum(weights) * BLOCK) for s, w in zip(slots, weights, strict=True)) < 1


@settings(deadline=None)
@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_the_smallest_weight_has_a_slot(weights: list[float]) -> None:
    slots = quotas(tuple(weights))
    assert sum(slots) == BLOCK
    assert min(slots) >= 1


def test_no_weight_no_slots() -> None:
    assert quotas((1.0, 0.0, 2.0)) == (1365, 0, 2731)


@pytest.mark.parametrize("shares", [(0.95, 0.05), (0.5, 0.3, 0.2), (1.0,)])
def test_realised_shares_are_the_weights_over_any_stretch(shares: tuple[float, ...]) -> None:
    one = order(*[(share, 100) for share in shares], num_samples=10**9)
    for first in (0, 1000, 4000, 10**8):
        drawn = Counter(one.slots(np.arange(first, first + 2000))[0].tolist())
        assert [drawn[pool] / 2000 for pool in range(len(shares))] == pytest.approx(shares, abs=0.002)


def test_a_pool_is_spread_evenly_in_a_block() -> None:
    pools, ordinals = block_layout(quotas((0.95, 0.05)))
    gaps = np.diff(np.flatnonzero(pools == 1))
    assert set(gaps.tolist()) <= {19, 20, 21}
    for pool in (0, 1):
        assert ordinals[pools == pool].tolist() == list(range(int((pools == pool).sum())))


@settings(max_examples=20, deadline=None)
@given(one=ORDERS, num_slots=st.integers(0, 3 * BLOCK))
def test_drawn_counts_the_slots_of_a_pool(one: Order, num_slots: int) -> None:
    pools, _ = one.slots(np.arange(num_slots))
    assert [one.drawn(pool, num_slots) for pool in range(len(one.pools))] == [
        int((pools == pool).sum()) for pool in range(len(one.pools))
    ]


@settings(max_examples=60, deadline=None)
@given(one=ORDERS, num_samples=st.integers(1, 3 * BLOCK), data=st.data())
def test_slots_for_is_the_fewest(one: Order, num_samples: int, data: st.DataObject) -> None:
    pool = data.draw(st.integers(0, len(one.pools) - 1))
    enough = slots_for(one.pools, pool, num_samples)
    assert one.drawn(pool, enough) == num_samples
    assert one.drawn(pool, enough - 1) == num_samples - 1


def test_no_sample_takes_no_slot() -> None:
    assert slots_for((Pool(1, 10), Pool(1, 10)), 0, 0) == 0


@settings(max_examples=60, deadline=None)
@given(one=ORDERS, left_out=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8)), min_size=1, max_size=4))
def test_what_is_left_out_is_skipped_and_the_rest_keeps_its_order(one: Order, left_out: list[tuple[int, int]]) -> None:
    """Windows that come one after the other, each in the numbers that steps have by then, over those before too."""
    one = replace(one, num_samples=40 * one.batch_samples)
    num_slots = one.num_samples + sum(count for _, count in left_out) * one.batch_samples
    expected = pairs(one.slots(np.arange(num_slots)))
    for first, count in left_out:
        one = one.without(first, first + count)
        del expected[first * one.batch_samples : (first + count) * one.batch_samples]
        assert pairs(one.slots(np.arange(len(expected)))) == expected
