"""The one loop for diffusion samplers: every row has its own window, block, clock and generator, and may join or leave between steps.

Rules that unmask write each position once, and it is settled then. Rules that revise (`revising.py`, `remasking.py`) may write every open
position in every step, and all are settled when the block ends.
Shapes: B rows, A rows that still have something to do, K rows that stay, L positions of the canvas, T of the window, V vocabulary, N steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.noise.masked import MaskedNoise
from dlm.noise.schedule import time_when
from dlm.protocols import RNG, Denoiser, NoiseProcess
from dlm.sampling import windows
from dlm.sampling.batching import Law, stacked
from dlm.sampling.diffusion.clock import Clock
from dlm.sampling.diffusion.constraints import Held
from dlm.sampling.diffusion.network_call import Reader
from dlm.sampling.diffusion.protocols import CachePolicy, CheckingRule, Constraint, Guidance, PlannedRule, Rule, Step
from dlm.sampling.diffusion.stopping import Stopping
from dlm.sampling.diffusion.unmasking import Ancestral
from dlm.sampling.draw import uniform
from dlm.trajectory import Canvas, Frame

NEVER = 2**62  # of a clock, in steps
PLAIN = ("valid_BL", "open_BL", "given_BL", "place_B", "phase_B", "due_BT", "level_BT", "t_B")


@dataclass(frozen=True)
class DiffusionSampler:
    """Fill a canvas window by window, `budget` steps for each, equally spaced in time.

    until_settled: end a block once no token has changed for so many steps; 0 takes all of them.
    block_length: fill a window block by block from left to right, each with its share of the budget; 0 takes it whole.
    fills_window: whether the network reads noise up to the end of the window, as in training; else it reads the text alone, `budget` are
    the steps of all that a row writes, and `window` is only a limit.
    block_phase: where blocks begin, at multiples of their length from `zero`, or at the first position that a row writes (`prompt`).
    stops: tokens that end a text once their block is done, so that what comes after is not computed.
    cache, make_cache: which positions a forward pass reads anew (`cache_policies.py`), and what holds the keys and values of the others.
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
    fills_window: bool = True
    block_phase: str = "zero"
    stops: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise InputError(f"steps must be at least 1, got {self.budget}")
        if self.until_settled < 0 or (self.until_settled and not self.revises):
            raise InputError("until_settled counts steps from 1, and needs a sampler that revises what it wrote")
        if self.block_length < 0 or (self.block_length and self.fills_window and self.window % self.block_length):
            raise InputError(f"blocks of {self.block_length} do not divide the window of {self.window}")
        if not isinstance(self.noise, MaskedNoise) and (self.block_length or self.cache is not None):
            raise InputError("blocks and caches need masked noise: under replacement noise every token may change in every step")
        if self.cache is not None and not self.fills_window:
            raise InputError("caches hold whole windows: a model that reads the text alone has none yet")
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

    def phase(self, canvas: Canvas) -> Tensor:
        """Position of each row at which some block begins, int64 (B,), below the block length."""
        first_B = canvas.free_BT.int().argmax(-1)
        return first_B % self.block_length if self.block_length and self.block_phase == "prompt" else torch.zeros_like(first_B)

    def begin(self, canvas: Canvas, *, rng: RNG) -> DiffusionRun:
        """A run on this canvas before its first call. rng: one a row."""
        if not self.sees_ahead:
            self._check_order(canvas)
        return DiffusionRun(self, canvas, rng)

    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """A frame after every network call; for replacement noise one more before the first, the noise itself. rng: one a row."""
        run = self.begin(canvas, rng=rng)
        if not isinstance(self.noise, MaskedNoise):
            yield run.frame()
        while bool(run.live_B.any()):
            yield run.step()

    def _check_order(self, canvas: Canvas) -> None:
        pos_L = torch.arange(canvas.free_BT.shape[1], device=canvas.free_BT.device)
        block_BL = (pos_L - self.phase(canvas)[:, None]).div(self.block_length, rounding_mode="floor")
        first_B = block_BL.masked_fill(~canvas.free_BT, len(pos_L)).amin(-1)
        if bool((canvas.given_BT & (block_BL > first_B[:, None])).any()):
            raise InputError("block diffusion reads what comes before a block: it cannot fill holes or lead to a suffix in later ones")


class DiffusionRun:
    """The state of one run (`dlm.sampling.batching`): all of it by rows, those that are done keep their place until they leave."""

    reads_first: ClassVar[bool] = False

    def __init__(self, sampler: DiffusionSampler, canvas: Canvas, rng: RNG) -> None:
        noise, device, (rows, length) = sampler.noise, canvas.tokens_BT.device, canvas.tokens_BT.shape
        self.sampler, self.rng = sampler, list(rng)
        self.masked = isinstance(noise, MaskedNoise)
        self.window = window = sampler.window if sampler.fills_window else min(sampler.window, length)
        self.clock = Clock(noise.schedule, self._steps(canvas))
        self.phase_B = sampler.phase(canvas)
        past_BL = torch.zeros(rows, window, dtype=torch.bool, device=device)
        self.text_BL, self.valid_BL = canvas.tokens_BT, canvas.valid_BT
        self.z_BL = self._start(canvas)
        self.open_BL = torch.cat([canvas.free_BT, past_BL], 1)
        self.given_BL = torch.cat([canvas.given_BT, past_BL], 1)
        self.beyond_BL = torch.cat([~canvas.valid_BT, ~past_BL], 1)  # no part of the text: read as noise, denoised with it unless masked
        self.place_B = torch.full((rows,), -1, device=device)
        self.due_BT = torch.zeros(rows, window, dtype=torch.long, device=device)
        self.level_BT = torch.full((rows, window), torch.nan, dtype=torch.float64, device=device)
        self.t_B = torch.ones(rows, dtype=torch.float64, device=device)
        self.memory: dict[str, Tensor] = {}
        self.forwards = 0
        self.law: Law | None = None
        self.reader = Reader(sampler.denoiser, noise.mask_id, past_BL, sampler.rule, sampler.cache, sampler.make_cache, sampler.guidance)
        self.stopping = Stopping(sampler.until_settled, rows, device)
        self.held = Held(sampler.constraint, self.valid_BL, window) if sampler.constraint is not None else None

    def _steps(self, canvas: Canvas) -> Tensor:
        """Of a block of each row, int64 (B,)."""
        sampler, count_B = self.sampler, canvas.free_BT.sum(-1)
        if sampler.fills_window:
            return torch.full_like(count_B, -(-sampler.budget * (sampler.block_length or sampler.window) // sampler.window))
        blocks_B = -(-count_B // (sampler.block_length or sampler.window)).clamp(max=-1)
        return -(-sampler.budget // blocks_B)

    def _start(self, canvas: Canvas) -> Tensor:
        """Noise at the free positions, on the padding and for a window past the end: all that a window can show."""
        noise, window, (rows, length) = self.sampler.noise, self.window, canvas.tokens_BT.shape
        z_BL = torch.full((rows, length + window), noise.mask_id, device=canvas.tokens_BT.device)
        for b in range(rows) if not self.masked else ():  # as many draws as the row is long, whatever its neighbours are
            count = int(canvas.valid_BT[b].sum()) + window
            z_BL[b, :count] = noise.prior(uniform(self.rng[b : b + 1], count).to(z_BL.device))[0]
        z_BL[:, :length] = torch.where(canvas.given_BT, canvas.tokens_BT, z_BL[:, :length])
        return z_BL

    @property
    def live_B(self) -> Tensor:
        return self.open_BL.any(-1)

    def frame(self) -> Frame:
        """The state as it is."""
        length = self.text_BL.shape[1]
        adaptive = (self.stopping.saved_B.clone(), self.stopping.doubt_B.clone()) if self.sampler.until_settled else (None, None)
        tokens_BL = torch.where(self.valid_BL, self.z_BL[:, :length], self.text_BL)  # padding is no text
        taken = getattr(self.sampler.denoiser, "taken", "") or self.sampler.model  # of several models, whose turn it was
        return Frame(tokens_BL, ~self.open_BL[:, :length], self.t_B, taken, self.forwards, *adaptive)

    @torch.no_grad()
    def step(self) -> Frame:
        """One network call for the rows that have something to do."""
        sampler, noise, rule, window = self.sampler, self.sampler.noise, self.sampler.rule, self.window
        planned, revises, length = isinstance(rule, PlannedRule), self.sampler.revises, self.text_BL.shape[1]
        rows_A = self.live_B.nonzero().squeeze(-1)
        rng_A = [self.rng[b] for b in rows_A.tolist()]
        start_A = windows.start(self.open_BL[rows_A], window, sampler.context)
        shown = (windows.take(x_BL[rows_A], start_A, window) for x_BL in (self.z_BL, self.open_BL, self.given_BL, self.beyond_BL))
        z_AT, hole_AT, given_AT, beyond_AT = shown
        open_AT, block_A = windows.block(hole_AT, sampler.block_length, 0 if sampler.fills_window else self.phase_B[rows_A] - start_A)
        place_A = start_A + block_A
        entered_A = place_A != self.place_B[rows_A]  # rows that begin a window or a block
        self.place_B[rows_A], self.clock.clock_B[rows_A[entered_A]] = place_A, 0
        self.stopping.begin(rows_A[entered_A])
        for kept in self.memory.values():
            kept[rows_A[entered_A]] = torch.nan
        if isinstance(rule, PlannedRule):
            for steps in set(self.clock.steps_B[rows_A[entered_A]].tolist()):
                begun_A = entered_A & (self.clock.steps_B[rows_A] == steps)
                begun_B = rows_A[begun_A]
                plan = rule.plan(open_AT[begun_A], self.clock.alphas(steps), [self.rng[b] for b in begun_B.tolist()])
                self.due_BT[begun_B], self.level_BT[begun_B] = plan
            # jump to the next step in which something of the row moves
            self.clock.clock_B[rows_A] = self.due_BT[rows_A].masked_fill(~open_AT, NEVER).min(-1).values
        steps_A, clock_A = self.clock.steps_B[rows_A], self.clock.clock_B[rows_A]
        move_AT = open_AT & (self.due_BT[rows_A] == clock_A[:, None]) if planned else open_AT
        if revises and not self.masked:
            move_AT = move_AT | beyond_AT
        t_A, s_A = self.clock.levels(rows_A)
        if planned:  # a rule without a grid says at which alpha each position moves
            alpha_A = self.level_BT[rows_A].masked_fill(~move_AT, -1).amax(-1)
            reached_A = time_when(noise.schedule, alpha_A.clamp(min=0))
            t_A, s_A = (torch.where(alpha_A >= 0, reached_A, x_A) for x_A in (t_A, s_A))
        seen_A = t_A
        if sampler.block_length:  # the network knows the noise of a window, not of a block
            seen_A = time_when(noise.schedule, (z_AT != noise.mask_id).double().mean(-1))
        due_AT = move_AT if planned and not revises and self.held is None else None
        told = self._text(beyond_AT, rows_A)
        logits_ATV, shadow_ATV = self.reader(rows_A, start_A, z_AT, hole_AT, open_AT, given_AT, entered_A, seen_A, due_AT, told)
        logp_ATV = noise.log_probs(logits_ATV, z_AT, t_A)
        self.forwards += 1
        if self.held is not None:
            logp_ATV = self.held.narrow(logp_ATV, self.z_BL[rows_A, :length], self.open_BL[rows_A, :length], rows_A, start_A)
        left_A, kept_A = (steps_A - clock_A).clamp(min=1), {name: value[rows_A] for name, value in self.memory.items()}
        step = Step(z_AT, move_AT, logp_ATV, t_A, s_A, left_A, steps_A, noise, kept_A, shadow_ATV, ~beyond_AT)
        next_AT = rule(step, rng_A)
        for name, value in step.memory.items():
            self.memory.setdefault(name, value.new_full((len(self.rng), *value.shape[1:]), torch.nan))[rows_A] = value
        if self.held is not None and not revises:
            next_AT = self.held.keep(next_AT, z_AT, move_AT)
        if revises:
            written_AT, done_AT = move_AT, open_AT & self.stopping(rows_A, step, next_AT, open_AT)[:, None]
        else:
            written_AT = done_AT = move_AT & (next_AT != noise.mask_id)
            waits = getattr(rule, "waits", False) and not bool(logp_ATV.isnan().any())
            if not waits and not bool(written_AT.any(-1).all()):
                raise InputError("the model gives no probabilities (nan) where a token is due: its weights or its guidance are broken")
        windows.put(self.z_BL, rows_A, start_A, next_AT, written_AT)
        windows.put(self.open_BL, rows_A, start_A, torch.zeros_like(done_AT), done_AT)
        if sampler.stops:
            self._end_texts(rows_A, place_A)
        self.clock.clock_B[rows_A] += 1
        self.t_B = torch.zeros(len(self.rng), dtype=torch.float64, device=z_AT.device)
        self.t_B[rows_A] = s_A * self.open_BL[rows_A].any(-1)
        self.law = Law(rows_A, start_A, logp_ATV)
        return self.frame()

    def _text(self, beyond_AT: Tensor, rows_A: Tensor) -> dict[str, Tensor]:
        """What the network is told of windows that it does not fill: where text stands, and positions that begin a block at a multiple."""
        if self.sampler.fills_window:
            return {}
        told = {"valid_BT": ~beyond_AT} if bool(beyond_AT.any()) else {}
        if not self.sampler.sees_ahead and self.sampler.block_phase == "prompt":
            begin_A1 = (-self.phase_B[rows_A] % self.sampler.block_length)[:, None]
            told["pos_BQ"] = begin_A1 + torch.arange(self.window, device=beyond_AT.device)
        return told

    def _end_texts(self, rows_A: Tensor, place_A: Tensor) -> None:
        """Leave the rest of a row open no more once a block that is done holds a stop."""
        pos_L = torch.arange(self.z_BL.shape[1], device=place_A.device)
        block_AL = (pos_L >= place_A[:, None]) & (pos_L < place_A[:, None] + (self.sampler.block_length or self.window))
        stop_AL = torch.isin(self.z_BL[rows_A], torch.tensor(sorted(self.sampler.stops), device=place_A.device))
        stop_AL &= block_AL & ~self.given_BL[rows_A] & ~self.beyond_BL[rows_A]
        ended_A = stop_AL.any(-1) & ~(self.open_BL[rows_A] & block_AL).any(-1)
        self.open_BL[rows_A[ended_A]] = False

    def join(self, other: DiffusionRun) -> None:
        """Take in the rows of another run of the same sampler; the other is used up."""
        for name, fill in self._rows().items():
            setattr(self, name, stacked(getattr(self, name), getattr(other, name), fill))
        for name in self.memory.keys() | other.memory.keys():
            known = self.memory.get(name, other.memory.get(name))
            assert known is not None
            shapes = ((len(run.rng), run.window, *known.shape[2:]) for run in (self, other))
            ours, theirs = (run.memory.get(name, known.new_full(next(shapes), torch.nan)) for run in (self, other))
            self.memory[name] = stacked(ours, theirs, torch.nan)
        self.rng += other.rng
        self.window = max(self.window, other.window)
        self.clock.join(other.clock)
        self.reader.join(other.reader)
        self.stopping.join(other.stopping)
        self._changed()

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone, in this order."""
        for name in self._rows():
            setattr(self, name, getattr(self, name)[rows_K])
        self.memory = {name: value[rows_K] for name, value in self.memory.items()}
        self.rng = [self.rng[b] for b in rows_K.tolist()]
        self.clock.keep(rows_K)
        self.reader.keep(rows_K)
        self.stopping.keep(rows_K)
        self._changed()

    def _changed(self) -> None:
        self.law = None  # of other rows
        if self.held is not None:
            self.held.valid_BL = self.valid_BL

    def _rows(self) -> dict[str, float]:
        """The names of what there is of each row, and what a shorter row is filled up with."""
        mask_id = self.sampler.noise.mask_id
        return dict.fromkeys(PLAIN, 0.0) | {"text_BL": mask_id, "z_BL": mask_id, "beyond_BL": True}
