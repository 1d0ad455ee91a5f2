"""LLaDA-MoE-7B-A1B (inclusionAI, `modeling_lladamoe.py`): Llama's names, a norm of q and k, experts chosen by a softmax.

Its model_type is that of LLaDA. The weights of the chosen experts are not normalised, whatever `norm_topk_prob` says: the reference does
not read it.
"""

from __future__ import annotations

from typing import Any

from dlm.errors import InputError
from dlm.formats import huggingface
from dlm.formats.families.record import Config, Family
from dlm.formats.keys import require
from dlm.formats.names import Names
from dlm.models.config import ExpertsConfig, TransformerConfig

EXPERTS = {f"mlp.experts.*.{part}_proj": f"mlp.experts.*.{part}" for part in ("gate", "up", "down")}
NAMES = Names(
    outside=huggingface.NAMES.outside,
    layers="model.layers.",
    inside={**huggingface.NAMES.inside, **EXPERTS, "mlp.gate": "mlp.router"},
)
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "clip_qkv": (None,),
    "rope_scaling": (None,),
    "partial_rotary_factor": (1, None),
    "moe_router_score_function": ("softmax", None),
    "moe_router_enable_expert_bias": (False, None),
    "router_num_group": (None, 0, 1),
    "routed_scaling_factor": (1, None),
    "shared_expert_intermediate_size": (None, 0),
}


def shape(config: Config) -> TransformerConfig:
    require(config, SUPPORTED)
    if config.get("moe_layer_freq") not in (None, 1, [1] * config["num_hidden_layers"]):
        raise InputError(f"moe_layer_freq = {config['moe_layer_freq']!r} is not supported (only layers that all have experts)")
    return TransformerConfig(
        vocab_size=config["vocab_size"],
        window=config["max_position_embeddings"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or 0,
        width=config["hidden_size"],
        head_dim=config.get("head_dim") or 0,
        mlp="swiglu",
        attention="full",
        rope_base=float(config["rope_theta"]),
        norm_eps=config["rms_norm_eps"],
        qk_norm=bool(config.get("qk_layernorm", True)),
        tied=bool(config.get("tie_word_embeddings", False)),
        experts=ExpertsConfig(config["num_experts"], config["num_experts_per_tok"], config["expert_intermediate_size"]),
    )


LLADA_MOE = Family(
    name="llada-moe",
    architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
    keys=("num_experts",),
    names=NAMES,
    shape=shape,
    mask_texts=("<|mask|>", "<|mdm_mask|>"),
    mask_id=156_895,
    stop_texts=("<|endoftext|>", "<|role_end|>"),
    harmless=("dense_intermediate_size", "norm_topk_prob", "router_topk_group"),  # of no layer; not read by the reference; of one group
    preset={"sampler": "llada", "steps": 256, "block_length": 32, "temperature": 0.0},
)
