"""A user of the page in a real, headless Chromium."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LACKING = [name for name in ("playwright", "fastapi", "uvicorn", "httpx") if importlib.util.find_spec(name) is None]
LACKING += [] if CHROMIUM else ["chromium"]
browses = pytest.mark.skipif(bool(LACKING), reason=f"{', '.join(LACKING)} missing: pip install playwright, apt-get install chromium")
TIMEOUT_MILLISECONDS = 240_000  # never reached where all is well, on a busy machine either

BLENDS = """all => all.map(s => {
    const alpha = color => +(/(?:\\/|,[^,]*,[^,]*,) ([\\d.e-]+)\\)/.exec(color)?.[1] ?? 1);
    const behind = place => {
        const { content, position, left, color } = getComputedStyle(s, place);
        return [position === 'absolute' && left === '0px' ? JSON.parse(content) : 'elsewhere', alpha(color)];
    };
    return [[s.textContent, alpha(getComputedStyle(s).color)], behind('::before'), behind('::after')];
})"""


def blends(spans: Any) -> list[list[tuple[str, float]]]:
    """(text, opacity) of the three tokens that are drawn over one another in each of these elements."""
    return [[(text, alpha) for text, alpha in one] for one in spans.evaluate_all(BLENDS)]


class User:
    """One tab, whose every request and complaint is kept. sent: bodies of requests for text."""

    def __init__(self, browser: Any, url: str, path: str = "", **context: Any) -> None:
        settings = {"viewport": {"width": 1280, "height": 860}, "reduced_motion": "reduce", "accept_downloads": True, **context}
        self.context = browser.new_context(**settings)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(TIMEOUT_MILLISECONDS)
        self.url, self.sent, self.asked, self.complaints = url, [], [], []  # type: str, list[Any], list[str], list[str]
        self.tab.on("request", self._asked)
        self.tab.on("console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None)
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.goto(url + path)
        self.tab.wait_for_selector("#try button, #error:not([hidden])")

    def _asked(self, request: Any) -> None:
        self.asked.append(request.url)
        if request.url.endswith("/v1/dlm/generate"):
            self.sent.append(json.loads(request.post_data))

    def set(self, prompt: str | None = None, side: int = 0, **fields: object) -> None:
        if prompt is not None:
            self.tab.fill("#prompt", prompt)
        for name, value in fields.items():
            field = self.tab.locator(f"[name={name}]").nth(side)
            field.select_option(str(value)) if name in ("model", "noise", "sampler") else field.fill(str(value))

    def generate(self, prompt: str | None = None, **fields: object) -> str:
        self.set(prompt, 0, **fields)
        self.tab.click("#generate")
        return self.done()

    def done(self) -> str:
        self.tab.wait_for_selector("body:not(.running) .act:not([hidden])")
        return self.text()

    def text(self, side: int = 0) -> str:
        """What is shown, line breaks as they were written."""
        spans = self.tab.locator(".pane").nth(side).locator("[data-i]")
        shown = spans.evaluate_all("all => all.map(s => [s.textContent, s.nextSibling?.nodeName === 'BR', s.className])")
        return "".join("█" if " mask" in look else text[:-1] + "\n" if broken else text for text, broken, look in shown)

    def states(self, side: int = 0) -> str:
        spans = self.tab.locator(".pane").nth(side).locator("[data-i]")
        return "".join(name.split()[1] for name in spans.evaluate_all("all => all.map(s => s.className)"))

    def token(self, i: int, side: int = 0) -> Any:
        return self.tab.locator(".pane").nth(side).locator(f"[data-i='{i}']")

    def lock(self, *places: int) -> None:
        for i in places:
            self.token(i).click()
            self.tab.wait_for_selector(f"[data-i='{i}'].locked")

    def facts(self, side: int = 0) -> str:
        return str(self.tab.locator(".facts").nth(side).text_content()).replace("\xa0", " ")

    def passes(self, side: int = 0) -> int:
        found = re.search(r"pass (\d+)", self.facts(side))
        assert found is not None
        return int(found[1])

    def settled(self) -> None:
        """Nothing went wrong that nobody saw, and nothing left the origin."""
        assert self.complaints == []
        assert [url for url in self.asked if not url.startswith((self.url, "data:", "blob:"))] == []
