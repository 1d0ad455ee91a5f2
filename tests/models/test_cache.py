"""Reading in pieces against a cache equals reading at once.

Shapes: B rows, T positions, Q positions of one call.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.models.cache import KVCache, RaggedCache
from dlm.models.config import TransformerConfig
from dlm.models.pattern import reading
from dlm.models.transformer import Transformer

VOCAB, WINDOW = 11, 12


SIZES: dict[str, Any] = {"vocab_size": VOCAB, "window": WINDOW, "layers": 2, "heads": 4, "kv_heads": 2, "width": 32}


KINDS: dict[str, dict[str, Any]] = {"plain": {}, "convolution": {"conv": 5}, "grid": {"axes": (3, 4), "groups": ((1, 4), (3, 1), (3, 2))}}


@pytest.fixture(params=KINDS, autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KINDS[request.param].items():
        monkeypatch.setitem(SIZES, name, value)


def network(attention: str = "causal", **changes: Any) -> Transformer:
    config = TransformerConfig(**(SIZES | {"attention": attention} | changes))
    made, rng = Transformer(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3, generator=rng)
    return made.eval().requires_grad_(False)


def tokens(rows: int = 2, length: int = WINDOW) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def in_chunks(made: Transformer, z_BT: Tensor, sizes: list[int], cache: KVCache | None = None) -> Tensor:
    cache = made.cache(len(z_BT)) if cache is None else cache
    return torch.cat([made(z_BQ, cache=cache) for z_BQ in z_BT.split(sizes, 1)], 1)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", [[1] * 12, [12], [5, 1, 1, 5], [3, 4, 5], [1, 11], [11, 1]])
def test_causal_chunks_equal_the_whole(sizes: list[int]) -> None:
    made, z_BT = network(), tokens()
    assert close(in_chunks(made, z_BT, sizes), made(z_BT))


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 1, 1, 5]])
def test_chunks_of_a_full_network_that_is_read_causally(sizes: list[int]) -> None:
    """Whose short convolutions have taps on the right, too."""
    made, z_BT = reading(network("full"), "causal"), tokens()
    assert close(in_chunks(made, z_BT, sizes), made(z_BT))


def test_the_chunks_of_a_block_causal_network_are_blocks() -> None:
    made, z_BT = network("block_causal", block_length=4), tokens()
    whole = made(z_BT)
    for sizes in ([4, 4, 4], [8, 4], [4, 8], [12]):
        assert close(in_chunks(made, z_BT, sizes), whole), sizes


def test_a_noisy_block_against_a_cache_of_clean_ones() -> None:
    """Block diffusion: the block is read again and again as it settles, and joins the cache when it has."""
    made, clean_BT = network("block_causal", block_length=4), tokens()
    cache = made.cache(2)
    for begin in (0, 4, 8):
        for noisy in range(4, -1, -1):
            z_BT = clean_BT[:, : begin + 4].clone()
            z_BT[:, begin : begin + noisy] = VOCAB - 1
            cache.trim(begin)
            assert close(made(z_BT[:, begin:], cache=cache), made(z_BT)[:, begin:]), (begin, noisy)
        assert cache.length == begin + 4


def test_what_was_trimmed_leaves_no_trace() -> None:
    made, z_BT = network(), tokens()
    cache = made.cache(2)
    in_chunks(made, z_BT.flip(1)[:, :9], [5, 4], cache)
    cache.trim(0)
    assert torch.equal(in_chunks(made, z_BT, [6, 6], cache), in_chunks(made, z_BT, [6, 6]))
    cache.trim(4)
    assert cache.length == 4
    assert close(in_chunks(made, z_BT[:, 4:], [1, 7], cache), made(z_BT)[:, 4:])


def test_a_clone_goes_its_own_way() -> None:
    made, z_BT = network(), tokens()
    cache = made.cache(2)
    made(z_BT[:, :5], cache=cache)
    branch = cache.clone()
    other_BT = torch.cat([z_BT[:, :5], z_BT[:, 5:].flip(1)], 1)
    assert close(made(other_BT[:, 5:8], cache=branch), made(other_BT)[:, 5:8])
    assert (cache.length, branch.length) == (5, 8)
    assert close(made(z_BT[:, 5:], cache=cache), made(z_BT)[:, 5:])
    assert close(made(other_BT[:, 8:], cache=branch), made(other_BT)[:, 8:])


def test_a_cache_that_overflows_is_told_and_stays_usable() -> None:
    made, z_BT = network(), tokens()
    cache = made.cache(2, capacity=6)
    assert cache.capacity == 6
    assert made.cache(2).capacity == WINDOW
    made(z_BT[:, :5], cache=cache)
    with pytest.raises(ValueError, match="holds 6 positions, 8 were asked for"):
        made(z_BT[:, 5:8], cache=cache)
    assert cache.length == 5
    assert close(made(z_BT[:, 5:6], cache=cache), made(z_BT[:, :6])[:, 5:])
    for wrong in (-1, 7):
        with pytest.raises(ValueError, match="cannot trim"):
            cache.trim(wrong)


@pytest.mark.parametrize("sizes", [[8, 1, 1, 2], [12], [1] * 12, [2, 3, 7]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_with_a_cache(side: str, sizes: list[int]) -> None:
    """Prompts of several lengths, padded on either side, continued together: each row as if it were alone."""
    made, lengths = network(), [12, 9, 5]
    z_BT = tokens(3)
    valid_BT = torch.ones(3, WINDOW, dtype=torch.bool)
    for row, length in enumerate(lengths):
        padding = slice(0, WINDOW - length) if side == "left" else slice(length - 4, WINDOW - 4)  # right: before 4 new tokens
        valid_BT[row, padding] = False
    cache, outs, end = made.cache(3), [], 0
    for size in sizes:
        end += size
        outs.append(made(z_BT[:, end - size : end], valid_BT=valid_BT[:, :end], cache=cache))
    logits_BTV = torch.cat(outs, 1)
    assert logits_BTV.isfinite().all()
    for row in range(3):
        alone = made(z_BT[row, valid_BT[row]][None])[0]
        assert close(logits_BTV[row, valid_BT[row]], alone), row


@torch.no_grad()
def test_rows_of_ragged_caches_join_and_leave() -> None:
    made, z_BT = network(), tokens(4)

    def read(cache: RaggedCache, rows: list[int], begin: list[int], count: int) -> None:
        at_BQ = torch.tensor(begin)[:, None] + torch.arange(count)
        own_BQQ = torch.ones(len(rows), count, count, dtype=torch.bool).tril()
        found = made(z_BT[torch.tensor(rows)[:, None], at_BQ], pos_BQ=at_BQ, own_BQQ=own_BQQ, cache=cache)
        for row, places, logits_QV in zip(rows, at_BQ, found, strict=True):
            assert close(logits_QV, made(z_BT[row : row + 1])[0, places])

    cache, other = made.ragged_cache(2, 8), made.ragged_cache(2, 12)
    read(cache, [0, 1], [0, 0], 5)
    read(other, [2, 3], [0, 0], 3)
    cache.join(other)
    read(cache, [0, 1, 2, 3], [5, 5, 3, 3], 2)
    cache.keep(torch.tensor([3, 0]))
    read(cache, [3, 0], [5, 7], 4)


@torch.no_grad()
def test_window_caches_join_and_leave() -> None:
    """One wider than the other; a position that is read again meets what the others left, which is what they would leave now."""
    made, z_BT = network("full"), tokens(3)
    cache, other, pos_BT = made.window_cache(1, 8), made.window_cache(2), torch.arange(WINDOW).expand(3, -1)
    made(z_BT[:1, :8], pos_BQ=pos_BT[:1, :8], cache=cache)
    made(z_BT[1:], pos_BQ=pos_BT[1:], cache=other)
    cache.join(other)
    cache.keep(torch.tensor([2, 0]))
    again_BQ = torch.tensor([[3, 4, 9, WINDOW], [0, 7, WINDOW, WINDOW]])
    z_BQ = z_BT[torch.tensor([[2], [0]]), again_BQ.clamp(max=WINDOW - 1)]
    found = made(z_BQ, pos_BQ=again_BQ, cache=cache.of(torch.tensor([0, 1])))
    assert close(found[0, :3], made(z_BT[2:])[0, [3, 4, 9]])
    assert close(found[1, :2], made(z_BT[:1, :8])[0, [0, 7]])


def test_positions_can_be_given_for_what_continues_a_cache() -> None:
    made, z_BT = network(), tokens()
    cache = made.cache(2)
    made(z_BT[:, :5], cache=cache)
    pos_BQ = torch.arange(5, WINDOW).expand(2, -1)
    assert close(made(z_BT[:, 5:], pos_BQ=pos_BQ, cache=cache), made(z_BT)[:, 5:])
