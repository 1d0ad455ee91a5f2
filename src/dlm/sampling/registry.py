"""From a word of the command line to a rule: `topk`, `confidence:0.7`, `entropy-bound:0.1` ..., checked against the noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from dlm.errors import InputError
from dlm.noise.masked import MaskedNoise
from dlm.protocols import NoiseProcess
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
STRIDED = ("strided", "lookup", "draft", "heads")  # of autoregressive models
BRANCHING, MOST_NODES = ("strided", "heads"), 64  # those that know second choices
ROUNDED = ("int8", "int4")  # what drafts besides models: the network itself with its weights in fewer bits
LOSSLESS = "lossless"  # the best of these that a model has, which it knows itself
WORDS = tuple(dict.fromkeys([*UNMASKING, SPECULATIVE, *REPLACING]))


def speculative(word: str) -> dict[str, Any] | None:
    """The settings of `speculative`, `speculative:8` or `speculative:8,0.1` (proposals, tolerance); None for another word."""
    name, _, values = word.partition(":")
    if name != SPECULATIVE:
        return None
    proposals, _, tolerance = values.partition(",")
    try:
        return {"proposals": int(proposals or 8), "tolerance": float(tolerance or 0)}
    except ValueError:
        raise InputError(f"sampler {word!r}: write speculative, speculative:PROPOSALS or speculative:PROPOSALS,TOLERANCE") from None


@dataclass(frozen=True)
class Strided:
    """Settings of speculative decoding; name: the drafter; model: the draft model; stride: None for `auto`;
    nodes: of a draft tree, 0 for the first choices alone."""

    name: str
    model: str = ""
    stride: int | None = 4
    floor: float = 0.0
    nodes: int = 0


def strided(word: str) -> Strided | None:
    """`strided`, `lookup:4` (stride), `lookup:8,0.2` (and floor), `strided:auto` (as pays), `strided:4x16` (16 candidates a call),
    `draft:MODEL`, `draft:MODEL,4`; None for another word."""
    name, _, values = word.partition(":")
    if name not in STRIDED:
        return None
    model, _, values = values.partition(",") if name == "draft" else ("", "", values)
    stride, _, floor = values.partition(",")
    stride, branches, nodes = stride.partition("x") if name in BRANCHING else (stride, "", "")
    try:
        found = Strided(name, model, None if stride == "auto" else int(stride or 4), float(floor or 0), int(nodes) if branches else 0)
        if (found.stride is not None and found.stride < 1) or bool(model) != (name == "draft"):
            raise ValueError
    except ValueError:
        head = "draft:MODEL, draft:MODEL,4" if name == "draft" else f"{name}, {name}:4"
        more = f"{name}:4x16 (stride, candidates), " if name in BRANCHING else ""
        raise InputError(f"sampler {word!r}: write {head} (stride, or auto), {more}or {head.split()[-1]},0.2 (stride, floor)") from None
    if branches and (found.stride is None or not found.stride - 1 <= found.nodes <= MOST_NODES):
        raise InputError(f"sampler {word!r}: STRIDExCANDIDATES has stride - 1 candidates at least and {MOST_NODES} at most")
    return found


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
