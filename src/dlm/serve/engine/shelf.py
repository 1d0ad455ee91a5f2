"""The models of a server, and from a request to its jobs. Nothing here reads a path that a request names."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dlm import seeds
from dlm.errors import InputError, nearest
from dlm.language_model import LanguageModel
from dlm.language_model.options import DecodingOptions
from dlm.language_model.resolution import DecodingPlan
from dlm.sampling import registry
from dlm.sampling.autoregressive.draft import Draft
from dlm.serve.engine import cost
from dlm.serve.engine.job import Event, Job
from dlm.serve.engine.scoring import Scorer
from dlm.serve.protocol import json_schema, schema
from dlm.spelling import REPLACEMENT
from dlm.trajectory import Canvas

MAX_CHARACTERS_PER_TOKEN = 16  # on average, in any sensible text
ROW_BY_ROW = Draft("ngram", tokens=0)  # plain decoding whose rows may join and leave a batch
Deliver = Callable[[int, Event], None]


class UnknownModelError(Exception):
    """The request names a model that is not served."""


@dataclass(frozen=True)
class Plan:
    """A request resolved. word: the sampler, as the reply names it; decoding: the plan by which it is decoded."""

    model: LanguageModel
    word: str
    decoding: DecodingPlan
    seed: int

    @property
    def steps(self) -> int | None:
        """Of a window; None for an autoregressive model."""
        return self.decoding.steps or None

    @property
    def lane(self) -> tuple[str, DecodingPlan]:
        """Requests of one lane share forward passes."""
        return self.model.name, self.decoding

    def jobs(self, canvases: Sequence[Canvas], deliver: Deliver, *, records: int | None, seconds: float) -> list[Job]:
        """A row for each canvas, the next seed each."""
        now = time.monotonic()
        return [
            Job(
                self.lane,
                partial(self.model.build, self.decoding),
                canvas,
                seeds.after(self.seed, index),
                self.model.tokenizer.mask_id,
                partial(deliver, index),
                records,
                now + seconds,
                cost.of(self.model, self.decoding, canvas).rows,
            )
            for index, canvas in enumerate(canvases)
        ]

    def scorings(self, texts: Sequence[tuple[int, ...]], first: int, deliver: Deliver, *, records: int, seconds: float) -> list[Job]:
        """A row for each text of an autoregressive model, which gives the log-probabilities of its tokens. first: its number."""
        lm, now = self.model, time.monotonic()
        mask_id = lm.tokenizer.mask_id
        made = []
        for index, tokens in enumerate(texts, first):
            make = partial(Scorer, lm.predict, tokens, mask_id, lm.name, lm.config.start_token_id is None)
            canvas = Canvas.from_rows([[None] * len(tokens)], fill=mask_id)
            lane = lm.name, object()
            made.append(Job(lane, make, canvas, 0, mask_id, partial(deliver, index), records, now + seconds, writes=False))
        return made


class Shelf:
    """Models by name, the first is the default; the only names that a request may use.

    max_tokens: of a text, its prompt included; max_steps: of a window; most: the cost of a text.
    """

    def __init__(
        self, models: Sequence[LanguageModel], max_tokens: int = 4096, max_steps: int = 1024, most: cost.CostLimits | None = None
    ) -> None:
        if not models:
            raise InputError("nothing to serve: name a model")
        self.models = {model.name: model for model in models}
        if len(self.models) < len(models):
            raise InputError("two of the models have the same name")
        for model in models:
            for other in models:
                model.introduce(other)
            if not model.is_diffusion:
                model.prepare_lossless()  # before anything runs
        self.max_tokens, self.max_steps, self.created = max_tokens, max_steps, int(time.time())
        self.most = most or cost.CostLimits()

    def get(self, name: str | None) -> LanguageModel:
        """UnknownModelError for one that is not served."""
        if name is None or name == "":
            return next(iter(self.models.values()))
        if name not in self.models:
            raise UnknownModelError(
                f"the model {name!r} is not served here{nearest(name, self.models) or ';'} there are: {', '.join(self.models)}"
            )
        return self.models[name]

    def plan(self, request: schema.Decoding, seed: int) -> Plan:
        """UnknownModelError, or InputError for options that do not go with the model or with one another."""
        lm = self.get(request.model)
        if (request.steps or 0) > self.max_steps:
            raise InputError(f"{request.steps} steps were asked for, this server takes {self.max_steps} at most")
        for name in [request.light, *_draft_models(request.sampler)]:
            if name is not None and name not in self.models:
                raise InputError(
                    f"the model {name!r} is not served here{nearest(name, self.models) or ';'} there are: {', '.join(self.models)}"
                )
        options = DecodingOptions(
            sampler=_lossless(lm, request.sampler, request.steps) if request.lossless else request.sampler,
            steps=request.steps,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            schedule=request.schedule,
            light=request.light,
        )
        if isinstance(request, schema.ChatRequest):
            options = replace(options, answer=_form(request.response_format))
        if getattr(request, "messages", None) is not None:
            options = lm.for_chat(options)
        plan = lm.resolve(options)
        if request.lossless and not plan.exact:
            raise InputError(f"the sampler {plan.word!r} approximates: lossless goes with {', '.join(lm.exact_samplers)}")
        word = plan.word
        if plan.draft is None and not lm.is_diffusion and plan.answer is None:
            plan = replace(plan, draft=ROW_BY_ROW)
        if plan.draft is None:
            lm.build(plan)  # raises now for options that do not go together
        return Plan(lm, word, plan, seed)

    def check_counts(self, request: schema.Decoding) -> None:
        """InputError for more tokens than this server writes, before there is room made for them."""
        for name in ("max_tokens", "max_completion_tokens", "length"):
            if (getattr(request, name, None) or 0) > self.max_tokens:
                raise InputError(
                    f"{name} {getattr(request, name)}: this server writes {self.max_tokens} tokens at most, the prompt included"
                )

    def check_text(self, texts: Iterable[str | None]) -> None:
        """InputError for more text than can be that many tokens, before it is encoded."""
        size = sum(len(text) for text in texts if text is not None)
        if size > MAX_CHARACTERS_PER_TOKEN * self.max_tokens:
            raise InputError(f"the text has {size} characters: this server writes {self.max_tokens} tokens at most, the prompt included")

    def check(self, plan: Plan, canvas: Canvas) -> Canvas:
        """InputError for a text that is too long for this server, or costs too much."""
        if canvas.tokens_BT.shape[1] > self.max_tokens:
            raise InputError(f"the text would have {canvas.tokens_BT.shape[1]} tokens, this server writes {self.max_tokens} at most")
        self.most.check(cost.of(plan.model, plan.decoding, canvas), plan.word)
        return canvas

    def describe(self, lm: LanguageModel) -> dict[str, Any]:
        """The facts about a model for the page and other clients."""
        noise = lm.config.noise["process"] if lm.is_diffusion else None
        kind = "diffusion" if lm.is_diffusion else "autoregressive"
        facts = {
            "kind": kind,
            "noise": {"masked": "mask"}.get(noise, noise) if noise else None,
            "window": lm.window,
            "vocab_size": lm.tokenizer.vocab_size,
            "samplers": [{"name": info.name, "about": info.about} for info in lm.samplers],
            "default_sampler": lm.default_sampler,
            "temperature": lm.facts(DecodingOptions()).default_temperature if lm.prompting.fills_windows else None,
            "length": lm.window if lm.prompting.fills_windows else None,
            "steps": min(int(lm.defaults.get("steps", lm.window)), self.max_steps) if lm.is_diffusion else lm.window,
            "characters": all(
                len(lm.tokenizer.piece(i)) == 1 and lm.tokenizer.piece(i) != REPLACEMENT for i in range(min(lm.tokenizer.vocab_size, 1024))
            ),
            "chat": bool(lm.chat.source),
            "infills": lm.is_diffusion and not lm.is_causal,
            "grid": lm.grid and lm.grid | {"symbols": "".join(map(lm.tokenizer.piece, range(lm.tokenizer.mask_id)))},
        }
        return {"id": lm.name, "object": "model", "created": self.created, "owned_by": "dlm", "dlm": facts}


def _form(asked: schema.TextFormat | schema.ObjectFormat | schema.SchemaFormat | None) -> str | None:
    """The expression of the answers that were asked for; None for any text."""
    if isinstance(asked, schema.SchemaFormat):
        return json_schema.expression(asked.json_schema.schema_)
    return json_schema.any_object() if isinstance(asked, schema.ObjectFormat) else None


def _draft_models(word: str | None) -> list[str]:
    """The draft model that a sampler names, unless it is a quantized copy of the model itself."""
    draft = Draft.from_word(word) if word else None
    return [draft.model] if draft is not None and draft.source == "model" else []


def _lossless(lm: LanguageModel, word: str | None, steps: int | None) -> str:
    """The sampler of a lossless request. InputError where no sampler is exact, and for steps that allow fewer passes than tokens."""
    if not lm.is_diffusion:
        return word or registry.LOSSLESS
    info = registry.lossless(lm.kind, bidirectional=not lm.is_causal)
    if info is None:
        raise InputError(f"every sampler of {lm.name} approximates, since its noise replaces tokens: leave lossless away")
    if steps is not None and steps < lm.window:
        raise InputError(f"{steps} steps for a window of {lm.window} tokens approximate: leave steps away, or lossless")
    return word or info.name
