"""The cost of a request before it is admitted: positions of a forward pass, forward passes, bytes. All are upper bounds.

A position is one token that the network reads in one forward pass; the time and the memory of a pass grow with them.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlm.errors import InputError
from dlm.language_model import LanguageModel
from dlm.language_model.resolution import DecodingPlan
from dlm.sampling import registry
from dlm.sampling.autoregressive.draft import Draft
from dlm.sampling.autoregressive.drafters import MAX_MEASURED_POSITIONS
from dlm.trajectory import Canvas

READOUT_BYTES = 20
"""Of a position, for each id of the vocabulary: a logit in float32, and two numbers in float64 while a token is drawn."""
STATE_BYTES = 32
"""Of a position, for each channel: the hidden states of a block that are alive at once, in float32."""


@dataclass(frozen=True)
class Cost:
    """Of one text. plain: the positions of a forward pass without draft tokens, which are always admitted."""

    positions: int
    forwards: int
    bytes: int
    plain: int

    @property
    def rows(self) -> int:
        """The texts without draft tokens whose forward pass costs as much."""
        return max(1, -(-self.positions // max(self.plain, PLAIN_POSITIONS)))


PLAIN_POSITIONS = 64
"""Forward passes of fewer positions cost about the same."""


@dataclass(frozen=True)
class CostLimits:
    """Of one text; a forward pass of one window without draft tokens is always within the first and the last."""

    positions: int = 4096
    forwards: int = 2**15
    bytes: int = 2**31

    def check(self, cost: Cost, word: str) -> None:
        """InputError for a text that costs more. word: the sampler, as it is named."""
        if cost.positions > max(self.positions, cost.plain):
            raise InputError(
                f"the sampler {word!r} reads {cost.positions} positions in a forward pass of one text, this server takes "
                f"{self.positions}: fewer draft tokens"
            )
        if cost.forwards > self.forwards:
            raise InputError(f"the text needs {cost.forwards} forward passes, this server takes {self.forwards}: fewer steps or tokens")
        if cost.bytes > self.bytes and cost.positions > cost.plain:
            raise InputError(
                f"the sampler {word!r} needs {cost.bytes / 2**30:.1f} GiB for one text, this server takes {self.bytes / 2**30:.1f}: "
                "fewer draft tokens"
            )


def of(lm: LanguageModel, plan: DecodingPlan, canvas: Canvas) -> Cost:
    """Of one text on this canvas."""
    length, holes = canvas.tokens_BT.shape[1], int(canvas.free_BT.sum())
    return _denoised(lm, plan, length, holes) if lm.is_diffusion and not plan.left_to_right else _written(lm, plan.draft, length, holes)


def _bytes(lm: LanguageModel, positions: int, cached: int) -> int:
    """Logits, hidden states and the mask of attention of a pass, and the KV cache of so many positions."""
    network = lm.config.network
    kept = 8 * network.layers * cached * network.width
    return positions * (READOUT_BYTES * network.vocab_size + STATE_BYTES * network.width + cached + positions) + kept


def _written(lm: LanguageModel, draft: Draft | None, length: int, holes: int) -> Cost:
    positions, passes = (1, 1) if draft is None else (_verified(draft), 1 + _drafting_passes(draft))
    cached = min(lm.window, length)
    return Cost(positions, holes * passes, _bytes(lm, positions, cached + positions), 1)


def _drafting_passes(draft: Draft) -> int:
    """Forward passes that draft for one that verifies."""
    if draft.source == "block":
        return 1
    return draft.tokens or 0 if draft.source not in ("adapter", "ngram", "heads") else 0


def _verified(draft: Draft) -> int:
    """Positions of a pass that verifies: the last token, the draft tokens, and masks of the next ones."""
    tokens = draft.tokens or 0
    if draft.source != "adapter":
        return 1 + (draft.tree or tokens)
    if draft.tree:
        return (1 + draft.tree) * (1 + tokens)
    whole = (1 + tokens) ** 2
    return whole if whole <= MAX_MEASURED_POSITIONS else 1 + 2 * tokens


def _denoised(lm: LanguageModel, plan: DecodingPlan, length: int, holes: int) -> Cost:
    window, info = lm.window, registry.get(plan.word, lm.kind)
    whole = plan.block_length if lm.is_causal and lm.config.block_phase == "zero" else 1  # blocks that are read to their end
    span = window if lm.config.fills_window else min(window, -(-length // whole) * whole)
    places = 1 if length <= window else -(-(length - plan.context) // (window - plan.context))
    each = 1 if info.rule else min(int(info.parse(plan.word).get("draft_tokens", 1)), span)
    forwards = holes if info.exact_by_default else places * max(plan.steps, 1)
    positions = span * each
    return Cost(positions, forwards, _bytes(lm, positions, span), span)
