"""Samplers of Gaussian noise on vectors: all open positions of a window become clearer together, and tokens are drawn at the end.

Shapes: B rows, A rows with open positions, L positions of the canvas, past its end a window more, T of the window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlm.errors import in_range
from dlm.noise.gaussian import GaussianNoise
from dlm.protocols import RNG
from dlm.sampling import windows
from dlm.sampling.diffusion.loop import MAX_STEPS
from dlm.sampling.draw import Draw, beside, check_sound
from dlm.trajectory import Canvas, Frame, Likely

SHOWN = 3
"""Likeliest tokens of a position that a frame tells."""


@dataclass(frozen=True)
class VectorSampler:
    """`budget` steps for each window, equal in t: the reverse process of VDM (Kingma et al. 2107.00630), or its flow.

    predict: evidence (A, T, V) and times (A,) -> logits. flow: the ordinary differential equation, in which the noise is drawn once.
    Positions past the end of a row are denoised with it and thrown away, as in training there was text. Its frames show the likeliest
    token of each position, and nothing is settled before the last step of a window.
    """

    predict: Callable[[Tensor, Tensor], Tensor]
    noise: GaussianNoise
    window: int
    draw: Draw = field(default_factory=Draw)
    budget: int = 64
    context: int = 0
    model: str = ""
    flow: bool = False
    revises = True

    def __post_init__(self) -> None:
        in_range(self.budget, 1, MAX_STEPS, "steps")
        windows.check(self.window, self.context)

    @torch.no_grad()
    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """A frame after every forward pass. rng: one a row."""
        text = _Text(canvas, self.noise.mask_id, self.window)
        context, forwards = self.context if canvas.tokens_BT.shape[1] > self.window else 0, 0
        while bool(text.open_BL.any()):
            rows_A = text.open_BL.any(-1).nonzero().squeeze(-1)
            own = [rng[b] for b in rows_A.tolist()]
            start_A = windows.start(text.open_BL[rows_A], self.window, context)
            x_AT, given_AT, open_AT = (
                windows.take(part_BL[rows_A], start_A, self.window) for part_BL in (text.z_BL, text.known_BL, text.open_BL)
            )
            for last, s, logp_ATV in self._window(x_AT, given_AT, own):
                forwards += 1
                next_AT = self.draw(logp_ATV, own) if last else logp_ATV.argmax(-1)
                windows.put(text.z_BL, rows_A, start_A, next_AT, open_AT)
                if last:
                    windows.put(text.open_BL, rows_A, start_A, torch.zeros_like(open_AT), open_AT)
                    windows.put(text.known_BL, rows_A, start_A, open_AT, open_AT)
                t_B = torch.zeros(len(text.z_BL), dtype=torch.float64, device=next_AT.device)
                t_B[rows_A] = s * text.open_BL[rows_A].any(-1).double()
                likely = None if last else text.likely(logp_ATV, rows_A, start_A, open_AT)
                yield Frame(text.shown_BL, ~text.open_BL[:, : text.length], t_B, self.model, forwards, likely=likely)

    def _window(self, x_AT: Tensor, given_AT: Tensor, own: RNG) -> Iterator[tuple[bool, float, Tensor]]:
        """(whether it is the last step, the time after it, log p(x_i | z)) of every step."""
        noise, device = self.noise, x_AT.device
        levels = torch.linspace(1, 0, self.budget, dtype=torch.float64).tolist()
        at = [torch.full((len(x_AT),), t, dtype=torch.float64, device=device) for t in levels]
        y_ATV = self._normal(x_AT, own)
        y_ATV = noise.without_mask(y_ATV, 0.0)
        certain_ATV = noise.certain(x_AT, y_ATV)
        for k, t_A in enumerate(at):
            e_ATV = torch.where(given_AT[..., None], certain_ATV, noise.of_vectors(y_ATV, t_A))
            logits_ATV = self.predict(e_ATV, t_A)
            check_sound(noise.without_mask(logits_ATV, 0.0))
            logp_ATV = noise.log_probs(logits_ATV, e_ATV, t_A)
            last = k == self.budget - 1
            yield last, 0.0 if last else levels[k + 1], logp_ATV
            if not last:  # the vectors move along the mean of the guess, at the temperature of the draws
                shaped_ATV = logp_ATV if self.draw == Draw() else self.draw.shape(logp_ATV)
                y_ATV = noise.moved(y_ATV, shaped_ATV, t_A, at[k + 1], None if self.flow else self._normal(x_AT, own))

    def _normal(self, x_AT: Tensor, own: RNG) -> Tensor:
        """N(0, I) for every entry (A, T, V), each row from its own generator, whatever its neighbours are."""
        shape, generators = (x_AT.shape[1], self.noise.vocab_size), [g for g in own if isinstance(g, torch.Generator)]
        return beside(torch.stack([torch.randn(shape, generator=g) for g in generators]), x_AT)


class _Text:
    """The tokens of a run: z_BL, open_BL where it writes, known_BL what stands for certain."""

    def __init__(self, canvas: Canvas, mask_id: int, window: int) -> None:
        past_BL = torch.zeros(len(canvas.tokens_BT), window, dtype=torch.bool, device=canvas.tokens_BT.device)
        self.canvas, self.length = canvas, canvas.tokens_BT.shape[1]
        noisy_BT = torch.where(canvas.free_BT, mask_id, canvas.tokens_BT)
        self.z_BL = torch.cat([noisy_BT, torch.full_like(past_BL, mask_id, dtype=torch.long)], 1)
        self.open_BL = torch.cat([canvas.free_BT, past_BL], 1)
        self.known_BL = torch.cat([canvas.given_BT, past_BL], 1)

    @property
    def shown_BL(self) -> Tensor:
        """The tokens of the canvas, its own on padding."""
        return torch.where(self.canvas.valid_BT, self.z_BL[:, : self.length], self.canvas.tokens_BT)

    def likely(self, logp_ATV: Tensor, rows_A: Tensor, start_A: Tensor, open_AT: Tensor) -> Likely:
        """The likeliest tokens at the open positions of these windows."""
        weight_ATC, token_ATC = logp_ATV.exp().topk(min(SHOWN, logp_ATV.shape[-1] - 1), -1)
        row, at = open_AT.nonzero(as_tuple=True)
        return Likely(rows_A[row], start_A[row] + at, token_ATC[row, at], weight_ATC[row, at])
