"""Who may import whom: the table of docs/architecture.md, held to the source; and no circle among files."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "dlm"
FREE = {"errors", "files", "plugins", "bundled", "seeds", "spelling"}  # anyone may use these
LEVEL0 = {"trajectory", "protocols"}
ALLOWED = {
    "errors": set(),
    "spelling": set(),
    "bundled": {"errors", "files"},
    "files": {"errors"},
    "plugins": {"errors"},
    "seeds": {"errors"},
    "trajectory": set(),
    "protocols": {"trajectory"},
    "text": set(),
    "noise": LEVEL0,
    "models": LEVEL0,
    "grids": {"models"},
    "sampling": LEVEL0 | {"noise"},  # never models: a test pushes exact posteriors through every sampler
    "inference": LEVEL0 | {"models"},
    "formats": LEVEL0 | {"models", "text"},
    "model_scheduling": LEVEL0 | {"noise", "sampling", "evaluation"},
    "evaluation": LEVEL0 | {"noise", "sampling"},
    "calibration": LEVEL0 | {"sampling", "noise", "evaluation"},
    "train": LEVEL0 | {"noise", "models", "formats", "text", "grids"},
    "adapters": LEVEL0 | {"models", "formats", "text", "train", "sampling"},
    "language_model": LEVEL0
    | {"text", "noise", "models", "sampling", "inference", "formats", "calibration", "model_scheduling", "adapters"},
    "viz": {"trajectory"},
    "bench": LEVEL0 | {"sampling", "language_model"},
    "serve": LEVEL0 | {"sampling", "text", "language_model", "viz"},
}
ALLOWED["workflows"] = ALLOWED.keys() - {"serve"}  # a use case calls any room below
TOP = {"__init__", "__main__", "cli"}
PATHS = sorted(ROOT.rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Modules of the project that a file imports anywhere in it, dotted from `dlm`; for `from dlm.a import b`, also `dlm.a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("dlm.")}


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("dlm", *parts)).removesuffix(".__init__")


@pytest.mark.parametrize("path", PATHS, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_layers(path: Path) -> None:
    name = part(path)
    if name in TOP:
        return
    assert name in ALLOWED, f"{name} is new: give it a place in docs/architecture.md and here"
    strangers = {one.split(".")[1] for one in imported(path)} - ALLOWED[name] - FREE - {name}
    assert not strangers, f"{path.relative_to(ROOT)} imports {sorted(strangers)}"


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of two or more nodes that reach one another (Tarjan), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(arrows[node]):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return found


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a"}}) == []


def test_no_circle_among_files() -> None:
    """Imports inside functions and for type checkers count."""
    known = {module(path) for path in PATHS}
    arrows = {module(path): imported(path) & known - {module(path)} for path in PATHS}
    assert circles(arrows) == []


def test_no_circle_among_rooms() -> None:
    rooms: dict[str, set[str]] = {part(path): set() for path in PATHS}
    for path in PATHS:
        rooms[part(path)] |= {one.split(".")[1] for one in imported(path)} & rooms.keys() - {part(path)}
    del rooms["__init__"], rooms["__main__"]
    assert circles({room: others & rooms.keys() for room, others in rooms.items()}) == []


def test_no_drawers_for_odds_and_ends() -> None:
    bad = {"utils.py", "common.py", "helpers.py", "base.py"}
    assert not [p for p in PATHS if p.name in bad]


def light(code: str, heavy: tuple[str, ...]) -> None:
    code += f"\nimport sys; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT.parent)})
    assert out.stdout.strip() == "[]"


HEAVY = ("transformers", "fastapi", "matplotlib", "datasets", "gguf", "accelerate", "torch._dynamo", "sympy", "torch.distributed.fsdp")


def test_import_is_light() -> None:
    light("import dlm", ("transformers", "fastapi", "matplotlib", "datasets", "gguf", "jinja2", "torch"))


@pytest.mark.slow
def test_a_model_loads_without_heavy_libraries() -> None:
    code = "import dlm; dlm.load; dlm.DiffusionSampler; dlm.Transformer"
    light(code, HEAVY)


@pytest.mark.slow
def test_the_first_text_needs_no_compiler() -> None:
    """A model that is loaded and writes: torch would import its compiler and 1,600 modules to draw weights on the meta device."""
    light('import dlm; dlm.load("shakespeare-mask-1").generate("a", length=4)', HEAVY)


@pytest.mark.slow
def test_an_adapter_and_a_quantized_copy_need_no_compiler() -> None:
    code = """
import torch
from dlm.adapters.lora import AdapterConfig, attach, detach
from dlm.inference.quantize import quantized_copy
from dlm.models.config import TransformerConfig
from dlm.models.transformer import Transformer
network = Transformer(TransformerConfig(40, window=8, layers=1, heads=2, width=32, attention="causal"))
quantized_copy(network, 8)
attach(network, AdapterConfig(), 39)
detach(network)
"""
    light(code, HEAVY)
