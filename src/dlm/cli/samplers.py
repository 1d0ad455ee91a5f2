"""`dlm samplers`: the registry as a table. Imports no torch."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.markup import escape

from dlm.cli.app import Json, app
from dlm.cli.tables import console, table
from dlm.sampling import registry

MODELS: dict[registry.Noise | None, str] = {
    "masked": "masked noise",
    "replacement": "replacement noise",
    "genmd4": "GenMD4's noise",
    "gaussian": "Gaussian noise on vectors",
    "classes": "noise of classes",
    None: "autoregressive models",
}


@app.command()
def samplers(as_json: Json = False) -> None:
    """List the samplers, their settings and which are exact."""
    known = registry.known()
    out = console(as_json)
    width = max(len(one.usage) for one in known)
    for noise, models in MODELS.items():
        made = table(models, "exact", "", width=width)
        for one in known:
            if one.noise == noise:
                made.add_row(f"[bold]{escape(one.usage)}[/]", "yes" if one.exact_by_default else "", _about(one))
        out.print(made)
        out.print()
    out.print(
        "[dim]exact: the distribution of one token a forward pass; of an autoregressive model, its text to the token.[/]", highlight=False
    )
    out.print(f"[dim]{escape(registry.CHOICES)}[/]", highlight=False)
    if as_json:
        typer.echo(json.dumps({"format": 1, "samplers": [_record(one) for one in known]}))


def _about(one: registry.SamplerInfo) -> str:
    """The line about a sampler, and its settings by name, in markup."""
    settings = ", ".join(
        f"{p.name}{'' if p.default is None else f' {p.default:g}' if p.kind is not str else f' {p.default}'}" for p in one.parameters
    )
    about = f"{one.about}{' Needs a bidirectional network.' if one.bidirectional else ''}"
    return escape(about) + (f" [dim]({escape(settings)})[/]" if settings else "")


def _record(one: registry.SamplerInfo) -> dict[str, Any]:
    parameters = [{"name": p.name, "default": p.default, "range": p.range} for p in one.parameters]
    facts = {"name": one.name, "noise": one.noise, "exact": one.exact_by_default, "bidirectional": one.bidirectional}
    return facts | {"parameters": parameters, "usage": one.usage, "about": one.about}
