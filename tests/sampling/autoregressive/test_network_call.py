"""One forward pass of speculative decoding: what each input attends to, and the KV cache that it leaves.

Shapes: B rows, L columns, K draft tokens, Q positions of one forward pass, V vocabulary, S = V^T sequences.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.adapters import lora
from dlm.models.cache import RaggedCache
from dlm.models.transformer import Transformer
from dlm.sampling.autoregressive.drafters import (
    MaskDrafter,
)
from dlm.sampling.draw import generators
from sampling.autoregressive.decoders import (
    BASE,
    CONVOLVED,
    DRAFTERS,
    MASK,
    canvas_of,
    decoder,
    network,
)


class Listener:
    """A network that remembers what it was asked, and the cache as it was then."""

    def __init__(self, made: Transformer) -> None:
        self.network, self.ragged_cache, self.calls = made, made.ragged_cache, list[tuple[Tensor, dict[str, Any]]]()

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, **how: Any) -> Tensor:
        self.calls.append((z_BQ, copy.deepcopy(how)))
        logits_BQV: Tensor = self.network(z_BQ, t_B, **how)
        return logits_BQV

    def again(self, call: int, z_BQ: Tensor | None = None) -> Tensor:
        """The call once more, with other tokens."""
        own_BQ, how = self.calls[call]
        how = copy.deepcopy(how) | {"at_BQ": None}
        logits_BQV: Tensor = self.network(own_BQ if z_BQ is None else z_BQ, **how)
        return logits_BQV


@pytest.mark.parametrize(("layout", "groups"), [("tree", [0, 1, 2, 3]), ("restart", [3])])
def test_a_mask_reads_its_prefix_and_the_masks_before_it_in_its_group(layout: str, groups: list[int]) -> None:
    """[last token, 3 proposals, groups of 3 masks]: a change of one input reaches just the outputs that may see it."""
    listener = Listener(BASE)
    list(decoder(MaskDrafter(layout), 4, listener).steps(canvas_of([[1]], 7), rng=generators(0, 1)))
    call = next(i for i, (z_BQ, _) in enumerate(listener.calls) if z_BQ.shape[1] == 4 + 3 * len(groups) and i)
    z_BQ, how = listener.calls[call]
    assert (z_BQ[0, :4] < MASK).all()
    assert (z_BQ[0, 4:] == MASK).all()
    last = int(how["pos_BQ"][0, 0])
    assert how["pos_BQ"][0].tolist() == [*range(last, last + 4), *(last + 1 + after + depth for after in groups for depth in range(3))]
    expected = torch.zeros(z_BQ.shape[1], z_BQ.shape[1], dtype=torch.bool)  # [query, key]
    expected[:4, :4] = torch.ones(4, 4).tril()
    for g, after in enumerate(groups):
        own = slice(4 + 3 * g, 7 + 3 * g)
        expected[own, : after + 1] = True
        expected[own, own] = torch.ones(3, 3).tril()
    before_QV = listener.again(call)[0]
    for key in range(z_BQ.shape[1]):
        other_BQ = z_BQ.clone()
        other_BQ[0, key] = (z_BQ[0, key] + 3) % MASK
        moved_Q = (listener.again(call, other_BQ)[0] - before_QV).abs().amax(-1) > 1e-6
        assert torch.equal(moved_Q, expected[:, key]), key


@pytest.mark.parametrize("name", ["tree", "restart", "chain", "lookup", "draft", "rounded", "heads", "tree, 9 nodes", "chain, 14 nodes"])
@pytest.mark.parametrize("made", [BASE, CONVOLVED], ids=["plain", "convolution"])
def test_keys_and_values_are_those_of_the_plain_run(made: Transformer, name: str) -> None:
    """Rows at their own lengths; what was rejected, and every mask, has gone."""
    caches: list[RaggedCache] = []
    prompts = [[1, 2, 3], [4], [], [5, 6], [7]]

    def make(rows: int, positions: int) -> RaggedCache:
        caches.append(made.ragged_cache(rows, positions))
        return caches[0]

    sampler = replace(decoder(DRAFTERS[name], 4, made, context=0), make_cache=make)
    checked = 0
    for frame in sampler.steps(canvas_of(prompts, 8), rng=generators(5, len(prompts))):
        for row in range(len(prompts)):
            held = int(caches[0].length_B[row])
            if not held:
                continue
            cache = made.cache(1)
            made(torch.cat([torch.full((1, 1), MASK), frame.tokens_BT[row : row + 1]], 1)[:, :held], cache=cache)
            torch.testing.assert_close(caches[0].kv[:, :, row, :, :held], cache.kv[:, :, 0, :, :held], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(caches[0].conv[:, row, :held], cache.conv[:, 0, :held], atol=1e-5, rtol=1e-4)
            checked += held
    assert checked > 60
    assert len(caches) == 1


@pytest.mark.parametrize("layout", ["tree", "restart"])
@pytest.mark.parametrize("start", [0, -1])
def test_an_adapter_at_masks_leaves_the_text_alone(layout: str, start: int) -> None:
    """Gated LoRA with wild weights: the text is that of the base without it, its proposals are not."""
    made, rng = network(), torch.Generator().manual_seed(4)
    base = decoder(MaskDrafter(layout), made=made, start=start, context=0)
    canvas = canvas_of([[1, 2, 3], []], 9)
    before = list(base.rounds(canvas, rng=generators(1, 2)))
    lora.attach(made, lora.AdapterConfig(rank=2), MASK)
    for name, tensor in lora.adapter_state(made).items():
        tensor.normal_(0.0, 1.0 if "mask_row" in name else 0.3, generator=rng)
    after = list(base.rounds(canvas, rng=generators(1, 2)))
    assert torch.equal(before[-1][0].tokens_BT, after[-1][0].tokens_BT)
    assert [t.accepted_B.tolist() for _, t in before] != [t.accepted_B.tolist() for _, t in after]


@pytest.mark.parametrize("made", [BASE, CONVOLVED], ids=["plain", "convolution"])
def test_rows_of_a_cache_grow_at_their_own_pace(made: Transformer) -> None:
    """Read in ragged pieces, with padding behind and a trim between, as the whole at once."""
    tokens_BT = torch.randint(MASK, (3, 10), generator=torch.Generator().manual_seed(0))
    whole_BTV, cache, done = made(tokens_BT), made.ragged_cache(3, 16), torch.zeros(3, dtype=torch.long)
    for counts in ([1, 4, 2], [3, 0, 5], [2, 2, 2], [4, 4, 1]):
        count_B = torch.tensor(counts)
        wide = int(count_B.max()) + 1  # one position of rubbish at least
        index_BQ = done[:, None] + torch.arange(wide)
        real_BQ = torch.arange(wide) < count_B[:, None]
        z_BQ = torch.where(real_BQ, tokens_BT.gather(1, index_BQ.clamp(max=9)), MASK)
        own_BQQ = torch.ones(wide, wide, dtype=torch.bool).tril().expand(3, -1, -1)
        logits_BQV = made(z_BQ, pos_BQ=index_BQ, own_BQQ=own_BQQ, cache=cache)
        row, q = real_BQ.nonzero(as_tuple=True)
        torch.testing.assert_close(logits_BQV[row, q], whole_BTV[row, index_BQ[row, q]], atol=2e-5, rtol=1e-4)
        done = done + count_B
        cache.trim(done)
        assert torch.equal(cache.length_B, done)
    assert done.tolist() == [10, 10, 10]
    assert cache.capacity == 16


def test_a_cache_says_what_it_cannot_do() -> None:
    cache = BASE.ragged_cache(2, 4)
    with pytest.raises(ValueError, match="holds 4 positions, 5"):
        cache.begin(torch.ones(2, 5, 5, dtype=torch.bool))
    for length in ([1, 0], [0, -1]):
        with pytest.raises(ValueError, match="trim"):
            cache.trim(torch.tensor(length))
