"""DiffusionGemma through the class that transformers ships: its golden logits, and its own `generate` id for id."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dlm as library
from dlm.language_model import LanguageModel
from dlm.models.canvas import CanvasNetwork, ReadText
from dlm.sampling.draw import categorical, generators

GOLDEN = Path(__file__).parents[1] / "golden" / "diffusion_gemma"
NEAR = 3e-5
transformers = pytest.importorskip("transformers", minversion="5.23")

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """The golden checkpoint, whose text is token ids, and settings of generation_config.json."""

    def made(name: str = "gemma", **generation: Any) -> Path:
        path = tmp_path / name
        shutil.copytree(GOLDEN, path)
        settings = json.loads((path / "generation_config.json").read_text()) | generation
        (path / "generation_config.json").write_text(json.dumps(settings))
        return path

    return made


def bridged(path: Path, **options: Any) -> LanguageModel:
    return library.load(str(path), bridge="transformers", **options)


def reference(lm: LanguageModel, prompt: list[int], new: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], int]:
    """The ids of transformers' own `generate`, which is given the numbers that ours draws, and its calls of the decoder."""
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as theirs

    assert isinstance(lm.network, CanvasNetwork)
    (rng,), length = generators(seed, 1), lm.network.length

    def drawn(count: int) -> Tensor:
        return torch.rand(1, count, generator=rng, dtype=torch.float64)

    def renoise(self: Any, accepted: Tensor, cur_step: Any) -> Tensor:
        return torch.where(self.accepted_token_mask, accepted, lm.noise.prior(drawn(length)))

    monkeypatch.setattr(theirs.EntropyBoundSampler, "initialize_canvas", lambda *_, **__: lm.noise.prior(drawn(2 * length)[:, :length]))
    monkeypatch.setattr(theirs.EntropyBoundSampler, "renoise_canvas", renoise)
    monkeypatch.setattr(torch, "multinomial", lambda p, num_samples: categorical(p[None].log(), drawn(len(p)))[0, :, None])
    made = lm.network.inner.generate(torch.tensor([prompt]), max_new_tokens=new)
    ids: list[int] = made.sequences[0, len(prompt) :].tolist()
    return ids, round(len(ids) / float(made.tokens_per_forward))


def test_the_golden_logits(write: Write) -> None:
    lm, golden = bridged(write()), load_file(GOLDEN / "golden.safetensors")
    assert isinstance(lm.network, CanvasNetwork)
    both = torch.cat([golden["prompt_ids"], golden["canvas_ids"]], 1)
    assert (lm.logits(both) - golden["logits"]).abs().max() < NEAR
    text = ReadText(lm.network)
    text.add(golden["prompt_ids"])
    first = text.logits(golden["canvas_ids"])
    assert (text.logits(golden["canvas_ids"], first) - golden["self_conditioned_logits"]).abs().max() < NEAR
    assert (first - golden["self_conditioned_logits"]).abs().max() > 1e-3  # the condition matters
    in_parts = ReadText(lm.network)
    in_parts.add(golden["prompt_ids"][:, :4])
    in_parts.add(golden["prompt_ids"][:, 4:])
    assert (in_parts.logits(golden["canvas_ids"]) - golden["logits"]).abs().max() < NEAR


STABLE: dict[str, Any] = {"max_denoising_steps": 12, "confidence_threshold": 1.0, "t_min": 0.001, "t_max": 0.002}
STABLE |= {"sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 99.0}}
SETTINGS: dict[str, dict[str, Any]] = {
    "as published": {"max_denoising_steps": 6},
    "until it is stable": STABLE,
    "until it has been stable for three steps": STABLE | {"stability_threshold": 3},
    "a wide bound": {"max_denoising_steps": 6, "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 12.0}},
    "other temperatures": {"max_denoising_steps": 6, "t_min": 0.1, "t_max": 2.0},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, which the reference asks about its steps
@pytest.mark.parametrize("name", SETTINGS)
def test_the_reference_writes_the_same(name: str, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, prompt, new = bridged(write(**SETTINGS[name])), [3, 4, 5, 90], 20
    ours = lm.generate([prompt], max_new_tokens=new, seed=5)[0]
    ids = [int(word) for word in ours.text.split()][len(prompt) :]
    theirs, calls = reference(lm, prompt, new, 5, monkeypatch)
    assert ids == theirs[:new]
    assert ours.forwards == calls
    assert (calls < 3 * SETTINGS[name]["max_denoising_steps"]) == ("stable" in name)


def test_a_row_alone_and_in_a_batch(write: Write) -> None:
    lm = bridged(write(max_denoising_steps=4))
    both = [made.text for made in lm.generate([[3, 4, 5], [9, 8, 7, 6, 5]], max_new_tokens=11, seed=2)]
    assert both[1] == lm.generate([[9, 8, 7, 6, 5]], max_new_tokens=11, seed=3)[0].text
    assert both[0] == lm.generate([[3, 4, 5]], max_new_tokens=11, seed=2)[0].text


def test_a_stop_token_ends_a_text(write: Write) -> None:
    plain = bridged(write("plain", max_denoising_steps=3)).generate([[3, 4]], max_new_tokens=24)[0]
    ids = [int(word) for word in plain.text.split()]
    stops = bridged(write("stops", max_denoising_steps=3, eos_token_id=ids[4])).generate([[3, 4]], max_new_tokens=24)[0]
    assert stops.text.split() == plain.text.split()[: ids.index(ids[4], 2)]
    assert stops.forwards == 3 < plain.forwards == 9


def test_spread_by_accelerate(write: Write) -> None:
    pytest.importorskip("accelerate")
    path = write(max_denoising_steps=3)
    texts = [bridged(path, **options).generate([[3, 4]], max_new_tokens=8)[0].text for options in ({}, {"device_map": "auto"})]
    assert texts[0] == texts[1]


def test_what_is_refused(write: Write, tmp_path: Path) -> None:
    path = write()
    with pytest.raises(library.InputError, match="no bridge 'transformer'; did you mean transformers"):
        library.load(str(path), bridge="transformer")
    with pytest.raises(library.InputError, match="add --bridge transformers"):
        library.load(str(path))
    with pytest.raises(library.InputError, match="add --bridge transformers"):
        library.load(str(path), device_map="auto")
    with pytest.raises(library.InputError, match="alone"):
        bridged(path, dtype="int8")
    lm = bridged(path)
    with pytest.raises(library.InputError, match="give a prompt"):
        lm.generate("", max_new_tokens=8)
    with pytest.raises(library.InputError, match="left to right"):
        lm.generate("3 4", suffix="5", max_new_tokens=8)
    with pytest.raises(library.InputError, match="canvas by canvas"):
        lm.generate("3 4", max_new_tokens=8, allow="1")
    with pytest.raises(library.InputError, match="copy its own files"):
        lm.save_pretrained(tmp_path / "saved")
    (tmp_path / "text.txt").write_text("3 4 5 " * 2000)
    with pytest.raises(library.InputError, match="no bound of it is known"):
        library.evaluate(lm, tmp_path / "text.txt", split="all", max_windows=2)
    weights = load_file(path / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(library.InputError, match="missing keys"):
        bridged(path)
    (path / "config.json").write_text(json.dumps({"architectures": ["OtherModel"], "auto_map": {"AutoModel": "m.OtherModel"}}))
    with pytest.raises(library.InputError, match="runs no code of a checkpoint"):
        bridged(path)
