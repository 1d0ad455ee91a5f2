"""Chat templates: the text and ids of transformers; a control token in a message is text; `dlm chat` line by line."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from bases import SPECIAL, TEMPLATE, publish, tokenizer, transformer
from conftest import Dlm
from dlm.errors import InputError
from dlm.language_model import LanguageModel, load
from dlm.language_model.generation import Run
from dlm.text.chat import GUARD, ChatTemplate
from dlm.text.tokenizer import Tokenizer
from dlm.trajectory import Frame
from kinds import byte_level, sentencepiece

MESSAGES = [{"role": "ROMEO", "content": "But soft, what"}, {"role": "JULIET", "content": "light"}, {"role": "ROMEO", "content": "O Romeo"}]
QWEN3_LIKE = """
{%- for message in messages %}
    {%- if loop.first and message.role == 'R' %}{{ bos_token }}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content|trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>' }}{% if enable_thinking %}{{ 'think' }}{% endif %}{% endif %}
"""
LLAMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def stripping() -> tokenizers.Tokenizer:
    """Its control tokens take the white space beside them."""
    inner = byte_level()
    inner.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False, lstrip=True, rstrip=True) for text in SPECIAL])
    return inner


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(transformer("Llama"), tmp_path_factory.mktemp("chat") / "base")


@pytest.fixture(scope="module")
def lm(base: Path) -> LanguageModel:
    return load(str(base))


@pytest.mark.parametrize("template", [TEMPLATE, QWEN3_LIKE])
@pytest.mark.parametrize("answer", [True, False])
def test_text_and_ids_are_those_of_transformers(template: str, answer: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), bos_token=SPECIAL[0], eos_token=SPECIAL[1])
    theirs.chat_template = template
    chat, ours = ChatTemplate(template, {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}), Tokenizer(tokenizer())
    options: dict[str, Any] = {"enable_thinking": True} if template == QWEN3_LIKE else {}
    text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=answer, **options)
    assert chat.render(MESSAGES, answer=answer, **options) == text
    assert chat.encode(MESSAGES, ours, answer=answer, **options) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", [TEMPLATE, QWEN3_LIKE, LLAMA_LIKE])
@pytest.mark.parametrize(
    "inner",
    [
        *(sentencepiece(scheme) for scheme in ("first", "always", "never", None)),
        *(byte_level(*SPECIAL, prefix=prefix) for prefix in (False, True)),
        stripping(),
    ],
    ids=["first", "always", "never", "normalizer", "byte-level", "byte-level, space before", "stripping"],
)
def test_d11_ids_are_those_of_transformers_whatever_puts_spaces(template: str, inner: tokenizers.Tokenizer) -> None:
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    theirs.chat_template = template
    ours = Tokenizer(tokenizers.Tokenizer.from_str(inner.to_str()))
    messages = [{"role": "user", "content": " hi there"}, {"role": "assistant", "content": "yes 天\n"}, {"role": "user", "content": "what"}]
    ids = ChatTemplate(template, names).encode(messages, ours, answer=True)
    expected: Any = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert ids == expected["input_ids"]


def test_a_control_token_in_a_message_is_text(lm: LanguageModel) -> None:
    typed = f"a{SPECIAL[1]}{SPECIAL[0]}b{GUARD}"
    ids = lm.chat.encode([{"role": "R", "content": typed}], lm.tokenizer)
    plain = lm.chat.encode([{"role": "R", "content": "ab"}], lm.tokenizer)
    for token in SPECIAL:
        number = lm.tokenizer.control[token]
        assert ids.count(number) == plain.count(number)
    assert f"\na{SPECIAL[1]}{SPECIAL[0]}b{SPECIAL[1]}" in lm.tokenizer.decode(ids)


def test_templates_come_from_three_places(tmp_path: Path) -> None:
    def found() -> ChatTemplate:
        return ChatTemplate.load(tmp_path)

    assert found() == ChatTemplate()
    assert found().files() == {}
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one", "eos_token": {"content": "<e>"}, "add_bos_token": False}))
    assert found() == ChatTemplate("one", {"eos_token": "<e>"})
    config.write_text(json.dumps({"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]}))
    assert found().source == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert found().source == "three"


REFUSED = {
    "\n{{ messages[9].content }}": "has no element 9, line 2 of the template",
    "a\nb{% if %}": ", line 2 of the template",
    "{% for %}": ", line 1 of the template",
    "{% nothing %}": "unknown tag 'nothing'.*line 1 of the template",
    "\n\n{{ raise_exception('roles must alternate') }}": "roles must alternate, line 3 of the template",
    "{{ 1 + '' }}": ", line 1 of the template",
    "{% set x = 1 %}\n{{ x / 0 }}": "division by zero, line 2 of the template",
    "{{ 1 / 0 }}": "division by zero, line 1 of the template",
    "\n{{ 2.0**9999 }}": "line 2 of the template",
    "{{ 10**(10**10) }}": "too large, line 1 of the template",
    "{{ 'a' * 10**12 }}": "too large, line 1 of the template",
    "{{ range(10**9) | list }}": "Range too big.*, line 1 of the template",
    "{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}": "recursion",
    "{{ messages | nothing }}": "No filter named 'nothing'.*line 1",
    "\n{% include 'other' %}": "line 2 of the template",
    "{{ messages[0].content.nothing.more }}": "line 1 of the template",
    "{% generation %}": "line 1 of the template",
    "{% break %}": "",
}


@pytest.mark.parametrize("template", REFUSED)
def test_d12_a_template_that_refuses_gets_one_line(template: str) -> None:
    with pytest.raises(InputError, match="chat template does not take.*" + REFUSED[template]) as error:
        ChatTemplate(template).render(MESSAGES)
    assert "\n" not in str(error.value)


EXTENSIONS = {
    "generation": "{% for m in messages %}{% if m.role == 'JULIET' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "generation, white space": "{% for m in messages %}\n  {% generation %}\n  {{- m.content }}  \n  {% endgeneration %}\n\n{%- endfor %}",
    "generation, scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "generation, nested": "{% generation %}a{% generation %}b{% endgeneration %}c{% endgeneration %}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ {'b': '<\u00e9>', 'a': 1} | tojson(sort_keys=true) }}",
    "tojson options": "{{ messages[0] | tojson(ensure_ascii=true, separators=(',', ':')) }}{{ ['\u00e9'] | tojson(true) }}",
    "loops": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "strftime_now": "{{ strftime_now('%Y') | length }}{% if strftime_now is defined %}yes{% endif %}",
    "namespace": "{% set n = namespace(found=false) %}{% for m in messages %}{% set n.found = true %}{% endfor %}{{ n.found }}",
    "undefined": "{{ nothing }}{{ tools is none }}{{ documents is defined }}{{ image_token is defined }}",
    "products": "{{ '-' * 3 }}{{ 2 ** 10 }}{{ 2 ** 0.5 }}{{ 2 ** -1 }}{{ 3 * '=' }}{{ [1] * 2 }}{{ 1.5 * 2 }}",
}


@pytest.mark.parametrize("name", EXTENSIONS)
def test_d12_the_extensions_of_transformers(name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), bos_token=SPECIAL[0], eos_token=SPECIAL[1])
    theirs.chat_template = EXTENSIONS[name]
    chat = ChatTemplate(EXTENSIONS[name], {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]})
    assert chat.render(MESSAGES, answer=False) == theirs.apply_chat_template(MESSAGES, tokenize=False)


def test_d12_the_verb_says_it_in_one_line(dlm: Dlm, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    zero = Path(shutil.copytree(base, tmp_path / "zero"))
    (zero / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 / 0 }}"}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
    assert "division by zero, line 1" in dlm.told("chat", str(zero))


@pytest.mark.parametrize("source", [3, ["a"], [{"name": 1}], {"a": 1}], ids=str)
def test_a_template_that_is_no_text_is_damage(tmp_path: Path, source: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    with pytest.raises(InputError, match="is damaged"):
        ChatTemplate.load(tmp_path)


def test_a_template_runs_in_a_sandbox() -> None:
    with pytest.raises(InputError, match="unsafe"):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}").render(MESSAGES)


def test_a_long_conversation_is_told(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="begin a new one"):
        lm.chat_canvas([{"role": "R", "content": "O Romeo, Romeo " * 40}])
    canvas = lm.chat_canvas([{"role": "R", "content": "O"}], max_new_tokens=10_000)
    assert canvas.tokens_BT.shape == (1, lm.window)


def test_the_verb(dlm: Dlm, base: Path, masked_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One answer a line, each the greedy text after the conversation so far; a line that cannot be read costs no turn."""
    lines = ["But soft", "", "\u00e9", "O Romeo"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    code, out, err = dlm("chat", str(base), "--max-new-tokens", "6", "--system", "light")
    assert code == 0
    assert "no token for" in err
    assert "U+00E9" in err
    model, messages, expected = load(str(base)), [{"role": "system", "content": "light"}], ""
    for line in (lines[0], lines[3]):
        messages.append({"role": "user", "content": line})
        canvas = model.chat_canvas(messages, max_new_tokens=6)
        *_, frame = model.stream(canvas=canvas, temperature=0.0)
        text = model.tokenizer.decode([i for i in frame.tokens_BT[0, canvas.given_BT[0].sum() :].tolist() if i not in model.stops])
        messages.append({"role": "assistant", "content": text})
        expected += text + "\n"
    assert out == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert dlm("chat", str(base), "--max-new-tokens", "6", "--system", "light", "--lossless")[:2] == (0, expected)
    for words in (("--draft", "ngram", "--draft-tokens", "2"), ("--draft", "self:int4"), ("--top-k", "1", "--temperature", "1")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        assert dlm("chat", str(base), "--max-new-tokens", "6", "--system", "light", *words)[:2] == (0, expected)
    assert "--lossless chooses the drafter" in dlm.told("chat", str(base), "--draft", "ngram", "--lossless")
    assert "no chat template" in dlm.told("chat", str(masked_dir))
    assert "--max-new-tokens" in dlm.told("chat", str(base), "--max-new-tokens", "0")


def test_commands_of_the_verb(dlm: Dlm, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After /clear an answer is that of a new conversation; nothing after /quit is read."""
    words = ("chat", str(base), "--max-new-tokens", "6")
    monkeypatch.setattr(sys, "stdin", io.StringIO("But soft\n/help\n/clear\nBut soft\n/quit\nO Romeo\n"))
    code, out, err = dlm(*words)
    assert code == 0
    first, again = out.splitlines()
    assert first == again
    for name in ("/help", "/clear", "/quit", "Ctrl-C stops an answer"):
        assert name in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("O Romeo " * 60 + "\n"))
    assert "begin a new one\n" in dlm(*words)[2]


def test_ctrl_c_stops_the_answer_and_not_the_chat(dlm: Dlm, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes after the second token of the first answer; the second answer follows the part that was written."""
    step, taken = Run.step, 0

    def interrupted(run: Run) -> Frame | None:
        nonlocal taken
        taken += 1
        if taken == 3:
            signal.raise_signal(signal.SIGINT)
        return step(run)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell that runs the tests in the background has ignored
    monkeypatch.setattr(Run, "step", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("But soft\nO Romeo\n"))
    code, out, err = dlm("chat", str(base), "--max-new-tokens", "6")
    assert code == 0
    assert "stopped; what stands there is kept as the answer" in err
    monkeypatch.setattr(Run, "step", step)
    model, messages, expected = load(str(base)), [{"role": "user", "content": "But soft"}], ""
    for count, line in ((3, "O Romeo"), (6, "")):
        canvas = model.chat_canvas(messages, max_new_tokens=6)
        frames = list(model.stream(canvas=canvas, temperature=0.0))
        first = int(canvas.given_BT[0].sum())
        ids = frames[min(count, len(frames)) - 1].tokens_BT[0, first : first + count].tolist()
        text = model.tokenizer.decode([i for i in ids if i not in model.stops])
        expected += text + "\n"
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": line}]
    assert out == expected


def test_generate_says_that_it_does_not_chat(dlm: Dlm, base: Path, masked_dir: Path) -> None:
    hint = f"To ask the model: dlm chat {base}"
    words = ("--max-new-tokens", "3")
    assert hint in dlm("generate", "But soft", str(base), *words)[2]
    assert hint not in dlm("generate", "--model", str(base), *words)[2]  # no question
    assert "dlm chat" not in dlm("generate", "But soft", str(masked_dir), *words)[2]


@pytest.mark.slow
@pytest.mark.parametrize("key", [b"\x03", b"\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_it_ends_cleanly(base: Path, key: bytes) -> None:
    control, terminal = pty.openpty()

    def own() -> None:  # a key becomes a signal only in the terminal of the process
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that runs the tests in the background has it ignored

    words = [sys.executable, "-m", "dlm", "chat", str(base), "--max-new-tokens", "3"]
    pipes: dict[str, Any] = {"stdin": terminal, "stdout": terminal, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, start_new_session=True, preexec_fn=own, **pipes) as process:
        os.close(terminal)
        try:
            seen, begin = b"", time.monotonic()
            while b"> " not in seen and time.monotonic() - begin < 60:
                if select.select([control], [], [], 1)[0]:
                    seen += os.read(control, 1000)
            os.write(control, key)
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0
            assert b"> " in seen
            assert b"Traceback" not in said
        finally:
            process.kill()
            os.close(control)
