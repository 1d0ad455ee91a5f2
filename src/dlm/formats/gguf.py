"""GGUF, the file format of llama.cpp, read into the parts of a Hugging Face directory.

The header is read here: the reader of the `gguf` package makes an array of every string and takes ten seconds for 49,152 tokens.
The package dequantizes the tensors. Format: ggml-org/ggml docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import models as bpe
from torch import Tensor

from dlm.errors import InputError
from dlm.formats.keys import Keys, require, shown, told
from dlm.formats.names import Names
from dlm.formats.native import CONVERTIBLE, KINDS
from dlm.formats.stored import Stored
from dlm.models.rope import frequencies
from dlm.text.byte_level import WORDS
from dlm.text.chat import ChatTemplate
from dlm.text.special_tokens import ENDS_OF_TEXT, as_ids

NAMES = Names(
    outside={"token_embd": "embed", "output_norm": "norm", "output": "head"},
    layers="blk.",
    inside={
        "attn_norm": "attention_norm",
        "attn_q": "attention.q",
        "attn_k": "attention.k",
        "attn_v": "attention.v",
        "attn_output": "attention.out",
        "attn_q_norm": "attention.q_norm",
        "attn_k_norm": "attention.k_norm",
        "ffn_norm": "mlp_norm",
        "ffn_gate": "mlp.gate",
        "ffn_up": "mlp.up",
        "ffn_down": "mlp.down",
    },
    ignored=(),
)
EXPERTS = {"ffn_gate_exps": "gate", "ffn_up_exps": "up", "ffn_down_exps": "down"}  # the experts of a layer in one tensor
EXPERT_NAMES = replace(NAMES, inside={**NAMES.inside, "ffn_gate_inp": "mlp.router"})
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of token
STOPS = ("eos", "eot", "eom")  # keys of the tokens that end a text
DIFFUSION = {"llada": "llama", "dream": "qwen2", "llada-moe": "llada-moe"}  # architectures of diffusion models, and whose keys they have
INTERLEAVED = ("llama", "llada")  # llama.cpp rotates neighbours, not halves: its converter interleaves the rows of their q and k
QWEN2_WORDS = ("qwen2", "bailingmoe", "bailingmoe2", "llada-moe")  # names of one way to cut a text into words
FACTORS = "rope_freqs.weight"  # what llama.cpp divides the frequencies of a Llama by, one by one
LLAMA3 = (1.0, 4.0, 8192.0)  # low, high and window before of every Llama 3.1 and 3.2
ONLY: dict[str, tuple[Any, ...]] = {  # keys of an architecture with values that change nothing; any other value would
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (1.0,),
    "residual_scale": (1.0,),
    "logit_scale": (1.0,),
    "rope.scaling.attn_factor": (1.0,),
    "use_parallel_residual": (False,),
    "nextn_predict_layers": (0,),
}
HARMLESS = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length")


class Header:
    """metadata by key; tensors by name: (shape with the fastest axis last, kind of quantization, bytes from the file's beginning).

    until: a key of the metadata after which nothing more is read.
    """

    def __init__(self, data: mmap.mmap, until: str = "") -> None:
        self.data, self.at = data, 4
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, count, pairs = self._take("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format")
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(pairs):
            key = self._string()
            self.metadata[key] = self._value(self._take("<I")[0])
            if key == until:
                return
        infos = []
        for _ in range(count):
            name, (axes,) = self._string(), self._take("<I")
            shape, (kind, offset) = self._take(f"<{axes}Q"), self._take("<IQ")
            infos.append((name, shape[::-1], kind, offset))
        alignment = self.metadata.get("general.alignment", 32)
        begin = -(-self.at // alignment) * alignment
        self.tensors = {name: (shape, kind, begin + offset) for name, shape, kind, offset in infos}

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values

    def _string(self) -> str:
        (length,) = self._take("<Q")
        if self.at + length > len(self.data):
            raise ValueError("a string runs past its end")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._take(f"<{SCALARS[kind]}")[0]
        inner, count = self._take("<IQ")
        if inner in SCALARS:
            return list(self._take(f"<{count}{SCALARS[inner]}"))
        return [self._value(inner) for _ in range(count)]


@dataclass(frozen=True)
class Contents:
    """A GGUF file. config: with the keys of a Hugging Face config.json; stored: tensors in our names; stops: ids that end a text.

    mask_token_id and shift, whether row i of the logits predicts token i + 1: None where a file does not say.
    """

    config: dict[str, Any]
    stored: dict[str, Stored]
    inner: tokenizers.Tokenizer
    chat: ChatTemplate
    stops: list[int]
    start_token_id: int | None
    mask_token_id: int | None
    shift: bool | None


DAMAGE = (struct.error, ValueError, LookupError, TypeError, ArithmeticError, RecursionError, MemoryError)


def _header(path: Path, until: str = "") -> Header:
    with path.open("rb") as file:
        return Header(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), until)


def bits(path: Path) -> float:
    """Bits that the file spends on a weight, on average. InputError for a file that is no whole GGUF file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    elements = stored = 0.0
    for shape, kind, _ in _header(path).tensors.values():
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        elements += math.prod(shape)
        stored += 8 * size * math.prod(shape) / block
    return stored / max(1.0, elements)


def architecture(path: Path) -> str:
    """general.architecture of a file; nothing for one that is not whole, which `read` tells."""
    try:
        return str(_header(path, "general.architecture").metadata.get("general.architecture", ""))
    except DAMAGE:
        return ""


def read(path: Path) -> Contents:
    """InputError as `native.load`."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise InputError("GGUF files need the convert extra: pip install 'dlm[convert]'") from None
    try:
        header = _header(path)
    except DAMAGE as error:
        raise InputError(f"{path} is no whole GGUF file ({error}): fetch it again") from None
    meta = header.metadata
    kind = meta.get("general.architecture")
    if kind not in CONVERTIBLE and kind not in DIFFUSION:
        raise InputError(f"{path} is a checkpoint of kind {kind!r}; dlm converts {', '.join([*CONVERTIBLE, *DIFFUSION])}")
    try:
        config, stored = _config(header, path), _stored(header, path)
        inner, control = _tokenizer(meta, path), {"bos_token": "bos_token_id", "eos_token": "eos_token_id"}
        tokens = meta["tokenizer.ggml.tokens"]
        named = {name: tokens[meta[f"tokenizer.ggml.{key}"]] for name, key in control.items() if f"tokenizer.ggml.{key}" in meta}
        stops, start = _ends(meta, inner, path), _begin(meta, path)
        chat = ChatTemplate(meta.get("tokenizer.chat_template", ""), named)
        mask, shift = meta.get("tokenizer.ggml.mask_token_id"), meta.get("diffusion.shift_logits")
        return Contents(config, stored, inner, chat, sorted(stops), start, mask, shift)
    except KeyError as error:
        raise InputError(f"{path} lacks {error}: it is no whole {kind} checkpoint") from None
    except InputError:
        raise
    except (TypeError, ValueError, IndexError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"{path} contradicts itself ({str(error).splitlines()[0]})") from None


def _config(header: Header, path: Path) -> dict[str, Any]:
    """The keys of a Hugging Face config.json. InputError for a key of the architecture that is not understood."""
    meta = header.metadata
    kind = meta["general.architecture"]
    its = Keys({key.removeprefix(f"{kind}."): value for key, value in meta.items() if key.startswith(f"{kind}.")})
    if meta.get("general.type", "model") != "model":
        raise InputError(f"{path} is of the type {told(meta['general.type'])}: a GGUF file of a model is read alone")
    if (parts := meta.get("split.count", 1)) not in (0, 1):
        raise InputError(f"{path} is one of {told(parts)} parts of a model: join them with llama-gguf-split --merge")
    try:
        config = _sizes(its, header, kind) | _positions(its, header, path, kind)
        config |= _experts(its, header) if kind == "llada-moe" else {}
        require(its, ONLY if kind == "llada-moe" else {**ONLY, "expert_count": (0,), "expert_used_count": (0,)})
    except InputError as error:
        raise InputError(f"{path}: {kind} file: {error}") from None
    its.refuse_unread(f"{path}: {kind} file", HARMLESS)
    return config


def _sizes(its: Keys, header: Header, kind: str) -> dict[str, Any]:
    if kind in DIFFUSION and its.get("attention.causal", False):
        raise InputError(f"it has causal attention, which no {kind} checkpoint has: it was converted wrongly")
    heads, width = its.whole("attention.head_count"), its.whole("embedding_length")
    head_dim = its.whole("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := its.get(key, head_dim)) != head_dim:
            raise InputError(f"{key} = {told(other)} is not supported (only that of a whole head, {head_dim})")
    if (scale := its.get("attention.scale", 0.0)) and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        raise InputError(f"attention.scale = {told(scale)} is not supported (only 1 / sqrt({head_dim}))")
    config = {
        "model_type": DIFFUSION.get(kind, kind),
        "vocab_size": header.tensors["token_embd.weight"][0][0] if kind in DIFFUSION else len(header.metadata["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "num_hidden_layers": its.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": its.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": its.whole("context_length"),
        # a float32 of the file is the decimal that was meant: 1e-05, not 9.999999747378752e-06
        "rms_norm_eps": float(str(np.float32(its.number("attention.layer_norm_rms_epsilon")))),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "is_causal": None if kind in DIFFUSION else its.get("attention.causal"),
    }
    if kind != "llada-moe" or "feed_forward_length" in its:
        config["intermediate_size"] = its.whole("feed_forward_length")
    return config


def _positions(its: Keys, header: Header, path: Path, kind: str) -> dict[str, Any]:
    """rope_theta, and rope_parameters where frequencies are scaled, by the rules of llama.cpp's loader.

    A scale without a type is linear, and an older key may have it; 0 is no scale. The factors of a tensor come on top.
    """
    config: dict[str, Any] = {"rope_theta": its.get("rope.freq_base", 10_000.0)}
    way, older = its.get("rope.scaling.type", "linear"), its.get("rope.scale_linear", 0.0)
    factor = its.get("rope.scaling.factor", older) or 1.0
    if way not in ("none", "linear", "yarn") or (way == "yarn" and factor < 1):
        raise InputError(f"rotary positions of kind {told(way)} by {told(factor)} are not supported")
    scaled = way != "none" and factor != 1
    if scaled:
        before = its.get("rope.scaling.original_context_length", its["context_length"])
        config["rope_parameters"] = {"rope_type": way, "factor": factor}
        if way == "yarn":
            config["rope_parameters"]["original_max_position_embeddings"] = before
    if FACTORS in header.tensors and kind == "llama":
        if scaled and way == "yarn":
            raise InputError(f"rotary positions of kind 'yarn' with a tensor {FACTORS} are not supported")
        config["rope_parameters"] = _divided(_tensor(header, FACTORS, path) * (factor if scaled else 1.0), config["rope_theta"])
    return config


def _divided(factor_K: Tensor, base: float) -> dict[str, Any]:
    """rope_parameters of frequencies that are divided one by one: Llama 3's own if they are what its released models have."""
    most, each = float(factor_K.max()), factor_K.tolist()
    plain_K, scaled_K = (frequencies(2 * len(each), base, scaling)[0] for scaling in ((), (most, *LLAMA3)))
    if most > 0 and torch.allclose(plain_K / scaled_K, factor_K, rtol=1e-5, atol=0):
        low, high, before = LLAMA3
        llama3 = {"factor": most, "low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": before}
        return {"rope_type": "llama3", **llama3}
    return {"rope_type": "longrope", "short_factor": each, "long_factor": each, "attention_factor": 1.0}


def _experts(its: Keys, header: Header) -> dict[str, Any]:
    """The keys of a mixture of experts; InputError for a router other than that of LLaDA-MoE, which no key has to name."""
    usual = {"expert_gating_func": 1, "expert_weights_norm": False, "expert_weights_scale": 1.0, "expert_shared_count": 0}
    for key, value in usual.items():
        if its.get(key, value) != value:
            raise InputError(f"{key} = {its[key]!r}, which no llada-moe checkpoint has: it was converted wrongly")
    width = its.get("expert_feed_forward_length", header.tensors["blk.0.ffn_gate_exps.weight"][0][1])
    count, used = its.whole("expert_count"), its.whole("expert_used_count")
    return {"num_experts": count, "num_experts_per_tok": used, "expert_intermediate_size": width}


def _stored(header: Header, path: Path) -> dict[str, Stored]:
    meta, stored = header.metadata, {}
    kind = meta["general.architecture"]
    heads = meta[f"{kind}.attention.head_count"]
    groups = {"attn_q": heads, "attn_k": meta.get(f"{kind}.attention.head_count_kv", heads)} if kind in INTERLEAVED else {}
    names = EXPERT_NAMES if kind == "llada-moe" else NAMES
    for name, (shape, _, _) in header.tensors.items():
        if name == FACTORS and kind == "llama":  # read with the config
            continue
        layer, _, part = name.removesuffix(".weight").removeprefix("blk.").partition(".")
        if names is EXPERT_NAMES and part in EXPERTS:
            for number in range(shape[0]):
                read = partial(_tensor, header, name, path, number=number)
                stored[f"blocks.{layer}.mlp.experts.{number}.{EXPERTS[part]}.weight"] = Stored(shape[1:], read)
            continue
        try:
            own = names.ours(name)
        except KeyError:
            raise InputError(f"{path} has a tensor {shown(name)}, which no {KINDS} model has: it is of another architecture") from None
        if own is not None:
            stored[own] = Stored(shape, partial(_tensor, header, name, path, groups.get(name.split(".")[-2])))
    return stored


def _tensor(header: Header, name: str, path: Path, interleaved: int | None = None, number: int | None = None) -> Tensor:
    """float32. interleaved: heads whose rows are to be put back in halves. number: of the part along the first axis to read alone.

    InputError for a quantization that the gguf package cannot read, or a file that ends before.
    """
    from gguf import quants
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    shape, quantization, begin = header.tensors[name]
    try:
        kind = GGMLQuantizationType(quantization)
        shape = shape if number is None else shape[1:]
        row = quants.quant_shape_to_byte_shape(shape, kind)
        block, size = GGML_QUANT_SIZES[kind]
        count = math.prod(shape) // block * size
        begin += count * (number or 0)
        raw = np.frombuffer(header.data, dtype=np.uint8, count=count, offset=begin).reshape(row)
        values = quants.dequantize(raw, kind)
    except NotImplementedError as error:
        raise InputError(f"{path}: {shown(name)} is quantized in a way that the gguf package cannot read ({error})") from None
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path} is no whole GGUF file ({shown(name)}: {error}): fetch it again") from None
    tensor = torch.from_numpy(np.array(values, dtype=np.float32, copy=None if values.flags.writeable else True))
    del raw, values
    if hasattr(header.data, "madvise"):  # what has been read need not stay in memory
        page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        header.data.madvise(mmap.MADV_DONTNEED, page, begin + count - page)
    if interleaved:
        try:
            return tensor.view(interleaved, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        except (RuntimeError, TypeError) as error:
            raise InputError(f"{path} contradicts itself ({shown(name)}: {str(error).splitlines()[0]})") from None
    return tensor


def _ends(meta: dict[str, Any], inner: tokenizers.Tokenizer, path: Path) -> set[int]:
    """Ids that end a text or a turn: those of the header, and control tokens by their names, as in llama.cpp."""
    said = [meta[key] for key in (f"tokenizer.ggml.{end}_token_id" for end in STOPS) if key in meta]
    by_name = (i for i, token in inner.get_added_tokens_decoder().items() if token.special and token.content in ENDS_OF_TEXT)
    return {*as_ids(said, str(path)), *by_name}


def _begin(meta: dict[str, Any], path: Path) -> int | None:
    """The id of the token that is read before every text; None for none."""
    begins, start = meta.get("tokenizer.ggml.add_bos_token"), meta.get("tokenizer.ggml.bos_token_id")
    if begins and start is None:
        raise InputError(f"{path} begins every text with a token that it does not name: tokenizer.ggml.bos_token_id is missing")
    usual = meta.get("tokenizer.ggml.pre") == "llama-bpe"
    return start if (usual if begins is None else begins) else None


def _tokenizer(meta: dict[str, Any], path: Path) -> tokenizers.Tokenizer:
    """Byte-level BPE; which words it begins with goes by a name, as in llama.cpp's llama-vocab.cpp."""
    model, pre = meta["tokenizer.ggml.model"], meta.get("tokenizer.ggml.pre", "default")
    if model != "gpt2" or pre not in ("gpt-2", "smollm", "llama-bpe", *QWEN2_WORDS):
        raise InputError(f"{path}: dlm does not read a vocabulary of kind {model}/{pre}: load the Hugging Face directory of this model")
    tokens, merges = meta["tokenizer.ggml.tokens"], [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    kinds = meta["tokenizer.ggml.token_type"]
    while kinds and kinds[-1] == UNUSED:  # rows of the embedding that no token has, at the end
        tokens, kinds = tokens[:-1], kinds[:-1]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        inner = tokenizers.Tokenizer(bpe.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the Rust side raises bare Exception
        raise InputError(f"{path} has a damaged vocabulary ({str(error).splitlines()[0]})") from None
    with_words(inner, pre)
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        inner.add_tokens([AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == kind])
    return inner


def with_words(inner: tokenizers.Tokenizer, pre: str) -> tokenizers.Tokenizer:
    """The tokenizer, which begins with the words of this name from now on."""
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "gpt-2":
        inner.pre_tokenizer = whole
    elif pre == "smollm":
        inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    else:
        split = pre_tokenizers.Split(Regex(WORDS % ("{1,3}" if pre == "llama-bpe" else "")), "isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if pre in QWEN2_WORDS:
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    return inner
