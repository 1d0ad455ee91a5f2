"""The curse of parallel decoding, measured: the loss when several masked tokens are drawn at once, each from its own marginal.

A step that draws the positions S of z independently loses KL(p(x_S | z) || prod_i p(x_i | z)), the conditional total correlation of
S. For random positions `dlm.evaluation.order_cost` computes it from one curve; the choices of a rule have to be measured. A network's
conditionals are not exactly consistent, so that its joint depends on the order of the chain rule: everything here is a mean over
random orders.
Shapes: W windows of real text, L measured steps, B rows, N = B x draws, A rows still at work, T positions, S chosen ones, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm import seeds
from dlm.errors import InputError
from dlm.evaluation.order_cost import equal_steps, log_probs
from dlm.evaluation.statistics import Mean
from dlm.noise.loss import Predict
from dlm.protocols import RNG, NoiseProcess
from dlm.sampling.diffusion.protocols import PlannedRule, Rule, Step
from dlm.sampling.diffusion.unmasking import Ancestral, TopScore
from dlm.sampling.draw import categorical, generators


@torch.no_grad()
def total_correlation(
    noise: NoiseProcess,
    predict: Predict,
    z_BT: Tensor,
    chosen_BT: Tensor,
    rng: torch.Generator,
    *,
    count_B: Tensor | None = None,
    draws: int = 1,
    batch: int = 16,
) -> tuple[Tensor, Tensor]:
    """E_{x_S ~ p}[log p(x_S | z) - sum_i log p(x_i | z)] of the chosen masks of each row: nats float64 (B,), and their number (B,).

    count_B: of so many of the chosen, at random, instead of all. x_S is drawn one position after another, a forward pass each, in an
    order of the row's own; a row is repeated `draws` times and averaged. The log ratio of a position is replaced by its mean given
    the positions drawn before, KL(p(x_i | z, drawn) || p(x_i | z)), and that by the mean over all that could come next: the same
    expectation, less variance, no negative term. InputError for a chosen position that is visible.
    """
    if bool((chosen_BT & (z_BT != noise.mask_id)).any()):
        raise InputError("only masks can be drawn: a chosen position is visible")
    count_B = chosen_BT.sum(-1) if count_B is None else torch.minimum(count_B, chosen_BT.sum(-1))
    z_NT, chosen_NT = z_BT.repeat_interleave(draws, 0), chosen_BT.repeat_interleave(draws, 0)
    order_NT = torch.rand(z_NT.shape, generator=rng, device=rng.device).to(z_NT.device).masked_fill(~chosen_NT, 2.0).argsort(-1)
    chosen_N, calls_N = chosen_NT.sum(-1), count_B.masked_fill(count_B == 1, 0).repeat_interleave(draws)  # one alone loses nothing
    nats_N = torch.zeros(len(z_NT), dtype=torch.float64, device=z_NT.device)
    for begin in range(0, len(z_NT), batch):
        rows_A = torch.arange(begin, min(begin + batch, len(z_NT)), device=z_NT.device)
        most = int(chosen_N[rows_A].max())
        alone_ASV = torch.empty(0)
        for drawn in range(int(calls_N[rows_A].max())):
            stay_A = calls_N[rows_A] > drawn
            rows_A = rows_A[stay_A]
            order_AS = order_NT[rows_A, drawn:most]
            next_AS = torch.arange(drawn, most, device=rows_A.device) < chosen_N[rows_A, None]
            logp_ATV = log_probs(noise, predict, z_NT[rows_A])
            logp_ASV = logp_ATV.gather(1, order_AS[..., None].expand(-1, -1, logp_ATV.shape[-1])).double()
            alone_ASV = logp_ASV if drawn == 0 else alone_ASV[stay_A, 1:]
            p_ASV = logp_ASV.exp()
            kl_AS = torch.where(p_ASV > 0, p_ASV * (logp_ASV - alone_ASV), 0.0).sum(-1)
            nats_N[rows_A] += torch.where(next_AS, kl_AS, 0.0).sum(-1) / next_AS.sum(-1)
            u_A1 = torch.rand(len(rows_A), 1, generator=rng, device=rng.device, dtype=torch.float64)
            z_NT[rows_A, order_AS[:, 0]] = categorical(logp_ASV[:, :1], u_A1).squeeze(-1)
    return nats_N.reshape(-1, draws).mean(-1), count_B


@dataclass(frozen=True)
class Curse:
    """Loss of a sampler over a whole text of `length` tokens, nats_W: an unbiased estimate from each window."""

    tokens_per_step: int
    steps: int
    length: int
    nats_W: Tensor

    @property
    def nats_per_text(self) -> Mean:
        """Over windows."""
        return Mean.of(self.nats_W)

    @property
    def nats_per_token(self) -> Mean:
        return Mean.of(self.nats_W / self.length)

    def bits_per_char(self, characters_per_token: float) -> Mean:
        return Mean.of(self.nats_W / (self.length * characters_per_token * math.log(2)))


def check(rule: Rule) -> None:
    """InputError for a rule that revises, or that writes one token a step by a plan of its own."""
    if rule.revises or (isinstance(rule, PlannedRule) and not isinstance(rule, Ancestral)):
        name = type(rule).__name__
        raise InputError(f"{name} does not write each token once and several in a step: measure ancestral, topk, confidence ...")


@torch.no_grad()
def curse(
    noise: NoiseProcess,
    predict: Predict,
    windows_WT: Tensor,
    rule: Rule,
    tokens_per_step: int,
    *,
    calls: int = 32,
    seed: int = 0,
    batch: int = 4,
    progress: Callable[[int], None] = lambda _: None,
) -> Curse:
    """Total correlation of the tokens that the rule writes together, summed over a run in equal steps.

    The rule chooses the positions and the text gives their tokens, so that the run meets the states that its own choices lead to:
    a rule that takes the easy positions first leaves the hard ones for the end, side by side. `Ancestral` moves random positions in
    equal shares. In each window max(1, calls // tokens_per_step) steps are measured, stratified over the run. A rule with a say in
    the number, such as a threshold, may write more than tokens_per_step at once. batch: windows; progress is told those done.
    InputError as of `check`, and for tokens_per_step outside 1 .. T.
    """
    check(rule)
    windows, length = windows_WT.shape
    if not 1 <= tokens_per_step <= length:
        raise InputError(f"tokens per step lie in 1 .. {length}, the window of this model; got {tokens_per_step}")
    steps = -(-length // tokens_per_step)
    nats_W = torch.zeros(windows, dtype=torch.float64)
    if tokens_per_step == 1 and isinstance(rule, (Ancestral, TopScore)):  # exactly one: nothing to lose
        progress(windows)
        return Curse(tokens_per_step, steps, length, nats_W)
    rng = seeds.generator(seed, windows_WT.device)
    levels = min(steps, max(1, calls // tokens_per_step))
    shift_W = torch.randperm(windows, generator=rng, device=rng.device) / windows
    shift_W = (shift_W + torch.rand((), generator=rng, device=rng.device)) % 1.0
    at_WL = ((torch.arange(levels, device=rng.device) + shift_W[:, None]) / levels * steps).long().clamp(max=steps - 1)
    draws = generators(seed, windows)
    for begin in range(0, windows, batch):
        x_BT, at_BL = windows_WT[begin : begin + batch], at_WL[begin : begin + batch]
        if isinstance(rule, Ancestral):
            states = _shared(noise, x_BT, steps, at_BL, rng)
        else:
            states = _walked(noise, predict, x_BT, rule, steps, at_BL, draws[begin : begin + batch])
        z_NT, chosen_NT, count_N, row_N = (torch.cat(part) for part in zip(*states, strict=True))
        nats_N, _ = total_correlation(noise, predict, z_NT, chosen_NT, rng, count_B=count_N)
        nats_W.index_add_(0, begin + row_N.cpu(), nats_N.cpu() * steps / levels)
        progress(len(x_BT))
    return Curse(tokens_per_step, steps, length, nats_W)


States = Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]
"""z, the masks among which, how many of them are written next, the row of the batch."""


def _shared(noise: NoiseProcess, x_BT: Tensor, steps: int, at_BL: Tensor, rng: torch.Generator) -> States:
    """Random positions in equal shares, at the steps at_BL of one random order a row: next comes any mask."""
    sizes_N = torch.tensor(equal_steps(x_BT.shape[1], steps), device=x_BT.device)
    known_N = sizes_N.cumsum(0) - sizes_N
    rank_BT = torch.rand(x_BT.shape, generator=rng, device=rng.device).argsort(-1).argsort(-1)
    for at_B in at_BL.T:
        masked_BT = rank_BT >= known_N[at_B, None]
        yield torch.where(masked_BT, noise.mask_id, x_BT), masked_BT, sizes_N[at_B], torch.arange(len(x_BT), device=x_BT.device)


def _walked(noise: NoiseProcess, predict: Predict, x_BT: Tensor, rule: Rule, steps: int, at_BL: Tensor, rng: RNG) -> States:
    """The run of a rule that reads the logits, the text in place of its draws; rows leave after their last measured step."""
    z_BT, rows_A = torch.full_like(x_BT, noise.mask_id), torch.arange(len(x_BT), device=x_BT.device)
    memory: dict[str, Tensor] = {}
    for k in range(int(at_BL.max()) + 1):
        stay_A = (at_BL[rows_A] >= k).any(-1) & (z_BT[rows_A] == noise.mask_id).any(-1)
        rows_A, memory = rows_A[stay_A], {name: kept_A[stay_A] for name, kept_A in memory.items()}
        if not len(rows_A):
            return
        z_AT, t_A = z_BT[rows_A], torch.full(rows_A.shape, 1 - k / steps, dtype=torch.float64, device=x_BT.device)
        step = Step(
            z_BT=z_AT,
            open_BT=z_AT == noise.mask_id,
            logp_BTV=log_probs(noise, predict, z_AT),
            t_B=t_A,
            s_B=t_A - 1 / steps,
            left_B=torch.full_like(rows_A, steps - k),
            steps=steps,
            noise=noise,
            memory=memory,
        )
        written_AT = step.open_BT & (rule(step, [rng[row] for row in rows_A.tolist()]) != noise.mask_id)
        seen_A = (at_BL[rows_A] == k).any(-1)
        yield z_AT[seen_A], written_AT[seen_A], written_AT[seen_A].sum(-1), rows_A[seen_A]
        z_BT[rows_A] = torch.where(written_AT, x_BT[rows_A], z_AT)
