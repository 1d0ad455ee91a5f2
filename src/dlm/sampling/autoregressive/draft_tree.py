"""Draft trees: one forward pass verifies the first choice for every place, and second or third choices too.

More candidates for a place cost positions of a forward pass, not passes, and one of them is accepted more often (SpecInfer, Miao et al.
2305.09781; Medusa, Cai et al. 2401.10774). A path of the tree is a text; a node reads the nodes of its path.
Shapes: B rows, K nodes, P = K + 1 places (the committed text, then after each node), N paths, C choices, D depth, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise

import torch
from torch import Tensor

from dlm.errors import InputError, in_range
from dlm.sampling.autoregressive.token_draw import TokenDraw

FIRST_ACCEPTED = 0.5
"""The share of first choices for a place that are accepted, assumed for the shape of a tree alone."""
NEXT_ACCEPTED = 0.35
"""And of every later choice, as a share of the one before it."""
MAX_NODES = 1024


def _preference(path: tuple[int, ...]) -> tuple[float, int, tuple[int, ...]]:
    """Less for a path of ranks that is accepted with a greater probability; of equals, for shorter paths and earlier choices."""
    return -(FIRST_ACCEPTED ** len(path) * NEXT_ACCEPTED ** sum(path)), len(path), path


@dataclass(frozen=True)
class Tree:
    """parent: the node before each, -1 for the committed text; rank: which choice it is, 0 the likeliest. Nodes in order of depth, so that
    those up to a depth stand in front."""

    parent: tuple[int, ...]
    rank: tuple[int, ...]

    @classmethod
    @lru_cache(maxsize=64)
    def chain(cls, depth: int) -> Tree:
        """The first choice for every place."""
        return cls(tuple(range(-1, depth - 1)), (0,) * depth)

    @classmethod
    @lru_cache(maxsize=64)
    def likeliest(cls, nodes: int, depth: int, choices: int = 64) -> Tree:
        """The nodes that are accepted most often, if the first choice for a place is with probability FIRST_ACCEPTED, and there are so many
        choices; fewer nodes where that leaves none. InputError for fewer than the depth, or too many."""
        in_range(nodes, 0, MAX_NODES, "the nodes of a draft tree")
        if nodes < depth:
            raise InputError(f"a tree of depth {depth} has {depth} nodes at least, got {nodes}")
        paths = {(0,) * d for d in range(depth + 1)}  # the rank of every choice on the way
        most = min(nodes, choices)
        # a choice is worth less than the one before it for the same place, so of every place the next one alone is compared
        ends = [_preference((*path, 1)) for path in paths if len(path) < depth and most > 1]
        heapify(ends)
        while len(paths) <= nodes and ends:
            *_, path = heappop(ends)
            paths.add(path)
            if path[-1] + 1 < most:
                heappush(ends, _preference((*path[:-1], path[-1] + 1)))
            if len(path) < depth:
                heappush(ends, _preference((*path, 0)))
        order = sorted(paths, key=lambda path: (len(path), path))
        index = {path: k for k, path in enumerate(order, -1)}
        return cls(tuple(index[path[:-1]] for path in order[1:]), tuple(path[-1] for path in order[1:]))

    def __len__(self) -> int:
        return len(self.parent)

    @cached_property
    def depth(self) -> tuple[int, ...]:
        """Of every place; 0 for the committed text."""
        found = [0]
        for parent in self.parent:
            found.append(found[parent + 1] + 1)
        return tuple(found)

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """The first choice for each depth, each after the one before it."""
        found = [-1]
        for k, (parent, rank) in enumerate(zip(self.parent, self.rank, strict=True)):
            if rank == 0 and parent == found[-1]:
                found.append(k)
        return tuple(found[1:])

    @property
    def is_chain(self) -> bool:
        return len(self.firsts) == len(self)

    def tables(self, device: torch.device) -> Tables:
        return _tables(self, device)

    def grow(self, logits_of: Callable[[int, Tensor], Tensor], draw: TokenDraw, u_BD: Tensor, depth: int) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, K') of the nodes up to a depth and, of a chain that is drawn, the log-probabilities (B, K', V).

        logits_of(d, path_BND): logits (B, N, V), or (B, 1, V) for all, of what follows N paths of d tokens. The choices of a level are the
        tokens that its number would draw first, second ...
        """
        token_BK, laws = u_BD.new_empty(len(u_BD), 0, dtype=torch.long), list[Tensor]()
        for d, level in enumerate(self.tables(u_BD.device).levels[:depth]):
            path_BND = token_BK[:, level.path_ND] if d else token_BK[:, None].expand(-1, len(level.path_ND), -1)
            score_BNV, logq_BNV = draw.scores(logits_of(d, path_BND), u_BD[:, d : d + 1])
            choice_BNC = score_BNV.argmax(-1, keepdim=True) if level.choices == 1 else score_BNV.topk(level.choices, -1).indices
            of_K = level.of_K.clamp(max=choice_BNC.shape[1] - 1)  # one distribution for all paths
            token_BK = torch.cat([token_BK, choice_BNC[:, of_K, level.rank_K]], 1)
            laws += [] if logq_BNV is None else [logq_BNV]
        return token_BK, torch.cat(laws, 1) if laws and self.is_chain else None


@dataclass(frozen=True)
class Level:
    """The nodes of one depth: path_ND of those that they follow, which of these each does, its rank, and choices that are needed."""

    path_ND: Tensor
    of_K: Tensor
    rank_K: Tensor
    choices: int


@dataclass(frozen=True)
class Tables:
    """A tree in tensors. after_K: the place before each node; path_PD: the nodes up to each place, from the first; reads_PK: the same as
    bool; count_D: nodes of depth 0 .. d; levels: by depth."""

    depth_P: Tensor
    after_K: Tensor
    path_PD: Tensor
    reads_PK: Tensor
    count_D: Tensor
    levels: tuple[Level, ...]


@lru_cache(maxsize=64)
def _tables(tree: Tree, device: torch.device) -> Tables:
    most, paths = max(tree.depth), list[list[int]]([[]])
    for k, parent in enumerate(tree.parent):
        paths.append([*paths[parent + 1], k])
    reads_PK = torch.zeros(len(paths), len(tree), dtype=torch.bool)
    for place, path in enumerate(paths):
        reads_PK[place, path] = True
    path_PD = torch.tensor([[*path, *[0] * (most - len(path))] for path in paths], dtype=torch.long).view(len(paths), most)
    count_D = [sum(0 < depth <= d for depth in tree.depth) for d in range(most + 1)]
    levels: list[Level] = []
    for first, last in pairwise(count_D):
        followed_N, of_K = torch.unique(torch.tensor(tree.parent[first:last]), return_inverse=True)
        path_ND, rank_K = path_PD[followed_N + 1, : len(levels)], torch.tensor(tree.rank[first:last])
        levels.append(Level(path_ND.to(device), of_K.to(device), rank_K.to(device), 1 + int(rank_K.max())))
    after_K, depth_P = torch.tensor(tree.parent, dtype=torch.long) + 1, torch.tensor(tree.depth)
    depth_P, after_K, path_PD, reads_PK, counts_D = (x.to(device) for x in (depth_P, after_K, path_PD, reads_PK, torch.tensor(count_D)))
    return Tables(depth_P, after_K, path_PD, reads_PK, counts_D, tuple(levels))
