"""An exported directory loads again, in dlm and, where the network is a Llama-like base, in transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dlm as library
from bases import publish, transformer
from conftest import Dlm, make_model


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_a_base_goes_out_as_it_came_in(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformer(family)
    lm = library.load(str(publish(theirs, tmp_path / "base")))
    found = library.export(lm, tmp_path / "out")
    assert found.model_type == family.lower()
    assert found.readers == ("dlm", "transformers")
    z_BT = torch.tensor([lm.tokenizer.encode("ROMEO: But soft")])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(z_BT).logits, theirs(z_BT).logits)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("ROMEO: But soft")["input_ids"] == z_BT[0].tolist()
    mine = library.load(str(tmp_path / "out"))
    assert mine.stops == lm.stops
    assert mine.config == lm.config
    assert mine.generate("ROMEO", max_new_tokens=12, seed=3).text == lm.generate("ROMEO", max_new_tokens=12, seed=3).text
    messages = [{"role": "user", "content": "What light?"}]
    assert mine.chat_prompt(messages) == lm.chat_prompt(messages)


def test_a_start_token_that_the_tokenizer_does_not_write_is_kept(tmp_path: Path) -> None:
    """A GGUF file tells it apart from the tokenizer."""
    lm = library.load(str(publish(transformer("Llama"), tmp_path / "base")))
    z_BT, t_B = torch.tensor([lm.tokenizer.encode("ROMEO: But soft")]), torch.zeros(1)
    plain_BTV = lm.predict(z_BT, t_B)
    lm.config = replace(lm.config, start_token_id=lm.tokenizer.encode("R")[0])
    library.export(lm, tmp_path / "out")
    again = library.load(str(tmp_path / "out"))
    assert again.config == lm.config
    assert torch.equal(again.predict(z_BT, t_B), lm.predict(z_BT, t_B))
    assert not torch.equal(again.predict(z_BT, t_B), plain_BTV)
    assert again.tokenizer.encode("ROMEO") == lm.tokenizer.encode("ROMEO")


@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
def test_a_model_of_dlm_loads_again_in_dlm(objective: str, tmp_path: Path) -> None:
    lm = make_model(objective)
    found = library.export(lm, tmp_path / "out")
    assert found.model_type == "dlm"
    assert found.readers == ("dlm",)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "dlm"
    assert library.load(str(tmp_path / "out")).generate("ROMEO", length=20, seed=1).text == lm.generate("ROMEO", length=20, seed=1).text


def test_the_verb(dlm: Dlm, masked_dir: Path) -> None:
    code, out, err = dlm("export", str(masked_dir), "--to", "hf", "--out", "there", "--dtype", "bfloat16", "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["format"] == 1
    assert found["files"]["model.safetensors"] < 0.6 * (masked_dir / "model.safetensors").stat().st_size
    assert library.load("there").network.embed.weight.dtype == torch.float32
    assert found == library.export(str(masked_dir), "there", dtype="bfloat16").record()


def test_bad_input(dlm: Dlm, masked_dir: Path, autoregressive_dir: Path, tmp_path: Path) -> None:
    assert "unknown layout 'hg'" in dlm.told("export", str(masked_dir), "--to", "hg", "--out", "there")
    assert "unknown dtype 'float8'" in dlm.told("export", str(masked_dir), "--out", "there", "--dtype", "float8")
    Path("file").write_text("")
    assert "file is a file: name a directory" in dlm.told("export", str(masked_dir), "--out", "file")
    assert "no checkpoint" in dlm.told("export", "nowhere", "--out", "there")
    with pytest.raises(library.InputError, match="save it from float32"):
        library.export(library.load(str(autoregressive_dir), dtype="int8"), tmp_path / "there")
    assert not Path("there").exists()
