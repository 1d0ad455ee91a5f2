"""From options to a plan: one pure function of the options and of facts about the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from dlm.calibration.table import Calibration, Options
from dlm.errors import InputError, unknown
from dlm.language_model.options import DecodingOptions
from dlm.model_scheduling.saved import SavedSchedule
from dlm.sampling import registry, windows
from dlm.sampling.autoregressive.draft import SOURCES, Draft
from dlm.sampling.draw import Draw

AUTO_TOKENS = {"ngram": 7, "self": 23}  # draft tokens of `auto` at most: a repeated phrase is long, and a quantized copy nearly agrees
USUAL_AUTO_TOKENS = 3
CACHED_BLOCK = 32  # tokens of a block at most, of a bidirectional model with a cache (Fast-dLLM, Wu et al. 2505.22618)
BUDGET = "bits:0.1"  # of `sampler="auto"`
OFFICIAL = "official"  # the one preset


@dataclass(frozen=True)
class Facts:
    """The facts that a plan depends on besides the options.

    noise: that its samplers suit, None for an autoregressive model. bidirectional: whether each position reads all others.
    fills_window: whether noise fills its windows to the end, as of all models that dlm trains. block_length: of block diffusion.
    default_*: what generation_config.json says. official: the settings of the model card of another project's checkpoint; None for ours.
    adapter_tokens: draft tokens that the attached adapter was taught; heads: how many there are; None without. draft_dtype: that of a
    quantized copy that drafts and pays, empty where none does. own_block: tokens of the block that the network denoises beside its causal
    reading, 0 for none. calibration, saved_schedule: what `auto` chooses from, where asked for.
    """

    name: str
    noise: registry.Noise | None
    window: int
    context: int
    bidirectional: bool = True
    fills_window: bool = True
    block_length: int = 0
    default_sampler: str = "ancestral"
    default_steps: int = 1
    default_temperature: float = 1.0
    default_top_p: float = 1.0
    default_top_k: int = 0
    default_block_length: int = 0
    adapter_tokens: int | None = None
    heads: int | None = None
    draft_dtype: str = ""
    own_block: int = 0
    calibration: Calibration | None = None
    saved_schedule: SavedSchedule | None = None
    official: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class DecodingPlan:
    """How a model decodes, with nothing left to choose; equal plans share forward passes.

    word: the sampler with its parameters, as records name it. steps: of a window; 0 for an autoregressive model. block_length: 0 for
    none. cache: as of DecodingOptions. draft: of speculative decoding, with the most draft tokens of a forward pass; adaptive: whether
    fewer are verified where that pays. exact: whether the distribution is that of one token a forward pass, or the text that of plain
    decoding.
    options: as given, with the choices of `auto` in them.
    """

    word: str
    draw: Draw
    steps: int
    context: int
    block_length: int = 0
    cache: bool | str = True
    greedy_tail: int = 0
    until_settled: int = 0
    early_stop: bool = False
    guidance: float = 1.0
    allow: str | None = None
    pattern: str | None = None
    answer: str | None = None
    schedule: str | None = None
    light: tuple[tuple[str, str], ...] | str | None = None
    draft: Draft | None = None
    adaptive: bool = False
    rule: Callable[..., Any] | None = None
    exact: bool = False
    options: DecodingOptions = field(default_factory=DecodingOptions, compare=False, repr=False)

    @property
    def left_to_right(self) -> bool:
        """Whether it is autoregressive decoding."""
        return self.draft is not None or self.word == registry.PLAIN

    def record(self) -> dict[str, object]:
        """The options that a saved run keeps: those that were set."""
        kept = ("steps", "temperature", "top_p", "top_k", "block_length", "schedule", "light")
        found = {name: getattr(self.options, name) for name in kept}
        return {name: value for name, value in found.items() if value and (name, value) != ("top_p", 1.0)}


def resolve(options: DecodingOptions, facts: Facts) -> DecodingPlan:
    """The plan that these options mean for a model. InputError for options that do not go with it or with one another."""
    if options.rule is not None:
        return _by_rule(options.rule, options, facts)
    if options.preset is not None:
        facts = preset(options, facts)
    options = choose(options, facts)
    if options.budget is not None:
        raise InputError("a budget is for --sampler auto")
    temperature = facts.default_temperature if options.temperature is None else options.temperature
    top_k = facts.default_top_k if options.top_k is None else options.top_k
    draw = Draw(temperature, top_k, facts.default_top_p if options.top_p is None else options.top_p)
    context = facts.context if options.context is None else options.context
    windows.check(facts.window, context)
    _check_schedule(options, facts)
    return (_left_to_right if facts.noise is None else _denoising)(options, facts, draw, context)


def _by_rule(rule: Callable[..., Any], options: DecodingOptions, facts: Facts) -> DecodingPlan:
    """The plan of the plain reverse process, which is there for every noise, with this rule in its place."""
    name = type(rule).__name__
    if facts.noise in (None, "gaussian") or (facts.noise == "replacement" and not rule.revises):  # type: ignore[attr-defined]
        needs = "a diffusion model" if facts.noise is None else "masked noise: it writes each token once"
        raise InputError(f"the rule {name} needs {needs}")
    if options.draft is not None or options.preset is not None or options.budget is not None or options.greedy_tail:
        raise InputError(f"the rule {name} is the sampler: leave draft, preset, budget and greedy_tail away")
    plan = resolve(replace(options, rule=None, sampler="ancestral"), facts)
    given = options.temperature is not None or options.top_p not in (None, 1) or bool(options.top_k)
    if given and not hasattr(rule, "draw"):
        raise InputError(f"the rule {name} has no draw: leave temperature, top_p and top_k away")
    own: Any = replace(cast(Any, rule), draw=plan.draw) if given else rule
    return replace(plan, word=name, draw=getattr(own, "draw", plan.draw), rule=own, exact=False, options=options)


def preset(options: DecodingOptions, facts: Facts) -> Facts:
    """The facts with the settings of a preset as defaults. InputError for an unknown one, a model without, and another sampler."""
    if options.preset != OFFICIAL:
        raise unknown("preset", str(options.preset), [OFFICIAL])
    if not facts.official:
        raise InputError(f"{facts.name} has no official preset: that is the reference sampler of another project's checkpoint")
    if options.sampler is not None or options.draft is not None:
        raise InputError("--preset official chooses the sampler: leave --sampler and --draft away")
    given = {f"default_{name}": value for name, value in facts.official.items()}
    plain = {"default_temperature": 1.0, "default_top_p": 1.0, "default_top_k": 0, "default_block_length": 0}
    return replace(facts, **(plain | given))


def choose(options: DecodingOptions, facts: Facts) -> DecodingOptions:
    """The same options with the choices of `lossless` and of both `auto` put in. InputError where there is nothing to choose from."""
    if options.draft is not None and options.sampler is not None:
        raise InputError(f"draft {options.draft.source} chooses the sampler: leave sampler {options.sampler!r} away")
    if options.schedule == registry.AUTO:
        if options.light is not None or facts.saved_schedule is None:
            raise InputError("--schedule auto has found the light models itself, beside a checkpoint on disk: leave --light away")
        saved = facts.saved_schedule
        options = replace(options, schedule=str(saved.schedule), light=saved.light, steps=options.steps or saved.steps)
    if options.sampler == registry.LOSSLESS:
        return replace(options, sampler=None, draft=_fastest_drafter(facts))
    return _calibrated(options, facts) if needs_calibration(options, facts) else options


def _fastest_drafter(facts: Facts) -> Draft:
    """The drafter that speeds decoding up most: the model's adapter, else its quantized copy, else n-grams of the text."""
    if facts.noise is not None:
        raise InputError(f"{facts.name} is a diffusion model: lossless decoding is for autoregressive ones")
    if facts.own_block:
        return Draft("block")
    if facts.adapter_tokens is not None:
        return Draft("adapter")
    if facts.heads is not None:
        return Draft("heads")
    return Draft("self", facts.draft_dtype) if facts.draft_dtype else Draft("ngram")


def needs_calibration(options: DecodingOptions, facts: Facts) -> bool:
    """Whether the plan depends on the calibration table. InputError for options that leave `auto` no choice."""
    if options.draft is not None or (options.sampler or facts.default_sampler) != registry.AUTO:
        return False
    if facts.noise != "masked":
        raise InputError(f"{facts.name} is no masked diffusion model: --sampler auto chooses among the samplers of those")
    if options.steps or options.block_length or options.cache is not True:
        raise InputError("--sampler auto chooses steps, blocks and cache itself: leave them away")
    return True


def _calibrated(options: DecodingOptions, facts: Facts) -> DecodingOptions:
    if facts.calibration is None:
        raise InputError(f"{facts.name} is not on disk: save it, then run dlm calibrate")
    plain = options.guidance == 1 and options.allow is None and options.pattern is None and options.answer is None

    def usable(found: Options) -> bool:
        return plain or registry.get(str(found.get("sampler")), "masked").rule

    found = facts.calibration.choose(options.budget or BUDGET, usable).options
    DecodingOptions.of(found)  # names and types of what a file says
    return replace(options, budget=None, **found)


def _check_schedule(options: DecodingOptions, facts: Facts) -> None:
    if options.schedule is None and options.light is None:
        return
    if not facts.fills_window:
        raise InputError(f"{facts.name} is a checkpoint of another project: a schedule of models is for those that dlm trains")
    if facts.noise is None or not facts.bidirectional or isinstance(options.cache, str):
        raise InputError("a schedule of models is for bidirectional diffusion models without a cache, which belongs to one model")
    if options.schedule is None or options.light is None:
        raise InputError("a schedule needs --schedule and --light, as in --schedule 'L0.5 H0.5' --light shakespeare-mask-2")


def _is_special(options: DecodingOptions) -> bool:
    """Whether the text is guided, constrained, or filled in blocks or against an approximate cache."""
    bound = options.allow is not None or options.pattern is not None
    return bool(options.block_length) or isinstance(options.cache, str) or options.guidance != 1 or bound


def _revises(options: DecodingOptions) -> bool:
    return bool(options.greedy_tail or options.until_settled)


def _left_to_right(options: DecodingOptions, facts: Facts, draw: Draw, context: int) -> DecodingPlan:
    word = options.sampler or facts.default_sampler
    draft = options.draft
    if draft is None:
        registry.get(word, None)
        draft = Draft.from_word(word)
    if _revises(options) or _is_special(options) or options.early_stop:
        named = f"the sampler {options.sampler!r}" if options.sampler else None
        named = named or "revising, guided or constrained text, an early stop, blocks or an approximate cache"
        raise InputError(f"{facts.name} is autoregressive: {named} needs a diffusion model")
    if facts.own_block and options.steps is not None:
        raise InputError(f"the sampler {word!r} writes from left to right: leave --steps away")
    plan = DecodingPlan(word, draw, 0, context, cache=bool(options.cache), exact=True, options=options)
    plan = replace(plan, answer=options.answer)
    if draft is None:
        return plan
    if options.answer is not None:
        raise InputError(f"a text of a given form is written token by token: leave the sampler {word!r} away")
    resolved = _with_numbers(draft, facts)
    word = replace(draft, model=resolved.model).word if options.draft is not None else word
    if not options.cache:
        raise InputError(f"the sampler {word!r} works against a cache: leave --cache none away")
    return replace(plan, word=word, draft=resolved, adaptive=draft.tokens is None and not draft.tree)


def _check_speculative(options: DecodingOptions) -> None:
    if _revises(options):
        raise InputError("speculative decoding writes each token once: leave greedy_tail and until_settled away")
    if isinstance(options.cache, str):
        raise InputError("speculative decoding verifies by the model's probabilities, which an approximate cache changes: leave it away")


def _with_numbers(draft: Draft, facts: Facts) -> Draft:
    """The draft with its dtype and the most draft tokens of a forward pass."""
    if draft.source == "heads" and facts.heads is None:
        raise InputError(f"{facts.name} has no heads to draft with: give --adapter DIRECTORY of dlm convert {facts.name} --heads 3")
    if draft.source == "block" and not facts.own_block:
        raise InputError(f"{facts.name} denoises no block: the drafter block is for Nemotron-Labs-Diffusion, which reads text either way")
    if draft.source == "self" and not draft.model:
        draft = replace(draft, model=facts.draft_dtype or "int8")
    if draft.tokens is not None:
        return replace(draft, tokens=min(draft.tokens, facts.own_block - 1)) if draft.source == "block" else draft
    taught = {"adapter": facts.adapter_tokens, "heads": facts.heads, "block": facts.own_block - 1}.get(draft.source)
    usual = AUTO_TOKENS.get(draft.source, USUAL_AUTO_TOKENS) if draft.source in SOURCES else USUAL_AUTO_TOKENS
    most = usual if taught is None else taught
    return replace(draft, tokens=min(most, draft.tree) if draft.tree else most)


def _denoising(options: DecodingOptions, facts: Facts, draw: Draw, context: int) -> DecodingPlan:
    if options.draft is not None:
        raise InputError(f"{facts.name} is a diffusion model: a draft is for autoregressive ones")
    word, masked = options.sampler or facts.default_sampler, facts.noise == "masked"
    info = registry.get(word, facts.noise)
    if not info.rule and masked:
        _check_speculative(options)
    if options.guidance != 1 and not (masked and (facts.bidirectional or not facts.fills_window)):
        raise InputError(f"{facts.name} never saw a text without its beginning: guidance needs a bidirectional masked model")
    if isinstance(options.cache, str) and (info.blockwise or not facts.bidirectional):
        named = f"the sampler {info.name}" if facts.bidirectional else facts.name
        raise InputError(f"{named} has an exact cache already: --cache is for bidirectional models")
    steps = facts.default_steps if options.steps is None else options.steps
    usual = facts.default_block_length if word == facts.default_sampler else 0
    block_length = usual if options.block_length is None else options.block_length
    if info.blockwise or not facts.bidirectional:
        own = facts.block_length or windows.longest_block(facts.window, CACHED_BLOCK)
        block_length = block_length or own
        context = context // block_length * block_length if block_length else context
    elif isinstance(options.cache, str):
        block_length = block_length or windows.longest_block(facts.window, CACHED_BLOCK)
    if options.early_stop and facts.fills_window:
        raise InputError(f"{facts.name} fills its windows: an early stop is for checkpoints of other projects, which read the text alone")
    light = options.light if options.light is None or isinstance(options.light, str) else tuple(options.light.items())
    return DecodingPlan(
        word,
        draw,
        steps,
        context,
        block_length,
        options.cache,
        options.greedy_tail,
        options.until_settled or int(info.settles),
        options.early_stop,
        options.guidance,
        options.allow,
        options.pattern,
        options.answer,
        options.schedule,
        light,
        exact=registry.is_exact(word, facts.noise, steps=steps, tokens=block_length or facts.window, cache=options.cache),
        options=options,
    )
