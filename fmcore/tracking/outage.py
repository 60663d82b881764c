"""Not waiting twice for a server that is away: after a failure its address is left alone for a while.

What is not logged meanwhile is no loss; it is kept in mind, and `strata sync` derives it from the artifacts.
"""

import time
from functools import cache

FIRST_PAUSE_SECONDS = 30.0
LONGEST_PAUSE_SECONDS = 300.0


class Breaker:
    """Whether an address is worth a call now: shared by all who talk to it in this process."""

    def __init__(self) -> None:
        self._pause = 0.0
        self._until = 0.0

    @property
    def failing(self) -> bool:
        """Whether the last call failed; the next one should begin with a question that costs little."""
        return self._pause > 0

    def allows(self) -> bool:
        """Whether to call: always while calls succeed, and now and then while they fail."""
        return time.monotonic() >= self._until

    def failed(self) -> None:
        """A call failed: leave the address alone, each time for longer."""
        self._pause = min(2 * self._pause or FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        self._until = time.monotonic() + self._pause

    def succeeded(self) -> None:
        """A call succeeded."""
        self._pause = self._until = 0.0


@cache
def breaker_of(uri: str) -> Breaker:
    """The breaker of an address."""
    return Breaker()
