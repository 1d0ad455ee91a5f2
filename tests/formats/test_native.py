"""What was saved is what is loaded, a save that fails costs nothing, and bad files get one line."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import save_torch_state_dict

from dlm import bundled
from dlm.errors import InputError
from dlm.formats import native
from dlm.formats.native import ModelConfig
from dlm.language_model import LanguageModel
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer
from dlm.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.characters("abcdefgh ")


def made(seed: int = 0, **changes: Any) -> LanguageModel:
    sizes = {"vocab_size": TOKENIZER.vocab_size + 1, "window": 8, "layers": 2, "heads": 2, "width": 16}
    network, rng = Transformer(TransformerConfig(**(sizes | changes))), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.3, generator=rng)
    config = ModelConfig(network.config, TOKENIZER.mask_id, context=2, training={"steps": 7})
    return LanguageModel(network.eval().requires_grad_(False), config, TOKENIZER, name="made")


def same(a: Transformer, b: Transformer) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def told(path: Path) -> str:
    """The one line that a damaged checkpoint gets."""
    with pytest.raises(InputError) as error:
        LanguageModel.from_pretrained(str(path))
    assert "\n" not in str(error.value), error.value
    return str(error.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    made().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_eight_bits_keep_matrices_within_half_a_step(tmp_path: Path) -> None:
    network = Transformer(TransformerConfig(vocab_size=20, window=8, layers=1, heads=2, width=32, conv=3, tied=True))
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.05)
    config = ModelConfig(network=network.config, mask_token_id=19)
    native.save(tmp_path / "model", network.state_dict(), config, files={}, dtype=torch.int8)
    loaded = native.load(tmp_path / "model")[0]
    for name, weight in network.named_parameters():
        found = loaded.get_parameter(name)
        if weight.ndim == 2 and min(weight.shape) >= 16:
            assert (found - weight).abs().max() <= weight.abs().max() / 127 / 2 + 1e-6, name
            assert not torch.equal(found, weight)
        else:
            assert torch.equal(found, weight.half().float()), name
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "int8"
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size < 1.5 * network.parameters_count() + 3000


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied": True}, {"attention": "block_causal", "block_length": 4, "mlp": "swiglu", "kv_heads": 1, "qkv_bias": True}],
    ids=["plain", "tied", "other"],
)
def test_float32_round_trip_is_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = made(**changes)
    model.defaults = {"steps": 3, "sampler": "topk"}
    model.save_pretrained(tmp_path / "m")
    again = LanguageModel.from_pretrained(str(tmp_path / "m"))
    assert same(model.network, again.network)
    assert again.config == model.config
    assert again.defaults == model.defaults
    assert again.tokenizer.fingerprint() == TOKENIZER.fingerprint()
    assert again.name == "m"
    z_BT = torch.arange(8)[None]
    assert torch.equal(model.network(z_BT), again.network(z_BT))
    assert not again.network.training
    assert not any(p.requires_grad for p in again.network.parameters())
    assert {p.name for p in (tmp_path / "m").iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
    }
    assert not any(p.is_meta for p in again.network.parameters())


def test_a_tied_head_stays_tied_and_is_stored_once(tmp_path: Path) -> None:
    made(tied=True).save_pretrained(tmp_path)
    assert "head.weight" not in native.weights(tmp_path)
    network, _ = native.load(tmp_path)
    assert network.head.weight is network.embed.weight
    assert network.parameters_count() == made(tied=True).network.parameters_count()


def test_bfloat16_round_trip(saved: Path, tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    rounded = {name: tensor.bfloat16() for name, tensor in model.network.state_dict().items()}
    for dtype in (torch.float32, torch.bfloat16):
        network, _ = native.load(tmp_path / "half", dtype=dtype)
        assert all(p.dtype == dtype for p in network.parameters())
        assert all(torch.equal(tensor, rounded[name].to(dtype)) for name, tensor in network.state_dict().items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    sizes = [(p / "model.safetensors").stat().st_size for p in (tmp_path / "half", saved)]
    assert sizes[0] < 0.7 * sizes[1]


def test_shards_load_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "SHARD", "8KB")
    made().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert all(p.stat().st_size < 10_000 for p in shards)
    assert same(made().network, native.load(tmp_path)[0])
    shards[1].unlink()
    assert shards[1].name in told(tmp_path)


@pytest.mark.parametrize("first", ["8KB", "14MB"])
def test_saving_over_a_checkpoint_with_other_shards_leaves_the_new_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """A stale index would make the old weights the ones that are read."""
    for shard, seed in ((first, 0), ("14MB" if first == "8KB" else "8KB", 1), ("20KB", 2)):
        monkeypatch.setattr(native, "SHARD", shard)
        made(seed).save_pretrained(tmp_path)
        assert same(made(seed).network, native.load(tmp_path)[0])
        index = tmp_path / "model.safetensors.index.json"
        files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        assert {p.name for p in tmp_path.glob("*.safetensors")} == files


def failing(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, out of disk space at one of its calls."""
    calls = 0

    def maybe(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args, **kwargs)

    return maybe


def files_of(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("where", ["weights", "text 1", "text 3", "move"])
def test_a_save_without_space_leaves_the_former_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    before = files_of(saved)
    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr("huggingface_hub.save_torch_state_dict", failing(1, save_torch_state_dict))
        elif where == "move":
            patch.setattr(os, "replace", failing(1, os.replace))
        else:
            patch.setattr(Path, "write_text", failing(int(where[-1]), Path.write_text))
        with pytest.raises(OSError, match="No space left"):
            made(1).save_pretrained(saved)
    assert files_of(saved) == before
    assert same(made(0).network, native.load(saved)[0])


@pytest.mark.parametrize("call", [2, 3, 4, 5])
def test_a_save_that_stops_between_files_leaves_a_whole_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(call, os.replace))
        with pytest.raises(OSError, match="No space left"):
            made(1).save_pretrained(saved)
    assert not [name for name in files_of(saved) if name.startswith(".")]
    model = LanguageModel.from_pretrained(str(saved))
    assert same(made(1).network, model.network)  # weights go first, and the other files are the same for both


def test_a_first_save_that_fails_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", failing(1, save_torch_state_dict))
    with pytest.raises(OSError, match="No space left"):
        made().save_pretrained(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
    assert "no config.json" in told(tmp_path / "new")


def test_truncated_weights_are_told_at_every_length(saved: Path) -> None:
    whole = (saved / "model.safetensors").read_bytes()
    for keep in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        (saved / "model.safetensors").write_bytes(whole[:keep])
        assert "truncated or damaged" in told(saved), keep


def test_missing_files_are_told(saved: Path, tmp_path: Path) -> None:
    (saved / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert "tokenizer.json" in told(saved)
    (saved / "model.safetensors").unlink()
    assert "model.safetensors" in told(saved)
    (saved / "config.json").unlink()
    assert "config.json" in told(saved)
    assert "no checkpoint" in told(tmp_path / "nothing")


def test_pickled_weights_are_refused(saved: Path) -> None:
    weights = saved / "model.safetensors"
    state = {name: tensor.read().clone() for name, tensor in native.weights(saved).items()}
    weights.unlink()
    torch.save(state, saved / "pytorch_model.bin")
    assert "model.safetensors" in told(saved)
    (saved / "pytorch_model.bin").rename(weights)
    assert "truncated or damaged" in told(saved)


def test_weights_that_do_not_fit_the_config_are_told(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())

    def with_network(**changes: Any) -> str:
        (saved / "config.json").write_text(json.dumps(config | {"network": config["network"] | changes}))
        return told(saved)

    assert "vocabulary" in with_network(vocab_size=30)
    assert "do not fit" in with_network(layers=3)
    assert "do not fit" in with_network(layers=1)
    assert "does not describe a model" in with_network(heads=0)
    assert "does not describe a model" in with_network(colour="red")
    assert "does not describe a model" in with_network(window="wide")
    assert "does not describe a model" in with_network(attention="sideways")
    (saved / "config.json").write_text(json.dumps(config))
    Tokenizer.characters("xyz").save(saved / "tokenizer.json")
    assert "different checkpoints" in told(saved)
    made(tied=True).save_pretrained(tmp_path / "tied")
    from safetensors.torch import save_file

    save_file({"norm.weight": torch.ones(16)}, tmp_path / "tied" / "model.safetensors")
    assert "do not fit" in told(tmp_path / "tied")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "damaged"),
        ('{"model_type": "dlm", ', "damaged"),
        ("[]", "config.json"),
        ("null", "config.json"),
        ('{"model_type": "llama", "vocab_size": 5}', "llama"),
        ("{}", "None"),
        ('{"model_type": "dlm"}', "does not describe a model"),
        ('{"model_type": "dlm", "network": []}', "does not describe a model"),
    ],
)
def test_a_damaged_or_foreign_config_is_told(saved: Path, text: str, word: str) -> None:
    (saved / "config.json").write_text(text)
    assert word in told(saved)


def test_a_config_that_is_no_text_is_told(saved: Path) -> None:
    (saved / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "damaged" in told(saved)


@pytest.mark.parametrize(
    "noise", [{"process": "magic"}, {"process": "masked", "schedule": "steep"}, [3], {"schedule": 3}, {"process": "semantic"}]
)
def test_an_unknown_noise_is_told(saved: Path, noise: Any) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"noise": noise}))
    assert "noise" in told(saved)


@pytest.mark.parametrize(("colours", "word"), [(["red"] * 9, "'red'"), (["#000000"], "9 tokens"), ([1] * 9, "colours"), ("", "colours")])
def test_colours_that_are_none_are_told(saved: Path, colours: Any, word: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"colours": colours}))
    assert word in told(saved)


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_other_damaged_json_is_told(saved: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (saved / "generation_config.json").write_text(text)
    assert "generation_config.json" in told(saved)
    monkeypatch.setattr(native, "SHARD", "8KB")
    made().save_pretrained(saved)
    index = saved / "model.safetensors.index.json"
    for bad in (text, '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}'):
        index.write_text(bad)
        assert str(saved) in told(saved), bad


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": {"type": "Magic"}}'])
def test_a_damaged_tokenizer_is_told(saved: Path, text: str) -> None:
    (saved / "tokenizer.json").write_text(text)
    assert "is not a tokenizer.json" in told(saved)


def test_an_unknown_name_gets_a_near_match(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    monkeypatch.setattr(bundled, "models", lambda: {"shakespeare-mask": saved})
    assert native.find("shakespeare-mask") == saved
    assert "did you mean shakespeare-mask?" in told(Path("shakespear-mask"))
    assert "bundled: shakespeare-mask" in told(Path("zzzz"))
    assert LanguageModel.from_pretrained("shakespeare-mask").name == "shakespeare-mask"


def test_a_hub_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def offline(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        raise OSError("no route to host\nand a long explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert "no route to host" in told(Path("someone/something"))
    assert asked == [["*.json", "*.safetensors"]]  # nothing that could be unpickled or run is even fetched


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"contxt": 8}, "unknown key 'contxt'; did you mean context?"),
        ({"objectiv": "autoregressive"}, "unknown key 'objectiv'; did you mean objective?"),
        ({"network": {"windw": 8}}, "unknown key 'windw'; did you mean window?"),
        ({"lamp": "red"}, "unknown key 'lamp'; known: network, mask_token_id"),
    ],
)
def test_a_key_that_nobody_reads_is_told_with_the_nearest_one(saved: Path, change: dict[str, Any], line: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    change = {key: config[key] | value if isinstance(value, dict) else value for key, value in change.items()}
    (saved / "config.json").write_text(json.dumps(config | change))
    assert line in told(saved)


def test_keys_of_hugging_face_that_say_nothing_are_passed_over(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32", "transformers_version": "5.0", "_name_or_path": "x"}))
    assert native.load_config(saved) == made().config
