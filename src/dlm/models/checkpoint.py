"""A model on disk, as Hugging Face lays it out: model.safetensors (or shards), config.json, generation_config.json, tokenizer.json.

A name is a directory, a checkpoint bundled with the package, or a hub id. Nothing is unpickled and no code is run.
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from dlm.errors import InputError
from dlm.models.transformer import Transformer, TransformerConfig

INDEX = "model.safetensors.index.json"
SHARD = "14MB"  # below the size that code hosts and mail gateways refuse


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says: the network, what it was trained to do, and the ids that matter."""

    network: TransformerConfig
    mask_token_id: int
    objective: str = "diffusion"  # diffusion | autoregressive
    noise: dict[str, Any] = field(default_factory=lambda: {"process": "masked", "schedule": "linear"})
    context: int = 0  # tokens of the last window that a long text carries into the next
    training: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        head = {"model_type": "dlm", "architectures": ["Transformer"], "vocab_size": self.network.vocab_size}
        body = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "network"}
        return head | body | {"network": self.network.to_dict()}

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> ModelConfig:
        if not isinstance(data, dict):
            raise InputError(f"{where}/config.json does not describe a model (it holds a {type(data).__name__})")
        if data.get("model_type") != "dlm":
            raise InputError(f"{where} is a checkpoint of kind {data.get('model_type')!r}, not one of dlm's")
        known = {f.name for f in fields(cls)} - {"network"}
        try:
            return cls(network=TransformerConfig(**data["network"]), **{k: v for k, v in data.items() if k in known})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}/config.json does not describe a model ({error})") from None


def bundled() -> dict[str, Path]:
    """Checkpoints that ship with the package, by name."""
    root = Path(str(resources.files("dlm"))) / "checkpoints"
    return {p.name: p for p in sorted(root.iterdir()) if (p / "config.json").is_file()} if root.is_dir() else {}


def find(name: str) -> Path:
    """Directory of a checkpoint: a path, a bundled name, or a hub id (downloaded once into the hub cache)."""
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    if name in bundled():
        return bundled()[name]
    if path.is_dir():
        raise InputError(f"{name} has no config.json: it is no checkpoint (a training run writes one at its first save)")
    if name.count("/") == 1 and not name.startswith(("/", ".", "~")):
        try:
            return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        except (OSError, HFValidationError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"no directory {name}, and the hub did not give it: {reason}") from None
    close = difflib.get_close_matches(name, bundled(), n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"bundled: {', '.join(bundled()) or 'none'}"
    raise InputError(f"no checkpoint {name!r}; {hint} A directory or a hub id works too.")


def save(
    directory: str | Path,
    state: dict[str, torch.Tensor],
    config: ModelConfig,
    *,
    files: dict[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint beside its final place, then move it in file by file, weights before config.

    files: text of further files by name, tokenizer.json among them. A reader never sees half a file.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as temporary:
        if config.network.tied:
            state = {k: v for k, v in state.items() if k != "head.weight"}
        state = {k: v.detach().cpu().to(dtype or v.dtype).contiguous() for k, v in state.items()}
        save_torch_state_dict(state, temporary, max_shard_size=SHARD)
        stored = str(next(iter(state.values())).dtype).removeprefix("torch.")
        texts = files | {"config.json": json.dumps(config.to_json() | {"dtype": stored}, indent=2) + "\n"}
        for name, text in texts.items():
            (Path(temporary) / name).write_text(text, encoding="utf-8")
        written = sorted(Path(temporary).iterdir(), key=lambda p: (p.suffix != ".safetensors", p.name == "config.json"))
        for file in written:
            file.chmod(0o644)  # safetensors writes for the owner alone
            os.replace(file, directory / file.name)
    # an index or shards of a former save of another size would be read instead of what is new
    weights = [directory / INDEX, directory / "model.safetensors", *directory.glob("model-?????-of-?????.safetensors")]
    for stale in {path.name for path in weights} - {file.name for file in written}:
        (directory / stale).unlink(missing_ok=True)


def generation_defaults(config: ModelConfig) -> dict[str, Any]:
    """generation_config.json of a freshly trained model: one step for each token of a window."""
    if config.objective == "autoregressive":
        return {"sampler": "autoregressive", "temperature": 1.0}
    return {"steps": config.network.window, "sampler": "ancestral", "temperature": 1.0}


def card(config: ModelConfig, name: str, parameters: int) -> str:
    """The model card, Markdown with the hub's header."""
    block = "block " * (config.network.attention == "block_causal")
    kind = "Autoregressive" if config.objective == "autoregressive" else f"{config.noise['process'].capitalize()} {block}diffusion"
    return (
        f"---\nlibrary_name: dlm\npipeline_tag: text-generation\n---\n# {name}\n\n{kind} language model, "
        f"{parameters:,} parameters, window {config.network.window}, context {config.context}, trained with dlm.\n\n"
        f"```python\nimport dlm\n\nprint(dlm.load({json.dumps(name)}).generate(length=256, seed=0).text)\n```\n"
    )


def load_config(path: Path) -> ModelConfig:
    try:
        data = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}/config.json is damaged ({error})") from None
    return ModelConfig.from_json(data, str(path))


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, from one file or from shards."""
    index = path / INDEX
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{index} is damaged ({error}): fetch or train the checkpoint again") from None
    state: dict[str, torch.Tensor] = {}
    for name in names:
        if Path(str(name)).name != name or not (path / name).is_file():
            raise InputError(f"{path} lacks {name}: the checkpoint is not whole, fetch or train it again")
        try:
            state |= load_file(path / name)
        except SafetensorError as error:
            raise InputError(f"{path}/{name} is truncated or damaged ({error}): fetch or train it again") from None
    return state


def load(path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Transformer, ModelConfig]:
    """The network in evaluation mode, and its config. InputError where the files do not fit together."""
    config = load_config(path)
    state = load_weights(path)
    with torch.device("meta"):
        network = Transformer(config.network)
    if config.network.tied and "embed.weight" in state:
        state["head.weight"] = state["embed.weight"]
    shapes = {name: tuple(p.shape) for name, p in network.state_dict().items()}
    wrong = [n for n in shapes.keys() | state.keys() if shapes.get(n) != (tuple(state[n].shape) if n in state else None)]
    if wrong:
        raise InputError(f"the weights in {path} do not fit its config.json (first: {sorted(wrong)[0]}); another vocabulary or size?")
    network.load_state_dict({k: v.to(device, dtype) for k, v in state.items()}, assign=True)
    if config.network.tied:
        network.head.weight = network.embed.weight
    return network.eval().requires_grad_(False), config
