"""Speculative any-order decoding: many tokens a call, and the distribution of one token a call in random order.

Shapes: B rows, A rows that still have something to do, K proposals, P pairs of a row and a number of proposals, T window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlm.errors import InputError, at_least
from dlm.noise.masked import MaskedNoise
from dlm.noise.schedule import time_when
from dlm.protocols import RNG, Denoiser
from dlm.sampling import windows
from dlm.sampling.draw import Draw, categorical, pick, uniform
from dlm.trajectory import Canvas, Frame


@dataclass(frozen=True)
class AnyOrderSpeculativeSampler:
    """Propose the next `proposals` tokens of a random order independently, verify them in one batched call.

    Row j of that call sees the first j proposals and gives p for the next; proposal x is accepted with min(1, p(x) / q(x)), q what
    it was drawn from, and the first rejected one is drawn anew from max(0, p - q) (Leviathan et al. 2211.17192). So the law is that of
    decoding one token a call in random order, whatever q is, and a call never yields less than one token. q for the next round is
    what the last verified row said, which misses one token at most.
    tolerance: accept with min(1, (1 + tolerance) p / q) instead; no token is then more than 1 + tolerance times as likely as its
    law says, so each is within tolerance / (1 + tolerance) of it in total variation.
    """

    denoiser: Denoiser
    noise: MaskedNoise
    window: int
    proposals: int = 8
    tolerance: float = 0.0
    draw: Draw = field(default_factory=Draw)
    context: int = 0
    model: str = ""

    def __post_init__(self) -> None:
        if self.proposals < 1:
            raise InputError(f"a speculative sampler proposes 1 token or more, got {self.proposals}")
        at_least(self.tolerance, 0, "the tolerance")
        windows.check(self.window, self.context)

    @torch.no_grad()
    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """A frame after every network call, whose batch has up to `proposals` rows for each row of the canvas."""
        noise, mask_id, window, device = self.noise, self.noise.mask_id, self.window, canvas.tokens_BT.device
        rows, length = canvas.tokens_BT.shape
        past_BL = torch.zeros(rows, window, dtype=torch.bool, device=device)
        open_BL = torch.cat([canvas.free_BT, past_BL], 1)
        z_BL = torch.where(canvas.given_BT, canvas.tokens_BT, mask_id)
        z_BL = torch.cat([z_BL, torch.full_like(past_BL, mask_id, dtype=torch.long)], 1)
        place_B = torch.full((rows,), -1, device=device)
        order_BT = torch.zeros(rows, window, dtype=torch.long, device=device)
        guess_BTV = torch.zeros(rows, window, noise.vocab_size, dtype=torch.float64, device=device)  # log q
        forwards = 0
        while bool(open_BL.any()):
            rows_A = open_BL.any(-1).nonzero().squeeze(-1)
            rng_A = [rng[b] for b in rows_A.tolist()]
            start_A = windows.start(open_BL[rows_A], window, self.context)
            z_AT, open_AT = (windows.take(x_BL[rows_A], start_A, window) for x_BL in (z_BL, open_BL))
            entered_A = start_A != place_B[rows_A]
            place_B[rows_A] = start_A
            if bool(entered_A.any()):
                entered_B = rows_A[entered_A]
                order_BT[entered_B] = uniform([rng[b] for b in entered_B.tolist()], window).to(device).argsort(-1)
            # the next masks in the order of each row; a row that begins a window has no guess yet and verifies nothing
            order_AT = order_BT[rows_A]
            ahead_AT = order_AT.gather(1, (~open_AT.gather(1, order_AT)).int().argsort(dim=-1, stable=True))
            count_A = open_AT.sum(-1).clamp(max=self.proposals).masked_fill(entered_A, 1)
            pos_AK = ahead_AT[:, : int(count_A.max())]
            row_AK = torch.arange(len(rows_A), device=device)[:, None].expand_as(pos_AK)
            k_K = torch.arange(pos_AK.shape[1], device=device)
            q_AKV = guess_BTV[rows_A[:, None], pos_AK]
            draw_AK, test_AK, again_AK = (uniform(rng_A, self.proposals).to(device)[:, : len(k_K)] for _ in range(3))
            token_AK = categorical(q_AKV, draw_AK)
            real_AK = k_K < count_A[:, None]
            row_P, k_P = real_AK.nonzero(as_tuple=True)
            z_PT = z_AT[row_P].scatter(1, pos_AK[row_P], torch.where(k_K < k_P[:, None], token_AK[row_P], z_AT.gather(1, pos_AK)[row_P]))
            t_P = time_when(noise.schedule, (z_PT != mask_id).double().mean(-1))
            logp_PTV = self.draw.shape(noise.log_probs(self.denoiser(z_PT, t_P).double(), z_PT, t_P))
            forwards += 1
            if bool(logp_PTV.isnan().any()):
                raise InputError("the model gives no probabilities (nan): its weights are broken")
            p_AKV = q_AKV.new_zeros(q_AKV.shape)
            p_AKV[row_P, k_P] = logp_PTV[torch.arange(len(row_P), device=device), pos_AK[row_P, k_P]].exp()
            accept_AK, other_AK = self._verify(p_AKV, q_AKV.exp(), token_AK, test_AK, again_AK)
            accept_AK = accept_AK & ~entered_A[:, None] & real_AK
            taken_A = accept_AK.int().cumprod(-1).sum(-1)
            fresh_AK = torch.where(entered_A[:, None], categorical(p_AKV.log(), draw_AK), other_AK)
            token_AK = torch.where(k_K == taken_A[:, None], fresh_AK, token_AK)
            write_AK = (k_K <= taken_A[:, None]) & real_AK
            z_AT = z_AT.scatter(1, pos_AK, torch.where(write_AK, token_AK, z_AT.gather(1, pos_AK)))
            written_AT = torch.zeros_like(open_AT)
            written_AT[row_AK[write_AK], pos_AK[write_AK]] = True
            first_A = real_AK.sum(-1).cumsum(0) - real_AK.sum(-1)
            guess_BTV[rows_A] = logp_PTV[first_A + torch.minimum(taken_A, count_A - 1)]
            windows.put(z_BL, rows_A, start_A, z_AT, written_AT)
            windows.put(open_BL, rows_A, start_A, torch.zeros_like(open_AT), written_AT)
            level_B = open_BL[:, :length].double().mean(-1)
            tokens_BL = torch.where(canvas.valid_BT, z_BL[:, :length], canvas.tokens_BT)
            yield Frame(tokens_BL, ~open_BL[:, :length], level_B, self.model, forwards)

    def _verify(self, p_AKV: Tensor, q_AKV: Tensor, token_AK: Tensor, test_AK: Tensor, again_AK: Tensor) -> tuple[Tensor, Tensor]:
        """(accepted, what to write instead) for every proposal."""
        p_AK, q_AK = (pick(x, token_AK) for x in (p_AKV, q_AKV))
        accept_AK = test_AK * q_AK < (1 + self.tolerance) * p_AK
        rest_AKV = (p_AKV - q_AKV).clamp(min=0)
        rest_AKV = torch.where(rest_AKV.sum(-1, keepdim=True) > 0, rest_AKV, p_AKV)  # p = q up to rounding
        return accept_AK, categorical(rest_AKV.log(), again_AK)
