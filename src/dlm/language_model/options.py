"""The options of decoding: how a text is drawn, its constraints, and its length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType
from typing import Any, TypedDict, cast, get_args, get_origin, get_type_hints

from dlm.errors import InputError, unknown
from dlm.sampling import registry
from dlm.sampling.autoregressive.draft import Draft, is_short

__all__ = ["DTYPES", "DecodingKeywords", "DecodingOptions", "Draft", "LayoutKeywords", "TextKeywords", "check_dtype", "separate"]

MAX_TOKENS = 10_000_000  # of all rows of a canvas, which a run keeps in memory with its steps
DTYPES = ("float32", "bfloat16", "int8", "int4")


def check_dtype(word: str) -> None:
    """InputError for a word that is not in DTYPES."""
    if word not in DTYPES:
        raise InputError(f"unknown dtype {word!r}; known: {', '.join(DTYPES)}")


class DecodingKeywords(TypedDict, total=False):
    """The keyword arguments of `LanguageModel.sampler`; `DecodingOptions` says what each means."""

    sampler: str | Callable[..., Any] | None
    draft: Draft | str | None
    steps: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    greedy_tail: int
    until_settled: int
    early_stop: bool
    block_length: int | None
    cache: bool | str
    context: int | None
    guidance: float
    allow: str | None
    pattern: str | None
    answer: str | None
    budget: str | None
    schedule: str | None
    light: str | Mapping[str, str] | None
    preset: str | None
    rule: Callable[..., Any] | None


class LayoutKeywords(TypedDict, total=False):
    """The keyword arguments of `LanguageModel.canvas`."""

    length: int | None
    max_new_tokens: int | None
    suffix: str
    template: str | None


class TextKeywords(DecodingKeywords, LayoutKeywords, total=False):
    """The keyword arguments of `LanguageModel.generate` and `stream` besides their own: a canvas and how it is decoded."""


@dataclass(frozen=True)
class DecodingOptions:
    """How a model decodes. Options that are None come from `preset`, from generation_config.json or from the model.

    preset: `official`, the reference sampler of another project's checkpoint with the settings of its model card, which such a checkpoint
    takes anyhow; other options replace its settings.

    sampler: a name of `dlm.sampling.registry`, its parameters after a colon, as in `confidence:0.7`. `auto`: the sampler that `dlm
    calibrate` found best within `budget` (`calls:32`, `seconds:2`, `bits:0.1`). For an autoregressive model, one of the short forms of
    `draft` (`strided:4`, `strided:4x16`, `lookup:4`, `heads:4`, `block:8`, `draft:NAME:4`, `auto` for the number), or `lossless`: the
    drafter that is fastest for the model's adapter, heads or weights.
    rule: a rule of your own in place of a name, as `dlm.TopScore()`; `sampler` takes it too. It keeps its own draw unless temperature,
    top_p or top_k are given.
    draft: speculative decoding of an autoregressive model by this drafter; as a text, as of `Draft.parse` (`self:int4`, `ngram`).
    steps: denoising steps of each window. temperature, top_p, top_k: of every draw; temperature 0 takes the likeliest token.
    Of generation_config.json they are read too, and `do_sample: false` there is temperature 0; top_p 1 and top_k 0 keep every token.
    greedy_tail: so many last steps take the likeliest token everywhere (replacement noise). until_settled: a window ends once no token
    has changed for so many steps; 0: never.
    early_stop: what stands after a written end-of-text token is neither read nor written from then on, also where the text before it has
    masks yet; an approximation where that text reads it.
    block_length: tokens of the blocks in which a window is filled from left to right; a model of block diffusion has its own.
    cache: a policy of `dlm.sampling.diffusion.cache_policies` for a bidirectional model; True: the exact KV cache of an autoregressive
    model or of block diffusion; False: none.
    context: tokens of a window that a long text carries into the next.
    guidance: the classifier-free guidance scale; 1: the conditional model itself.
    allow: the only characters that may be written. pattern: a regular expression that the whole text must match.
    answer: a regular expression that the written part must match, given text apart; a diffusion model fills the rest of its place with
    white space, an autoregressive one ends there.
    budget: of `sampler="auto"` alone.
    schedule: which model takes which step (`L0.5 H0.5`, `sandwich:0.25`); `auto`: what `dlm schedule search` found. This model is H.
    light: the name of model L, or names by key.
    """

    sampler: str | None = None
    draft: Draft | None = None
    steps: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    greedy_tail: int = 0
    until_settled: int = 0
    early_stop: bool = False
    block_length: int | None = None
    cache: bool | str = True
    context: int | None = None
    guidance: float = 1.0
    allow: str | None = None
    pattern: str | None = None
    answer: str | None = None
    budget: str | None = None
    schedule: str | None = None
    light: str | Mapping[str, str] | None = None
    preset: str | None = None
    rule: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.sampler is not None and not isinstance(self.sampler, str):
            object.__setattr__(self, "rule", self.sampler)
            object.__setattr__(self, "sampler", None)
        if self.rule is not None and (isinstance(self.rule, type) or not hasattr(self.rule, "revises")):
            raise InputError(f"a sampler is a name, or a rule as an object, as in sampler=dlm.TopScore(); got {self.rule!r}")
        if isinstance(self.draft, str):
            object.__setattr__(self, "draft", Draft.parse(self.draft))

    @property
    def left_to_right(self) -> bool:
        """Whether they ask for autoregressive decoding by name."""
        named = self.sampler is not None and (self.sampler in (registry.PLAIN, registry.LOSSLESS) or is_short(self.sampler.split(":")[0]))
        return self.draft is not None or named

    @classmethod
    def of(cls, options: Mapping[str, object]) -> DecodingOptions:
        """From keyword arguments. InputError for a name that is no option, with the nearest one that is."""
        return separate(options)[1]


def separate(options: Mapping[str, object]) -> tuple[LayoutKeywords, DecodingOptions]:
    """The options of a canvas and those of decoding. InputError for a name that is neither, with the nearest one, and for another type."""
    decoding, layout = [one.name for one in fields(DecodingOptions)], list(LayoutKeywords.__annotations__)
    if strange := [name for name in options if name not in (*decoding, *layout)]:
        raise unknown("option", strange[0], [*decoding, *layout])
    for name, value in options.items():
        _check_type(name, value)
    own = {name: value for name, value in options.items() if name in layout}
    return cast(LayoutKeywords, own), DecodingOptions(**{n: v for n, v in options.items() if n in decoding})  # type: ignore[arg-type]


KINDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    NoneType: "None",
    Draft: "a Draft",
    Mapping: "a mapping",
    Callable: "a rule",
}


@cache
def _types() -> dict[str, tuple[type, ...]]:
    """The types that each option takes."""
    return {name: tuple(get_origin(one) or one for one in get_args(hint) or (hint,)) for name, hint in get_type_hints(TextKeywords).items()}


def _check_type(name: str, value: object) -> None:
    """InputError for a value of another type. The numbers of numpy and torch are numbers."""
    kinds = _types()[name]
    whole, number = hasattr(value, "__index__"), hasattr(value, "__float__")
    if not (isinstance(value, kinds) or (whole and int in kinds) or (number and float in kinds)):
        raise InputError(f"{name} takes {' or '.join(KINDS[kind] for kind in kinds)}, got {value!r}")
