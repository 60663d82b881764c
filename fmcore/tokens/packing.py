"""Which records share a sample: best-fit decreasing, so that little is padding and nothing is cut."""

import bisect
from pathlib import Path

import numpy as np

INDEX_TYPE = np.uint32


def pack_best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of record indices, each at most `capacity` tokens; no record is split.

    lengths: (N,) tokens per record, none above capacity. Longest first, each into the fullest bin that
    still takes it (best-fit decreasing; Johnson 1973: at most 11/9 of the optimum, plus a constant).
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, bin), sorted
    for index in np.lexsort((np.arange(len(lengths)), -lengths)):
        length = int(lengths[index])
        place = bisect.bisect_left(free, (length, -1))
        if place == len(free):
            bins.append([])
            room, target = capacity, len(bins) - 1
        else:
            room, target = free.pop(place)
        bins[target].append(int(index))
        bisect.insort(free, (room - length, target))
    return bins


def write_plan(folder: Path, bins: list[list[int]]) -> None:
    """Keep the bins beside the stream: their boundaries and the record indices."""
    sizes = [len(b) for b in bins]
    np.cumsum([0, *sizes]).astype(INDEX_TYPE).tofile(folder / "plan_offsets.bin")
    np.array([i for b in bins for i in b], dtype=INDEX_TYPE).tofile(folder / "plan_records.bin")
