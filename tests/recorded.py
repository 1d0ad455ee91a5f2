"""Texts and bounds of the bundled models, recorded when they were trained: `python tests/recorded.py` writes the file anew.

A test compares them, so that moving code changes no text and no number. Texts are short enough that the last digits of another
machine's products do not decide a token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import programs

FILE = Path(__file__).parent / "recorded.json"
TEXT = "ROMEO:\nBut soft, what light through yonder window breaks? It is the east, and Juliet is the sun.\n" * 12

Case = tuple[str, dict[str, Any]]

MASKED = [
    "ancestral",
    "first-hitting",
    "speculative:8",
    "topk",
    "margin",
    "entropy",
    "confidence:0.7",
    "factor",
    "entropy-bound",
    "klass",
    "predictor-corrector",
    "remdm-cap",
    "remdm-rescale",
    "remdm-conf",
    "remdm-loop",
    "revoke",
    "planner",
]
REPLACING = ["ancestral", "predictor-corrector", "refine", "entropy-bound", "worst:4"]
AUTOREGRESSIVE = ["autoregressive", "lookup:4", "strided:4", "lookup:auto", "draft:shakespeare-ar,4", "strided:4x8"]


def cases() -> Iterator[Case]:
    """(name of a bundled model, options of `LanguageModel.generate`)."""
    few = {"prompt": "ROMEO:", "length": 64, "steps": 16, "seed": 3}
    for word in MASKED:
        yield "shakespeare-mask", few | {"sampler": word} | ({"length": 24} if word == "speculative:8" else {})
    for name in ("uniform", "semantic", "hybrid"):
        for word in REPLACING:
            yield f"shakespeare-{name}", few | {"sampler": word, "steps": 8}
    for word in AUTOREGRESSIVE:
        yield "shakespeare-ar", {"prompt": "ROMEO:", "length": 64, "seed": 3, "sampler": word}
        yield "shakespeare-ar", {"prompt": "ROMEO:", "length": 64, "seed": 3, "sampler": word, "temperature": 0.0}
    yield "shakespeare-ar", {"prompt": "ROMEO:", "length": 300, "seed": 5, "sampler": "lookup:4", "context": 200, "top_k": 9}
    yield "shakespeare-block", few | {"sampler": "ancestral"}
    yield "shakespeare-block", few | {"sampler": "confidence:0.9", "length": 300, "steps": 64}
    yield "shakespeare-mask", few | {"length": 320, "temperature": 0.8, "top_p": 0.95}
    yield "shakespeare-mask", few | {"suffix": "Exit."}
    yield "shakespeare-mask", {"template": "ROMEO: ____ is my ____, JULIET", "seed": 1, "steps": 8}
    for cache in ("prefix", "dual", "delayed:4", "drift:0.1"):
        yield "shakespeare-mask", few | {"cache": cache, "block_length": 64, "sampler": "topk"}
    yield "shakespeare-mask", few | {"guidance": 2.0}
    yield "shakespeare-mask", few | {"allow": "abcdefgh \n"}
    yield "shakespeare-mask", few | {"schedule": "L0.25 H0.75", "light": "shakespeare-mask-2"}
    yield "shakespeare-uniform", few | {"greedy_tail": 2}
    yield "shakespeare-uniform", few | {"sampler": "worst:4", "until_settled": 2, "steps": 12}
    yield "shakespeare-mask", {"prompt": ["ROMEO:", "JULIET:"], "length": 40, "steps": 8, "seed": 7}


def write(case: Case) -> dict[str, Any]:
    """The text and the forward passes of one case."""
    import dlm

    name, options = case
    options = dict(options)
    made = dlm.load(name).generate(options.pop("prompt", ""), **options)
    rows = made if isinstance(made, list) else [made]
    # The draft length of `:auto` and the layout of the masks of `strided` depend on times measured during the run.
    word = str(options.get("sampler"))
    by_the_clock = word.endswith(":auto") or word.startswith("strided")
    return {"text": [row.text for row in rows], "forwards": None if by_the_clock else [row.forwards for row in rows]}


def bounds() -> Iterator[list[str]]:
    """Arguments of `dlm eval`, after which the file of the text stands."""
    for name in ("mask", "uniform", "semantic", "hybrid", "block", "ar"):
        yield [f"shakespeare-{name}", "--split", "all", "--max-windows", "2", "--passes", "2", "--seed", "0"]


def measure(arguments: list[str], directory: Path) -> dict[str, Any]:
    """The figures of `dlm eval --json`."""
    path = directory / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    done = programs.run(["dlm", "eval", *arguments, "--data", str(path), "--json"], directory)
    done.check_returncode()
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    import tempfile

    texts = [{"model": case[0], "options": case[1]} | write(case) for case in cases()]
    with tempfile.TemporaryDirectory() as directory:
        figures = [{"arguments": one, "figures": measure(one, Path(directory))} for one in bounds()]
    FILE.write_text(json.dumps({"format": 1, "texts": texts, "bounds": figures}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"texts": len(texts), "bounds": len(figures)}))


if __name__ == "__main__":
    main()
