"""Which guesses a call of strided decoding verifies: the first choice for every place, or a tree of first, second ... choices.

More candidates for a place cost positions of a call, not calls, and one of them holds more often (SpecInfer, Miao et al. 2305.09781;
Medusa, Cai et al. 2401.10774). A path of the tree is a text; a node reads the nodes of its path.
Shapes: B rows, K nodes, P = K + 1 places (the committed text, then after each node), N paths, C choices, D depth, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from dlm.errors import InputError

FALLS = 0.35  # of two choices that follow one another in rank, the later one holds so often as the earlier
HOLDS = 0.5  # how often the first choice does; both decide about shapes alone


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
        """The nodes that hold most often, if the first choice for a place does with chance HOLDS, and there are so many choices; fewer
        nodes where that leaves none. InputError for fewer than the depth."""
        if nodes < depth:
            raise InputError(f"a tree of depth {depth} has {depth} nodes at least, got {nodes}")
        paths = {(0,) * d for d in range(depth + 1)}  # the rank of every choice on the way
        while len(paths) <= nodes and depth:
            ends = {(*path, rank) for path in paths if len(path) < depth for rank in range(min(nodes, choices))} - paths
            if not ends:
                break
            paths.add(max(ends, key=lambda path: (HOLDS ** len(path) * FALLS ** sum(path), [-len(path), *(-rank for rank in path)])))
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

    def grow(
        self,
        law: Callable[[int, Tensor], Tensor],
        choose: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
        u_BD: Tensor,
        depth: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, K') of the nodes up to a depth and, of a chain, the log-probabilities (B, K', V) that they were drawn from.

        law(d, path_BND): logits (B, N, V), or (B, 1, V) for all, of what follows N paths of d tokens. choose(logits, u_B, C): the first C
        choices (B, N, C) with those numbers, and what they are drawn from.
        """
        token_BK, laws = u_BD.new_empty(len(u_BD), 0, dtype=torch.long), []
        for d in range(depth):
            nodes = [k for k in range(len(self)) if self.depth[k + 1] == d + 1]
            parents = sorted({self.parent[k] for k in nodes})
            path_ND = self.tables(u_BD.device).path_PD[torch.tensor(parents) + 1, :d]
            logits_BNV = law(d, token_BK[:, path_ND] if d else token_BK[:, None].expand(-1, len(parents), -1))
            choice_BNC, logq_BNV = choose(logits_BNV, u_BD[:, d], 1 + max(self.rank[k] for k in nodes))
            n = torch.tensor([min(parents.index(self.parent[k]), choice_BNC.shape[1] - 1) for k in nodes])
            token_BK = torch.cat([token_BK, choice_BNC[:, n, torch.tensor([self.rank[k] for k in nodes])]], 1)
            laws.append(logq_BNV)
        return token_BK, torch.cat(laws, 1) if laws and self.is_chain else None


@dataclass(frozen=True)
class Tables:
    """A tree in tensors. after_K: the place before each node; path_PD: the nodes up to each place, from the first; reads_PK: the same as
    bool; count_D: nodes of depth 0 .. d."""

    depth_P: Tensor
    after_K: Tensor
    path_PD: Tensor
    reads_PK: Tensor
    count_D: Tensor


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
    parts = (torch.tensor(tree.depth), torch.tensor(tree.parent, dtype=torch.long) + 1, path_PD, reads_PK, torch.tensor(count_D))
    return Tables(*(part.to(device) for part in parts))
