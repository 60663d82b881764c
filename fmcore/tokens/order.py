"""The order of the data: which samples make up step n, as a pure function.

order(seed, n, pools, batch) needs no state and no stored permutation, so that a resumed run is in its place
at once, at any number of processes.

Slots are numbered through all steps. A slot's pool follows from fixed weights (blocks of 4,096 slots hold
exact quotas, spread evenly); the how-manieth slot of its pool it is gives an epoch and a position; a keyed
bijection (Feistel network with cycle walking, Black & Rogaway 2002) turns the position into a sample.

Windows of slots can be left out, where a training went wrong on them: the slots of later steps then move up.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

BLOCK = 4096
ROUNDS = 6


@dataclass(frozen=True)
class Pool:
    """Samples drawn together: `num_samples` of one or many sources, with a share of the slots."""

    weight: float
    num_samples: int


@dataclass(frozen=True)
class Order:
    """The samples of every step.

    pools: their weights are shares, relative to each other. batch_samples: slots in one step.
    num_samples: slots in the whole run; the last step takes what is left. windows: (first, count) of slots that
    no step takes, in ascending order.
    """

    seed: int
    pools: tuple[Pool, ...]
    batch_samples: int
    num_samples: int
    windows: tuple[tuple[int, int], ...] = ()

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the whole run."""
        return -(-self.num_samples // self.batch_samples)

    def step(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(pool, sample) of each slot of a step, (n,) each. step counts from 0."""
        first = step * self.batch_samples
        last = min(first + self.batch_samples, self.num_samples)
        return self.slots(np.arange(first, last, dtype=np.int64))

    def slots(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(pool, sample) of any slots, counted without those left out, (n,) each."""
        blocks, within = np.divmod(self._moved_up(slots), BLOCK)
        pools = self._layout[0][within]
        ordinals = blocks * self._quotas[pools] + self._layout[1][within]
        samples = np.empty(len(slots), dtype=np.int64)
        for index, pool in enumerate(self.pools):
            mine = pools == index
            samples[mine] = self._draw(index, pool, ordinals[mine])
        return pools, samples

    def _moved_up(self, slots: np.ndarray) -> np.ndarray:
        for first, count in self.windows:
            slots = np.where(slots >= first, slots + count, slots)
        return slots

    def without(self, first_step: int, last_step: int) -> "Order":
        """The same order without the data of steps `first_step` up to, but not including, `last_step`."""
        ends = np.array([first_step * self.batch_samples, min(last_step * self.batch_samples, self.num_samples) - 1])
        first, last = (int(slot) for slot in self._moved_up(ends))
        others = [window for window in self.windows if not first <= window[0] <= last]
        return replace(self, windows=tuple(sorted([*others, (first, last - first + 1)])))

    def _draw(self, index: int, pool: Pool, ordinals: np.ndarray) -> np.ndarray:
        epochs, positions = np.divmod(ordinals, max(pool.num_samples, 1))
        samples = np.empty(len(ordinals), dtype=np.int64)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            key = _mix(np.uint64(self.seed), np.uint64(index), np.uint64(epoch))
            samples[mine] = bijection(positions[mine], pool.num_samples, int(key))
        return samples

    def drawn(self, pool: int, num_slots: int) -> int:
        """How many of the first `num_slots` slots belong to a pool."""
        blocks, rest = divmod(num_slots, BLOCK)
        return int(blocks * self._quotas[pool] + np.count_nonzero(self._layout[0][:rest] == pool))

    @cached_property
    def _quotas(self) -> np.ndarray:
        return np.array(quotas(tuple(p.weight for p in self.pools)), dtype=np.int64)

    @cached_property
    def _layout(self) -> tuple[np.ndarray, np.ndarray]:
        return block_layout(tuple(int(q) for q in self._quotas))


def quotas(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Slots of a block per pool, summing to 4,096: largest remainder, at least one for a positive weight."""
    total = sum(weights)
    exact = [w / total * BLOCK for w in weights]
    slots = [max(int(e), 1 if w > 0 else 0) for e, w in zip(exact, weights, strict=True)]
    by_remainder = sorted(range(len(weights)), key=lambda i: (slots[i] - exact[i], i))
    for i in range(BLOCK - sum(slots)):
        slots[by_remainder[i % len(slots)]] += 1
    while sum(slots) > BLOCK:
        slots[int(np.argmax(slots))] -= 1
    return tuple(slots)


@lru_cache(maxsize=64)
def block_layout(slots_per_pool: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(pool, ordinal within the block) of each slot, (4096,) each, every pool spread evenly."""
    places, pools, ordinals = [], [], []
    for pool, count in enumerate(slots_per_pool):
        places.append((np.arange(count) + 0.5) / max(count, 1))
        pools.append(np.full(count, pool, dtype=np.int64))
        ordinals.append(np.arange(count, dtype=np.int64))
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate(pools)[order], np.concatenate(ordinals)[order]


def slots_for(pools: tuple[Pool, ...], pool: int, num_samples: int) -> int:
    """The fewest slots that hold `num_samples` samples of a pool."""
    probe = Order(seed=0, pools=pools, batch_samples=1, num_samples=0)
    quota = int(probe._quotas[pool])
    if num_samples == 0:
        return 0
    blocks, rest = divmod(num_samples, quota)
    if rest == 0:
        blocks, rest = blocks - 1, quota
    last = np.flatnonzero(probe._layout[0] == pool)[rest - 1]
    return blocks * BLOCK + int(last) + 1


def bijection(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """A keyed permutation of [0, size), evaluated at some positions: (n,) int64 -> (n,) int64."""
    if size <= 1:
        return np.zeros_like(positions)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    values = _feistel(positions.astype(np.uint64), half, key)
    while True:
        outside = values >= size  # walk the cycle until back inside
        if not outside.any():
            return values.astype(np.int64)
        values[outside] = _feistel(values[outside], half, key)


def _feistel(values: np.ndarray, half: int, key: int) -> np.ndarray:
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (_mix(right, np.uint64(key), np.uint64(number)) & mask)
    return (left << np.uint64(half)) | right


def _mix(*words: np.ndarray | np.uint64) -> np.ndarray:
    """SplitMix64's finalizer (Steele et al. 2014), folded over the words."""
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state if state.shape != (1,) else state[0]
