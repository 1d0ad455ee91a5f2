"""From a word of the command line to a rule: `topk`, `confidence:0.7`, `entropy-bound:0.1` ..., checked against the noise."""

from __future__ import annotations

from collections.abc import Callable

from dlm.errors import InputError
from dlm.noise.masked import MaskedNoise
from dlm.protocols import NoiseProcess, Rule
from dlm.sampling.draw import Draw
from dlm.sampling.revising import ChangeWorst, EntropyBound, GreedyTail, PredictorCorrector, Refine, Reverse
from dlm.sampling.rules import Ancestral, Threshold, TopConfidence

UNMASKING: dict[str, Callable[..., Rule]] = {
    "ancestral": Ancestral,
    "topk": TopConfidence,
    "confidence": Threshold,
    "predictor-corrector": PredictorCorrector,
}
REPLACING: dict[str, Callable[..., Rule]] = {
    "ancestral": Reverse,
    "predictor-corrector": PredictorCorrector,
    "refine": Refine,
    "entropy-bound": EntropyBound,
    "worst": ChangeWorst,
}
SETTING = {"confidence": "threshold", "predictor-corrector": "corrector", "entropy-bound": "bound", "worst": "edits"}
WORDS = tuple(dict.fromkeys([*UNMASKING, *REPLACING]))


def make(word: str, draw: Draw, noise: NoiseProcess, greedy_tail: int = 0) -> Rule:
    """The rule that a word such as `confidence` or `confidence:0.7` means for this noise. InputError for one that it cannot use."""
    name, colon, value = word.partition(":")
    known, kind = (UNMASKING, "masked") if isinstance(noise, MaskedNoise) else (REPLACING, "replacement")
    if name not in known:
        reason = f"needs {'replacement' if kind == 'masked' else 'masked'} noise" if name in WORDS else "is unknown"
        raise InputError(f"the sampler {name!r} {reason}; this model has {kind} noise and can use: {', '.join(known)}")
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
