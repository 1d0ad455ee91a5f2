"""Number formats that the machine's products take."""

from __future__ import annotations

import platform

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
