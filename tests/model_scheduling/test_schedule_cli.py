from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import tokenizers
import torch

from conftest import ALPHABET, Dlm, make_model
from dlm.errors import InputError
from dlm.evaluation import generative
from dlm.language_model import load
from dlm.workflows.inputs import judge_figures


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    make_model(window=16, context=0).save_pretrained(root / "heavy")
    make_model(window=16, context=0, layers=1).save_pretrained(root / "light")
    make_model("autoregressive", window=16, context=0).save_pretrained(root / "judge")
    return root


def test_generate_with_a_schedule(dlm: Dlm, family: Path) -> None:
    base = ("generate", "--model", f"{family}/heavy", "--json", "--length", "16", "--steps", "16", "--seed", "4")
    light = ("--light", f"{family}/light")
    text = {}
    for word in ("H", "L", "L4 H8 L4", "L0.25 H0.5 L0.25", "sandwich:0.5"):
        code, out, err = dlm(*base, *light, "--schedule", word)
        assert code == 0, err
        text[word] = json.loads(out.splitlines()[-1])["text"]
    plain = json.loads(dlm(*base)[1].splitlines()[-1])["text"]
    small = json.loads(dlm("generate", "--model", f"{family}/light", *base[3:])[1].splitlines()[-1])["text"]
    assert text["H"] == plain
    assert text["L"] == small != plain
    found = json.loads(dlm(*base, *light, "--schedule", "L4 H8 L4")[1].splitlines()[-1])
    assert set(found["turns"]) == {"L", "H"}
    assert sum(found["turns"].values()) == found["forwards"]
    assert text["L4 H8 L4"] == text["L0.25 H0.5 L0.25"] == text["sandwich:0.5"] != plain


@pytest.mark.parametrize(
    "sampler", ["first-hitting", "topk", "confidence:0.5", "remdm-cap:0.1", "predictor-corrector:1", "speculative:4", "revoke"]
)
def test_every_sampler_takes_a_schedule(dlm: Dlm, family: Path, sampler: str) -> None:
    words = ("generate", "--model", f"{family}/heavy", "--light", f"{family}/light", "--schedule", "L0.5 H0.5", "--json", "--length", "40")
    code, out, err = dlm(*words, "--sampler", sampler)
    assert code == 0, err
    assert len(json.loads(out.splitlines()[-1])["text"]) == 40


def test_cost(dlm: Dlm, family: Path) -> None:
    models = (f"{family}/heavy", f"{family}/light")
    code, out, _ = dlm("schedule", "cost", "L125 H750 L125", *models, "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0
    assert found["steps"] == 1000
    assert found["saved_blocks"] == pytest.approx(0.125)  # a quarter of the steps at half the blocks
    assert found["saved_with_head"] < found["saved_blocks"]
    assert found["calls"] == pytest.approx(1000 * (1 - 0.999**16))


def test_sensitivity(dlm: Dlm, family: Path, text_file: Path) -> None:
    pytest.importorskip("matplotlib")
    words: tuple[str, ...] = (
        "schedule",
        "sensitivity",
        f"{family}/heavy",
        f"{family}/light",
        "--data",
        str(text_file),
        "--segments",
        "4",
        "--max-windows",
        "6",
    )
    code, out, err = dlm(*words, "--samples", "3", "--swap", "2", "--judge", f"{family}/judge", "--plot", "gap.png", "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    for where in ("text", "runs"):
        assert len(found[where]["kl"]["L"]["mean"]) == 4
        assert min(found[where]["kl"]["L"]["mean"]) > 0
    gap, loss = found["text"]["gap"]["L"]["mean"], found["text"]["loss"]
    assert gap == pytest.approx([light - heavy for light, heavy in zip(loss["L"]["mean"], loss["H"]["mean"], strict=True)])
    assert len(found["swap"]["L"]) == 2
    assert Path("gap.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kl", "joint", "exhaustive", "halving"])
def test_search_and_auto(dlm: Dlm, family: Path, text_file: Path, tmp_path: Path, how: str) -> None:
    make_model(window=16, context=0).save_pretrained("heavy")
    words: tuple[str, ...] = (
        "schedule",
        "search",
        "heavy",
        f"{family}/light",
        "--search",
        how,
        "--saved",
        "0.25",
        "--segments",
        "4",
        "--steps",
        "8",
    )
    words += (
        "--samples",
        "8",
        "--count",
        "4",
        "--judge",
        f"{family}/judge",
        "--data",
        str(text_file),
        "--ledger",
        "trials.jsonl",
        "--json",
    )
    code, out, err = dlm(*words, "--save")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    rows = {row["schedule"]: row for row in found["rows"]}
    assert rows["H1.0"]["d_bits"]["mean"] == 0
    assert rows["L1.0"]["saved"] == pytest.approx(0.5)
    assert rows["L1.0"]["path_kl"] == max(row["path_kl"] for row in rows.values()) > 0
    assert any(word.startswith(found["best"]) for word in rows)
    if how == "exhaustive":
        assert len(rows) == 2 + 6  # half of four segments
        assert -1 <= found["rank_agreement"] <= 1
    assert set(found["front"]) <= set(rows)
    trials = Path("trials.jsonl").read_text()
    assert json.loads(dlm(*words)[1].splitlines()[-1])["rows"] == found["rows"]
    assert Path("trials.jsonl").read_text() == trials  # nothing was measured twice
    base = ("generate", "--model", "heavy", "--length", "16", "--json")
    auto = json.loads(dlm(*base, "--schedule", "auto")[1].splitlines()[-1])["text"]
    steps = str(json.loads(Path("heavy/schedule.json").read_text())["steps"])
    mine = ("--schedule", found["best"], "--light", f"{family}/light", "--steps", steps)
    same = json.loads(dlm(*base, *mine)[1].splitlines()[-1])["text"]
    assert auto == same


def test_compare_goes_on_where_it_was(dlm: Dlm, family: Path, text_file: Path, tmp_path: Path) -> None:
    """Batches of 16 are kept one by one: more texts measure only what is new, and what is there is what comes out again."""
    ledger = tmp_path / "ledger.jsonl"
    words: tuple[str, ...] = (
        "schedule",
        "compare",
        f"{family}/heavy",
        f"{family}/light",
        "L0.5 H0.5, H@4",
        "--steps",
        "8",
        "--segments",
        "4",
    )
    words += ("--judge", f"{family}/judge", "--data", str(text_file), "--max-windows", "2", "--ledger", str(ledger), "--json")
    rows = {}
    for count, lines in ((16, 3), (20, 6), (20, 6)):
        code, out, err = dlm(*words, "-n", str(count))
        assert code == 0, err
        assert len(ledger.read_text().splitlines()) == lines
        rows[count] = json.loads(out.splitlines()[-1])["rows"]
    assert [row["schedule"] for row in rows[20]] == ["H", "L0.5 H0.5", "H@4"]
    assert all(row["texts"] == 20 for row in rows[20])
    assert rows[20][0]["d_bits"]["mean"] == 0
    assert 0 < rows[20][1]["saved"] < 1
    assert rows[20][2]["calls"]["H"] <= 4
    for wrong in ("H@", "H@x", "H@0"):
        code, _, err = dlm(*words[:4], wrong, "--steps", "8", "-n", "2")
        assert code == 2
        assert "number of steps" in err


def test_bad_input(dlm: Dlm, family: Path, text_file: Path) -> None:
    heavy, light, judge = (f"{family}/{name}" for name in ("heavy", "light", "judge"))
    make_model(window=16, context=0, alphabet="abcd").save_pretrained("other")
    make_model(window=32, context=0).save_pretrained("wide")
    generate = ("generate", "--model", heavy, "--light", light, "--schedule")
    assert "has 1000 steps and the run 16" in dlm.told(*generate, "L125 H750 L125")
    assert "names X; the models are H, L" in dlm.told(*generate, "L0.5 X0.5")
    assert "no schedule 'nonsense'" in dlm.told(*generate, "nonsense")
    assert "belongs to one model" in dlm.told(*generate, "H", "--cache", "prefix")
    assert "needs --schedule and --light" in dlm.told("generate", "--model", heavy, "--schedule", "L0.5 H0.5")
    assert "run dlm schedule search" in dlm.told("generate", "--model", heavy, "--schedule", "auto")
    for other in ("other", "wide"):
        assert "another vocabulary or window" in dlm.told("generate", "--model", heavy, "--light", other, "--schedule", "L0.5 H0.5")
    assert "no bidirectional diffusion model" in dlm.told("generate", "--model", heavy, "--light", judge, "--schedule", "H")
    assert "H is heavy itself" in dlm.told("generate", "--model", heavy, "--light", f"H={light}", "--schedule", "H")
    assert "capital letters" in dlm.told("generate", "--model", heavy, "--light", f"l={light}", "--schedule", "H")
    search = ("schedule", "search", heavy, light, "--judge", judge, "--data", str(text_file))
    assert "must be kl or joint or exhaustive or halving" in dlm.told(*search, "--search", "magic")
    assert "has no steps to schedule" in dlm.told(*search, "--sampler", "speculative:4")
    assert "saves 50.0%" in dlm.told(*search, "--saved", "0.9")
    assert "must be autoregressive" in dlm.told("schedule", "search", heavy, light, "--judge", light)
    assert "no checkpoint" in dlm.told("schedule", "sensitivity", heavy, "nowhere")


@pytest.mark.slow
def test_a_judge_with_words_of_its_own(dlm: Dlm, family: Path, text_file: Path, tmp_path: Path) -> None:
    """Through text: a model of dlm's with another vocabulary, and one of transformers, each against its own likelihood."""
    transformers = pytest.importorskip("transformers")
    # it logs to the error stream of the test that imported it, closed by now: not a traceback of ours
    dlm.monkeypatch.setattr(logging, "raiseExceptions", False)
    make_model("autoregressive", window=64, context=0, alphabet=ALPHABET[::-1] + "0123").save_pretrained("cousin")
    config = transformers.GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    transformers.set_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    gpt2.save_pretrained("gpt2")
    pieces = {"<s>": 0} | {c: i + 1 for i, c in enumerate(ALPHABET)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token="<s>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<s>").save_pretrained("gpt2")
    words: tuple[str, ...] = (
        "schedule",
        "search",
        f"{family}/heavy",
        f"{family}/light",
        "--saved",
        "0.2",
        "--segments",
        "4",
        "--steps",
        "8",
        "--samples",
        "2",
    )
    words += ("--data", str(text_file), "--json", "--judge")
    found = {}
    for judge in ("cousin", "gpt2"):
        code, out, err = dlm(*words, judge)
        assert code == 0, err
        found[judge] = next(row for row in json.loads(out.splitlines()[-1])["rows"] if row["schedule"] == "H1.0")["bits"]["mean"]
    with pytest.raises(InputError, match="cousin has a vocabulary of its own"):
        judge_figures("cousin", load(f"{family}/heavy"), given=4)
    texts = [one.text for one in load(f"{family}/heavy").generate(["", ""], length=16, steps=8)]
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[0, *(pieces[c] for c in text)]])
        nats += gpt2(ids, labels=ids).loss.item() * 16  # the mean over all but the first
    assert found["gpt2"] == pytest.approx(nats / 32 / math.log(2), rel=1e-5)
    cousin = load("cousin")
    x_BT = torch.tensor([cousin.tokenizer.encode(text) for text in texts])
    each_B = generative.judge_bits_each(cousin.noise, cousin.predict, x_BT)
    assert found["cousin"] == pytest.approx(float(each_B.mean()), rel=1e-5)
    Path("gpt2/config.json").write_text('{"model_type": "nonsense"}')
    assert "no causal model that transformers can read" in dlm.told(*words, "gpt2")
    make_model("autoregressive", window=64, context=0, alphabet="abc").save_pretrained("few")
    assert "the judge few cannot read the text" in dlm.told(*words, "few")
