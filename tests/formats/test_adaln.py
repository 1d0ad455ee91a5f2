"""MDLM, BD3-LM, SEDD, DUO and GIDD: logits, losses and posteriors of their reference code; wrong readings do not give them.

tests/golden: tiny random checkpoints in the layout of the real ones with what the reference computes from them (README.md in each).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import dlm
from accelerator import Accelerator
from conftest import Dlm
from dlm.errors import InputError
from dlm.language_model import LanguageModel
from dlm.models import adaln
from dlm.models.adaln import AdaLN
from dlm.models.pattern import reading
from dlm.noise.replacement import ReplacementNoise
from dlm.noise.score import ScoreNoise

GOLDEN = Path(__file__).parents[1] / "golden"
NEAR = 3e-5
FULL = ("mdlm", "sedd", "duo", "gidd")
EVERY = (*FULL, "bd3lm")


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "golden.safetensors")


def load(name: str) -> LanguageModel:
    return dlm.load(str(GOLDEN / name))


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def expected(name: str) -> Tensor:
    numbers = golden(name)
    return numbers.get("logits", numbers.get("log_score", numbers.get("sampling_logits_of_12_positions")))  # type: ignore[return-value]


def logits(name: str, lm: LanguageModel) -> Tensor:
    numbers = golden(name)
    if name == "bd3lm":
        return lm.logits(numbers["noisy_ids"][:, :12])
    return lm.logits(numbers["input_ids"], t=numbers["t"])


@pytest.mark.parametrize("name", EVERY)
def test_logits_are_those_of_the_reference(name: str) -> None:
    lm = load(name)
    assert isinstance(lm.network, AdaLN)
    assert apart(logits(name, lm), expected(name)) < NEAR


def test_mdlm_is_told_no_time_unless_its_config_says_so(tmp_path: Path) -> None:
    numbers, lm = golden("mdlm"), load("mdlm")
    assert apart(lm.logits(numbers["input_ids"]), numbers["logits"]) < NEAR
    told = edited(tmp_path, "mdlm", time_conditioning=True)
    assert apart(told.logits(numbers["input_ids"], t=numbers["t"]), numbers["logits_if_time_conditioned"]) < NEAR
    assert apart(numbers["logits"], numbers["logits_if_time_conditioned"]) > 0.01


def test_blocks_beside_clean_ones() -> None:
    numbers, lm = golden("bd3lm"), load("bd3lm")
    beside_BTV = lm.predict_beside(numbers["noisy_ids"], numbers["clean_ids"], 4)
    assert apart(beside_BTV, numbers["training_logits_of_the_noisy_half"]) < NEAR
    assert apart(lm.predict_beside(numbers["noisy_ids"], numbers["clean_ids"], 8), numbers["training_logits_of_the_noisy_half"]) > 0.1


# losses and posteriors


def test_mdlm_and_its_loss() -> None:
    numbers, lm = golden("mdlm"), load("mdlm")
    z_BT, t_B = numbers["input_ids"], numbers["t"].double()
    logp_BTV = lm.noise.log_probs(lm.predict(z_BT, t_B), z_BT, t_B)
    possible = numbers["log_probs_subs"] > -1e5
    assert apart(logp_BTV[possible], numbers["log_probs_subs"][possible]) < NEAR
    assert bool((logp_BTV[~possible] == -torch.inf).all())
    assert apart(lm.noise.nelbo(logp_BTV, numbers["clean_ids"], z_BT, t_B), numbers["loss_per_token"]) < NEAR


def test_sedd_and_its_score_entropy_and_steps() -> None:
    numbers, lm = golden("sedd"), load("sedd")
    assert isinstance(lm.noise, ScoreNoise)
    z_BT, t_B, x_BT = numbers["input_ids"], numbers["t"].double(), numbers["clean_ids"]
    scores_BTV = lm.predict(z_BT, t_B).double()
    assert apart(lm.noise.score_entropy(scores_BTV, x_BT, z_BT, t_B), numbers["loss_per_token"]) < NEAR
    logmu_BTV = lm.noise.unnormalised(scores_BTV, z_BT, t_B)
    s_B = lm.noise.schedule.inverse(torch.exp(-numbers["sigma"].double() / 2))
    step_BTV, reference_BTV = lm.noise.posterior(logmu_BTV, z_BT, t_B, s_B)[..., :-1], numbers["analytic_step_by_half_sigma"]
    assert apart(step_BTV, reference_BTV[..., :-1]) < NEAR
    assert apart(1 - step_BTV.sum(-1), reference_BTV[..., -1]) < NEAR  # the reference leaves the rest to the mask, be it negative
    assert apart(lm.noise.posterior(logmu_BTV, z_BT, t_B, 0 * s_B)[..., :-1], numbers["denoiser_probs"]) < 10 * NEAR
    normalised_BTV = lm.noise.log_probs(scores_BTV, z_BT, t_B)
    assert bool((lm.noise.nelbo(normalised_BTV, x_BT, z_BT, t_B) <= lm.noise.score_entropy(scores_BTV, x_BT, z_BT, t_B) + 1e-9).all())
    # divided by the sum of the predictions, the steps of the reference are those of any masked model
    masks = z_BT == 127
    assert apart(logmu_BTV[masks].log_softmax(-1)[:, :-1], normalised_BTV[masks][:, :-1]) < NEAR


POSTERIORS = {"duo": ("loss_per_token", "posterior_to_t_minus_0_1"), "gidd": ("elbo_per_token", "reverse_probs_to_t_minus_0_1")}


@pytest.mark.parametrize("name", POSTERIORS)
def test_duo_and_gidd_and_their_losses_and_posteriors(name: str) -> None:
    numbers, lm = golden(name), load(name)
    loss, step = (numbers[key] for key in POSTERIORS[name])
    z_BT, t_B = numbers["input_ids"], numbers["t"].double()
    logp_BTV = lm.noise.log_probs(lm.predict(z_BT, t_B).double(), z_BT, t_B)
    assert apart(lm.noise.nelbo(logp_BTV, numbers["clean_ids"], z_BT, t_B), loss) < NEAR
    posterior_BTV = lm.noise.posterior(logp_BTV, z_BT, t_B, t_B - 0.1)
    assert apart(posterior_BTV[..., : step.shape[-1]], step) < 1e-6
    assert float(posterior_BTV[..., step.shape[-1] :].sum()) == 0


def test_the_mixture_of_gidd() -> None:
    numbers, lm = golden("gidd"), load("gidd")
    assert isinstance(lm.noise, ReplacementNoise)
    kernel = lm.noise.kernel(numbers["t"].double())
    assert apart(kernel.keep_B[:, None], numbers["alpha"]) < 1e-6
    assert apart(kernel.prior_BV, numbers["beta_pi"]) < 1e-6
    hybrid = dlm.HybridNoise(129, 128, share=0.2).kernel(numbers["t"].double())
    assert apart(hybrid.prior_BV, numbers["beta_pi"]) > 1e-3


# wrong readings


def _eps(network: AdaLN) -> None:
    for module in network.modules():
        if isinstance(module, adaln.LayerNorm):
            module.eps = 1e-6


def _rotary(network: AdaLN) -> None:
    network.rotary.config = network.config.with_(rope_base=500_000.0)


def _swap_qk(network: AdaLN) -> None:
    for block in network.blocks:
        block.attention.q, block.attention.k = block.attention.k, block.attention.q


def _order(parts: list[int]) -> Callable[[AdaLN], None]:
    """The chunks of each modulation in another order."""

    def change(network: AdaLN) -> None:
        for block in network.blocks:
            for tensor in block.get_submodule("modulation").parameters():
                chunks = tensor.data.chunk(6)
                tensor.data = torch.cat([chunks[n] for n in parts])

    return change


def _sines_first(network: AdaLN) -> None:
    weight = network.level.inner.weight
    weight.data = torch.cat(weight.data.chunk(2, -1)[::-1], -1)


def _causal(network: AdaLN) -> None:
    network.config = replace(network.config, attention="causal", block_length=0)


WRONG: dict[str, Callable[[AdaLN], None]] = {
    "norm eps": _eps,
    "rotary base": _rotary,
    "keys for queries": _swap_qk,
    "scales before shifts": _order([1, 0, 2, 4, 3, 5]),
    "gates first": _order([2, 0, 1, 5, 3, 4]),
    "the MLP's chunks first": _order([3, 4, 5, 0, 1, 2]),
    "sines before cosines": _sines_first,
    "causal": _causal,
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_reading_is_told_from_the_right_one(name: str, wrong: str) -> None:
    lm = load(name)
    assert isinstance(lm.network, AdaLN)
    WRONG[wrong](lm.network)
    assert apart(logits(name, lm), expected(name)) > NEAR


@pytest.mark.parametrize("name", ["sedd", "duo", "gidd"])
def test_another_time_is_told_from_the_right_one(name: str) -> None:
    """Told t for sigma, sigma for t, or t the other way round."""
    numbers, lm = golden(name), load(name)
    z_BT, t_B = numbers["input_ids"], numbers["t"]
    sigma_B = -torch.log1p(-(1 - 1e-3) * t_B)
    as_sigma = (1 - torch.exp(-t_B)) / (1 - 1e-3)  # the t whose sigma is t
    for other_B in (1 - t_B, sigma_B if name == "gidd" else as_sigma):
        assert apart(lm.logits(z_BT, t=other_B), expected(name)) > 0.01
    if name != "gidd":
        lm.network.config = lm.network.config.with_(level_eps=1e-5)
        assert apart(lm.logits(z_BT, t=t_B), expected(name)) > NEAR


def test_the_exact_gelu_and_a_shift_of_rows_are_told_from_the_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, gelu = load("mdlm"), F.gelu
    right = expected("mdlm")
    assert apart(logits("mdlm", lm)[:, :-1], right[:, 1:]) > 1
    monkeypatch.setattr(F, "gelu", lambda x, approximate: gelu(x))
    assert NEAR < apart(logits("mdlm", lm), right) < 0.1


def test_bd3lm_in_other_blocks_or_at_once_is_told_from_the_right_one() -> None:
    numbers, lm = golden("bd3lm"), load("bd3lm")
    z_BT = numbers["noisy_ids"][:, :12]
    for attention, length in (("full", 0), ("block_causal", 8)):
        assert apart(reading(lm.network, attention, length)(z_BT), expected("bd3lm")) > 0.1


# the rest of the library


@pytest.mark.parametrize("name", EVERY)
def test_saved_in_our_own_form(name: str, tmp_path: Path) -> None:
    lm = load(name)
    lm.save_pretrained(tmp_path / name)
    again = dlm.load(str(tmp_path / name))
    assert again.config == lm.config
    assert again.noise == lm.noise
    assert torch.equal(logits(name, again), logits(name, lm))
    assert again.tokenizer.encode("17 3 99") == [17, 3, 99]


def test_weights_that_torch_saved(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "sedd", tmp_path / "sedd")
    torch.save(load_file(tmp_path / "sedd" / "model.safetensors"), tmp_path / "sedd" / "pytorch_model.bin")
    (tmp_path / "sedd" / "model.safetensors").unlink()
    assert torch.equal(logits("sedd", dlm.load(str(tmp_path / "sedd"))), logits("sedd", load("sedd")))
    torch.save({"model": Path()}, tmp_path / "sedd" / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds more than tensors, which dlm never unpickles"):
        dlm.load(str(tmp_path / "sedd"))


def test_the_end_of_a_document_ends_no_window(tmp_path: Path) -> None:
    """Windows are packed with documents, so that the first token may be the end of one."""
    directory = tmp_path / "gidd"
    shutil.copytree(GOLDEN / "gidd", directory)
    inner = load("gidd").tokenizer.inner
    inner.add_special_tokens(["126"])
    (directory / "tokenizer.json").write_text(inner.to_str())
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "126"}))
    lm = dlm.load(str(directory))
    assert lm.tokenizer.control == {"126": 126}
    assert not lm.stops


@pytest.mark.parametrize("name", EVERY)
def test_half_precision_is_near(name: str) -> None:
    lm = dlm.load(str(GOLDEN / name), dtype=torch.bfloat16)
    assert apart(logits(name, lm), expected(name)) < 0.25


@pytest.mark.parametrize("name", EVERY)
def test_logits_of_asked_positions(name: str) -> None:
    lm = load(name)
    z_BT, t_B = torch.randint(127, (2, 12), generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.9])
    at_BT = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) < 0.4
    whole_BTV, index_BC = lm.network(z_BT, t_B), torch.tensor([[3, 1, 0], [11, 5, 6]])
    assert apart(lm.network(z_BT, t_B, at_BQ=at_BT)[at_BT], whole_BTV[at_BT]) < NEAR
    assert apart(lm.network(z_BT, t_B, index_BC=index_BC), whole_BTV[torch.arange(2)[:, None], index_BC]) < NEAR


@pytest.mark.parametrize("name", FULL)
def test_a_window_against_its_cache(name: str) -> None:
    """Read whole, then some positions anew: as without a cache, until a token changes."""
    lm = load(name)
    z_BT, t_B = torch.randint(127, (2, lm.window), generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
    whole_BTV, cache = lm.network(z_BT, t_B), lm.network.window_cache(2)
    all_BT, some_BQ = torch.arange(lm.window).expand(2, -1), torch.tensor([[1, 4, 9], [2, 3, 15]])
    assert apart(lm.network(z_BT, t_B, pos_BQ=all_BT, cache=cache), whole_BTV) < NEAR
    anew_BQV = lm.network(z_BT.gather(1, some_BQ), t_B, pos_BQ=some_BQ, cache=cache)
    assert apart(anew_BQV, whole_BTV[torch.arange(2)[:, None], some_BQ]) < NEAR
    other_BQV = lm.network((z_BT.gather(1, some_BQ) + 1) % 127, t_B, pos_BQ=some_BQ, cache=cache)
    assert apart(other_BQV, anew_BQV) > 0.1


def test_approximate_caches_and_the_samplers_of_masks(dlm: Dlm) -> None:
    for options in (
        ("--cache", "dual"),
        ("--cache", "drift:0.2"),
        ("--sampler", "speculative"),
        ("--sampler", "revoke"),
        ("--guidance", "1.5"),
    ):
        for name in ("mdlm", "sedd"):
            words = ("17 3 99", str(GOLDEN / name), "--max-new-tokens", "9", "--steps", "4", *options, "--json")
            code, out, _ = dlm("generate", *words)
            assert code == 0
            assert len(json.loads(out.splitlines()[-1])["text"].split()) == 12


@pytest.mark.parametrize("name", EVERY)
def test_on_an_accelerator_it_writes_the_same_and_the_network_never_waits(name: str, request: pytest.FixtureRequest) -> None:
    here = load(name).generate("17 3 99", max_new_tokens=9, steps=4).text
    gpu: Accelerator = request.getfixturevalue("gpu")
    lm = load(name)
    lm.network.to("cuda")
    gpu.syncs.clear()
    assert lm.generate("17 3 99", max_new_tokens=9, steps=4).text == here
    assert gpu.syncs
    assert not [sync for sync in gpu.syncs if "models/adaln" in sync.where]


def test_blocks_against_a_cache_are_those_without() -> None:
    lm = load("bd3lm")
    cached, plain = (lm.generate("17 3", max_new_tokens=30, seed=1, cache=cache) for cache in (True, False))
    assert cached.text == plain.text
    assert cached.trajectory.forwards == plain.trajectory.forwards


@pytest.mark.parametrize("name", EVERY)
def test_texts_of_ids(dlm: Dlm, name: str) -> None:
    code, out, _ = dlm("generate", "17 3 99", str(GOLDEN / name), "--max-new-tokens", "9", "--steps", "4", "--json")
    text = json.loads(out.splitlines()[-1])["text"]
    ids = [int(word) for word in text.split()]
    assert code == 0
    assert ids[:3] == [17, 3, 99]
    assert len(ids) == 12
    assert max(ids) < 128
    assert dlm.told("generate", "17 x", str(GOLDEN / name)).endswith("token ids such as 17 3 99, and 'x' is none of them")


@pytest.mark.parametrize(("name", "kinds"), [("mdlm", ["continuous", "any-order"]), ("sedd", ["continuous", "score-entropy"])])
def test_bounds_of_a_text(dlm: Dlm, tmp_path: Path, name: str, kinds: list[str]) -> None:
    bounds = [bound(dlm, tmp_path, name, "--estimator", kind)["nats_per_token"] for kind in kinds]
    assert bounds[0] != bounds[1]
    if name == "sedd":  # the same times and noise, one integrand never above the other
        assert bounds[0] < bounds[1]


@pytest.mark.parametrize(("name", "kind"), [("bd3lm", "block-wise"), ("duo", "continuous"), ("gidd", "counted")])
def test_the_bound_that_suits_each(dlm: Dlm, tmp_path: Path, name: str, kind: str) -> None:
    found = bound(dlm, tmp_path, name)
    assert found["estimator"] == kind
    assert found["is_bound"]
    assert 3 < found["nats_per_token"] < 15


def bound(dlm: Dlm, tmp_path: Path, name: str, *options: str) -> dict[str, Any]:
    ids = torch.randint(127, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "ids.txt").write_text(" ".join(map(str, ids)))
    words = ("--data", str(tmp_path / "ids.txt"), "--split", "all", "--passes", "16", "--card", str(tmp_path / "card.json"), "--json")
    code, out, _ = dlm("eval", str(GOLDEN / name), *words, *options)
    assert code == 0
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


@pytest.mark.parametrize(("name", "count"), [("mdlm", 2), ("bd3lm", 1), ("sedd", 2), ("duo", 2), ("gidd", 2)])
def test_verified_from_the_command_line(dlm: Dlm, name: str, count: int) -> None:
    code, out, _ = dlm("verify", str(GOLDEN / name), "--cases", str(GOLDEN / name / "golden.safetensors"))
    assert code == 0
    assert json.loads(out.splitlines()[-1]) == {"cases": count, "equal": count, "differ": []}


def test_other_numbers_and_other_files_are_told(dlm: Dlm, tmp_path: Path) -> None:
    numbers, path = golden("duo"), tmp_path / "numbers.safetensors"
    save_file(numbers | {"logits": numbers["logits"] + 1e-3}, path)
    code, out, _ = dlm("verify", str(GOLDEN / "duo"), "--cases", str(path))
    assert code == 1
    assert "differs by up to 0.001  logits" in out
    assert json.loads(out.splitlines()[-1]) == {"cases": 2, "equal": 1, "differ": ["logits"]}
    for spoilt, message in (
        ({"t": numbers["t"]}, "holds no numbers to compare"),
        ({"logits": numbers["logits"]}, "logits needs 'input_ids' beside it"),
        (
            {"logits": numbers["logits"][:, :3].contiguous(), "input_ids": numbers["input_ids"], "t": numbers["t"]},
            "logits does not fit duo",
        ),
        ({"logits": numbers["logits"], "input_ids": numbers["input_ids"]}, "reads the noise level: give t"),
    ):
        save_file(spoilt, path)
        assert message in dlm.told("verify", str(GOLDEN / "duo"), "--cases", str(path))
    path.write_text("{}")
    assert "is no safetensors file" in dlm.told("verify", str(GOLDEN / "duo"), "--cases", str(path))
    cases = json.loads((GOLDEN / "llada" / "generations.json").read_text())
    for case, message in (({}, "compare the logits and losses of the reference"), ({"sampler": "dream"}, "has no masks for dream to fill")):
        (tmp_path / "cases.json").write_text(json.dumps({"cases": [cases["cases"][0] | case]}))
        assert message in dlm.told("verify", str(GOLDEN / "duo"), "--cases", str(tmp_path / "cases.json"))


def edited(tmp_path: Path, name: str, **changes: Any) -> LanguageModel:
    """A golden checkpoint with keys of its config changed; None takes a key away."""
    shutil.copytree(GOLDEN / name, tmp_path / name)
    data = json.loads((tmp_path / name / "config.json").read_text()) | changes
    (tmp_path / name / "config.json").write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    return dlm.load(str(tmp_path / name))


SEDD: dict[str, Any] = json.loads((GOLDEN / "sedd" / "config.json").read_text())
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "uniform scores": ("sedd", {"graph": {"type": "uniform"}}, "type = 'uniform' is not supported (only 'absorb')"),
    "geometric": ("sedd", {"noise": {"type": "geometric"}}, "type = 'geometric' is not supported"),
    "unscaled": ("sedd", {"model": SEDD["model"] | {"scale_by_sigma": False}}, "scale_by_sigma = False is not supported"),
    "causal": ("duo", {"causal": True}, "causal = True is not supported"),
    "no adaLN": ("bd3lm", {"adaln": False}, "adaln = False is not supported"),
    "a key missing": ("mdlm", {"hidden_dim": None}, "lacks 'hidden_dim'"),
    "another size": ("gidd", {"hidden_size": 64}, "do not fit its config.json"),
    "fewer layers": ("mdlm", {"n_blocks": 3}, "it says that there are 3 layers, they have 2"),
    "another vocabulary": ("duo", {"vocab_size": 64}, "do not fit its config.json"),
    "blocks that do not divide": ("bd3lm", {"block_size": 5}, "block_length 5 must divide"),
    "a share of 1": ("gidd", {"p_uniform": 1.0}, "must lie in 0 .. 1"),
    "quantized": ("mdlm", {"quantization_config": {"quant_method": "gptq"}}, "quantized by gptq"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_get_one_line(case: str, tmp_path: Path) -> None:
    name, changes, message = BAD[case]
    with pytest.raises(InputError) as error:
        edited(tmp_path, name, **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_network_that_reads_the_level_wants_it() -> None:
    with pytest.raises(InputError, match="reads the noise level: give t"):
        load("gidd").logits(golden("gidd")["input_ids"])


def test_a_real_vocabulary_wants_the_tokenizer_of_gpt2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="has no tokenizer: put the tokenizer.json of openai-community/gpt2".replace(".", r"\.")):
        edited(tmp_path, "mdlm", vocab_size=50258)
