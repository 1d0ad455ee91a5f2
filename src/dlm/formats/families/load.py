"""A checkpoint of a known family in a network of ours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch

from dlm.errors import InputError
from dlm.files import read_json
from dlm.formats import gguf, huggingface, native, pickled
from dlm.formats.families.a2d import bidirectional
from dlm.formats.families.record import Config, Family
from dlm.formats.huggingface import Base
from dlm.formats.keys import HARMLESS, Keys
from dlm.formats.native import ModelConfig, Ready
from dlm.formats.stored import Stored
from dlm.models.config import TransformerConfig
from dlm.text import byte_level, special_tokens
from dlm.text.chat import ChatTemplate
from dlm.text.tokenizer import Tokenizer, ascii_codes, numbers
from dlm.text.tokenizer import read as read_file

GPT2_TOKENS = 50_257


def load(
    path: Path, family: Family, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, ready: Ready | None = None
) -> Base:
    """Read a directory with config.json, safetensors and a tokenizer, a GGUF file, or a .pt file. InputError for an unsupported one."""
    contents = _gguf(path, family) if path.suffix == ".gguf" else _directory(path, family, copied=ready is not None)
    data, shape, inner, chat, stored = contents.config, contents.shape, contents.inner, contents.chat, contents.stored
    special_tokens.mark(inner, chat.tokens)
    vocabulary = inner.get_vocab(with_added_tokens=True)
    mask_id = find_mask(data, family, chat, vocabulary, path, shape.vocab_size - 1)
    tokenizer = Tokenizer.with_mask(inner, shape.vocab_size, mask_id)
    noise = {**family.noise, **{key: data[key] for key in family.noise_keys}}
    if noise["process"] in ("masked", "score"):
        noise["tokens"] = max(vocabulary.values()) + 1
    how: dict[str, Any] = {"objective": "autoregressive", "start_token_id": None} if family.causal else {}
    config = ModelConfig(
        shape.with_(tied=huggingface.is_tied(stored, shape.tied)),
        mask_id,
        noise=noise,
        context=carried(shape) if family.packed or family.causal else int(data.get("context_len", 0)),
        family=family.name,
        shift=contents.shift,
        fills_window=family.packed,
        block_phase=family.phase,
        **how,
    )
    defaults = dict(family.preset)
    # the end-of-text token of packed windows parts documents, and may come first
    defaults["eos_token_id"] = [] if family.packed else stops(data, contents.generation, family, chat, tokenizer, path)
    network = native.assemble(config, stored, path, device=device, dtype=dtype, ready=ready)
    return Base(network, config, tokenizer, defaults, chat)


@dataclass(frozen=True)
class Contents:
    """A checkpoint before its parts are put together. generation: generation_config.json."""

    config: Config
    shape: TransformerConfig
    inner: tokenizers.Tokenizer
    chat: ChatTemplate
    generation: Config
    shift: bool
    stored: dict[str, Stored]


def _directory(path: Path, family: Family, *, copied: bool) -> Contents:
    state = pickled.weights(path) if family.describe is not None else None
    data = read_json(path / "config.json") if state is None or family.describe is None else family.describe(path, state)
    shape = read_shape(data, family, path)
    inner, chat, generation = read_tokenizer(path, family, shape), ChatTemplate.load(path), native.read_defaults(path)
    stored = family.names.renamed(pickled.weights(path, copied=copied) if state is None else state, path, family.name)
    stored = huggingface.with_mask(stored) if family.appends_mask else stored
    return Contents(data, shape, inner, chat, generation, family.shift, stored)


def _gguf(path: Path, family: Family) -> Contents:
    file = gguf.read(path)
    own = family.shape if family.base or "num_experts" in file.config else partial(bidirectional, kind=file.config["model_type"])
    shape = read_shape(file.config, replace(family, shape=own), path)
    shift = family.shift if file.shift is None else file.shift
    config = file.config | {"mask_token_id": file.mask_token_id}
    return Contents(config, shape, file.inner, file.chat, {"eos_token_id": file.stops}, shift, file.stored)


def read_shape(data: Config, family: Family, path: Path) -> Any:
    """The backbone. InputError for quantized weights, for what the backbone does not have, and for unknown keys."""
    if quantized := data.get("quantization_config"):
        method = quantized.get("quant_method", "an unnamed method") if isinstance(quantized, dict) else quantized
        raise InputError(
            f"{path} has weights quantized by {method}, which dlm does not read (nor bitsandbytes, AWQ or GPTQ): take the unquantized one"
        )
    keys = Keys(data)
    try:
        shape = family.shape(keys)
    except InputError as error:
        raise InputError(f"{path}: {family.name} checkpoint: {error}") from None
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"does not describe a model ({error})"
        raise InputError(f"{path}: its config.json of family {family.name} {what}") from None
    keys.refuse_unread(f"{path}: {family.name} checkpoint", (*HARMLESS, *family.harmless, *family.noise_keys))
    return shape


def read_tokenizer(path: Path, family: Family, shape: TransformerConfig) -> tokenizers.Tokenizer:
    """The tokenizer of the directory, else the one that the family was trained with, from the hub.

    A vocabulary too small for that one spells its ids as numbers. InputError where there is none.
    """
    if family.tokenizer == "ascii":
        return ascii_codes(shape.vocab_size)
    if not family.tokenizer or (path / "tokenizer.json").is_file() or (path / "vocab.json").is_file():
        return byte_level.read(path, shape.vocab_size)
    if shape.vocab_size < GPT2_TOKENS:
        return numbers(shape.vocab_size - 1)
    try:
        from huggingface_hub import hf_hub_download

        return read_file(Path(hf_hub_download(family.tokenizer, "tokenizer.json")))
    except Exception as error:  # of the hub, of the disk and of the Rust side
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} has no tokenizer: put the tokenizer.json of {family.tokenizer} into it (the hub: {reason})") from None


def carried(shape: TransformerConfig) -> int:
    """Tokens of a window that a long text carries into the next: half of them, in whole blocks."""
    block = shape.block_length or 1
    return shape.window // 2 // block * block


def find_mask(data: Config, family: Family, chat: ChatTemplate, vocabulary: dict[str, int], path: Path, last: int) -> int:
    """The id of the mask: of config.json, else of the text that the tokenizer files or the family give it, else the family's number, of a
    packed family and of a small checkpoint without tokenizer the last one. InputError where no token is.
    """
    where = "tokenizer.ggml.mask_token_id" if path.suffix == ".gguf" else "config.json"
    if (stated := data.get("mask_token_id")) is not None:
        if stated not in vocabulary.values():
            raise InputError(f"{path}: {where} puts the mask at {stated}, where the tokenizer has no token")
        return int(stated)
    texts = [text for text in (chat.tokens.get("mask_token"), *family.mask_texts) if text]
    for text in texts:
        if text in vocabulary:
            return vocabulary[text]
    if family.packed:
        return last
    if family.mask_id is not None and family.mask_id in vocabulary.values():
        return family.mask_id
    if family.mask_id is not None and vocabulary.get(str(last)) == last:  # ids are spelled as numbers, and are too few for the family's own
        return last
    told = [*dict.fromkeys(texts), *([] if family.mask_id is None else [f"the id {family.mask_id}"])]
    raise InputError(f"{path}: its tokenizer lacks the mask token {' or '.join(told)}")


def stops(data: Config, generation: Config, family: Family, chat: ChatTemplate, tokenizer: Tokenizer, where: Path) -> list[int]:
    """Ids that end an answer."""
    named = huggingface.stops(generation.get("eos_token_id"), data.get("eos_token_id"), chat, tokenizer, where)
    return sorted({*named, *(tokenizer.control[text] for text in family.stop_texts if text in tokenizer.control)})
