"""Gated LoRA: an adapter that acts where the input is MASK and nowhere else, so that what a base says of text stays to the bit.

Hu et al. 2106.09685 with the gate of Samragh et al. 2507.11851 and of R-ISD (I-DLM, arXiv 2604.11035). In a causal network no text
reads a mask after it: keys, values and logits of text are those of the base. A mask at position 0 is none: our own autoregressive
networks read it there as the start of a text.
Shapes: B batch, Q queried positions, M masks among them, R rank; I and O features in and out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.adapters import files
from dlm.adapters.chain import Chain
from dlm.errors import InputError
from dlm.models.block import version
from dlm.models.transformer import Transformer

TARGETS = ("q", "k", "v", "out", "up", "down", "gate")  # linear layers of a block; not every network has a gate
WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter.json says. alpha: the adapter's output counts alpha / rank times; stride: tokens that a call may commit at most; chain:
    the inner width of its `dlm.adapters.chain`, 0 for none."""

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
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise InputError(f"an adapter has a rank from 1 and an alpha above 0, got {self.rank} and {self.alpha}")
        if self.stride < 2:
            raise InputError(f"a stride counts from 2: one token and at least one mask; got {self.stride}")
        if self.chain < 0:
            raise InputError(f"the inner width of a chain counts from 0, which is none; got {self.chain}")
        if not self.targets or set(self.targets) - set(TARGETS):
            raise InputError(f"adapter targets are some of {', '.join(TARGETS)}; got {', '.join(self.targets) or 'none'}")


class Adapter:
    """What every adapted layer of a network shares: the settings, and where the masks stand in the present call."""

    def __init__(self, config: AdapterConfig, mask_id: int) -> None:
        self.config, self.mask_id = config, mask_id
        self.masks_M: Tensor | None = None  # places of the masks in the flattened (B, Q); None without any
        self.alone = False  # nothing but masks is read
        self.gate_BQ1 = torch.zeros(0)  # 1.0 at masks, for compiled blocks
        self.joined = False  # its layers have met `adapt_together`, which compiled blocks rely on

    def begin(self, z_BQ: Tensor, pos_BQ: Tensor) -> None:
        """Called by the network before it reads z at these positions."""
        gate_BQ = (z_BQ == self.mask_id) & (pos_BQ > 0)
        masks_M, self.gate_BQ1 = gate_BQ.flatten().nonzero().squeeze(-1), gate_BQ[..., None].float()
        self.masks_M, self.alone = masks_M if len(masks_M) else None, len(masks_M) == z_BQ.numel()


class LoRALinear(nn.Linear):
    """y = W x, and at masks y = W x + alpha / R * B A x. W is the base's own; A (R, I) and B (O, R) are float32, B begins at zero."""

    def __init__(self, inputs: int, outputs: int, bias: bool, adapter: Adapter) -> None:
        super().__init__(inputs, outputs, bias, device="meta")
        self.adapter = adapter
        rank = adapter.config.rank
        self.scale = adapter.config.alpha / rank
        self.lora_A, self.lora_B = nn.Parameter(torch.empty(rank, inputs)), nn.Parameter(torch.zeros(outputs, rank))

    @classmethod
    def from_base(cls, base: nn.Linear, adapter: Adapter, rng: torch.Generator | None = None) -> LoRALinear:
        """Around the weights of `base`, which both then hold. rng: of A, on the CPU."""
        self = cls(base.in_features, base.out_features, base.bias is not None, adapter)
        self.weight, self.bias = base.weight, base.bias
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=rng)
        return self if base.weight is None else self.to(base.weight.device)  # quantised: the weights are elsewhere, on the CPU

    def to_base(self) -> nn.Linear:
        """The layer without its adapter, around the same weights."""
        return self._linear(self.weight)

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """A layer that does everywhere what this one does at masks: W + alpha / R * B A, in the base's dtype."""
        weight = self.weight + self.scale * (self.lora_B @ self.lora_A)
        return self._linear(nn.Parameter(weight.to(self.weight.dtype), requires_grad=False))

    def _linear(self, weight: Tensor) -> nn.Linear:
        base = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        base.weight, base.bias = cast(nn.Parameter, weight), self.bias
        return base

    def forward(self, x_BQI: Tensor) -> Tensor:
        return self.adapt(x_BQI, super().forward(x_BQI))

    def adapt(self, x_BQI: Tensor, y_BQO: Tensor) -> Tensor:
        """W x with the adapter's part added at masks."""
        masks_M = self.adapter.masks_M
        if masks_M is None:
            return y_BQO
        if self.adapter.alone:
            return y_BQO + F.linear(F.linear(x_BQI, self.lora_A.to(x_BQI.dtype)), self.scale * self.lora_B.to(x_BQI.dtype))
        x_MI = x_BQI.flatten(0, -2).index_select(0, masks_M)
        delta_MO = F.linear(F.linear(x_MI, self.lora_A.to(x_MI.dtype)), self.lora_B.to(x_MI.dtype))
        return y_BQO.flatten(0, -2).index_add(0, masks_M, delta_MO, alpha=self.scale).view_as(y_BQO)

    def adapt_together(self, layers: Sequence[nn.Linear], product: Any, x_BQI: Tensor, y_BQO: Tensor) -> Tensor:
        """What `adapt` does to each of the layers, whose outputs stand side by side in y: two products for all of them.

        product: keeps their matrices, as long as the adapter stays as it is.
        """
        masks_M = self.adapter.masks_M
        if masks_M is None:
            return y_BQO
        if torch.compiler.is_compiling():  # of few positions: all are adapted, which counts at masks
            *_, lora_A, lora_B = product.low_rank
            return y_BQO + self.adapter.gate_BQ1.to(y_BQO.dtype) * F.linear(F.linear(x_BQI, lora_A), lora_B)
        self.adapter.joined = True
        adapted = [layer for layer in layers if isinstance(layer, LoRALinear)]
        low = [matrix for layer in adapted for matrix in (layer.lora_A, layer.lora_B)]
        known = getattr(product, "low_rank", None)
        if known is None or [*map(id, known[0])] != [*map(id, low)] or known[1] != version(low):
            lora_A = torch.cat([layer.lora_A for layer in adapted])
            lora_B = torch.block_diag(  # type: ignore[no-untyped-call]
                *(layer.scale * layer.lora_B if layer in adapted else self.lora_B.new_zeros(layer.out_features, 0) for layer in layers)
            )
            product.low_rank = low, version(low), lora_A.to(x_BQI.dtype), lora_B.to(x_BQI.dtype)
        *_, lora_A, lora_B = product.low_rank
        if self.adapter.alone:
            return y_BQO + F.linear(F.linear(x_BQI, lora_A), lora_B)
        delta_MO = F.linear(F.linear(x_BQI.flatten(0, -2).index_select(0, masks_M), lora_A), lora_B)
        return y_BQO.flatten(0, -2).index_add(0, masks_M, delta_MO).view_as(y_BQO)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A network's state is its base's: the adapter has files of its own."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "lora_A"], destination[prefix + "lora_B"]


class MaskEmbedding(nn.Embedding):
    """The base's embedding with a row of the adapter's own (float32, begun as the base's) in place of the mask's."""

    def __init__(self, base: nn.Embedding, adapter: Adapter) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight, self.adapter = base.weight, adapter
        self.mask_row = nn.Parameter(base.weight[adapter.mask_id].detach().float().clone())

    def to_base(self) -> nn.Embedding:
        base = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        base.weight = self.weight
        return base

    def forward(self, z_BQ: Tensor) -> Tensor:
        x_BQD = super().forward(z_BQ)
        masks_M = self.adapter.masks_M
        if masks_M is None:
            return x_BQD
        if self.adapter.alone:
            return self.mask_row.to(x_BQD.dtype).expand_as(x_BQD)
        rows_MD = self.mask_row.to(x_BQD.dtype).expand(len(masks_M), -1)
        return x_BQD.flatten(0, 1).index_copy(0, masks_M, rows_MD).view_as(x_BQD)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "mask_row"]


def attach(network: Transformer, config: AdapterConfig, mask_id: int, *, seed: int = 0) -> Adapter:
    """Put a fresh adapter, which changes nothing yet, into every block and freeze the base; a former adapter goes."""
    detach(network)
    network.requires_grad_(False)
    adapter, rng = Adapter(config, mask_id), torch.Generator().manual_seed(seed)
    for block in network.blocks:
        for part in (block.attention, block.mlp):
            for name in config.targets:
                if isinstance(layer := getattr(part, name, None), nn.Linear):
                    setattr(part, name, LoRALinear.from_base(layer, adapter, rng))
    network.embed = MaskEmbedding(network.embed, adapter)
    network.adapter = adapter
    if config.chain:
        network.chain = Chain(config.stride - 1, network.config.width, config.chain, rng).to(network.device)
    return adapter


def detach(network: Transformer) -> None:
    """The base again, its weights where they were."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear | MaskEmbedding):
                setattr(module, name, child.to_base())
    network.adapter = network.chain = None


def adapter_state(network: Transformer) -> dict[str, Tensor]:
    """The tensors of the adapter by name; a change of one is a change of the adapter."""
    return {
        name: p.detach()
        for name, p in network.named_parameters()
        if name.endswith((".lora_A", ".lora_B", ".mask_row")) or name.startswith("chain.")
    }


@torch.no_grad()
def fingerprint(network: Transformer) -> str:
    """sha256 over names, shapes and bytes of the base's weights, 64 hex digits; an adapter does not count.

    In bfloat16, so that a base loaded in float32 and in bfloat16 is the same base.
    """
    if network.quantized:
        raise InputError("the weights are rounded to int8, and an adapter names those before: load both at once, with --adapter")
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
