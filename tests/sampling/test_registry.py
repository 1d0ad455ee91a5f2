"""The registry of samplers: what it says of each is true, and a user's own is one more."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from chains import TINY, ancestral_law, any_order_law, distance, masked_noise, noise_of
from conftest import make_model
from dlm.calibration import measure
from dlm.errors import InputError
from dlm.language_model.options import TextKeywords
from dlm.noise import process
from dlm.noise.uniform import UniformNoise
from dlm.protocols import RNG
from dlm.sampling import registry
from dlm.sampling.autoregressive import draft as drafts
from dlm.sampling.autoregressive.draft import Draft, DraftFacts
from dlm.sampling.autoregressive.drafters import PromptLookup
from dlm.sampling.diffusion.protocols import Step
from dlm.sampling.draw import Draw
from dlm.sampling.registry import Parameter, SamplerInfo
from oracle import BayesDenoiser, Tiny

ALL = registry.known()
RULES = [one for one in ALL if one.rule]


def identity(info: SamplerInfo) -> str:
    return f"{info.name}-{info.noise}"


def made(info: SamplerInfo, word: str) -> Any:
    assert info.noise is not None
    name = {"masked": "masked", "classes": "classes"}.get(str(info.noise), "uniform")
    return registry.make(word, Draw(), noise_of(name))


@pytest.mark.parametrize("info", ALL, ids=identity)
def test_a_line_is_one_plain_sentence(info: SamplerInfo) -> None:
    assert re.fullmatch(r"[A-Z][a-z, :;'-]{20,99}\.", info.about), info.about


def test_no_line_is_said_of_two() -> None:
    assert len({one.about for one in ALL}) == len(ALL)


@pytest.mark.parametrize("info", ALL, ids=identity)
def test_every_factory_is_there(info: SamplerInfo) -> None:
    assert callable(info.resolved())


@pytest.mark.parametrize("info", RULES, ids=identity)
def test_the_defaults_are_those_of_the_rule(info: SamplerInfo) -> None:
    if info.name.startswith("remdm"):
        from dlm.sampling.diffusion.remasking import Remask

        assert made(info, info.name) == Remask(info.name.removeprefix("remdm-"))
        return
    draw_only = registry.get(info.name, info.noise).resolved()(draw=Draw()) if info.parameters else made(info, info.name)
    assert made(info, info.name) == draw_only


def outside(one: Parameter) -> Iterator[float]:
    yield one.low if one.open_low else one.low - 0.01
    yield one.high + (0.01 if one.high < float("inf") else 0)
    yield float("nan")


@pytest.mark.parametrize("info", [one for one in RULES if one.reference and one.parameters and one.parameters[0].kind is str], ids=identity)
def test_words_of_a_reference(info: SamplerInfo) -> None:
    words = ("origin", "maskgit_plus", "topk_margin", "entropy") if info.name == "dream" else ("low_confidence", "random")
    assert len({repr(made(info, f"{info.name}:{word}")) for word in words}) == len(words)
    with pytest.raises(InputError, match="got 'best'"):
        made(info, f"{info.name}:best")
    if info.name == "dream":
        assert made(info, "dream:entropy,0.5").score_temperature == 0.5
        with pytest.raises(InputError):
            made(info, "dream:entropy,-0.5")


@pytest.mark.parametrize("info", [one for one in RULES if one.parameters and one.parameters[0].kind is not str], ids=identity)
def test_a_range_is_the_one_that_is_checked(info: SamplerInfo) -> None:
    one, *_ = info.parameters
    inside = [one.low + 0.01 if one.open_low else one.low, min(one.high, 1.0)]
    for value in inside:
        made(info, f"{info.name}:{one.kind(value)}")
    for value in outside(one):
        with pytest.raises(InputError):
            made(info, f"{info.name}:{value}")


# --- exact or not ------------------------------------------------------------------------------------------------


def test_one_step_a_token_is_still_a_grid() -> None:
    """Tokens that share a step are drawn independently, however many steps there are; one token shares with none."""
    assert distance(any_order_law(TINY, BayesDenoiser(TINY)), TINY) < 1e-12
    assert distance(ancestral_law(TINY, TINY.length), TINY) > 0.01
    assert not registry.is_exact("ancestral", "masked", steps=TINY.length, tokens=TINY.length)
    alone = Tiny(3, 1, seed=0)
    assert distance(ancestral_law(alone, 1), alone) < 1e-12
    assert registry.is_exact("ancestral", "masked", steps=1, tokens=1)


EXACT: list[tuple[str, registry.Noise | None, dict[str, Any], bool]] = [
    ("first-hitting", "masked", {"steps": 4}, True),
    ("first-hitting", "masked", {"cache": "dual"}, False),
    ("first-hitting", "masked", {"cache": False}, True),
    ("speculative:8", "masked", {}, True),
    ("speculative:8,0", "masked", {}, True),
    ("speculative:8:0.1", "masked", {}, False),
    ("speculative:8,0.1", "masked", {}, False),
    ("ancestral", "masked", {}, False),
    ("ancestral", "masked", {"steps": 256}, False),
    ("confidence:0.9", "masked", {}, False),
    ("ancestral", "replacement", {"steps": 256}, False),
    ("autoregressive", None, {}, True),
    ("strided:4x16", None, {}, True),
    ("draft:int4,auto", None, {}, True),
]


@pytest.mark.parametrize(("word", "noise", "use", "exact"), EXACT)
def test_exact_or_not(word: str, noise: registry.Noise | None, use: dict[str, Any], exact: bool) -> None:
    assert registry.is_exact(word, noise, **use) is exact


def test_the_lossless_sampler() -> None:
    names = {
        (noise, both): getattr(registry.lossless(noise, bidirectional=both), "name", None)
        for noise in ("masked", "replacement")
        for both in (True, False)
    }
    assert names == {
        ("masked", True): "speculative",
        ("masked", False): "first-hitting",
        ("replacement", True): None,
        ("replacement", False): None,
    }


# --- generated texts and lists -----------------------------------------------------------------------------------


def test_help_and_table_name_every_sampler() -> None:
    text, table = registry.help_text(), registry.markdown_table()
    for one in ALL:
        assert one.usage in text
        assert f"| `{one.usage}` |" in table
    assert "heads[:4" in text
    assert len(table.splitlines()) == len(ALL) + 2


def test_help_needs_no_torch() -> None:
    code = "import sys; from dlm.sampling import registry; registry.help_text(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_calibration_measures_what_it_did() -> None:
    """The settings of a window of 64 as they were listed by hand, in any order but for the exact one first."""
    found = measure.candidates(window=64, causal=False)
    assert found[0] == {"sampler": "first-hitting"}
    told = {f"{one['sampler']}/{one.get('steps', '')}/{one.get('cache', '')}/{one.get('block_length', '')}" for one in found}
    assert len(told) == len(found)
    words = [f"ancestral/{n}//" for n in (4, 8, 16, 32, 64)]
    words += [f"{name}/{n}//" for name in ("topk", "margin", "entropy") for n in (4, 8, 16)]
    words += [f"{name}/64//" for name in ("margin", "entropy")]
    adaptive = ("confidence:0.5", "confidence:0.9", "factor:1", "factor:4", "klass:0.6", "entropy-bound:8", "entropy-bound:32")
    words += [f"{name}/32//" for name in adaptive] + ["confidence:0.9/64//", "first-hitting///"]
    later = ("predictor-corrector:1", "remdm-cap:0.04", "remdm-rescale:0.1", "remdm-conf:0.5", "remdm-loop:0.04", "revoke:0.6", "planner:1")
    words += [f"{name}/{n}//" for name in later for n in (8, 16)]
    words += [f"speculative:{setting}///" for setting in ("2", "4", "8", "16", "8:0.5")]
    words += [f"ancestral/{n}/{cache}/16" for cache in ("prefix", "dual", "delayed:8", "drift:0.2") for n in (16, 32)]
    assert told == set(words)
    ordered = [one for one in measure.candidates(window=64, causal=False, blocks=[1, 4]) if one not in found]
    assert ordered == [{"sampler": "first-hitting", "block_length": n} for n in (1, 4)]
    assert all(measure.is_exact(one) for one in ordered)
    causal = {one["sampler"].partition(":")[0] for one in measure.candidates(window=64, causal=True)}
    assert not causal & {"revoke", "planner"}
    quick = measure.candidates(window=64, causal=False, quick=True)
    assert quick == [{"sampler": "first-hitting"}, {"sampler": "topk", "steps": 4}, {"sampler": "topk", "steps": 8}]


@pytest.mark.parametrize(
    ("word", "noise", "said"),
    [
        ("topq", "masked", "'topq' is unknown; did you mean topk"),
        ("refin", "replacement", "did you mean refine"),
        ("strode:4", None, "did you mean strided"),
        ("speculative:4,x", "masked", "'x' is no number; write speculative:TOKENS:TOLERANCE"),
    ],
)
def test_bad_words_name_the_nearest(word: str, noise: registry.Noise | None, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        registry.get(word, noise).parse(word)


# --- a user's own ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leftmost:
    """So many masks from the left in each step."""

    revises: ClassVar[bool] = False
    count: int = 1
    draw: Draw = field(default_factory=Draw)

    def __call__(self, step: Step, rng: RNG) -> Tensor:
        first_BT = step.open_BT & (step.open_BT.cumsum(-1) <= self.count)
        first_BT = torch.where((step.left_B == 1)[:, None], step.open_BT, first_BT)
        return torch.where(first_BT, self.draw(step.logp_BTV, rng), step.z_BT)


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for place, name in ((registry, "_REGISTERED"), (drafts, "REGISTERED"), (process, "PROCESSES"), (process, "SETTING")):
        monkeypatch.setattr(place, name, dict(getattr(place, name)))


def left_to_right(name: str = "leftmost") -> SamplerInfo:
    return SamplerInfo(name, "masked", Leftmost, "The leftmost masks first.", (Parameter("count", 1, low=1, kind=int),))


@pytest.mark.usefixtures("clean")
def test_a_sampler_of_your_own() -> None:
    registry.register_sampler(left_to_right())
    assert registry.make("leftmost:2", Draw(), masked_noise(TINY)) == Leftmost(2)
    assert "leftmost[:1]" in registry.help_text()
    assert {"sampler": "leftmost", "steps": 16} in measure.candidates(window=64, causal=False)
    model = make_model()
    frames = list(model.stream("Ab", length=12, steps=20, sampler="leftmost"))
    assert frames[0].settled_BT[0].tolist() == [True] * 3 + [False] * 9


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(("name", "said"), [("topk", "there already"), ("a:b", "no colon"), ("", "no colon")])
def test_a_name_that_cannot_be_taken(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        registry.register_sampler(left_to_right(name))


@pytest.mark.usefixtures("clean")
def test_a_drafter_of_your_own() -> None:
    def pairs(facts: DraftFacts) -> PromptLookup:
        assert facts.tokens == 4
        return PromptLookup(ngram=2)

    registry.register_drafter("pairs", pairs, "What followed the last two tokens.")
    assert Draft.from_word("pairs:5") == Draft.parse("pairs", tokens=4)
    model = make_model("autoregressive")
    said: tuple[TextKeywords, ...] = ({}, {"draft": Draft("pairs", tokens=4)}, {"sampler": "pairs:5"})
    common: TextKeywords = {"length": 40, "temperature": 0.0}
    plain, named, short = (model.generate("abab", seed=1, **(common | one)) for one in said)
    assert named.text == short.text == plain.text
    assert named.sampler == "pairs:5"
    assert named.proposed == short.proposed
    assert named.proposed
    with pytest.raises(InputError, match="there already"):
        registry.register_drafter("pairs", pairs, "Again.")


@pytest.mark.usefixtures("clean")
def test_a_noise_process_of_your_own() -> None:
    process.register_noise("mine", UniformNoise)
    with pytest.raises(InputError, match="there already"):
        process.register_noise("mine", UniformNoise)
    assert process.make({"process": "mine"}, 5, 4) == UniformNoise(5, 4)
    mine, same = (make_model(noise={"process": name, "schedule": "linear"}) for name in ("mine", "uniform"))
    assert mine.generate("Ab", length=20, steps=8).text == same.generate("Ab", length=20, steps=8).text
    with pytest.raises(ValueError, match="did you mean mine"):
        process.parse("mime")


PLUGIN = '''
from dlm.sampling.autoregressive.drafters import PromptLookup
from dlm.sampling.diffusion.unmasking import TopScore
from dlm.sampling.registry import SamplerInfo
from dlm.noise.uniform import UniformNoise

mine = SamplerInfo("mine", "masked", TopScore, "The best tokens first, as another package has it.")
noise = UniformNoise

def pairs(facts):
    """N-grams of two tokens draft, as another package has it."""
    return PromptLookup(ngram=2)
'''
POINTS = """[dlm.samplers]
mine = dlm_plugin_of_a_test:mine
broken = dlm_plugin_of_a_test:nothing
[dlm.noise]
theirs = dlm_plugin_of_a_test:noise
[dlm.drafters]
pairs = dlm_plugin_of_a_test:pairs
"""


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which another package with entry points is installed."""
    info = tmp_path / "site" / "dlm_plugin_of_a_test-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dlm-plugin-of-a-test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    (tmp_path / "site" / "dlm_plugin_of_a_test.py").write_text(PLUGIN)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *sys.path])}


def ask(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dlm", *words], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_the_sampler_of_another_package(installed: dict[str, str], masked_dir: Path) -> None:
    words = ("generate", "Ab", "--model", str(masked_dir), "--length", "20", "--steps", "4")
    theirs, ours = ask(installed, *words, "--sampler", "mine"), ask(installed, *words, "--sampler", "topk")
    assert (theirs.returncode, theirs.stdout) == (0, ours.stdout), theirs.stderr
    assert len(theirs.stdout) == 21
    broken = ask(installed, *words, "--sampler", "broken")
    assert broken.returncode == 2
    assert "dlm-plugin-of-a-test brings 'broken'" in broken.stderr


@pytest.mark.slow
def test_the_drafter_of_another_package(installed: dict[str, str], autoregressive_dir: Path) -> None:
    words = ("generate", "abab", "--model", str(autoregressive_dir), "--length", "40")
    theirs, plain = ask(installed, *words, "--sampler", "pairs:4"), ask(installed, *words)
    assert (theirs.returncode, theirs.stdout) == (0, plain.stdout), theirs.stderr
    assert "pairs:4" in theirs.stderr


@pytest.mark.slow
def test_the_noise_of_another_package(installed: dict[str, str]) -> None:
    code = "from dlm.noise import process; print(process.make(process.parse('theirs'), 5, 4))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=installed, check=True)
    assert done.stdout.startswith("UniformNoise(vocab_size=5")
