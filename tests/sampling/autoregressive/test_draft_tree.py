"""Trees of candidates: their shape, what grows on them, and how many tokens they are worth.

Shapes: B rows, K nodes, P places, V vocabulary.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.sampling.autoregressive.draft_tokens import DraftTokens
from dlm.sampling.autoregressive.draft_tree import Tree
from dlm.sampling.autoregressive.drafters import MaskDrafter
from dlm.sampling.autoregressive.speculative import SpeculativeDecoder
from dlm.sampling.autoregressive.verification import accept_equal
from dlm.sampling.draw import Draw, generators, race, scores
from sampling.autoregressive.decoders import MASK, Acceptance, canvas_of


def paths_of(tree: Tree) -> list[tuple[int, ...]]:
    """The ranks on the way to every node."""
    found: list[tuple[int, ...]] = []
    for parent, rank in zip(tree.parent, tree.rank, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), rank))
    return found


@pytest.mark.parametrize(("nodes", "depth"), [(0, 0), (3, 3), (5, 1), (4, 3), (8, 3), (16, 3), (33, 7)])
def test_shapes(nodes: int, depth: int) -> None:
    tree = Tree.likeliest(nodes, depth)
    paths, tables = paths_of(tree), tree.tables(torch.device("cpu"))
    assert len(tree) == len(set(paths)) == nodes
    assert max(tree.depth) == depth
    assert tree.depth == (0, *map(len, paths)) == tuple(sorted(tree.depth))
    assert [paths[k] for k in tree.firsts] == [(0,) * (d + 1) for d in range(depth)]
    for path in paths:  # an earlier choice, and what it follows, are there too
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in paths
        assert len(path) == 1 or path[:-1] in paths
    for place, path in enumerate([(), *paths]):
        way = [paths.index(path[: d + 1]) for d in range(len(path))]
        assert tables.path_PD[place, : len(path)].tolist() == way == tables.reads_PK[place].nonzero().flatten().tolist()
    assert tables.count_D.tolist() == [sum(len(path) <= d for path in paths) for d in range(depth + 1)]
    assert tree.is_chain == (nodes == depth)
    assert nodes > depth or tree == Tree.chain(depth)


def test_a_tree_has_the_likeliest_nodes() -> None:
    assert paths_of(Tree.likeliest(8, 3)) == [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1)]
    with pytest.raises(InputError, match="depth 3 has 3 nodes at least"):
        Tree.likeliest(2, 3)
    assert paths_of(Tree.likeliest(9, 2, 2)) == [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]  # there are no more


@pytest.mark.parametrize("count_B", [[12, 12, 12, 12], [12, 5, 1, 0]])
def test_the_longest_path_that_holds_is_taken(count_B: list[int]) -> None:
    """Against a walk from the committed text, node by node."""
    tree, counts, rng = Tree.likeliest(12, 3), torch.tensor(count_B), torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(60):
        logp_BPV = (torch.randn(4, 13, 5, generator=rng) * 2).log_softmax(-1)
        token_BK = torch.zeros(4, 12, dtype=torch.long)
        for parent in {*tree.parent}:  # siblings differ
            of = [k for k in range(12) if tree.parent[k] == parent]
            token_BK[:, of] = torch.rand(4, 5, generator=rng).argsort(-1)[:, : len(of)]
        u_BD = torch.rand(4, 4, generator=rng, dtype=torch.float64)
        token_BP = race(logp_BPV, u_BD[:, tree.tables(u_BD.device).depth_P])
        place_B, next_B = accept_equal(token_BP, DraftTokens(token_BK, counts), tree)
        for b in range(4):
            place = 0
            while True:
                wanted = int(race(logp_BPV[b : b + 1, place, None], u_BD[b : b + 1, tree.depth[place], None]))
                after = [k for k in range(count_B[b]) if tree.parent[k] == place - 1 and int(token_BK[b, k]) == wanted]
                if not after:
                    break
                place = after[0] + 1
            assert (int(place_B[b]), int(next_B[b])) == (place, wanted)
            seen.add(place)
    assert len(seen) > 6


def test_scores_are_the_order_of_the_race() -> None:
    """The first is the race's; the second is its, once the first is out; and as often as the law says."""
    logp_BTV = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 1, -1)
    u_BT = torch.rand(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order_BC = scores(logp_BTV, u_BT).topk(3, -1).indices[:, 0]
    assert torch.equal(order_BC[:, 0], race(logp_BTV, u_BT)[:, 0])
    rest_BTV = logp_BTV.clone().scatter(-1, order_BC[:, None, :1], -torch.inf)
    assert torch.equal(order_BC[:, 1], race(rest_BTV.log_softmax(-1), u_BT)[:, 0])
    for first, second in product(range(3), repeat=2):
        p = torch.tensor([0.5, 0.3, 0.2])
        wanted = 0.0 if first == second else float(p[first] * p[second] / (1 - p[first]))
        found = float(((order_BC[:, 0] == first) & (order_BC[:, 1] == second)).double().mean())
        assert found == pytest.approx(wanted, abs=0.012)


class Ranked(Acceptance):
    """Knows the text by position; a mask has it as its first, second or third choice with these chances, each for itself."""

    def __init__(self, *chances: float) -> None:
        super().__init__(1.0)
        self.law_R = torch.tensor([*chances, 1 - sum(chances)])

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, *, pos_BQ: Tensor | None = None, cache: Any = None, **_: object) -> Tensor:
        assert pos_BQ is not None
        cache.advance(z_BQ.shape[1])
        rank_BQ = torch.multinomial(self.law_R, z_BQ.numel(), True, generator=self.rng).view_as(z_BQ)
        rank_BQ = rank_BQ * ((z_BQ == MASK) & (pos_BQ > 0))
        order_V = torch.arange(MASK).flip(0).float()  # the choices: other tokens in front of the right one, `rank` of them
        score_BQV = torch.zeros(*z_BQ.shape, MASK + 1)
        for place in range(MASK):
            shifted = (5 * pos_BQ + place - rank_BQ) % MASK
            score_BQV.scatter_(2, shifted[..., None], order_V[place].expand_as(shifted)[..., None])
        return score_BQV


@pytest.mark.parametrize(("nodes", "stride"), [(8, 4), (16, 4), (3, 2), (5, 3), (3, 4)])
def test_tokens_per_pass_are_one_and_the_chances_of_all_nodes(nodes: int, stride: int) -> None:
    known, rows, length, tree = Ranked(0.5, 0.25, 0.125), 40, 400, Tree.likeliest(nodes, stride - 1)
    sampler = SpeculativeDecoder(known, MASK, length, known.ragged_cache, MaskDrafter(), stride, tree=tree, draw=Draw(0.0))
    committed = calls = 0
    for frame, tally in sampler.rounds(canvas_of([[]] * rows, length), rng=generators(0, rows)):
        committed, calls = committed + int(tally.committed_B.sum()), calls + int((tally.committed_B > 0).sum())
        text_BT = frame.tokens_BT
    assert (text_BT == 5 * torch.arange(length) % MASK).all()
    wanted = 1.0
    for path in paths_of(tree):
        chance = 1.0
        for rank in path:
            chance *= float(known.law_R[rank]) if rank < len(known.law_R) else 0.0
        wanted += chance
    assert committed / calls == pytest.approx(wanted, rel=0.03)
