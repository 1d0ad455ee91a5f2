"""From a plan to its sampler. Building changes nothing of the network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.adapters import lora
from dlm.adapters.chain import Chain
from dlm.errors import InputError, nearest
from dlm.language_model.protocols import Model
from dlm.language_model.resolution import DecodingPlan
from dlm.model_scheduling import routing
from dlm.models.canvas import CanvasNetwork, ReadText
from dlm.models.causal_text import AfterText
from dlm.models.pattern import reading
from dlm.models.shifted import Shifted
from dlm.models.step_number import StepNumber
from dlm.models.transformer import Transformer
from dlm.noise.gaussian import GaussianNoise
from dlm.noise.masked import MaskedNoise
from dlm.protocols import Denoiser, Sampler
from dlm.sampling import registry
from dlm.sampling.autoregressive.draft import Draft, DraftFacts, factory, sources
from dlm.sampling.autoregressive.draft_length import AdaptiveDraftLength
from dlm.sampling.autoregressive.draft_tree import Tree
from dlm.sampling.autoregressive.drafters import (
    BlockDrafter,
    DraftModel,
    FittedVocabulary,
    MaskDrafter,
    MedusaDrafter,
    PromptLookup,
    SelfDraft,
)
from dlm.sampling.autoregressive.plain import AutoregressiveSampler
from dlm.sampling.autoregressive.protocols import Drafter
from dlm.sampling.autoregressive.speculative import SpeculativeDecoder
from dlm.sampling.diffusion import cache_policies
from dlm.sampling.diffusion.any_order_speculative import AnyOrderSpeculativeSampler
from dlm.sampling.diffusion.automaton import Automaton
from dlm.sampling.diffusion.canvases import CanvasSampler
from dlm.sampling.diffusion.constraints import AllowedTokens, Pattern, both
from dlm.sampling.diffusion.guidance import ClassifierFree
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.diffusion.protocols import CachePolicy, Constraint, Rule
from dlm.sampling.diffusion.revising import EntropyBound, StableBound
from dlm.sampling.diffusion.vectors import VectorSampler
from dlm.text.tokenizer import Tokenizer

MANY_TOKENS, FAST_GROWTH, GROWTH = 23, 5, 2  # adaptive drafts of so many tokens are tried at lengths that grow by the first factor


def build(plan: DecodingPlan, model: Model) -> Sampler:
    """InputError for a rule, a cache, a constraint or a draft model that cannot be used."""
    if not model.is_diffusion:
        return _plain(plan, model) if plan.draft is None else _speculative(plan, plan.draft, model)
    if isinstance(model.network, CanvasNetwork):
        return _canvases(plan, model, model.network)
    if isinstance(model.noise, GaussianNoise):
        return _vectors(plan, model, model.noise)
    denoiser = _denoiser(plan, model)
    info = registry.get("ancestral" if plan.rule is not None else plan.word, registry.kind(model.noise))
    if not info.rule and isinstance(model.noise, MaskedNoise):
        return _any_order(plan, model, denoiser, info.parse(plan.word))
    blockwise = info.blockwise and not model.is_causal
    if blockwise and model.config.shift:
        raise InputError(f"{info.name} needs a model that predicts each token itself: {model.name} cannot be read so")
    if blockwise or model.is_causal:
        denoiser = by_blocks(model, plan.block_length)
    if info.counts_steps and model.config.network.time_steps:
        denoiser = StepNumber(denoiser, plan.steps)
    return DiffusionSampler(
        denoiser,
        model.noise,
        model.window,
        registry.make(plan.word, plan.draw, model.noise, plan.greedy_tail) if plan.rule is None else cast(Rule, plan.rule),
        plan.steps,
        plan.context,
        model.name,
        plan.until_settled,
        plan.block_length,
        _policy(plan, model, by_blocks=blockwise or model.is_causal),
        model.network.window_cache,
        _guidance(plan, model),
        _constraint(plan, model),
        sees_ahead=not (model.is_causal or blockwise),
        fills_window=model.config.fills_window,
        block_phase=model.config.block_phase,
        stops=model.stops if blockwise or not model.config.fills_window else frozenset(),
        ends="cut" if plan.early_stop else "text",
    )


def _vectors(plan: DecodingPlan, model: Model, noise: GaussianNoise) -> VectorSampler:
    """InputError for options of samplers that write tokens one by one."""
    of_tokens = {
        "a rule": plan.rule,
        "blocks": plan.block_length,
        "a cache": isinstance(plan.cache, str),
        "guidance": plan.guidance != 1,
        "a constraint": plan.allow or plan.pattern or plan.answer,
        "a greedy tail": plan.greedy_tail,
        "until_settled": plan.until_settled,
        "a schedule of models": plan.schedule,
    }
    for name, asked in of_tokens.items():
        if asked:
            raise InputError(f"{model.name} has noise on vectors, and no token before the last step: leave {name} away")
    settings = {"window": model.window, "budget": plan.steps, "context": plan.context, "model": model.name, "draw": plan.draw}
    info = registry.get(plan.word, registry.kind(noise))
    info.parse(plan.word)
    made: VectorSampler = info.resolved()(predict=noise.reading(model.denoiser), noise=noise, **settings)
    return made


def _any_order(plan: DecodingPlan, model: Model, denoiser: Denoiser, settings: dict[str, Any]) -> AnyOrderSpeculativeSampler:
    assert isinstance(model.noise, MaskedNoise)
    return AnyOrderSpeculativeSampler(
        by_blocks(model, plan.block_length) if model.is_causal else denoiser,
        model.noise,
        model.window,
        **settings,
        draw=plan.draw,
        context=plan.context,
        model=model.name,
        block_length=plan.block_length,
        guidance=_guidance(plan, model),
        constraint=_constraint(plan, model),
        sees_ahead=not model.is_causal,
        fills_window=model.config.fills_window,
        block_phase=model.config.block_phase,
        stops=frozenset() if model.config.fills_window else model.stops,
        ends="cut" if plan.early_stop else "text",
    )


def _guidance(plan: DecodingPlan, model: Model) -> ClassifierFree | None:
    return ClassifierFree(plan.guidance, model.tokenizer.mask_id) if plan.guidance != 1 else None


def by_blocks(model: Model, length: int) -> Denoiser:
    """The network as it reads blocks of so many tokens, none of which sees what follows it. InputError where they do not fit."""
    if model.config.network.attention == "causal_text":
        return AfterText(reading(model.network, "causal_text", length))
    view = reading(model.network, "block_causal", length)
    return Shifted(view) if model.config.shift else view


def _policy(plan: DecodingPlan, model: Model, *, by_blocks: bool) -> CachePolicy | None:
    """by_blocks: whether no position reads a later block."""
    if isinstance(plan.cache, str):
        policy = cache_policies.make(plan.cache)
    elif plan.cache and by_blocks:
        causal_text = model.config.network.attention == "causal_text"
        policy = (cache_policies.CausalText if causal_text else cache_policies.Exact)(plan.block_length)
    else:
        return None
    return cache_policies.BeforeToo(policy) if model.config.shift else policy


def _canvases(plan: DecodingPlan, model: Model, network: CanvasNetwork) -> CanvasSampler:
    """InputError for guidance, constraints and caches."""
    if plan.guidance != 1 or plan.allow is not None or plan.pattern is not None or plan.answer is not None or isinstance(plan.cache, str):
        raise InputError(f"{model.name} is denoised canvas by canvas: leave guidance, constraints and caches away")
    rule = registry.make(plan.word, plan.draw, model.noise, plan.greedy_tail)
    if isinstance(rule, EntropyBound):
        rule = StableBound(rule.bound, model.defaults["stable"], model.defaults["confidence"], plan.draw)
    return CanvasSampler(partial(ReadText, network), model.noise, network.length, rule, plan.steps, model.name, model.stops)


def _plain(plan: DecodingPlan, model: Model) -> AutoregressiveSampler:
    cache, start = model.network.cache if plan.cache else None, model.config.start_token_id
    mask_id = model.tokenizer.mask_id
    form = None if plan.answer is None else _form(plan.answer, model)
    return AutoregressiveSampler(model.network, mask_id, model.window, cache, plan.draw, plan.context, model.name, start, model.stops, form)


def _form(answer: str, model: Model) -> Automaton:
    return Automaton.written(answer, model.tokenizer.spelling, model.config.network.vocab_size)


def _speculative(plan: DecodingPlan, draft: Draft, model: Model) -> SpeculativeDecoder:
    network, tokens = model.network, draft.tokens or 0
    learned = None
    if plan.adaptive:
        key = (draft, lora.adapter_of(network) is not None)
        growth = FAST_GROWTH if tokens >= MANY_TOKENS else GROWTH
        learned = model.draft_lengths.setdefault(key, AdaptiveDraftLength(tokens + 1, growth))
    return SpeculativeDecoder(
        network,
        model.tokenizer.mask_id,
        model.window,
        network.ragged_cache,
        _drafter(draft, tokens, model),
        tokens + 1,
        floor=draft.floor,
        tree=Tree.likeliest(draft.tree, tokens, model.tokenizer.vocab_size) if draft.tree else None,
        draft_length=learned,
        draw=plan.draw,
        context=plan.context,
        model=model.name,
        start=model.config.start_token_id,
        stop=model.stops,
    )


def _drafter(draft: Draft, tokens: int, model: Model) -> Drafter:
    network, start = model.network, model.config.start_token_id
    match draft.source:
        case "ngram":
            return PromptLookup()
        case "adapter":
            return _mask_drafter(draft, tokens, model)
        case "heads":
            assert model.heads is not None
            return MedusaDrafter(model.heads, model.heads.config.count)
        case "self":
            return SelfDraft(model.quantized(draft.model), start)
        case "block":
            return BlockDrafter(network, model.tokenizer.mask_id, start)
        case "model":
            return _draft_model(draft.model, model)
    return factory(draft.source)(DraftFacts(network, model.config.network.vocab_size, model.tokenizer.mask_id, start, tokens))


def _mask_drafter(draft: Draft, tokens: int, model: Model) -> MaskDrafter:
    adapter = lora.adapter_of(model.network)
    chain = None if adapter is None or adapter.chain is None else partial(_chained, model.network, adapter.chain)
    if draft.tree:
        return MaskDrafter(chain=chain)
    seconds = partial(_seconds, model.network, model.pass_seconds)
    return MaskDrafter.cheapest(seconds, tokens + 1, _acceptance(model.network), chain=chain)


def _draft_model(name: str, model: Model) -> DraftModel:
    """InputError for a model of another vocabulary, or one that cannot continue a text alike."""
    try:
        other = model.other(name)
    except InputError:
        if Path(name).exists() or not (close := nearest(name, sources())):
            raise
        raise InputError(f"no drafter and no draft model {name!r}{close}") from None
    if other.is_diffusion or (other.config.start_token_id is None) != (model.config.start_token_id is None):
        raise InputError(f"{name} cannot draft for {model.name}: it must be autoregressive and begin its texts alike")
    if other.tokenizer.fingerprint() != model.tokenizer.fingerprint():
        raise InputError(f"{name} has another vocabulary than {model.name}: it cannot draft for it")
    own, wanted = other.config.network.vocab_size, model.config.network.vocab_size  # some have more ids than tokens
    network: Denoiser = other.network if own == wanted else FittedVocabulary(other.network, own, wanted)
    return DraftModel(network, other.network.ragged_cache, other.config.start_token_id)


def _chained(network: Transformer, chain: Chain, slot: int, state_BD: Tensor, before_BS: Tensor) -> Tensor:
    """Logits of masks of this slot, given the tokens of the places up to theirs."""
    return network.read_out(chain(slot, state_BD, F.embedding(before_BS, network.embed.weight)), draft=True)


def _acceptance(network: Transformer) -> float:
    """The share of draft tokens that are accepted: the adapter's on texts held back, or that of a good one."""
    adapter = lora.adapter_of(network)
    found = adapter.config.made.get("accept") if adapter is not None else None
    return sum(found) / len(found) if found else 0.8


@torch.no_grad()
def _seconds(
    network: Transformer, known: dict[tuple[int, bool], float], sizes: Sequence[int], held: int = 128, passes: int = 5
) -> list[float]:
    """Seconds of forward passes of so many positions after a text of `held`, the best of some in turns; it decides about speed alone."""
    keys = [(positions, lora.adapter_of(network) is not None) for positions in sizes]
    taken: dict[tuple[int, bool], list[float]] = {key: [] for key in keys if key not in known}
    for _ in range(passes + 1):
        for key, found in taken.items():
            z_BQ = torch.zeros(1, key[0], dtype=torch.long, device=network.device)
            own_BQQ = torch.ones(1, key[0], key[0], dtype=torch.bool, device=network.device).tril()
            cache = network.ragged_cache(1, held + key[0])
            cache.advance(held)
            begin = time.perf_counter()
            network(z_BQ, pos_BQ=z_BQ, own_BQQ=own_BQQ, cache=cache)[0, -1, 0].item()  # waits for a GPU
            found.append(time.perf_counter() - begin)
    known |= {key: min(found[1:]) for key, found in taken.items()}
    return [known[key] for key in keys]


def _denoiser(plan: DecodingPlan, model: Model) -> Denoiser:
    if plan.schedule is None or plan.light is None:
        return model.denoiser
    light = plan.light if isinstance(plan.light, str) else dict(plan.light)
    return routing.make(plan.schedule, model.denoisers(light), plan.steps)


def _constraint(plan: DecodingPlan, model: Model) -> Constraint | None:
    if plan.allow is None and plan.pattern is None and plan.answer is None:
        return None
    tokenizer, size = model.tokenizer, model.config.network.vocab_size
    parts: list[AllowedTokens | Pattern] = []
    if plan.allow is not None:
        if _in_parts(plan.allow, tokenizer):
            parts.append(Pattern.of_set(plan.allow, tokenizer.spelling, size))
        else:
            ids = [i for i, piece in tokenizer.pieces().items() if piece and set(piece) <= set(plan.allow)]
            parts.append(AllowedTokens(ids, size, tokenizer.mask_id))
    if plan.pattern is not None:
        parts.append(_without_ends(Pattern.compile(plan.pattern, tokenizer.spelling, size), model))
    if plan.answer is not None:
        parts.append(_without_ends(Pattern(_form(f"(?:{plan.answer})[ \n]*", model)), model))
    return both(*parts)


def _without_ends(pattern: Pattern, model: Model) -> Pattern:
    """A text that ended before its pattern does would not match."""
    ends = model.stops | frozenset(model.tokenizer.control.values())
    return pattern.restricted([i for i in range(model.config.network.vocab_size) if i not in ends]) if ends else pattern


def _in_parts(characters: str, tokenizer: Tokenizer) -> bool:
    """Whether several tokens may spell one of these characters together."""
    return not characters.isascii() and not all(map(tokenizer.spelling.is_whole, range(tokenizer.vocab_size)))
