"""The one loop of diffusion samplers: every row has its own window, block, clock and generator.

Rows may join or leave between steps.

Rules that unmask write each position once, and it is settled then. Rules that revise (`revising.py`, `remasking.py`) may write every open
position in every step, and all are settled when the block ends.
Shapes: B rows, A rows that still have something to do, K rows that stay, L positions of the canvas, T of the window, V vocabulary, N steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from dlm.errors import InputError, in_range
from dlm.noise.masked import MaskedNoise
from dlm.noise.schedule import time_when
from dlm.protocols import RNG, Denoiser, NoiseProcess, OwnDraws
from dlm.sampling import windows
from dlm.sampling.batching import WrittenDistribution
from dlm.sampling.diffusion.clock import Clock, Move
from dlm.sampling.diffusion.columns import Columns
from dlm.sampling.diffusion.constraints import WindowedConstraint
from dlm.sampling.diffusion.network_call import NetworkCall
from dlm.sampling.diffusion.noisy_text import Active, Ends, NoisyText, check_order, described, phase, whole_blocks, width
from dlm.sampling.diffusion.protocols import (
    Cache,
    CachePolicy,
    CheckingRule,
    Constraint,
    EditingRule,
    EndingRule,
    Guidance,
    PlannedRule,
    Rule,
    StagedRule,
    Step,
)
from dlm.sampling.diffusion.rule_memory import RuleMemory
from dlm.sampling.diffusion.stopping import Stopping
from dlm.sampling.diffusion.unmasking import Ancestral
from dlm.sampling.draw import NO_PROBABILITIES, sound
from dlm.trajectory import Canvas, Frame

MAX_STEPS = 1_000_000
"""Steps of a window at most."""


@dataclass(frozen=True)
class DiffusionSampler:
    """Fill a canvas window by window, `budget` steps for each, equally spaced in time.

    until_settled: end a block once no token has changed for so many steps; 0 takes all of them.
    block_length: fill a window block by block from left to right, each with its share of the budget; 0 takes it whole.
    each_block: every block has the whole budget instead.
    fills_window: whether the network reads noise up to the end of the window, as in training; else it reads the text alone, `budget` are
    the steps of all that a row writes, and `window` is only a limit.
    block_phase: where blocks begin, at multiples of their length from `zero`, or at the first position that a row writes (`prompt`).
    A causal network reads blocks from zero whole: masks that are not shown fill the last one, as in its training.
    stops, ends: tokens that end a text, and when (`noisy_text.Ends`); what follows is not computed.
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
    make_cache: Callable[[int, int], Cache] | None = None
    guidance: Guidance | None = None
    constraint: Constraint | None = None
    sees_ahead: bool = True  # False for block-causal networks, which no suffix reaches
    fills_window: bool = True
    block_phase: str = "zero"
    stops: frozenset[int] = frozenset()
    ends: Ends = "text"
    each_block: bool = False

    def __post_init__(self) -> None:
        in_range(self.budget, 1, MAX_STEPS, "steps")
        in_range(self.until_settled, 0, MAX_STEPS, "until_settled, in steps,")
        in_range(self.block_length, 0, self.window, "the block length")
        if self.until_settled and not self.revises:
            raise InputError("until_settled counts steps from 1, and needs a sampler that revises what it wrote")
        if self.block_length and self.fills_window and self.window % self.block_length:
            raise InputError(f"blocks of {self.block_length} do not divide the window of {self.window}")
        if not isinstance(self.noise, MaskedNoise) and (self.block_length or self.cache is not None):
            raise InputError("blocks and caches need masked noise: under replacement noise every token may change in every step")
        if self.constraint is not None and self.constraint.joint and self.revises:
            raise InputError("a pattern needs a sampler that writes each token once, such as ancestral or topk")
        if self.constraint is not None and self.constraint.joint and self.staged is not None:
            raise InputError("a pattern needs masked noise: a class is written before its word, and may leave none that fits")
        windows.check(self.window, self.context)
        if not self.sees_ahead and isinstance(self.rule, CheckingRule):
            raise InputError("revoke and planner need a bidirectional model: block diffusion never saw text beside masks of the same block")
        if not self.sees_ahead and (not self.block_length or self.context % self.block_length):
            raise InputError(f"block diffusion needs a context that is a multiple of its blocks of {self.block_length}")

    @property
    def revises(self) -> bool:
        """Whether the rule may change a token again."""
        return self.rule.revises

    @cached_property
    def planned(self) -> PlannedRule | None:
        """The rule, if it is one; asked once, for a protocol compares all its names each time."""
        return self.rule if isinstance(self.rule, PlannedRule) else None

    @cached_property
    def staged(self) -> StagedRule | None:
        """The rule, if it is one."""
        return self.rule if isinstance(self.rule, StagedRule) else None

    @cached_property
    def edits(self) -> bool:
        """Whether the rule is an `EditingRule`."""
        return isinstance(self.rule, EditingRule)

    @property
    def whole_blocks(self) -> int:
        """As of `NoisyText`."""
        return whole_blocks(self.block_length, self.block_phase, sees_ahead=self.sees_ahead, fills_window=self.fills_window)

    def phase(self, canvas: Canvas) -> Tensor:
        """Position of each row at which some block begins, int64 (B,), below the block length."""
        return phase(canvas, self.block_length, self.block_phase)

    def steps_of(self, canvas: Canvas) -> Tensor:
        """Steps of a block of each row, int64 (B,)."""
        count_B, block_length = canvas.free_BT.sum(-1), self.block_length or self.window
        if self.each_block:
            return torch.full_like(count_B, self.budget)
        if self.fills_window:
            return torch.full_like(count_B, -(-self.budget * block_length // self.window))
        blocks_B = -(-count_B // block_length).clamp(max=-1)
        return -(-self.budget // blocks_B)

    def begin(self, canvas: Canvas, *, rng: RNG) -> DiffusionRun:
        """A run on this canvas before its first forward pass. rng: one a row. InputError for a canvas that a causal network cannot fill."""
        if not self.sees_ahead:
            check_order(canvas, self.block_length, self.block_phase)
        return DiffusionRun(self, canvas, rng)

    def steps(self, canvas: Canvas, *, rng: RNG) -> Iterator[Frame]:
        """A frame after every forward pass; for replacement noise one more before the first, the noise itself. rng: one a row."""
        run = self.begin(canvas, rng=rng)
        if not isinstance(self.noise, MaskedNoise):
            yield run.frame()
        while bool(run.live_B.any()):
            yield run.step()


class DiffusionRun:
    """The state of one run (`dlm.sampling.batching`): all of it by rows, those that are done keep their place until they leave."""

    reads_first: ClassVar[bool] = False

    def __init__(self, sampler: DiffusionSampler, canvas: Canvas, rng: RNG) -> None:
        noise, device, (rows, length) = sampler.noise, canvas.tokens_BT.device, canvas.tokens_BT.shape
        window = sampler.window if sampler.fills_window else width(canvas, sampler.window, sampler.whole_blocks)
        self.sampler, self.rng = sampler, list(rng)
        self.text = NoisyText(canvas, noise, window, sampler.phase(canvas), rng, sampler.whole_blocks)
        if not sampler.fills_window:  # the window is as wide as the batch: a row draws what it would draw alone
            self.rng = [OwnDraws.of(g, count) for g, count in zip(rng, self.text.count_B.tolist(), strict=True)]
        self.clock = Clock(noise, sampler.steps_of(canvas), window)
        self.place_B = torch.full((rows,), -1, device=device)
        self.t_B = torch.ones(rows, dtype=torch.float64, device=device)
        self.memory = RuleMemory(rows, window)
        self.network = NetworkCall(
            sampler.denoiser, noise.mask_id, self.text.z_BL[:, length:], sampler.rule, sampler.cache, sampler.make_cache, sampler.guidance
        )
        pointwise = (getattr(part, "pointwise", False) for part in (sampler.rule, sampler.guidance) if part is not None)
        self.picks = isinstance(noise, MaskedNoise) and all(pointwise)
        self.stopping = Stopping(sampler.until_settled, rows, device)
        self.constraint = WindowedConstraint(sampler.constraint, self.text) if sampler.constraint is not None else None
        self.forwards = 0
        self.distribution: WrittenDistribution | None = None
        self.sound = torch.ones((), dtype=torch.bool)

    @property
    def live_B(self) -> Tensor:
        return self.text.open_BL.any(-1)

    def frame(self) -> Frame:
        """The state as it is."""
        text, stopping = self.text, self.stopping
        adaptive = (stopping.saved_B.clone(), stopping.doubt_B.clone()) if self.sampler.until_settled else (None, None)
        model = getattr(self.sampler.denoiser, "taken", "") or self.sampler.model  # of several models, the one that was run
        return Frame(text.shown_BL, text.settled_BL, self.t_B, model, self.forwards, *adaptive)

    @torch.no_grad()
    def step(self) -> Frame:
        """One forward pass for the rows with open positions, and the move that the rule makes of it."""
        self.distribution = None  # its memory is free for this pass
        sampler, text = self.sampler, self.text
        context = sampler.context if text.window == sampler.window else 0  # all of a shorter text is one window
        active = text.active(context, sampler.block_length, fills_window=sampler.fills_window)
        rng = [self.rng[b] for b in active.rows]
        entered_A, entered = self._enter(active)
        move = self._next_move(active, entered_A, entered, rng)
        step = self._read(active, entered_A, move)
        next_AT = self._ruled(active, step, rng)
        if self.constraint is not None and not sampler.revises and sampler.staged is None:
            next_AT = self.constraint.keep(next_AT, active.z_AT, move.at_AT)
        written_AT, done_AT = self._written(active, step, move.at_AT, next_AT)
        text.write(active, next_AT, written_AT, done_AT)
        if sampler.stops:
            text.end(active.rows_A, sampler.stops, sampler.ends, sampler.block_length)
        self.clock.tick(active.rows_A)
        self.t_B = torch.zeros(len(self.rng), dtype=torch.float64, device=next_AT.device)
        self.t_B[active.rows_A] = step.s_B * text.open_BL[active.rows_A].any(-1)
        self.distribution = self._distribution(active, step, written_AT if sampler.revises else done_AT)
        return self.frame()

    def _ruled(self, active: Active, step: Step, rng: RNG) -> Tensor:
        """The next z of the windows, int64 (A, T)."""
        rule, columns = self.sampler.rule, step.columns
        next_AT = rule(step, rng if columns is None else columns.draws(rng))
        self.memory.store(active.rows_A, step.memory, columns)
        return next_AT if columns is None else columns.put(active.z_AT, next_AT)

    def _distribution(self, active: Active, step: Step, written_AT: Tensor) -> WrittenDistribution:
        columns = step.columns
        written = written_AT if columns is None else columns.take(written_AT) & columns.real_BC
        row_N, column_N = written.nonzero(as_tuple=True)
        at_N = column_N if columns is None else columns.index_BC[row_N, column_N]
        return WrittenDistribution(active.rows_A[row_N], active.start_A[row_N] + at_N, step.logp_BTV[row_N, column_N])

    def _enter(self, active: Active) -> tuple[Tensor, list[bool]]:
        """Which rows begin a window or a block, bool (A,), also on the host: their clock and the memories of the last one begin anew."""
        entered_A = active.place_A != self.place_B[active.rows_A]
        self.place_B[active.rows_A] = active.place_A
        entered = entered_A.tolist()
        if any(entered):
            rows_N = active.rows_A if all(entered) else active.rows_A[entered_A]
            for part in (self.clock.restart, self.stopping.begin, self.memory.forget):
                part(rows_N)
        return entered_A, entered

    def _next_move(self, active: Active, entered_A: Tensor, entered: list[bool], rng: RNG) -> Move:
        """The next step of every row: a planned rule is asked for its plan when a block begins, and skips steps without a move."""
        sampler, rule, rows_A = self.sampler, self.sampler.planned, active.rows_A
        if rule is not None:
            if any(entered):
                chosen = [g for g, one in zip(rng, entered, strict=True) if one]
                self.clock.plan(rule, rows_A[entered_A], active.block_AT[entered_A], chosen)
            return self.clock.next_planned(rows_A, active.block_AT)
        denoises_all = sampler.revises and not isinstance(sampler.noise, MaskedNoise)
        return self.clock.next(rows_A, active.block_AT | active.beyond_AT if denoises_all else active.block_AT)

    def _read(self, active: Active, entered_A: Tensor, move: Move) -> Step:
        """One forward pass, and all that the rule sees of it."""
        sampler, noise, z_AT = self.sampler, self.sampler.noise, active.z_AT
        seen_A = move.t_A
        if sampler.block_length:  # the network knows the noise of a window, not of a block
            seen_A = time_when(noise.schedule, (z_AT != noise.mask_id).double().mean(-1))
        columns = Columns.of(move.at_AT) if self.picks else None
        logits, shadow_ATV = self.network(active, entered_A, seen_A, columns, self._described(active))
        self.forwards += 1
        z, open_ = (z_AT, move.at_AT) if columns is None else (columns.take(z_AT), columns.real_BC)
        hidden = torch.where(open_, noise.mask_id, z) if sampler.edits else z
        logp = noise.log_probs(logits, hidden, move.t_A)
        self.sound = sound(logp.amax(-1, keepdim=True).masked_fill(~open_[..., None], 0.0))
        if self.constraint is not None:
            logp = self.constraint.narrow(logp, active, columns)
        kept, valid_AT = self.memory.of(active.rows_A, columns), ~active.beyond_AT
        levels = move.t_A, move.s_A, move.left_A, move.steps_A
        return Step(z, open_, logp, *levels, noise, kept, shadow_ATV, valid_AT, columns, active.place_A - active.start_A)

    def _described(self, active: Active) -> dict[str, Tensor]:
        """Arguments of the network for windows that it does not fill."""
        sampler = self.sampler
        if sampler.fills_window:
            return {}
        return described(active, sampler.block_length, sampler.block_phase, sampler.denoiser, sees_ahead=sampler.sees_ahead)

    def _written(self, active: Active, step: Step, at_AT: Tensor, next_AT: Tensor) -> tuple[Tensor, Tensor]:
        """(positions that are written, positions that are settled), bool (A, T). InputError where a token is due and none was drawn."""
        rule = self.sampler.rule
        if rule.revises:
            if not bool(self.sound):
                raise InputError(NO_PROBABILITIES)
            done_A = self.stopping(active.rows_A, step, next_AT, active.block_AT)
            if isinstance(rule, EndingRule):
                done_A = done_A | rule.done(step, next_AT)
            return at_AT, active.block_AT & done_A[:, None]
        if (staged := self.sampler.staged) is not None:
            if not bool(self.sound):
                raise InputError(NO_PROBABILITIES)
            written_AT = at_AT & (next_AT != active.z_AT)
            return written_AT, written_AT & staged.settled(step, next_AT)
        written_AT = at_AT & (next_AT != step.noise.mask_id)
        if not bool(self.sound if getattr(rule, "waits", False) else self.sound & written_AT.any(-1).all()):
            raise InputError(NO_PROBABILITIES)
        return written_AT, written_AT

    def join(self, other: DiffusionRun) -> None:
        """Take in the rows of another run of the same sampler; the other is used up."""
        self.rng += other.rng
        self.place_B, self.t_B = torch.cat([self.place_B, other.place_B]), torch.cat([self.t_B, other.t_B])
        self.text.join(other.text)
        self.clock.join(other.clock)
        self.memory.join(other.memory)
        self.network.join(other.network)
        self.stopping.join(other.stopping)
        self.distribution = None

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone, in this order."""
        self.rng = [self.rng[b] for b in rows_K.tolist()]
        self.place_B, self.t_B = self.place_B[rows_K], self.t_B[rows_K]
        for part in (self.text, self.clock, self.memory, self.network, self.stopping):
            part.keep(rows_K)
        self.distribution = None
