"""Classes that transformers ships in place of a network of ours, for `dlm.load(..., bridge=)`; no code of a checkpoint is run"""

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
from dlm.text import byte_level
from dlm.text.chat import ChatTemplate
from dlm.text.tokenizer import Tokenizer

BRIDGES = ("transformers",)
CLASSES = ("DiffusionGemmaForBlockDiffusion",)
STEPS, BOUND, COLDEST, WARMEST, STABLE, CONFIDENCE = 48, 0.1, 0.4, 0.8, 1, 0.005  # of transformers, where a checkpoint says nothing


def load(path: Path, bridge: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, device_map: str = "") -> Base:
    """Read a directory of a class in CLASSES. device_map: `auto` spreads it over GPUs, memory and disk, through accelerate.

    InputError for an unknown bridge or class, a transformers without it, and weights that are missing or left over.
    """
    if bridge not in BRIDGES:
        raise InputError(f"no bridge {bridge!r}{nearest(bridge, BRIDGES)}; known: {', '.join(BRIDGES)}")
    data = read_json(path / "config.json")
    named = data.get("architectures") if isinstance(data, Mapping) else None
    kind = next((name for name in named or () if name in CLASSES), None)
    if kind is None:
        raise InputError(f"{path}: the bridge knows {', '.join(CLASSES)}, not {named}; it runs no code of a checkpoint")
    network = _network(kind, path, device, dtype, device_map)
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


def _network(kind: str, path: Path, device: torch.device | str, dtype: torch.dtype, device_map: str) -> Any:
    import transformers

    found = getattr(transformers, kind, None)
    if found is None:
        raise InputError(f"transformers {transformers.__version__} has no {kind}: pip install --upgrade transformers")
    spread = {"device_map": device_map, "offload_folder": str(path / "offload")} if device_map else {}
    shows = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        network, info = found.from_pretrained(path, dtype=dtype, local_files_only=True, output_loading_info=True, **spread)
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # of transformers, of the disk, of safetensors
        raise InputError(f"{path} cannot be read as {kind}: {(str(error) or repr(error)).splitlines()[0]}") from None
    finally:
        if shows:
            transformers.logging.enable_progress_bar()
    wrong = [f"{what.replace('_', ' ')} {', '.join(sorted(map(str, info[what]))[:3])}" for what in info if info[what]]
    if wrong:
        raise InputError(f"{path} does not hold the weights of its {kind}: {'; '.join(wrong)}")
    network.eval().requires_grad_(False)
    return network if device_map else network.to(device)
