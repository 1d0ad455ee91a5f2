"""A checkpoint of a known family in a network of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch

from dlm.errors import InputError
from dlm.files import read_json
from dlm.formats import gguf, huggingface, native
from dlm.formats.families.a2d import bidirectional
from dlm.formats.families.record import Config, Family
from dlm.formats.huggingface import Base
from dlm.formats.native import ModelConfig, Ready
from dlm.formats.stored import Stored
from dlm.models.config import TransformerConfig
from dlm.text import byte_level
from dlm.text.chat import ChatTemplate
from dlm.text.tokenizer import Tokenizer


def load(
    path: Path, family: Family, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, ready: Ready | None = None
) -> Base:
    """Read a directory with config.json, safetensors and a tokenizer, or a GGUF file. InputError for an unsupported one."""
    contents = _gguf(path, family) if path.is_file() else _directory(path, family, copied=ready is not None)
    data, shape, inner, chat, stored = contents.config, contents.shape, contents.inner, contents.chat, contents.stored
    vocabulary = inner.get_vocab(with_added_tokens=True)
    mask_id = find_mask(data, family, chat, vocabulary, path)
    tokenizer = Tokenizer(inner, shape.vocab_size, mask_id)
    layers = {name.split(".")[1] for name in stored if name.startswith("blocks.")}
    if len(layers) != shape.layers:
        raise InputError(f"{path} says that it has {shape.layers} layers, its weights do not fit: they have {len(layers)}")
    config = ModelConfig(
        shape.with_(tied=is_tied(stored, shape.tied)),
        mask_id,
        noise={"process": "masked", "schedule": "linear", "tokens": max(vocabulary.values()) + 1},
        family=family.name,
        shift=contents.shift,
        fills_window=False,
        block_phase=family.phase,
    )
    defaults = dict(family.preset)
    defaults["eos_token_id"] = stops(data, contents.generation, family, chat, tokenizer)
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
    data = read_json(path / "config.json")
    shape = read_shape(data, family, path)
    inner, chat, generation = byte_level.read(path), ChatTemplate.load(path), native.read_defaults(path)
    stored = family.names.renamed(native.weights(path, copied=copied), path, family.name)
    return Contents(data, shape, inner, chat, generation, family.shift, stored)


def _gguf(path: Path, family: Family) -> Contents:
    file = gguf.read(path)
    shape = bidirectional(file.config, file.config["model_type"])
    shift = family.shift if file.shift is None else file.shift
    config = file.config | {"mask_token_id": file.mask_token_id}
    return Contents(config, shape, file.inner, file.chat, {"eos_token_id": file.stops}, shift, file.stored)


def read_shape(data: Config, family: Family, path: Path) -> Any:
    """The backbone. InputError for quantized weights and for keys that the backbone does not have."""
    if quantized := data.get("quantization_config"):
        method = quantized.get("quant_method", "an unnamed method") if isinstance(quantized, dict) else quantized
        raise InputError(
            f"{path} has weights quantized by {method}, which dlm does not read (nor bitsandbytes, AWQ or GPTQ): take the unquantized one"
        )
    try:
        return family.shape(data)
    except InputError as error:
        raise InputError(f"{path}: {family.name} checkpoint: {error}") from None
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"does not describe a model ({error})"
        raise InputError(f"{path}: its config.json of family {family.name} {what}") from None


def find_mask(data: Config, family: Family, chat: ChatTemplate, vocabulary: dict[str, int], path: Path) -> int:
    """The id of the mask: of config.json, else of the text that the tokenizer files or the family give it. InputError where no token is."""
    if (stated := data.get("mask_token_id")) is not None:
        if stated not in vocabulary.values():
            raise InputError(f"{path}: config.json puts the mask at {stated}, where the tokenizer has no token")
        return int(stated)
    texts = [text for text in (chat.tokens.get("mask_token"), *family.mask_texts) if text]
    for text in texts:
        if text in vocabulary:
            return vocabulary[text]
    raise InputError(f"{path}: its tokenizer lacks the mask token {' or '.join(dict.fromkeys(texts))}")


def is_tied(stored: dict[str, Stored], stated: bool) -> bool:
    """Whether head and embedding are one matrix.

    The file decides: a head that differs from the embedding stays, whatever config.json says.
    """
    if not stated or "head.weight" not in stored:
        return stated
    head, embedding = stored["head.weight"], stored.get("embed.weight", stored["head.weight"])
    return head.shape == embedding.shape and torch.equal(head.read(), embedding.read())


def stops(data: Config, generation: Config, family: Family, chat: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """Ids that end an answer."""
    named = huggingface.stops(generation.get("eos_token_id"), data.get("eos_token_id"), chat, tokenizer)
    return sorted({*named, *(tokenizer.control[text] for text in family.stop_texts if text in tokenizer.control)})
