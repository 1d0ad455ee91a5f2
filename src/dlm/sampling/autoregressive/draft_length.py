"""How many tokens a call should try for: the stride that commits the most tokens a second, by what calls took and what held so far.

Where a call of several positions costs as much as it brings, as on a busy CPU or in a large batch, that is 1: plain decoding. It decides
about speed alone: with common random numbers the text is the same at every stride.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque

TRIES = 3  # calls of a stride before it is judged
RECENT = 16  # calls whose time counts
MEMORY = 128  # calls of a row after which what it said counts 1 / e
PLAIN = 1.03  # what others must be better by than plain decoding
PATIENCE = 16, 64  # calls before another stride is tried again: at first, and at most, as it doubles whenever that changes nothing


class AdaptiveDraftLength:
    """For one model and one kind of proposals; it may serve several runs. most: the greatest stride, grows: the factor to it."""

    def __init__(self, most: int, grows: int = 2) -> None:
        self.strides: list[int] = sorted({most, *(grows**k for k in range(most.bit_length()) if grows**k < most)})
        self._seconds: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._tested = [1.0] * most  # of the k-th proposal: calls that allowed it, calls in which it held; begun as if half did
        self._held = [0.5**k for k in range(most)]
        self._patience, self._since, self._trying, self._best = PATIENCE[0], 0, 0, 0

    def tokens(self, stride: int) -> float:
        """What a call of this stride commits, as far as is known."""
        return 1.0 + sum(self._held[k] / self._tested[k] for k in range(1, stride))

    def seconds(self, rows: int, stride: int) -> float:
        """What such a call takes, those without proposals among them; counts of rows up to the next power of two are one."""
        return statistics.median(self._seconds[_size(rows), stride])  # which one call that was compiled, or disturbed, does not change

    def choose(self, rows: int) -> int:
        """The stride of the next call of so many rows."""
        tried = list[int]()
        for stride in self.strides:
            if len(self._seconds[_size(rows), stride]) < TRIES:
                if len(tried) < 2 or self._promises(rows, stride, *tried[-2:]):
                    return stride
                break
            tried.append(stride)
        order = sorted(tried, key=lambda s: self._rate(rows, s))
        if order[-1] != self._best:
            self._best, self._patience, self._since = order[-1], PATIENCE[0], 0
        elif self._since >= self._patience and len(order) > 1:
            self._patience, self._since, self._trying = min(2 * self._patience, PATIENCE[1]), 0, TRIES
        self._since += 1
        if self._trying:
            self._trying -= 1
            return order[-2]
        return order[-1]

    def _rate(self, rows: int, stride: int) -> float:
        return self.tokens(stride) / self.seconds(rows, stride) * (PLAIN if stride == 1 else 1)

    def _promises(self, rows: int, stride: int, before: int, last: int) -> bool:
        """Whether a stride would pay if later proposals held as often as the last one known, and time grew once more as it just did."""
        reaches = self._held[last - 1] / self._tested[last - 1]
        seconds = self.seconds(rows, last) * max(1.0, self.seconds(rows, last) / self.seconds(rows, before))
        return (self.tokens(last) + reaches * (stride - last)) / seconds > max(self._rate(rows, s) for s in (1, before, last))

    def saw(self, rows: int, stride: int, seconds: float, taken: list[int]) -> None:
        """What a call did that followed one of the same stride. taken: proposals that held, of each row that is not done."""
        self._seconds[_size(rows), stride].append(seconds)
        keep = (1 - 1 / MEMORY) ** len(taken)
        for k in range(1, stride):
            self._tested[k] = self._tested[k] * keep + len(taken)
            self._held[k] = self._held[k] * keep + sum(one >= k for one in taken)


def _size(rows: int) -> int:
    return (rows - 1).bit_length()
