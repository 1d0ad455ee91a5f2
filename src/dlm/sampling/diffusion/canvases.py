"""Text written canvas by canvas: each is denoised whole beside the text before it, which the network has read once.

Shapes: B rows, L positions, C of a canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.protocols import RNG, Denoiser, NoiseProcess, OwnDraws, SomeDraws
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.diffusion.protocols import Rule
from dlm.trajectory import Canvas, Frame


class Reader(Protocol):
    """The text before a canvas, as a network has read it."""

    def add(self, text_1N: Tensor) -> None:
        """Read on."""

    def canvas(self) -> Denoiser:
        """What denoises the next canvas, from its first step on."""


@dataclass(frozen=True)
class CanvasSampler:
    """DiffusionGemma's outer loop. Rows are written one after another, so that a row is the same alone and in any batch.

    A canvas is denoised whole, also where the row ends within it. stops: tokens that end a text once their canvas is done.
    """

    read: Callable[[], Reader]
    noise: NoiseProcess
    length: int
    rule: Rule
    budget: int
    model: str = ""
    stops: frozenset[int] = frozenset()

    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """A frame after every forward pass of the decoder. rng: one a row. InputError for text after a hole, and for an empty prompt."""
        first_B = canvas.free_BT.int().argmax(-1)
        after_BL = torch.arange(canvas.free_BT.shape[1], device=first_B.device) > first_B[:, None]
        if bool((canvas.given_BT & after_BL & canvas.free_BT.any(-1, keepdim=True)).any()):
            raise InputError(f"{self.model} writes from left to right: it cannot fill holes or lead to a suffix")
        if bool((canvas.free_BT[:, 0]).any()):
            raise InputError(f"{self.model} reads the text before it writes: give a prompt")
        tokens_BL, open_BL = torch.where(canvas.free_BT, self.noise.mask_id, canvas.tokens_BT), canvas.free_BT.clone()
        forwards = 0
        lengths = canvas.valid_BT.sum(-1).tolist()
        for row, (first, length) in enumerate(zip(first_B.tolist(), lengths, strict=True)):
            reader, begun = self.read(), 0
            for begin in range(first, length if bool(open_BL[row].any()) else first, self.length):
                reader.add(tokens_BL[row : row + 1, begun:begin])
                begun, end = begin, min(begin + self.length, length)
                for frame in self._canvas(reader, rng[row], tokens_BL.device):
                    forwards += 1
                    tokens_BL[row, begin:end] = frame.tokens_BT[0, : end - begin]
                    open_BL[row, begin:end] = ~frame.settled_BT[0, : end - begin]
                    t_B = open_BL.double().sum(-1) / canvas.free_BT.sum(-1).clamp(min=1)
                    yield Frame(tokens_BL.clone(), ~open_BL, t_B, self.model, forwards)
                if not self.stops.isdisjoint(tokens_BL[row, begin:end].tolist()):
                    open_BL[row] = False
                    break

    def _canvas(self, reader: Reader, rng: torch.Generator | OwnDraws | SomeDraws, device: torch.device) -> Iterator[Frame]:
        free_1C = torch.ones(1, self.length, dtype=torch.bool, device=device)
        blank = Canvas(torch.full_like(free_1C, self.noise.mask_id, dtype=torch.long), free_1C, free_1C)
        sampler = DiffusionSampler(reader.canvas(), self.noise, self.length, self.rule, self.budget, model=self.model)
        run = sampler.begin(blank, rng=[rng])
        while bool(run.live_B.any()):
            yield run.step()
