"""Attention patterns as predicates over (query position, key position), and two backends that must agree.

Shapes: B batch, H heads, G key-value heads, Q queries, T keys, K head dimension.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.models import elementwise
from dlm.models.dropout import dropout as drop
from dlm.models.hardware import multiplies_bf16

TILE = 64
QUERIES, SCORES = 64, 2**21  # the fewest queries and the most scores, without a gradient, of attention by plain products
BLOCKWISE = ("block_causal", "causal_text")
PATTERNS = ("full", "causal", *BLOCKWISE)


class FlexMask(NamedTuple):
    """In place of a mask: attend with FlexAttention by this pattern."""

    pattern: str
    block_length: int


class Tile(NamedTuple):
    """A run of TILE queries and the runs of TILE keys that any of them reads."""

    keys: tuple[int, ...]
    mask: Tensor | None  # bool (TILE, as many keys); None: all are read


class Tiles(NamedTuple):
    """In place of the mask of [noisy | clean]: the queries run by run, without the keys that none of a run reads."""

    block_length: int
    runs: tuple[Tile, ...]


Mask = Tensor | FlexMask | Tiles | None
"""Which keys a query reads: bool, or added to the scores; None for all."""


def allowed(pattern: str, query: Tensor, key: Tensor, block_length: int) -> Tensor:
    """bool, broadcast of `query` and `key` positions: may the query read the key?"""
    if pattern == "causal":
        return key <= query
    if pattern == "block_causal":
        return key // block_length <= query // block_length
    return torch.ones_like(key <= query)


def causal_text(pos_BQ: Tensor, pos_BT: Tensor, begin_B1: Tensor, block_length: int) -> Tensor:
    """bool (B, Q, T): the text is read causally, and the block that begins at `begin` reads itself fully (Nemotron-Labs-Diffusion).

    A row whose block begins at 0 and is as long as the text is read fully.
    """
    query, key, begin = pos_BQ[:, :, None], pos_BT[:, None, :], begin_B1[:, None]
    return (key <= query) | (query >= begin) & (key >= begin) & (key < begin + block_length)


def beside_clean(pos_BT: Tensor, block_length: int, *, causal: bool = False) -> Tensor:
    """bool (B, 2T, 2T) for the sequence [noisy | clean] of block diffusion (BD3-LM, Arriola et al. 2503.09573, section 3.1).

    A noisy position reads its own noisy block and the clean blocks before it, a clean one the clean blocks up to its own, or the clean
    text up to itself (causal).
    """
    block_BT = pos_BT // block_length
    query, key = block_BT[:, :, None], block_BT[:, None, :]
    noisy = torch.cat([query == key, key < query], -1)
    before = pos_BT[:, None, :] <= pos_BT[:, :, None] if causal else key <= query
    clean = torch.cat([torch.zeros_like(query == key), before], -1)
    return torch.cat([noisy, clean], 1)


@lru_cache(maxsize=16)
def tiles_beside_clean(length: int, block_length: int, device: torch.device) -> Tiles:
    """`beside_clean` of positions 0 .. length - 1, a multiple of TILE."""
    mask_QT = beside_clean(torch.arange(length, device=device)[None], block_length)[0]
    reads = mask_QT.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).any(3).any(1)
    return Tiles(block_length, tuple(_tile(rows, keys) for rows, keys in zip(mask_QT.split(TILE), reads, strict=True)))


def _tile(mask_QT: Tensor, reads: Tensor) -> Tile:
    keys = tuple(reads.nonzero().flatten().tolist())
    mask = torch.cat([mask_QT.split(TILE, 1)[key] for key in keys], 1)
    return Tile(keys, None if bool(mask.all()) else mask)


def introspective(pos_BT: Tensor, block_length: int, phase_B: Tensor | None = None) -> Tensor:
    """bool (B, 2T, 2T) for [masks | clean] of introspective training (I-DLM, arXiv 2604.11035): causal in either half.

    A mask reads the masks before it in its own block and the clean tokens of the blocks before; clean never reads masks.
    phase_B: how far into a block each row begins, so that blocks need not lie at the same place in every row.
    """
    block_BT = (pos_BT if phase_B is None else pos_BT + phase_B[:, None]) // block_length
    query, key = block_BT[:, :, None], block_BT[:, None, :]
    causal = (pos_BT[:, None, :] <= pos_BT[:, :, None]).expand_as(query == key)
    masks = torch.cat([causal & (query == key), key < query], -1)
    clean = torch.cat([torch.zeros_like(causal), causal], -1)
    return torch.cat([masks, clean], 1)


def beside_shadow(length: int, device: torch.device) -> Tensor:
    """bool (1, 2Q, 2Q) for [text | shadow]: text reads text; a shadow reads all text but its own position's, and itself."""
    own = torch.eye(length, dtype=torch.bool, device=device)
    text, nothing = torch.ones_like(own), torch.zeros_like(own)
    return torch.cat([torch.cat([text, nothing], 1), torch.cat([~own, own], 1)])[None]


def mask(
    pattern: str, block_length: int, pos_BQ: Tensor, pos_BT: Tensor, valid_BT: Tensor | None, *, plain: bool
) -> tuple[Tensor | None, bool]:
    """(mask_B1QT or None, is_causal) for scaled_dot_product_attention. `plain`: positions are 0..T-1 in every row."""
    if valid_BT is None and plain and (pattern != "block_causal" or pos_BT.shape[1] <= block_length):  # one block reads itself fully
        return None, pattern == "causal"
    return text_only(allowed(pattern, pos_BQ[:, :, None], pos_BT[:, None, :], block_length), valid_BT)[:, None], False


def text_only(mask_BQT: Tensor, valid_BT: Tensor | None) -> Tensor:
    """The mask without padding, which no position reads."""
    if valid_BT is None:
        return mask_BQT
    mask_BQT = mask_BQT & valid_BT[:, None, :]
    # a padded query may find no key, which softmax turns into NaN; it reads itself
    if mask_BQT.shape[1] == mask_BQT.shape[2]:
        mask_BQT = mask_BQT | torch.eye(mask_BQT.shape[1], dtype=torch.bool, device=mask_BQT.device) & ~valid_BT[:, :, None]
    return mask_BQT


@lru_cache(maxsize=16)
def _flex_mask(pattern: str, block_length: int, length: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def predicate(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return allowed(pattern, q, k, block_length)

    return create_block_mask(predicate, None, None, length, length, device=device)


@lru_cache(maxsize=1)
def _flex(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


def attend(q_BHQK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask: Tensor | None, is_causal: bool, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention, grouped keys repeated by the kernel.

    In half precision on a CPU that kernel takes four times as long back as plain products do, so those are used where there is a gradient,
    and half as long again forward, where the scores of whole texts stay in a cache of the processor. Dropout takes them too where it draws
    from a generator of the thread.
    """
    if dropout and elementwise.pay(q_BHQK):
        mask = torch.ones(q_BHQK.shape[2], k_BGTK.shape[2], dtype=torch.bool).tril()[None, None] if is_causal else mask
        return attend_by_products(q_BHQK, k_BGTK, v_BGTK, mask, dropout)
    half_on_cpu = q_BHQK.device.type == "cpu" and q_BHQK.dtype in (torch.bfloat16, torch.float16)
    if half_on_cpu and not is_causal and not dropout and (q_BHQK.requires_grad or _few_scores(q_BHQK, k_BGTK)):
        return attend_by_products(q_BHQK, k_BGTK, v_BGTK, mask)
    grouped = q_BHQK.shape[1] != k_BGTK.shape[1]
    return F.scaled_dot_product_attention(
        q_BHQK, k_BGTK, v_BGTK, attn_mask=mask, is_causal=is_causal, dropout_p=dropout, enable_gqa=grouped
    )


def _few_scores(q_BHQK: Tensor, k_BGTK: Tensor) -> bool:
    """Whether plain products read texts faster than the kernel, on a CPU that multiplies bfloat16."""
    if torch.compiler.is_compiling() or q_BHQK.dtype != torch.bfloat16 or q_BHQK.shape[2] < QUERIES:
        return False
    return math.prod(q_BHQK.shape[:3]) * k_BGTK.shape[2] <= SCORES and multiplies_bf16()


def attend_by_products(q_BHQK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """As `attend`, with all scores held at once."""
    groups, queries = k_BGTK.shape[1], q_BHQK.shape[2]
    q_BGNK = torch.unflatten(q_BHQK, 1, (groups, -1)).flatten(2, 3) * q_BHQK.shape[-1] ** -0.5
    scores_BGRQT = torch.unflatten(q_BGNK @ k_BGTK.transpose(-1, -2), 2, (-1, queries))
    if mask is not None:
        added = torch.zeros_like(mask, dtype=q_BHQK.dtype).masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else mask
        scores_BGRQT = scores_BGRQT.add_(added[:, :, None])
    weights_BGRQT = scores_BGRQT.softmax(-1)
    if dropout:
        weights_BGRQT = drop(weights_BGRQT, dropout)
    read_BGNK = weights_BGRQT.flatten(2, 3) @ v_BGTK
    return torch.unflatten(read_BGNK, 2, (-1, queries)).flatten(1, 2)


def attend_tiles(q_BHQK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, tiles: Tiles, dropout: float = 0.0) -> Tensor:
    """`attend`, a run of queries at a time."""
    k_runs, v_runs = k_BGTK.split(TILE, 2), v_BGTK.split(TILE, 2)
    read = []
    for q_BHCK, (keys, mask_CT) in zip(q_BHQK.split(TILE, 2), tiles.runs, strict=True):
        k, v = (torch.cat([runs[key] for key in keys], 2) for runs in (k_runs, v_runs))
        read.append(attend(q_BHCK, k, v, None if mask_CT is None else mask_CT[None, None], False, dropout))
    return torch.cat(read, 2)


def attend_flex(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, pattern: str, block_length: int) -> Tensor:
    """FlexAttention over a whole unpadded window: skips the blocks that the pattern leaves empty; compiled on a GPU."""
    device = q_BHTK.device
    block_mask = _flex_mask(pattern, block_length, q_BHTK.shape[2], str(device))
    grouped = q_BHTK.shape[1] != k_BGTK.shape[1]
    out: Tensor = _flex(device.type == "cuda")(q_BHTK, k_BGTK, v_BGTK, block_mask=block_mask, enable_gqa=grouped)
    return out
