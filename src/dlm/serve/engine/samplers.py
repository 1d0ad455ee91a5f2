"""What a model can decode with, each with the one line that a user who picks it reads."""

from __future__ import annotations

from dlm.language_model import LanguageModel

MASKED = {
    "ancestral": "Random order, each mask in a step of its own drawing: the plain reverse process.",
    "first-hitting": "Random order, one token a call: exact, whatever the steps.",
    "topk": "The most probable of the drawn tokens first, an equal share in each step.",
    "margin": "Tokens that lead their runner-up by most first, an equal share in each step.",
    "entropy": "Places where the model hesitates least first, an equal share in each step.",
    "confidence": "All tokens at once that the model is sure of, at least one a call.",
    "factor": "As many of the surest tokens at once as are likely to be right together.",
    "entropy-bound": "As many of the surest tokens at once as a budget of doubt allows.",
    "klass": "All tokens at once that the model is sure of and did not change its mind about.",
    "predictor-corrector": "Reveals more than its share, then hides some at random, to be drawn anew.",
    "remdm-cap": "Random order; any token may be hidden again, with a small fixed chance.",
    "remdm-rescale": "Random order; any token may be hidden again, with a chance that follows the noise.",
    "remdm-conf": "Random order; any token may be hidden again, the less sure it was, the likelier.",
    "remdm-loop": "Random order; in the middle third of the steps tokens are hidden and drawn anew.",
    "revoke": "Writes boldly, and takes back what the rest of the text then makes unlikely.",
    "planner": "Keeps the best tokens, new or old, as many as the step allows, and hides the rest.",
    "speculative": "One token at a time in random order, exact, in fewer calls: several are proposed, then verified.",
}
REPLACED = {
    "ancestral": "Any token may change in any step: the plain reverse process.",
    "predictor-corrector": "Removes more noise than its share, then puts some back, so that tokens are drawn anew.",
    "refine": "Draws every token anew in every step and puts no noise back.",
    "entropy-bound": "Keeps the surest tokens within a budget of doubt and puts noise on the rest.",
    "worst": "Draws those tokens anew for which the model has a much better one.",
}
CONTINUING = {
    "autoregressive": "One token a call, from left to right.",
    "strided": "The same text, several tokens a call: the model's own guesses, verified in the next call.",
    "lookup": "The same text, several tokens a call: what followed the last words earlier on, verified.",
    "heads": "The same text, several tokens a call: guesses of extra heads, verified.",
}


def samplers(lm: LanguageModel) -> dict[str, str]:
    """By name, those that this model can use."""
    if not lm.is_diffusion:
        return {name: about for name, about in CONTINUING.items() if name != "heads" or lm.heads is not None}
    if lm.config.noise["process"] != "masked":
        return REPLACED
    lacks = ("revoke", "planner", "speculative") if lm.is_causal else ()
    return {name: about for name, about in MASKED.items() if name not in lacks}
