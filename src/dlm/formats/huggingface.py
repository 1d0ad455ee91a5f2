"""Llama, Qwen2 and Qwen3 checkpoints in our backbone, and back: a Hugging Face directory or a GGUF file. Nothing is unpickled.

A base has no mask; it gets one as the id after its own. The mask's embedding begins as the mean of the others, so that it lies
where the network has seen inputs; its logit is never read. Logits of the base's own tokens are those of the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.files import read_json
from dlm.formats import native
from dlm.formats.names import Names
from dlm.formats.native import CONVERTIBLE, KINDS, ModelConfig, Ready
from dlm.formats.stored import Stored
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer
from dlm.text.chat import ChatTemplate
from dlm.text.tokenizer import Tokenizer

NAMES = Names(
    outside={"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head"},
    layers="model.layers.",
    inside={
        "input_layernorm": "attention_norm",
        "self_attn.q_proj": "attention.q",
        "self_attn.k_proj": "attention.k",
        "self_attn.v_proj": "attention.v",
        "self_attn.o_proj": "attention.out",
        "self_attn.q_norm": "attention.q_norm",
        "self_attn.k_norm": "attention.k_norm",
        "post_attention_layernorm": "mlp_norm",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
    },
)
SCALINGS = {  # the numbers of a config's rope_parameters, in the order of `dlm.models.rope`
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "attention_factor"),
}


@dataclass(frozen=True)
class Base:
    """A converted checkpoint: the parts of a `LanguageModel`. defaults: of generation_config.json, eos_token_id among them."""

    network: Transformer
    config: ModelConfig
    tokenizer: Tokenizer
    defaults: dict[str, Any]
    chat: ChatTemplate


def read_config(data: dict[str, Any], where: str) -> TransformerConfig:
    """The backbone of a Hugging Face config.json, mask included. InputError for an unsupported one."""

    def unsupported(what: str) -> InputError:
        return InputError(f"{where}: dlm does not read a {data.get('model_type')} checkpoint with {what}")

    kind = data.get("model_type")
    if kind not in CONVERTIBLE:
        raise InputError(f"{where} is a checkpoint of kind {kind!r}; dlm converts {', '.join(CONVERTIBLE)}")
    if data.get("quantization_config"):
        raise unsupported("quantized weights: take the unquantized one, or a GGUF file")
    if data.get("hidden_act", "silu") != "silu":
        raise unsupported(f"the activation {data['hidden_act']!r}")
    if data.get("attention_bias") or data.get("mlp_bias"):
        raise unsupported("biases of its output and MLP projections")
    rope = {**(data.get("rope_scaling") or {}), **(data.get("rope_parameters") or {})}
    rope_kind = rope.get("rope_type", rope.get("type", "default"))
    if rope_kind not in ("default", *SCALINGS) or rope.get("partial_rotary_factor", 1.0) != 1.0:
        known = ", ".join(["default", *SCALINGS])
        raise unsupported(f"rotary positions of kind {rope_kind!r} (read are {known}, of whole heads)")
    try:
        window, heads = data["max_position_embeddings"], data["num_attention_heads"]
        slides = data.get("use_sliding_window") and (data.get("sliding_window") or window) < window
        if slides and data.get("max_window_layers", 0) < data["num_hidden_layers"]:
            raise unsupported(f"attention that slides over {data['sliding_window']} tokens")
        return TransformerConfig(
            vocab_size=data["vocab_size"] + 1,
            window=window,
            layers=data["num_hidden_layers"],
            heads=heads,
            kv_heads=data.get("num_key_value_heads") or heads,
            width=data["hidden_size"],
            head_dim=data.get("head_dim") or (128 if kind == "qwen3" else data["hidden_size"] // heads),
            mlp="swiglu",
            mlp_width=data["intermediate_size"],
            attention="causal",
            rope_base=float(rope.get("rope_theta", data.get("rope_theta", 10_000.0))),
            rope_scaling=rope_scaling(rope, window),
            norm_eps=data.get("rms_norm_eps", 1e-6),
            qk_norm=kind == "qwen3",
            qkv_bias=kind == "qwen2",
            tied=bool(data.get("tie_word_embeddings", False)),
        )
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"does not describe a model ({error})"
        raise InputError(f"{where}: its config of kind {kind} {what}") from None


def rope_scaling(rope: Mapping[str, Any], window: int) -> tuple[float, ...]:
    """The numbers of `dlm.models.rope` of a config's rope_parameters. KeyError for one without them, ValueError for a kind of YaRN."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return ()
    numbers = {"beta_fast": 32.0, "beta_slow": 1.0} | {key: value for key, value in rope.items() if value is not None}
    if kind == "yarn":
        if not numbers.get("truncate", True):
            raise ValueError("YaRN without truncation is not supported")
        numbers.setdefault("original_max_position_embeddings", window)
        numbers.setdefault("attention_factor", _amplitude(numbers))
    return tuple(float(numbers[key]) for key in SCALINGS[kind])


def _amplitude(rope: Mapping[str, Any]) -> float:
    """The factor of cosines and sines under YaRN, as transformers infers it where the config does not state it."""

    def stretch(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    first, other = rope.get("mscale"), rope.get("mscale_all_dim")
    return stretch(first) / stretch(other) if first and other else stretch(1.0)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The Hugging Face config.json of a converted model. InputError for a network that no known architecture is."""
    n = config.network
    kind = {(False, False): "llama", (False, True): "qwen2", (True, False): "qwen3"}.get((n.qk_norm, n.qkv_bias))
    if kind is None or n.mlp != "swiglu" or n.attention != "causal" or n.time_conditioning or n.conv:
        raise InputError(
            "only a causal network with SwiGLU, without short convolutions, and either qk-norm or biases of q, k and v or neither, has a"
            " Hugging Face form: save it in our own"
        )
    rope: dict[str, Any] = {"rope_theta": n.rope_base, "rope_type": "default"}
    if n.rope_scaling:
        kind_of_rope, keys = next((kind, keys) for kind, keys in SCALINGS.items() if len(keys) == len(n.rope_scaling))
        rope |= {"rope_type": kind_of_rope} | dict(zip(keys, n.rope_scaling, strict=True))
        rope["original_max_position_embeddings"] = int(n.rope_scaling[3])
    return {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "vocab_size": n.vocab_size - 1,
        "hidden_size": n.width,
        "intermediate_size": n.mlp_width,
        "num_hidden_layers": n.layers,
        "num_attention_heads": n.heads,
        "num_key_value_heads": n.kv_heads,
        "head_dim": n.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": n.window,
        "rms_norm_eps": n.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": n.tied,
    }


def with_mask(stored: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors with a row for the mask at the end of embedding and head."""

    def longer(rows: Tensor) -> Tensor:
        return torch.cat([rows, rows.float().mean(0, keepdim=True).to(rows.dtype)])

    return stored | {name: stored[name].with_row(longer) for name in {"embed.weight", "head.weight", "head.bias"} & stored.keys()}


def assemble(
    data: dict[str, Any],
    stored: dict[str, Stored],
    path: Path,
    start_token_id: int | None,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    ready: Ready | None = None,
) -> tuple[Transformer, ModelConfig]:
    """Network and config of a Hugging Face config.json and tensors in our names."""
    shape = read_config(data, str(path))
    layers = {name.split(".")[1] for name in stored if name.startswith("blocks.")}
    if len(layers) != shape.layers:
        raise InputError(f"{path} says that it has {shape.layers} layers, its weights do not fit: they have {len(layers)}")
    # a long text carries half a window into the next
    settings = {"objective": "autoregressive", "context": shape.window // 2, "family": data["model_type"]}
    config = ModelConfig(shape, shape.vocab_size - 1, start_token_id=start_token_id, **settings)
    return native.assemble(config, with_mask(stored), path, device=device, dtype=dtype, ready=ready), config


def load(path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, ready: Ready | None = None) -> Base:
    """Read a directory with config.json, safetensors and tokenizer.json, or a GGUF file. InputError for an unsupported one."""
    if path.suffix == ".gguf":
        from dlm.formats import gguf

        file = gguf.read(path)
        data, stored, chat, start = file.config, file.stored, file.chat, file.start_token_id
        tokenizer, defaults = Tokenizer(file.inner, data["vocab_size"]), {"eos_token_id": file.stops}
    else:
        data = read_json(path / "config.json")
        read_config(data, str(path))  # before gigabytes of weights are
        tokenizer = Tokenizer.load(path, data["vocab_size"])
        defaults = native.read_defaults(path)
        chat = ChatTemplate.load(path)
        defaults["eos_token_id"] = stops(defaults.get("eos_token_id"), data.get("eos_token_id"), chat, tokenizer)
        begins = tokenizer.inner.encode("", add_special_tokens=True).ids
        start = begins[0] if begins else None
        stored = NAMES.renamed(native.weights(path, copied=ready is not None), path, KINDS)
    network, config = assemble(data, stored, path, start, device=device, dtype=dtype, ready=ready)
    return Base(network, config, tokenizer, defaults, chat)


def stops(generation: Any, config: Any, chat: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """Ids that end a text: of generation_config.json, else config.json; and the tokenizer's eos_token, which ends a turn of a chat."""
    found = generation if generation is not None else config
    ids = {found} if isinstance(found, int) else set(found or [])
    turn = tokenizer.control.get(chat.tokens.get("eos_token", ""))
    return sorted(i for i in ids | {turn} if isinstance(i, int))


def to_hugging_face(
    network: Transformer,
    config: ModelConfig,
    directory: str | Path,
    *,
    files: dict[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write what transformers and llama.cpp read: the network without its mask. files: tokenizer.json and others, by name."""
    data = write_config(config)
    tied = {"head.weight"} if config.network.tied else set()
    state = {NAMES.theirs(name): tensor for name, tensor in network.state_dict().items() if name not in tied}
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & state.keys():
        state[name] = state[name][:-1].clone()  # safetensors writes whole storages alone
    native.write(directory, state, data, files=files or {}, dtype=dtype)
