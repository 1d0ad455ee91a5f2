"""Gated LoRA: an adapter that acts where the input is MASK and nowhere else, so that the base's logits of text stay bitwise identical.

Hu et al. 2106.09685 with the gate of Samragh et al. 2507.11851 and of R-ISD (I-DLM, arXiv 2604.11035). In a causal network no text
reads a mask after it: keys, values and logits of text are those of the base. A mask at position 0 is none: our own autoregressive
networks read it there as the start of a text.
Shapes: B batch, Q queried positions, M masks among them, R rank; I and O features in and out.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm import seeds
from dlm.adapters import files
from dlm.adapters.chain import Chain
from dlm.errors import InputError
from dlm.models.block import Embedding, Linear, LowRank, MaskTokens
from dlm.models.meta import without_weights
from dlm.models.transformer import Transformer

MAX_SIZE = 65536  # of a rank or an inner width
TARGETS = ("q", "k", "v", "out", "up", "down", "gate")  # linear layers of a block; not every network has a gate
WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"


@dataclass(frozen=True)
class AdapterConfig:
    """adapter.json. alpha: the adapter's output is scaled by alpha / rank; stride: the most tokens that a forward pass may commit;
    chain: the inner width of its `dlm.adapters.chain`, 0 for none."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    stride: int = 4
    chain: int = 0
    base: str = ""
    fingerprint: str = ""
    made: dict[str, Any] = field(default_factory=dict)  # how: settings and figures of its training

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))  # JSON has lists
        if max(self.rank, self.chain, self.stride) > MAX_SIZE:
            raise InputError(
                f"rank, stride and chain of an adapter are at most {MAX_SIZE}, got {self.rank}, {self.stride} and {self.chain}"
            )
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise InputError(f"an adapter has a rank from 1 and an alpha above 0, got {self.rank} and {self.alpha}")
        if self.stride < 2:
            raise InputError(f"a stride counts from 2: one token and at least one mask; got {self.stride}")
        if self.chain < 0:
            raise InputError(f"the inner width of a chain counts from 0, which is none; got {self.chain}")
        if not self.targets or set(self.targets) - set(TARGETS):
            raise InputError(f"adapter targets are some of {', '.join(TARGETS)}; got {', '.join(self.targets) or 'none'}")


class LoRALinear(Linear):
    """y = W x, and at mask tokens y = W x + alpha / R * B A x. W is the base's own; A (R, I) and B (O, R) are float32, B begins at zero."""

    def __init__(self, inputs: int, outputs: int, bias: bool, config: AdapterConfig) -> None:
        super().__init__(inputs, outputs, bias, device="meta")
        self.scale = config.alpha / config.rank
        self.lora_A, self.lora_B = nn.Parameter(torch.empty(config.rank, inputs)), nn.Parameter(torch.zeros(outputs, config.rank))

    @classmethod
    def from_base(cls, base: nn.Linear, config: AdapterConfig, rng: torch.Generator | None = None) -> LoRALinear:
        """Around the weights of `base`, which both then hold. rng: of A, on the CPU."""
        self = cls(base.in_features, base.out_features, base.bias is not None, config)
        self.weight, self.bias = base.weight, base.bias
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=rng)
        return self if base.weight is None else self.to(base.weight.device)  # quantized: the weights are elsewhere, on the CPU

    def to_base(self) -> Linear:
        """The layer without its adapter, around the same weights."""
        base = Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        base.weight, base.bias = self.weight, self.bias
        return base

    @property
    def low_rank(self) -> LowRank:
        return LowRank(self.lora_A, self.lora_B, self.scale)

    def adapt(self, x_BQI: Tensor, y_BQO: Tensor, mask_tokens: MaskTokens | None) -> Tensor:
        if mask_tokens is None:
            return y_BQO
        if mask_tokens.alone:
            return y_BQO + F.linear(F.linear(x_BQI, self.lora_A.to(x_BQI.dtype)), self.scale * self.lora_B.to(x_BQI.dtype))
        x_MI = x_BQI.flatten(0, -2).index_select(0, mask_tokens.index_M)
        delta_MO = F.linear(F.linear(x_MI, self.lora_A.to(x_MI.dtype)), self.lora_B.to(x_MI.dtype))
        return y_BQO.flatten(0, -2).index_add(0, mask_tokens.index_M, delta_MO, alpha=self.scale).view_as(y_BQO)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A network's state is its base's: the adapter has files of its own."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "lora_A"], destination[prefix + "lora_B"]


class MaskEmbedding(Embedding):
    """The base's embedding with a row of the adapter's own (float32, begun as the base's) in place of the mask's.

    It finds the mask tokens of a forward pass, which every adapted layer is then told.
    """

    def __init__(self, base: nn.Embedding, config: AdapterConfig, mask_id: int) -> None:
        with without_weights():
            super().__init__(base.num_embeddings, base.embedding_dim)
        self.weight, self.config, self.mask_id = base.weight, config, mask_id
        self.mask_row = nn.Parameter(base.weight[mask_id].detach().float().clone())

    def to_base(self) -> Embedding:
        """The embedding without the adapter's row, around the same weights."""
        with without_weights():
            base = Embedding(self.num_embeddings, self.embedding_dim)
        base.weight = self.weight
        return base

    def mask_tokens(self, z_BQ: Tensor, pos_BQ: Tensor) -> MaskTokens | None:
        gate_BQ = (z_BQ == self.mask_id) & (pos_BQ > 0)
        index_M = gate_BQ.flatten().nonzero().squeeze(-1)
        return MaskTokens(index_M, gate_BQ[..., None].float(), len(index_M) == z_BQ.numel(), self) if len(index_M) else None

    def forward(self, z_BQ: Tensor, mask_tokens: MaskTokens | None = None) -> Tensor:
        x_BQD = super().forward(z_BQ)
        if mask_tokens is None:
            return x_BQD
        if mask_tokens.alone:
            return self.mask_row.to(x_BQD.dtype).expand_as(x_BQD)
        rows_MD = self.mask_row.to(x_BQD.dtype).expand(len(mask_tokens.index_M), -1)
        return x_BQD.flatten(0, 1).index_copy(0, mask_tokens.index_M, rows_MD).view_as(x_BQD)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "mask_row"]


@dataclass(frozen=True)
class Adapter:
    """The handle of an attached adapter; its state is in the network's modules."""

    config: AdapterConfig
    mask_id: int
    chain: Chain | None


def adapter_of(network: Transformer) -> Adapter | None:
    """The adapter that is attached to a network, if there is one."""
    parts = dict(network.named_children())
    embed, chain = parts.get("embed"), cast(Chain | None, parts.get("chain"))
    return Adapter(embed.config, embed.mask_id, chain) if isinstance(embed, MaskEmbedding) else None


def attach(network: Transformer, config: AdapterConfig, mask_id: int, *, seed: int = 0) -> None:
    """Put a fresh adapter, which changes nothing yet, into every block and freeze the base; a former adapter goes."""
    detach(network)
    network.requires_grad_(False)
    rng = seeds.generator(seed)
    for block in network.blocks:
        for part in (block.attention, block.mlp):
            for name in config.targets:
                if isinstance(layer := getattr(part, name, None), nn.Linear):
                    setattr(part, name, LoRALinear.from_base(layer, config, rng))
    network.embed = MaskEmbedding(network.embed, config, mask_id)
    if config.chain:
        network.add_module("chain", Chain(config.stride - 1, network.config.width, config.chain, rng).to(network.device))


def detach(network: Transformer) -> None:
    """The base again, its weights where they were."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear | MaskEmbedding):
                setattr(module, name, child.to_base())
    if hasattr(network, "chain"):
        del network.chain


def adapter_state(network: Transformer) -> dict[str, Tensor]:
    """The tensors of the adapter by name; a change of one is a change of the adapter."""
    return {
        name: p.detach()
        for name, p in network.named_parameters()
        if name.endswith((".lora_A", ".lora_B", ".mask_row")) or name.startswith("chain.")
    }


@torch.no_grad()
def fingerprint(network: Transformer) -> str:
    """sha256 over names, shapes and bytes of the base's weights, 64 hex digits; an adapter does not count. InputError for a network whose
    weights are quantized.

    In bfloat16, so that a base loaded in float32 and in bfloat16 is the same base.
    """
    if network.quantized:
        raise InputError("the weights are quantized, and an adapter names those before: load both at once, with --adapter")
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if name == "head.weight" and network.config.tied:
            continue
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def save_adapter(directory: str | Path, network: Transformer, config: AdapterConfig, *, dtype: torch.dtype = torch.float32) -> None:
    """Write adapter.safetensors, then adapter.json, each whole or not at all. dtype: bfloat16 halves it; loaded it is float32 again."""
    weights, about = Path(directory) / WEIGHTS, Path(directory) / CONFIG
    files.save(weights, adapter_state(network), about, config, dtype=dtype)


def load_config(path: str | Path) -> AdapterConfig:
    """adapter.json of a directory. InputError where it is missing or damaged."""
    file = Path(path) / CONFIG
    if not file.is_file():
        raise InputError(f"no adapter in {path}: it has no {CONFIG} (dlm convert writes one)")
    return files.read_config(file, AdapterConfig, "an adapter")


def load_adapter(path: str | Path, network: Transformer, mask_id: int) -> AdapterConfig:
    """Attach the adapter of a directory to the base that it was made for, ready for use.

    InputError for another base, and for files that are missing or damaged; the network then has no adapter.
    """
    config, weights = load_config(path), Path(path) / WEIGHTS
    files.check_base(config, fingerprint(network), f"the adapter in {path} was")
    state = files.read_weights(weights)
    attach(network, config, mask_id)
    try:
        files.fill(adapter_state(network), state, weights, Path(path) / CONFIG)
    except InputError:
        detach(network)
        raise
    network.requires_grad_(False)
    return config
