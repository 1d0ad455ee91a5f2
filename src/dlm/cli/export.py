"""`dlm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlm.cli.app import Json, app, err


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Bundled name, directory, GGUF file or hub id.")],
    out: Annotated[Path, typer.Option(help="Directory to write, of gguf a file.")],
    to: Annotated[str, typer.Option(help="hf: the Hugging Face layout; gguf: a file of llama.cpp.")] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="float32 | bfloat16, of gguf also q8_0 | q4_0 | q4_1; default: that of the weights.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model as a Hugging Face directory or a GGUF file.

    transformers reads the directory where the model is a Llama, Qwen2 or Qwen3 base. llama.cpp has an architecture for these, and for
    masked diffusion models that are shaped as LLaDA, Dream or LLaDA-MoE; others are refused.
    """
    from dlm.evaluation.card import dumps
    from dlm.workflows.export import export as write

    found = write(model, out, to=to, dtype=dtype)
    size = f"{sum(found.files.values()) / 1e6:.1f} MB in {len(found.files)} files"
    err.print(
        f"wrote {out}: {found.model_type}, {found.parameters:,} parameters, {size}; read by {', '.join(found.readers)}", highlight=False
    )
    if as_json:
        print(dumps(found.record()))
