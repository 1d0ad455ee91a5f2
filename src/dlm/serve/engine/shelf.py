"""The models that a server has, and from a request to the jobs that it means. Nothing here reads a path that a request names."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dlm.errors import InputError
from dlm.language_model import LanguageModel
from dlm.sampling import registry
from dlm.sampling.autoregressive.draft import Draft
from dlm.serve.engine.job import Event, Job
from dlm.serve.protocol import schema
from dlm.trajectory import Canvas

LONGEST = 16  # characters of a token, on average, of any text worth reading
Deliver = Callable[[int, Event], None]


class Unknown(Exception):
    """A model that is not served."""


@dataclass(frozen=True)
class Plan:
    """What a request comes to. word: the sampler; options: resolved, as of `LanguageModel.sampler`; lane: what calls are shared by."""

    model: LanguageModel
    word: str
    options: dict[str, Any]
    seed: int

    @property
    def lane(self) -> tuple[str, str]:
        return self.model.name, json.dumps(self.options, sort_keys=True)

    def jobs(self, canvases: Sequence[Canvas], deliver: Deliver, *, records: int | None, seconds: float) -> list[Job]:
        """A row for each canvas, the next seed each."""
        now = time.monotonic()
        return [
            Job(
                self.lane,
                partial(self.model.sampler, **self.options),
                canvas,
                self.seed + index,
                self.model.tokenizer.mask_id,
                partial(deliver, index),
                records,
                now + seconds,
            )
            for index, canvas in enumerate(canvases)
        ]


class Shelf:
    """Models by name, the first is the default; the only names that a request may use.

    most: positions of a text; most_steps: of a window.
    """

    def __init__(self, models: Sequence[LanguageModel], most: int = 4096, most_steps: int = 1024) -> None:
        if not models:
            raise InputError("nothing to serve: name a model")
        self.models = {model.name: model for model in models}
        if len(self.models) < len(models):
            raise InputError("two of the models have the same name")
        for model in models:
            for other in models:
                model.introduce(other)
            if not model.is_diffusion:
                model.chosen({"sampler": registry.LOSSLESS})  # an adapter that it has is attached before anything runs
        self.most, self.most_steps, self.created = most, most_steps, int(time.time())

    def get(self, name: str | None) -> LanguageModel:
        """Unknown for one that is not served."""
        if name is None or name == "":
            return next(iter(self.models.values()))
        if name not in self.models:
            raise Unknown(f"the model {name!r} is not served here; there are: {', '.join(self.models)}")
        return self.models[name]

    def plan(self, request: schema.Decoding, seed: int) -> Plan:
        """Unknown, or InputError for options that do not go with the model or with one another."""
        lm = self.get(request.model)
        asked: dict[str, Any] = {"steps": request.steps, "temperature": request.temperature, "top_p": request.top_p}
        asked |= {"sampler": request.sampler, "schedule": request.schedule, "light": request.light}
        options = {name: value for name, value in asked.items() if value is not None}
        if (request.steps or 0) > self.most_steps:
            raise InputError(f"{request.steps} steps were asked for, this server takes {self.most_steps} at most")
        for name in [request.light, *_drafting(request.sampler)]:
            if name is not None and name not in self.models:
                raise InputError(f"the model {name!r} is not served here; there are: {', '.join(self.models)}")
        if request.lossless:
            options["sampler"] = _lossless(lm, request.sampler, request.steps)
        options = lm.chosen(options)
        word = options.setdefault("sampler", lm.default_sampler)
        options.setdefault("temperature", lm.defaults.get("temperature", 1.0))  # said or not, it is the same lane
        if options.get("top_p") == 1:
            del options["top_p"]
        if lm.is_diffusion:
            options.setdefault("steps", lm.defaults.get("steps", lm.window))
        else:
            options.pop("steps", None)
        if word == "autoregressive":
            options["sampler"] = "lookup:1"  # the same text; its rows may join and leave
        if Draft.from_word(options["sampler"]) is None:
            lm.sampler(**options)  # says now what is wrong
        return Plan(lm, word, options, seed)

    def check_text(self, texts: Iterable[str | None]) -> None:
        """InputError for more text than can be that many tokens, before it is encoded."""
        size = sum(len(text) for text in texts if text is not None)
        if size > LONGEST * self.most:
            raise InputError(f"the text has {size} characters: this server writes {self.most} tokens at most, what was given included")

    def check(self, canvas: Canvas) -> Canvas:
        """InputError for a text that is too long for this server."""
        if canvas.tokens_BT.shape[1] > self.most:
            raise InputError(f"the text would have {canvas.tokens_BT.shape[1]} tokens, this server writes {self.most} at most")
        return canvas

    def describe(self, lm: LanguageModel) -> dict[str, Any]:
        """What the page and other clients know of a model."""
        noise = lm.config.noise["process"] if lm.is_diffusion else None
        usable = registry.usable(lm.kind, bidirectional=not lm.is_causal, heads=lm.heads is not None)
        kind = "diffusion" if lm.is_diffusion else "autoregressive"
        facts = {
            "kind": kind,
            "noise": {"masked": "mask"}.get(noise, noise) if noise else None,
            "window": lm.window,
            "vocab_size": lm.tokenizer.vocab_size,
            "samplers": [{"name": info.name, "about": info.about} for info in usable],
            "default_sampler": lm.default_sampler,
            "steps": int(lm.defaults.get("steps", lm.window)) if lm.is_diffusion else lm.window,
            "characters": all(len(lm.tokenizer.piece(i)) == 1 for i in range(min(lm.tokenizer.vocab_size, 1024))),
            "chat": bool(lm.chat.source),
            "infills": lm.is_diffusion and not lm.is_causal,
        }
        return {"id": lm.name, "object": "model", "created": self.created, "owned_by": "dlm", "dlm": facts}


def _drafting(word: str | None) -> list[str]:
    """The model that a sampler word names, unless it is the one that is asked, rounded."""
    draft = Draft.from_word(word) if word else None
    return [draft.model] if draft is not None and draft.source == "model" else []


def _lossless(lm: LanguageModel, word: str | None, steps: int | None) -> str:
    """A sampler with the model's own text or law. InputError where another one is asked for, or none has it."""
    if not lm.is_diffusion:
        return word or registry.LOSSLESS
    info = registry.lossless(lm.kind, bidirectional=not lm.is_causal)
    if info is None:
        raise InputError(f"every sampler of {lm.name} approximates, since its noise replaces tokens: leave lossless away")
    if word is not None and not registry.is_exact(word, lm.kind):
        raise InputError(f"the sampler {word!r} approximates: lossless goes with {', '.join(lm.exact_samplers)}")
    if steps is not None and steps < lm.window:
        raise InputError(f"{steps} steps for a window of {lm.window} tokens approximate: leave steps away, or lossless")
    return word or info.name
