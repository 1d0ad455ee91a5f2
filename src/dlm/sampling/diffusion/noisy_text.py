"""The noisy text of the rows of a run, and the windows of it that are active.

Shapes: B rows, A rows with open positions, K rows that stay, L positions of the canvas, past its end a window more, T of the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.errors import InputError
from dlm.noise.masked import MaskedNoise
from dlm.protocols import RNG, Denoiser, NoiseProcess
from dlm.sampling import windows
from dlm.sampling.batching import stacked
from dlm.sampling.draw import beside, uniform
from dlm.trajectory import Canvas

Ends = Literal["block", "text", "cut"]
"""When a stop token ends a text: with its block, as the reference samplers of block diffusion; once all before it is settled, which is the
same text in fewer forward passes; at once for what stands after it, which is then neither read nor written."""


@dataclass(frozen=True)
class Active:
    """The windows of the rows with open positions.

    rows: those rows, on the host; start_A: where each begins; place_A: where the block begins that is worked on, both in the canvas;
    at_AT: the index of the windows in it.
    hole_AT: open positions, block_AT those of that block; given_AT: prompt and suffix; beyond_AT: no part of the text.
    phase_A: a position at which some block begins.
    """

    rows: list[int]
    rows_A: Tensor
    start_A: Tensor
    place_A: Tensor
    at_AT: tuple[Tensor, Tensor]
    z_AT: Tensor
    hole_AT: Tensor
    block_AT: Tensor
    given_AT: Tensor
    beyond_AT: Tensor
    phase_A: Tensor


class NoisyText:
    """z_BL: the state; open_BL: positions that are not settled; given_BL: prompt and suffix; beyond_BL: no part of the text, which is read
    as noise and, unless it is masked, denoised with it. phase_B: a position at which some block of each row begins.

    whole_blocks: of a network that reads blocks of this length whole: masks fill the block in which a text ends with a hole. They are
    written with it, and never shown.
    """

    def __init__(self, canvas: Canvas, noise: NoiseProcess, window: int, phase_B: Tensor, rng: RNG, whole_blocks: int = 0) -> None:
        past_BL = torch.zeros(len(canvas.tokens_BT), window, dtype=torch.bool, device=canvas.tokens_BT.device)
        self.tokens_BL, self.valid_BL, self.phase_B = canvas.tokens_BT, canvas.valid_BT, phase_B
        self.window, self.mask_id = window, noise.mask_id
        self.z_BL = prior(canvas, noise, window, rng)
        self.open_BL = torch.cat([canvas.free_BT, past_BL], 1)
        self.given_BL = torch.cat([canvas.given_BT, past_BL], 1)
        self.beyond_BL = torch.cat([~canvas.valid_BT, ~past_BL], 1)
        if whole_blocks:
            rest_BL = self._rest_of_blocks(whole_blocks)
            self.open_BL |= rest_BL
            self.beyond_BL &= ~rest_BL

    def _rest_of_blocks(self, block_length: int) -> Tensor:
        """The positions after a hole that ends a row, up to where its block ends, or the window."""
        count_B1 = self.valid_BL.sum(-1, keepdim=True)
        until_B1 = windows.block_end(count_B1 - 1, block_length, self.phase_B[:, None])
        until_B1 = torch.where(count_B1 > self.window, until_B1, until_B1.clamp(max=self.window))
        pos_L = torch.arange(self.z_BL.shape[1], device=self.z_BL.device)
        rest_BL: Tensor = self.open_BL.gather(1, count_B1 - 1) & (pos_L >= count_B1) & (pos_L < until_B1)
        return rest_BL

    @property
    def count_B(self) -> Tensor:
        """Positions of each row that the network may read, int64 (B,)."""
        return (~self.beyond_BL).sum(-1)

    @property
    def asked_BL(self) -> Tensor:
        """The positions of the text that is asked for."""
        return F.pad(self.valid_BL, (0, self.z_BL.shape[1] - self.length))

    @property
    def settled_BL(self) -> Tensor:
        """Those of the canvas that do not change again."""
        return ~(self.open_BL[:, : self.length] & self.valid_BL)

    @property
    def length(self) -> int:
        """Positions of the canvas."""
        return self.tokens_BL.shape[1]

    @property
    def shown_BL(self) -> Tensor:
        """The tokens of the canvas, its own on padding."""
        return torch.where(self.valid_BL, self.z_BL[:, : self.length], self.tokens_BL)

    def active(self, context: int, block_length: int, *, fills_window: bool) -> Active:
        """The windows of the rows with open positions, which carry `context` tokens over."""
        live = self.open_BL.any(-1).tolist()
        rows, device = [b for b, one in enumerate(live) if one], self.open_BL.device
        rows_A = torch.arange(len(live), device=device) if all(live) else torch.tensor(rows, device=device)
        start_A = windows.start(self.open_BL[rows_A], self.window, context)
        at_AT = windows.places(rows_A, start_A, self.window)
        z_AT, hole_AT, given_AT, beyond_AT = (x_BL[at_AT] for x_BL in (self.z_BL, self.open_BL, self.given_BL, self.beyond_BL))
        phase_A = torch.zeros_like(start_A) if fills_window else self.phase_B[rows_A] - start_A
        block_AT, begin_A = windows.block(hole_AT, block_length, phase_A)
        return Active(rows, rows_A, start_A, start_A + begin_A, at_AT, z_AT, hole_AT, block_AT, given_AT, beyond_AT, phase_A)

    def write(self, active: Active, next_AT: Tensor, written_AT: Tensor, done_AT: Tensor) -> None:
        """Put tokens where `written` says and settle positions where `done` says; a row is done with the text that is asked for."""
        self.z_BL[active.at_AT] = torch.where(written_AT, next_AT, active.z_AT)
        self.open_BL[active.at_AT] = active.hole_AT & ~done_AT
        self.open_BL &= (self.open_BL[:, : self.length] & self.valid_BL).any(-1, keepdim=True)

    def end(self, rows_A: Tensor, stops: frozenset[int], ends: Ends, block_length: int) -> None:
        """Settle the rest of the rows whose text has ended: all before a stop token that was written is settled."""
        pos_L = torch.arange(self.z_BL.shape[1], device=self.z_BL.device)
        open_AL, given_AL = self.open_BL[rows_A], self.given_BL[rows_A]
        stop_AL = torch.isin(self.z_BL[rows_A], torch.tensor(sorted(stops), device=pos_L.device))
        stop_AL &= self.asked_BL[rows_A] & ~(open_AL | given_AL | self.beyond_BL[rows_A])
        has_A1, first_A1 = stop_AL.any(-1, keepdim=True), stop_AL.int().argmax(-1, keepdim=True)
        if ends == "cut":
            last_A1 = (pos_L * given_AL).amax(-1, keepdim=True)  # what stands after the text is still read
            self.open_BL[rows_A] &= ~(has_A1 & (pos_L > first_A1))
            self.beyond_BL[rows_A] |= has_A1 & (pos_L > torch.maximum(first_A1, last_A1))
            return
        whole = ends == "block" and block_length > 0
        until_A1 = windows.block_end(first_A1, block_length, self.phase_B[rows_A][:, None]) if whole else first_A1
        ended_A = has_A1.squeeze(-1) & ~(open_AL & (pos_L < until_A1)).any(-1)
        self.open_BL[rows_A[ended_A]] = False

    def join(self, other: NoisyText) -> None:
        """Take in the rows of another text."""
        fill = {"tokens_BL": self.mask_id, "z_BL": self.mask_id, "beyond_BL": True}
        for name in ("tokens_BL", "valid_BL", "phase_B", "z_BL", "open_BL", "given_BL", "beyond_BL"):
            setattr(self, name, stacked(getattr(self, name), getattr(other, name), fill.get(name, 0)))
        self.window = max(self.window, other.window)

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone."""
        for name in ("tokens_BL", "valid_BL", "phase_B", "z_BL", "open_BL", "given_BL", "beyond_BL"):
            setattr(self, name, getattr(self, name)[rows_K])


def phase(canvas: Canvas, block_length: int, block_phase: str) -> Tensor:
    """Position of each row at which some block begins, int64 (B,), below the block length."""
    first_B = canvas.free_BT.int().argmax(-1)
    return first_B % block_length if block_length and block_phase == "prompt" else torch.zeros_like(first_B)


def whole_blocks(block_length: int, block_phase: str, *, sees_ahead: bool, fills_window: bool) -> int:
    """The length of the blocks that a network reads whole, as in its training; 0 where a text may end within one."""
    return 0 if sees_ahead or fills_window or block_phase != "zero" else block_length


def width(canvas: Canvas, window: int, whole_blocks: int) -> int:
    """Positions that a network reads at once of texts that do not fill its window; whole_blocks as of `NoisyText`."""
    length = canvas.tokens_BT.shape[1]
    return min(window, -(-length // whole_blocks) * whole_blocks if whole_blocks else length)


def check_order(canvas: Canvas, block_length: int, block_phase: str) -> None:
    """InputError for a canvas that a network which reads nothing after a block cannot fill."""
    pos_L = torch.arange(canvas.free_BT.shape[1], device=canvas.free_BT.device)
    block_BL = (pos_L - phase(canvas, block_length, block_phase)[:, None]).div(block_length, rounding_mode="floor")
    first_B = block_BL.masked_fill(~canvas.free_BT, len(pos_L)).amin(-1)
    if bool((canvas.given_BT & (block_BL > first_B[:, None])).any()):
        raise InputError("block diffusion reads what comes before a block: it cannot fill holes or lead to a suffix in later ones")


def described(active: Active, block_length: int, block_phase: str, denoiser: Denoiser, *, sees_ahead: bool) -> dict[str, Tensor]:
    """Arguments of a network for windows that a text does not fill: where it stands, and positions that begin a block at a multiple, or
    where the block begins for a network that `reads_begin`."""
    beyond_AT = active.beyond_AT
    found = {"valid_BT": ~beyond_AT} if bool(beyond_AT.any()) else {}
    if getattr(denoiser, "reads_begin", False):
        found["begin_B1"] = (active.place_A - active.start_A)[:, None]
    elif not sees_ahead and block_phase == "prompt":
        begin_A1 = (-active.phase_A % block_length)[:, None]
        found["pos_BQ"] = begin_A1 + torch.arange(beyond_AT.shape[1], device=beyond_AT.device)
    return found


def prior(canvas: Canvas, noise: NoiseProcess, window: int, rng: RNG) -> Tensor:
    """Noise at the free positions, on the padding and for a window past the end: all that a window can show; int64 (B, L + T)."""
    rows, length = canvas.tokens_BT.shape
    z_BL = torch.full((rows, length + window), noise.mask_id, device=canvas.tokens_BT.device)
    for b in range(rows) if not isinstance(noise, MaskedNoise) else ():  # as many draws as the row is long, whatever its neighbours are
        count = int(canvas.valid_BT[b].sum()) + window
        z_BL[b, :count] = noise.prior(beside(uniform(rng[b : b + 1], count), z_BL))[0]
    z_BL[:, :length] = torch.where(canvas.given_BT, canvas.tokens_BT, z_BL[:, :length])
    return z_BL
