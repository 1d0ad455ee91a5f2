"""An exported GGUF file has the logits of the model that it was made of, in dlm bit by bit, in llama.cpp greedily."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dlm as library
from bases import LLAMA3, publish, transformer
from conftest import TEXT, Dlm, make_model
from dlm.bench import peers
from dlm.formats.native import ModelConfig
from dlm.language_model import LanguageModel
from dlm.models.transformer import Transformer
from dlm.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
SAME_FAMILY = {"llada": "llada", "dream": "dream", "llada_moe": "llada-moe"}


def same(found: LanguageModel, base: LanguageModel) -> None:
    """Equal logits, tokens, control tokens and template."""
    ids_BT = torch.randint(3, 70, (2, 17), generator=torch.Generator().manual_seed(0))
    mine, its = found.network.state_dict(), base.network.state_dict()
    assert all(torch.equal(mine[name], its[name]) for name in mine.keys() | its.keys())
    apart = (found.logits(ids_BT) - base.logits(ids_BT)).abs().max()
    assert float(apart) <= (1e-5 if base.config.network.experts else 0.0)  # an expert's few rows: sums depend on where its weights lie
    text = "the worst <|mask|> and"
    assert found.tokenizer.encode(text) == base.tokenizer.encode(text)
    assert found.tokenizer.control == base.tokenizer.control
    assert found.stops == base.stops
    assert found.chat.source == base.chat.source


@pytest.mark.parametrize("name", SAME_FAMILY)
def test_a_diffusion_model_comes_back_as_it_went(name: str, tmp_path: Path) -> None:
    base, file = library.load(str(GOLDEN / name)), tmp_path / "tiny.gguf"
    found = library.export(base, file, to="gguf")
    assert (found.model_type, found.readers) == (SAME_FAMILY[name], ("dlm", "llama.cpp"))
    again = library.load(str(file))
    same(again, base)
    assert (again.config, again.defaults) == (base.config, base.defaults)
    assert again.prompt_ids("the") == base.prompt_ids("the")
    numbers = load_file(GOLDEN / name / "golden.safetensors")
    assert float((again.logits(numbers["input_ids"]) - numbers["logits"]).abs().max()) < 3e-5


def test_a2d_goes_out_as_dream_without_a_shift(tmp_path: Path) -> None:
    base = library.load(str(GOLDEN / "a2d_qwen2"))
    assert library.export(base, tmp_path / "tiny.gguf", to="gguf").model_type == "dream"
    again = library.load(str(tmp_path / "tiny.gguf"))
    same(again, base)
    assert (base.config.shift, again.config) == (False, replace(base.config, family="dream"))


def test_a_causal_drafter_goes_out_with_its_mask(tmp_path: Path) -> None:
    base = library.load(str(GOLDEN / "sdar"), family="i-dlm")
    assert library.export(base, tmp_path / "tiny.gguf", to="gguf").model_type == "qwen3"
    again = library.load(str(tmp_path / "tiny.gguf"), family="i-dlm")
    same(again, base)
    assert again.config == base.config


BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True, "spare": 3}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 131072}),
    "linear": ("Qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", BASES)
def test_a_base_comes_back_as_it_went_and_llama_cpp_writes_its_text(name: str, tmp_path: Path) -> None:
    family, changes = BASES[name]
    base = library.load(str(publish(transformer(family, **changes), tmp_path / "base")))
    file = tmp_path / "tiny.gguf"
    assert library.export(base, file, to="gguf").model_type == family.lower()
    again = library.load(str(file))
    same(again, base)
    assert again.config == base.config
    llama_cpp_writes_its_text(base, file)


def llama_cpp_writes_its_text(base: LanguageModel, file: Path) -> None:
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    ids = base.tokenizer.encode("ROMEO what")
    expected = base.generate("ROMEO what", temperature=0.0, max_new_tokens=12).trajectory.current_BT[0].tolist()[len(ids) :]
    assert peers.LlamaCpp(file, sorted(base.stops), None, positions=64, threads=1).write([ids], 12)[0] == [expected]


def test_frequencies_that_are_divided_one_by_one_are_a_tensor_of_a_llama(tmp_path: Path) -> None:
    """Other numbers than those of the released Llama 3: the file has what follows from them, as llama.cpp reads it."""
    rope = LLAMA3 | {"original_max_position_embeddings": 32, "factor": 4.0, "rope_theta": 100.0}
    base = library.load(str(publish(transformer("Llama", rope_parameters=rope), tmp_path / "base")))
    library.export(base, tmp_path / "tiny.gguf", to="gguf")
    again = library.load(str(tmp_path / "tiny.gguf"))
    assert (len(base.config.network.rope_scaling), len(again.config.network.rope_factors)) == (4, 4)
    ids_BT = torch.randint(3, 70, (2, 60), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.logits(ids_BT), base.logits(ids_BT), atol=1e-4, rtol=1e-4)
    llama_cpp_writes_its_text(base, tmp_path / "tiny.gguf")
    other = library.load(str(publish(transformer("Qwen3", rope_parameters=rope), tmp_path / "qwen3")))
    with pytest.raises(library.InputError, match="qwen3 has no rotary positions that are divided one by one"):
        library.export(other, tmp_path / "other.gguf", to="gguf")


def own(objective: str, **network: Any) -> LanguageModel:
    """A model of dlm's own on subwords; its mask is one id more."""
    sizes: dict[str, Any] = {"mlp": "swiglu", "mlp_width": 64} | network
    tiny, tokenizer = make_model(objective, **sizes), Tokenizer.bpe(TEXT[:150], 60)
    config = replace(tiny.config.network, vocab_size=tokenizer.ids)
    net = Transformer(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(len(parameter)))
    settings = ModelConfig(config, tokenizer.mask_id, objective)
    return LanguageModel(net.eval().requires_grad_(False), settings, tokenizer)


def test_a_model_of_dlm_goes_out_where_its_shape_has_a_form(tmp_path: Path) -> None:
    file, ids_BT = tmp_path / "tiny.gguf", torch.tensor([[3, 1, 20, 11, 7]])
    lm = own("diffusion", qk_norm=False)
    assert library.export(lm, file, to="gguf").model_type == "llada"
    again = library.load(str(file))
    assert torch.equal(again.logits(ids_BT), lm.logits(ids_BT))
    assert again.tokenizer.mask_id == lm.tokenizer.mask_id
    assert again.tokenizer.encode("ROMEO: soft") == lm.tokenizer.encode("ROMEO: soft")
    lm = own("autoregressive")
    assert library.export(lm, file, to="gguf").model_type == "qwen3"
    again = library.load(str(file))
    assert again.config.start_token_id == lm.config.start_token_id == lm.tokenizer.mask_id
    assert torch.equal(again.predict(ids_BT, torch.zeros(1))[..., :-1], lm.predict(ids_BT, torch.zeros(1)))


@pytest.mark.parametrize(("dtype", "near"), [("bfloat16", 0.1), ("q8_0", 0.1), ("q4_1", 1.2), ("q4_0", 1.2)])
def test_matrices_in_fewer_bits(dtype: str, near: float, tmp_path: Path) -> None:
    base, file = library.load(str(GOLDEN / "llada")), tmp_path / "tiny.gguf"
    whole = library.export(base, file, to="gguf").files["tiny.gguf"]
    ids_BT = load_file(GOLDEN / "llada" / "golden.safetensors")["input_ids"]
    assert library.export(base, file, to="gguf", dtype=dtype).files["tiny.gguf"] < 0.7 * whole
    assert 0 < float((library.load(str(file)).logits(ids_BT) - base.logits(ids_BT)).abs().mean()) < near


REFUSED: dict[str, tuple[LanguageModel, str]] = {
    "short convolutions": (own("autoregressive", conv=5), "conv"),
    "an MLP that is no SwiGLU": (make_model(), "mlp"),
    "full attention with a norm of q and k": (own("diffusion"), "norm"),
    "noise of kind uniform": (make_model(noise={"process": "uniform", "schedule": "linear"}, mlp="swiglu", qk_norm=False), "noise"),
    "a noise level that the network reads": (own("diffusion", time_conditioning=True, qk_norm=False), "time"),
    "the tokenizer cuts a text in a way": (make_model(mlp="swiglu", qk_norm=False), "characters"),
}


@pytest.mark.parametrize("message", REFUSED, ids=[short for _, short in REFUSED.values()])
def test_other_models_are_refused(message: str, tmp_path: Path) -> None:
    with pytest.raises(library.InputError, match=message) as error:
        library.export(REFUSED[message][0], tmp_path / "tiny.gguf", to="gguf")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sdar", "llada2_moe", "mdlm", "nemotron_labs_diffusion", "a2d_qwen3", "duo", "sedd", "gidd"])
def test_families_without_an_architecture_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(library.InputError, match="no GGUF architecture has"):
        library.export(str(GOLDEN / name), tmp_path / "tiny.gguf", to="gguf")
    assert not list(tmp_path.iterdir())


def test_the_verb(dlm: Dlm) -> None:
    code, out, err = dlm("export", str(GOLDEN / "llada"), "--to", "gguf", "--out", "there/tiny.gguf", "--dtype", "q8_0", "--json")
    assert code == 0, err
    assert "llada, " in err
    assert json.loads(out.splitlines()[-1])["readers"] == ["dlm", "llama.cpp"]
    assert library.load("there/tiny.gguf").config.family == "llada"
    assert "whose name ends in .gguf" in dlm.told("export", str(GOLDEN / "llada"), "--to", "gguf", "--out", "there")
    assert "unknown dtype 'q5'" in dlm.told("export", str(GOLDEN / "llada"), "--to", "gguf", "--out", "a.gguf", "--dtype", "q5")
    told = dlm.told("export", "shakespeare-mask", "--to", "gguf", "--out", "a.gguf")
    assert "short convolutions: export it with --to hf" in told
