"""The split: a document's side follows from its content, so no stage can disagree with another."""

import heapq

from fmcore.data.normalize import content_id
from fmcore.errors import DataError

MIN_HELDOUT = 10


def fraction_of(document_id: str) -> float:
    """A document's place in [0, 1), uniform and fixed by its id."""
    return int(document_id[:8], 16) / 2**32


def group_fraction(group: str) -> float:
    """A group's place in [0, 1): records that share it fall on one side."""
    return fraction_of(content_id(group))


class HoldoutCheck:
    """Counts one source's held-out documents and knows which `holdout` would have given enough."""

    def __init__(self, name: str, holdout: float) -> None:
        self._name = name
        self._holdout = holdout
        self._lowest: list[float] = []  # the MIN_HELDOUT lowest places, negated for heapq
        self._total = 0

    def is_heldout(self, place: float) -> bool:
        """Whether a document (or group) at this place is held out."""
        self._total += 1
        heapq.heappush(self._lowest, -place)
        if len(self._lowest) > MIN_HELDOUT:
            heapq.heappop(self._lowest)
        return place < self._holdout

    def check(self, num_heldout: int, *, setting: str) -> None:
        """Raise DataError, naming the `holdout` that would do, where fewer than 10 are held out."""
        if num_heldout >= MIN_HELDOUT or self._total == 0:
            return
        have = f"{self._name}: only {num_heldout} of {self._total} documents are held out for evaluation"
        if self._total < 2 * MIN_HELDOUT:
            raise DataError(
                f"{have}, at least {MIN_HELDOUT} are needed and as many to train on: give it more documents, "
                f"or cut them smaller with split_on"
            )
        enough = -self._lowest[0]
        suggestion = -(-(enough + 1e-9) * 1000 // 1) / 1000 if enough < 0.999 else 0.999
        raise DataError(f"{have}, at least {MIN_HELDOUT} are needed: set {setting} to {suggestion:g}")
