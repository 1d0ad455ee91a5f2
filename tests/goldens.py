"""The golden checkpoints of other projects, loaded once, and prompts of them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from dlm.language_model import LanguageModel, load
from dlm.trajectory import Canvas

GOLDEN = Path(__file__).parent / "golden"
BIDIRECTIONAL = ("llada", "dream", "a2d_qwen3", "a2d_qwen2")


@cache
def model(family: str) -> LanguageModel:
    return load(str(GOLDEN / family))


def rows(family: str) -> list[list[int]]:
    """Three prompts of other lengths; the first one is of the reference's own generations, where there are any."""
    file, own = GOLDEN / family / "generations.json", list(range(5, 12))
    if file.is_file():
        own = list(json.loads(file.read_text())["cases"][0]["prompt_ids"][0])
    return [own, own[:3], [*own, *own]]


def canvas(family: str, prompts: list[list[int]], new: int = 16) -> Canvas:
    return Canvas.from_rows([[*row, *[None] * new] for row in prompts], fill=model(family).tokenizer.mask_id)
