"""Guidance: classifier-free and classifier guidance of the predicted tokens, before any is drawn.

After Schiff et al. 2412.10193.

Both kinds change the distribution of x, so the rule still decides which positions move when.
Shapes: B rows, T positions of the window, V vocabulary with the mask, N masked tokens tried. Log-probabilities in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dlm.errors import InputError, in_range
from dlm.sampling.draw import MAX_SETTING

Read = Callable[[Tensor, Tensor], Tensor]
"""The network: (z_BT, t_B) -> logits (B, T, V)."""
CHUNK_INPUTS = 1024
"""Classifier inputs in one forward pass."""


def _check(scale: float) -> None:
    in_range(scale, 0, MAX_SETTING, "the guidance scale")


def _log_probs(logits_BTV: Tensor, mask_id: int) -> Tensor:
    mask_V = torch.arange(logits_BTV.shape[-1], device=logits_BTV.device) == mask_id
    return logits_BTV.masked_fill(mask_V, -torch.inf).log_softmax(-1)


@dataclass(frozen=True)
class ClassifierFree:
    """p(x_i | z)^scale p(x_i | z without the prompt)^(1 - scale): the classifier-free guidance scale 1 reads the prompt, a
    larger one exaggerates it.

    Ho and Salimans 2207.12598; D-CFG of Schiff et al. The prompt is removed by masking it, in one forward pass on a doubled
    batch. InputError for a scale out of range.
    """

    pointwise: ClassVar[bool] = True
    scale: float
    mask_id: int

    def __post_init__(self) -> None:
        _check(self.scale)

    def __call__(self, read: Read, z_BT: Tensor, t_B: Tensor, given_BT: Tensor) -> Tensor:
        """Rows without a prompt are read as they are; a token that one of the two excludes stays excluded."""
        bare_BT = torch.where(given_BT, self.mask_id, z_BT)
        prompted_B = given_BT.any(-1)
        if self.scale == 1 or not bool(prompted_B.any()):
            return read(z_BT, t_B)
        if self.scale == 0:
            return read(bare_BT, t_B)
        with_BTV, without_BTV = read(torch.cat([z_BT, bare_BT]), torch.cat([t_B, t_B])).chunk(2)
        cond_BTV, uncond_BTV = _log_probs(with_BTV, self.mask_id), _log_probs(without_BTV, self.mask_id)
        excluded_BTV = (cond_BTV == -torch.inf) | (uncond_BTV == -torch.inf)
        bent_BTV = (uncond_BTV + self.scale * (cond_BTV - uncond_BTV)).masked_fill(excluded_BTV, -torch.inf)
        return torch.where(prompted_B[:, None, None], bent_BTV, with_BTV)


@dataclass(frozen=True)
class Classifier:
    """p(x_i | z) p(y | z with x_i)^scale at the masks: D-CBG of Schiff et al.

    log_prob: one-hot floats (B, T, V), the mask a token like others, to log p(y | z) (B,). exact tries every token at every mask,
    which takes a classifier input for each; else one gradient, first order in the one-hot.
    """

    pointwise: ClassVar[bool] = False
    log_prob: Callable[[Tensor], Tensor]
    scale: float
    mask_id: int
    exact: bool = False

    def __post_init__(self) -> None:
        _check(self.scale)

    def __call__(self, read: Read, z_BT: Tensor, t_B: Tensor, given_BT: Tensor) -> Tensor:
        """InputError when the classifier's output has another shape or no gradient, or excludes every token of a mask."""
        logits_BTV = read(z_BT, t_B)
        if self.scale == 0:
            return logits_BTV
        logp_BTV = _log_probs(logits_BTV, self.mask_id)
        masked_BT = z_BT == self.mask_id
        hot_BTV = torch.nn.functional.one_hot(z_BT, logits_BTV.shape[-1]).to(logits_BTV.dtype)
        gain_BTV = self._tried(hot_BTV, masked_BT[..., None] & (logp_BTV > -torch.inf)) if self.exact else self._slope(hot_BTV)
        bent_BTV = (logp_BTV + self.scale * gain_BTV).masked_fill(logp_BTV == -torch.inf, -torch.inf)
        if not bool((bent_BTV > -torch.inf).any(-1)[masked_BT].all()):
            raise InputError("the classifier excludes every token of a masked position: no text with this label is left")
        return torch.where(masked_BT[..., None], bent_BTV, logits_BTV)

    def _score(self, hot_NTV: Tensor) -> Tensor:
        score_N = self.log_prob(hot_NTV)
        if score_N.shape != hot_NTV.shape[:1]:
            raise InputError(
                f"a classifier gives one log-probability a row: expected the shape ({len(hot_NTV)},), got {tuple(score_N.shape)}"
            )
        return score_N

    def _tried(self, hot_BTV: Tensor, try_BTV: Tensor) -> Tensor:
        """log p(y | z with z_i = v) for every v to try, else 0; log p(y | z) is the same for every v and left out."""
        tokens_V = torch.arange(hot_BTV.shape[-1], device=hot_BTV.device)
        gain_BTV = torch.zeros_like(hot_BTV)
        index_N3 = try_BTV.nonzero()
        for begin in range(0, len(index_N3), CHUNK_INPUTS):
            row_N, at_N, token_N = index_N3[begin : begin + CHUNK_INPUTS].unbind(1)
            tried_NTV = hot_BTV[row_N]
            tried_NTV[torch.arange(len(row_N)), at_N] = (tokens_V == token_N[:, None]).to(hot_BTV)
            gain_BTV[row_N, at_N, token_N] = self._score(tried_NTV).to(gain_BTV.dtype)
        return gain_BTV

    def _slope(self, hot_BTV: Tensor) -> Tensor:
        """The same to first order in the one-hot, what does not depend on v left out: the gradient."""
        with torch.enable_grad():
            hot_BTV = hot_BTV.detach().requires_grad_()
            score_B = self._score(hot_BTV)
            if not score_B.requires_grad:
                raise InputError("the classifier has no gradient: use exact=True")
            (slope_BTV,) = torch.autograd.grad(score_B.sum(), hot_BTV)
        return slope_BTV
