"""LLaDA-8B, Base, Instruct and 1.5 (ML-GSAI/LLaDA; Nie et al. 2502.09992): OLMo's keys and names, no biases, a head of its own.

LLaDA-MoE has the same model_type and another architecture, LLaDAMoEModelLM (`llada_moe.py`).
"""

from __future__ import annotations

from typing import Any

from dlm.formats.families.record import Config, Family
from dlm.formats.keys import require
from dlm.formats.names import Names
from dlm.models.config import TransformerConfig

NAMES = Names(
    outside={"model.transformer.wte": "embed", "model.transformer.ln_f": "norm", "model.transformer.ff_out": "head"},
    layers="model.transformer.blocks.",
    inside={
        "attn_norm": "attention_norm",
        "q_proj": "attention.q",
        "k_proj": "attention.k",
        "v_proj": "attention.v",
        "attn_out": "attention.out",
        "ff_norm": "mlp_norm",
        "ff_proj": "mlp.gate",
        "up_proj": "mlp.up",
        "ff_out": "mlp.down",
    },
)
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "activation_type": ("silu", "swiglu"),
    "layer_norm_type": ("rms",),
    "block_group_size": (1,),
    "rope": (True,),
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "input_emb_norm": (False, None),
    "scale_logits": (False, None),
    "clip_qkv": (None,),
    "include_bias": (False, None),
    "include_qkv_bias": (False, None),
    "bias_for_layer_norm": (False, None),
    "multi_query_attention": (None, False),
    "layer_norm_with_affine": (True, None),
    "rope_full_precision": (True, None),
}


def shape(config: Config) -> TransformerConfig:
    require(config, SUPPORTED)
    return TransformerConfig(
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        window=config["max_sequence_length"],
        layers=config["n_layers"],
        heads=config["n_heads"],
        kv_heads=config.get("n_kv_heads") or config["n_heads"],
        width=config["d_model"],
        mlp="swiglu",
        mlp_width=config["mlp_hidden_size"],
        attention="full",
        rope_base=float(config["rope_theta"]),
        norm_eps=config["rms_norm_eps"],
        qk_norm=False,
        tied=bool(config.get("weight_tying", False)),
    )


LLADA = Family(
    name="llada",
    architectures=("LLaDAModelLM",),
    keys=("d_model", "n_layers"),
    names=NAMES,
    shape=shape,
    mask_texts=("<|mdm_mask|>",),
    stop_texts=("<|endoftext|>", "<|eot_id|>"),
    harmless=(
        "alibi_bias_max",
        "attention_layer_norm_with_affine",
        "flash_attention",
        "init_cutoff_factor",
        "init_device",
        "init_fn",
        "init_std",
        "mlp_ratio",
        "precision",
        "vocab_size",
    ),
    preset={"sampler": "llada", "steps": 256, "block_length": 32, "temperature": 0.0},
)
