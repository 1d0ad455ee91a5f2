"""The exact distribution of a schedule: one token a forward pass in random order, a model for each number of known tokens.

For sources small enough to enumerate, where the exact posterior is known: a schedule is judged with no judge. Shapes: V tokens, T
positions, S = V^T texts, X states of a set of known positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dlm.protocols import Denoiser


class Enumerated:
    """Conditionals of every model in every state, read once; then the distribution of a schedule costs 2^T V^T additions at most.

    Laws are built step by step, and the steps that a schedule shares with the last one are not built again.
    """

    def __init__(self, denoisers: Mapping[str, Denoiser], vocab: int, length: int) -> None:
        self.vocab, self.length, self.mask_id = vocab, length, vocab
        self.x_ST = torch.tensor(list(itertools.product(range(vocab), repeat=length)))
        self.sets = [frozenset(known) for k in range(length + 1) for known in itertools.combinations(range(length), k)]
        self.log_p: dict[str, dict[frozenset[int], Tensor]] = {key: {} for key in denoisers}
        for known in self.sets:
            hidden_T = torch.tensor([i not in known for i in range(length)])
            z_ST = torch.where(hidden_T, self.mask_id, self.x_ST)
            t_S = torch.full((len(z_ST),), 1 - len(known) / length, dtype=torch.float64)
            for key, denoiser in denoisers.items():
                logits_STV = denoiser(z_ST, t_S)[..., :vocab].double()
                self.log_p[key][known] = logits_STV.log_softmax(-1).gather(-1, self.x_ST[..., None]).squeeze(-1)
        self.p = {key: {known: log_p_ST.exp() for known, log_p_ST in table.items()} for key, table in self.log_p.items()}
        whole = torch.ones(len(self.x_ST), dtype=torch.float64)
        self.last: list[tuple[str, dict[frozenset[int], Tensor]]] = [("", {frozenset(): whole})]

    def distribution(self, keys: Sequence[str]) -> Tensor:
        """Probability of every text (S,), keys[k] drawing the token after k known ones, positions in uniformly random order."""
        return self._masses(keys)[-1][frozenset(range(self.length))]

    def _masses(self, keys: Sequence[str]) -> list[dict[frozenset[int], Tensor]]:
        """After each number of steps, by the set of known positions: the mass of x there (S,), given that these are known."""
        same = 0
        while same < min(len(keys), len(self.last) - 1) and self.last[same + 1][0] == keys[same]:
            same += 1
        del self.last[same + 1 :]
        for step in range(same, self.length):
            before, p = self.last[-1][1], self.p[keys[step]]
            sets = [known for known in self.sets if len(known) == step + 1]
            mass = {known: torch.stack([before[known - {i}] * p[known - {i}][:, i] for i in known]).mean(0) for known in sets}
            self.last.append((keys[step], mass))
        return [mass for _, mass in self.last]

    def step_kl(self, light: str, heavy: str) -> list[float]:
        """The addition of each step to KL(chain of `heavy` || chain in which `light` takes the step): nats, which sum over steps."""
        found = [0.0] * self.length
        for step, masses in enumerate(self._masses([heavy] * self.length)[:-1]):
            left = self.length - step
            for known, mass_S in masses.items():
                weight_S = mass_S / self.vocab**left / math.comb(self.length, step)  # every x that agrees stands for the state
                ratio_ST = self.log_p[heavy][known] - self.log_p[light][known]
                for i in set(range(self.length)) - known:
                    p_S = self.p[heavy][known][:, i] * self.vocab  # x_i itself is uniform among those that agree
                    found[step] += float((weight_S * p_S * ratio_ST[:, i]).sum()) / left
        return found


class MarkovPosterior:
    """p(x_i | z) of a stationary Markov chain, exact; or that of a smaller model, from the tokens within `reach`.

    transition_VV: rows sum to 1. The nearest visible tokens on either side determine it.
    """

    def __init__(self, transition_VV: Tensor, length: int, reach: int | None = None) -> None:
        self.vocab, self.length = len(transition_VV), length
        self.reach = length if reach is None else reach
        self.powers_KVV = torch.stack([torch.linalg.matrix_power(transition_VV.double(), k) for k in range(length + 1)])
        self.stationary_V = torch.linalg.matrix_power(transition_VV.double(), 1 << 20)[0]

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, **_: object) -> Tensor:
        place_T = torch.arange(self.length).expand_as(z_BQ)
        seen_BT = z_BQ != self.vocab
        left_BT = torch.where(seen_BT, place_T, -2 * self.length).cummax(-1).values
        right_BT = torch.where(seen_BT, place_T, 2 * self.length).flip(-1).cummin(-1).values.flip(-1)
        p_BTV = self._from(z_BQ, left_BT, place_T - left_BT, backward=False) * self._from(z_BQ, right_BT, right_BT - place_T, backward=True)
        p_BTV = torch.nn.functional.pad(p_BTV / p_BTV.sum(-1, keepdim=True), (0, 1))
        return p_BTV.clamp(min=1e-300).log()

    def _from(self, z_BT: Tensor, where_BT: Tensor, distance_BT: Tensor, *, backward: bool) -> Tensor:
        """Likelihood of each position by the nearest visible token on one side; constant where that is out of reach."""
        token_BT = z_BT.gather(1, where_BT.clamp(0, self.length - 1)).clamp(max=self.vocab - 1)
        power_BTVV = self.powers_KVV[distance_BT.clamp(max=self.length)]
        index_BT1V = token_BT[..., None, None].expand(*token_BT.shape, 1, self.vocab)
        said_BTV = power_BTVV.transpose(-1, -2) if backward else power_BTVV
        said_BTV = said_BTV.gather(-2, index_BT1V).squeeze(-2)
        nothing_V = torch.ones_like(self.stationary_V) if backward else self.stationary_V
        return torch.where((distance_BT <= self.reach)[..., None], said_BTV, nothing_V)
