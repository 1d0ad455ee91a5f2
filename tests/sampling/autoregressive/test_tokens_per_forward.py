"""How many tokens a forward pass commits, and how many draft tokens it is given.

Shapes: B rows, L columns, K draft tokens, Q positions of one forward pass, V vocabulary, S = V^T sequences.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from dlm.adapters import lora
from dlm.language_model import load
from dlm.sampling.autoregressive.draft_length import AdaptiveDraftLength, tokens_per_forward
from dlm.sampling.autoregressive.draft_tree import Tree
from dlm.sampling.autoregressive.drafters import (
    MaskDrafter,
)
from dlm.sampling.autoregressive.speculative import SpeculativeDecoder
from dlm.sampling.draw import Draw, generators
from sampling.autoregressive.decoders import (
    DRAFTERS,
    DRAWS,
    MASK,
    PROMPTS,
    Acceptance,
    assert_plain,
    canvas_of,
    decoder,
)


@pytest.mark.parametrize(("chance", "stride"), [(0.9, 4), (0.7, 3), (0.5, 5), (0.8, 2)])
@pytest.mark.parametrize("layout", ["restart", "tree"])
def test_tokens_per_forward_are_those_of_the_formula(layout: str, chance: float, stride: int) -> None:
    known, rows, length = Acceptance(chance), 40, 400
    sampler = SpeculativeDecoder(known, MASK, length, known.ragged_cache, MaskDrafter(layout), stride, draw=Draw(0.0))
    committed = calls = 0
    for _, tally in sampler.rounds(canvas_of([[]] * rows, length), rng=generators(0, rows)):
        committed, calls = committed + int(tally.committed_B.sum()), calls + int((tally.committed_B > 0).sum())
    assert committed == rows * length
    a, n = chance, stride
    formula = (2 + sum(a**k for k in range(1, n - 1))) / (2 - a ** (n - 1)) if layout == "restart" else (1 - a**n) / (1 - a)
    assert tokens_per_forward([a] * (n - 1), restart=layout == "restart") == pytest.approx(formula)
    assert committed / calls == pytest.approx(formula, rel=0.03)


def test_no_restart_is_worth_half_a_token() -> None:
    assert tokens_per_forward([0.9] * 3, restart=False) == pytest.approx(3.44, abs=0.005)
    assert tokens_per_forward([0.9] * 3) == pytest.approx(2.92, abs=0.005)
    assert tokens_per_forward([]) == tokens_per_forward([], restart=False) == 1


@pytest.mark.parametrize(("layout", "nodes", "most"), [("restart", 3, 7), ("tree", 3, 16), ("tree", 8, 36), ("tree", 16, 68)])
def test_positions_of_a_call(layout: str, nodes: int, most: int) -> None:
    known, tree = Acceptance(1.0), Tree.likeliest(nodes, 3)
    sampler = SpeculativeDecoder(known, MASK, 50, known.ragged_cache, MaskDrafter(layout), 4, tree=tree, draw=Draw(0.0))
    tallies = [tally for _, tally in sampler.rounds(canvas_of([[]], 50), rng=generators(0, 1))]
    assert [t.positions for t in tallies[:3]] == [4, most, most]
    assert [int(t.committed_B) for t in tallies] == [1, *[4] * 12, 1]


def test_the_layout_follows_the_cost() -> None:
    def chosen(fixed: float, each: float, chance: float) -> str:
        return MaskDrafter.cheapest(lambda sizes: [fixed + each * positions for positions in sizes], 4, chance).layout

    assert chosen(1.0, 0.0, 0.8) == "tree"
    assert chosen(0.0, 1.0, 0.8) == "restart"
    # where little is refused a tree gains less than a tenth, which it costs
    assert chosen(40.0, 0.5, 0.4) == "tree"
    assert chosen(40.0, 0.5, 0.99) == "restart"


def test_an_unsure_network_proposes_less() -> None:
    """c^k >= floor: the more is asked for, the fewer are proposed, and the text stays."""
    proposed = []
    for floor in (0.0, 0.05, 0.15, 1.0):
        rounds = list(decoder(DRAFTERS["itself"], floor=floor).rounds(canvas_of([[1, 2], [3]], 30), rng=generators(7, 2)))
        assert_plain(rounds[-1][0], [[1, 2], [3]], 30, 7, Draw())
        proposed.append(sum(int(tally.drafted_B.sum()) for _, tally in rounds) / len(rounds))
    assert proposed == sorted(proposed, reverse=True)
    assert proposed[0] > proposed[2] > proposed[3] == 0


class Wandering(AdaptiveDraftLength):
    """Another stride for every call."""

    def choose(self, rows: int) -> int:
        self._since += 1
        return self.strides[self._since * 7 % 11 % len(self.strides)]


@pytest.mark.parametrize("draw", DRAWS, ids=str)
@pytest.mark.parametrize("name", DRAFTERS)
def test_the_stride_may_change_with_every_call(name: str, draw: Draw) -> None:
    pace = Wandering(5)
    frames = list(decoder(DRAFTERS[name], 5, draw=draw, draft_length=pace).steps(canvas_of(PROMPTS, 25), rng=generators(3, len(PROMPTS))))
    assert_plain(frames[-1], PROMPTS, 25, 3, draw)
    assert pace._since == len(frames)
    assert pace._seconds


def test_the_greatest_stride_is_the_adapters(autoregressive_dir: Path) -> None:
    model = load(str(autoregressive_dir))
    assert cast(SpeculativeDecoder, model.sampler(sampler="strided:auto")).stride == 4
    assert cast(SpeculativeDecoder, model.sampler(sampler="lookup:auto")).stride == 8
    lora.attach(model.network, lora.AdapterConfig(2, 4.0, stride=3), model.tokenizer.mask_id)
    one, two = (cast(SpeculativeDecoder, model.sampler(sampler="strided:auto")) for _ in range(2))
    assert one.stride == 3
    assert one.draft_length is two.draft_length
