"""Light models: begun with blocks of a deeper one, taught by it, at the levels where they serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dlm.errors import InputError
from dlm.language_model import load
from dlm.noise import loss
from dlm.noise.masked import MaskedNoise
from dlm.train import learner
from train import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture(scope="module")
def heavy(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("heavy") / "run"
    tiny.run(text, out, "layers=4", "steps=40")
    return out


def test_blocks_of_a_deeper_model_are_spread_evenly(text: Path, heavy: Path, tmp_path: Path) -> None:
    tiny.run(text, tmp_path / "light", f"init={heavy}", "layers=2", "steps=1", "lr=1e-9", "ema=0")
    deep, light = (load_file(path / "model.safetensors") for path in (heavy, tmp_path / "light"))
    for own, theirs in ((0, 0), (1, 2)):
        torch.testing.assert_close(light[f"blocks.{own}.mlp.up.weight"], deep[f"blocks.{theirs}.mlp.up.weight"], atol=1e-6, rtol=0)
    torch.testing.assert_close(light["head.weight"], deep["head.weight"], atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="another size"):
        tiny.run(text, tmp_path / "deeper", f"init={tmp_path / 'light'}", "layers=4")


def test_a_student_comes_nearer_to_its_teacher(text: Path, heavy: Path, tmp_path: Path) -> None:
    """And the path KL of its chain, measured apart from the training, falls."""
    settings = ("layers=1", f"init={heavy}", f"teacher={heavy}", "lr=5e-3", "warmup=0")
    kl = []
    for steps in (1, 60):
        tiny.run(text, tmp_path / str(steps), *settings, f"steps={steps}")
        teacher, student = load(str(heavy)), load(str(tmp_path / str(steps)))
        x_BT = torch.randint(0, 10, (16, 32), generator=torch.Generator().manual_seed(1))
        rng = torch.Generator().manual_seed(0)
        assert isinstance(teacher.noise, MaskedNoise)
        kl.append(loss.any_order(teacher.noise, student.predict, x_BT, torch.ones_like(x_BT).bool(), rng, teacher=teacher.predict).mean())
    assert kl[1] < 0.7 * kl[0]


def test_a_teacher_of_itself_has_nothing_to_teach(heavy: Path) -> None:
    model = load(str(heavy))
    x_BT = torch.randint(0, 10, (4, 32), generator=torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(0)
    assert isinstance(model.noise, MaskedNoise)
    nats_B = loss.any_order(model.noise, model.predict, x_BT, torch.ones_like(x_BT).bool(), rng, teacher=model.predict)
    assert nats_B.abs().max() < 1e-5


def test_kl_of_guesses_written_out() -> None:
    from dlm.noise.masked import MaskedNoise

    noise, rng = MaskedNoise(4, 3), torch.Generator().manual_seed(0)
    heavy_BTV, light_BTV = (torch.randn(2, 5, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    z_BT = torch.tensor([[3, 0, 3, 1, 3], [2, 2, 3, 3, 0]])
    p_BTV, q_BTV = (x[..., :3].softmax(-1) for x in (heavy_BTV, light_BTV))
    expected_BT = (p_BTV * (p_BTV / q_BTV).log()).sum(-1) * (z_BT == 3)
    torch.testing.assert_close(noise.kl(heavy_BTV, light_BTV, z_BT), expected_BT)


def test_only_the_levels_asked_for_are_met(text: Path, heavy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    make = learner.teacher_of

    def watched(*args: Any) -> object:
        guess = make(*args)

        def look(z_BT: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
            seen.extend((z_BT == z_BT.max()).double().mean(-1).tolist())
            return guess(z_BT, t_B)

        return look

    monkeypatch.setattr(learner, "teacher_of", watched)
    tiny.run(text, tmp_path / "run", f"init={heavy}", "layers=1", f"teacher={heavy}", "levels=0.5,1", "steps=20", "context_share=0")
    assert len(seen) == 80
    assert min(seen) >= 0.5
    assert max(seen) > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("levels=0.5,0.2",), "from a share of masks to a higher one"),
        (("levels=0.5",), "from a share of masks to a higher one"),
        (("teacher=HEAVY", "noise=uniform"), "bidirectional masked models"),
        (("levels=0,0.5", "objective=autoregressive"), "bidirectional masked models"),
        (("teacher=HEAVY", "tokenizer=bytes"), "vocabulary and window of this run"),
        (("teacher=HEAVY", "window=16"), "vocabulary and window of this run"),
        (("teacher=nowhere-at-all",), "no checkpoint"),
    ],
)
def test_what_cannot_be_taught(text: Path, heavy: Path, tmp_path: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny.run(text, tmp_path / "run", *(word.replace("HEAVY", str(heavy)) for word in settings))
