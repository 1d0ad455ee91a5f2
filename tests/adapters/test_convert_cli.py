"""`dlm convert` on a base that has learned a text: acceptance rises, the base stays, runs resume to the bit."""

from __future__ import annotations

import json
import signal
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bases
from conftest import Dlm, make_model
from dlm.adapters import attach, distillation_data, lora
from dlm.adapters.train import ConvertConfig
from dlm.errors import InputError
from dlm.language_model import LanguageModel, load
from dlm.models.transformer import predict_next
from dlm.text.chat import ChatTemplate
from dlm.train.loop import Progress, quiet
from dlm.trajectory import Canvas
from dlm.workflows.convert import SelfDistillation, convert

SONG = "I sing of arms and the man\n" * 60
CONFIG = ConvertConfig(stride=3, rank=4, alpha=8.0, steps=12, batch=4, length=16, warmup=3, log_every=5, eval_every=6, save_every=4)
SMALL = ("--stride", "3", "--rank", "4", "--batch", "4", "--length", "16")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny autoregressive model that nearly knows a text by heart."""
    torch.manual_seed(0)
    lm = make_model("autoregressive", alphabet="".join(sorted(set(SONG))))
    network = lm.network.train().requires_grad_(True)
    network.reset()
    ids = torch.tensor(lm.tokenizer.encode(SONG))
    optimizer, rng = torch.optim.AdamW(network.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    for _ in range(100):
        x_BT = torch.stack([ids[i : i + 24] for i in torch.randint(len(ids) - 24, (8,), generator=rng).tolist()])
        padded = torch.cat([x_BT[:, :1], x_BT], 1)[:, :-1]
        logits_BTV = predict_next(network, torch.cat([padded[:, :1], x_BT[:, :-1]], 1), lm.tokenizer.mask_id)
        torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), x_BT.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("bases") / "tiny-base"
    lm.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(SONG)
    return path


def rows(lm: LanguageModel, text: Path, length: int = 16) -> distillation_data.Rows:
    return distillation_data.from_text(str(text), lm.tokenizer, lm.config.start_token_id, length, held=16)


def run(base: Path, text: Path, out: Path, config: ConvertConfig = CONFIG, **options: Any) -> dict[str, Any]:
    lm = load(str(base))
    record = convert(lm, rows(lm, text), out, config=config, progress=quiet, **options).record()
    return {name: value for name, value in record.items() if name != "out"}


def curve(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def test_acceptance_rises_and_the_base_stays(dlm: Dlm, base_dir: Path, text: Path) -> None:
    words = ("--data", str(text), *SMALL, "--steps", "120", "--lr", "0.01", "--out", "out", "--json")
    code, printed, err = dlm("convert", str(base_dir), *words)
    assert code == 0, err
    figures = json.loads(printed.splitlines()[-1])
    assert figures["base"] == "tiny-base"
    assert figures["stride"] == 3
    assert len(figures["accept"]) == 2
    assert all(after > before + 0.2 for before, after in zip(figures["accept_before"], figures["accept"], strict=True)), figures
    assert 1 < figures["tokens_per_forward"] <= 3
    assert "acceptance by slot" in err
    assert sorted(p.name for p in Path("out").iterdir()) == ["adapter.json", "adapter.safetensors", "log.jsonl", "training.safetensors"]

    base, lm = load(str(base_dir)), attach.with_adapter(load(str(base_dir)), "out")
    adapter = lora.adapter_of(lm.network)
    assert adapter is not None
    config = adapter.config
    assert (config.stride, config.base, config.made["settings"]["steps"]) == (3, "tiny-base", 120)
    assert config.made["accept"] == figures["accept"]
    for seed in (0, 1):
        assert lm.generate("I sing", max_new_tokens=25, seed=seed).text == base.generate("I sing", max_new_tokens=25, seed=seed).text
    assert "out holds a run already: add --resume, or choose another --out" in dlm.told("convert", str(base_dir), *words)
    assert "is at step 120 of 120 already: raise --steps" in dlm.told("convert", str(base_dir), *words, "--resume")


def test_full_training_gives_a_checkpoint(dlm: Dlm, base_dir: Path, text: Path) -> None:
    words = ("--data", str(text), *SMALL, "--steps", "100", "--lr", "0.003", "--out", "out")
    code, printed, err = dlm("convert", str(base_dir), *words, "--full", "--loss", "ce", "--clean-weight", "0")
    assert code == 0, err
    assert printed.splitlines()[0].startswith("before  acceptance by slot 0.")
    assert printed.splitlines()[1].startswith("after   acceptance")
    lm, base = load("out"), load(str(base_dir))
    made = lm.config.training
    assert made["stride"] == 3
    assert made["settings"]["full"]
    assert all(after > before + 0.2 for before, after in zip(made["accept_before"], made["accept"], strict=True)), made
    assert lora.fingerprint(lm.network) != lora.fingerprint(base.network)
    assert len(lm.generate("I sing", max_new_tokens=9, temperature=0.0).text) == 15


@pytest.mark.parametrize("changes", [{}, {"full": True, "loss": "ce"}], ids=["adapter", "full"])
def test_stop_and_resume(base_dir: Path, text: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = replace(CONFIG, **changes)
    whole = run(base_dir, text, tmp_path / "whole", config)
    for stop in (3, 7):  # neither a step of the log nor of the saves
        run(base_dir, text, tmp_path / "parts", config, stop_after=stop, resume=stop > 3)
    parts = run(base_dir, text, tmp_path / "parts", config, resume=True)
    for name in ("training.safetensors", "model.safetensors" if config.full else "adapter.safetensors"):
        first, second = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    assert [line["step"] for line in curve(tmp_path / "whole")] == [0, 5, 6, 10, 12, 12]
    assert {k: v for k, v in parts.items() if k != "tokens_per_second"} == {k: v for k, v in whole.items() if k != "tokens_per_second"}


def test_beginning_with_an_adapter(dlm: Dlm, base_dir: Path, text: Path, tmp_path: Path) -> None:
    """Its acceptance is where the run begins; a chain is added to one that has none."""
    first = run(base_dir, text, tmp_path / "first", replace(CONFIG, chain=0))
    second = run(base_dir, text, tmp_path / "second", replace(CONFIG, init=str(tmp_path / "first")))
    assert second["accept_before"] == pytest.approx(first["accept"], abs=5e-3)  # which is in bfloat16 on disk
    assert "chain.down" in load_file(tmp_path / "second" / "adapter.safetensors")
    words = ("convert", str(base_dir), "--data", str(text), "--length", "16", "--init")
    assert "no adapter 'none'" in dlm.told(*words, "none", "--stride", "3", "--rank", "2")
    assert "does not fit" in dlm.told(*words, str(tmp_path / "first"), "--stride", "3", "--rank", "3")
    assert "leave --full and --heads away" in dlm.told(*words, str(tmp_path / "first"), "--full")


def test_ctrl_c_saves(base_dir: Path, text: Path, tmp_path: Path) -> None:
    run(base_dir, text, tmp_path / "whole")
    lm = load(str(base_dir))
    plain = rows(lm, text)
    calls = []

    def draw(batch: int, rng: torch.Generator) -> distillation_data.Batch:
        calls.append(batch)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return plain.draw(batch, rng)

    with pytest.raises(KeyboardInterrupt, match="stopped at step 6, saved; go on with --resume"):
        convert(lm, replace(plain, draw=draw), tmp_path / "parts", config=CONFIG, progress=quiet)
    assert lora.load_config(tmp_path / "parts").stride == 3  # what is there can be used
    (tmp_path / "parts" / ".saving-left").mkdir()
    run(base_dir, text, tmp_path / "parts", resume=True)
    assert not list((tmp_path / "parts").glob(".saving-*"))
    first, second = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_cannot_be_resumed(base_dir: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="nothing to resume"):
        run(base_dir, text, out, resume=True)
    run(base_dir, text, out, stop_after=4)
    with pytest.raises(InputError, match="begun with stride=3, rank=4: resume with the same"):
        run(base_dir, text, out, replace(CONFIG, stride=4, rank=2), resume=True)
    other = tmp_path / "other.txt"
    other.write_text(SONG[7:])
    with pytest.raises(InputError, match="begun with another text"):
        run(base_dir, other, out, resume=True)
    lm = load(str(base_dir))
    with torch.no_grad():
        lm.network.head.weight[0, 0] += 1.0
    with pytest.raises(InputError, match=r"begun with another base \(tiny-base\)"):
        convert(lm, rows(lm, text), out, config=CONFIG, resume=True, progress=quiet)
    with pytest.raises(InputError, match=r"the loss is nan at step \d+: lower --lr"):
        run(base_dir, text, out, replace(CONFIG, lr=1e30, clip=1e30), resume=True)
    file = out / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="no whole training state"):
        run(base_dir, text, out, resume=True)


@pytest.mark.slow
def test_a_base_that_writes_its_own_text(dlm: Dlm, base_dir: Path) -> None:
    words = ("convert", str(base_dir), "--self-distill", "40", *SMALL, "--out", "out", "--lr", "0.01")
    code, printed, err = dlm(*words, "--steps", "100", "--json")
    assert code == 0, err
    figures = json.loads(printed.splitlines()[-1])
    assert figures["accept"][0] > figures["accept_before"][0] + 0.15
    file = Path("out") / distillation_data.FILE
    head, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    lm = load(str(base_dir))
    assert head["base"] == "tiny-base"
    assert len(lines) == 40
    assert [lines[20]["text"]] == [lm.generate("", length=15, seed=20).text]  # row i is drawn with seed + i
    before, whole = file.stat().st_mtime_ns, file.read_text()
    assert dlm(*words, "--steps", "101", "--resume")[0] == 0
    assert file.stat().st_mtime_ns == before
    more = ["50" if word == "40" else word for word in words]
    assert dlm(*more, "--steps", "102", "--resume")[0] == 0
    assert len(file.read_text().splitlines()) == 51
    assert "begun with another text" in dlm.told(*words, "--steps", "103", "--resume", "--seed", "1")

    told: list[int] = []
    file.write_text("".join(line for line in whole.splitlines(keepends=True)[:17]))  # it was stopped after 16
    distillation_data.write(lm, file, 40, 16, batch=64, tell=told.append)
    assert told == [16, 40]
    assert file.read_text() == whole
    distillation_data.write(lm, file, 30, 16, batch=64, tell=told.append)
    assert told[2:] == [30]
    assert file.read_text() == whole


def test_texts_from_before_format_numbers_are_gone_on_with(base_dir: Path, tmp_path: Path) -> None:
    lm, whole, before = load(str(base_dir)), tmp_path / "whole.jsonl", tmp_path / "before.jsonl"
    distillation_data.write(lm, whole, 12, 16, batch=4)
    head, *texts = whole.read_text().splitlines()
    about = json.loads(head)
    assert about.pop("format") == 1
    del about["dlm_version"]
    before.write_text("\n".join([json.dumps(about), *texts[:4]]) + "\n")
    told: list[int] = []
    distillation_data.write(lm, before, 12, 16, batch=4, tell=told.append)
    assert told == [4, 8, 12]
    assert before.read_text().splitlines()[1:] == texts
    before.write_text(json.dumps(about | {"format": 99}) + "\n")
    with pytest.raises(InputError, match=r"has format 99, .* upgrade dlm"):
        distillation_data.write(lm, before, 12, 16, batch=4)


def test_the_function_gives_what_the_command_prints(dlm: Dlm, base_dir: Path, text: Path, tmp_path: Path) -> None:
    words = ("convert", str(base_dir), "--self-distill", "8", "--temperatures", "0,1", *SMALL, "--steps", "3", "--out", "out", "--json")
    code, printed, err = dlm(*words)
    assert code == 0, err
    told: list[Progress] = []
    config = ConvertConfig(stride=3, rank=4, alpha=8.0, batch=4, length=16, steps=3)
    result = convert(str(base_dir), SelfDistillation(8, temperatures=(0.0, 1.0)), tmp_path / "made", config=config, progress=told.append)
    record, expected = result.record(), json.loads(printed.splitlines()[-1])
    assert record.pop("out") == str(tmp_path / "made")
    assert expected.pop("out") == "out"
    assert record.pop("tokens_per_second") > 0
    assert expected.pop("tokens_per_second") > 0
    assert record == expected
    assert record["format"] == 1
    assert [one.done for one in told if one.label == "tiny-base writes"] == [0, 8]
    assert [one.done for one in told if one.label == "converting" and not one.text and not one.logged] == [1, 2, 3]
    with pytest.raises(FrozenInstanceError):
        result.step = 4  # type: ignore[misc]


def test_temperatures_take_turns(base_dir: Path, tmp_path: Path) -> None:
    lm, file = load(str(base_dir)), tmp_path / distillation_data.FILE
    distillation_data.write(lm, file, 12, 16, temperatures=(0.0, 1.0), batch=4)
    found = [json.loads(line)["text"] for line in file.read_text().splitlines()[1:]]
    assert set(found[:4]) == set(found[8:]) == {lm.generate("", length=15, temperature=0.0).text}
    assert found[4:8] == [lm.generate("", length=15, seed=seed).text for seed in range(4, 8)]


@pytest.mark.slow
def test_prompts(dlm: Dlm, tmp_path: Path) -> None:
    """A chat model answers users; what was asked is read, not learned."""
    base = bases.publish(bases.transformer("Llama"), tmp_path / "base")
    Path("prompts.txt").write_text("But soft\n\nO Romeo\n")
    words = ("--self-distill", "4", "--prompts", "prompts.txt", "--stride", "2", "--length", "60", "--steps", "2", "--out", "out")
    code, _, err = dlm("convert", str(base), *words)
    assert code == 0, err
    lines = [json.loads(line) for line in (Path("out") / distillation_data.FILE).read_text().splitlines()][1:]
    assert len(lines) == 4
    for line, prompt in zip(lines, ["But soft", "O Romeo"] * 2, strict=True):
        assert line["text"].startswith(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
        assert line["given"] < len(line["ids"])
    found = distillation_data.from_base(Path("out") / distillation_data.FILE, None, 60)
    x_BT, free_BT = found.held
    assert x_BT[0, : len(lines[3]["ids"])].tolist() == lines[3]["ids"]
    assert free_BT[0].nonzero().squeeze(-1).tolist() == list(range(lines[3]["given"], len(lines[3]["ids"])))
    drawn = {tuple(row) for row in found.draw(50, torch.Generator().manual_seed(0))[0].tolist()}
    assert len(drawn) == 3
    assert tuple(x_BT[0].tolist()) not in drawn

    (Path("out") / distillation_data.FILE).write_text("{}\n{]")
    with pytest.raises(InputError, match=r"texts.jsonl is damaged"):
        distillation_data.from_base(Path("out") / distillation_data.FILE, None, 60)
    plain = load(str(base))
    plain.chat = ChatTemplate()
    with pytest.raises(InputError, match="reads no start token: give --prompts FILE"):
        distillation_data.write(plain, tmp_path / "no.jsonl", 4, 60)
    Path("long.txt").write_text("But soft, " * 20)
    told = dlm.told("convert", str(base), "--self-distill", "4", "--prompts", "long.txt", "--length", "30")
    assert "shorter prompts or a greater --length" in told or "begin a new one" in told


def test_a_chat_model_asks_itself(dlm: Dlm, tmp_path: Path) -> None:
    base = bases.publish(bases.transformer("Llama"), tmp_path / "base")
    words = ("--self-distill", "6", "--stride", "2", "--length", "60", "--steps", "2", "--temperatures", "0", "--out", "out")
    code, _, err = dlm("convert", str(base), *words)
    assert code == 0, err
    lines = [json.loads(line) for line in (Path("out") / distillation_data.FILE).read_text().splitlines()][1:]
    lm, asked = load(str(base)), []
    for line in lines:
        given = lm.tokenizer.decode(line["ids"][: line["given"]])
        assert given.startswith("<|im_start|>user\n")
        assert given.endswith("<|im_end|>\n<|im_start|>assistant\n")
        asked.append(given.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n"))
        canvas = Canvas.from_rows(
            [[*line["ids"][: line["given"]], *[None] * (len(line["ids"]) - line["given"])]], fill=lm.tokenizer.mask_id
        )
        *_, frame = lm.stream(canvas=canvas, temperature=0.0)
        assert frame.tokens_BT[0].tolist() == line["ids"]  # the answer is the likeliest one, whatever the question was drawn with
    assert len(set(asked)) == 6
    told = dlm.told("convert", str(base), *words[:4], "--length", "10", "--out", "short")
    assert "shorter prompts or a greater --length" in told


def test_bad_input(dlm: Dlm, base_dir: Path, masked_dir: Path, text: Path) -> None:
    Path("empty.txt").write_text("\n")
    base, data = str(base_dir), ("--data", str(text))
    for words, message in (
        ((base,), "give --data FILE or --self-distill N, one of them"),
        ((base, *data, "--self-distill", "9"), "one of them"),
        ((base, "--self-distill", "1"), "counts texts from 2"),
        ((base, "--self-distill", "9", "--temperatures", "0,-1"), "--temperatures is one or more numbers from 0"),
        ((base, "--self-distill", "9", "--temperatures", "warm"), "as in 0,1; got 'warm'"),
        ((base, *data, "--temperatures", "0"), "leave them away with --data"),
        ((base, *data, "--prompts", "empty.txt"), "leave them away with --data"),
        ((base, "--self-distill", "9", "--length", "16", "--prompts", "nowhere"), "no prompts at nowhere"),
        ((base, "--self-distill", "9", "--length", "16", "--prompts", "empty.txt"), "empty.txt is empty"),
        ((base, *data), "length must lie in 6 (stride + 2) .. 32 (the window of tiny-base), got 256"),
        ((base, *data, "--stride", "1"), "'--stride': must be at least 2"),
        ((base, *data, "--rank", "0"), "'--rank': must be at least 1"),
        ((base, *data, "--targets", "q,w"), "adapter targets are some of q, k, v, out, up, down, gate; got q, w"),
        ((base, *data, "--loss", "mse"), "unknown loss 'mse'; known: kl, ce"),
        ((base, *data, "--lr", "0"), "lr must be above 0"),
        ((base, *data, "--steps", "0"), "'--steps': must be at least 1"),
        ((base, "--data", "nowhere", "--length", "16"), "no data at nowhere"),
        ((str(masked_dir), *data), "is a diffusion model already: convert an autoregressive one"),
    ):
        assert message in dlm.told("convert", *words), words


@pytest.mark.slow
def test_generate_with_an_adapter(dlm: Dlm, base_dir: Path, masked_dir: Path, text: Path) -> None:
    """Strided decoding with what was trained writes the base's own text for every seed, in fewer calls than without."""
    code, _, err = dlm("convert", str(base_dir), "--data", str(text), "--out", "adapted", *SMALL, "--steps", "120")
    assert code == 0, err
    calls = {"autoregressive": 0, "strided:3": 0, "adapted": 0}
    for seed, temperature in ((0, "0"), (1, "1"), (2, "0.7")):
        base = ("generate", "I sing", "--model", str(base_dir), "--seed", str(seed), "--temperature", temperature, "--json")
        made = {}
        for name in calls:
            more = ("--adapter", "adapted", "--sampler", "strided:3") if name == "adapted" else ("--sampler", name)
            made[name] = json.loads(dlm(*base, *more)[1].splitlines()[-1])
            calls[name] += made[name]["forwards"]
        assert made["adapted"]["text"] == made["strided:3"]["text"] == made["autoregressive"]["text"]
    assert calls["adapted"] < calls["strided:3"] < calls["autoregressive"]
    assert "was made for another base" in dlm.told("generate", "--model", str(masked_dir), "--adapter", "adapted")
    assert "adapter" in dlm.told("generate", "--model", str(base_dir), "--adapter", "nowhere")
