"""A checkpoint that brings code of its own: never run, unless both the bridge and the trust are asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import dlm as library
from conftest import Dlm
from goldens import GOLDEN

pytest.importorskip("transformers")
CODE = """
from pathlib import Path
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

Path("ran").touch()


class NovelConfig(PretrainedConfig):
    model_type = "novel"

    def __init__(self, vocab_size=280, hidden_size=16, **more):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**more)


class NovelModel(PreTrainedModel):
    config_class = NovelConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mean = (hidden * kept[..., None]).sum(1, keepdim=True) / kept.sum(1)[:, None, None]
        place = torch.arange(hidden.shape[1])[None, :, None] / 8
        return MaskedLMOutput(logits=self.head(hidden + mean * place))
"""
TRUST = ("--bridge", "transformers", "--trust-remote-code")


@pytest.fixture
def novel(dlm: Dlm, tmp_path: Path) -> Path:
    """With the tokenizer of LLaDA."""
    path = tmp_path / "novel"
    path.mkdir()
    (path / "modeling_novel.py").write_text(CODE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "llada" / name, path)
    auto = {"AutoConfig": "modeling_novel.NovelConfig", "AutoModelForMaskedLM": "modeling_novel.NovelModel"}
    config = {"model_type": "novel", "architectures": ["NovelModel"], "auto_map": auto, "vocab_size": 280, "hidden_size": 16}
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64, "mask_token_id": 277}))
    rng = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (280, 16), "head.weight": (280, 16), "head.bias": (280,)}
    from safetensors.torch import save_file

    state = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_its_code_waits_for_both_words(dlm: Dlm, novel: Path) -> None:
    for words, told in (
        ((), "which dlm never runs"),
        (("--trust-remote-code",), "--trust-remote-code goes with --bridge transformers alone"),
        (("--bridge", "transformers"), "it runs no code of a checkpoint"),
    ):
        assert told in dlm.told("generate", "the", str(novel), *words)
        assert not Path("ran").exists()
    code, out, err = dlm("generate", "the", str(novel), *TRUST, "--max-new-tokens", "8", "--steps", "4")
    assert code == 0, err
    assert Path("ran").exists()
    assert out.startswith("the")


def test_it_is_a_denoiser(novel: Path) -> None:
    lm = library.load(str(novel), bridge="transformers", trust_remote_code=True)
    ids_BT = torch.tensor([[3, 4, 277, 6]])
    assert torch.equal(lm.logits(ids_BT), lm.network.inner(input_ids=ids_BT).logits)  # type: ignore[operator]
    alone = [lm.generate([row], max_new_tokens=8, seed=1)[0].text for row in ([3, 4], [5, 6, 7, 8])]
    both = lm.generate([[3, 4], [5, 6, 7, 8]], max_new_tokens=8, seed=1)
    assert both[0].text == alone[0]
    with pytest.raises(library.InputError, match="has no cache"):
        lm.generate([[3, 4]], max_new_tokens=8, sampler="topk", cache="dual")
    with pytest.raises(library.InputError, match="copy its own files"):
        lm.save_pretrained(novel / "again")


def test_a_config_that_says_too_little(dlm: Dlm, novel: Path) -> None:
    data = json.loads((novel / "config.json").read_text())
    for key, told in (("auto_map", "auto_map of a model"), ("max_position_embeddings", "window or vocab_size")):
        (novel / "config.json").write_text(json.dumps({name: value for name, value in data.items() if name != key}))
        assert told in dlm.told("generate", "the", str(novel), *TRUST)
