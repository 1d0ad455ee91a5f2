"""Number formats that the machine's products take."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch


def multiplies_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether the device multiplies bfloat16 in hardware. Elsewhere it is emulated, which takes longer than float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind != "cpu":
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        return prepacks(torch.bfloat16)  # oneDNN takes it there only where there are instructions for it
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


def prepacks(dtype: torch.dtype) -> bool:
    """Whether oneDNN prepacks weights of this type on this machine, for bfloat16 by emulation too."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def prepacked_rows(dtype: torch.dtype) -> range:
    """Rows of a product for which prepacked weights take less time on this CPU than `F.linear`."""
    if dtype == torch.bfloat16:
        return range(1, 257)
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # of torch 2.13
    # F.linear is MKL's for float32, which has AVX-512 kernels for processors of Intel alone
    return range(3, 2**31 if "AMD" in known.get("cpu_name", "") and known.get("avx512_f", False) else 129)
