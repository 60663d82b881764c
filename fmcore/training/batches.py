"""Batches: the rows of a step, gathered from the pools that the order draws from."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fmcore.tokens.order import Order, Pool
from fmcore.tokens.samples import IGNORE, Samples, filler, open_samples
from fmcore.tokens.shards import map_array
from fmcore.training.spec import Member, TrainSpec


class Batch(NamedTuple):
    """One process's rows of a step: (B, T) int64 each.

    num_labels: of these rows, positions in the loss; num_tokens: positions of the whole step, which all processes
    together feed; sources: share of the whole step's rows.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    num_labels: int
    num_tokens: int
    sources: dict[str, float]


class _Source:
    """A member's samples, or a subset of them."""

    def __init__(self, member: Member, seq_len: int, pad_id: int) -> None:
        self.member = member
        self.samples: Samples = open_samples(
            member.shards,
            member.source,
            form=member.form,
            vocab_size=member.vocab_size,
            seq_len=seq_len,
            pad_id=pad_id,
        )
        self._subset = map_array(member.subset, np.uint32) if member.subset else None

    def __len__(self) -> int:
        return len(self.samples) if self._subset is None else len(self._subset)

    def numbers(self, indices: np.ndarray) -> np.ndarray:
        """Sample numbers behind positions in this (sub)set."""
        return indices if self._subset is None else self._subset[indices].astype(np.int64)


class Batches:
    """The batch of any step, as a function of the step. windows: data left out, see Order."""

    def __init__(self, spec: TrainSpec, pad_id: int, windows: Sequence[tuple[int, int]] = ()) -> None:
        self._filler = filler(spec.seq_len, pad_id)
        self.pools = [[_Source(m, spec.seq_len, pad_id) for m in pool.members] for pool in spec.pools]
        self._starts = [np.cumsum([0, *map(len, pool)]) for pool in self.pools]
        pools = tuple(Pool(pool.weight, int(starts[-1])) for pool, starts in zip(spec.pools, self._starts, strict=True))
        self.order = Order(spec.seed, pools, spec.batch_samples, spec.num_samples, tuple(windows))

    def at(self, step: int, *, rank: int = 0, world: int = 1) -> Batch:
        """This rank's rows of a step, counted from 0.

        All ranks get as many, so that they work in step; what is missing is filled up with rows without labels.
        """
        rows, sources = [], Counter[str]()
        slots = list(zip(*self.order.step(step), strict=True))
        for place, (pool, index) in enumerate(slots):
            source, number = self._locate(int(pool), np.array([index]))
            sources[source.member.label] += 1
            if place % world == rank:
                rows.append(source.samples.row(int(number[0])))
        rows += [self._filler] * (-(-len(slots) // world) - len(rows))
        input_ids, labels, positions = (np.stack(column) for column in zip(*rows, strict=True))
        return Batch(
            torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(positions),
            num_labels=int(np.count_nonzero(labels != IGNORE)), num_tokens=len(slots) * input_ids.shape[1],
            sources={name: n / len(slots) for name, n in sorted(sources.items())},
        )  # fmt: skip

    def _locate(self, pool: int, indices: np.ndarray) -> tuple[_Source, np.ndarray]:
        which = int(np.searchsorted(self._starts[pool], indices[0], side="right")) - 1
        source = self.pools[pool][which]
        return source, source.numbers(indices - self._starts[pool][which])

    def seen_samples(self, num_steps: int, skipped: Sequence[int] = ()) -> list[tuple[_Source, np.ndarray]]:
        """For each source the sorted numbers of the samples that the first `num_steps` steps held, but `skipped`."""
        num_slots = min(num_steps * self.order.batch_samples, self.order.num_samples)
        slots = np.arange(num_slots, dtype=np.int64)
        slots = slots[~np.isin(slots // self.order.batch_samples, np.array(skipped, dtype=np.int64))]
        pools, indices = self.order.slots(slots)
        seen = []
        for pool, sources in enumerate(self.pools):
            mine = np.unique(indices[pools == pool])
            for source, first, last in zip(sources, self._starts[pool], self._starts[pool][1:], strict=False):
                inside = mine[(mine >= first) & (mine < last)] - first
                seen.append((source, np.sort(source.numbers(inside))))
        return seen
