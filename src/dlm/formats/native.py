"""A model on disk, as Hugging Face lays it out: model.safetensors (or shards), config.json, generation_config.json, tokenizer.json.

A name is a directory, a GGUF file, a checkpoint bundled with the package, one that `dlm pull` fetched, or a hub id. Nothing is
unpickled and no code is run.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dlm.errors import InputError
from dlm.files import check_stamp, check_types, read_json, read_object, replacing_files, stamp
from dlm.formats.find import find as find
from dlm.formats.keys import shown
from dlm.formats.stored import Stored
from dlm.models import networks
from dlm.models.config import TransformerConfig
from dlm.models.meta import without_weights
from dlm.models.transformer import Transformer
from dlm.text.special_tokens import as_ids
from dlm.trajectory import COLOUR

INDEX = "model.safetensors.index.json"
KINDS = "Llama, Qwen2 or Qwen3"
CONVERTIBLE = ("llama", "qwen2", "qwen3")  # model types that `dlm.formats.huggingface` turns into our backbone
MASKLESS = (*CONVERTIBLE, "duo")  # families whose checkpoints have no mask, so that the last row of logits is ours
FORMAT = 1  # of config.json
# keys of config.json that say nothing about the network: Hugging Face's, and those that are read elsewhere
IGNORED_KEYS = (
    "model_type",
    "architectures",
    "vocab_size",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "format",
    "dlm_version",
)
NO_MODEL = "does not describe a model"
MOST = 1e9
KIND_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "an object"}
GENERATION: dict[str, tuple[type, float, float]] = {  # keys of generation_config.json that are read: type, least and greatest value
    "do_sample": (bool, 0, 0),
    "temperature": (float, 0, MOST),
    "top_p": (float, 1e-9, 1),
    "top_k": (int, 0, MOST),
    "sampler": (str, 0, 0),
    "steps": (int, 1, 1e6),
    "block_length": (int, 0, MOST),
    "sampler_config": (dict, 0, 0),  # and below: of DiffusionGemma
    "max_denoising_steps": (int, 1, 1e6),
    "stability_threshold": (int, 0, MOST),
    "confidence_threshold": (float, 0, MOST),
    "t_min": (float, 0, MOST),
    "t_max": (float, 0, MOST),
}
UNREAD: dict[str, object] = {  # keys that change the text and are not read, with the value that changes nothing
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beams": 1,
    "guidance_scale": 1.0,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "sequence_bias": {},
    "forced_bos_token_id": [],
    "forced_eos_token_id": [],
}
PRECISE = (".router.weight", ".router.correction")  # in float32 whatever the others are: few numbers, on which a choice depends
QUANTIZED = ("q", "k", "v", "out", "gate", "up", "down")  # layers of a block that are quantized, of the type of the file until then
SHARD = "14MB"  # below the size that code hosts and mail gateways reject


@dataclass(frozen=True)
class ModelConfig:
    """config.json: the network, its training objective, and the token ids that matter."""

    network: TransformerConfig
    mask_token_id: int
    objective: str = "diffusion"  # diffusion | autoregressive
    noise: dict[str, Any] = field(default_factory=lambda: {"process": "masked", "schedule": "linear"})
    context: int = 0  # tokens of the last window that a long text carries into the next
    training: dict[str, Any] = field(default_factory=dict)
    start_token_id: int | None = -1  # read before the text by an autoregressive network: -1 its mask; None: nothing
    family: str = "dlm"  # of the original checkpoint: one of CONVERTIBLE, or of `dlm.formats.families`
    shift: bool = False  # whether row i of the logits predicts token i + 1
    fills_window: bool = True  # whether the network was trained on windows that noise fills to the end
    block_phase: str = "zero"  # where blocks begin: `zero`, at multiples of their length, or at the end of the `prompt`
    colours: tuple[str, ...] = ()  # of each token but the mask, in a grid that is drawn in colours: #rrggbb, or nothing for none

    def __post_init__(self) -> None:
        object.__setattr__(self, "colours", tuple(self.colours))  # JSON has lists
        if strange := [colour for colour in self.colours if not COLOUR.fullmatch(colour)]:
            raise ValueError(f"colours are #rrggbb or nothing, got {strange[0][:20]!r}")
        if len(self.colours) not in (0, self.mask_token_id):
            raise ValueError(f"colours are of each of {self.mask_token_id} tokens, or there are none; got {len(self.colours)}")
        if self.start_token_id == -1:
            object.__setattr__(self, "start_token_id", self.mask_token_id)

    def to_json(self) -> dict[str, Any]:
        head = {"model_type": "dlm", "architectures": [networks.name_of(self.network)], "vocab_size": self.network.vocab_size} | stamp(
            FORMAT
        )
        body = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "network"}
        return head | body | {"network": self.network.to_dict()}

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> ModelConfig:
        if not isinstance(data, dict):
            raise InputError(f"{where}/config.json does not describe a model (it holds a {type(data).__name__})")
        if data.get("model_type") != "dlm":
            kind = data.get("model_type")
            if kind in CONVERTIBLE:
                raise InputError(f"{where} is a {kind} checkpoint: convert it first, with dlm.load({where!r}).save_pretrained(directory)")
            raise InputError(
                f"{where} is a checkpoint of kind {kind!r}, not one of dlm's, nor one that it converts: {', '.join(CONVERTIBLE)}"
            )
        check_stamp(data, FORMAT, f"{where}/config.json")
        network, shape = data.get("network"), networks.CONFIGS.get(str((data.get("architectures") or ["Transformer"])[0]))
        if shape is None:
            raise InputError(f"{where}/config.json names an unknown network; known: {', '.join(networks.CONFIGS)}")
        for part, kind, harmless in ((data, cls, IGNORED_KEYS), (network if isinstance(network, dict) else {}, shape, ())):
            _refuse_unknown(part, [*(f.name for f in fields(kind)), *harmless], where)
        check_types(cls, {key: value for key, value in data.items() if key != "network"}, f"{where}/config.json", NO_MODEL)
        check_types(shape, network if isinstance(network, dict) else {}, f"{where}/config.json", NO_MODEL)
        try:
            own = {key: value for key, value in data.items() if key not in ("network", *IGNORED_KEYS)}
            return cls(network=shape(**data["network"]), **own)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}/config.json does not describe a model ({error})") from None


def _refuse_unknown(data: dict[str, Any], known: list[str], where: str) -> None:
    """InputError for a key that would be dropped in silence."""
    for key in sorted(data.keys() - set(known)):
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        raise InputError(f"{where}/config.json does not describe a model (unknown key {key!r}; {hint})")


def digest(path: Path) -> str:
    """sha256 of the weight files of a directory, ours or another library's, or of a GGUF file; 16 hex digits."""
    found = hashlib.sha256()
    for file in [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.bin")]):
        found.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while part := stream.read(1 << 20):
                found.update(part)
    return found.hexdigest()[:16]


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
    if config.network.tied:
        state = {k: v for k, v in state.items() if k != "head.weight"}
    write(directory, state, config.to_json(), files=files, dtype=dtype)


def write(
    directory: str | Path,
    state: dict[str, torch.Tensor],
    config: dict[str, Any],
    *,
    files: dict[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """`save` of any tensors and any config.json. dtype int8: matrices in eight bits, the rest in float16."""
    from huggingface_hub import save_torch_state_dict  # 0.1 s, that loading a model of ours does without

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing_files(directory, order=lambda file: (file.suffix != ".safetensors", file.name == "config.json")) as temporary:
        state = {k: v.detach().cpu() for k, v in state.items()}
        if dtype == torch.int8:
            state = dict(chain.from_iterable(_in_eight_bits(*item) for item in state.items()))
        else:
            state = {k: v.to(dtype or v.dtype).contiguous() for k, v in state.items()}
        # parts of a fused product are copied: safetensors writes whole storages alone
        state = {k: v.clone() if v.untyped_storage().nbytes() > v.nbytes else v for k, v in state.items()}
        save_torch_state_dict(state, temporary, max_shard_size=SHARD)
        stored = str(dtype or next(iter(state.values())).dtype).removeprefix("torch.")
        texts = files | {"config.json": json.dumps(config | {"dtype": stored}, indent=2) + "\n"}
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        written = {file.name for file in temporary.iterdir()}
    # an index or shards of a former save of another size would be read instead of the new file
    weights = [directory / INDEX, directory / "model.safetensors", *directory.glob("model-?????-of-?????.safetensors")]
    for stale in {path.name for path in weights} - written:
        (directory / stale).unlink(missing_ok=True)


SCALE = ".scale"


def _in_eight_bits(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A matrix as int8 and the float32 scale of each row; anything smaller in float16."""
    if weight.ndim != 2 or min(weight.shape) < 16:
        yield name, weight.to(torch.float16).contiguous()
        return
    scale_R1 = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    yield name, (weight.float() / scale_R1).round().to(torch.int8)
    yield name + SCALE, scale_R1


def generation_defaults(config: ModelConfig) -> dict[str, Any]:
    """generation_config.json of a freshly trained model: one step for each token of a window."""
    if config.objective == "autoregressive":
        return {"sampler": "autoregressive", "temperature": 1.0}
    return {"steps": config.network.window, "sampler": "ancestral", "temperature": 1.0}


def card(config: ModelConfig, name: str, parameters: int, place: str = "") -> str:
    """The model card, Markdown with the hub's header. place: by which `dlm.load` finds the model, where that is not its name."""
    block = "block " * (config.network.attention == "block_causal")
    kind = "Autoregressive" if config.objective == "autoregressive" else f"{config.noise['process'].capitalize()} {block}diffusion"
    made = "trained with dlm" if config.family == "dlm" else f"converted from a {config.family} checkpoint by dlm"
    return (
        f"---\nlibrary_name: dlm\npipeline_tag: text-generation\n---\n# {name}\n\n{kind} language model, "
        f"{parameters:,} parameters, window {config.network.window}, context {config.context}, {made}.\n\n"
        f"```python\nimport dlm\n\nprint(dlm.load({json.dumps(place or name)}).generate(length=256, seed=0).text)\n```\n"
    )


def read_defaults(path: Path) -> dict[str, Any]:
    """generation_config.json of a directory, empty where it has none; a key that is null is not set. InputError for values of other types.

    Warns of settings that change the text and that no sampler here has.
    """
    file = path / "generation_config.json"
    found = {key: value for key, value in read_object(file).items() if value is not None}
    for key, value in found.items():
        if key in GENERATION and not _suits(value, *GENERATION[key]):
            kind, low, high = GENERATION[key]
            bounds = f" of {low:g} .. {high:g}" if kind in (int, float) else ""
            raise InputError(f"{file}: {key} is {value!r}: give {KIND_WORDS[kind]}{bounds}, or leave it away")
    as_ids(found.get("eos_token_id"), str(file))
    unread = [f"{key} {found[key]!r}" for key, harmless in UNREAD.items() if found.get(key, harmless) not in (harmless, [], {})]
    if unread:
        warnings.warn(f"{file} asks for {', '.join(unread)}, which dlm does not do", stacklevel=2)
    return found


def _suits(value: object, kind: type, low: float, high: float) -> bool:
    """Whether it is of this kind, a number in low .. high. NaN lies in no range, and a truth value is no number."""
    if kind not in (int, float):
        return isinstance(value, kind)
    return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool) and low <= value <= high


def is_foreign(path: Path) -> bool:
    """Whether `dlm.formats.huggingface` has to read it: a GGUF file, or a directory of a model type that it knows."""
    if path.suffix == ".gguf" and path.is_file():
        return True
    data = read_json(path / "config.json")
    return isinstance(data, dict) and data.get("model_type") in CONVERTIBLE


def is_ours(path: Path) -> bool:
    """Whether `LanguageModel.from_pretrained` reads it: written by dlm, or convertible."""
    return is_foreign(path) or read_json(path / "config.json").get("model_type") == "dlm"


def load_config(path: Path) -> ModelConfig:
    if path.suffix == ".gguf":
        raise InputError(f"{path} is a GGUF file: convert it first, with dlm.load({str(path)!r}).save_pretrained(directory)")
    return ModelConfig.from_json(read_json(path / "config.json"), str(path))


def weights(path: Path, *, copied: bool = False) -> dict[str, Stored]:
    """All tensors of a directory, of one file or of shards, shard after shard; a file is closed when its last tensor has been read.

    copied: tensors are dropped soon after they have been read, so that each one maps its file anew and nothing of it stays resident.
    """
    index = path / INDEX
    names, promised = ["model.safetensors"], set[str]()
    if index.is_file():
        found = read_json(index)
        try:
            promised, names = set(found["weight_map"]), sorted(set(found["weight_map"].values()))
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{index} is damaged ({error}): fetch or train the checkpoint again") from None
    stored: dict[str, Stored] = {}
    for name in names:
        if Path(str(name)).name != name or not (path / name).is_file():
            raise InputError(f"{path} lacks {shown(str(name))}: the checkpoint is not whole, fetch or train it again")
        try:
            file: Any = safe_open(path / name, framework="pt")
            for tensor in file.offset_keys():
                read = partial(_read, path / name, tensor) if copied else partial(file.get_tensor, tensor)
                stored[tensor] = Stored(tuple(file.get_slice(tensor).get_shape()), read)
        except SafetensorError as error:
            raise InputError(f"{path}/{name} is truncated or damaged ({error}): fetch or train it again") from None
    if lost := sorted(promised - stored.keys()):
        raise InputError(f"{path} lacks the tensor {shown(lost[0])}, which its index names: fetch the checkpoint again")
    for scaled in [name for name in stored if name + SCALE in stored]:
        stored[scaled] = stored[scaled].times(stored.pop(scaled + SCALE))
    return stored


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


Ready = Callable[[Transformer, str], None]
"""Called with a network and a part of it, `blocks.N` or `head`, whose weights have been read, as the file has them, to quantize them."""


def load(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, ready: Ready | None = None
) -> tuple[Transformer, ModelConfig]:
    """The network in evaluation mode, and its config. InputError where the files do not fit together."""
    config = load_config(path)
    return assemble(config, weights(path, copied=ready is not None), path, device=device, dtype=dtype, ready=ready), config


def assemble(
    config: ModelConfig,
    stored: dict[str, Stored],
    path: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    ready: Ready | None = None,
) -> Transformer:
    """The network around these tensors, read and cast one by one. Takes them out of `stored`."""
    _check_counts(config.network, stored, path)
    try:
        with without_weights():
            network = networks.make(config.network)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise InputError(f"{path}: its config describes no network ({str(error).splitlines()[0]})") from None
    if config.network.tied:
        stored.pop("head.weight", None)
    shapes = {name: tuple(p.shape) for name, p in network.state_dict().items() if not config.network.tied or name != "head.weight"}
    wrong = [n for n in shapes.keys() | stored.keys() if shapes.get(n) != (stored[n].shape if n in stored else None)]
    if wrong:
        first = shown(sorted(wrong)[0])
        raise InputError(f"the weights in {path} do not fit its config.json (first: {first}); another vocabulary or size?")
    left = Counter(map(_part, stored))
    for name in list(stored):
        tensor, part = stored.pop(name).read(), _part(name)
        if name.endswith(PRECISE):
            tensor = tensor.to(device, torch.float32, copy=ready is not None)
        elif ready is None:
            tensor = tensor.to(device, dtype)
        elif name != "head.weight":  # a copy, or it would hold its file open; what a block quantizes keeps its type until then
            quantized = name.startswith("blocks.") and tensor.ndim > 1 and name.split(".")[-2] in QUANTIZED
            tensor = tensor.to(device, tensor.dtype if quantized else dtype, copy=True)
        _check_finite(tensor, name, path)
        network.load_state_dict({name: tensor}, assign=True, strict=False)
        left[part] -= 1
        if ready is not None and (part == "head" or part.startswith("blocks.")) and not left[part]:
            network.requires_grad_(False)
            ready(network, part)
    if config.network.tied:
        network.head.weight = network.embed.weight
    return network.eval().requires_grad_(False)


def _check_counts(shape: TransformerConfig, stored: dict[str, Stored], path: Path) -> None:
    """InputError for other numbers of layers or experts than the tensors have, before so many are made."""
    layers = {name.split(".")[1] for name in stored if name.startswith("blocks.")}
    experts = {name.split(".")[4] for name in stored if ".mlp.experts." in name}
    stated = {"layers": (shape.layers, len(layers)), "experts": (shape.experts.count if shape.experts else 0, len(experts))}
    for what, (says, has) in stated.items():
        if says != has:
            raise InputError(f"the weights in {path} do not fit its config.json: it says that there are {says} {what}, they have {has}")


def _check_finite(tensor: torch.Tensor, name: str, path: Path) -> None:
    """InputError for weights that are NaN or infinite. A sum finds out, which reads them once and makes no copy."""
    if tensor.is_floating_point() and not bool((tensor.float() if tensor.itemsize == 1 else tensor).sum().isfinite()):
        wrong = int((~tensor.isfinite()).sum())
        if wrong:
            raise InputError(
                f"{path}: {wrong} of the {tensor.numel()} weights of {name} are NaN or infinite: "
                "the file is damaged, or its training diverged"
            )


def _part(name: str) -> str:
    """`blocks.N`, `embed`, `head`, or another module outside of the blocks."""
    return ".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1])
