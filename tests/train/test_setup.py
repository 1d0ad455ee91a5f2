"""Training under noise that replaces tokens: it runs, resumes, writes what loads again, and tells what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dlm
from dlm.errors import InputError
from dlm.noise import clusters, process
from dlm.text.tokenizer import Tokenizer
from dlm.train import setup
from dlm.train.data import read
from train import tiny

GROUPS = "vowels.json"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def groups(text: Path, tmp_path: Path) -> Path:
    """Vowels, and all else that the text holds."""
    rest = sorted(set("".join(read(str(text)))) - set("aeiou"))
    path = tmp_path / GROUPS
    path.write_text(json.dumps([list("aeiou"), rest]))
    return path


@pytest.fixture(scope="module")
def masked(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("masked") / "run"
    tiny.run(text, out, "steps=3")
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("noise=uniform",),
        ("noise=hybrid:0.3", "noise_schedule=cosine"),
        ("noise=semantic", "clusters=classes"),
        ("noise=semantic:3", f"clusters={GROUPS}"),
        ("noise=uniform", "head=posterior", "time_conditioning=true", "estimator=continuous"),
    ],
    ids=" ".join,
)
def test_a_run_resumes_to_the_bit_and_its_noise_loads_again(
    text: Path, groups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    figures = tiny.run(text, tmp_path / "whole", *settings)
    assert figures["step"] == 12
    assert figures["val_stderr"] > 0
    tiny.run(text, tmp_path / "parts", *settings, stop_after=4)
    groups.write_text("[]")  # what the run began with is in its config.json
    tiny.run(text, tmp_path / "parts", *settings, resume=True)
    tiny.assert_same(tmp_path / "whole", tmp_path / "parts")

    model = dlm.load(str(tmp_path / "parts"))
    pieces = [model.tokenizer.piece(token) for token in range(model.tokenizer.vocab_size)]
    expected: dict[str, object] = {"schedule": "cosine" if "noise_schedule=cosine" in settings else "linear", "head": "leave-one-out"}
    expected |= process.parse(settings[0].removeprefix("noise="))
    if "head=posterior" in settings:
        expected["head"] = "posterior"
    if "semantic" in settings[0]:
        kinds = clusters.classes(pieces) if "clusters=classes" in settings else clusters.renumber([p in "aeiou" for p in pieces])
        assert 2 <= len(set(kinds)) < len(kinds)
        expected["clusters"] = [*kinds, max(kinds) + 1]
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["noise"] == expected
    assert model.noise == process.make(expected, len(pieces) + 1, len(pieces))
    assert len(model.generate("the ", length=50, steps=4, seed=0).text) == 50
    other = "noise=hybrid" if settings[0] != "noise=hybrid" else "noise=uniform"
    with pytest.raises(InputError, match="resume with --set noise="):
        tiny.run(text, tmp_path / "parts", other, "steps=20", resume=True)


@pytest.mark.slow
def test_it_learns_under_every_noise(tmp_path: Path) -> None:
    """Of a window of abab... only the first letter is news: the bound falls well below that of a guess."""
    (tmp_path / "text.txt").write_text("ab" * 1500)
    settings = ("window=16", "context=0", "batch=16", "steps=120", "warmup=10", "layers=1", "ema=0.8", "eval_windows=32", "eval_passes=64")
    often = ("eval_every=120", "save_every=120", "log_every=120")
    for name in ("uniform", "hybrid"):
        figures = tiny.run(tmp_path / "text.txt", tmp_path / name, f"noise={name}", *settings, *often)
        assert figures["val_nats"] + 3 * figures["val_stderr"] < 0.5, name  # log 2 = 0.69 without a clue
        assert figures["val_nats"] + 4 * figures["val_stderr"] > 0.04, name


def test_the_estimator_is_the_best_that_applies(text: Path) -> None:
    expected = {
        "noise_schedule=cosine": "any_order",
        "time_conditioning=true": "continuous",
        "noise_schedule=log-linear": "continuous",
        "estimator=continuous": "continuous",
        "noise=uniform": "counted",
        "noise=hybrid:0.3 time_conditioning=true": "counted",
        "noise=hybrid noise_schedule=geometric": "continuous",
        "noise=uniform estimator=continuous": "continuous",
    }
    assert {words: tiny.config(text, *words.split()).estimate for words in expected} == expected


def test_masks_are_weighted_alike_wherever_their_share_runs_from_1_to_0(text: Path) -> None:
    expected = {
        "steps=40": 40,
        "steps=40 time_conditioning=true": 40,
        "steps=40 time_conditioning=true noise_schedule=log-linear": 0,
        "steps=40 time_conditioning=true estimator=continuous": 0,
        "steps=40 time_conditioning=true weights=anneal decay_share=0.25": 30,
        "steps=40 noise=uniform": 0,
    }
    assert {words: tiny.config(text, *words.split()).equal_steps for words in expected} == expected
    with pytest.raises(InputError, match="--set estimator=auto or weights=bound"):
        tiny.config(text, "time_conditioning=true", "noise_schedule=log-linear", "weights=equal")


def test_clusters_of_an_embedding(text: Path, masked: Path, tmp_path: Path) -> None:
    tiny.run(text, tmp_path / "run", "noise=semantic", f"clusters={masked}:4", "steps=2")
    found = json.loads((tmp_path / "run" / "config.json").read_text())["noise"]["clusters"]
    head = load_file(masked / "model.safetensors")["head.weight"]
    assert found == [*clusters.k_means(head[:-1], 4), 4]
    assert set(found) == set(range(5))


def test_a_run_begins_with_the_weights_it_is_told_to(text: Path, masked: Path, tmp_path: Path) -> None:
    settings = ("noise=uniform", "steps=1", "lr=1e-9", "ema=0")
    tiny.run(text, tmp_path / "warm", f"init={masked}", *settings)
    tiny.run(text, tmp_path / "fresh", *settings)
    given, warm, fresh = (load_file(path / "model.safetensors") for path in (masked, tmp_path / "warm", tmp_path / "fresh"))
    assert all(torch.allclose(given[name], warm[name], atol=1e-6) for name in given)
    assert not all(torch.allclose(given[name], fresh[name], atol=1e-3) for name in given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("noise=hybrid:0.2", "clusters=groups.json"), "hybrid:0.2 noise has no clusters"),
        (("noise=semantic", "clusters=nothing"), "neither `classes`, a JSON file, nor MODEL:COUNT"),
        (("noise=semantic", "clusters=no-such-model:3"), "no checkpoint 'no-such-model'"),
        (("noise=semantic", "clusters=MASKED:many"), "neither `classes`, a JSON file, nor MODEL:COUNT"),
        (("noise=semantic", "clusters=MASKED:1000"), "cannot form 1000 clusters"),
        (("noise=semantic", "clusters=MASKED:4", "tokenizer=bytes"), "is of another vocabulary"),
        (("noise=semantic:0.5", "clusters=classes"), "--noise semantic:0.5: .* at least 1"),
        (("noise=hybrid:2",), "--noise hybrid:2: .* 0 .. 1"),
        (("init=MASKED", "width=16"), "has another size, vocabulary or kind of network"),
        (("init=MASKED", "tokenizer=bytes"), "has another size, vocabulary or kind of network"),
        (("init=MASKED", "time_conditioning=true"), "has another size, vocabulary or kind of network"),
        (("init=no-such-model",), "no checkpoint 'no-such-model'"),
        (("noise=uniform", "estimator=any_order"), "uniform noise has no estimator any_order"),
    ],
)
def test_what_does_not_fit_is_told(text: Path, masked: Path, tmp_path: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        tiny.run(text, tmp_path / "run", *(word.replace("MASKED", str(masked)) for word in settings))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[["a", "e"], ["b"]]', r"puts \d+ tokens in no group, .* among them: each needs one"),
        ("{", "does not hold a list of groups of tokens"),
        ("3", "does not hold a list of groups of tokens"),
        ("[3, 4]", "does not hold a list of groups of tokens"),
    ],
)
def test_a_file_of_groups_that_cannot_be_is_told(text: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "groups.json").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        tiny.run(text, tmp_path / "run", "noise=semantic", f"clusters={tmp_path / 'groups.json'}")
    assert "\n" not in str(error.value)
    assert "groups.json" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_mask_is_always_alone(text: Path, groups: Path) -> None:
    tokenizer = Tokenizer.make("chars", "\n".join(read(str(text))))
    for source in ("classes", str(groups)):
        found = setup.cluster_of(source, tokenizer)
        assert len(found) == tokenizer.vocab_size + 1
        assert found.count(found[-1]) == 1


def test_subwords_are_learned_from_the_training_part_alone(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("the fox and the dog " * 300 + "zebra zebra quagga! " * 30, encoding="utf-8")
    made = setup.resolve(tiny.config(file, "tokenizer=bpe:28"))
    pieces = made.tokenizer.pieces().values()
    assert " the" in pieces
    assert not any(len(piece) > 1 and set(piece) & set("zqb!") for piece in pieces)
    assert made.tokenizer.decode(made.tokenizer.encode("zebra quagga!")) == "zebra quagga!"
