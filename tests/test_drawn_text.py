"""Runs of models whose characters lie in several tokens: every picture of a finished run shows its text, and every frame what it holds."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conftest import Dlm, make_model
from dlm.errors import InputError
from dlm.language_model import LanguageModel
from dlm.spelling import MASK, REPLACEMENT
from dlm.trajectory import Trajectory
from dlm.viz import layout
from dlm.viz.html import write_html
from dlm.viz.terminal import LiveView
from kinds import kinds
from viz.test_html import Page, replayed

KINDS = {
    name: tokenizer
    for name, tokenizer in kinds().items()
    if name in ("bytes", "byte-level", "sentencepiece, first", "sentencepiece, normalizer")
}
PROMPT = "the king 天地🙂"


@pytest.fixture(scope="module", params=[(name, objective) for name in KINDS for objective in ("diffusion", "autoregressive")], ids=str)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    name, objective = request.param
    made = make_model(objective, tokenizer=KINDS[name], window=48)
    made.name = f"{name}-{objective}".replace(", ", "-")
    return made


@pytest.fixture(scope="module")
def run(lm: LanguageModel) -> tuple[str, Trajectory]:
    made = lm.generate(PROMPT, max_new_tokens=16, seed=1, steps=5 if lm.is_diffusion else None)
    return made.text, made.trajectory


def test_d8_every_picture_of_a_finished_run_shows_its_text(lm: LanguageModel, run: tuple[str, Trajectory], tmp_path: Path) -> None:
    text, trajectory = run
    *_, last = trajectory.frames()
    assert text.startswith(PROMPT)
    assert lm.decode(last) == text
    assert trajectory.text() == text
    assert "".join(layout.pieces(trajectory, 0)) == text
    trajectory.save(tmp_path / "run.traj")
    again = Trajectory.load(tmp_path / "run.traj")
    assert again.text() == text
    write_html([("", again)], tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    [pane] = json.loads(Page(page).data)
    assert replayed(pane) == text
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=60)
    with LiveView(again, console):
        pass
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "天地🙂" in plain


def test_d8_every_frame_is_drawn_alike(lm: LanguageModel, run: tuple[str, Trajectory], tmp_path: Path) -> None:
    """In the page as from the tokens; a character of the prompt is whole from the first frame on."""
    _, trajectory = run
    write_html([("", trajectory)], tmp_path / "run.html")
    [pane] = json.loads(Page((tmp_path / "run.html").read_text(encoding="utf-8")).data)
    for k, frame in enumerate(trajectory.frames()):
        drawn = lm.decode(frame)
        assert replayed(pane, k) == drawn
        assert drawn.startswith(PROMPT)
        assert drawn.count(MASK) == int((frame.tokens_BT == lm.tokenizer.mask_id).sum())
        assert len(pane["tokens"]) == len(pane["pieces"])


def test_d8_show_prints_the_text(dlm: Dlm, run: tuple[str, Trajectory]) -> None:
    text, trajectory = run
    trajectory.save("run.traj")
    assert dlm("show", "run.traj")[:2] == (0, text + "\n")


@pytest.mark.parametrize("kind", KINDS)
def test_d10_suffix_and_template_end_as_they_were_written(kind: str) -> None:
    lm = make_model(tokenizer=KINDS[kind], window=48)
    for suffix in ("ly", " my lord", "天"):
        text = lm.generate(PROMPT, suffix=suffix, max_new_tokens=3, steps=3, seed=1).text
        assert text.startswith(PROMPT)
        assert text.endswith(suffix)
        assert not text.endswith(" " + suffix) or "ly" not in suffix
    text = lm.generate(template="the king ____ly", steps=4, seed=1).text
    assert text.startswith("the king ")
    tail = lm.tokenizer.encode("ly", "inside")
    assert lm.canvas(template="the king ____ly").tokens_BT[0, -len(tail) :].tolist() == tail
    assert text.endswith("ly")


WRITTEN = {
    "[A-Za-z ]+": "the king",
    "[A-Za-z]+": "the",
    "天.*": "天",
    "[天地🙂]+": "",
    ".*é.*": "",
    r"(the|天) [^a-z ]+🙂": "the ",
    r"\S{5,} \S+": "",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", WRITTEN)
def test_d9_what_is_written_matches_the_pattern(kind: str, pattern: str) -> None:
    lm = make_model(tokenizer=KINDS[kind], window=48)
    prompt, length = WRITTEN[pattern], 12
    if kind.startswith("sentencepiece") and prompt.endswith(" "):
        prompt = prompt.rstrip()
    for seed in range(3):
        text = lm.generate(prompt, max_new_tokens=length, steps=4, pattern=pattern, seed=seed).text
        assert re.fullmatch(pattern, text, re.ASCII), (text, lm.tokenizer.encode(prompt))
        assert text.startswith(prompt)
    with pytest.raises(InputError, match="no match of"):
        lm.generate("{}", max_new_tokens=4, pattern="[A-Za-z]+")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("allow", ["abcdefghijklmnopqrstuvwxyz", "天地", "é 天ab"])
def test_d9_no_character_outside_the_allowed_ones_is_written(kind: str, allow: str) -> None:
    lm = make_model(tokenizer=KINDS[kind], window=48)
    for seed in range(3):
        text = lm.generate("O 大!", max_new_tokens=12, steps=4, allow=allow, seed=seed).text
        assert text.startswith("O 大!")
        assert set(text.removeprefix("O 大!")) <= set(allow)
        assert len(text) > 5
    both = lm.generate("O 大!", max_new_tokens=13, steps=4, allow=allow + "b", pattern="[^b]*b[^b]*", seed=1).text
    assert re.fullmatch("O 大![^b]*b[^b]*", both)
    assert set(both.removeprefix("O 大!")) <= set(allow + "b")


# --- the server and its page -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Any, list[LanguageModel]]]:
    pytest.importorskip("fastapi")
    from serve.serving import serving

    models = []
    for number, (name, tokenizer) in enumerate(KINDS.items()):
        for objective in ("diffusion", "autoregressive") if name != "byte-level" else ("diffusion",):
            lm = make_model(objective, tokenizer=tokenizer, window=48)
            lm.name = f"{objective}-{number}"
            models.append(lm)
    with serving(models) as made:
        yield made, models


def asked(lm: LanguageModel) -> dict[str, Any]:
    """For an autoregressive model with draft tokens."""
    how = {"steps": 6} if lm.is_diffusion else {"sampler": "lookup:3"}
    return {"model": lm.name, "prompt": PROMPT, "max_tokens": 14, "seed": 3, **how}


def after(events: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    """The text after each event, put together as the page does."""
    row: list[str] = []
    for name, data in events:
        if name == "begin":
            row = [text for _, text in data["tokens"]]
        for position, _, text, state, *_ in data.get("changed", []):
            row[position] = "" if state == "n" else text
        if name != "end":
            yield "".join(row)


def test_d8_native_events_lead_to_the_text(served: tuple[Any, list[LanguageModel]]) -> None:
    from dlm.serve.export import pane

    server, models = served
    for lm in models:
        events = server.native(asked(lm))
        texts, end = list(after(events)), events[-1][1]
        assert texts[0] == PROMPT
        assert texts[-1] == end["text"] == lm.generate(PROMPT, max_new_tokens=14, seed=3, steps=6 if lm.is_diffusion else None).text
        trace = {"begin": events[0][1], "steps": [data for name, data in events if name == "step"]}
        assert pane(trace)[1].text() == end["text"]
        states = {state for step in trace["steps"] for _, _, _, state, *_ in step["changed"]}
        assert states <= set("fcdnx")


def test_d8_a_character_grows_in_native_events(served: tuple[Any, list[LanguageModel]]) -> None:
    """Some steps of a model of bytes tell tokens that stay, whose neighbour has completed a character: their state is kept."""
    server, models = served
    retold = 0
    for seed in range(6):
        events = server.native(asked(models[0]) | {"seed": seed})
        tokens = [token for token, _ in events[0][1]["tokens"]]
        for name, data in events:
            for position, token, *_ in data["changed"] if name == "step" else []:
                retold += tokens[position] == token
                tokens[position] = token
    assert retold > 0


def test_d8_diffusing_chunks_are_the_frames(served: tuple[Any, list[LanguageModel]]) -> None:
    server, models = served
    for lm in models:
        whole = server.post("/v1/completions", asked(lm)).json()["choices"][0]["text"]
        texts = [chunk["choices"][0]["text"] for chunk in server.chunks("/v1/completions", asked(lm) | {"diffusing": True})]
        assert texts[-1] == whole
        settled = texts[-2]
        assert settled.replace(REPLACEMENT, "") == whole.replace(REPLACEMENT, "") or MASK in settled


def test_models_of_bytes_are_not_told_as_models_of_characters(served: tuple[Any, list[LanguageModel]]) -> None:
    server, _ = served
    assert {model["dlm"]["characters"] for model in server.client.get("/v1/models").json()["data"]} == {False}


@pytest.mark.parametrize("count", [1, 5])
def test_d16_logprobs_tell_every_token_by_its_own_bytes(served: tuple[Any, list[LanguageModel]], count: int) -> None:
    server, models = served
    for lm in models:
        answer = server.post("/v1/completions", asked(lm) | {"logprobs": count, "echo": False}).json()["choices"][0]
        said = answer["logprobs"]
        assert "".join(said["tokens"]) == answer["text"]
        for top, logprob in zip(said["top_logprobs"], said["token_logprobs"], strict=True):
            assert len(top) in (count, count + 1)
            assert any(abs(value - logprob) < 1e-6 for value in top.values())
            assert REPLACEMENT not in "".join(top)


def test_d16_the_bytes_of_a_chat_joined_are_its_content(served: tuple[Any, list[LanguageModel]]) -> None:
    from dlm.text.chat import ChatTemplate

    server, models = served
    for lm in models:
        lm.chat = ChatTemplate("{% for m in messages %}{{ m.content }}\n{% endfor %}")
        messages = [{"role": "user", "content": PROMPT}]
        body = {"model": lm.name, "messages": messages, "max_tokens": 12, "seed": 4, "logprobs": True, "top_logprobs": 4}
        choice = server.post("/v1/chat/completions", body).json()["choices"][0]
        said = choice["logprobs"]["content"]
        assert bytes(byte for one in said for byte in one["bytes"]).decode("utf-8", "replace") == choice["message"]["content"]
        for one in said:
            assert len({(other["token"], *other["bytes"]) for other in one["top_logprobs"]}) == 4
            assert not any(REPLACEMENT in other["token"] for other in one["top_logprobs"])
        lm.chat = ChatTemplate()


SCRIPT = """
import {{ Trace }} from {module};
import {{ readFileSync }} from "node:fs";
const [[, begin], ...rest] = JSON.parse(readFileSync(0, "utf8"));
const trace = new Trace(begin), told = [trace.text()];
for (const [name, data] of rest) if (name === "step") {{ trace.add(data); told.push(trace.text()); }}
trace.over = true;
const states = trace.history.map((_, i) => trace.at(i, trace.last).state).join("");
process.stdout.write(JSON.stringify({{ told, settled: trace.settled.at(-1), changes: states }}));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is missing")
def test_d8_the_page_puts_the_text_together(served: tuple[Any, list[LanguageModel]]) -> None:
    """Its own code, on the events of the server: the text at every step, and no token counted twice."""
    import dlm.serve

    server, models = served
    module = Path(dlm.serve.__file__).parent / "page" / "trace.js"
    for lm in models:
        events = server.native(asked(lm))
        script = SCRIPT.format(module=json.dumps(module.as_uri()))
        done = subprocess.run(
            ["node", "--input-type=module", "-e", script], input=json.dumps(events), capture_output=True, text=True, check=True
        )
        found = json.loads(done.stdout)
        assert found["told"] == list(after(events))
        assert found["told"][-1] == events[-1][1]["text"]
        assert found["settled"] == 14
        assert set(found["changes"]) <= set("gcf")


EDITING = """
globalThis.matchMedia = () => ({{ matches: true }});
const {{ Trace }} = await import({trace}), editor = await import({editor});
import {{ readFileSync }} from "node:fs";
const {{ events, lock, write, text }} = JSON.parse(readFileSync(0, "utf8"));
const [[, begin], ...rest] = events, trace = new Trace(begin);
for (const [name, data] of rest) if (name === "step") trace.add(data);
trace.over = true;
const pane = {{ trace, locked: editor.given(begin), edited: new Map(), own: new Set() }};
for (const i of lock) if (!pane.locked.has(i)) editor.toggle(pane, i);
const kept = editor.canvas(pane).canvas;
editor.rewrite(pane, write, text);
const rewritten = editor.canvas(pane).canvas;
editor.toggle(pane, write);
process.stdout.write(JSON.stringify({{ kept, rewritten, loose: editor.canvas(pane).canvas }}));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is missing")
def test_d8_the_page_locks_and_rewrites_whole_characters(served: tuple[Any, list[LanguageModel]], tmp_path: Path) -> None:
    """Its own code: the canvas of the next request holds all tokens of a locked character, and none of a rewritten one. What comes of it
    holds the locked text as it was, and the rewritten one without a space of its own."""
    import dlm.serve

    server, models = served
    page = tmp_path / "page"  # as it is served: with the script that it shares with the replay
    shutil.copytree(Path(dlm.serve.__file__).parent / "page", page)
    shutil.copy(Path(dlm.__file__).parent / "viz" / "shared" / "blend.js", page)
    script = EDITING.format(**{name: json.dumps((page / f"{name}.js").as_uri()) for name in ("trace", "editor")})
    for lm in models:
        if not lm.is_diffusion:
            continue
        ids = lm.tokenizer.encode("the 天地 is")
        events = server.native({"model": lm.name, "canvas": [*ids, None, None, "天", None, "ly"], "steps": 4, "seed": 1})
        tokens = [token for token, _ in events[0][1]["tokens"]]
        heaven = lm.tokenizer.encode("天", "inside")
        end = len(ids) + 2 + len(heaven) - 1  # where the second 天 is shown
        body = {"events": events, "lock": [end], "write": end, "text": "人 b"}
        done = subprocess.run(
            ["node", "--input-type=module", "-e", script], input=json.dumps(body), capture_output=True, text=True, check=True
        )
        found = json.loads(done.stdout)
        begin = len(ids) + 2
        assert found["kept"] == [token if token != lm.tokenizer.mask_id else None for token in tokens]
        assert found["rewritten"][: begin + 1] == [*ids, None, None, "人 b"]
        assert len(found["rewritten"]) == len(tokens) - len(heaven) + 1
        assert found["loose"][begin : begin + len(heaven)] == [None] * len(heaven)
        again = server.native({"model": lm.name, "canvas": found["rewritten"], "steps": 4, "seed": 2})[-1][1]["text"]
        assert again.startswith("the 天地 is")
        assert "人 b" in again
        assert again.endswith("ly")
