"""LLaDA2.0 and 2.1, mini and flash (inclusionAI, `modeling_llada2_moe.py`): block diffusion with experts in groups and a shared one.

Each head is rotated in part; q, k and v are one matrix; the first layers are dense. 2.0 and 2.1 differ in training and sampler alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm.errors import InputError
from dlm.formats.families.llada_moe import EXPERTS
from dlm.formats.families.record import Config, Family
from dlm.formats.keys import require
from dlm.formats.names import Names
from dlm.formats.stored import Stored
from dlm.models.config import ExpertsConfig, TransformerConfig

BLOCK_LENGTH = 32  # of the reference's `generate`: no key of the config says it
MOST_STEPS = 32_768  # 32 for each block of the longest text, of which each writes a mask at least, as the reference's steps do
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_bias": (False, None),
    "use_qkv_bias": (False, None),
    "use_sliding_window": (False, None),
    "use_rmsnorm": (True, None),
    "norm_head": (False, None),
    "norm_softmax": (False, None),
    "using_split_qkv_in_self_attention": (False, None),
    "rope_scaling": (None,),
    "score_function": ("sigmoid", None),
    "moe_router_enable_expert_bias": (True, None),
    "norm_topk_prob": (True, None),
    "router_dtype": ("fp32", None),
}


@dataclass(frozen=True)
class JoinedNames(Names):
    """Names of which one, `attention.qkv`, stands for the rows of q, k and v one after another."""

    def renamed(self, state: dict[str, Stored], where: Path, kinds: str) -> dict[str, Stored]:
        found = super().renamed(state, where, kinds)
        for name in [name for name in found if name.endswith(".attention.qkv.weight")]:
            layer, joined = name.removesuffix("qkv.weight"), found.pop(name)
            inner = found[f"{layer}out.weight"].shape[-1] if f"{layer}out.weight" in found else 0
            kv_inner = (joined.shape[0] - inner) // 2
            if not inner or kv_inner < 1:
                raise InputError(f"the weights in {where} do not fit together (first: {name})")
            for part, first, last in (("q", 0, inner), ("k", inner, inner + kv_inner), ("v", inner + kv_inner, joined.shape[0])):
                found[f"{layer}{part}.weight"] = joined.rows(first, last)
        return found


NAMES = JoinedNames(
    outside={"model.word_embeddings": "embed", "model.norm": "norm", "lm_head": "head"},
    layers="model.layers.",
    inside={
        "input_layernorm": "attention_norm",
        "attention.query_key_value": "attention.qkv",
        "attention.query_layernorm": "attention.q_norm",
        "attention.key_layernorm": "attention.k_norm",
        "attention.dense": "attention.out",
        "post_attention_layernorm": "mlp_norm",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
        **EXPERTS,
        "mlp.gate": "mlp.router",
        "mlp.gate.expert_bias": "mlp.router.correction",
        "mlp.shared_experts.gate_proj": "mlp.shared.gate",
        "mlp.shared_experts.up_proj": "mlp.shared.up",
        "mlp.shared_experts.down_proj": "mlp.shared.down",
    },
)


def shape(config: Config) -> TransformerConfig:
    require(config, SUPPORTED)
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    rotary_dim = int(head_dim * config.get("partial_rotary_factor", 1.0))
    require(config, {"rotary_dim": (rotary_dim, None)})
    experts = ExpertsConfig(
        count=config["num_experts"],
        per_token=config["num_experts_per_tok"],
        width=config["moe_intermediate_size"],
        shared_width=config["moe_intermediate_size"] * (config.get("num_shared_experts") or 0),
        first_layer=config["first_k_dense_replace"],
        score="sigmoid",
        normalised=True,
        scaling=config["routed_scaling_factor"],
        correction=True,
        groups=config["n_group"],
        groups_per_token=config["topk_group"],
    )
    return TransformerConfig(
        vocab_size=config["vocab_size"],
        window=config["max_position_embeddings"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        width=width,
        head_dim=head_dim,
        mlp="swiglu",
        mlp_width=config["intermediate_size"],
        attention="block_causal",
        block_length=BLOCK_LENGTH,
        rope_base=float(config["rope_theta"]),
        rotary_dim=rotary_dim,
        norm_eps=config["rms_norm_eps"],
        qk_norm=bool(config.get("use_qk_norm", True)),
        tied=bool(config.get("tie_word_embeddings", False)),
        experts=experts,
    )


LLADA2 = Family(
    name="llada2",
    architectures=("LLaDA2MoeModelLM",),
    keys=("num_experts", "first_k_dense_replace"),
    names=NAMES,
    shape=shape,
    mask_texts=("<|mask|>",),
    mask_id=156_895,
    phase="zero",
    stop_texts=("<|endoftext|>", "<|role_end|>"),
    harmless=("max_window_layers", "sliding_window"),  # none slides
    preset={"sampler": "llada2", "steps": MOST_STEPS, "block_length": BLOCK_LENGTH, "temperature": 0.0},
)
