"""From a word of the command line to a rule: `topk`, `confidence:0.7`, `entropy-bound:0.1` ..., checked against the noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from dlm.errors import InputError
from dlm.noise.masked import MaskedNoise
from dlm.protocols import NoiseProcess
from dlm.sampling.autoregressive.draft import SHORT
from dlm.sampling.diffusion.protocols import Rule
from dlm.sampling.diffusion.remasking import Planned, Remask, Revoke
from dlm.sampling.diffusion.revising import ChangeWorst, EntropyBound, GreedyTail, PredictorCorrector, Refine, Reverse
from dlm.sampling.diffusion.unmasking import Ancestral, EntropyBudget, Factor, FirstHitting, KLStable, Threshold, TopScore
from dlm.sampling.draw import Draw

UNMASKING: dict[str, Callable[..., Rule]] = {
    "ancestral": Ancestral,
    "first-hitting": FirstHitting,
    "topk": TopScore,
    "margin": partial(TopScore, score="margin"),
    "entropy": partial(TopScore, score="entropy"),
    "confidence": Threshold,
    "factor": Factor,
    "entropy-bound": EntropyBudget,
    "klass": KLStable,
    "predictor-corrector": PredictorCorrector,
    "remdm-cap": partial(Remask, "cap"),
    "remdm-rescale": partial(Remask, "rescale"),
    "remdm-conf": partial(Remask, "conf"),
    "remdm-loop": partial(Remask, "loop"),
    "revoke": Revoke,
    "planner": Planned,
}
REPLACING: dict[str, Callable[..., Rule]] = {
    "ancestral": Reverse,
    "predictor-corrector": PredictorCorrector,
    "refine": Refine,
    "entropy-bound": EntropyBound,
    "worst": ChangeWorst,
}
SETTING = {
    "confidence": "threshold",
    "factor": "factor",
    "entropy-bound": "bound",
    "klass": "threshold",
    "predictor-corrector": "corrector",
    "remdm-cap": "eta",
    "remdm-rescale": "eta",
    "remdm-conf": "eta",
    "remdm-loop": "eta",
    "revoke": "threshold",
    "planner": "eta",
    "worst": "edits",
}
SETTLING = ("revoke",)  # is done when it neither writes nor takes back
SPECULATIVE = "speculative"
STRIDED = SHORT  # of autoregressive models
LOSSLESS = "lossless"  # the best of these that a model has, which it knows itself
WORDS = tuple(dict.fromkeys([*UNMASKING, SPECULATIVE, *REPLACING]))


def speculative(word: str) -> dict[str, Any] | None:
    """The settings of `speculative`, `speculative:8` or `speculative:8:0.1` (draft tokens, tolerance); None for another word."""
    name, _, values = word.partition(":")
    if name != SPECULATIVE:
        return None
    drafts, _, tolerance = values.replace(",", ":").partition(":")  # a comma is an old spelling
    try:
        return {"draft_tokens": int(drafts or 8), "tolerance": float(tolerance or 0)}
    except ValueError:
        raise InputError(f"sampler {word!r}: write speculative, speculative:TOKENS or speculative:TOKENS:TOLERANCE") from None


def continues(word: str) -> bool:
    """Whether an autoregressive model can use it."""
    return word == "autoregressive" or word.partition(":")[0] in STRIDED


def make(word: str, draw: Draw, noise: NoiseProcess, greedy_tail: int = 0) -> Rule:
    """The rule that a word such as `confidence` or `confidence:0.7` means for this noise. InputError for one that it cannot use."""
    name, colon, value = word.partition(":")
    known, kind = (UNMASKING, "masked") if isinstance(noise, MaskedNoise) else (REPLACING, "replacement")
    if name not in known:
        usable = [*known, SPECULATIVE] if kind == "masked" else list(known)
        reason = f"needs {'replacement' if kind == 'masked' else 'masked'} noise" if name in WORDS else "is unknown"
        reason = "needs an autoregressive model" if continues(word) else reason
        if name == SPECULATIVE and kind == "masked":
            raise InputError("speculative decoding proposes and verifies, it is no rule of one step: it cannot be used here")
        raise InputError(f"the sampler {name!r} {reason}; this model has {kind} noise and can use: {', '.join(usable)}")
    if colon and name not in SETTING:
        raise InputError(f"the sampler {name!r} has no setting, got {word!r}")
    try:
        setting = {SETTING[name]: float(value)} if colon else {}
    except ValueError:
        raise InputError(f"sampler {word!r}: {value!r} is no number") from None
    rule = known[name](draw=draw, **setting)
    if greedy_tail and kind == "masked":
        raise InputError("a greedy tail revises tokens, which masked noise does not: it needs replacement noise")
    return GreedyTail(rule, greedy_tail) if greedy_tail else rule
