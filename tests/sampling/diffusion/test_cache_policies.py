"""Caches: exact ones change nothing, approximate ones change nothing once they are refreshed in every call.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer
from dlm.noise.masked import MaskedNoise
from dlm.sampling.diffusion import cache_policies
from dlm.sampling.diffusion.cache_policies import BeforeToo, Delayed, Drift, Dual, Exact, Prefix
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.diffusion.protocols import CachePolicy, View
from dlm.sampling.diffusion.remasking import Revoke
from dlm.sampling.diffusion.unmasking import Ancestral, Threshold, TopScore
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas, Frame

VOCAB, WINDOW = 11, 32
NOISE = MaskedNoise(VOCAB, VOCAB - 1)
ROWS: list[list[int | None]] = [[None] * 70, [1, 2, 3] + [None] * 50, [4] * 37 + [None] * 40, [5] * 9 + [None] * 3]
PLAIN: list[list[int | None]] = [*ROWS, [1, None, 2, None, None, 3] * 9]


SIZES: dict[str, Any] = {"layers": 3, "heads": 2, "width": 16}


@pytest.fixture(params=[0, 5], ids=["plain", "convolution"])
def taps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "conv", request.param)


def network(attention: str = "full", block_length: int = 0, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    config = TransformerConfig(VOCAB, WINDOW, attention=attention, block_length=block_length, **SIZES)
    made = Transformer(config).eval().requires_grad_(False).double()
    for weight in made.parameters():  # fresh blocks are the identity: make every position matter
        weight.copy_(0.4 * torch.randn_like(weight))
    return made


class Counting:
    """Counts the positions that a network reads."""

    def __init__(self, inner: Transformer) -> None:
        self.inner, self.read, self.calls = inner, 0, 0

    def __call__(self, z_BQ: Tensor, t_B: Tensor | None = None, **more: Any) -> Tensor:
        self.read, self.calls = self.read + z_BQ.numel(), self.calls + 1
        logits_BQV: Tensor = self.inner(z_BQ, t_B, **more)
        return logits_BQV


def run(model: Any, rows: list[list[int | None]] = PLAIN, seed: int = 0, **options: Any) -> list[Frame]:
    inner = model.inner if isinstance(model, Counting) else model
    if options.get("cache") is not None:
        options["make_cache"] = inner.window_cache
    options = {"rule": TopScore(), "budget": 12, "context": 8, **options}
    sampler = DiffusionSampler(model, NOISE, WINDOW, **options)
    frames = list(sampler.steps(Canvas.from_rows(rows, fill=VOCAB - 1), rng=generators(seed, len(rows))))
    assert frames[-1].settled_BT.all()
    return frames


def same(first: list[Frame], second: list[Frame]) -> bool:
    return len(first) == len(second) and all(torch.equal(a.tokens_BT, b.tokens_BT) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("taps")
@pytest.mark.parametrize("block_length", [1, 4, 8])
@pytest.mark.parametrize("rule", [TopScore(), Ancestral(), Threshold(0.3)], ids=str)
def test_the_cache_of_block_diffusion_is_exact(rule: Any, block_length: int) -> None:
    model = Counting(network("block_causal", block_length))
    options: dict[str, Any] = {"rule": rule, "block_length": block_length, "sees_ahead": False}
    plain = run(model, ROWS, **options)
    whole, model.read = model.read, 0
    assert same(plain, run(model, ROWS, cache=Exact(block_length), **options))
    assert model.read < whole / 2


@pytest.mark.usefixtures("taps")
def test_blocks_as_large_as_the_window_are_plain_diffusion() -> None:
    block, full = network("block_causal", WINDOW), network("full")
    options: dict[str, Any] = {"block_length": WINDOW, "context": 0}
    plain = run(full, ROWS, context=0)
    assert same(plain, run(block, ROWS, sees_ahead=False, **options))
    assert same(plain, run(block, ROWS, sees_ahead=False, cache=Exact(WINDOW), **options))


@pytest.mark.usefixtures("taps")
@pytest.mark.parametrize("policy", [Delayed(1), Drift(0.0, probes=2 * WINDOW)], ids=str)
@pytest.mark.parametrize("block_length", [0, 8])
def test_a_cache_refreshed_in_every_call_changes_nothing(policy: CachePolicy, block_length: int) -> None:
    assert same(run(network(), block_length=block_length), run(network(), block_length=block_length, cache=policy))


@pytest.mark.usefixtures("taps")
@pytest.mark.parametrize("policy", [Prefix(), Dual(), Delayed(4), Drift(0.3)], ids=str)
def test_an_approximate_cache_reads_less_and_moves_little(policy: CachePolicy) -> None:
    model = Counting(network())
    options: dict[str, Any] = {"block_length": 8, "budget": 32}
    plain = run(model, **options)
    whole, model.read = model.read, 0
    cached = run(model, cache=policy, **options)
    assert model.read < whole
    assert (cached[-1].tokens_BT == plain[-1].tokens_BT).double().mean() > 0.3  # chance: 0.1


@pytest.mark.usefixtures("taps")
@pytest.mark.parametrize("policy", [Prefix(), Dual(), Delayed(4), Drift(0.3), Exact(8)], ids=str)
def test_a_row_alone_and_in_a_batch_with_a_cache(policy: CachePolicy) -> None:
    exact = isinstance(policy, Exact)
    model = network("block_causal", 8) if exact else network()
    options: dict[str, Any] = {"block_length": 8, "cache": policy, "sees_ahead": not exact}
    rows = ROWS if exact else PLAIN
    together = run(model, rows, seed=3, **options)[-1].tokens_BT
    for i, row in enumerate(rows):
        assert torch.equal(run(model, [row], seed=3 + i, **options)[-1].tokens_BT[0], together[i, : len(row)])


def view(**changes: Any) -> View:
    z_BT = torch.full((1, 16), VOCAB - 1)
    z_BT[0, :6] = 1
    block_BT = torch.zeros(1, 16, dtype=torch.bool)
    block_BT[0, 6:8] = True
    whole: dict[str, Any] = {"z_BT": z_BT, "hole_BT": z_BT == VOCAB - 1, "block_BT": block_BT, "seen_BT": z_BT.clone()}
    whole |= {"entered_B": torch.tensor([False]), "age_B": torch.tensor([1]), "drift_BT": torch.zeros(1, 16)}
    whole |= {"phase_B": torch.tensor([0])}
    return View(**(whole | changes))


def places(read_BT: Tensor) -> list[int]:
    return read_BT[0].nonzero().squeeze(-1).tolist()


READS: list[tuple[CachePolicy, dict[str, Any], list[int]]] = [
    (Prefix(), {}, list(range(6, 16))),
    (Prefix(), {"entered_B": torch.tensor([True])}, list(range(16))),
    (Dual(), {}, [6, 7]),
    (Dual(), {"entered_B": torch.tensor([True])}, list(range(16))),
    (Delayed(8), {}, list(range(6, 16))),
    (Delayed(2), {}, list(range(16))),
    (Drift(0.1, probes=4), {}, [4, 5, 6, 7, 8, 9]),
    (Exact(4), {}, [4, 5, 6, 7]),
    (Exact(4), {"phase_B": torch.tensor([6])}, [6, 7, 8, 9]),
    (Exact(4), {"phase_B": torch.tensor([5])}, [5, 6, 7, 8]),
    (BeforeToo(Dual()), {}, [5, 6, 7]),
    (BeforeToo(Prefix()), {}, list(range(5, 16))),
]


@pytest.mark.parametrize(("policy", "changes", "expected"), READS)
def test_what_each_policy_reads(policy: CachePolicy, changes: dict[str, Any], expected: list[int]) -> None:
    assert places(policy(view(**changes))) == expected


@pytest.mark.parametrize("policy", [Prefix(), Dual(), Delayed(8), Drift(0.1)], ids=str)
def test_what_was_never_read_is_read(policy: CachePolicy) -> None:
    assert places(policy(view(seen_BT=torch.full((1, 16), -1)))) == list(range(16))


@pytest.mark.parametrize("policy", [Dual(), Delayed(8), Drift(0.1, probes=2), Exact(4)], ids=str)
def test_what_was_written_is_read_once_more(policy: CachePolicy) -> None:
    seen_BT = view().z_BT.clone()
    seen_BT[0, 1] = VOCAB - 1
    assert 1 in places(policy(view(seen_BT=seen_BT)))


def test_drift_at_a_probe_refreshes_all() -> None:
    drift_BT = torch.zeros(1, 16)
    drift_BT[0, 5] = 0.2
    assert places(Drift(0.1, probes=4)(view(drift_BT=drift_BT))) == list(range(16))
    assert len(places(Drift(0.3, probes=4)(view(drift_BT=drift_BT)))) < 16


def test_drift_is_measured_where_a_position_is_read_again() -> None:
    model = network()
    cache, z_BT = model.window_cache(2), torch.randint(VOCAB - 1, (2, WINDOW), generator=torch.Generator().manual_seed(0))
    pos_BT, rows_B = torch.arange(WINDOW).expand(2, -1), torch.arange(2)
    model(z_BT, pos_BQ=pos_BT, cache=cache.of(rows_B))
    assert (cache.drift_BT == 0).all()
    changed_BT = z_BT.clone()
    changed_BT[1, 3] = (z_BT[1, 3] + 1) % (VOCAB - 1)
    model(changed_BT, pos_BQ=pos_BT, cache=cache.of(rows_B))
    assert (cache.drift_BT[0] == 0).all()
    assert cache.drift_BT[1].min() > 0
    assert cache.drift_BT[1, 3] > cache.drift_BT[1].median()


WORDS: list[tuple[str, CachePolicy]] = [("dual", Dual()), ("prefix", Prefix()), ("delayed:3", Delayed(3)), ("drift:0.2", Drift(0.2))]


@pytest.mark.parametrize(("word", "policy"), WORDS)
def test_words(word: str, policy: CachePolicy) -> None:
    assert cache_policies.make(word) == policy


@pytest.mark.parametrize("word", ["", "none", "dual:3", "delayed:x", "delayed:0", "drift:-1", "drift:nan"])
def test_bad_words(word: str) -> None:
    with pytest.raises(InputError):
        cache_policies.make(word)


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: run(network(), block_length=5), "divide"),
    (lambda: run(network(), block_length=-8), "block length must be at least 0"),
    (lambda: DiffusionSampler(network(), NOISE, WINDOW, cache=Dual()).steps(Canvas.from_rows(ROWS, fill=0), rng=[]).__next__(), "cache"),
    (lambda: run(network(), cache=Dual(), rule=Revoke()), "combined"),
    (lambda: run(network("block_causal", 8), block_length=8, context=4, sees_ahead=False), "multiple"),
    (lambda: run(network("block_causal", 8), PLAIN, block_length=8, sees_ahead=False), "holes"),
]


@pytest.mark.parametrize(("bad", "said"), BAD)
def test_what_cannot_be(bad: Callable[[], Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        bad()
