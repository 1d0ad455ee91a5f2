"""A network over memory and disk has the logits, the texts and the caches of one that is in memory as a whole."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import Dlm, make_model
from dlm.errors import InputError
from dlm.inference.spread import SpreadBlocks, spread
from dlm.language_model import LanguageModel, load
from goldens import GOLDEN, model

pytest.importorskip("accelerate")


def sizes(lm: LanguageModel) -> tuple[int, int]:
    """Bytes outside of the blocks, and of a block."""
    blocks = sum(tensor.nbytes for tensor in lm.network.blocks.parameters())
    whole = {tensor.data_ptr(): tensor.nbytes for tensor in lm.network.parameters()}
    return sum(whole.values()) - blocks, blocks // len(lm.network.blocks)


def partly(name: str, blocks: float = 0.0) -> LanguageModel:
    """Memory for so many blocks."""
    outside, block = sizes(model(name))
    return load(str(GOLDEN / name), device_map="auto", max_memory={"cpu": outside + int(blocks * block) + 1000})


def written(lm: LanguageModel, **options: Any) -> list[Tensor]:
    found = lm.generate([[5, 6, 7], [8]], max_new_tokens=8, seed=1, **options)
    return [one.trajectory.current_BT for one in found]


@pytest.mark.parametrize("name", ["llada", "gidd", "llada_moe"])
def test_logits_and_texts_are_those_of_one_in_memory(name: str) -> None:
    lm, whole = partly(name), model(name)
    assert isinstance(lm.network.blocks, SpreadBlocks)
    assert set(lm.network.blocks.devices.values()) == {"cpu", "disk"}
    assert any(tensor.is_meta for tensor in lm.network.blocks.parameters())
    assert lm.network.device == torch.device("cpu")
    z_BT, t_B = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
    apart = float((lm.predict(z_BT, t_B) - whole.predict(z_BT, t_B)).abs().max())
    assert apart <= (1e-5 if whole.config.network.experts else 0.0)  # an expert's few rows: sums depend on where its weights lie
    assert all(map(torch.equal, written(lm), written(whole)))


def test_caches_and_other_patterns(tmp_path: Path) -> None:
    """Approximate caches, and blocks read one by one through a view of the network."""
    lm, whole = partly("llada"), model("llada")
    for options in ({"cache": "dual", "sampler": "topk"}, {"sampler": "bd3lm"}):
        assert all(map(torch.equal, written(lm, **options), written(whole, **options)))
    with pytest.raises(InputError, match="lies partly on disk"):
        lm.save_pretrained(tmp_path)


def test_an_autoregressive_model(dlm: Dlm) -> None:
    """Plain and speculative decoding against the cache; no quantized copy of weights that lie on disk drafts."""
    path, whole = str(GOLDEN / "sdar"), load(str(GOLDEN / "sdar"), family="i-dlm")
    outside, block = sizes(whole)
    lm = load(path, family="i-dlm", device_map="auto", max_memory={"cpu": outside + block + 1000})
    assert isinstance(lm.network.blocks, SpreadBlocks)
    assert any(tensor.is_meta for tensor in lm.network.blocks.parameters())
    for word in ("autoregressive", "strided:3", "lookup:4", "lossless"):
        assert all(map(torch.equal, written(lm, sampler=word), written(whole, sampler=word)))
    with pytest.raises(InputError, match="are not all in memory"):
        lm.generate([[5, 6, 7]], max_new_tokens=4, sampler="draft:int8:3")
    words = ("generate", "ab", path, "--family", "i-dlm", "--max-new-tokens", "4", "--device-map")
    assert dlm(*words, "auto")[:2] == dlm(*words[:-1])[:2]
    assert "unknown device_map 'all'" in dlm.told(*words, "all")


def test_blocks_stay_where_they_fit() -> None:
    network = make_model(layers=6, width=64).network
    outside = sum(tensor.nbytes for tensor in network.parameters()) - (blocks := sum(t.nbytes for t in network.blocks.parameters()))
    spread(network, {"cpu": outside + blocks * 4 // 6})
    assert isinstance(network.blocks, SpreadBlocks)
    kept = [network.blocks.devices[f"blocks.{i}"] for i in range(6)]
    assert kept == sorted(kept)
    assert 0 < kept.count("cpu") < 6
    folder = Path(network.blocks.folder)
    assert len(list(folder.glob("*.dat"))) == sum(tensor.is_meta for tensor in network.blocks.parameters())
    del network
    gc.collect()
    assert not folder.exists()


def test_what_is_refused() -> None:
    path = str(GOLDEN / "llada")
    with pytest.raises(InputError, match="embedding and head take"):
        load(path, device_map="auto", max_memory={"cpu": 1000})
    with pytest.raises(InputError, match="unknown device_map 'sequential'"):
        load(path, device_map="sequential")
    with pytest.raises(InputError, match="max_memory is for device_map"):
        load(path, max_memory={"cpu": 1000})
    with pytest.raises(InputError, match="device_map chooses the devices"):
        load(path, device_map="auto", dtype="int8")
    with pytest.raises(InputError, match="--trust-remote-code goes with --bridge transformers alone"):
        load(path, trust_remote_code=True)
