"""`dlm convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlm.cli.app import Device, Json, Seed, app, between, check_names, err, is_text, load, prompt_lines, stoppable
from dlm.errors import InputError

if TYPE_CHECKING:
    from dlm.workflows.convert import SelfDistillation


@app.command()
def convert(
    base: Annotated[
        str, typer.Argument(metavar="MODEL", help="An autoregressive model: bundled or pulled name, directory, GGUF file, hub id.")
    ],
    data: Annotated[
        str | None, typer.Option(callback=is_text, help="shakespeare (bundled), a text file, a folder of .txt files, or hf:DATASET.")
    ] = None,
    self_distill: Annotated[
        int, typer.Option(callback=between(0), help="Instead of --data: learn from so many texts that the base writes.")
    ] = 0,
    prompts: Annotated[Path | None, typer.Option(help="Their beginnings, a line each; a chat model answers them.")] = None,
    temperatures: Annotated[str, typer.Option(help="Of those texts, with commas, in turns: 0,1 where greedy text is wanted too.")] = "1",
    out: Annotated[Path | None, typer.Option(help="Run directory; default: runs/convert/BASE.")] = None,
    stride: Annotated[
        int, typer.Option(callback=between(2), help="Tokens that a forward pass may commit: one and stride - 1 draft tokens.")
    ] = 4,
    heads: Annotated[
        int, typer.Option(callback=between(0), help="Train so many heads on the last hidden state instead of an adapter (Medusa).")
    ] = 0,
    full: Annotated[bool, typer.Option("--full", help="Train the base itself, not an adapter: no longer lossless.")] = False,
    rank: Annotated[int, typer.Option(callback=between(1), help="Of the LoRA adapter.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="The adapter's output counts alpha / rank times; default: twice the rank.")] = None,
    targets: Annotated[str, typer.Option(help="Adapted layers of every block.")] = "q,k,v,out,up,down,gate",
    chain: Annotated[
        int, typer.Option(callback=between(0), help="Inner width of the part by which a draft token depends on those before it; 0: none.")
    ] = 384,
    init: Annotated[str, typer.Option(help="Begin with this adapter: directory or bundled name.")] = "",
    loss: Annotated[str, typer.Option(help="kl: KL divergence from the base on clean text | ce: cross entropy of the text.")] = "kl",
    clean_weight: Annotated[float, typer.Option(help="With --full, of the loss on clean text; 0: the ratio of the two losses.")] = 0.2,
    steps: Annotated[int, typer.Option(callback=between(1), help="Optimiser steps.")] = 1000,
    batch: Annotated[int, typer.Option(callback=between(1), help="Rows of a step.")] = 8,
    length: Annotated[int, typer.Option(callback=between(2), help="Tokens of a row.")] = 256,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    save_every: Annotated[int, typer.Option(callback=between(1), help="Steps between saves.")] = 250,
    eval_every: Annotated[int, typer.Option(callback=between(1), help="Steps between measurements of acceptance on held-out rows.")] = 250,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last save in --out.")] = False,
    as_json: Json = False,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the base: float32 | bfloat16.")] = "float32",
) -> None:
    """Teach an autoregressive model to draft several tokens a pass.

    Ctrl-C saves and stops; --resume goes on.
    """
    check_names([base], dtype)
    from dlm.adapters.train import ConvertConfig
    from dlm.train.display import Display
    from dlm.workflows.convert import convert as run

    texts = _texts(data, self_distill, prompts, temperatures)
    config = ConvertConfig(
        stride=stride,
        heads=heads,
        full=full,
        rank=rank,
        alpha=2.0 * rank if alpha is None else alpha,
        targets=tuple(word for word in targets.split(",") if word),
        chain=chain,
        init=init,
        loss=loss,
        clean_weight=clean_weight,
        steps=steps,
        batch=batch,
        length=length,
        lr=lr,
        seed=seed,
        eval_every=eval_every,
        save_every=save_every,
    )
    lm = load(base, device, dtype)
    with stoppable(), Display(err, unit="nats per mask") as display:
        result = run(lm, texts, out or Path("runs") / "convert" / lm.name, config=config, resume=resume, progress=display)
    if as_json:
        print(json.dumps(result.record()))
    else:
        before, after = result.describe()
        print(f"before  {before}\nafter   {after}")


def _texts(data: str | None, self_distill: int, prompts: Path | None, temperatures: str) -> str | SelfDistillation:
    """The text to learn from. InputError for options that exclude each other."""
    from dlm.workflows.convert import SelfDistillation

    if (data is None) == (self_distill == 0):
        raise InputError("give --data FILE or --self-distill N, one of them")
    if data is None:
        return SelfDistillation(self_distill, tuple(prompt_lines(prompts)) if prompts else (), _numbers(temperatures))
    if prompts is not None:
        raise InputError("--prompts are what --self-distill begins with: leave them away with --data")
    if _numbers(temperatures) != (1.0,):
        raise InputError("--temperatures are what --self-distill writes with: leave them away with --data")
    return data


def _numbers(temperatures: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in temperatures.split(","))
    except ValueError:
        raise InputError(f"--temperatures is one or more numbers from 0 with commas between, as in 0,1; got {temperatures!r}") from None
