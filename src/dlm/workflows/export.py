"""Write a model in a layout that other libraries read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from tokenizers.processors import TemplateProcessing

from dlm.adapters.lora import adapter_of
from dlm.errors import InputError, unknown
from dlm.formats import gguf_export, huggingface
from dlm.formats.native import CONVERTIBLE
from dlm.language_model import LanguageModel
from dlm.models.wrapped import WrappedNetwork
from dlm.workflows.inputs import FORMAT, Model, language_model, told

LAYOUTS = ("hf", "gguf")
_QUANTIZED = "{} was loaded with quantized weights: export it from float32 or bfloat16"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Export:
    """model_type: of the written config.json, or the architecture of a GGUF file. readers: the libraries that load `out`.

    files: their sizes in bytes by name."""

    model: str
    to: str
    out: Path
    model_type: str
    readers: tuple[str, ...]
    parameters: int
    files: dict[str, int]

    def record(self) -> dict[str, object]:
        """As `dlm export --json` prints it."""
        facts = {"format": FORMAT, "model": self.model, "to": self.to, "out": str(self.out), "model_type": self.model_type}
        return facts | {"readers": list(self.readers), "parameters": self.parameters, "files": self.files}


@told
def export(model: Model, out: str | Path, *, to: str = "hf", dtype: str | None = None) -> Export:
    """Write a model for other libraries; `dlm.load` reads it again.

    to: `hf`, a directory in the Hugging Face layout with config.json, safetensors, tokenizer and generation_config.json. A Llama, Qwen2 or
    Qwen3 base is written without its mask, as transformers and llama.cpp read it; any other model keeps its own model type, which dlm alone
    reads. `gguf`, one file of an architecture of llama.cpp (`dlm.formats.gguf_export`). dtype: by default that of the weights; of hf
    float32 or bfloat16, of gguf also q8_0, q4_0 or q4_1, in which matrices are quantized.
    InputError for quantized weights, an attached adapter, a path of the other kind, and a network that no GGUF architecture is.
    """
    if to not in LAYOUTS:
        raise unknown("layout", to, LAYOUTS)
    known = gguf_export.TYPES if to == "gguf" else DTYPES
    if dtype is not None and dtype not in known:
        raise unknown("dtype", dtype, known)
    out, lm = Path(out), language_model(model)
    if adapter_of(lm.network) is not None:
        raise InputError(f"{lm.name} has an adapter attached, which is a directory of its own: export the base without it")
    if to == "gguf":
        return _gguf(lm, out, dtype)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: name a directory")
    stored = None if dtype is None else DTYPES[dtype]
    converted = lm.config.family in CONVERTIBLE and not lm.is_diffusion
    if not converted:
        lm.save_pretrained(out, dtype=stored)
    elif lm.network.quantized:
        raise InputError(_QUANTIZED.format(lm.name))
    else:
        huggingface.to_hugging_face(lm.network, lm.config, out, files=lm.files() | _tokenizer(lm), dtype=stored)
    kind = str(huggingface.write_config(lm.config)["model_type"]) if converted else "dlm"
    files = {file.name: file.stat().st_size for file in sorted(out.iterdir()) if file.is_file()}
    readers = ("dlm", "transformers") if converted else ("dlm",)
    return Export(lm.name, to, out, kind, readers, lm.network.parameters_count(), files)


def _gguf(lm: LanguageModel, out: Path, dtype: str | None) -> Export:
    if out.suffix != ".gguf" or out.is_dir():
        raise InputError(f"--to gguf writes one file, whose name ends in .gguf: not {out}")
    if isinstance(lm.network, WrappedNetwork):
        raise InputError(f"{lm.name} is a network of transformers: convert its own files")
    if lm.network.quantized:
        raise InputError(_QUANTIZED.format(lm.name))
    out.parent.mkdir(parents=True, exist_ok=True)
    dtype = dtype or ("bfloat16" if lm.network.embed.weight.dtype == torch.bfloat16 else "float32")
    kind = gguf_export.write(lm.network, lm.config, lm.tokenizer, out, stops=lm.stops, chat=lm.chat, dtype=dtype)
    return Export(lm.name, "gguf", out, kind, ("dlm", "llama.cpp"), lm.network.parameters_count(), {out.name: out.stat().st_size})


def _tokenizer(lm: LanguageModel) -> dict[str, str]:
    """tokenizer.json, made to begin a text with the start token where its own post-processor does not: a GGUF file tells it apart."""
    inner, start = tokenizers.Tokenizer.from_str(lm.tokenizer.inner.to_str()), lm.config.start_token_id
    if start is not None and inner.encode("", add_special_tokens=True).ids != [start]:
        token = inner.id_to_token(start)
        inner.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=[(token, start)])
    return {"tokenizer.json": inner.to_str()}
