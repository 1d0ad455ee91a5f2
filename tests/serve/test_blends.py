"""Noise on vectors on the server: the stream tells the blends of the run, the page draws them, and the kept replay draws the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import make_model
from dlm.language_model import LanguageModel
from serve.visitor import CHROMIUM, User, blends, browses

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
STEPS, LENGTH, PROMPT = 5, 12, "ab"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return make_model(noise={"process": "gaussian", "schedule": "linear"}, window=LENGTH)


@pytest.fixture(scope="module")
def served(lm: LanguageModel) -> Iterator[Any]:
    from serve.serving import serving

    with serving([lm]) as made:
        yield made


@pytest.fixture(scope="module")
def frames(lm: LanguageModel) -> list[list[tuple[int, list[tuple[str, float]]]]]:
    """The blends of every step of the same run by the library."""
    run = lm.generate(PROMPT, length=LENGTH, steps=STEPS, seed=3).trajectory
    return [
        [(i, [(run.piece(token), weight) for token, weight in likely]) for i, likely in run.likely(k, 0).items()]
        for k in range(1, len(run))
    ]


def test_the_stream_tells_the_likeliest_tokens(served: Any, frames: list[Any]) -> None:
    _, *steps, _ = served.native({"prompt": PROMPT, "length": LENGTH, "steps": STEPS, "seed": 3})
    assert len(steps) == len(frames) == STEPS
    for (_, step), wanted in zip(steps, frames, strict=True):
        assert [i for i, _ in step.get("blends", [])] == [i for i, _ in wanted]
        for (_, told), (_, known) in zip(step.get("blends", []), wanted, strict=True):
            assert [text for text, _ in told] == [text for text, _ in known]
            assert [share for _, share in told] == pytest.approx([share for _, share in known], abs=1e-5)
    assert len(frames[0]) == LENGTH - len(PROMPT)
    assert "blends" not in steps[-1][1]  # its tokens are drawn


@pytest.mark.browser
@browses
def test_page_and_replay_draw_each_token_as_strong_as_it_is_likely(served: Any, frames: list[Any], tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        user = User(browser, served.url + "/")
        text = user.generate(PROMPT, length=LENGTH, steps=STEPS, seed=3)
        assert user.tab.locator(".pane .l").count() == 0
        user.tab.locator("body").press("Home")
        for wanted in frames[:-1]:
            user.tab.locator("body").press("ArrowRight")
            check(blends(user.tab.locator(".pane .l")), wanted)
        user.token(4).hover()
        card = str(user.tab.text_content("#card"))
        assert "a blend" in card
        assert all(f"{n}  {one}" in card.replace("space", " ") for n, (one, _) in enumerate(dict(frames[-2])[4], 1))
        user.tab.locator("body").press("End")
        user.tab.click("#keep summary")
        with user.tab.expect_download() as download:
            user.tab.click("#keep [data-format=html]")
        download.value.save_as(tmp_path / "run.html")
        replay = user.context.new_page()
        for k, wanted in enumerate(frames, 1):
            replay.goto("about:blank")
            replay.goto((tmp_path / "run.html").as_uri() + f"#at={(k + 0.01) / STEPS if k < STEPS else 1}")
            replay.wait_for_selector(".text .line")
            check(blends(replay.locator(".text .l")), wanted, places=2)
        assert replay.locator(".text").text_content() == text.replace("\n", "")
        user.context.close()
        user.settled()
        browser.close()


def check(drawn: list[Any], wanted: list[Any], places: int = 3) -> None:
    """The characters and their opacities."""
    assert [[text for text, _ in one] for one in drawn] == [[text.replace("\n", "↵") for text, _ in likely] for _, likely in wanted]
    for one, (_, likely) in zip(drawn, wanted, strict=True):
        assert [alpha for _, alpha in one] == pytest.approx([share for _, share in likely], abs=0.6 * 10**-places)
