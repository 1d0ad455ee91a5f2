"""The page in a real browser, against the real server: what a user does, with the mouse, with keys alone, on a phone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dlm
from dlm.language_model import LanguageModel
from serve.visitor import CHROMIUM, User, browses

pytestmark = pytest.mark.browser

MODELS = ("shakespeare-mask", "shakespeare-hybrid", "shakespeare-uniform", "shakespeare-ar")


@pytest.fixture(scope="module")
def models() -> list[LanguageModel]:
    return [dlm.load(name) for name in MODELS]


@pytest.fixture(scope="module")
def server(models: list[LanguageModel]) -> Iterator[str]:
    """The address of a server of the bundled models."""
    from serve.serving import serving

    with serving(models) as made:
        yield made.url + "/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def visit(browser: Any, server: str) -> Iterator[Callable[..., User]]:
    users: list[User] = []

    def go(path: str = "", at: str = server, **context: Any) -> User:
        users.append(User(browser, at, path, **context))
        return users[-1]

    yield go
    for user in users:
        user.context.close()
    for user in users:
        user.settled()


@browses
def test_the_four_states(visit: Callable[..., User]) -> None:
    user = visit()
    user.tab.evaluate(
        """() => {
            window.seen = {};
            const note = span => {
                const [tok, state] = span.className.split(' '), s = getComputedStyle(span);
                const form = [s.fontStyle, s.textDecorationLine, s.textDecorationStyle, s.backgroundImage, s.textShadow].map(String);
                if (tok === 'tok') seen[state] ??= form.map(word => word.replace(/rgba?\\([^)]*\\)/g, '')).join();
            };
            new MutationObserver(all => all.forEach(one => one.target.matches('span') && note(one.target)))
                .observe(document.getElementById('panes'), { subtree: true, attributes: true, attributeFilter: ['class'] });
        }"""
    )
    text = user.generate("ROMEO:", length=48, steps=8, seed=3)
    assert text.startswith("ROMEO:")
    assert len(text) == 48
    assert "█" not in text
    assert "100% settled" in user.facts()
    assert "tokens a pass" in user.facts()
    assert "seed 3" in user.facts()
    assert user.sent[0]["steps"] == 8
    assert user.sent[0]["length"] == 48
    assert user.sent[0]["model"] == "shakespeare-mask"
    assert user.states() == "g" * 6 + "c" * 42
    user.generate(noise="uniform", length=48, steps=6)
    assert user.sent[1]["model"] == "shakespeare-uniform"
    looks = user.tab.evaluate("window.seen")
    assert set("nfcgd") <= set(looks)
    told_apart = {looks[state] for state in "nfcd"}
    assert len(told_apart) == 4, f"told by colour alone: {looks}"
    said = str(user.tab.text_content("#said"))
    assert said.startswith("Done. 42 tokens in 6 forward passes: ROMEO:")


@browses
def test_the_scrubber(visit: Callable[..., User]) -> None:
    user = visit()
    end = user.generate("ROMEO:", length=40, steps=6, seed=1)
    passes = user.passes()
    assert passes > 2
    assert user.tab.text_content("#clock") == f"{passes} / {passes}"
    user.tab.locator("body").press("Home")
    assert user.text() == "ROMEO:" + "█" * 34
    assert user.passes() == 0
    shown = [user.text()]
    for k in range(1, passes + 1):
        user.tab.locator("body").press("ArrowRight")
        assert user.passes() == k
        shown.append(user.text())
        fresh = [i for i, state in enumerate(user.states()) if state == "f"]
        assert all(shown[k - 1][i] == "█" != shown[k][i] for i in fresh)
        assert fresh or k == passes  # what has come to rest is no longer fresh
    assert shown[-1] == end
    assert len({text.count("█") for text in shown}) == passes + 1
    user.tab.locator("body").press("ArrowLeft")
    assert user.text() == shown[-2]
    user.tab.locator("#at").fill("2")
    assert user.text() == shown[2]
    user.tab.select_option("#speed", "4")
    user.tab.locator("body").press("End")
    user.tab.click("#play")
    user.tab.wait_for_selector("#play[aria-label=Pause]")
    user.tab.locator("body").press("Space")
    user.tab.wait_for_selector("#play[aria-label=Play]")
    user.tab.click("#play")
    user.tab.wait_for_function("n => document.getElementById('clock').textContent === `${n} / ${n}`", arg=passes)


@browses
def test_hover_and_heat(visit: Callable[..., User]) -> None:
    user = visit(reduced_motion="no-preference")
    user.tab.select_option("#speed", "4")
    user.generate("ROMEO:", length=40, steps=5, seed=1)
    user.token(20).hover()
    card = str(user.tab.text_content("#card"))
    assert re.search(r"committed · at pass \d", card)
    assert re.search(r"confidence\d+%", card)
    assert user.tab.locator("#card .odds").count() == 4  # its own, and three alternatives
    user.tab.mouse.move(2, 2)
    assert user.tab.is_hidden("#card")
    user.tab.click("#heat")
    heats = user.tab.locator(".pane .heat").evaluate_all("all => all.map(s => +/ h(\\d+)/.exec(s.className)[1])")
    assert len(heats) == 34
    assert min(heats) == 0
    assert max(heats) > 5
    assert user.tab.is_visible("#ramp")
    assert user.tab.is_hidden("#legend")
    user.tab.locator("body").press("h")
    assert user.tab.locator(".pane .heat").count() == 0


@browses
def test_locked_tokens_stay(visit: Callable[..., User]) -> None:
    user = visit()
    before = user.generate("ROMEO:", length=48, steps=6, seed=2)
    user.lock(10, 11, 30)
    assert "3 tokens locked" in str(user.tab.text_content(".act"))
    user.token(0).click()  # a given token may go too
    user.tab.wait_for_selector("[data-i='0']:not(.locked)")
    user.tab.click("text=Regenerate the rest")
    after = user.done()
    row = user.sent[1]["canvas"]
    assert [i for i, token in enumerate(row) if token is not None] == [1, 2, 3, 4, 5, 10, 11, 30]
    assert all(isinstance(token, int) for token in row if token is not None)
    assert len(after) == 48
    assert all(before[i] == after[i] for i in (1, 5, 10, 11, 30))
    assert before != after
    assert user.states()[10] == "g"
    assert "3 tokens locked" in str(user.tab.text_content(".act"))  # of the user; the prompt is locked by itself
    link = user.tab.url
    user.tab.click("text=Regenerate the rest")  # what was kept is still kept
    assert all(before[i] == user.done()[i] for i in (10, 11, 30))
    other = visit("#" + link.partition("/#")[2])
    assert other.done() == after
    assert "3 tokens locked" in str(other.tab.text_content(".act"))
    other.tab.click("text=Unlock all")
    assert other.tab.locator(".pane .locked").count() == 5  # the rest of the prompt


@browses
def test_tokens_clicked_quickly_one_after_another_are_all_locked(visit: Callable[..., User]) -> None:
    user = visit()
    user.generate("ROMEO:", length=48, steps=6, seed=2)
    for i in (10, 20, 30, 40):  # nobody waits between two
        user.token(i).click()
    assert "4 tokens locked" in str(user.tab.text_content(".act"))
    user.token(20).click()
    assert "3 tokens locked" in str(user.tab.text_content(".act"))
    user.token(25).dblclick()  # which is no lock
    user.tab.locator(".rewrite").press("Escape")
    assert "3 tokens locked" in str(user.tab.text_content(".act"))


@browses
def test_a_range_of_tokens_is_locked(visit: Callable[..., User]) -> None:
    user = visit()
    user.generate("ROMEO:", length=48, steps=6, seed=2)
    user.token(12).click()
    user.token(20).click(modifiers=["Shift"])
    assert "9 tokens locked" in str(user.tab.text_content(".act"))
    user.tab.click("text=Unlock all")
    user.token(30).focus()
    user.tab.keyboard.press("Space")
    user.token(34).focus()
    user.tab.keyboard.press("Shift+Space")
    assert "5 tokens locked" in str(user.tab.text_content(".act"))
    assert user.tab.is_hidden("[data-act=range]")
    user.tab.evaluate(
        """() => {
            const at = i => document.querySelector(`.pane [data-i='${i}']`).firstChild;
            getSelection().setBaseAndExtent(at(8), 0, at(10), 1);
        }"""
    )
    user.tab.click("text=Lock the selection")
    assert "8 tokens locked" in str(user.tab.text_content(".act"))
    user.tab.click("text=Regenerate the rest")
    user.done()
    kept = [i for i, token in enumerate(user.sent[1]["canvas"]) if token is not None]
    assert kept == [0, 1, 2, 3, 4, 5, 8, 9, 10, 30, 31, 32, 33, 34]


@browses
def test_two_noises_are_masks_and_the_uniform_one(visit: Callable[..., User]) -> None:
    user = visit()
    user.tab.click("text=two noises")
    user.done()
    assert [body["model"] for body in user.sent] == ["shakespeare-mask", "shakespeare-uniform"]


@browses
def test_rewriting(visit: Callable[..., User]) -> None:
    user = visit()
    before = user.generate("ROMEO:", length=40, steps=5, seed=2)
    user.token(12).dblclick()
    user.tab.locator(".rewrite").fill("Tybalt")
    user.tab.locator(".rewrite").press("Enter")
    assert user.token(12).text_content() == "Tybalt"
    user.token(20).dblclick()
    user.tab.locator(".rewrite").fill("Q")
    user.tab.locator(".rewrite").press("Escape")
    assert str(user.tab.text_content(".act .tip")) == "1 token locked"
    user.tab.locator("body").press("Escape")
    user.tab.click("text=Regenerate the rest")
    after = user.done()
    assert user.sent[1]["canvas"][12] == "Tybalt"
    assert user.sent[1]["canvas"][20] is None
    assert after[12:18] == "Tybalt"
    assert len(after) == len(before) + 5
    assert user.tab.locator(".pane .locked").count() == 12  # ROMEO: and Tybalt
    user.token(12).hover()
    assert "given" in str(user.tab.text_content("#card"))


@browses
def test_empty_fields_show_the_usual_values(visit: Callable[..., User]) -> None:
    user = visit()
    placeholders = {name: user.tab.get_attribute(f"[name={name}]", "placeholder") for name in ("temperature", "length", "steps")}
    assert placeholders == {"temperature": "1", "length": "256", "steps": "256"}
    assert user.tab.text_content("#hint") == "___ is a hole of three tokens, [12] one of twelve."


@browses
def test_holes(visit: Callable[..., User]) -> None:
    user = visit()
    user.set("ROMEO:\n[4] me ____, \\[3]")
    assert user.tab.text_content("#hint") == "2 holes, 8 tokens to fill."
    assert user.tab.locator(".preview .mask").count() == 8
    user.tab.fill("#prompt", "ROMEO:\n[4] me ____, love")
    text = user.generate(steps=4, seed=1)
    assert user.sent[0]["canvas"] == ["ROMEO:\n", *[None] * 4, " me ", *[None] * 4, ", love"]
    assert re.fullmatch(r"ROMEO:\n[\s\S]{4} me [\s\S]{4}, love", text)
    user.set(model="shakespeare-ar")
    assert "cannot fill holes" in str(user.tab.text_content("#hint"))


@browses
def test_side_by_side(visit: Callable[..., User]) -> None:
    user = visit(viewport={"width": 1440, "height": 900})
    user.tab.click("#compare")
    assert user.tab.locator("[name=noise]").nth(1).input_value() == "uniform"  # another noise is what one would compare
    user.set("The king, the king, the", length=60, steps=8, seed=4)
    user.set(side=1, model="shakespeare-ar", sampler="lookup", length=60, seed=4, temperature=0.5)
    user.tab.click("#generate")
    user.done()
    assert {body["model"] for body in user.sent} == {"shakespeare-mask", "shakespeare-ar"}
    assert [len(user.text(side)) for side in (0, 1)] == [60, 60]
    least, most = user.passes(0), user.passes(1)
    assert least <= 8 < most
    user.tab.locator("body").press("Home")
    for k in range(1, most + 1):  # one axis: the same number of forward passes on both sides, until one is done
        user.tab.locator("body").press("ArrowRight")
        assert (user.passes(0), user.passes(1)) == (min(k, least), k)
    left, right = (user.tab.locator(".pane").nth(side).bounding_box() for side in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    mine = user.text(0)
    user.tab.locator(".pane").nth(1).get_by_text("Regenerate the rest").click()
    user.done()
    assert len(user.sent) == 3
    assert user.sent[2]["model"] == "shakespeare-ar"
    assert user.text(0) == mine


@browses
def test_draft_tokens(visit: Callable[..., User]) -> None:
    user = visit()
    text = user.generate("ROMEO:\nThe king, the king, the", model="shakespeare-ar", sampler="lookup", length=60, seed=1, temperature=0.5)
    assert len(text) == 60
    user.tab.locator("body").press("Home")
    states = ""
    for _ in range(user.tab.evaluate("+document.getElementById('at').max")):
        user.tab.locator("body").press("ArrowRight")
        states += user.states() + "s" * user.tab.locator("[data-struck]").count()
    assert "d" in states
    assert "x" in states or "s" in states
    assert "f" in states


@browses
def test_exports(visit: Callable[..., User], tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from PIL import Image

    user = visit()
    text = user.generate("ROMEO:", length=40, steps=4, seed=1)
    files = {}
    for format in ("html", "gif", "json"):
        user.tab.click("#keep summary")
        with user.tab.expect_download() as download:
            user.tab.click(f"[data-format={format}]")
        files[format] = tmp_path / f"run.{format}"
        download.value.save_as(files[format])
    trace = json.loads(files["json"].read_text())["traces"][0]
    assert trace["begin"]["seed"] == 1
    assert trace["end"]["text"] == text
    with Image.open(files["gif"]) as picture:
        assert getattr(picture, "n_frames", 1) > 4
    replay, complaints = user.context.new_page(), []  # type: Any, list[str]
    replay.on("pageerror", lambda error: complaints.append(str(error)))
    replay.goto(files["html"].as_uri() + "#at=1")
    replay.wait_for_selector(".text .line")
    lines = [str(line.text_content()) for line in replay.locator(".line").all()]
    assert "".join(lines) == text.replace("\n", "")
    assert not complaints


def tab_to(user: User, script: str, value: str | None = None) -> None:
    """Press Tab until the script tells this value, or any."""
    for _ in range(40):
        here = user.tab.evaluate(script)
        if here == value if value else here:
            return
        user.tab.keyboard.press("Tab")
    pytest.fail(f"{script} cannot be reached by Tab")


@browses
def test_keys_alone(visit: Callable[..., User]) -> None:
    user = visit()
    press = user.tab.keyboard.press
    press("/")
    user.tab.keyboard.type("ROMEO:")
    for name, value in (("steps", "5"), ("length", "40"), ("seed", "7")):
        tab_to(user, "document.activeElement.name", name)
        user.tab.keyboard.type(value)
    press("Control+Enter")
    before = user.done()
    tab_to(user, "document.activeElement.dataset.i")
    outline = user.tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    press("End")
    press("ArrowLeft")
    here = int(user.tab.evaluate("document.activeElement.dataset.i"))
    assert here == 38
    assert user.tab.is_visible("#card")
    press("Space")
    assert "locked" in user.token(38).get_attribute("class")
    assert "confidence" in user.token(38).get_attribute("aria-label")
    assert user.token(38).get_attribute("aria-pressed") == "true"
    press("ArrowUp")
    up = int(user.tab.evaluate("document.activeElement.dataset.i"))
    assert up < 38
    press("Home")
    for _ in range(10):
        press("ArrowRight")
    press("Enter")
    user.tab.keyboard.type("Q")
    press("Enter")
    assert user.tab.evaluate("document.activeElement.dataset.i") == "10"
    press("ArrowRight")
    press("1")  # the likeliest alternative
    chosen = user.token(11).text_content()
    press("r")
    user.tab.wait_for_selector("body.running", state="attached")
    after = user.done()
    assert after[10] == "Q"
    assert after[38] == before[38]
    assert after[11] == chosen or chosen in " ↵"
    press("?")
    assert user.tab.is_visible("#help")
    press("Escape")
    assert user.tab.is_hidden("#help")


@browses
def test_dark_phone_and_still(visit: Callable[..., User]) -> None:
    phone = visit(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, color_scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    assert phone.tab.evaluate(colour) == "rgb(14, 16, 22)"
    assert phone.tab.is_hidden("[name=steps] >> nth=0")
    phone.tab.click("#more")
    phone.generate("ROMEO:", steps=3, length=90)
    assert phone.tab.evaluate("document.documentElement.scrollWidth") <= 360
    phone.tab.click("#compare")
    assert phone.tab.evaluate("document.documentElement.scrollWidth") <= 360
    small = phone.tab.evaluate(
        """[...document.querySelectorAll('button, select, input, summary')].filter(e => e.checkVisibility())
        .filter(e => e.getBoundingClientRect().height < 24).map(e => e.outerHTML)"""
    )
    assert small == []  # large enough for a finger (WCAG 2.5.8)
    first = phone.tab.locator(".tok.c").first
    assert first.evaluate("s => getComputedStyle(s).transitionDuration") == "0s"
    assert phone.tab.evaluate("document.getAnimations().length") == 0
    phone.tab.click("#theme")
    assert phone.tab.evaluate(colour) == "rgb(251, 250, 247)"
    phone.tab.reload()
    phone.tab.wait_for_selector("#try button")
    assert phone.tab.evaluate(colour) == "rgb(251, 250, 247)"
    light = visit(color_scheme="light")
    assert light.tab.evaluate(colour) == "rgb(251, 250, 247)"


@browses
def test_errors_and_stop(visit: Callable[..., User]) -> None:
    user = visit()
    before = user.generate("ROMEO:", length=30, steps=3, seed=1)
    user.set("ROMEO: \u65e5")
    user.tab.click("#generate")
    user.tab.wait_for_selector("#error:not([hidden])")
    assert "no token" in str(user.tab.text_content("#error"))
    assert user.done() == before  # the last text stands
    user.set("ROMEO:", length=0)
    user.tab.click("#generate")
    assert str(user.tab.text_content("#error")).startswith("Length: ")
    assert len(user.sent) == 2
    user.set(length="", steps=256)
    user.tab.click("#generate")
    user.tab.locator(".facts", has_text=re.compile(r"pass\s[1-9]\d*\sof\s256")).first.wait_for()
    assert user.tab.is_hidden("#error")
    user.tab.click("#stop")
    user.done()
    assert user.tab.is_visible("#generate")
    assert 0 < user.passes() < 256
    assert "█" in user.text()
    refused = [text for text in user.complaints if "status of 400" in text]
    assert len(refused) == 1  # which the browser says of every refused request
    user.complaints.remove(refused[0])


@browses
def test_a_link_reproduces_the_run(visit: Callable[..., User]) -> None:
    user = visit()
    text = user.generate("ROMEO:", length=40, steps=4, temperature=0.8)  # the seed is drawn here
    link = user.tab.url
    other = visit(link.partition("/#")[2] and "#" + link.partition("/#")[2])
    assert other.done() == text
    user.lock(20)
    user.tab.click("text=Regenerate the rest")
    again = user.done()
    third = visit("#" + user.tab.url.partition("/#")[2])
    assert third.done() == again
    lost = visit("#prompt=A&model=elsewhere")
    assert "elsewhere, is not served here" in str(lost.tab.text_content("#error"))
    assert not lost.sent


@browses
def test_a_key(visit: Callable[..., User], models: list[LanguageModel]) -> None:
    from dlm.serve.guard import Limits
    from serve.serving import serving

    with serving(models[:1], Limits(keys=("sesame",))) as guarded:
        user = visit(at=guarded.url + "/")
        assert user.tab.is_visible("#token")
        user.tab.fill("#token", "sesame")
        user.tab.click("#unlock")
        user.tab.wait_for_selector("#try button")
        assert user.tab.is_hidden("#key")
        assert user.tab.is_hidden("#error")
        assert len(user.generate("ROMEO:", length=20, steps=2)) == 20
        assert user.tab.evaluate("sessionStorage.getItem('dlm-api-key')") == "sesame"
        assert user.tab.evaluate("localStorage.length") == 0
        assert "sesame" not in user.tab.url
        refused = [text for text in user.complaints if "status of 401" in text]
        assert len(refused) == 1
        user.complaints.remove(refused[0])
        user.context.close()


@browses
def test_a_puzzle_is_drawn_as_a_grid_that_settles(visit: Callable[..., User]) -> None:
    from serve.serving import serving

    with serving([dlm.load("sudoku-4")]) as made:
        user = visit(at=made.url + "/")
        user.set("1 2 | 3")
        assert str(user.tab.text_content("#hint")).startswith("3 of 16 cells")
        user.tab.click("#generate")
        assert user.tab.locator("#error").text_content() == user.tab.text_content("#hint")
        assert user.sent == []
        user.set("")
        user.tab.click("#try button")
        assert re.fullmatch("[1-4]{16}", user.done())
        assert user.sent[0]["canvas"] == [None if cell == "." else cell for cell in "1...2..1.14....."]
        assert (user.sent[0]["sampler"], user.sent[0]["temperature"]) == ("margin", 0)
        where = [user.token(i).bounding_box() for i in (0, 3, 4)]
        assert where[0]["y"] == where[1]["y"] < where[2]["y"]
        assert where[0]["x"] == where[2]["x"] < where[1]["x"]
        weights = [user.token(i).evaluate("cell => getComputedStyle(cell).fontWeight") for i in (0, 1)]
        assert weights == ["700", "400"]  # a given cell is bold
        user.tab.locator("body").press("Home")
        assert user.text() == "1███2██1█14█████"


@browses
def test_a_model_of_another_project_and_characters_of_several_tokens(visit: Callable[..., User]) -> None:
    """A golden LLaDA, whose tokens are bytes: CJK and emoji in the prompt, around holes and in a token that is written anew."""
    from serve.serving import serving

    with serving([dlm.load(str(Path(__file__).parents[1] / "golden" / "llada"))]) as made:
        user = visit(at=made.url + "/")
        text = user.generate("日本[6]語 🙂[4]🎉 end", steps=5, seed=1)
        assert user.sent[0]["canvas"] == ["日本", *[None] * 6, "語 🙂", *[None] * 4, "🎉 end"]
        assert re.fullmatch("日本.+語 🙂.+🎉 end", text, re.DOTALL)
        user.lock(8)
        user.token(7).dblclick()
        user.tab.locator(".rewrite").fill("👩‍👧 書")
        user.tab.locator(".rewrite").press("Enter")
        user.tab.click("text=Regenerate the rest")
        after = user.done()
        assert "👩‍👧 書" in user.sent[1]["canvas"]
        assert "👩‍👧 書" in after
        assert after.startswith("日本")
        assert after.endswith("🎉 end")
        answer = user.generate("こんにちは 🙂", steps=4, length=12, seed=1)  # a message of its chat template
        assert user.sent[2]["messages"] == [{"role": "user", "content": "こんにちは 🙂"}]
        assert answer
        user.context.close()
        user.settled()
