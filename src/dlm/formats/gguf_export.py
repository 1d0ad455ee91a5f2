"""Networks of ours as GGUF files, named, permuted and described as llama.cpp's converter does (ggml-org/llama.cpp convert_hf_to_gguf.py).

Architectures: llama, qwen2 and qwen3 of autoregressive networks; llada, dream and llada-moe of masked diffusion with full attention.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers.models import BPE
from torch import Tensor

from dlm.errors import InputError, unknown
from dlm.files import replacing
from dlm.formats import gguf
from dlm.formats.native import MASKLESS, ModelConfig
from dlm.models.config import ExpertsConfig, TransformerConfig
from dlm.models.rope import LLAMA3, frequencies
from dlm.models.transformer import Transformer
from dlm.text.chat import ChatTemplate
from dlm.text.tokenizer import Tokenizer

TYPES = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1"}  # of matrices; the rest stays float32
GROUP = 32  # weights of a row that share a scale in the quantized types
CAUSAL = {(False, False): "llama", (False, True): "qwen2", (True, False): "qwen3"}  # by qk_norm and qkv_bias
FULL = {(False, False): "llada", (False, True): "dream"}
PRES = ("gpt-2", "smollm", "llama-bpe", "qwen2")


def architecture(config: ModelConfig) -> str:
    """general.architecture of the file. InputError with the reason for a network that llama.cpp has none for."""
    n = config.network
    lacking = [
        (type(n) is not TransformerConfig, "a network other than the backbone"),
        (n.attention not in ("causal", "full"), f"{n.attention} attention"),
        (bool(getattr(n, "conv", 0)), "short convolutions"),
        (bool(getattr(n, "axes", ())), "positions on several axes"),
        (bool(n.sliding_layers), "attention that slides in some layers"),
        (n.time_conditioning, "a noise level that the network reads"),
        (getattr(n, "mlp", "swiglu") != "swiglu", "an MLP that is no SwiGLU"),
        (getattr(n, "embed_norm", False), "a norm of its embeddings"),
        (getattr(n, "rotary_dim", 0) not in (0, getattr(n, "head_dim", 0)), "rotary positions of a part of each head"),
        (len(getattr(n, "rope_scaling", ())) not in (0, LLAMA3), "rotary positions by YaRN"),
        (n.attention == "full" and config.noise != _plain(config.noise), f"noise of kind {config.noise.get('process')}"),
        (n.attention == "causal" and config.objective != "autoregressive", "causal attention of a diffusion model"),
    ]
    for lacks, what in lacking:
        if lacks:
            raise InputError(f"no GGUF architecture has {what}: export it with --to hf")
    form = (n.qk_norm, n.qkv_bias)
    if n.experts is not None:
        usual = ExpertsConfig(n.experts.count, n.experts.per_token, n.experts.width)
        kind = "llada-moe" if n.experts == usual and n.attention == "full" and form == (True, False) else None
    else:
        kind = (CAUSAL if n.attention == "causal" else FULL).get(form)
    if kind is None:
        norm, bias, experts = ("with" if has else "without" for has in (n.qk_norm, n.qkv_bias, n.experts is not None))
        what = f"{n.attention} attention {norm} a norm of q and k, {bias} biases of q, k and v, and {experts} these experts"
        raise InputError(f"no GGUF architecture has {what}: export it with --to hf")
    if kind != "llama" and (n.rope_scaling or len(n.rope_factors) > 1):
        raise InputError(f"the GGUF architecture {kind} has no rotary positions that are divided one by one: export it with --to hf")
    return kind


def _plain(noise: dict[str, Any]) -> dict[str, Any]:
    """The noise that a file of a masked diffusion model stands for."""
    return {"process": "masked", "schedule": "linear"} | ({"tokens": noise["tokens"]} if "tokens" in noise else {})


def write(
    network: Transformer,
    config: ModelConfig,
    tokenizer: Tokenizer,
    path: Path,
    *,
    stops: frozenset[int] = frozenset(),
    chat: ChatTemplate | None = None,
    dtype: str = "float32",
) -> str:
    """Write the file, return its architecture. stops: tokens that end a text; dtype: of matrices, one of `TYPES`.

    The mask of a base that has none is left out. InputError for a network or tokenizer that has no form there, nothing being written.
    """
    try:
        import gguf as package
    except ImportError:
        raise InputError("GGUF files need the convert extra: pip install 'dlm[convert]'") from None
    if dtype not in TYPES:
        raise unknown("dtype", dtype, TYPES)
    kind = architecture(config)
    rows = config.network.vocab_size - (config.family in MASKLESS)
    with replacing(path) as temporary:
        writer = package.GGUFWriter(temporary, kind)
        _write_sizes(writer, config)
        _write_vocabulary(writer, config, tokenizer, chat or ChatTemplate(), stops, rows)
        for name, tensor in _tensors(network, kind, rows):
            data = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
            kept = package.GGMLQuantizationType[_stored_as(name, data.shape, dtype)]
            writer.add_tensor(name, package.quantize(data, kept), raw_dtype=kept)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return kind


def _stored_as(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """The type of a tensor: few numbers, and rows that no whole groups make, stay float32."""
    small = len(shape) < 2 or "ffn_gate_inp" in name or (dtype.startswith("q") and shape[-1] % GROUP)
    return "F32" if small else TYPES[dtype]


def _write_sizes(writer: Any, config: ModelConfig) -> None:
    n = config.network
    writer.add_context_length(n.window)
    writer.add_embedding_length(n.width)
    writer.add_block_count(n.layers)
    writer.add_head_count(n.heads)
    writer.add_head_count_kv(n.kv_heads)
    writer.add_key_length(n.head_dim)
    writer.add_value_length(n.head_dim)
    writer.add_rope_dimension_count(n.head_dim)
    writer.add_rope_freq_base(n.rope_base)
    writer.add_layer_norm_rms_eps(n.norm_eps)
    if len(n.rope_factors) == 1:
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(n.rope_factors[0])
    if n.experts is None:
        writer.add_feed_forward_length(n.mlp_width)
    else:
        writer.add_expert_count(n.experts.count)
        writer.add_expert_used_count(n.experts.per_token)
        writer.add_expert_feed_forward_length(n.experts.width)
    if n.attention == "full":
        writer.add_causal_attention(False)
        writer.add_diffusion_shift_logits(config.shift)


def _write_vocabulary(writer: Any, config: ModelConfig, tokenizer: Tokenizer, chat: ChatTemplate, stops: frozenset[int], rows: int) -> None:
    """The tokenizer, its control tokens and the chat template. rows: of the embedding; those without a token get unused ones."""
    inner = tokenizer.inner
    added = inner.get_added_tokens_decoder()
    texts = {i: text for text, i in inner.get_vocab(with_added_tokens=True).items()}
    kinds = {i: gguf.NORMAL for i in texts} | {i: gguf.CONTROL if token.special else gguf.USER_DEFINED for i, token in added.items()}
    if config.mask_token_id < rows:
        texts.setdefault(config.mask_token_id, "<|mask|>")
        kinds.setdefault(config.mask_token_id, gguf.CONTROL)
        writer.add_mask_token_id(config.mask_token_id)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words(inner))
    writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types([kinds.get(i, gguf.UNUSED) for i in range(rows)])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(inner.to_str())["model"]["merges"]])
    named = {name: inner.token_to_id(text) for name, text in chat.tokens.items()}
    start = config.start_token_id if config.objective == "autoregressive" else None
    if (first := named.get("bos_token") if start is None else start) is not None:
        writer.add_bos_token_id(first)
    writer.add_add_bos_token(start is not None)
    end = named.get("eos_token")
    ends = sorted(stops, key=lambda i: (i != end, i)) if end in stops or end is None else [end, *sorted(stops)]
    if len(ends) > len(gguf.STOPS):
        raise InputError(f"a GGUF file names {len(gguf.STOPS)} tokens that end a text, this model has {len(ends)}: {ends}")
    for name, i in zip(gguf.STOPS, ends, strict=False):
        getattr(writer, f"add_{name}_token_id")(i)
    if chat.source:
        writer.add_chat_template(chat.source)


def words(inner: tokenizers.Tokenizer) -> str:
    """tokenizer.ggml.pre: the name of the words that a byte-level BPE begins with. InputError for others, and for other models."""
    found = json.loads(inner.to_str())
    if found["model"]["type"] == "BPE":
        for pre in PRES:
            told = json.loads(gguf.with_words(tokenizers.Tokenizer(BPE()), pre).to_str())
            ignores = bool(found["model"]["ignore_merges"]) == (pre == "llama-bpe")
            if ignores and all(_form(found[part]) == _form(told[part]) for part in ("pre_tokenizer", "normalizer")):
                return pre
        alone = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        if not found["model"]["merges"] and _form(found["pre_tokenizer"]) == alone:  # a token for each byte, wherever words begin
            return "gpt-2"
    raise InputError("the tokenizer cuts a text in a way that no GGUF file names (read are byte-level BPE of GPT-2, Llama 3 and Qwen2)")


def _form(part: Any) -> Any:
    """Without what changes no id; a sequence of one is that one."""
    if isinstance(part, list):
        return [_form(one) for one in part]
    if not isinstance(part, dict):
        return part
    inside = part.get("pretokenizers") or part.get("normalizers")
    if part.get("type") == "Sequence" and inside and len(inside) == 1:
        return _form(inside[0])
    return {key: _form(value) for key, value in part.items() if key != "trim_offsets"}


def _tensors(network: Transformer, kind: str, rows: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors by llama.cpp's names: experts of a layer stacked, q and k of the llama architectures with neighbours to rotate."""
    n = network.config
    names, parts = gguf.EXPERT_NAMES if n.experts else gguf.NAMES, {part: stem for stem, part in gguf.EXPERTS.items()}
    stacks: dict[str, list[Tensor]] = defaultdict(list)
    if n.rope_scaling or len(n.rope_factors) > 1:
        plain_K, _ = frequencies(n.head_dim, n.rope_base)
        scaled_K, _ = frequencies(n.head_dim, n.rope_base, n.rope_scaling, None, n.rope_factors)
        yield gguf.FACTORS, plain_K / scaled_K
    heads = {"q": n.heads, "k": n.kv_heads} if kind in gguf.INTERLEAVED else {}
    for name, tensor in network.state_dict().items():
        if ".experts." in name:
            layer, part = name.split(".")[1], name.split(".")[-2]
            stacks[f"blk.{layer}.{parts[part]}.weight"].append(tensor)
            continue
        if name == "head.weight" and n.tied:
            continue
        if name in ("embed.weight", "head.weight"):
            tensor = tensor[:rows]
        part = name.split(".")[-2]
        yield names.theirs(name), interleaved(tensor, heads[part]) if part in heads else tensor
    for name, stack in stacks.items():
        yield name, torch.stack(stack)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The rows of each head with the second half between those of the first; `gguf` puts them back."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
