"""Options and facts give a plan; making it and building from it change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dlm
from conftest import make_model
from dlm.adapters import lora
from dlm.adapters.medusa import Heads, HeadsConfig
from dlm.calibration.table import Calibration, Row
from dlm.errors import InputError
from dlm.language_model import LanguageModel
from dlm.language_model.options import DecodingOptions, Draft
from dlm.language_model.resolution import DecodingPlan, Facts, resolve
from dlm.model_scheduling.plan import ModelSchedule
from dlm.model_scheduling.saved import SavedSchedule
from dlm.sampling import registry

MASK = Facts("mask", "masked", window=32, context=8, default_steps=32)
BLOCK = Facts("block", "masked", window=32, context=12, bidirectional=False, block_length=8, default_steps=32)
UNIFORM = Facts("uniform", "replacement", window=32, context=8, default_steps=32)
PLAIN = Facts("ar", None, window=32, context=8, default_sampler="autoregressive")


def plan(facts: Facts, **options: Any) -> DecodingPlan:
    return resolve(DecodingOptions(**options), facts)


def test_nothing_is_left_to_choose() -> None:
    found = plan(MASK)
    assert (found.word, found.steps, found.context, found.block_length) == ("ancestral", 32, 8, 0)
    assert (found.draw.temperature, found.draw.top_k, found.draw.top_p) == (1.0, 0, 1.0)
    assert plan(MASK, cache="dual").block_length == 32
    assert plan(BLOCK).block_length == 8
    assert plan(BLOCK).context == 8  # whole blocks
    assert plan(MASK, sampler="revoke").until_settled == 1


def test_equal_plans_are_one_lane() -> None:
    """Said or left to the default, it is the same plan, and it can be a key."""
    assert {plan(MASK), plan(MASK, steps=32, temperature=1.0, top_p=1.0, sampler="ancestral")} == {plan(MASK)}
    assert plan(MASK, steps=16) != plan(MASK)
    assert plan(MASK, schedule="L0.5 H0.5", light={"L": "small"}) == plan(MASK, schedule="L0.5 H0.5", light={"L": "small"})


FASTEST: list[tuple[dict[str, Any], str, Draft]] = [
    ({}, "lookup:auto", Draft("ngram", tokens=7)),
    ({"draft_dtype": "int4"}, "draft:int4:auto", Draft("self", "int4", 23)),
    ({"draft_dtype": "int4", "heads": 3}, "heads:auto", Draft("heads", tokens=3)),
    ({"draft_dtype": "int4", "heads": 3, "adapter_tokens": 5}, "strided:auto", Draft("adapter", tokens=5)),
]


@pytest.mark.parametrize(("facts", "word", "draft"), FASTEST)
def test_lossless_takes_what_the_model_has(facts: dict[str, Any], word: str, draft: Draft) -> None:
    found = plan(Facts("ar", None, 32, 8, default_sampler="autoregressive", **facts), sampler="lossless")
    assert (found.word, found.draft, found.adaptive, found.exact) == (word, draft, True, True)


NUMBERS: list[tuple[Draft, Draft, bool]] = [
    (Draft("ngram", tokens=4), Draft("ngram", tokens=4), False),
    (Draft("self"), Draft("self", "int8", 23), True),
    (Draft("model", "small"), Draft("model", "small", 3), True),
    (Draft("adapter", tree=16), Draft("adapter", tokens=3, tree=16), False),
    (Draft("adapter", tree=2), Draft("adapter", tokens=2, tree=2), False),
]


@pytest.mark.parametrize(("asked", "made", "adaptive"), NUMBERS)
def test_a_draft_gets_its_numbers(asked: Draft, made: Draft, adaptive: bool) -> None:
    found = plan(PLAIN, draft=asked)
    assert (found.draft, found.adaptive) == (made, adaptive)


def test_auto_takes_the_row_that_pays() -> None:
    exact = Row({"sampler": "first-hitting"}, 32, 8.0, 4.0, 0.0, 4.0, 1.0, exact=True)
    quick = Row({"sampler": "topk", "steps": 8}, 8, 1.0, 4.05, 0.0, 4.0, 1.0)
    facts = Facts("mask", "masked", 32, 8, calibration=Calibration([exact, quick]))
    found = plan(facts, sampler="auto")
    assert (found.word, found.steps, found.exact) == ("topk", 8, False)
    assert found.record() == {"steps": 8}
    assert plan(facts, sampler="auto", budget="bits:0.01").word == "first-hitting"


def test_a_saved_schedule_gives_steps_and_models() -> None:
    saved = SavedSchedule(ModelSchedule.parse("L0.5 H0.5"), {"L": "small"}, 12)
    found = plan(Facts("mask", "masked", 32, 8, saved_schedule=saved), schedule="auto")
    assert (found.schedule, found.light, found.steps) == ("L0.5 H0.5", (("L", "small"),), 12)


BAD: list[tuple[Facts, dict[str, Any], str]] = [
    (MASK, {"budget": "bits:1"}, "a budget is for"),
    (MASK, {"sampler": "auto"}, "not on disk"),
    (MASK, {"schedule": "auto"}, "beside a checkpoint on disk"),
    (MASK, {"schedule": "L0.5 H0.5"}, "needs --schedule and --light"),
    (PLAIN, {"schedule": "L0.5 H0.5", "light": "x"}, "bidirectional diffusion models"),
    (MASK, {"sampler": "lossless"}, "for autoregressive"),
    (UNIFORM, {"guidance": 2.0}, "guidance needs a bidirectional masked model"),
    (BLOCK, {"cache": "dual"}, "exact cache already"),
    (PLAIN, {"draft": "heads"}, "no heads"),
    (PLAIN, {"draft": "ngram", "cache": False}, "against a cache"),
    (PLAIN, {"draft": "ngram", "sampler": "lossless"}, "leave sampler 'lossless' away"),
    (PLAIN, {"greedy_tail": 1}, "needs a diffusion model"),
    (Facts("x", "masked", 32, 8), {"sampler": "speculative", "cache": "dual"}, "an approximate cache changes"),
    (Facts("x", "masked", 32, 8), {"sampler": "speculative", "until_settled": 1}, "writes each token once"),
    (Facts("x", "masked", 32, 8, fills_window=False), {"schedule": "L0.5 H0.5", "light": "y"}, "is for those that dlm trains"),
]


@pytest.mark.parametrize(("facts", "options", "said"), BAD)
def test_what_does_not_go_together(facts: Facts, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        plan(facts, **options)


# --- nothing is changed ------------------------------------------------------------------------------------------


def state_of(lm: LanguageModel) -> list[tuple[str, int, type[torch.nn.Module]]]:
    """Every module of the network and every tensor, by identity."""
    network = lm.network
    modules = [(name, id(module), type(module)) for name, module in network.named_modules()]
    tensors = [(name, tensor.data_ptr(), torch.nn.Module) for name, tensor in network.state_dict().items()]
    return modules + tensors


def drafting() -> LanguageModel:
    lm = make_model("autoregressive", alphabet="abcdefgh")
    lora.attach(lm.network, lora.AdapterConfig(rank=2, stride=3, base="x", fingerprint="x"), lm.tokenizer.mask_id)
    lm.heads = Heads(lm.network, HeadsConfig(count=2))
    return lm


SAMPLERS = [*(one.name for one in registry.usable(None)), "draft:int4", "strided:auto", "heads:auto", "lossless"]


@pytest.mark.parametrize("word", SAMPLERS)
def test_building_a_sampler_changes_no_network(word: str) -> None:
    """No adapter is attached, no product fused."""
    lm = drafting()
    before = state_of(lm)
    lm.sampler(sampler=word)
    assert state_of(lm) == before


def test_a_loaded_network_is_not_prepared_again(autoregressive_dir: Path) -> None:
    lm = dlm.load(str(autoregressive_dir))
    before = state_of(lm)
    lm.generate("abc", max_new_tokens=9, sampler="lossless")
    lm.prepare_lossless()  # a CPU has no use for it
    assert state_of(lm) == before


def test_the_bundled_adapter_is_attached_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GPU would take it: the choice is a lookup, until `prepare_lossless` has attached one."""
    from dlm.adapters import attach

    lm, calls = make_model("autoregressive"), list[Any]()
    monkeypatch.setattr(attach, "bundled_for", lambda network: calls.append(network))
    monkeypatch.setattr(type(lm.network), "device", property(lambda self: torch.device("cuda")))
    assert lm.resolve(DecodingOptions(sampler="lossless")).word == "lookup:auto"
    assert calls == []
    lm.prepare_lossless()
    assert calls == [lm.network]
