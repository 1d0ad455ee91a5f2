"""KV caches on models of other projects: exact ones write the same ids, approximate ones do once everything is read anew in every pass.

Shapes: B rows, A rows of a pass, T positions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.models.transformer import Transformer
from dlm.protocols import PickingDenoiser
from dlm.sampling.diffusion.cache_policies import BeforeToo, CausalText, Delayed, Drift
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.draw import generators
from dlm.trajectory import Frame
from goldens import BIDIRECTIONAL, canvas, model, rows

BY_BLOCKS: list[tuple[str, dict[str, Any]]] = [
    ("sdar", {"sampler": "confidence:0.2"}),
    ("sdar", {"sampler": "topk", "block_length": 8, "guidance": 1.5}),
    ("sdar", {"sampler": "klass:0.1", "allow": "abcdefghijklmnopqrstuvwxyz "}),
    ("a2d_qwen3", {"sampler": "bd3lm", "block_length": 4}),
    ("a2d_qwen2", {"sampler": "bd3lm", "block_length": 8, "guidance": 2.0}),
    ("llada", {"sampler": "bd3lm", "block_length": 4}),
    ("nemotron_labs_diffusion", {"sampler": "topk"}),
    ("nemotron_labs_diffusion", {"sampler": "nemotron:0.5", "block_length": 4, "guidance": 1.5}),
]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of each forward pass."""
    found, forward = list[int](), Transformer.forward

    def counted(self: Transformer, z_BQ: Tensor, *args: Any, **how: Any) -> Tensor:
        found.append(z_BQ.numel())
        return forward(self, z_BQ, *args, **how)

    monkeypatch.setattr(Transformer, "forward", counted)
    return found


def frames(family: str, prompts: list[list[int]], *, seed: int = 0, policy: Any = None, **options: Any) -> list[Frame]:
    lm = model(family)
    sampler = lm.sampler(steps=12, temperature=0.7, **options)
    assert isinstance(sampler, DiffusionSampler)
    if policy is not None:
        sampler = replace(sampler, cache=BeforeToo(policy) if lm.config.shift else policy)
    return list(sampler.steps(canvas(family, prompts), rng=generators(seed, len(prompts))))


def same(one: list[Frame], two: list[Frame]) -> bool:
    return [f.tokens_BT.tolist() for f in one] == [f.tokens_BT.tolist() for f in two]


@pytest.mark.parametrize(("family", "options"), BY_BLOCKS, ids=[f"{f} {o}" for f, o in BY_BLOCKS])
def test_the_cache_of_models_that_read_by_blocks_is_exact(family: str, options: dict[str, Any], read: list[int]) -> None:
    plain = frames(family, rows(family), cache=False, **options)
    whole = sum(read)
    read.clear()
    assert same(frames(family, rows(family), **options), plain)
    assert sum(read) < 0.6 * whole


@pytest.mark.parametrize("family", BIDIRECTIONAL)
@pytest.mark.parametrize("policy", [Delayed(1), Drift(0.0, probes=200)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "topk"},
        {"sampler": "confidence:0.2", "block_length": 4},
        {"sampler": "klass:0.1", "block_length": 8},
        {"sampler": "topk", "block_length": 8, "guidance": 2.0},
    ],
    ids=str,
)
def test_a_cache_that_is_refreshed_in_every_pass_changes_nothing(family: str, policy: Any, options: dict[str, Any]) -> None:
    assert same(frames(family, rows(family), policy=policy, **options), frames(family, rows(family), **options))


@pytest.mark.parametrize("family", BIDIRECTIONAL)
@pytest.mark.parametrize("cache", ["prefix", "dual", "delayed:3", "drift:0.2"])
def test_an_approximate_cache_reads_less(family: str, cache: str, read: list[int]) -> None:
    """Each row is what it is alone; the presets of the families work with it; rows of other lengths may join."""
    lm, own = model(family), rows(family)
    options: dict[str, Any] = {"cache": cache, "block_length": 4}
    frames(family, own, block_length=4)
    whole = sum(read)
    read.clear()
    *_, together = frames(family, own, **options)
    assert sum(read) < whole
    for row, prompt in enumerate(own):
        *_, alone = frames(family, [prompt], seed=row, **options)
        assert together.tokens_BT[row, : len(prompt) + 16].tolist() == alone.tokens_BT[0].tolist()
    sampler = lm.sampler(steps=12, temperature=0.7, **options)
    assert isinstance(sampler, DiffusionSampler)
    run = sampler.begin(canvas(family, own[1:2]), rng=generators(1, 1))
    run.step()
    for row in (0, 2):
        run.join(sampler.begin(canvas(family, own[row : row + 1]), rng=generators(row, 1)))
        run.step()
    while bool(run.live_B.any()):
        last = run.step()
    for place, row in enumerate((1, 0, 2)):
        length = len(own[row]) + 16
        assert last.tokens_BT[place, :length].tolist() == together.tokens_BT[row, :length].tolist()


@pytest.mark.parametrize("before", [True, False])
def test_the_row_of_a_shifted_token_is_read_with_it(before: bool) -> None:
    """Against keys and values that are all fresh, a block has the logits of the whole text; without the row before it, it has not."""
    lm = model("dream")
    prompt = rows("dream")[0]
    z_BT = torch.tensor([[*prompt, *[lm.tokenizer.mask_id] * 12]])
    denoiser = lm.denoiser
    assert isinstance(denoiser, PickingDenoiser)
    whole = denoiser(z_BT)
    cache, first = lm.network.window_cache(1, z_BT.shape[1]), len(prompt) + 4
    denoiser(z_BT, pos_BQ=torch.arange(z_BT.shape[1])[None], cache=cache.of(torch.tensor([0])))
    pos_BQ = torch.arange(first - before, first + 4)[None]
    found = denoiser(z_BT[:, pos_BQ[0]], pos_BQ=pos_BQ, cache=cache.of(torch.tensor([0])), index_BC=torch.arange(4)[None] + before)
    assert torch.allclose(found[:, 1:], whole[:, first + 1 : first + 4], atol=1e-5)
    assert torch.allclose(found[:, 0], whole[:, first], atol=1e-5) == before


def test_a_finished_block_is_read_again_as_text(monkeypatch: pytest.MonkeyPatch, read: list[int]) -> None:
    """Nemotron's blocks are read fully, its text causally: with the keys of a block that was read fully, the text is another one."""

    def written(*, cache: bool = True) -> list[int]:
        found = model("nemotron_labs_diffusion").generate([list(range(5, 12))], max_new_tokens=40, sampler="topk", steps=10, cache=cache)
        ids: list[int] = found[0].trajectory.current_BT[0].tolist()
        return ids

    exact = written()
    assert set(read) == {15, 9, 16}  # prompt and block; the block and the row before it; two blocks
    assert exact == written(cache=False)
    policy = CausalText.__call__
    monkeypatch.setattr(CausalText, "__call__", lambda self, view: policy(self, replace(view, entered_B=view.entered_B & False)))
    assert exact != written()
