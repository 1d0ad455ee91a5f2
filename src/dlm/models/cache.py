"""KV caches: keys and values of positions already read, and beside them the inputs of short convolutions, where a network has some.

Shapes: B batch, A rows of one forward pass, G key-value heads, T capacity or the part of it in use, Q new positions, K head dimension,
D width of the network, 0 in a network without short convolutions.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor


class Memory:
    """Keys and values as compiled blocks read them: the whole capacity, so that shapes stay the same from token to token."""

    kv: Tensor  # (layers, 2, B, G, T, K)
    conv: Tensor  # (layers, B, T, D)
    _kept: tuple[Tensor, list[tuple[Tensor, ...]]] | None = None  # parts of a kv and its conv

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        width: int = 0,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.kv = torch.zeros(layers, 2, batch, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.conv = torch.zeros(layers, batch, capacity, width, dtype=dtype, device=device)

    @property
    def capacity(self) -> int:
        return self.kv.shape[4]

    def span(self, queries: int) -> tuple[int, int] | None:
        """The first slot and the end of so many new positions; None where rows have slots of their own, or no room."""
        raise NotImplementedError

    def whole(self, first: int, end: int, mask: Tensor | None) -> tuple[list[tuple[Tensor, ...]], Tensor, Tensor]:
        """(keys, values (B, G, T, K) and conv (B, T, D) of each layer, slots of new positions, the bias of the scores (B, 1, Q, T)).

        mask: of the positions up to `end`, bool or a bias of the scores; None where every position is read.
        """
        kv, device = self.kv, self.kv.device
        if self._kept is None or self._kept[0] is not kv:
            self._kept = kv, [(*layer, conv_BTD) for layer, conv_BTD in zip(kv, self.conv, strict=True)]
        scores = torch.full((kv.shape[2], 1, end - first, kv.shape[4]), -torch.inf, dtype=kv.dtype, device=device)
        if mask is not None and mask.dtype == torch.bool:
            scores[..., :end].masked_fill_(mask, 0.0)
        else:
            scores[..., :end] = 0.0 if mask is None else mask
        return self._kept[1], torch.arange(first, end, device=device), scores


class KVCache(Memory):
    """Preallocated; new positions go after the `length` already held. `trim` forgets, `clone` copies."""

    length = 0

    def write(self, layer: int, k_BGQK: Tensor, v_BGQK: Tensor) -> tuple[Tensor, Tensor]:
        """Store after `length`, return all keys and values held so far. `advance` moves `length` once all layers have written."""
        end = self._end(k_BGQK.shape[2])
        self.kv[layer, 0, :, :, self.length : end] = k_BGQK
        self.kv[layer, 1, :, :, self.length : end] = v_BGQK
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]

    def write_conv(self, layer: int, x_BQD: Tensor) -> Tensor:
        """Store inputs of a short convolution as `write` does, return those of all slots (B, T, D)."""
        self.conv[layer, :, self.length : self._end(x_BQD.shape[1])] = x_BQD
        return self.conv[layer]

    def _end(self, queries: int) -> int:
        end = self.length + queries
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, {end} were asked for")
        return end

    def span(self, queries: int) -> tuple[int, int] | None:
        end = self.length + queries
        return (self.length, end) if end <= self.capacity else None

    def advance(self, count: int) -> None:
        self.length += count

    def trim(self, length: int) -> None:
        """Forget every position from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot trim a cache of {self.length} positions to {length}")
        self.length = length

    def clone(self) -> KVCache:
        copy = object.__new__(KVCache)
        copy.kv, copy.conv, copy.length = self.kv.clone(), self.conv.clone(), self.length
        return copy


class RaggedCache(Memory):
    """A batch whose rows have their own lengths: new positions go after each row's `length_B`, `trim` forgets them again.

    Preallocated and read in place, up to the longest row. Rows may `join`, and others leave.
    """

    length_B: Tensor
    rows_B1: Tensor

    def __init__(self, layers: int, batch: int, *shape: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers, batch, *shape, dtype=dtype, device=device)
        self._number(torch.zeros(batch, dtype=torch.long, device=device))

    def begin(self, own_BQQ: Tensor) -> Tensor | None:
        """The mask of the next Q positions, bool (B, Q, T): they read all positions that their row holds, and one another by own_BQQ.

        None where they read all that `write` returns.
        """
        queries, lengths = own_BQQ.shape[1], self.length_B.tolist()
        self.end = max(lengths) + queries
        self.even = min(lengths) == max(lengths)  # all rows end at one place: a slice, not an index
        if self.end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, {self.end} were asked for")
        if self.even:
            if queries == 1:
                return None
            return F.pad(own_BQQ, (self.end - queries, 0), value=True)
        self.slot_BQ = self.length_B[:, None] + torch.arange(queries, device=own_BQQ.device)
        since_BT = torch.arange(self.end, device=own_BQQ.device) - self.length_B[:, None]
        held_BT, new_BT = since_BT < 0, (since_BT >= 0) & (since_BT < queries)
        own_BQT = own_BQQ.gather(2, since_BT.clamp(0, queries - 1)[:, None].expand(-1, queries, -1))
        return held_BT[:, None] | own_BQT & new_BT[:, None]

    def positions(self, pos_BQ: Tensor) -> Tensor:
        """Those of the slots (B, T), new ones at pos_BQ: what a row holds is the beginning of its text."""
        held_BT = torch.arange(self.end, device=pos_BQ.device).expand(len(pos_BQ), -1)
        if self.even:
            return torch.cat([held_BT[:, : self.end - pos_BQ.shape[1]], pos_BQ], 1)
        return held_BT.scatter(1, self.slot_BQ, pos_BQ)

    def write(self, layer: int, k_BGQK: Tensor, v_BGQK: Tensor) -> tuple[Tensor, Tensor]:
        """Store after each row's length, return keys and values up to the longest row's."""
        for kv_BGTK, new_BGQK in zip(self.kv[layer], (k_BGQK, v_BGQK), strict=True):
            if self.even:
                kv_BGTK[:, :, self.end - new_BGQK.shape[2] : self.end] = new_BGQK
                continue
            kv_BGTK.transpose(1, 2)[self.rows_B1, self.slot_BQ] = new_BGQK.transpose(1, 2)
        return self.kv[layer, 0, :, :, : self.end], self.kv[layer, 1, :, :, : self.end]

    def write_conv(self, layer: int, x_BQD: Tensor) -> Tensor:
        """Store inputs of a short convolution as `write` does, return those of all slots (B, T, D)."""
        if self.even:
            self.conv[layer, :, self.end - x_BQD.shape[1] : self.end] = x_BQD
        else:
            self.conv[layer][self.rows_B1, self.slot_BQ] = x_BQD
        return self.conv[layer]

    def span(self, queries: int) -> tuple[int, int] | None:
        return (self.end - queries, self.end) if self.even else None

    def advance(self, count: int) -> None:
        self.length_B = self.length_B + count

    def trim(self, length_B: Tensor) -> None:
        """Forget every position of a row from its new length on."""
        if bool(((length_B < 0) | (length_B > self.length_B)).any()):
            raise ValueError(f"cannot trim a cache of {self.length_B.tolist()} positions to {length_B.tolist()}")
        self.length_B = length_B

    def close_up(self, first_B: Tensor, index_BK: Tensor) -> None:
        """Move the positions first + index of each row, in rising order, to first + 0, 1 .."""
        to_BK, from_BK = first_B[:, None] + torch.arange(index_BK.shape[1], device=first_B.device), first_B[:, None] + index_BK
        kv_TBLGK, conv_TBLD = self.kv.permute(4, 2, 0, 1, 3, 5), self.conv.permute(2, 1, 0, 3)  # L: layers, twice for keys and values
        for stored_TB in (kv_TBLGK, conv_TBLD) if self.conv.numel() else (kv_TBLGK,):
            stored_TB[to_BK, self.rows_B1] = stored_TB[from_BK, self.rows_B1]

    def join(self, other: RaggedCache) -> None:
        """Take in the rows of another cache of the same network."""
        capacity = max(self.capacity, other.capacity)
        kv, conv = (
            [F.pad(part, (0, 0, 0, capacity - part.shape[-2])) for part in parts]
            for parts in ((self.kv, other.kv), (self.conv, other.conv))
        )
        self.kv, self.conv = torch.cat(kv, 2), torch.cat(conv, 1)
        self._number(torch.cat([self.length_B, other.length_B]))

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone."""
        self.kv, self.conv = self.kv[:, :, rows_K], self.conv[:, rows_K]
        self._number(self.length_B[rows_K])

    def _number(self, length_B: Tensor) -> None:
        self.length_B, self.rows_B1 = length_B, torch.arange(len(length_B), device=length_B.device)[:, None]


class TextCache:
    """Keys and values of a text as the first forward pass computed them; later ones read them beside their own, which are not kept.

    Nothing is written in place: later passes have gradients of their own, even beside a text that was read without gradients.
    A later forward pass may have C rows for each one of the text, one after another.
    """

    length = 0

    def __init__(self) -> None:
        self.kv: list[tuple[Tensor, Tensor]] = []
        self.conv: list[Tensor] = []
        self.beside = False

    pos_BT: Tensor  # of the text

    def begin(self, own_BQT: Tensor) -> Tensor:
        """Of later forward passes: the positions that they read, bool (B C, Q, T + Q)."""
        self.beside = True
        return own_BQT

    def positions(self, pos_BQ: Tensor) -> Tensor:
        """Those of the text, then new ones at pos_BQ: (B C, T + Q)."""
        return torch.cat([_for_each(self.pos_BT, pos_BQ), pos_BQ], 1)

    def write(self, layer: int, k_BGQK: Tensor, v_BGQK: Tensor) -> tuple[Tensor, Tensor]:
        if not self.beside:
            self.kv.append((k_BGQK, v_BGQK))
            return k_BGQK, v_BGQK
        k_BGTK, v_BGTK = (_for_each(held, k_BGQK) for held in self.kv[layer])
        return torch.cat([k_BGTK, k_BGQK], 2), torch.cat([v_BGTK, v_BGQK], 2)

    def write_conv(self, layer: int, x_BQD: Tensor) -> Tensor:
        """Inputs of a short convolution, as `write` has keys: (B, T + Q, D)."""
        if not self.beside:
            self.conv.append(x_BQD)
            return x_BQD
        return torch.cat([_for_each(self.conv[layer], x_BQD), x_BQD], 1)


def _for_each(held_B: Tensor, new_C: Tensor) -> Tensor:
    """Each row held as often as there are new ones for it."""
    return held_B.repeat_interleave(len(new_C) // len(held_B), 0)


class WindowCache:
    """A slot for every position of a window, overwritten where a forward pass computes it anew; each row at its own positions.

    One slot more, `T`, takes the padding of rows that compute fewer positions than others; nothing ever reads it.
    drift_BT: how far the values of the last layer moved when a position was read last, relative to their length; 0 at its first.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        window: int,
        head_dim: int,
        width: int = 0,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.kv = torch.zeros(layers, 2, batch, window + 1, kv_heads, head_dim, dtype=dtype, device=device)
        self.conv = torch.zeros(layers, batch, window + 1, width, dtype=dtype, device=device)
        self.filled_BT = torch.zeros(batch, window + 1, dtype=torch.bool, device=device)
        self.drift_BT = torch.zeros(batch, window, device=device)
        self.layers, self.window = layers, window
        self.rows_A1 = torch.arange(batch, device=device)[:, None]
        self.begin_A1: Tensor | None = None

    def of(self, rows_A: Tensor, begin_A: Tensor | None = None) -> WindowCache:
        """The part of these rows, sharing memory. begin_A: the position of each one's first slot, by default 0."""
        part = copy.copy(self)
        part.rows_A1, part.begin_A1 = rows_A[:, None], None if begin_A is None else begin_A[:, None]
        return part

    def join(self, other: WindowCache) -> None:
        """Take in the rows of another cache of the same network, whose window may be wider or narrower."""
        window = max(self.window, other.window)
        for one in (self, other):
            one._widen(window)
        self.kv, self.conv = torch.cat([self.kv, other.kv], 2), torch.cat([self.conv, other.conv], 1)
        self._mark(*(torch.cat(x) for x in zip(self._marks(), other._marks(), strict=True)))

    def _widen(self, window: int) -> None:
        """Slots for more positions, nothing in them, nor in that of the padding, which moves to the end."""
        if more := window - self.window:
            self.filled_BT[:, self.window] = False
            self.filled_BT, self.drift_BT = (F.pad(x, (0, more)) for x in self._marks())
            self.kv, self.conv = F.pad(self.kv, (0, 0, 0, 0, 0, more)), F.pad(self.conv, (0, 0, 0, more))
            self.window = window

    def keep(self, rows_K: Tensor) -> None:
        """Go on with these rows alone."""
        self.kv, self.conv = self.kv[:, :, rows_K], self.conv[:, rows_K]
        self._mark(*(x[rows_K] for x in self._marks()))

    def _marks(self) -> tuple[Tensor, Tensor]:
        return self.filled_BT, self.drift_BT

    def _mark(self, filled_BT: Tensor, drift_BT: Tensor) -> None:
        self.filled_BT, self.drift_BT = filled_BT, drift_BT
        self.rows_A1 = torch.arange(len(filled_BT), device=filled_BT.device)[:, None]

    def clear(self, rows_A: Tensor) -> None:
        """Forget all positions of these rows."""
        self.filled_BT[rows_A] = False
        self.drift_BT[rows_A] = 0

    def hide(self, rows_A: Tensor, hidden_AT: Tensor) -> None:
        """Forget these positions, bool (A, T)."""
        self.filled_BT[rows_A, : self.window] &= ~hidden_AT

    def begin(self, pos_AQ: Tensor) -> tuple[Tensor, Tensor | None]:
        """Set the positions of the next writes: (positions of all slots (A or 1, T), whether each is filled (A, T) or None for all)."""
        self.pos_AQ = pos_AQ if self.begin_A1 is None else pos_AQ - self.begin_A1
        self.was_AQ = self.filled_BT[self.rows_A1, self.pos_AQ]
        self.filled_BT[self.rows_A1, self.pos_AQ] = True
        filled_AT = self.filled_BT[self.rows_A1.squeeze(1), : self.window]
        slot_1T = torch.arange(self.window, device=pos_AQ.device)[None]
        all_AT = slot_1T if self.begin_A1 is None else slot_1T + self.begin_A1
        return all_AT, None if bool(filled_AT.all()) else filled_AT

    def write(self, layer: int, k_AGQK: Tensor, v_AGQK: Tensor) -> tuple[Tensor, Tensor]:
        """Store at the positions of `begin`, return keys and values (A, G, T, K) of the whole window."""
        k_AQGK, v_AQGK = k_AGQK.transpose(1, 2), v_AGQK.transpose(1, 2)
        if layer == self.layers - 1:
            self._measure(v_AQGK)
        self.kv[layer, 0][self.rows_A1, self.pos_AQ] = k_AQGK.to(self.kv.dtype)  # autocast may compute in another type
        self.kv[layer, 1][self.rows_A1, self.pos_AQ] = v_AQGK.to(self.kv.dtype)
        if len(self.rows_A1) == self.kv.shape[2]:  # all rows in order: no copy
            k_ATGK, v_ATGK = self.kv[layer, 0], self.kv[layer, 1]
        else:
            k_ATGK, v_ATGK = self.kv[layer, 0][self.rows_A1.squeeze(1)], self.kv[layer, 1][self.rows_A1.squeeze(1)]
        return k_ATGK[:, : self.window].transpose(1, 2), v_ATGK[:, : self.window].transpose(1, 2)

    def write_conv(self, layer: int, x_AQD: Tensor) -> Tensor:
        """Store inputs of a short convolution as `write` does, return those of all slots (A, T + 1, D)."""
        self.conv[layer][self.rows_A1, self.pos_AQ] = x_AQD.to(self.conv.dtype)
        return self.conv[layer] if len(self.rows_A1) == self.conv.shape[1] else self.conv[layer][self.rows_A1.squeeze(1)]

    def _measure(self, v_AQGK: Tensor) -> None:
        old_AQGK = self.kv[self.layers - 1, 1][self.rows_A1, self.pos_AQ]
        moved_AQ = (v_AQGK - old_AQGK).flatten(2).float().norm(dim=-1) / old_AQGK.flatten(2).float().norm(dim=-1).clamp(min=1e-6)
        row_N, query_N = (self.pos_AQ < self.window).nonzero(as_tuple=True)
        at_N = self.rows_A1[row_N, 0], self.pos_AQ[row_N, query_N]
        self.drift_BT[at_N] = torch.where(self.was_AQ, moved_AQ, 0.0)[row_N, query_N]

    def advance(self, count: int) -> None:
        """Nothing to do: `begin` gives the slots."""
