"""Networks, drafters and decoders that the tests of speculative decoding run, and the plain sampler that they are held to.

Shapes: B rows, L columns, K draft tokens, Q positions of one forward pass, V vocabulary, S = V^T sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.adapters import medusa
from dlm.adapters.chain import Chain
from dlm.inference import quantize
from dlm.models.cache import RaggedCache
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer
from dlm.sampling.autoregressive.draft_tree import Tree
from dlm.sampling.autoregressive.drafters import (
    DraftModel,
    MaskDrafter,
    MedusaDrafter,
    PromptLookup,
    SelfDraft,
)
from dlm.sampling.autoregressive.plain import AutoregressiveSampler
from dlm.sampling.autoregressive.speculative import SpeculativeDecoder
from dlm.sampling.draw import Draw, generators
from dlm.trajectory import Canvas, Frame
from oracle import Tiny

MASK, WINDOW, CONTEXT = 9, 12, 4
PROMPTS = [[1, 2, 3], [], [4] * 11, [5] * 12, [6, 7] * 9]
DRAWS = [Draw(), Draw(0.0), Draw(0.7, top_k=5, top_p=0.9)]


def network(seed: int = 0, **changes: Any) -> Transformer:
    sizes: dict[str, Any] = {"layers": 2, "heads": 4, "kv_heads": 2, "width": 32, "attention": "causal"}
    sizes |= {"vocab_size": MASK + 1, "window": WINDOW}
    made, rng = Transformer(TransformerConfig(**(sizes | changes))), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3, generator=rng)
    return made.eval().requires_grad_(False)


def guessing(made: Transformer, count: int = 3) -> MedusaDrafter:
    """Heads that say something of their own."""
    found = medusa.Heads(made, medusa.HeadsConfig(count)).requires_grad_(False)
    for parameter in found.parameters():
        parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
    return MedusaDrafter(found, count)


def chained(made: Transformer, slots: int = 4) -> Callable[[int, Tensor, Tensor], Tensor]:
    """A chain that says something of its own."""
    found = Chain(slots, made.config.width, 8, torch.Generator().manual_seed(3)).requires_grad_(False)
    found.down.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(4))
    return lambda slot, state_BD, before_BS: made.read_out(found(slot, state_BD, F.embedding(before_BS, made.embed.weight)))


BASE, SMALL, CONVOLVED = network(), network(1, layers=1, conv=2), network(conv=4)
DRAFTERS: dict[str, Any] = {
    "tree": MaskDrafter("tree"),
    "restart": MaskDrafter("restart"),
    "chain": MaskDrafter(chain=chained(BASE)),
    "chain, restart": MaskDrafter("restart", chained(BASE)),
    "lookup": PromptLookup(),
    "draft": DraftModel(SMALL, SMALL.ragged_cache, MASK),
    "heads": guessing(BASE),
    "itself": DraftModel(BASE, BASE.ragged_cache, MASK),  # nearly everything holds
    "rounded": SelfDraft(quantize.quantized_copy(BASE, 4), MASK),
}
BRANCHES = {"tree": 9, "chain": 14, "heads": 7}  # nodes of a tree of candidates
DRAFTERS |= {f"{name}, {nodes} nodes": (DRAFTERS[name], nodes) for name, nodes in BRANCHES.items()}


def canvas_of(rows: Sequence[Sequence[int]], new: int) -> Canvas:
    return Canvas.from_rows([[*row, *[None] * new] for row in rows], fill=MASK)


def decoder(drafter: Any, stride: int = 4, made: Any = BASE, **options: Any) -> SpeculativeDecoder:
    options = {"context": CONTEXT, "model": "ar", **options}
    if isinstance(drafter, tuple):
        drafter, nodes = drafter
        if stride > 1 and options.get("coupling") != "ratio" and "draft_length" not in options:  # which have no trees
            options["tree"] = Tree.likeliest(nodes, stride - 1, MASK)
    return SpeculativeDecoder(made, MASK, WINDOW, getattr(made, "ragged_cache", BASE.ragged_cache), drafter, stride, **options)


@lru_cache(maxsize=64)
def plain(prompt: tuple[int, ...], new: int, seed: int, draw: Draw, made: Transformer = BASE, **options: Any) -> Frame:
    sampler = AutoregressiveSampler(made, MASK, WINDOW, made.cache, draw, CONTEXT, **options)
    *_, frame = sampler.steps(canvas_of([prompt], new), rng=generators(seed, 1))
    return frame


def assert_plain(frame: Frame, prompts: Sequence[Sequence[int]], new: int, seed: int, draw: Draw, **options: Any) -> None:
    for row, prompt in enumerate(prompts):
        alone, length = plain(tuple(prompt), new, seed + row, draw, **options), len(prompt) + new
        assert torch.equal(frame.tokens_BT[row, :length], alone.tokens_BT[0]), (row, prompt)
        assert torch.equal(frame.settled_BT[row, :length], alone.settled_BT[0]), (row, prompt)


class Acceptance:
    """Knows the text by position and says so greedily; a mask is right with a given chance, each for itself."""

    def __init__(self, chance: float) -> None:
        self.chance, self.rng = chance, torch.Generator().manual_seed(0)

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, *, pos_BQ: Tensor | None = None, cache: Any = None, **_: object) -> Tensor:
        assert pos_BQ is not None
        cache.advance(z_BQ.shape[1])
        wrong_BQ = (z_BQ == MASK) & (pos_BQ > 0) & (torch.rand(z_BQ.shape, generator=self.rng) >= self.chance)
        return torch.nn.functional.one_hot((5 * pos_BQ + wrong_BQ) % MASK, MASK + 1).float() * 10

    def ragged_cache(self, rows: int, positions: int) -> RaggedCache:
        return RaggedCache(1, rows, 1, positions, 2, dtype=torch.float32, device=torch.device("cpu"))


TINY = Tiny(3, 4)
ROWS = 6000


@lru_cache(maxsize=4)
def tiny_network(seed: int) -> Transformer:
    return network(seed, vocab_size=TINY.vocab + 1, window=TINY.length, width=16, heads=2, kv_heads=1)


def tiny_law(draw: Draw) -> Tensor:
    """The probability of every sequence by the plain chain, enumerated."""
    start_S1 = torch.full_like(TINY.x_ST[:, :1], TINY.mask_id)
    logits_STV = tiny_network(0)(torch.cat([start_S1, TINY.x_ST[:, :-1]], 1))
    logits_STV[..., TINY.mask_id] = -torch.inf
    return draw.shape(logits_STV.log_softmax(-1)).gather(2, TINY.x_ST[..., None]).squeeze(-1).sum(-1).exp()


def tiny_samples(drafter: Any, draw: Draw, stride: int, coupling: str = "ratio") -> Tensor:
    made = tiny_network(0)
    sampler = SpeculativeDecoder(made, TINY.mask_id, TINY.length, made.ragged_cache, drafter, stride, coupling, draw=draw)
    *_, frame = sampler.steps(Canvas.from_rows([[None] * TINY.length] * ROWS, fill=TINY.mask_id), rng=generators(0, ROWS))
    return frame.tokens_BT


def with_spare_ids(made: Transformer, spare: int) -> Transformer:
    """The same network with ids that no token has, as checkpoints padded for speed have them, between the tokens and the mask."""
    config, tokens = made.config, made.config.vocab_size - 1
    wider = Transformer(replace(config, vocab_size=config.vocab_size + spare))
    state = dict(made.state_dict())
    for name in ("embed.weight", "head.weight"):
        if name in state:
            extra = torch.randn(spare, config.width, generator=torch.Generator().manual_seed(9))
            state[name] = torch.cat([state[name][:tokens], extra, state[name][tokens:]])
    wider.load_state_dict(state)
    return wider.eval().requires_grad_(False)
