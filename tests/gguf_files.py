"""Parts of GGUF files as llama.cpp's converter writes them, by the package's own writer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from dlm.formats.names import Names


def interleave(weight: Tensor, heads: int) -> Tensor:
    """convert_hf_to_gguf.py, LlamaModel.permute: what the rows of q and k of a Llama become."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def add_tensors(writer: Any, tensors: Mapping[str, Tensor], quantization: str = "F32") -> None:
    """tensors: by the names of the file. Rows of 32 numbers are quantized, except those of a router."""
    import gguf

    kept = gguf.GGMLQuantizationType[quantization]
    for name, tensor in tensors.items():
        data = np.ascontiguousarray(tensor.float().numpy())
        if data.ndim > 1 and data.shape[-1] % 32 == 0 and quantization != "F32" and "gate_inp" not in name:
            writer.add_tensor(name, gguf.quantize(data, kept), raw_dtype=kept)
        else:
            writer.add_tensor(name, data)


def converted(tensors: Mapping[str, Tensor], theirs: Names, names: Names, heads: Mapping[str, int]) -> dict[str, Tensor]:
    """Tensors of a checkpoint by the names of the file. heads: whose rows are interleaved, by the part of a block."""
    found = {}
    for key, tensor in tensors.items():
        own = theirs.ours(key)
        assert own is not None
        part = own.rpartition(".")[0].split(".", 2)[-1]
        found[names.theirs(own)] = interleave(tensor, heads[part]) if part in heads else tensor
    return found


def add_metadata(writer: Any, metadata: dict[str, Any]) -> None:
    """Keys of the kind that their value has."""
    import gguf

    kinds = {
        bool: gguf.GGUFValueType.BOOL,
        float: gguf.GGUFValueType.FLOAT32,
        int: gguf.GGUFValueType.UINT32,
        str: gguf.GGUFValueType.STRING,
    }
    for key, value in metadata.items():
        writer.add_key_value(key, value, kinds.get(type(value), gguf.GGUFValueType.ARRAY))


def close(writer: Any) -> None:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
