"""tiny-diffusion: a state dict of torch.save with or without a config, its logits, and its samplers as rules of the loop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dlm.errors import InputError
from dlm.formats.families import tiny_diffusion
from dlm.language_model import LanguageModel, load, official
from dlm.sampling.draw import generators
from dlm.trajectory import Canvas

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_diffusion"
NEAR = 3e-5


def numbers() -> dict[str, Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


def pickled(tmp_path: Path, state: object, name: str = "diffusion_model.pt", *, config: bool = True) -> Path:
    if config:
        shutil.copy(GOLDEN / "config.json", tmp_path)
    torch.save(state, tmp_path / name)
    return tmp_path / name


def weights() -> dict[str, Tensor]:
    return load_file(GOLDEN / "model.safetensors")


def apart(lm: LanguageModel) -> float:
    golden = numbers()
    return float((lm.logits(golden["input_ids"], t=golden["t"]) - golden["logits"]).abs().max())


def test_logits_of_a_directory_and_of_the_pickled_file(tmp_path: Path) -> None:
    assert apart(load(str(GOLDEN))) < NEAR
    file = pickled(tmp_path, weights())
    assert apart(load(str(file))) < NEAR
    assert apart(load(str(tmp_path))) < NEAR
    assert load(str(file)).name == "diffusion_model"


def test_a_wrong_reading_is_told_from_the_right_one() -> None:
    golden, lm = numbers(), load(str(GOLDEN))
    assert float((lm.logits(golden["input_ids"], t=golden["t"].flip(0)) - golden["logits"]).abs().max()) > 1
    changes: dict[str, dict[str, Any]] = {
        "norm of the embeddings": {"embed_norm": False},
        "norm eps": {"norm_eps": 1e-4},
        "rotary base": {"rope_base": 500_000.0},
    }
    for name, change in changes.items():
        wrong = load(str(GOLDEN))
        wrong.network.config = wrong.network.config.with_(**change)
        if name == "norm eps":
            for module in wrong.network.modules():
                if isinstance(module, nn.RMSNorm):
                    module.eps = 1e-4
        wrong.network.rotary.config = wrong.network.config
        assert apart(wrong) > NEAR, name
    turned = weights()
    turned["blocks.0.attn.c_q.weight"] = turned["blocks.0.attn.c_q.weight"].view(4, 2, -1, 32).flip(1).reshape(32, 32)
    read = tiny_diffusion.OWN
    assert read.ours("blocks.0.attn.c_q.weight") == "blocks.0.attention.q.weight"
    assert not torch.equal(turned["blocks.0.attn.c_q.weight"], weights()["blocks.0.attn.c_q.weight"])
    assert torch.equal(lm.network.state_dict()["blocks.0.attention.q.weight"], turned["blocks.0.attn.c_q.weight"])


def test_the_released_file_has_no_config(tmp_path: Path) -> None:
    """Its sizes: 6 heads of 64, windows of 256, 128 noise levels."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_emb": (128, 384), "time_emb": (128, 384), "output_head": (128, 384)}
    for layer in range(2):
        shapes |= {f"blocks.{layer}.attn.{name}": (384, 384) for name in ("c_q", "c_k", "c_v", "c_proj")}
        shapes |= {f"blocks.{layer}.mlp.c_fc": (1536, 384), f"blocks.{layer}.mlp.c_proj": (384, 1536)}
    state = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    lm = load(str(pickled(tmp_path, state, config=False)))
    assert (lm.window, lm.context, lm.network.config.heads, lm.network.config.time_steps) == (256, 16, 6, 128)
    generation = lm.generate("ROMEO: ", max_new_tokens=20)
    assert generation.sampler == "tiny-confidence:0.9"
    assert generation.text.startswith("ROMEO: ")


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exit, ("run",)


BAD = {
    "code": (Harmful(), "holds more than tensors, which dlm never unpickles"),
    "a module": ({"model": nn.Linear(2, 2)}, "holds more than tensors"),
    "nested": ({"state": {"token_emb.weight": torch.zeros(2, 2)}}, "no state dict"),
    "another model": ({"weight": torch.zeros(2, 2)}, "the only .pt file that dlm reads"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_state_dict_gets_one_line(case: str, tmp_path: Path) -> None:
    state, message = BAD[case]
    file = pickled(tmp_path, state, config=False)
    with pytest.raises(InputError, match=message.replace(".", r"\.")) as error:
        load(str(file))
    assert "\n" not in str(error.value)


def test_a_file_that_ends_early_and_heads_that_nobody_states(tmp_path: Path) -> None:
    file = pickled(tmp_path, weights(), config=False)
    with pytest.raises(InputError, match=r"put a config\.json with n_head beside it"):
        load(str(file))
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"is no whole file of torch\.save"):
        load(str(file))


@pytest.mark.parametrize("case", json.loads((GOLDEN / "generations.json").read_text())["cases"], ids=lambda case: str(case["name"]))
def test_the_words_of_the_command_line_write_the_ids_of_the_reference(case: dict[str, object]) -> None:
    lm, settings = load(str(GOLDEN)), dict(case["settings"])  # type: ignore[call-overload]
    word = f"tiny-topk:{settings['k']}" if settings["method"] == "topk" else f"tiny-confidence:{settings['confidence_threshold']}"
    prompt: list[list[int]] = case["context_ids"]  # type: ignore[assignment]
    (generation,) = lm.generate(prompt, sampler=word, steps=24, max_new_tokens=17)
    assert generation.trajectory.current_BT.tolist() == case["output_ids"]
    (by_level,) = lm.generate(prompt, sampler="topk", temperature=0.0, steps=6, max_new_tokens=17)
    assert by_level.trajectory.current_BT.tolist() != case["output_ids"]  # it tells the network the noise level


def test_the_temperature_of_a_confidence() -> None:
    """A low one makes every token sure, and leaves the likeliest what they are."""
    lm, settings = load(str(GOLDEN)), {"seq_len": 24, "context_len": 7, "num_steps": 24, "confidence_threshold": 0.5}
    canvas = Canvas.from_rows([[82, 79, 77, 69, 79, 58, 32, *[None] * 17]], fill=0)
    forwards = []
    for temperature in (1.0, 0.01):
        plan = official.plan(lm, settings | {"temperature": temperature})
        *_, last = plan.sampler.steps(canvas, rng=generators(0, 1))
        forwards.append(last.forwards)
    assert forwards == [10, 1]
    with pytest.raises(InputError, match="method is topk or confidence"):
        official.plan(lm, {"method": "best"})
    with pytest.raises(InputError, match="does not read the number of a step"):
        official.plan(load("shakespeare-mask"), {}, "tiny")
