"""Who may import whom: docs/architecture.md section 2, held to the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "dlm"
FREE = {"errors", "files"}  # anyone may use these
LEVEL0 = {"trajectory", "protocols"}
ALLOWED = {
    "errors": set(),
    "files": set(),
    "trajectory": set(),
    "protocols": {"trajectory"},
    "text": set(),
    "noise": LEVEL0,
    "models": LEVEL0,
    "inference": LEVEL0 | {"models"},
    "convert": LEVEL0 | {"models", "text", "train", "language_model"},  # the model by its name alone
    "sampling": LEVEL0 | {"noise"},
    "model_scheduling": LEVEL0 | {"noise", "sampling"},
    "evaluate": LEVEL0 | {"noise", "sampling"},
    "analysis": LEVEL0 | {"noise", "sampling"},
    "train": LEVEL0 | {"noise", "models", "text"},
    "viz": {"trajectory"},
    "recipes": {"train", "models", "noise"},
    "generation": LEVEL0 | {"sampling", "language_model"},  # the model by its name alone
    "decoding": LEVEL0 | {"inference", "model_scheduling", "models", "noise", "sampling", "language_model"},  # the model by its name alone
    "language_model": LEVEL0
    | {"inference", "convert", "decoding", "model_scheduling", "models", "noise", "sampling", "text", "generation"},
    "serve": LEVEL0 | {"sampling", "text", "language_model", "viz"},
}
TOP = {"__init__", "__main__", "cli"}


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "dlm":
                names |= {f"dlm.{alias.name}" for alias in node.names}
            elif node.module:
                names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("dlm.")}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_layers(path: Path) -> None:
    name = part(path)
    if name in TOP:
        return
    assert name in ALLOWED, f"{name} is new: give it a place in docs/architecture.md and here"
    strangers = imported(path) - ALLOWED[name] - FREE - {name}
    assert not strangers, f"{path.relative_to(ROOT)} imports {sorted(strangers)}"


def test_no_drawers_for_odds_and_ends() -> None:
    bad = {"utils.py", "common.py", "helpers.py", "base.py"}
    assert not [p for p in ROOT.rglob("*.py") if p.name in bad]
    long = [p for p in ROOT.rglob("*.py") if len(p.read_text().splitlines()) > 400]
    assert not [p for p in long if "400 lines" not in p.read_text()[:2000]], "over 400 lines needs a reason at its top"


def test_import_is_light() -> None:
    heavy = ("transformers", "fastapi", "matplotlib", "datasets", "gguf", "jinja2", "torch")
    code = f"import dlm, sys; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT.parent)})
    assert out.stdout.strip() == "[]"


def test_a_model_loads_without_heavy_libraries() -> None:
    heavy = ("transformers", "fastapi", "matplotlib", "datasets", "gguf", "accelerate", "torch._dynamo")
    code = f"import dlm, sys; dlm.load; dlm.DiffusionSampler; dlm.Transformer\nprint([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT.parent)})
    assert out.stdout.strip() == "[]"
