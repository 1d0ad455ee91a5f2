"""Noise with a compressed vocabulary: a word becomes the name of its class, and the name becomes MASK.

Two independent clocks. The detail of a position lives with probability a1 = alpha_t, anything at all with a2 = 1 - (1 - alpha_t)^lead:
a word is seen where both live, its class where the detail is lost, MASK where all is lost. No chance depends on the word, so the best
prediction does not read the time. The hazards of the two clocks have the constant ratio `lead`: in the reverse process 2T events, one for
the class and one for the detail of each position, race with weights `lead` and 1, whatever the schedule. The continuous bound
on the text itself splits into the nats of classes and those of words given their classes. Cf. HDLM (arXiv 2510.08632).
Shapes: B rows, T positions, V ids: words, MASK, class tokens; M positions of the flattened text. Losses in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from dlm.noise.schedule import Linear, is_whole
from dlm.protocols import NoiseSchedule

LEVELS = 200  # shares of hidden events at which the mean weight of training is taken


@dataclass(frozen=True)
class ClassNoise:
    """Words are the ids below mask_id; the token of class c is the id mask_id + 1 + c, which the network reads and never predicts.

    vocab_size counts words, mask and class tokens. clusters: the class of each word, numbered 0, 1, 2 ... lead: how far the loss of
    classes is behind that of details, 1 is not at all. names: of the class tokens, as they are shown; none: their numbers.
    """

    vocab_size: int
    mask_id: int
    schedule: NoiseSchedule = field(default_factory=Linear)
    lead: float = 2.0
    clusters: tuple[int, ...] = ()
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.lead < float("inf"):
            raise ValueError(f"the lead of the classes must be at least 1, got {self.lead}")
        if not is_whole(self.schedule):
            raise ValueError("classes need a schedule from exactly 1 to exactly 0, such as linear")
        if len(self.clusters) != self.mask_id:
            raise ValueError(f"{len(self.clusters)} words have a class, there are {self.mask_id} in the vocabulary")
        if sorted(set(self.clusters)) != list(range(self.classes)):
            raise ValueError("classes are to be numbered 0, 1, 2 ... without a gap")
        if self.vocab_size != self.mask_id + 1 + self.classes:
            raise ValueError(f"{self.vocab_size} ids are not those of {self.mask_id} words, the mask and {self.classes} classes")
        if self.names and len(self.names) != self.classes:
            raise ValueError(f"{len(self.names)} names cannot be those of {self.classes} classes")

    @property
    def classes(self) -> int:
        """How many there are."""
        return max(self.clusters) + 1

    @cached_property
    def _token_V(self) -> Tensor:
        """The id of the class token that stands for each id: of a word its class, of the mask and a class token itself."""
        first = self.mask_id + 1
        return torch.tensor([*(first + c for c in self.clusters), *range(self.mask_id, self.vocab_size)])

    @cached_property
    def _moved(self) -> dict[torch.device, Tensor]:
        return {}

    def _tokens(self, like: Tensor) -> Tensor:
        """`_token_V` on the device of a tensor, moved there once."""
        if like.device not in self._moved:
            self._moved[like.device] = self._token_V.to(like.device)
        return self._moved[like.device]

    def class_tokens(self, x_BT: Tensor) -> Tensor:
        """The class token of every word, int64 (B, T); of other ids themselves."""
        return self._tokens(x_BT)[x_BT]

    def with_class_rows(self, rows_VD: Tensor) -> Tensor:
        """An embedding of words and mask with a row for each class, the mean of its words; one that has such rows as it is."""
        if len(rows_VD) != self.mask_id + 1:
            return rows_VD
        class_V = torch.tensor(self.clusters, device=rows_VD.device)
        sum_CD = rows_VD.new_zeros(self.classes, rows_VD.shape[1]).index_add(0, class_V, rows_VD[: self.mask_id])
        return torch.cat([rows_VD, sum_CD / torch.bincount(class_V)[:, None]])

    def words(self, z_BT: Tensor) -> Tensor:
        """Where words stand, bool (B, T): they are final."""
        return z_BT < self.mask_id

    def _clocks(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """a1 and a2, (B, 1)."""
        near_B = self.schedule.alpha(t_B)[:, None]
        return near_B, 1 - (1 - near_B) ** self.lead

    def corrupt(self, x_BT: Tensor, t_B: Tensor, rng: torch.Generator) -> Tensor:
        """Draw z_t given x. int64 (B, T)."""
        near_B1, far_B1 = self._clocks(t_B)
        detail_BT, any_BT = (torch.rand(x_BT.shape, generator=rng, device=x_BT.device) for _ in range(2))
        z_BT = torch.where(detail_BT < near_B1, x_BT, self.class_tokens(x_BT))
        return torch.where(any_BT < far_B1, z_BT, self.mask_id)

    def corrupt_count(self, x_BT: Tensor, count_B: Tensor, free_BT: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Hide exactly count_B of the 2n events of n free positions, by their race: z int64 (B, T), and the masks of each row whose detail
        is not hidden, (B,), which z does not tell."""
        rate_2 = torch.tensor([self.lead, 1.0], device=x_BT.device)  # of classes, of details
        u_B2T = torch.rand((len(x_BT), 2, x_BT.shape[1]), generator=rng, device=x_BT.device)
        time_B2T = (-u_B2T.clamp(min=1e-30).log() / rate_2[:, None]).masked_fill(~free_BT[:, None], -1.0)
        rank_BE = time_B2T.flatten(1).argsort(-1, descending=True).argsort(-1)
        no_class_BT, no_detail_BT = (rank_BE < count_B[:, None]).view_as(time_B2T).unbind(1)
        z_BT = torch.where(no_detail_BT, self.class_tokens(x_BT), x_BT)
        return torch.where(no_class_BT, self.mask_id, z_BT), (no_class_BT & ~no_detail_BT).sum(-1)

    def renoise(self, z_BT: Tensor, s_B: Tensor, t_B: Tensor, u_BT: Tensor) -> Tensor:
        """Draw z_t given z_s, s <= t, from one uniform a position. int64 (B, T)."""
        (near_s, far_s), (near_t, far_t) = self._clocks(s_B), self._clocks(t_B)
        stays = far_t / far_s
        kept_BT = torch.where(u_BT < stays * (near_t / near_s), z_BT, self.class_tokens(z_BT))
        return torch.where(u_BT < stays, kept_BT, self.mask_id)

    def prior(self, u_BT: Tensor) -> Tensor:
        """z_1: all masks (the uniforms are not needed)."""
        return torch.full_like(u_BT, self.mask_id, dtype=torch.long)

    def prior_cost(self, x_BT: Tensor) -> Tensor:
        """0 (B, T): the schedule ends at exactly 0."""
        return torch.zeros(x_BT.shape, dtype=torch.float32 if x_BT.device.type == "mps" else torch.float64, device=x_BT.device)

    def _possible(self, z_BT: Tensor) -> Tensor:
        """bool (B, T, V): the words that may stand under each token."""
        id_V, token_V = torch.arange(self.vocab_size, device=z_BT.device), self._tokens(z_BT)
        itself_BTV, of_class_BTV = z_BT[..., None] == id_V, z_BT[..., None] == token_V
        return (id_V < self.mask_id) & (itself_BTV | of_class_BTV | (z_BT == self.mask_id)[..., None])

    def log_probs(self, logits_BTV: Tensor, z_BT: Tensor, t_B: Tensor | None = None) -> Tensor:
        """log p(x | z) (B, T, V): at a mask over all words, at a class over its members; a visible word is certain."""
        return logits_BTV.masked_fill(~self._possible(z_BT), -torch.inf).log_softmax(-1)

    def denoised(self, logp_BTV: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """log p(x_i | z) (B, T, V), which equals `log_probs`."""
        return logp_BTV

    def class_probs(self, p_BTV: Tensor) -> Tensor:
        """Probabilities of words summed over each class, at the ids of the class tokens (B, T, V)."""
        return torch.zeros_like(p_BTV).index_add(-1, self._tokens(p_BTV), p_BTV)

    def posterior(self, logp_BTV: Tensor, z_BT: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """p(z_s | z_t), s < t, probabilities (B, T, V): a mask may become a word or a class, a class one of its words."""
        (near_t, far_t), (near_s, far_s) = (tuple(a[..., None].to(logp_BTV.dtype) for a in self._clocks(r_B)) for r_B in (t_B, s_B))
        word_BTV = logp_BTV.exp()
        class_BTV = self.class_probs(word_BTV)
        mask_V = (torch.arange(self.vocab_size, device=logp_BTV.device) == self.mask_id).to(logp_BTV.dtype)
        shown, detailed = (far_s - far_t) / (1 - far_t), (near_s - near_t) / (1 - near_t)
        of_mask_BTV = shown * (near_s * word_BTV + (1 - near_s) * class_BTV) + (1 - shown) * mask_V
        of_class_BTV = detailed * word_BTV + (1 - detailed) * class_BTV
        moved_BTV = torch.where((z_BT == self.mask_id)[..., None], of_mask_BTV, of_class_BTV)
        return torch.where(self.words(z_BT)[..., None], word_BTV, moved_BTV)

    def parts(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor) -> tuple[Tensor, Tensor]:
        """-log p(class of x | z) at masks, and -log p(x | its class, z) where no word is seen; 0 elsewhere (B, T)."""
        of_class_BTV = self._tokens(x_BT) == self.class_tokens(x_BT)[..., None]
        class_BT = logp_BTV.masked_fill(~of_class_BTV, -torch.inf).logsumexp(-1)
        word_BT = class_BT - logp_BTV.gather(-1, x_BT[..., None]).squeeze(-1)
        return torch.where(z_BT == self.mask_id, -class_BT, 0.0), torch.where(self.words(z_BT), 0.0, word_BT)

    def nll(self, logits_BTV: Tensor, x_BT: Tensor, z_BT: Tensor) -> tuple[Tensor, Tensor]:
        """`parts` of `log_probs`, on a CPU computed where no word is seen alone: that is most of a training step."""
        if logits_BTV.device.type != "cpu":
            return self.parts(self.log_probs(logits_BTV, z_BT), x_BT, z_BT)
        at_M = (~self.words(z_BT)).flatten().nonzero().squeeze(-1)
        z_1M, x_1M, logits_1MV = z_BT.flatten()[None, at_M], x_BT.flatten()[None, at_M], logits_BTV.flatten(0, 1)[None, at_M]
        found = self.parts(self.log_probs(logits_1MV, z_1M), x_1M, z_1M)
        class_BT, word_BT = (part.new_zeros(z_BT.numel()).index_copy(0, at_M, part[0]).view(z_BT.shape) for part in found)
        return class_BT, word_BT

    def cross_entropy(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor | None = None) -> Tensor:
        """-log p(x | z) at masks and classes, 0 where the word is visible (B, T)."""
        nll_BT = -logp_BTV.gather(-1, x_BT[..., None]).squeeze(-1)
        return torch.where(self.words(z_BT), 0.0, nll_BT)

    def nelbo_parts(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """The integrand of the bound at t (B, T), its nats of classes and those of words given their classes.

        A mask is revealed at the rate r2 = -a2' / (1 - a2), with its detail if that lives; a class at the rate r1 = -a1' / (1 - a1).
        """
        near_B1, _ = self._clocks(t_B)
        rate_B1 = -self.schedule.dalpha(t_B)[:, None] / (1 - near_B1)
        class_BT, word_BT = self.parts(logp_BTV, x_BT, z_BT)
        return rate_B1 * self.lead * class_BT, rate_B1 * torch.where(z_BT == self.mask_id, self.lead * near_B1 * word_BT, word_BT)

    def nelbo(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """The sum of `nelbo_parts` (B, T)."""
        class_BT, word_BT = self.nelbo_parts(logp_BTV, x_BT, z_BT, t_B)
        return class_BT + word_BT

    def nelbo_step(self, logp_BTV: Tensor, x_BT: Tensor, z_BT: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """KL( q(z_s | z_t, x) || p(z_s | z_t) ) (B, T) for one step of a discrete grid, z drawn at t."""
        (near_t, far_t), (near_s, far_s) = self._clocks(t_B), self._clocks(s_B)
        class_BT, word_BT = self.parts(logp_BTV, x_BT, z_BT)
        of_mask_BT = (far_s - far_t) / (1 - far_t) * (class_BT + near_s * word_BT)
        return torch.where(z_BT == self.mask_id, of_mask_BT, (near_s - near_t) / (1 - near_t) * word_BT)

    def next_costs(self, nll: tuple[Tensor, Tensor], z_BT: Tensor, count_B: Tensor, early_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted costs of the hidden events, any of which may be revealed next, of classes and of words; the sum of the weights (B,).

        count_B, early_B: as of `corrupt_count`. Every set of `early_B` masks is as likely to be the one whose details are not hidden.
        """
        masked_BT = z_BT == self.mask_id
        masks_B = masked_BT.sum(-1)
        class_B, word_BT = nll[0].sum(-1), nll[1]
        of_masks_B, of_all_B = (word_BT * masked_BT).sum(-1), word_BT.sum(-1)
        detailed_B = early_B / masks_B.clamp(min=1)
        weight_B = self.lead * masks_B + (count_B - masks_B)
        return self.lead * class_B, self.lead * detailed_B * of_masks_B + of_all_B - of_masks_B, weight_B

    @cached_property
    def mean_weight(self) -> float:
        """Of the hidden events of one position, under shares of hidden events from Beta(2, 2)."""
        share_N = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
        low_N, high_N = torch.zeros_like(share_N), torch.ones_like(share_N)
        for _ in range(50):  # of details hidden, where so many of all events are
            middle_N = (low_N + high_N) / 2
            below_N = (middle_N + middle_N**self.lead) / 2 < share_N
            low_N, high_N = torch.where(below_N, middle_N, low_N), torch.where(below_N, high_N, middle_N)
        chance_N = 6 * share_N * (1 - share_N)
        return float((chance_N * (self.lead * high_N**self.lead + high_N)).sum() / chance_N.sum())
