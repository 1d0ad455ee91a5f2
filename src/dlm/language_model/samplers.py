"""From options to the sampler that they mean for a model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.adapters import lora
from dlm.adapters.chain import Chain
from dlm.errors import InputError
from dlm.model_scheduling import routing
from dlm.models.transformer import Transformer
from dlm.noise.masked import MaskedNoise
from dlm.protocols import Denoiser, Sampler
from dlm.sampling import registry, windows
from dlm.sampling.autoregressive.draft import SOURCES, Draft, DraftFacts, factory
from dlm.sampling.autoregressive.draft_length import AdaptiveDraftLength
from dlm.sampling.autoregressive.draft_tree import Tree
from dlm.sampling.autoregressive.drafters import DraftModel, FittedVocabulary, MaskDrafter, MedusaDrafter, PromptLookup, SelfDraft
from dlm.sampling.autoregressive.plain import AutoregressiveSampler
from dlm.sampling.autoregressive.protocols import Drafter
from dlm.sampling.autoregressive.speculative import SpeculativeDecoder
from dlm.sampling.diffusion import cache_policies
from dlm.sampling.diffusion.any_order_speculative import AnyOrderSpeculativeSampler
from dlm.sampling.diffusion.constraints import AllowedTokens, Pattern, both
from dlm.sampling.diffusion.guidance import ClassifierFree
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.diffusion.protocols import CachePolicy, Constraint
from dlm.sampling.draw import Draw

if TYPE_CHECKING:
    from dlm.language_model.model import LanguageModel

STRIDE, LOOKUP, ITSELF = 4, 8, 24  # of `auto` at most; what follows a repeated phrase is often the same for long, and a copy nearly agrees
BLOCK = 32  # of a bidirectional model with a cache, unless told otherwise (Fast-dLLM)


def make(
    model: LanguageModel,
    *,
    steps: int | None = None,
    sampler: str | None = None,
    temperature: float | None = None,
    top_p: float = 1.0,
    top_k: int = 0,
    greedy_tail: int = 0,
    until_settled: int = 0,
    block_length: int | None = None,
    cache: bool | str = True,
    guidance: float = 1.0,
    allow: str | None = None,
    pattern: str | None = None,
    budget: str | None = None,
    schedule: str | None = None,
    light: str | Mapping[str, str] | None = None,
    context: int | None = None,
    draft: Draft | None = None,
) -> Sampler:
    """Options as of `LanguageModel.sampler`. InputError for those that do not go with the model or with one another."""
    if budget is not None:
        raise InputError("a budget is for --sampler auto")
    if not model.config.fills_window:
        raise InputError(f"{model.name} is read for its logits and bounds only: dlm has no sampler for its family yet")
    draw = Draw(model.defaults.get("temperature", 1.0) if temperature is None else temperature, top_k, top_p)
    word = draft.word if draft is not None else sampler or model.default_sampler
    special = block_length or isinstance(cache, str) or guidance != 1 or allow is not None or pattern is not None
    if (schedule is not None or light is not None) and (not model.is_diffusion or model.is_causal or isinstance(cache, str)):
        raise InputError("a schedule of models is for bidirectional diffusion models without a cache, which belongs to one model")
    steps = model.defaults.get("steps", model.window) if steps is None else steps
    context = model.context if context is None else context
    windows.check(model.window, context)
    if draft is None:
        info = registry.get(word, model.kind)
    if not model.is_diffusion:
        if greedy_tail or until_settled or special:
            what = f"the sampler {sampler!r}" if sampler else "revising, guided or constrained text, blocks or an approximate cache"
            raise InputError(f"{model.name} is autoregressive: {what} needs a diffusion model")
        return _autoregressive(model, word, draft or Draft.from_word(word), draw, bool(cache), context)
    if draft is not None:
        raise InputError(f"{model.name} is a diffusion model: a draft is for autoregressive ones")
    denoiser = _denoiser(model, schedule, light, steps)
    if not info.rule:
        if greedy_tail or until_settled or special or model.is_causal or not isinstance(model.noise, MaskedNoise):
            raise InputError("speculative decoding is for bidirectional masked models, with no blocks, cache, guidance or constraint")
        values = info.parse(word)
        return AnyOrderSpeculativeSampler(denoiser, model.noise, model.window, **values, draw=draw, context=context, model=model.name)
    if guidance != 1 and (model.is_causal or not isinstance(model.noise, MaskedNoise)):
        raise InputError(f"{model.name} never saw a text without its beginning: guidance needs a bidirectional masked model")
    if model.is_causal and isinstance(cache, str):
        raise InputError(f"{model.name} has an exact cache already: --cache is for bidirectional models")
    policy: CachePolicy | None = cache_policies.make(cache) if isinstance(cache, str) else None
    if model.is_causal:
        block_length = block_length or model.config.network.block_length
        policy = cache_policies.Exact(block_length) if cache else None
    elif policy is not None:
        block_length = block_length or windows.longest_block(model.window, BLOCK)
    return DiffusionSampler(
        partial(model.network, block_length=block_length) if model.is_causal else denoiser,
        model.noise,
        model.window,
        registry.make(word, draw, model.noise, greedy_tail),
        steps,
        context // block_length * block_length if model.is_causal and block_length else context,
        model.name,
        until_settled or int(info.settles),
        block_length or 0,
        policy,
        model.network.window_cache,
        ClassifierFree(guidance, model.tokenizer.mask_id) if guidance != 1 else None,
        _constraint(model, allow, pattern),
        sees_ahead=not model.is_causal,
    )


def _autoregressive(model: LanguageModel, word: str, draft: Draft | None, draw: Draw, cache: bool, context: int) -> Sampler:
    network, mask_id, start = model.network, model.tokenizer.mask_id, model.config.start_token_id
    if draft is None:
        make = network.cache if cache else None
        return AutoregressiveSampler(network, mask_id, model.window, make, draw, context, model.name, start, model.stops)
    if not cache:
        raise InputError(f"the sampler {word!r} works against a cache: leave --cache none away")
    most, pace, tree = _most(model, draft) if draft.tokens is None else draft.tokens + 1, None, None
    if draft.tokens is None and not draft.tree:
        grows = 5 if most == ITSELF else 2
        pace = model.paces.setdefault((word, lora.adapter_of(network) is not None), AdaptiveDraftLength(most, grows))
    if draft.tree:
        tree = Tree.likeliest(draft.tree, most - 1, model.tokenizer.vocab_size)
    drafter: Drafter = PromptLookup()
    if draft.source == "adapter":
        adapter = lora.adapter_of(network)
        chain = None if adapter is None or adapter.chain is None else partial(_chained, network, adapter.chain)
        seconds = partial(_seconds, network, model.seconds)
        drafter = MaskDrafter.cheapest(seconds, most, _acceptance(network), chain=chain) if tree is None else MaskDrafter(chain=chain)
    elif draft.source == "heads":
        if model.heads is None:
            raise InputError(f"{model.name} has no heads to guess with: give --adapter DIRECTORY of dlm convert {model.name} --heads 3")
        drafter = MedusaDrafter(model.heads, model.heads.config.count)
    elif draft.source not in SOURCES:
        facts = DraftFacts(network, model.config.network.vocab_size, mask_id, start, most - 1)
        drafter = factory(draft.source)(facts)
    elif draft.source == "self":
        copy = model.draft_network(draft)
        assert copy is not None
        drafter = SelfDraft(copy, start)
    elif draft.source == "model":
        other = model.other(draft.model)
        if other.is_diffusion or (other.config.start_token_id is None) != (start is None):
            raise InputError(f"{draft.model} cannot draft for {model.name}: it must be autoregressive and begin its texts alike")
        if other.tokenizer.fingerprint() != model.tokenizer.fingerprint():
            raise InputError(f"{draft.model} has another vocabulary than {model.name}: it cannot draft for it")
        own, wanted = other.config.network.vocab_size, model.config.network.vocab_size  # some have more ids than tokens
        fitted: Denoiser = other.network if own == wanted else FittedVocabulary(other.network, own, wanted)
        drafter = DraftModel(fitted, other.network.ragged_cache, other.config.start_token_id)
    return SpeculativeDecoder(
        network,
        mask_id,
        model.window,
        network.ragged_cache,
        drafter,
        most,
        floor=draft.floor,
        tree=tree,
        draft_length=pace,
        draw=draw,
        context=context,
        model=model.name,
        start=start,
        stop=model.stops,
    )


def _chained(network: Transformer, chain: Chain, slot: int, state_BD: Tensor, before_BS: Tensor) -> Tensor:
    """Logits of masks of this slot, given the tokens of the places up to theirs."""
    return network.read_out(chain(slot, state_BD, F.embedding(before_BS, network.embed.weight)), draft=True)


def _acceptance(network: Transformer) -> float:
    """Of a proposal: what the adapter had on texts held back, or that of a good one."""
    adapter = lora.adapter_of(network)
    found = adapter.config.made.get("accept") if adapter is not None else None
    return sum(found) / len(found) if found else 0.8


def _most(model: LanguageModel, draft: Draft) -> int:
    """The most tokens that a forward pass may commit, where nothing else is asked for."""
    adapter = lora.adapter_of(model.network)
    if draft.source == "adapter" and adapter is not None:
        return adapter.config.stride
    if draft.source == "heads" and model.heads is not None:
        return int(model.heads.config.count) + 1
    if draft.source == "self":
        return ITSELF
    return LOOKUP if draft.source == "ngram" else STRIDE


@torch.no_grad()
def _seconds(
    network: Transformer, known: dict[tuple[int, bool], float], sizes: Sequence[int], held: int = 128, calls: int = 5
) -> list[float]:
    """What calls of so many positions take after a text of `held`, at best and in turns; decides about speed alone, never about text."""
    keys = [(positions, lora.adapter_of(network) is not None) for positions in sizes]
    taken: dict[tuple[int, bool], list[float]] = {key: [] for key in keys if key not in known}
    for _ in range(calls + 1):
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


def _denoiser(model: LanguageModel, schedule: str | None, light: str | Mapping[str, str] | None, steps: int) -> Denoiser:
    if schedule is None and light is None:
        return model.network
    if schedule is None or light is None:
        raise InputError("a schedule needs --schedule and --light, as in --schedule 'L0.5 H0.5' --light shakespeare-mask-2")
    return routing.make(schedule, model.denoisers(light), steps)


def _constraint(model: LanguageModel, allow: str | None, pattern: str | None) -> Constraint | None:
    if allow is None and pattern is None:
        return None
    pieces, size = model.tokenizer.pieces(), model.config.network.vocab_size
    parts: list[AllowedTokens | Pattern] = []
    if allow is not None:
        known = set(allow)
        parts.append(AllowedTokens([i for i, piece in pieces.items() if piece and set(piece) <= known], size, model.tokenizer.mask_id))
    if pattern is not None:
        parts.append(Pattern.compile(pattern, pieces, size))
    return both(*parts)
