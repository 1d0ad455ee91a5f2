"""Classes that transformers ships in place of a network of ours, for `dlm.load(..., bridge=)`.

No code of a checkpoint is run, unless `trust_remote_code` asks for it by name: of a masked diffusion model that nothing else reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dlm.errors import InputError, nearest
from dlm.files import read_json
from dlm.formats import native
from dlm.formats.huggingface import Base, stops
from dlm.formats.native import ModelConfig
from dlm.models.canvas import CanvasNetwork
from dlm.models.config import TransformerConfig
from dlm.models.remote import RemoteNetwork
from dlm.text import byte_level
from dlm.text.chat import ChatTemplate
from dlm.text.tokenizer import Tokenizer

BRIDGES = ("transformers",)
CLASSES = ("DiffusionGemmaForBlockDiffusion",)
AUTO = ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel")  # by which a checkpoint names its own class, in auto_map
WINDOWS = ("max_position_embeddings", "max_sequence_length", "n_positions")
STEPS, BOUND, COLDEST, WARMEST, STABLE, CONFIDENCE = 48, 0.1, 0.4, 0.8, 1, 0.005  # of transformers, where a checkpoint says nothing


def load(
    path: Path,
    bridge: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    device_map: str = "",
    trust_remote_code: bool = False,
) -> Base:
    """Read a directory of a class in CLASSES. device_map: `auto` spreads it over GPUs, memory and disk, through accelerate.

    trust_remote_code: read a class of the checkpoint's own code, which is run then.
    InputError for an unknown bridge or class, a transformers without it, and weights that are missing or left over.
    """
    if bridge not in BRIDGES:
        raise InputError(f"no bridge {bridge!r}{nearest(bridge, BRIDGES)}; known: {', '.join(BRIDGES)}")
    data = read_json(path / "config.json")
    named = data.get("architectures") if isinstance(data, Mapping) else None
    kind = next((name for name in named or () if name in CLASSES), None)
    if kind is None and trust_remote_code:
        return _remote(data, path, device, dtype, device_map)
    if kind is None:
        raise InputError(f"{path}: the bridge knows {', '.join(CLASSES)}, not {named}; it runs no code of a checkpoint")
    network = _network(kind, path, device, dtype, device_map, {})
    text, generation = data["text_config"], native.read_defaults(path)
    shape = TransformerConfig(
        vocab_size=text["vocab_size"] + 1,
        window=text["max_position_embeddings"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        width=text["hidden_size"],
        head_dim=text["head_dim"],
        mlp="swiglu",
        mlp_width=text["intermediate_size"],
    )
    tokenizer = Tokenizer.with_mask(byte_level.read(path, text["vocab_size"]), shape.vocab_size, shape.vocab_size - 1)
    chat = ChatTemplate.load(path)
    bound = (generation.get("sampler_config") or {}).get("entropy_bound", BOUND)
    defaults: dict[str, Any] = {
        "sampler": f"entropy-bound:{bound}",
        "steps": generation.get("max_denoising_steps") or STEPS,
        "stable": generation.get("stability_threshold", STABLE) or STABLE,
        "confidence": generation.get("confidence_threshold") or CONFIDENCE,
        "eos_token_id": stops(generation.get("eos_token_id"), text.get("eos_token_id"), chat, tokenizer, path),
    }
    noise = {"process": "uniform", "schedule": "linear"}
    config = ModelConfig(shape, shape.vocab_size - 1, noise=noise, family="diffusion_gemma", fills_window=False, block_phase="prompt")
    temperatures = generation.get("t_min") or COLDEST, generation.get("t_max") or WARMEST
    return Base(CanvasNetwork(network, shape, temperatures), config, tokenizer, defaults, chat)


def _remote(data: Mapping[str, Any], path: Path, device: torch.device | str, dtype: torch.dtype, device_map: str) -> Base:
    """A masked diffusion model by its own code, which predicts each token at its own place. InputError where the config says too little."""
    mapped = data.get("auto_map") or {}
    kind = next((name for name in AUTO if name in mapped), None)
    window = next((data[name] for name in WINDOWS if isinstance(data.get(name), int)), None)
    if kind is None or window is None or not isinstance(data.get("vocab_size"), int):
        raise InputError(f"{path}: its config.json has no {'auto_map of a model' if kind is None else 'window or vocab_size'}")
    inner, chat = byte_level.read(path, data["vocab_size"]), ChatTemplate.load(path)
    mask = data.get("mask_token_id", inner.token_to_id(chat.tokens.get("mask_token", "")))
    if not isinstance(mask, int):
        raise InputError(f"{path}: neither config.json nor the tokenizer names a mask token: it is no masked diffusion model")
    shape = TransformerConfig(data["vocab_size"], window, layers=1, heads=1, width=2, attention="full")
    network = RemoteNetwork(_network(kind, path, device, dtype, device_map, {"trust_remote_code": True}), shape)
    tokenizer = Tokenizer.with_mask(inner, shape.vocab_size, mask)
    noise = {"process": "masked", "schedule": "linear", "tokens": max(inner.get_vocab().values()) + 1}
    ends = stops(native.read_defaults(path).get("eos_token_id"), data.get("eos_token_id"), chat, tokenizer, path)
    config = ModelConfig(shape, mask, noise=noise, family="remote", fills_window=False, block_phase="prompt")
    return Base(network, config, tokenizer, {"sampler": "topk", "steps": STEPS, "eos_token_id": ends}, chat)


def _network(kind: str, path: Path, device: torch.device | str, dtype: torch.dtype, device_map: str, trust: dict[str, bool]) -> Any:
    import transformers

    found = getattr(transformers, kind, None)
    if found is None:
        raise InputError(f"transformers {transformers.__version__} has no {kind}: pip install --upgrade transformers")
    spread = {"device_map": device_map, "offload_folder": str(path / "offload")} if device_map else {}
    shows = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        network, info = found.from_pretrained(path, dtype=dtype, local_files_only=True, output_loading_info=True, **spread, **trust)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError) as error:  # of it, of the disk, of other code
        raise InputError(f"{path} cannot be read as {kind}: {(str(error) or repr(error)).splitlines()[0]}") from None
    finally:
        if shows:
            transformers.logging.enable_progress_bar()
    wrong = [f"{what.replace('_', ' ')} {', '.join(sorted(map(str, info[what]))[:3])}" for what in info if info[what]]
    if wrong:
        raise InputError(f"{path} does not hold the weights of its {kind}: {'; '.join(wrong)}")
    network.eval().requires_grad_(False)
    return network if device_map else network.to(device)
