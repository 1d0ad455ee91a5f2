"""Autoregressive decoding, the baseline: one token a forward pass, left to right, against a KV cache.

The network reads a start token (MASK in our own), then the text; output i predicts text token i. A converted base may have none: it
reads the text alone, and the first token must be given. Windows tile a long text as in diffusion: at the end of a window the last
`context` tokens are read again as the beginning of the next.
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
from dlm.sampling.autoregressive.guide import Guide
from dlm.sampling.diffusion.automaton import Automaton
from dlm.sampling.draw import Draw, check_sound, race
from dlm.trajectory import Canvas, Frame


def start_token(start: int | None, mask_id: int, context: int) -> int | None:
    """The mask for -1. InputError for none where a later window would begin with nothing."""
    if start is None and not context:
        raise InputError("a model without start token needs context in every window")
    return mask_id if start == -1 else start


def check_continues(canvas: Canvas, start: int | None) -> None:
    """InputError for text after a hole, and for a row without a beginning where the network reads no start token."""
    free_BL, valid_BL = canvas.free_BT, canvas.valid_BT
    if bool((free_BL[:, :-1] & ~free_BL[:, 1:] & valid_BL[:, 1:]).any()):
        raise InputError("an autoregressive model only continues a prompt: it cannot fill holes or lead to a suffix")
    if start is None and bool(free_BL[:, 0].any()):
        raise InputError("this model reads no start token: give a prompt of at least one token")


@dataclass(frozen=True)
class AutoregressiveSampler:
    """Continue prompts. make_cache(rows, positions) gives an empty KV cache; without it every forward pass reads the whole window.

    start: the token that is read before a window, -1 for the mask, None for nothing. stop: tokens that end a row; positions after one
    stay free. form: of the text that each row writes. InputError for settings out of range.
    """

    denoiser: Denoiser
    mask_id: int
    window: int
    make_cache: Callable[[int, int], Any] | None = None
    draw: Draw = field(default_factory=Draw)
    context: int = 0
    model: str = ""
    start: int | None = -1
    stop: frozenset[int] = frozenset()
    form: Automaton | None = None

    def __post_init__(self) -> None:
        windows.check(self.window, self.context)
        object.__setattr__(self, "start", start_token(self.start, self.mask_id, self.context))

    @torch.no_grad()
    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """A frame for every column in which some row has a free position. InputError for text after a hole."""
        free_BL = canvas.free_BT
        check_continues(canvas, self.start)
        rows, length = free_BL.shape
        text_BL = torch.where(free_BL, self.mask_id, canvas.tokens_BT)
        input_BL = torch.cat([torch.full_like(text_BL[:, :1], self.mask_id), text_BL], 1)  # input j predicts text j
        open_BL, begin = free_BL.clone(), 0
        guides = self._guides(canvas)
        done_B = torch.zeros_like(free_BL[:, 0])
        stop_S = torch.tensor(sorted(self.stop), dtype=torch.long, device=text_BL.device)
        cache, read = self._empty(rows, length), 0  # read: inputs of this window in the cache
        columns = free_BL.any(0).nonzero().squeeze(-1).tolist()
        for forwards, column in enumerate(columns, 1):
            if column - begin >= self.window:
                begin = (column - self.context) // (self.window - self.context) * (self.window - self.context)
                cache, read = self._empty(rows, length), 0
            tokens = input_BL[:, begin + read : column + 1].clone()
            if read == 0 and self.start is not None:
                tokens[:, 0] = self.start
            elif read == 0:
                tokens = tokens[:, 1:]
            last_BQ = torch.zeros_like(tokens, dtype=torch.bool)
            last_BQ[:, -1] = True  # the head reads no other
            logits_BV = self.denoiser(tokens, cache=cache, at_BQ=last_BQ)[:, -1].float().clone()
            read = column - begin + 1 if cache is not None else 0
            logits_BV[:, self.mask_id] = -torch.inf
            for b, guide in enumerate(guides):
                if bool(free_BL[b, column]) and not bool(done_B[b]):
                    logits_BV[b, ~guide.allowed(int(free_BL[b, column + 1 :].sum())).to(logits_BV.device)] = -torch.inf
            due = [b for b, one in enumerate((free_BL[:, column] & ~done_B).tolist()) if one]
            if not due:  # all that are open here have ended; others begin later
                continue
            rows_A = torch.arange(rows, device=text_BL.device) if len(due) == rows else torch.tensor(due, device=text_BL.device)
            logits_AV = logits_BV if len(due) == rows else logits_BV[rows_A]
            check_sound(logits_AV)
            logp_AV = logits_AV if self.draw.temperature == 0 else logits_AV.log_softmax(-1)
            drawn_A = self.draw(logp_AV[:, None], [rng[b] for b in due], race).squeeze(1)
            text_BL[rows_A, column] = input_BL[rows_A, column + 1] = drawn_A
            open_BL[rows_A, column] = False
            done_B[rows_A] = torch.isin(drawn_A, stop_S)
            for b, token in zip(due if guides else (), drawn_A.tolist(), strict=False):
                guides[b].take(token)
                done_B[b] |= guides[b].ended
            yield Frame(text_BL.clone(), ~open_BL, open_BL.double().sum(-1) / length, self.model, forwards)
            if (self.stop or guides) and bool((done_B | ~(free_BL[:, column + 1 :].any(-1))).all()):
                return

    def _guides(self, canvas: Canvas) -> list[Guide]:
        """One a row, where the text has a form."""
        if self.form is None:
            return []
        given_B, free_B = canvas.given_BT.any(1).tolist(), canvas.free_BT.sum(1).tolist()
        return [Guide(self.form, free, prompted=given, stops=self.stop) for given, free in zip(given_B, free_B, strict=True)]

    def _empty(self, rows: int, length: int) -> Any:
        return self.make_cache(rows, min(self.window, length)) if self.make_cache else None
