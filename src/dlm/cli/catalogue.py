"""`dlm list`: the installed models, those that can be fetched, and the next command. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape

from dlm import bundled
from dlm.cli.app import app
from dlm.cli.tables import console
from dlm.files import read_json


@app.command(name="list")
def list_() -> None:
    """List the installed models, adapters, data sets and recipes."""
    out = console()
    for kind, name, about in [*_models(), *_adapters(), *_datasets(), *_bases(), *_recipes()]:
        out.print(f"[dim]{kind:8}[/][bold]{escape(name):28}[/] {escape(about)}", highlight=False, soft_wrap=True)
    out.print("\n[dim]next:[/]")
    for command, about in _next():
        out.print(f"  {escape(command):48} [dim]{escape(about)}[/]", highlight=False, soft_wrap=True)


def _models() -> Iterator[tuple[str, str, str]]:
    for name, path in bundled.models().items():
        config = read_json(path / "config.json")
        size, window = config["training"].get("parameters", 0), config["network"]["window"]
        use = "; fills in grids: dlm solve" if config["network"].get("axes") else ""
        data = config["training"]["data"]
        yield "model", name, f"{_kind(config)}, {size / 1e6:.1f}M parameters, window {window}, trained on {data}{use}"


def _kind(config: dict[str, object]) -> str:
    """The objective, the noise and the attention of a config.json in words."""
    if config["objective"] == "autoregressive":
        return "autoregressive"
    noise, network = config["noise"], config["network"]
    assert isinstance(noise, dict)
    assert isinstance(network, dict)
    return f"{noise['process']} {'block ' * (network.get('attention') == 'block_causal')}diffusion"


def _adapters() -> Iterator[tuple[str, str, str]]:
    for name, path in bundled.adapters().items():
        about = read_json(path / bundled.ADAPTER)
        yield "adapter", name, f"drafts for {about['base']}, {about['stride']} tokens a forward pass at most; add --adapter {name}"


def _datasets() -> Iterator[tuple[str, str, str]]:
    for name, path in bundled.datasets().items():
        yield "data", name, f"{path.stat().st_size / 1e6:.1f} MB of text; dlm train --data {name}"


def _bases() -> Iterator[tuple[str, str, str]]:
    for name in bundled.BASES:
        path = bundled.cache_directory() / f"{name}.gguf"
        here = f"autoregressive, {path.stat().st_size / 1e6:.0f} MB at {path}" if path.is_file() else f"not here yet: dlm pull {name}"
        yield "base", name, here


def _recipes() -> Iterator[tuple[str, str, str]]:
    from dlm.train import recipes

    for name, make in recipes.RECIPES.items():
        yield "recipe", name, (make.__doc__ or "").partition("\n")[0]


def _next() -> Iterator[tuple[str, str]]:
    yield 'dlm generate "ROMEO:" --watch', "see text settle out of noise"
    yield 'dlm generate "ROMEO:" --compare mask,uniform -w', "two noise processes side by side"
    yield 'dlm solve "1...2..1.14....." -w', "a puzzle; the rules check the answer"
    base = next(iter(bundled.BASES))
    here = (bundled.cache_directory() / f"{base}.gguf").is_file()
    yield f"dlm chat {base}" if here else f"dlm pull {base}", "talk to a model" if here else "fetch a model to talk to"
    yield "dlm train shakespeare-mask", "train a recipe; --data FILE: your own text"
    yield "dlm serve", "a page in which to watch, and the OpenAI protocol"
