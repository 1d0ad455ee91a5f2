"""The configuration of the backbone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from dlm.models import attention, axes, rope


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts (`dlm.models.experts`).

    count: experts of a layer, `per_token` of which each token goes to. width: of an expert's hidden layer; shared_width: of the MLP that
    every token goes to besides, 0 for none. first_layer: layers before it have a plain MLP of `mlp_width`.
    score: `softmax` over all experts, or `sigmoid` of each. normalised: the weights of a token's experts sum to 1, before `scaling`.
    correction: whether a bias is added to the scores for the choice alone. groups: equal parts of the experts, of which a token chooses
    `groups_per_token` first.
    """

    count: int
    per_token: int
    width: int
    shared_width: int = 0
    first_layer: int = 0
    score: str = "softmax"
    normalised: bool = False
    scaling: float = 1.0
    correction: bool = False
    groups: int = 1
    groups_per_token: int = 1

    def __post_init__(self) -> None:
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"unknown score of experts {self.score!r}; known: softmax, sigmoid")
        if self.count < 1 or self.width < 1 or self.groups < 1 or self.count % self.groups:
            raise ValueError(f"{self.count} experts of width {self.width} in {self.groups} groups cannot be")
        choice = self.count // self.groups * self.groups_per_token
        if not 1 <= self.groups_per_token <= self.groups or not 1 <= self.per_token <= choice:
            raise ValueError(f"{self.per_token} experts a token cannot be chosen among {choice} in {self.groups_per_token} groups")


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches: all that is needed to rebuild the network."""

    MLPS: ClassVar[tuple[str, ...]] = ("relu2", "swiglu")
    MOST: ClassVar[int] = 2**16  # layers, and dimensions of a head
    vocab_size: int
    window: int = 256
    layers: int = 6
    heads: int = 6
    kv_heads: int = 0  # 0: as many as heads
    width: int = 384
    head_dim: int = 0  # 0: width / heads
    mlp: str = "relu2"  # relu2 | swiglu
    mlp_width: int = 0  # 0: 4 x width for relu2, 8/3 x width for swiglu
    attention: str = "full"  # full | causal | block_causal | causal_text
    block_length: int = 0  # for block_causal and causal_text
    sliding_window: int = 0  # positions up to its own that a query of a sliding layer reads; causal attention alone
    sliding_layers: tuple[int, ...] = ()
    rope_base: float = 10_000.0
    rotary_dim: int = 0  # leading dimensions of a head that are rotated; 0: all
    rope_scaling: tuple[float, ...] = ()  # of Llama 3 or YaRN, as `dlm.models.rope` takes it
    rope_factors: tuple[float, ...] = ()  # that frequencies are divided by: one for each pair of dimensions, or one for all
    axes: tuple[int, ...] = ()  # of a grid: each has its part of the rotated dimensions; none: one axis, the window
    groups: tuple[tuple[int, ...], ...] = ()  # learned embeddings by the tile that a cell lies in, as of `dlm.models.axes`
    norm_eps: float = 1e-6
    qk_norm: bool = True
    qkv_bias: bool = False
    tied: bool = False
    experts: ExpertsConfig | None = None  # in place of the MLP
    conv: int = 0  # taps of the short convolution before attention, 0: none
    time_conditioning: bool = False
    time_steps: int = 0  # of time_conditioning by a learned vector for each of so many noise levels; 0: by sinusoids
    embed_norm: bool = False  # RMSNorm of the embeddings, without a gain
    dropout: float = 0.0
    backend: str = "auto"  # auto | sdpa | flex

    def __post_init__(self) -> None:
        for name in ("vocab_size", "window", "layers", "heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        derived = {
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": self.head_dim or self.width // self.heads,
            "mlp_width": self.mlp_width or (4 * self.width if self.mlp != "swiglu" else -(-8 * self.width // 3 // 8) * 8),
        }
        for name, value in derived.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            object.__setattr__(self, name, value)
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(f"{self.heads} heads need a divisor of kv_heads ({self.kv_heads}) and an even head_dim ({self.head_dim})")
        for name in ("rope_scaling", "rope_factors", "sliding_layers"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.experts, dict):  # and no dataclasses
            object.__setattr__(self, "experts", ExpertsConfig(**self.experts))
        self._check_positions()
        if self.mlp not in self.MLPS:
            raise ValueError(f"unknown mlp {self.mlp!r}; known: {', '.join(self.MLPS)}")
        if self.attention not in attention.PATTERNS:
            raise ValueError(f"unknown attention {self.attention!r}; known: {', '.join(attention.PATTERNS)}")
        if self.attention in attention.BLOCKWISE and (self.block_length < 1 or self.window % self.block_length):
            raise ValueError(f"block_length {self.block_length} must divide the window {self.window}")
        self._check_switches()

    def _check_switches(self) -> None:
        if self.layers > self.MOST:
            raise ValueError(f"layers must be at most {self.MOST}, got {self.layers}")
        if self.conv < 0 or (self.attention != "causal" and self.conv and self.conv % 2 == 0):
            raise ValueError(f"a centred convolution has an odd number of taps, or 0 for none, got conv={self.conv}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in 0 .. 1, got {self.dropout}")
        if self.backend not in ("auto", "sdpa", "flex"):
            raise ValueError(f"unknown attention backend {self.backend!r}; known: auto, sdpa, flex")

    def _check_positions(self) -> None:
        if not 0 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even and at most the head_dim {self.head_dim}, got {self.rotary_dim}")
        if len(self.rope_scaling) not in (0, rope.LLAMA3, rope.YARN):
            raise ValueError(f"rope_scaling has {rope.LLAMA3} numbers, {rope.YARN} or none, got {self.rope_scaling}")
        if self.sliding_layers and (self.attention != "causal" or self.sliding_window < 1 or max(self.sliding_layers) >= self.layers):
            raise ValueError(f"sliding layers {self.sliding_layers} of {self.layers} need causal attention and a sliding_window")
        if len(self.rope_factors) not in (0, 1, pairs := (self.rotary_dim or self.head_dim) // 2):
            raise ValueError(f"rope_factors has one number for each of {pairs} pairs, one for all or none, got {len(self.rope_factors)}")
        object.__setattr__(self, "axes", tuple(self.axes))
        object.__setattr__(self, "groups", tuple(map(tuple, self.groups)))
        axes.check(self.axes, self.groups, self.window, self.rotary_dim or self.head_dim)
        if self.axes and (self.conv or self.rope_scaling or self.rope_factors):
            raise ValueError("a short convolution, rope_scaling and rope_factors know one axis: leave them away where there are axes")

    def with_(self, **changes: Any) -> TransformerConfig:
        """A copy with some fields changed; derived widths follow unless given."""
        derived = {name: 0 for name in ("kv_heads", "head_dim", "mlp_width")}
        return replace(self, **(derived | changes if {"heads", "width", "mlp"} & changes.keys() else changes))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def conv_width(self) -> int:
        """Features of a position that a cache keeps in each layer for the short convolution."""
        return self.width if self.conv else 0

    def forward_flops(self, *, keys: int | None = None) -> tuple[int, int]:
        """FLOPs of a token in (the blocks, the output head) when it attends to `keys` positions, by default a window.

        Two for each multiply and add; embedding, norms, rotations, short convolutions and softmax are free, as
        `torch.utils.flop_counter` counts.
        """
        inner, kv_inner = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = self.layers * 2 * self.width * (inner + kv_inner) + self.width * self._mlp_features()
        attention = 4 * inner * (self.window if keys is None else keys)
        return 2 * weights + self.layers * attention, 2 * self.width * self.vocab_size

    def _mlp_features(self) -> int:
        """Rows and columns of MLP weights that a token meets in all layers, those of its experts and of the router."""
        matrices, e = 3 if self.mlp == "swiglu" else 2, self.experts
        if e is None:
            return self.layers * matrices * self.mlp_width
        plain = min(e.first_layer, self.layers)
        return plain * matrices * self.mlp_width + (self.layers - plain) * (matrices * (e.per_token * e.width + e.shared_width) + e.count)
