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
from dlm.formats.keys import HARMLESS, Keys, require, told
from dlm.formats.names import Names
from dlm.formats.native import CONVERTIBLE, KINDS, ModelConfig, Ready
from dlm.formats.stored import Stored
from dlm.models.config import TransformerConfig
from dlm.models.rope import frequencies
from dlm.models.transformer import Transformer
from dlm.text import special_tokens
from dlm.text.chat import ChatTemplate
from dlm.text.tokenizer import Tokenizer
from dlm.text.tokenizer import read as read_tokenizer

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
MORE_OF_YARN = ("mscale", "mscale_all_dim", "truncate")
ROPES = ("default", "linear", "dynamic", "longrope", *SCALINGS)
FULL, SLIDING = "full_attention", "sliding_attention"
KV_HEADS = 32  # of a Qwen2 or Qwen3 whose config does not say, as in transformers
OLD_NAMES = {"llama": "LLaMAForCausalLM"}
ONLY: dict[str, tuple[Any, ...]] = {  # keys with values that change nothing; any other value would
    "hidden_act": ("silu", "swish"),
    "activation": ("silu", "swiglu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "is_decoder": (True, False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0, None),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "embedding_multiplier": (1.0, None),
    "residual_multiplier": (1.0, None),
    "attention_multiplier": (None,),
    "logits_scaling": (1.0, None),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
}


@dataclass(frozen=True)
class Base:
    """A converted checkpoint: the parts of a `LanguageModel`. defaults: of generation_config.json, eos_token_id among them."""

    network: Transformer
    config: ModelConfig
    tokenizer: Tokenizer
    defaults: dict[str, Any]
    chat: ChatTemplate


def read_config(data: Mapping[str, Any], where: str) -> TransformerConfig:
    """The backbone of a Hugging Face config.json, mask included. InputError for an unsupported one and for an unknown key."""
    kind = data.get("model_type")
    if kind not in CONVERTIBLE:
        raise InputError(f"{where} is a checkpoint of kind {kind!r}; dlm converts {', '.join(CONVERTIBLE)}")
    _check_architecture(data.get("architectures"), kind, where)
    keys = Keys(data)
    try:
        shape = read_shape(keys, kind)
    except InputError as error:
        raise InputError(f"{where}: {kind} checkpoint: {error}") from None
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"does not describe a model ({error})"
        raise InputError(f"{where}: its config of kind {kind} {what}") from None
    keys.refuse_unread(where, HARMLESS)
    return shape


def _check_architecture(named: Any, kind: str, where: str) -> None:
    """InputError for a class of another name: it may compute something else from the same keys and tensors."""
    own = f"{kind.capitalize()}ForCausalLM"
    if named and own not in named and OLD_NAMES.get(kind) not in named:
        raise InputError(f"{where} is of the architecture {told(named)}, which may compute something else than {own}, the one that is read")


def read_shape(keys: Keys, kind: str, *, is_causal: tuple[bool | None, ...] = (None, True)) -> TransformerConfig:
    """The backbone of the keys of a `kind`, mask included. is_causal: values of that key which say what is done anyway.

    InputError for what the backbone does not have; KeyError, TypeError, ValueError or ArithmeticError for what is no config.
    """
    if keys.get("quantization_config") is not None:
        raise InputError("one with quantized weights: take the unquantized one, or a GGUF file")
    require(keys, ONLY)
    if (stated := keys.get("is_causal")) not in is_causal:
        way = "no autoregressive model: --family NAME reads it as a diffusion model" if True in is_causal else "no diffusion model"
        raise InputError(f"is_causal = {told(stated)} makes it {way}")
    window, heads, width = keys.whole("max_position_embeddings"), keys.whole("num_attention_heads"), keys.whole("hidden_size")
    layers, head_dim = keys.whole("num_hidden_layers", most=TransformerConfig.MOST), _head_dim(keys, kind, width // heads)
    sliding_window, sliding_layers = _sliding(keys, kind, layers, window)
    base, scaling, factors = _rope(keys, window, head_dim)
    return TransformerConfig(
        vocab_size=keys.whole("vocab_size") + 1,
        window=window,
        layers=layers,
        heads=heads,
        kv_heads=heads if keys.get("num_key_value_heads") is None and kind == "llama" else keys.whole("num_key_value_heads", KV_HEADS),
        width=width,
        head_dim=head_dim,
        mlp="swiglu",
        mlp_width=keys.whole("intermediate_size"),
        attention="causal",
        sliding_window=sliding_window,
        sliding_layers=sliding_layers,
        rope_base=base,
        rope_scaling=scaling,
        rope_factors=factors,
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2",
        tied=keys.flag("tie_word_embeddings"),
    )


def _head_dim(keys: Keys, kind: str, share: int) -> int:
    own = kind == "qwen3" or keys.get("head_dim") is not None
    found = keys.whole("head_dim", 128) if own else share
    if found > TransformerConfig.MOST:
        raise ValueError(f"heads of {found} dimensions")
    return found


def _sliding(keys: Keys, kind: str, layers: int, window: int) -> tuple[int, tuple[int, ...]]:
    """Positions that sliding attention reads, and the layers that have it, as transformers decides; none where no text is longer.

    InputError for a Llama that slides: its class does not read these keys, and a converted Mistral has them.
    """
    llama = kind == "llama"
    slides = keys.flag("use_sliding_window", llama and "sliding_window" in keys)
    first, types = keys.whole("max_window_layers", 0 if llama else 28, least=0), keys.get("layer_types")
    reach = keys.get("sliding_window", None if llama else 4096)
    reach = None if reach is None else keys.whole("sliding_window", 4096)
    if types is None:
        types = [SLIDING if slides and reach is not None and i >= first else FULL for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or not set(types) <= {SLIDING, FULL}:
        raise InputError(f"layer_types = {told(types)} is not supported (only {SLIDING!r} or {FULL!r} for each of {layers} layers)")
    found = tuple(i for i, one in enumerate(types) if one == SLIDING)
    if not found:
        return 0, ()
    if not slides or reach is None:
        raise InputError("layer_types has sliding layers that use_sliding_window and sliding_window do not let slide: make them agree")
    if reach >= window:
        return 0, ()
    if llama:
        raise InputError(f"attention that slides over {reach} tokens is not supported: transformers does not read it in a Llama")
    return reach, found


def _rope(keys: Keys, window: int, head_dim: int) -> tuple[float, tuple[float, ...], tuple[float, ...]]:
    """rope_base, rope_scaling and rope_factors of a config, in either form. Errors as of `read_shape`."""
    old, new = keys.get("rope_scaling"), keys.get("rope_parameters")
    base = keys.number("rope_theta", 10_000.0)
    if old and new and _normal(old, base) != _normal(new, base):
        raise InputError(f"rope_scaling = {told(old)} and rope_parameters = {told(new)} contradict each other: keep one")
    rope = old or new or Keys({})
    kind = rope.get("rope_type", rope.get("type", "default"))
    base, partial = rope.number("rope_theta", base), (rope.get("partial_rotary_factor"), keys.get("partial_rotary_factor"))
    before = rope.get("original_max_position_embeddings", window)
    before = keys.get("original_max_position_embeddings", before)  # wins in transformers
    if any(share not in (None, 1) for share in partial) or kind not in ROPES:
        raise InputError(f"rotary positions of kind {told(kind)} are not supported (read are {', '.join(ROPES)}, of whole heads)")
    scaling: tuple[float, ...] = ()
    factors: tuple[float, ...] = ()
    if kind in SCALINGS:
        numbers = {key: rope[key] for key in (*SCALINGS[kind], *(MORE_OF_YARN if kind == "yarn" else ())) if key in rope}
        scaling = rope_scaling({**numbers, "rope_type": kind, "original_max_position_embeddings": before}, window)
    elif kind == "linear":
        factors = (rope.number("factor"),)
    elif kind == "dynamic":  # as default up to max_position_embeddings, beyond which no text is read
        rope.number("factor")
    elif kind == "longrope":
        factors = _long(rope, before, window, head_dim)
    turns, amplitude = frequencies(head_dim, base, scaling, None, factors)
    if not bool(torch.isfinite(turns).all()) or not 0 < amplitude < math.inf:
        raise ValueError("its rotary positions are no finite numbers")
    return base, scaling, factors


def _normal(rope: Keys, base: float) -> dict[str, Any]:
    """Both forms of a config's rotary positions, to be compared; reads all of it."""
    found = dict(rope)
    kind = found.pop("type", "default")
    return {"rope_type": kind, "rope_theta": base} | found


def _long(rope: Keys, before: Any, window: int, head_dim: int) -> tuple[float, ...]:
    """The factors of LongRoPE where one list of them holds for every text of the window. InputError where two would."""
    short, long = (rope[f"{name}_factor"] for name in ("short", "long"))
    stretch, amplitude = rope.get("factor"), rope.get("attention_factor")
    stretch = window / before if stretch is None else rope.number("factor")
    amplitude = (1.0 if stretch <= 1 else 0.0) if amplitude is None else amplitude
    if amplitude != 1 or (before < window and short != long):
        raise InputError(f"LongRoPE beyond its first window of {before} tokens is not supported")
    if not isinstance(short, list) or len(short) != head_dim // 2:
        raise ValueError(f"LongRoPE has {head_dim // 2} factors, not {told(short)}")
    each = Keys({str(i): value for i, value in enumerate(short)})
    return tuple(each.number(name) for name in each)


def rope_scaling(rope: Mapping[str, Any], window: int) -> tuple[float, ...]:
    """The numbers of `dlm.models.rope` of a config's rope_parameters. KeyError for one without them, ValueError for a kind of YaRN."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return ()
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": window}
    numbers = Keys(defaults | {key: value for key, value in rope.items() if value is not None or key == "original_max_position_embeddings"})
    if kind == "yarn":
        if rope.get("truncate", True) is not True:
            raise ValueError("YaRN without truncation is not supported")
        numbers = Keys({"attention_factor": _amplitude(numbers), **numbers})
    found = tuple(numbers.number(key) for key in SCALINGS[kind])
    if kind == "llama3" and not found[1] < found[2]:
        raise ValueError("high_freq_factor is not above low_freq_factor")
    return found


def _amplitude(rope: Keys) -> float:
    """The factor of cosines and sines under YaRN, as transformers infers it where the config does not state it."""
    factor = rope.number("factor")

    def stretch(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    first, other = rope.get("mscale"), rope.get("mscale_all_dim")
    return stretch(first) / stretch(other) if first and other else stretch(1.0)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The Hugging Face config.json of a converted model. InputError for a network that no known architecture is."""
    n = config.network
    kind = {(False, False): "llama", (False, True): "qwen2", (True, False): "qwen3"}.get((n.qk_norm, n.qkv_bias))
    if n.axes or kind is None or n.mlp != "swiglu" or n.attention != "causal" or n.time_conditioning or n.conv:
        raise InputError(
            "only a causal network with SwiGLU, without short convolutions or axes, and either qk-norm or biases of q, k and v or neither,"
            " has a Hugging Face form: save it in our own"
        )
    rope: dict[str, Any] = {"rope_theta": n.rope_base, "rope_type": "default"}
    if n.rope_scaling:
        kind_of_rope, keys = next((kind, keys) for kind, keys in SCALINGS.items() if len(keys) == len(n.rope_scaling))
        rope |= {"rope_type": kind_of_rope} | dict(zip(keys, n.rope_scaling, strict=True))
        rope["original_max_position_embeddings"] = int(n.rope_scaling[3])
    elif len(n.rope_factors) == 1:
        rope |= {"rope_type": "linear", "factor": n.rope_factors[0]}
    elif n.rope_factors:
        each = list(n.rope_factors)
        rope |= {"rope_type": "longrope", "short_factor": each, "long_factor": each, "factor": 1.0, "attention_factor": 1.0}
        rope["original_max_position_embeddings"] = n.window
    sliding = {
        "use_sliding_window": True,
        "sliding_window": n.sliding_window,
        "layer_types": [SLIDING if i in n.sliding_layers else FULL for i in range(n.layers)],
    }
    return (sliding if n.sliding_layers else {}) | {
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
    shape = shape.with_(tied=is_tied(stored, shape.tied))
    # a long text carries half a window into the next
    settings = {"objective": "autoregressive", "context": shape.window // 2, "family": data["model_type"]}
    config = ModelConfig(shape, shape.vocab_size - 1, start_token_id=start_token_id, **settings)
    return native.assemble(config, with_mask(stored), path, device=device, dtype=dtype, ready=ready), config


def is_tied(stored: dict[str, Stored], stated: bool) -> bool:
    """Whether head and embedding are one matrix.

    The file decides: a head that differs from the embedding stays, whatever config.json says.
    """
    if not stated or "head.weight" not in stored:
        return stated
    head, embedding = stored["head.weight"], stored.get("embed.weight", stored["head.weight"])
    return head.shape == embedding.shape and torch.equal(head.read(), embedding.read())


def load(path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, ready: Ready | None = None) -> Base:
    """Read a directory with config.json, safetensors and tokenizer.json, or a GGUF file. InputError for an unsupported one."""
    if path.suffix == ".gguf":
        from dlm.formats import gguf

        file = gguf.read(path)
        data, stored, chat, start = file.config, file.stored, file.chat, file.start_token_id
        tokenizer = Tokenizer(file.inner, data["vocab_size"])
        defaults = {"eos_token_id": stops(file.stops, None, chat, tokenizer, path)}
    else:
        data = read_json(path / "config.json")
        read_config(data, str(path))  # before gigabytes of weights are
        chat, inner = ChatTemplate.load(path), read_tokenizer(path)
        special_tokens.mark(inner, chat.tokens)
        tokenizer = Tokenizer(inner, data["vocab_size"])
        defaults = native.read_defaults(path)
        defaults["eos_token_id"] = stops(defaults.get("eos_token_id"), data.get("eos_token_id"), chat, tokenizer, path)
        start = start_token(tokenizer, path)
        stored = NAMES.renamed(native.weights(path, copied=ready is not None), path, KINDS)
    network, config = assemble(data, stored, path, start, device=device, dtype=dtype, ready=ready)
    return Base(network, config, tokenizer, defaults, chat)


def start_token(tokenizer: Tokenizer, where: Path) -> int | None:
    """The id that the tokenizer puts before every text. InputError for several, of which a network of ours reads one."""
    before = special_tokens.around(tokenizer.inner, where)[0]
    if len(before) > 1:
        raise InputError(f"{where} has a tokenizer that puts {len(before)} tokens before every text: dlm reads one at most")
    return before[0] if before else None


def stops(generation: Any, config: Any, chat: ChatTemplate, tokenizer: Tokenizer, where: Path) -> list[int]:
    """Ids that end a text, from all that say so: generation_config.json and config.json (or a GGUF file), the tokenizer's eos_token, the
    tokens that it puts after a text, and the one that the chat template puts after an answer. InputError for ids that are none.
    """
    said = [*special_tokens.as_ids(generation, str(where)), *special_tokens.as_ids(config, str(where))]
    ends = [tokenizer.control.get(chat.tokens.get("eos_token", "")), chat.end_of_turn(tokenizer)]
    after = special_tokens.around(tokenizer.inner, where)[1]
    return sorted({*said, *after, *(one for one in ends if one is not None)})


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
