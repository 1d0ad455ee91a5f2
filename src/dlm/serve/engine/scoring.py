"""The log-probabilities of a text that is given, as a row of the engine: one forward pass reads it all.

Shapes: B = 1 row, T tokens of the text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dlm.protocols import RNG
from dlm.sampling.batching import WrittenDistribution
from dlm.trajectory import Canvas, Frame


@dataclass(frozen=True)
class Scorer:
    """A sampler that writes the tokens which it is given. predict(z_BT, t_B): logits (B, T, V) of each token, as `LanguageModel.predict`
    of an autoregressive model takes them; skips_first: whether the network has no distribution of the first token."""

    predict: Callable[[Tensor, Tensor], Tensor]
    tokens: tuple[int, ...]
    mask_id: int
    model: str
    skips_first: bool

    def begin(self, canvas: Canvas, *, rng: RNG) -> ScoringRun:
        """rng is not used: nothing is drawn."""
        return ScoringRun(self, canvas.tokens_BT.device)

    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """The one frame of the text."""
        yield self.begin(canvas, rng=rng).step()


class ScoringRun:
    """The state of one run (`dlm.sampling.batching`), which is one row and one forward pass."""

    reads_first: ClassVar[bool] = False

    def __init__(self, scorer: Scorer, device: torch.device) -> None:
        self.scorer, self.device = scorer, device
        self.tokens_1T = torch.tensor([scorer.tokens], device=device)
        self.distribution: WrittenDistribution | None = None

    @property
    def live_B(self) -> Tensor:
        return torch.tensor([self.distribution is None], device=self.device)

    def frame(self) -> Frame:
        done = self.distribution is not None
        tokens_1T = self.tokens_1T if done else torch.full_like(self.tokens_1T, self.scorer.mask_id)
        settled_1T = torch.full_like(self.tokens_1T, done, dtype=torch.bool)
        return Frame(tokens_1T, settled_1T, torch.zeros(1) if done else torch.ones(1), self.scorer.model, int(done))

    @torch.no_grad()
    def step(self) -> Frame:
        scorer, first = self.scorer, int(self.scorer.skips_first)
        z_1T = torch.cat([torch.full_like(self.tokens_1T[:, :1], scorer.mask_id), self.tokens_1T[:, :-1]], 1)
        logits_1TV = scorer.predict(z_1T, torch.zeros(1, device=self.device))
        column_N = torch.arange(first, len(scorer.tokens), device=self.device)
        self.distribution = WrittenDistribution(torch.zeros_like(column_N), column_N, logits_1TV[0, first:])
        return self.frame()

    def join(self, other: ScoringRun) -> None:
        """No other row has this sampler."""
        raise ValueError("a text is scored by itself")

    def keep(self, rows_K: Tensor) -> None:
        """There is one row."""
