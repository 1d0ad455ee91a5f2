"""Mixtures of tokens as inputs: the discrete loss at temperature 0, the schedule of temperatures, and who may use them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dlm.errors import InputError
from dlm.models.transformer import Transformer
from dlm.noise import loss
from dlm.noise.uniform import UniformNoise
from dlm.train.mixtures import Mixed, temperature
from train import tiny

WINDOW, VOCAB = 16, 9


def losses(estimator: str, heat: float | None) -> torch.Tensor:
    """Of a small network on the same draws; heat: the temperature of mixtures, None for tokens."""
    torch.manual_seed(0)
    network = Transformer(tiny.NETWORK.with_(vocab_size=VOCAB, window=WINDOW))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    rng, noise = torch.Generator().manual_seed(1), UniformNoise(VOCAB, VOCAB - 1)
    x_BT = torch.randint(VOCAB - 1, (6, WINDOW), generator=rng)
    free_BT = torch.ones_like(x_BT, dtype=torch.bool)
    free_BT[:3, :5] = False
    reads = network if heat is None else Mixed(network, noise, x_BT, free_BT, rng, heat, 6, slice(0, 6))
    with torch.no_grad():
        made: torch.Tensor = getattr(loss, estimator)(noise, lambda z_BT, t_B: reads(z_BT, t_B).float(), x_BT, free_BT, rng)
    return made


@pytest.mark.parametrize("estimator", ["counted", "continuous"])
def test_at_temperature_0_it_is_the_discrete_loss_to_the_bit(estimator: str) -> None:
    tokens = losses(estimator, None)
    assert torch.equal(losses(estimator, 0.0), tokens)
    assert torch.allclose(losses(estimator, 1e-7), tokens, rtol=1e-3)  # but where two entries nearly tie
    assert (losses(estimator, 0.5) - tokens).abs().max() > 1e-3


def test_the_temperature_falls_to_0_half_way() -> None:
    config = tiny.CONFIG.with_settings(["noise=uniform", "mixtures=0.4", "steps=100"])
    assert [temperature(config, step) for step in (0, 25, 50, 99)] == pytest.approx([0.4, 0.2, 0.0, 0.0])


def test_training_reads_them(tmp_path: Path) -> None:
    text, short = tiny.write_text(tmp_path / "text.txt"), ("noise=uniform", "steps=2", "warmup=1", "log_every=1", "eval_windows=2")
    runs = [tmp_path / name for name in ("0", "0.3")]
    for out in runs:
        tiny.run(text, out, *short, f"mixtures={out.name}")
    first, second = ([line["train_nats"] for line in tiny.curve(out) if "train_nats" in line] for out in runs)
    assert first[0] != second[0]
    weights, others = map(tiny.tensors, runs)
    assert weights.keys() == others.keys()


@pytest.mark.parametrize("settings", [(), ("noise=gidd",), ("noise=uniform", "objective=autoregressive", "attention=causal")])
def test_mixtures_are_of_uniform_noise(settings: tuple[str, ...]) -> None:
    with pytest.raises(
        InputError, match=r"mixtures of tokens are inputs under uniform noise: --noise uniform, or leave --set mixtures=0.1"
    ):
        tiny.CONFIG.with_settings([*settings, "mixtures=0.1"])
    with pytest.raises(InputError, match="mixtures must be at least 0, got -1"):
        tiny.CONFIG.with_settings(["noise=uniform", "mixtures=-1"])
