"""How fast the text of a run settles, against the steps it took; computed from trajectories alone.

Shapes: N rows (texts) pooled over runs, S frames (the start included), T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm import seeds
from dlm.errors import InputError
from dlm.evaluation.statistics import Curve, Mean
from dlm.trajectory import Trajectory

Judge = Callable[[Tensor], Tensor]
"""Whole texts (N, T) -> bits per token of each (N,)."""


@dataclass(frozen=True)
class Settling:
    """settled: share of the written positions that change no more; changed: share that this frame changed; error: share that
    differ from the final text (the character error rate of texts that keep their positions); bits: under a judge, masks filled
    with uniform noise so that unfinished text of every process is on one scale. edits: changes per token over the run, the first
    writing of a mask included. last_step: the frame after which nothing changed, mean over texts.
    """

    label: str
    texts: int
    settled: Curve
    changed: Curve
    error: Curve
    edits: float
    edits_stderr: float
    last_step: float
    bits: Curve | None = None

    @property
    def steps(self) -> int:
        return len(self.settled.mean_S) - 1

    def step_of(self, share: float) -> int:
        """The first frame in which that share of the text has settled, on average."""
        return int((self.settled.mean_S >= share - 1e-9).int().argmax())

    def curves(self) -> dict[str, Curve]:
        """By name, over the frames."""
        return {"settled": self.settled, "changed": self.changed, "error": self.error} | ({"bits": self.bits} if self.bits else {})

    def record(self) -> dict[str, object]:
        """Figures, and the curves in five digits."""
        figures = {name: getattr(self, name) for name in ("label", "texts", "steps", "edits", "edits_stderr")}
        steps = {"half_settled": self.step_of(0.5), "settled_90": self.step_of(0.9), "last_step": self.last_step}
        curves = {
            name: {part: [round(value, 5) for value in values] for part, values in one.record().items()}
            for name, one in self.curves().items()
        }
        return figures | steps | curves


def label_of(run: Trajectory) -> str:
    """Model and sampler, as the run recorded them."""
    return ", ".join(str(run.meta[key]) for key in ("model", "sampler") if key in run.meta) or "run"


def settling(
    runs: Sequence[Trajectory], *, label: str = "", judge: Judge | None = None, vocab_size: int = 0, points: int = 17, seed: int = 0
) -> Settling:
    """Measure runs of one kind together. judge needs whole texts of equal length; it is asked at about `points` frames, and the
    frames between are read off a straight line. InputError for runs of different lengths."""
    frames = {len(run) for run in runs}
    if len(frames) != 1:
        raise InputError(
            f"runs of one kind need equally many steps, these have {sorted(n - 1 for n in frames)}: give each kind its own label"
        )
    settled, changed, error, edits_NB, last, parts = [], [], [], [], [], []
    for run in runs:
        counted_BT = (run.free_BT & run.valid_BT).double()
        count_B = counted_BT.sum(-1)
        states_SBT = torch.stack([frame.tokens_BT for frame in run.frames()])
        differs_SBT = states_SBT != states_SBT[-1]
        moved_SBT = torch.cat([torch.zeros_like(differs_SBT[:1]), states_SBT[1:] != states_SBT[:-1]])
        last_BT = run.settle_step()
        still_SBT = torch.stack([last_BT <= k for k in range(len(run))])
        settled.append((still_SBT * counted_BT).sum(-1).T / count_B[:, None])
        changed.append((moved_SBT * counted_BT).sum(-1).T / count_B[:, None])
        error.append((differs_SBT * counted_BT).sum(-1).T / count_B[:, None])
        edits_NB.append((moved_SBT.sum(0) * counted_BT).sum(-1) / count_B)
        last.append((last_BT * counted_BT).max(-1).values)
        if judge is not None:
            parts.append(_judged(run, states_SBT, judge, vocab_size, points, seed))
    edits = Mean.of(torch.cat(edits_NB))
    return Settling(
        label=label or label_of(runs[0]),
        texts=edits.count,
        settled=Curve.of(torch.cat(settled)),
        changed=Curve.of(torch.cat(changed)),
        error=Curve.of(torch.cat(error)),
        edits=edits.value,
        edits_stderr=edits.stderr,
        last_step=torch.cat(last).mean().item(),
        bits=Curve.of(torch.cat(parts)) if judge is not None else None,
    )


def _judged(run: Trajectory, states_SBT: Tensor, judge: Judge, vocab_size: int, points: int, seed: int) -> Tensor:
    """Bits (B, S)."""
    if not bool(run.valid_BT.all()):
        raise InputError("a judge reads whole texts of equal length, and this run is padded")
    rng = seeds.generator(seed)
    at = torch.linspace(0, len(states_SBT) - 1, min(points, len(states_SBT))).round().long()
    at = torch.unique(at)
    bits = []
    for state_BT in states_SBT[at]:
        noise_BT = torch.randint(vocab_size, state_BT.shape, generator=rng)
        bits.append(judge(torch.where(state_BT == run.mask_id, noise_BT, state_BT)).double().cpu())
    bits_PB, k_S = torch.stack(bits), torch.arange(len(states_SBT))
    right_S = torch.searchsorted(at, k_S).clamp(min=1 if len(at) > 1 else 0)
    left_S = (right_S - 1).clamp(min=0)
    weight_S = ((k_S - at[left_S]) / (at[right_S] - at[left_S]).clamp(min=1)).double()
    bits_SB: Tensor = bits_PB[left_S] * (1 - weight_S[:, None]) + bits_PB[right_S] * weight_S[:, None]
    return bits_SB.T
