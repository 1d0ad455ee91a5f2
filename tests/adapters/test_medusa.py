"""Heads on the last hidden state: what they learn against its definition, files, and `dlm generate` with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters.test_convert_cli import SMALL, base_dir, curve, text  # noqa: F401 (fixtures)
from adapters.test_objective import batch
from conftest import Dlm, make_model
from dlm.adapters import attach, lora, medusa
from dlm.errors import InputError
from dlm.language_model import LanguageModel


def guessing(lm: LanguageModel, count: int = 2) -> medusa.Heads:
    """Heads that are far from saying what the base says."""
    made, rng = medusa.Heads(lm.network, medusa.HeadsConfig(count, lm.name, lora.fingerprint(lm.network))), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.2, generator=rng)
    return made


def test_fresh_heads_say_what_the_base_says() -> None:
    lm = make_model("autoregressive")
    made, x_BT = medusa.Heads(lm.network, medusa.HeadsConfig(3)), batch(lm)[0]
    logits_BKV = made(lm.network(x_BT, logits=False)[:, -1], 2)
    assert torch.equal(logits_BKV, lm.network(x_BT)[:, -1:].expand(-1, 2, -1))


@pytest.mark.parametrize("how", ["kl", "ce"])
def test_the_loss_is_its_definition(how: str) -> None:
    lm = make_model("autoregressive")
    lm.network.requires_grad_(False)
    made, (x_BT, free_BT), mask_id = guessing(lm), batch(lm), lm.tokenizer.mask_id
    found = medusa.foresight(lm.network, made, x_BT, free_BT, mask_id=mask_id, how=how)
    found.nats_B.sum().backward()
    got = [p.grad.clone() for p in made.parameters() if p.grad is not None]
    made.zero_grad()
    rows, count, accepted, agreed = [], [0, 0], [0.0, 0.0], [0, 0]
    for x, free in zip(x_BT, free_BT.clone(), strict=True):
        free[0] = False
        nats = []
        for s in range(12):
            for k in (1, 2):
                if s + 1 + k > 12 or not (free[s + 1] and free[s + 1 + k]):
                    continue
                logq = made(lm.network(x[None, : s + 1], logits=False)[:, -1], 2)[0, k - 1, :mask_id].log_softmax(-1)
                logp = lm.network(x[None, : s + k + 1])[0, -1, :mask_id].log_softmax(-1)  # has read k tokens more
                nats.append((logp.exp() * (logp - logq)).sum() if how == "kl" else -logq[x[s + 1 + k]])
                count[k - 1] += 1
                accepted[k - 1] += float(torch.minimum(logp.exp(), logq.exp()).sum().detach())
                agreed[k - 1] += int(logp.argmax() == logq.argmax())
        rows.append(torch.stack(nats).mean())
    torch.testing.assert_close(found.nats_B, torch.stack(rows), atol=1e-5, rtol=1e-5)
    assert found.count_S.tolist() == count
    assert found.accepted_S is not None
    assert found.agreed_S is not None
    torch.testing.assert_close(found.accepted_S, torch.tensor(accepted), atol=1e-4, rtol=1e-5)
    assert found.agreed_S.tolist() == agreed
    torch.stack(rows).sum().backward()
    for gradient, parameter in zip(got, made.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4)
    assert len(got) == 2
    assert all(p.grad is None for p in lm.network.parameters())


@pytest.mark.slow
def test_convert_and_generate(dlm: Dlm, base_dir: Path, text: Path) -> None:  # noqa: F811
    """Acceptance rises, the text is the base's own for every seed, in fewer calls; a run that stopped goes on to the same heads."""
    words = ("convert", str(base_dir), "--data", str(text), *SMALL, "--heads", "2", "--lr", "0.01", "--save-every", "60")
    code, printed, err = dlm(*words, "--steps", "120", "--out", "out", "--json")
    assert code == 0, err
    figures = json.loads(printed.splitlines()[-1])
    assert (figures["stride"], figures["heads"]) == (3, 2)
    assert all(after > before + 0.2 for before, after in zip(figures["accept_before"], figures["accept"], strict=True)), figures
    assert sorted(p.name for p in Path("out").iterdir()) == ["heads.json", "heads.safetensors", "log.jsonl", "training.safetensors"]
    assert curve(Path("out"))[-1]["step"] == 120
    calls = {"autoregressive": 0, "heads:3": 0, "lossless": 0}
    for seed, temperature in ((0, "0"), (1, "1"), (2, "0.7")):
        base = ("generate", "I sing", "--model", str(base_dir), "--seed", str(seed), "--temperature", temperature, "--json")
        made = {}
        for name in calls:
            more = ("--lossless",) if name == "lossless" else ("--sampler", name)
            made[name] = json.loads(dlm(*base, "--adapter", "out", *more)[1].splitlines()[-1])
            calls[name] += made[name]["forwards"]
        assert made["heads:3"]["text"] == made["lossless"]["text"] == made["autoregressive"]["text"]
        assert made["lossless"]["sampler"] == "heads:auto"
    assert calls["heads:3"] <= calls["lossless"] <= calls["autoregressive"] > calls["heads:3"]  # as many as pay on this machine
    assert "has no heads to draft with: give --adapter DIRECTORY" in dlm.told("generate", "--model", str(base_dir), "--sampler", "heads:3")
    assert "resume with the same" in dlm.told(*words[:-4], "--steps", "130", "--out", "out", "--resume", "--heads", "3")
    assert "leave --full or --heads away" in dlm.told(*words, "--steps", "9", "--full")
    assert "invalid value for '--heads': must be at least 0" in dlm.told(*words, "--steps", "9", "--heads", "-1")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lm = make_model("autoregressive")
    made = guessing(lm)
    medusa.save_heads(tmp_path / "heads", made, made.config)
    return tmp_path / "heads"


def test_save_and_load(saved: Path) -> None:
    lm, made = make_model("autoregressive"), guessing(make_model("autoregressive"))
    assert attach.with_adapter(lm, saved).heads.config == made.config
    assert lora.adapter_of(lm.network) is None
    assert lm.heads is not None
    for name, parameter in lm.heads.named_parameters():
        assert not parameter.requires_grad
        assert torch.equal(parameter, dict(made.named_parameters())[name].bfloat16().float())
    assert sorted(p.name for p in saved.iterdir()) == ["heads.json", "heads.safetensors"]
    config = lora.AdapterConfig(4, 8.0, fingerprint=made.config.fingerprint)
    lora.attach(lm.network, config, lm.tokenizer.mask_id)
    lora.save_adapter(saved, lm.network, config)  # a directory may hold both
    both = attach.with_adapter(make_model("autoregressive"), saved)
    assert both.heads.config == made.config
    adapter = lora.adapter_of(both.network)
    assert adapter is not None
    assert adapter.config == config
    low = load_in_bfloat16(saved)
    assert low.heads is not None
    assert low.heads(low.network(batch(low)[0], logits=False)[:, -1], 2).dtype == torch.bfloat16


def load_in_bfloat16(path: Path) -> LanguageModel:
    lm = make_model("autoregressive")
    lm.network.to(torch.bfloat16)
    attach.with_adapter(lm, path)
    return lm


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another base": (lambda d: rewrite(d / "heads.json", fingerprint="0" * 64), "made for another base .*000000000000; this one has"),
    "a list": (lambda d: (d / "heads.json").write_text("[]"), "does not describe heads"),
    "no count": (lambda d: rewrite(d / "heads.json", count=0), "does not describe heads .heads count from 1"),
    "another count": (lambda d: rewrite(d / "heads.json", count=3), "does not fit its heads.json"),
    "no weights": (lambda d: (d / "heads.safetensors").unlink(), "heads.safetensors is missing, truncated or damaged"),
    "half": (lambda d: (d / "heads.safetensors").write_bytes((d / "heads.safetensors").read_bytes()[:-50]), "truncated or damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_loaded(saved: Path, damage: str) -> None:
    harm, message = DAMAGES[damage]
    harm(saved)
    lm = make_model("autoregressive")
    with pytest.raises(InputError, match=message):
        attach.with_adapter(lm, saved)
    assert lm.heads is None


def test_a_directory_without_heads(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no heads in .*: it has no heads\.json"):
        medusa.load_heads(tmp_path, make_model("autoregressive").network)
