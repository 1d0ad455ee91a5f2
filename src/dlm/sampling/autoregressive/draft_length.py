"""Adaptive draft length: the number of draft tokens that commits the most tokens a second, as measured while a run goes on.

Where a pass of several positions costs as much as it brings, as on a busy CPU or in a large batch, that is none: plain decoding. It decides
about speed alone: with common random numbers the text is the same whatever is chosen.
Shapes: S slots, the draft tokens of a pass from left to right.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Sequence

from dlm.errors import in_range

MAX_STRIDE = 257
"""Tokens that a forward pass may commit at most: 256 draft tokens and the target's own."""
TRIAL_PASSES = 3
"""Forward passes of a stride before it is judged."""
TIMED_PASSES = 16
"""The last forward passes of a stride, whose time counts."""
FORGETTING_PASSES = 128
"""Forward passes of a row after which acceptance counts 1 / e."""
PLAIN_BONUS = 1.03
"""The factor by which speculation must be faster than plain decoding."""
FIRST_PATIENCE_PASSES, LAST_PATIENCE_PASSES = 16, 64
"""Forward passes before another stride is tried again; the number doubles whenever that changes nothing."""


def tokens_per_forward(accept_S: Sequence[float], *, restart: bool = True) -> float:
    """Tokens that a forward pass commits where slot j is accepted with probability accept_S[j], independently.

    A pass that verifies S draft tokens commits 1 + a1 + a1 a2 + ... tokens. restart: unless all are accepted, a pass follows that commits
    one and drafts again; with equal probabilities a and stride N it is then (2 + a + ... + a^(N - 2)) / (2 - a^(N - 1)) (I-DLM, arXiv
    2604.11035).
    """
    reach, tokens = 1.0, 1.0
    for chance in accept_S:
        reach *= chance
        tokens += reach
    return (tokens + 1 - reach) / (2 - reach) if restart else tokens


class AdaptiveDraftLength:
    """Chooses the stride, one more than the draft tokens, for one model and one drafter; it may serve several runs.

    most: the greatest stride; grows: the factor from each stride to the next. InputError for a stride out of range.
    """

    def __init__(self, most: int, grows: int = 2) -> None:
        in_range(most, 1, MAX_STRIDE, "the greatest stride")
        self.strides: list[int] = sorted({most, *(grows**k for k in range(most.bit_length()) if grows**k < most)})
        self._seconds: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=TIMED_PASSES))
        # of the k-th draft token: passes that verified it, passes that accepted it; begun as if half were
        self._tested = [1.0] * most
        self._accepted = [0.5**k for k in range(most)]
        self._patience, self._since, self._trying, self._best = FIRST_PATIENCE_PASSES, 0, 0, 0

    def tokens(self, stride: int) -> float:
        """Tokens that a forward pass of this stride commits, as far as is known."""
        return 1.0 + sum(self._accepted[k] / self._tested[k] for k in range(1, stride))

    def seconds(self, rows: int, stride: int) -> float:
        """Seconds of such a pass, those without draft tokens among them; counts of rows up to the next power of two are one."""
        return statistics.median(self._seconds[_size(rows), stride])  # which one pass that was compiled, or disturbed, does not change

    def choose(self, rows: int) -> int:
        """The stride of the next forward pass of so many rows."""
        tried = list[int]()
        for stride in self.strides:
            if len(self._seconds[_size(rows), stride]) < TRIAL_PASSES:
                if len(tried) < 2 or self._promises(rows, stride, *tried[-2:]):
                    return stride
                break
            tried.append(stride)
        order = sorted(tried, key=lambda s: self._rate(rows, s))
        if order[-1] != self._best:
            self._best, self._patience, self._since = order[-1], FIRST_PATIENCE_PASSES, 0
        elif self._since >= self._patience and len(order) > 1:
            self._patience, self._since, self._trying = min(2 * self._patience, LAST_PATIENCE_PASSES), 0, TRIAL_PASSES
        self._since += 1
        if self._trying:
            self._trying -= 1
            return order[-2]
        return order[-1]

    def _rate(self, rows: int, stride: int) -> float:
        """Tokens a second."""
        return self.tokens(stride) / self.seconds(rows, stride) * (PLAIN_BONUS if stride == 1 else 1)

    def _promises(self, rows: int, stride: int, before: int, last: int) -> bool:
        """Whether a stride would pay if later draft tokens were accepted as often as the last one known, and time grew once more as it
        just did."""
        reaches = self._accepted[last - 1] / self._tested[last - 1]
        seconds = self.seconds(rows, last) * max(1.0, self.seconds(rows, last) / self.seconds(rows, before))
        return (self.tokens(last) + reaches * (stride - last)) / seconds > max(self._rate(rows, s) for s in (1, before, last))

    def record(self, rows: int, stride: int, seconds: float, accepted: list[int]) -> None:
        """Learn from a forward pass that followed one of the same stride. accepted: draft tokens, of each row that is not done."""
        self._seconds[_size(rows), stride].append(seconds)
        keep = (1 - 1 / FORGETTING_PASSES) ** len(accepted)
        for k in range(1, stride):
            self._tested[k] = self._tested[k] * keep + len(accepted)
            self._accepted[k] = self._accepted[k] * keep + sum(one >= k for one in accepted)


def _size(rows: int) -> int:
    return (rows - 1).bit_length()
