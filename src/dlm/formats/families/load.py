"""A checkpoint of a known family in a network of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.files import read_json
from dlm.formats import huggingface, native
from dlm.formats.families.record import Config, Family
from dlm.formats.huggingface import Base
from dlm.formats.native import ModelConfig
from dlm.text import byte_level
from dlm.text.chat import ChatTemplate
from dlm.text.tokenizer import Tokenizer


def load(path: Path, family: Family, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Base:
    """Read a directory with config.json, safetensors and a tokenizer. InputError for an unsupported one."""
    data = read_json(path / "config.json")
    shape = read_shape(data, family, path)
    inner = byte_level.read(path)
    chat = ChatTemplate.load(path)
    mask_id = find_mask(data, family, chat, inner.get_vocab(with_added_tokens=True), path)
    tokenizer = Tokenizer(inner, shape.vocab_size, mask_id)
    state = family.names.renamed(native.load_weights(path), path, family.name)
    layers = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    if len(layers) != shape.layers:
        raise InputError(f"{path} says that it has {shape.layers} layers, its weights do not fit: they have {len(layers)}")
    config = ModelConfig(
        shape.with_(tied=is_tied(state, shape.tied)),
        mask_id,
        noise={"process": "masked", "schedule": "linear", "tokens": max(inner.get_vocab(with_added_tokens=True).values()) + 1},
        family=family.name,
        shift=family.shift,
        fills_window=False,
        block_phase=family.phase,
    )
    defaults = dict(family.preset)
    defaults["eos_token_id"] = stops(data, native.read_defaults(path), family, chat, tokenizer)
    network = native.assemble(config, state, path, device=device, dtype=dtype)
    return Base(network, config, tokenizer, defaults, chat)


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


def is_tied(state: dict[str, Tensor], stated: bool) -> bool:
    """Whether head and embedding are one matrix. The file decides: a head that differs from the embedding stays, whatever config.json says.

    Takes a head that only repeats the embedding out of a `state` whose config says tied.
    """
    if not stated or "head.weight" not in state:
        return stated
    if not torch.equal(state["head.weight"], state.get("embed.weight", state["head.weight"])):
        return False
    del state["head.weight"]
    return True


def stops(data: Config, generation: Config, family: Family, chat: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """Ids that end an answer."""
    named = huggingface.stops(generation.get("eos_token_id"), data.get("eos_token_id"), chat, tokenizer)
    return sorted({*named, *(tokenizer.control[text] for text in family.stop_texts if text in tokenizer.control)})
