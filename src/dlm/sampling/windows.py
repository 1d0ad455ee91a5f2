"""A long text through a short window: which part of each row is active.

Windows are tiles that overlap by `context`: tile n starts at n (window - context). Which tile a row works on depends on
that row alone. The network always sees a full window, as in training: past the end of a row lies noise, which for masks is never
revealed, and for replacement noise is denoised with the text and thrown away. So the future is left out, not denied.
Shapes: B rows, L positions of the canvas, T positions of the window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlm.errors import InputError


def check(window: int, context: int) -> None:
    """InputError unless a window that carries `context` tokens over moves on."""
    if not 0 <= context < window:
        raise InputError(f"context {context} must lie in 0 .. {window - 1} for a window of {window}")


def start(open_BL: Tensor, window: int, context: int) -> Tensor:
    """Start of the tile in which the first open position of each row lies with `context` before it; int64 (B,)."""
    return tile(open_BL.int().argmax(-1), window, context)


def tile(first_B: Tensor, window: int, context: int) -> Tensor:
    """Start of the tile in which these positions lie with `context` before them; int64 (B,)."""
    return (first_B - context).clamp(min=0) // (window - context) * (window - context)


def longest_block(window: int, most: int) -> int:
    """The longest block of at most `most` positions that divides the window."""
    return next(n for n in range(min(most, window), 0, -1) if window % n == 0)


def block(open_BT: Tensor, block_length: int, phase_B: Tensor | int = 0) -> tuple[Tensor, Tensor]:
    """The open positions of the first block of each row that has one, bool (B, T), and where that block begins, int64 (B,).

    block_length 0: the whole window is one. phase_B: a position at which some block begins.
    """
    if not block_length:
        return open_BT, torch.zeros(len(open_BT), dtype=torch.long, device=open_BT.device)
    begin_B = (open_BT.int().argmax(-1) - phase_B).div(block_length, rounding_mode="floor") * block_length + phase_B
    pos_T = torch.arange(open_BT.shape[1], device=open_BT.device)
    return open_BT & (pos_T < begin_B[:, None] + block_length), begin_B


def block_end(pos_B: Tensor, block_length: int, phase_B: Tensor) -> Tensor:
    """The position after the block in which each of these lies."""
    return ((pos_B - phase_B).div(block_length, rounding_mode="floor") + 1) * block_length + phase_B


def places(rows_A: Tensor, start_A: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The index of the windows of these rows in a canvas: rows (A, 1) and positions (A, T)."""
    return rows_A[:, None], start_A[:, None] + torch.arange(window, device=start_A.device)


def take(x_BL: Tensor, start_B: Tensor, window: int) -> Tensor:
    """The window of every row (B, T, ...)."""
    return x_BL[places(torch.arange(len(x_BL), device=x_BL.device), start_B, window)]


def put(x_BL: Tensor, rows_A: Tensor, start_A: Tensor, values_AT: Tensor, where_AT: Tensor) -> None:
    """Write the chosen window positions of the rows A back into the canvas."""
    at_AT = places(rows_A, start_A, where_AT.shape[1])
    x_BL[at_AT] = torch.where(where_AT, values_AT, x_BL[at_AT])
