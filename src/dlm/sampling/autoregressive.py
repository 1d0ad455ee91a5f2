"""The baseline: one token a call, left to right, against a cache.

The network reads MASK as the start token, then the text; output i predicts text token i. Windows tile a long text as
in diffusion: at the end of a window the last `context` tokens are read again as the beginning of the next.
Shapes: B rows, L positions of the canvas, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dlm.errors import InputError
from dlm.protocols import RNG, Denoiser
from dlm.sampling import windows
from dlm.sampling.draw import Draw
from dlm.trajectory import Canvas, Frame


@dataclass(frozen=True)
class AutoregressiveSampler:
    """Continue prompts. make_cache(rows) gives an empty cache; without it every call reads the whole window again."""

    denoiser: Denoiser
    mask_id: int
    window: int
    make_cache: Callable[[int], Any] | None = None
    draw: Draw = field(default_factory=Draw)
    context: int = 0
    model: str = ""

    def __post_init__(self) -> None:
        windows.check(self.window, self.context)

    @torch.no_grad()
    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """A frame for every column in which some row has a free position. InputError for text after a hole."""
        free_BL, valid_BL = canvas.free_BT, canvas.valid_BT
        if bool((free_BL[:, :-1] & ~free_BL[:, 1:] & valid_BL[:, 1:]).any()):
            raise InputError("an autoregressive model only continues a prompt: it cannot fill holes or lead to a suffix")
        rows, length = free_BL.shape
        text_BL = torch.where(free_BL, self.mask_id, canvas.tokens_BT)
        input_BL = torch.cat([torch.full_like(text_BL[:, :1], self.mask_id), text_BL], 1)  # input j predicts text j
        open_BL, begin = free_BL.clone(), 0
        cache, read = self._empty(rows), 0  # read: inputs of this window in the cache
        columns = free_BL.any(0).nonzero().squeeze(-1).tolist()
        for forwards, column in enumerate(columns, 1):
            if column - begin >= self.window:
                begin = (column - self.context) // (self.window - self.context) * (self.window - self.context)
                cache, read = self._empty(rows), 0
            tokens = input_BL[:, begin + read : column + 1].clone()
            if read == 0:
                tokens[:, 0] = self.mask_id
            logits_BV = self.denoiser(tokens, cache=cache)[:, -1].clone()
            read = column - begin + 1 if cache is not None else 0
            logits_BV[:, self.mask_id] = -torch.inf
            rows_A = free_BL[:, column].nonzero().squeeze(-1)
            drawn_A = self.draw(logits_BV[rows_A, None].log_softmax(-1), [rng[b] for b in rows_A.tolist()]).squeeze(1)
            text_BL[rows_A, column] = input_BL[rows_A, column + 1] = drawn_A
            open_BL[:, column] = False
            yield Frame(text_BL.clone(), ~open_BL, open_BL.double().sum(-1) / length, self.model, forwards)

    def _empty(self, rows: int) -> Any:
        return self.make_cache(rows) if self.make_cache else None
