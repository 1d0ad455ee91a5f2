"""The one loop for diffusion samplers: every row has its own window, block, clock and generator.

Rules that unmask write each position once, and it is settled then. Rules that revise (`dlm.sampling.revising`, `remasking`) may write
every open position in every step, and all are settled when the block ends.
Shapes: B rows, A rows that still have something to do, L positions of the canvas, T of the window, V vocabulary, N steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.noise.masked import MaskedNoise
from dlm.noise.schedule import time_when
from dlm.protocols import RNG, CachePolicy, CheckingRule, Constraint, Denoiser, Guidance, NoiseProcess, PlannedRule, Rule, Step
from dlm.sampling import windows
from dlm.sampling.constraint import Held
from dlm.sampling.draw import uniform
from dlm.sampling.reading import Reader
from dlm.sampling.rules import Ancestral
from dlm.sampling.stopping import Stopping
from dlm.trajectory import Canvas, Frame


@dataclass(frozen=True)
class DiffusionSampler:
    """Fill a canvas window by window, `budget` steps for each, equally spaced in time.

    until_settled: end a block once no token has changed for so many steps; 0 takes all of them.
    block_length: fill a window block by block from left to right, each with its share of the budget; 0 takes it whole.
    cache, make_cache: which positions a call reads anew (`dlm.sampling.caching`), and what holds the keys and values of the others.
    """

    denoiser: Denoiser
    noise: NoiseProcess
    window: int
    rule: Rule = field(default_factory=Ancestral)
    budget: int = 256
    context: int = 0
    model: str = ""
    until_settled: int = 0
    block_length: int = 0
    cache: CachePolicy | None = None
    make_cache: Callable[[int], Any] | None = None
    guidance: Guidance | None = None
    constraint: Constraint | None = None
    sees_ahead: bool = True  # False for block-causal networks, which no suffix reaches

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise InputError(f"steps must be at least 1, got {self.budget}")
        if self.until_settled < 0 or (self.until_settled and not self.revises):
            raise InputError("until_settled counts steps from 1, and needs a sampler that revises what it wrote")
        if self.block_length < 0 or (self.block_length and self.window % self.block_length):
            raise InputError(f"blocks of {self.block_length} do not divide the window of {self.window}")
        if not isinstance(self.noise, MaskedNoise) and (self.block_length or self.cache is not None):
            raise InputError("blocks and caches need masked noise: under replacement noise every token may change in every step")
        if self.constraint is not None and self.constraint.joint and self.revises:
            raise InputError("a pattern needs a sampler that writes each token once, such as ancestral or topk")
        windows.check(self.window, self.context)
        if not self.sees_ahead and isinstance(self.rule, CheckingRule):
            raise InputError("revoke and planner need a bidirectional model: block diffusion never saw text beside masks of the same block")
        if not self.sees_ahead and (not self.block_length or self.context % self.block_length):
            raise InputError(f"block diffusion needs a context that is a multiple of its blocks of {self.block_length}")

    @property
    def revises(self) -> bool:
        """Whether the rule may change a token again."""
        return self.rule.revises

    def _start(self, canvas: Canvas, rng: RNG) -> Tensor:
        """Noise at the free positions, on the padding and for a window past the end: all that a window can show."""
        masked, (rows, length) = isinstance(self.noise, MaskedNoise), canvas.tokens_BT.shape
        z_BL = torch.full((rows, length + self.window), self.noise.mask_id, device=canvas.tokens_BT.device)
        for b in range(rows) if not masked else ():  # as many draws as the row is long, whatever its neighbours are
            count = int(canvas.valid_BT[b].sum()) + self.window
            z_BL[b, :count] = self.noise.prior(uniform(rng[b : b + 1], count).to(z_BL.device))[0]
        z_BL[:, :length] = torch.where(canvas.given_BT, canvas.tokens_BT, z_BL[:, :length])
        return z_BL

    def _check_order(self, canvas: Canvas) -> None:
        block_L = torch.arange(canvas.free_BT.shape[1], device=canvas.free_BT.device) // self.block_length
        first_B = block_L.masked_fill(~canvas.free_BT, int(block_L[-1]) + 1).amin(-1)
        if bool((canvas.given_BT & (block_L > first_B[:, None])).any()):
            raise InputError("block diffusion reads what comes before a block: it cannot fill holes or lead to a suffix in later ones")

    @torch.no_grad()
    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """A frame after every network call; for replacement noise one more before the first, the noise itself. rng: one a row."""
        noise, device, (rows, length) = self.noise, canvas.tokens_BT.device, canvas.tokens_BT.shape
        masked, window = isinstance(noise, MaskedNoise), self.window
        if not self.sees_ahead:
            self._check_order(canvas)
        steps = -(-self.budget * (self.block_length or window) // window)  # of a block
        z_BL = self._start(canvas, rng)
        past_BL = torch.zeros(rows, window, dtype=torch.bool, device=device)
        open_BL = torch.cat([canvas.free_BT, past_BL], 1)
        given_BL = torch.cat([canvas.given_BT, past_BL], 1)
        beyond_BL = torch.cat([~canvas.valid_BT, ~past_BL], 1)  # no part of the text: read as noise, denoised with it unless masked
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=device)
        alphas_N, last = noise.schedule.alpha(grid), noise.schedule.alpha(grid[0])
        # the chain starts with everything masked: where the schedule ends above 0, what it would have kept is not there
        alphas_N = ((alphas_N - last) / (1 - last))[1:]
        place_B = torch.full((rows,), -1, device=device)
        clock_B = torch.zeros(rows, dtype=torch.long, device=device)
        due_BT = torch.zeros(rows, window, dtype=torch.long, device=device)
        level_BT = torch.full((rows, window), torch.nan, dtype=torch.float64, device=device)
        memory: dict[str, Tensor] = {}
        planned, forwards = isinstance(self.rule, PlannedRule), 0
        reader = Reader(self.denoiser, noise.mask_id, past_BL, self.rule, self.cache, self.make_cache, self.guidance)
        stopping = Stopping(self.until_settled, rows, device)
        held = Held(self.constraint, canvas.valid_BT, window) if self.constraint is not None else None

        def frame(level_B: Tensor) -> Frame:
            adaptive = (stopping.saved_B.clone(), stopping.doubt_B.clone()) if self.until_settled else (None, None)
            tokens_BL = torch.where(canvas.valid_BT, z_BL[:, :length], canvas.tokens_BT)  # padding is no text
            taken = getattr(self.denoiser, "taken", "") or self.model  # of several models, whose turn it was
            return Frame(tokens_BL, ~open_BL[:, :length], level_B, taken, forwards, *adaptive)

        if not masked:
            yield frame(torch.ones(rows, dtype=torch.float64, device=device))
        while bool(open_BL.any()):
            rows_A = open_BL.any(-1).nonzero().squeeze(-1)
            rng_A = [rng[b] for b in rows_A.tolist()]
            start_A = windows.start(open_BL[rows_A], window, self.context)
            shown = (windows.take(x_BL[rows_A], start_A, window) for x_BL in (z_BL, open_BL, given_BL, beyond_BL))
            z_AT, hole_AT, given_AT, beyond_AT = shown
            open_AT, block_A = windows.block(hole_AT, self.block_length)
            place_A = start_A + block_A
            entered_A = place_A != place_B[rows_A]  # rows that begin a window or a block
            place_B[rows_A], clock_B[rows_A[entered_A]] = place_A, 0
            stopping.begin(rows_A[entered_A])
            for kept in memory.values():
                kept[rows_A[entered_A]] = torch.nan
            if isinstance(self.rule, PlannedRule):
                if bool(entered_A.any()):
                    entered_B = rows_A[entered_A]
                    plan = self.rule.plan(open_AT[entered_A], alphas_N, [rng[b] for b in entered_B.tolist()])
                    due_BT[entered_B], level_BT[entered_B] = plan
                # jump to the next step in which something of the row moves
                clock_B[rows_A] = due_BT[rows_A].masked_fill(~open_AT, window + steps).min(-1).values
            clock_A = clock_B[rows_A]
            move_AT = open_AT & (due_BT[rows_A] == clock_A[:, None]) if planned else open_AT
            if self.revises and not masked:
                move_AT = move_AT | beyond_AT
            t_A, s_A = grid[clock_A.clamp(max=steps - 1)], grid[(clock_A + 1).clamp(max=steps)]
            if planned:  # a rule without a grid says at which alpha each position moves
                alpha_A = level_BT[rows_A].masked_fill(~move_AT, -1).amax(-1)
                reached_A = time_when(noise.schedule, alpha_A.clamp(min=0))
                t_A, s_A = (torch.where(alpha_A >= 0, reached_A, x_A) for x_A in (t_A, s_A))
            seen_A = t_A
            if self.block_length:  # the network knows the noise of a window, not of a block
                seen_A = time_when(noise.schedule, (z_AT != noise.mask_id).double().mean(-1))
            due_AT = move_AT if planned and not self.revises and held is None else None
            logits_ATV, shadow_ATV = reader(rows_A, start_A, z_AT, hole_AT, open_AT, given_AT, entered_A, seen_A, due_AT)
            logp_ATV = noise.log_probs(logits_ATV, z_AT, t_A)
            forwards += 1
            if held is not None:
                logp_ATV = held.narrow(logp_ATV, z_BL[rows_A, :length], open_BL[rows_A, :length], rows_A, start_A)
            left_A, kept_A = (steps - clock_A).clamp(min=1), {name: value[rows_A] for name, value in memory.items()}
            step = Step(z_AT, move_AT, logp_ATV, t_A, s_A, left_A, steps, noise, kept_A, shadow_ATV)
            next_AT = self.rule(step, rng_A)
            for name, value in step.memory.items():
                memory.setdefault(name, value.new_full((rows, *value.shape[1:]), torch.nan))[rows_A] = value
            if held is not None and not self.revises:
                next_AT = held.keep(next_AT, z_AT, move_AT)
            if self.revises:
                written_AT, done_AT = move_AT, open_AT & stopping(rows_A, step, next_AT, open_AT)[:, None]
            else:
                written_AT = done_AT = move_AT & (next_AT != noise.mask_id)
                if not bool(written_AT.any(-1).all()):
                    raise InputError("the model gives no probabilities (nan) where a token is due: its weights or its guidance are broken")
            windows.put(z_BL, rows_A, start_A, next_AT, written_AT)
            windows.put(open_BL, rows_A, start_A, torch.zeros_like(done_AT), done_AT)
            clock_B[rows_A] += 1
            level_B = torch.zeros(rows, dtype=torch.float64, device=device)
            level_B[rows_A] = s_A * open_BL[rows_A].any(-1)
            yield frame(level_B)
