"""The configuration of the backbone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from dlm.models import attention


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches: all that is needed to rebuild the network."""

    vocab_size: int
    window: int = 256
    layers: int = 6
    heads: int = 6
    kv_heads: int = 0  # 0: as many as heads
    width: int = 384
    head_dim: int = 0  # 0: width / heads
    mlp: str = "relu2"  # relu2 | swiglu
    mlp_width: int = 0  # 0: 4 x width for relu2, 8/3 x width for swiglu
    attention: str = "full"  # full | causal | block_causal
    block_length: int = 0  # for block_causal
    rope_base: float = 10_000.0
    rope_scaling: tuple[float, ...] = ()  # Llama 3: factor, low and high frequency factor, window before
    norm_eps: float = 1e-6
    qk_norm: bool = True
    qkv_bias: bool = False
    tied: bool = False
    time_conditioning: bool = False
    dropout: float = 0.0
    backend: str = "auto"  # auto | sdpa | flex

    def __post_init__(self) -> None:
        for name in ("vocab_size", "window", "layers", "heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        derived = {
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": self.head_dim or self.width // self.heads,
            "mlp_width": self.mlp_width or (4 * self.width if self.mlp == "relu2" else -(-8 * self.width // 3 // 8) * 8),
        }
        for name, value in derived.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            object.__setattr__(self, name, value)
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(f"{self.heads} heads need a divisor of kv_heads ({self.kv_heads}) and an even head_dim ({self.head_dim})")
        object.__setattr__(self, "rope_scaling", tuple(self.rope_scaling))  # JSON has lists
        if len(self.rope_scaling) not in (0, 4):
            raise ValueError(f"rope_scaling has four numbers or none, got {self.rope_scaling}")
        if self.mlp not in ("relu2", "swiglu"):
            raise ValueError(f"unknown mlp {self.mlp!r}; known: relu2, swiglu")
        if self.attention not in attention.PATTERNS:
            raise ValueError(f"unknown attention {self.attention!r}; known: {', '.join(attention.PATTERNS)}")
        if self.attention == "block_causal" and (self.block_length < 1 or self.window % self.block_length):
            raise ValueError(f"block_length {self.block_length} must divide the window {self.window}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in 0 .. 1, got {self.dropout}")
        if self.backend not in ("auto", "sdpa", "flex"):
            raise ValueError(f"unknown attention backend {self.backend!r}; known: auto, sdpa, flex")

    def with_(self, **changes: Any) -> TransformerConfig:
        """A copy with some fields changed; derived widths follow unless given."""
        derived = {name: 0 for name in ("kv_heads", "head_dim", "mlp_width")}
        return replace(self, **(derived | changes if {"heads", "width", "mlp"} & changes.keys() else changes))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def forward_flops(self, *, keys: int | None = None) -> tuple[int, int]:
        """FLOPs of a token in (the blocks, the output head) when it attends to `keys` positions, by default a window.

        Two for each multiply and add; embedding, norms, rotations and softmax are free, as `torch.utils.flop_counter` counts.
        """
        inner, kv_inner = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = 2 * self.width * (inner + kv_inner) + (3 if self.mlp == "swiglu" else 2) * self.width * self.mlp_width
        attention = 4 * inner * (self.window if keys is None else keys)
        return self.layers * (2 * weights + attention), 2 * self.width * self.vocab_size
