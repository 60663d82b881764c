"""The ledger of what weights have seen: sorted 128-bit document ids in one file, read by bisection."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

ID_TYPE = np.dtype("V16")


def pack_ids(ids: Iterable[str]) -> np.ndarray:
    """Hex ids -> (N,) V16."""
    return np.frombuffer(b"".join(bytes.fromhex(i) for i in ids), dtype=ID_TYPE)


def sorted_unique(ids: np.ndarray) -> np.ndarray:
    """(N,) V16 -> (M,) V16, ascending by bytes. NumPy sorts no void type, so as two big-endian words."""
    words = np.ascontiguousarray(ids).view(">u8").reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0]))
    words = words[order]
    fresh = np.ones(len(words), dtype=bool)
    fresh[1:] = (words[1:] != words[:-1]).any(axis=1)
    return np.ascontiguousarray(words[fresh]).view(ID_TYPE).reshape(-1)


def write_ledger(path: Path, ids: np.ndarray) -> None:
    """Write ids (any order, duplicates allowed) as a ledger file."""
    sorted_unique(ids).tofile(path)


class Ledger:
    """Membership by bisection over a memory-mapped file: O(log n) reads, no load."""

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        self.ids = np.memmap(path, dtype=ID_TYPE, mode="r") if size else np.empty(0, dtype=ID_TYPE)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, document_id: str) -> bool:
        wanted = bytes.fromhex(document_id)
        low, high = 0, len(self.ids)
        while low < high:
            middle = (low + high) // 2
            if self.ids[middle].tobytes() < wanted:
                low = middle + 1
            else:
                high = middle
        return low < len(self.ids) and self.ids[low].tobytes() == wanted
