"""How much each denoising step needs the heavy model: loss gap and KL(heavy || light) per masked token, by share of steps done.

In ancestral sampling of masks the positions that a step unmasks do not depend on the network, so that the KL between the chain of the
heavy model and one in which a light model takes some steps is the sum over those steps of (tokens unmasked) x (KL per token); and the
KL between the texts is at most that (data processing). Under the linear schedule every step unmasks the same number on average.
Shapes: W windows or texts, J segments of the steps from noise to text, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlm import seeds
from dlm.errors import InputError
from dlm.evaluation.statistics import Curve
from dlm.model_scheduling.plan import HEAVY
from dlm.noise.loss import Predict
from dlm.noise.masked import MaskedNoise
from dlm.noise.schedule import time_when
from dlm.protocols import Denoiser
from dlm.trajectory import Frame


@dataclass(frozen=True)
class Sensitivity:
    """Nats per masked token, float64, a row for each window or text, nan where a run has no step in a segment.

    loss_WJ: of each model on the text, by key; kl_WJ: KL(heavy || model) of the others.
    """

    kl_WJ: dict[str, Tensor]
    loss_WJ: dict[str, Tensor] = field(default_factory=dict)

    @property
    def segments(self) -> int:
        return next(iter(self.kl_WJ.values())).shape[1]

    def gap_WJ(self, key: str) -> Tensor:
        """Loss of a light model above that of H, on the text."""
        return self.loss_WJ[key] - self.loss_WJ[HEAVY]

    def curves(self) -> dict[str, dict[str, Curve]]:
        """`kl`, and on text `loss` and `gap`: means over windows with their intervals, by key."""
        found = {"kl": {key: Curve.of(values_WJ) for key, values_WJ in self.kl_WJ.items()}}
        if self.loss_WJ:
            found["loss"] = {key: Curve.of(values_WJ) for key, values_WJ in self.loss_WJ.items()}
            found["gap"] = {key: Curve.of(self.gap_WJ(key)) for key in self.kl_WJ}
        return found

    def kl(self) -> dict[str, list[float]]:
        """Means over windows, 0 for the heavy model itself, for `search.by_kl`."""
        means = {key: values_WJ.nanmean(0).tolist() for key, values_WJ in self.kl_WJ.items()}
        return {HEAVY: [0.0] * self.segments} | means


def predictors(networks: Mapping[str, Denoiser]) -> dict[str, Predict]:
    """Of networks by key, logits in float32."""

    def of(network: Denoiser) -> Predict:
        return lambda z_BT, t_B: network(z_BT, t_B).float()

    return {key: of(network) for key, network in networks.items()}


@torch.no_grad()
def on_text(
    noise: MaskedNoise,
    models: Mapping[str, Predict],
    windows_WT: Tensor,
    *,
    segments: int = 16,
    seed: int = 0,
    batch: int = 16,
    progress: Callable[[int], None] = lambda _: None,
) -> Sensitivity:
    """On corrupted text: every window once in every segment, at a number of masks that a step in it meets; the same for all models.

    InputError for noise other than masks. progress is told the rows done, W x J in all.
    """
    _check(noise, models)
    rng = seeds.generator(seed, windows_WT.device)
    windows, length = windows_WT.shape
    found = _Table(windows, segments)
    for j in range(segments):
        share_W = (segments - j - torch.rand(windows, generator=rng, device=rng.device)) / segments
        count_W = (share_W * length).ceil().long().clamp(1, length)
        z_WT = noise.corrupt_count(windows_WT, count_W, torch.ones_like(windows_WT, dtype=torch.bool), rng)
        for begin in range(0, windows, batch):
            part = slice(begin, begin + batch)
            found.fill(noise, models, z_WT[part], z_WT[part] == noise.mask_id, part, j, windows_WT[part])
            progress(len(z_WT[part]))
    return found.done()


@torch.no_grad()
def on_trajectories(
    noise: MaskedNoise,
    models: Mapping[str, Predict],
    frames: Iterable[Frame],
    *,
    segments: int = 16,
    batch: int = 16,
    written_only: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Sensitivity:
    """On the states of a run of the heavy model, one a text and segment: `frames` before a step.

    written_only: at the positions that the step writes, which for an order by confidence are not like the others; else at all masks.
    """
    _check(noise, models)
    states: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    last: Frame | None = None
    seen: dict[tuple[int, int], int] = {}
    for frame in frames:
        before_BT = torch.full_like(frame.tokens_BT, noise.mask_id) if last is None else last.tokens_BT
        written_BT = (before_BT == noise.mask_id) & (frame.tokens_BT != noise.mask_id)
        for b in written_BT.any(-1).nonzero().squeeze(-1).tolist():
            masks_T = before_BT[b] == noise.mask_id
            j = min(segments - 1, int(segments * (1 - masks_T.double().mean().item())))
            seen[b, j] = count = seen.get((b, j), 0) + 1
            if count & (count - 1) == 0 or (b, j) not in states:  # keeps the last of 1, 2, 4, ... steps: a few into the segment
                states[b, j] = before_BT[b], written_BT[b] if written_only else masks_T
        last = frame
    if last is None:
        raise InputError("a run without steps has no states: ask for a text of at least one token")
    found = _Table(len(last.tokens_BT), segments)
    keys = sorted(states)
    for begin in range(0, len(keys), batch):
        part = keys[begin : begin + batch]
        z_BT, at_BT = (torch.stack([states[key][i] for key in part]) for i in (0, 1))
        rows, columns = torch.tensor(part).T
        found.fill(noise, models, z_BT, at_BT, rows, columns)
        progress(len(part))
    return found.done()


def _check(noise: MaskedNoise, models: Mapping[str, Predict]) -> None:
    if not isinstance(noise, MaskedNoise):
        raise InputError("the sensitivity of a step is counted in masks: it needs diffusion models with masked noise")
    if HEAVY not in models or len(models) < 2:
        raise InputError(f"sensitivity compares model {HEAVY} with at least one other")


class _Table:
    """Loss and KL of every window and segment, filled as they are measured."""

    def __init__(self, windows: int, segments: int) -> None:
        self.size = windows, segments
        self.kl: dict[str, Tensor] = {}
        self.loss: dict[str, Tensor] = {}

    def _put(
        self, table: dict[str, Tensor], key: str, values_BT: Tensor, at_BT: Tensor, rows: slice | Tensor, columns: int | Tensor
    ) -> None:
        table.setdefault(key, torch.full(self.size, torch.nan, dtype=torch.float64))
        table[key][rows, columns] = ((values_BT.double() * at_BT).sum(-1) / at_BT.sum(-1)).cpu()

    def fill(
        self,
        noise: MaskedNoise,
        models: Mapping[str, Predict],
        z_BT: Tensor,
        at_BT: Tensor,
        rows: slice | Tensor,
        columns: int | Tensor,
        x_BT: Tensor | None = None,
    ) -> None:
        t_B = time_when(noise.schedule, (z_BT != noise.mask_id).double().mean(-1))
        heavy_BTV = models[HEAVY](z_BT, t_B)
        for key, predict in models.items():
            logits_BTV = heavy_BTV if key == HEAVY else predict(z_BT, t_B)
            if x_BT is not None:
                self._put(self.loss, key, noise.nll(logits_BTV, x_BT, z_BT), at_BT, rows, columns)
            if key != HEAVY:
                self._put(self.kl, key, noise.kl(heavy_BTV, logits_BTV, z_BT), at_BT, rows, columns)

    def done(self) -> Sensitivity:
        return Sensitivity(self.kl, self.loss)
