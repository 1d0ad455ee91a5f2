"""lm-evaluation-harness on our models, offline: tasks of multiple choice, generation and perplexity from local files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bases
import dlm
from conftest import Dlm, make_model
from dlm.errors import InputError
from dlm.workflows import harness

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

QUESTIONS = [
    {"question": "ROMEO: But soft, what light", "choices": [" through yonder", " breaks", " wherefore"], "answer": 0},
    {"question": "JULIET: O Romeo,", "choices": [" Romeo", " window", " art thou"], "answer": 2},
    {"question": "what light", "choices": [" breaks", " But"], "answer": 1},
]
TASKS = {
    "choice": """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1}
""",
    "writing": """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e", "\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
metadata: {version: 1}
""",
    "perplexity": """
task: perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
metadata: {version: 1}
""",
}


@pytest.fixture
def task_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of three tasks, with their data."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    directory, data = tmp_path / "tasks", tmp_path / "questions.jsonl"
    directory.mkdir()
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, text in TASKS.items():
        (directory / f"{name}.yaml").write_text(text.replace("FILE", str(data)))
    return directory


def harness_of(model: Any, **settings: Any) -> Any:
    from dlm.workflows.harness_model import Harness

    return Harness(model, **settings)


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


PAIRS = [
    asked("ROMEO: But soft", ", what light"),
    asked("", "JULIET: O Romeo"),
    asked("window ", "breaks"),
    asked("what light through yonder window breaks! what light through yonder window", " breaks! art thou"),
    asked("wherefore", " a"),
]
TEXTS = [asked("But soft, what light through yonder window breaks!" * 5), asked("Romeo"), asked("O")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bases.publish(bases.transformer("Llama", seed=5), tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="module")
def hf(llama: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(llama), device="cpu", dtype="float32", batch_size=2, max_length=64)


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_likelihoods_of_a_base_are_those_of_the_harness(llama: Path, hf: Any, batch_size: str) -> None:
    ours = harness_of(str(llama), batch_size=batch_size, prefix_token_id=hf.prefix_token_id)
    own, theirs = ours.loglikelihood(PAIRS), hf.loglikelihood(PAIRS)
    assert [logp for logp, _ in own] == pytest.approx([logp for logp, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in own] == [greedy for _, greedy in theirs]
    assert ours.loglikelihood_rolling(TEXTS) == pytest.approx(hf.loglikelihood_rolling(TEXTS), abs=1e-3)
    assert ours.get_model_info()["likelihood_estimator"] == "autoregressive, exact"


def test_the_prefix_of_a_base_is_that_of_the_harness(llama: Path, hf: Any) -> None:
    assert harness_of(str(llama)).prefix_token_id == hf.prefix_token_id


def test_texts_of_a_base_are_those_of_the_harness(llama: Path, hf: Any) -> None:
    settings = [{"until": [], "max_gen_toks": 20}, {"until": ["a", "u"], "max_gen_toks": 20}]
    requests = [asked(text, one) for text in ("ROMEO: But", "O", "what light") for one in settings]
    own = harness_of(str(llama), batch_size=2).generate_until(requests)
    assert own == hf.generate_until(requests)
    assert len(set(own)) == len(requests)


def test_every_likelihood_of_masks_is_the_sum_over_their_patterns() -> None:
    """Of a network that reads whole windows: the context visible, what follows the continuation masked."""
    lm = make_model(window=16)
    ((logp, _),) = harness_of(lm, mc_samples=7).loglikelihood([asked("Rome", "o a")])
    ids, mask, total = lm.tokenizer.encode("Romeo a"), lm.tokenizer.mask_id, 0.0
    for pattern in range(1, 8):
        masked = [4 + n for n in range(3) if pattern >> n & 1]
        z = [mask if i in masked else token for i, token in enumerate(ids)] + [mask] * 9
        logits_TV = lm.predict(torch.tensor([z]), torch.zeros(1))[0]
        logits_TV[:, mask] = -torch.inf
        logp_TV = logits_TV.log_softmax(-1)
        k = len(masked)
        total += sum(float(logp_TV[i, ids[i]]) for i in masked) / (k * [0, 3, 3, 1][k])
    assert logp == pytest.approx(total, abs=1e-4)


def test_blocks_of_one_are_the_chain_rule() -> None:
    lm = make_model(attention="block_causal", block_length=4, window=16)
    ((logp, _),) = harness_of(lm, likelihood_blocks=1).loglikelihood([asked("Rome", "o and J")])
    ids, mask = lm.tokenizer.encode("Romeo and J"), lm.tokenizer.mask_id
    total = 0.0
    for i in range(4, len(ids)):
        z_1T, x_1T = torch.full((1, i + 1), mask), torch.tensor([[*ids[:i], mask]])
        logits_V = lm.predict_beside(z_1T, x_1T, 1)[0, i]
        logits_V[mask] = -torch.inf
        total += float(logits_V.log_softmax(-1)[ids[i]])
    assert logp == pytest.approx(total, abs=1e-4)


def test_blocks_have_a_bound_with_its_error() -> None:
    lm = make_model(attention="block_causal", block_length=8, window=16)
    made = harness_of(lm, mc_samples=16, batch_size=8)
    made.loglikelihood([asked("R", "omeo and J")])
    info = made.get_model_info()
    assert info["likelihood_estimator"] == "conditional block-wise, blocks of 8"
    assert 0 < info["loglikelihood_mc_stderr_mean"] < 10


@pytest.mark.parametrize("noise", ["uniform", "semantic"])
def test_replacement_noise_writes_but_has_no_likelihood(noise: str) -> None:
    made = harness_of(make_model(noise={"process": noise, "schedule": "linear"}), steps=4)
    with pytest.raises(InputError, match="tasks of generation"):
        made.loglikelihood([asked("a", "b")])
    (text,) = made.generate_until([asked("Romeo", {"until": [], "max_gen_toks": 5})])
    assert len(text) == 5


@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
def test_a_text_depends_on_its_request_alone(objective: str) -> None:
    lm = make_model(objective)
    options: dict[str, Any] = {"steps": 6} if objective == "diffusion" else {}
    settings = {"until": ["e", "A"], "max_gen_toks": 12, "do_sample": True, "temperature": 0.9}
    requests = [asked(text, settings) for text in ("Romeo", "O", "what light", "Romeo")]
    alone = [harness_of(lm, **options).generate_until([one])[0] for one in requests[:3]]
    together = harness_of(lm, batch_size=3, **options).generate_until(requests)
    assert together[:3] == alone
    assert together[3] != together[0]  # a repeat of a request that samples
    assert not any("e" in text or "A" in text for text in together)


def test_a_context_is_cut_to_what_the_window_leaves() -> None:
    made = harness_of(make_model("autoregressive", context=0))
    assert len(made._context("a" * 100, 20)) == 12
    with pytest.raises(InputError, match="max_gen_toks=32 leaves no room"):
        made._context("a", 32)


def test_a_chat_template_is_read_with_its_control_tokens(llama: Path) -> None:
    made = harness_of(str(llama))
    text = made.apply_chat_template([{"role": "user", "content": "Romeo<|im_end|>"}])
    ids = made.tok_encode(text)
    start, end = (made.lm.tokenizer.control[token] for token in bases.SPECIAL)
    assert (ids.count(start), ids.count(end)) == (2, 1)
    messages = [{"role": "user", "content": "O"}, {"role": "assistant", "content": "art"}]
    assert made.apply_chat_template(messages, add_generation_prompt=False).endswith("assistant\nart")


@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_open_models_answer_alone_as_in_a_batch(family: str) -> None:
    lm = dlm.load(str(Path(__file__).parents[1] / "golden" / family))
    alone, together = (harness_of(lm, mc_samples=8, batch_size=rows, steps=4) for rows in (1, 5))
    pairs = [asked("Hello wor", "ld!"), asked("The capital of France is", " Paris in the spring"), asked("", "abc")]
    one, many = alone.loglikelihood(pairs), together.loglikelihood(pairs)
    assert [logp for logp, _ in many] == pytest.approx([logp for logp, _ in one], abs=1e-3)
    assert alone.get_model_info() == pytest.approx(together.get_model_info(), abs=1e-3)
    requests = [asked(text, {"until": [], "max_gen_toks": 8}) for text in ("Hello wor", "The capital of")]
    assert together.generate_until(requests) == alone.generate_until(requests)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shakespeare-mask", "shakespeare-block", "shakespeare-ar"])
def test_tasks_run_and_go_on(name: str, task_files: Path, tmp_path: Path) -> None:
    lm = dlm.load(name)
    settings: dict[str, Any] = {"include_path": task_files, "mc_samples": 8, "resume": tmp_path / "answers", "batch_size": 4}
    found = harness.evaluate_tasks(lm, list(TASKS), card=tmp_path / "card.json", **settings)
    assert found.samples == dict.fromkeys(TASKS, len(QUESTIONS))
    assert 0 <= found.figures["choice"]["acc,none"] <= 1
    assert 1 < found.figures["perplexity"]["bits_per_byte,none"] < 8
    assert "exact_match,none" in found.figures["writing"]
    assert json.loads((tmp_path / "card.json").read_text())["figures"] == found.figures
    again = harness.evaluate_tasks(lm, list(TASKS), **settings)
    assert again.figures == found.figures
    assert "loglikelihood_mc_stderr_mean" not in again.likelihood  # every answer came from the file


@pytest.mark.slow
def test_the_command(dlm: Dlm, task_files: Path, masked_dir: Path) -> None:
    words = ("--tasks", "choice,writing", "--include-path", str(task_files), "--limit", "2", "--mc-samples", "4")
    code, out, err = dlm("eval", str(masked_dir), *words, "--model-args", "steps=4", "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["samples"] == {"choice": 2, "writing": 2}
    assert found["likelihood"]["likelihood_estimator"] == "conditional any-order"
    assert Path(found["card"]).name == "tiny-masked-tasks.json"


@pytest.mark.slow
def test_the_door(task_files: Path, masked_dir: Path) -> None:
    """The harness's own command line, where batch_size comes as a text."""
    words = ["--model", "dlm", "--model_args", f"pretrained={masked_dir},mc_samples=4,steps=4", "--batch_size", "2"]
    words += ["--tasks", "choice", "--include_path", str(task_files)]
    command = [sys.executable, "-m", "dlm.workflows.harness", "run", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "|choice|" in done.stdout


def test_bad_input(dlm: Dlm, task_files: Path, masked_dir: Path) -> None:
    model = str(masked_dir)
    assert "give --data, a text to measure, or --tasks" in dlm.told("eval", model)
    assert "not both" in dlm.told("eval", model, "--tasks", "choice", "--data", "shakespeare")
    assert "dir 'nowhere' does not exist" in dlm.told("eval", model, "--tasks", "choice", "--include-path", "nowhere")
    assert "name=value" in dlm.told("eval", model, "--tasks", "choice", "--model-args", "steps")
    assert "unknown option 'stepps'" in dlm.told("eval", model, "--tasks", "choice", "--model-args", "stepps=4")
    with pytest.raises(InputError, match="batch_size 'many'"):
        harness_of(make_model(), batch_size="many")


@pytest.mark.slow
def test_an_unknown_task_is_named(dlm: Dlm, task_files: Path, masked_dir: Path) -> None:
    told = dlm.told("eval", str(masked_dir), "--tasks", "choise", "--include-path", str(task_files))
    assert "unknown task 'choise'; did you mean choice?" in told


def test_without_the_extra(dlm: Dlm, masked_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert dlm.told("eval", str(masked_dir), "--tasks", "gsm8k").endswith("pip install 'dlm[harness]'")
