"""`dlm convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dlm.cli.app import Device, Json, Seed, app, bar, err, fail, load, prompt_lines
from dlm.errors import InputError


@app.command()
def convert(
    base: Annotated[str, typer.Argument(help="An autoregressive model: bundled or pulled name, directory, GGUF file, hub id.")],
    data: Annotated[str | None, typer.Option(help="shakespeare (bundled), a text file, a folder of .txt files, or hf:DATASET.")] = None,
    self_distill: Annotated[int, typer.Option(help="Instead of --data: learn from so many texts that the base writes.")] = 0,
    prompts: Annotated[Path | None, typer.Option(help="What they begin with, a line each; said to a chat model, or it asks itself")] = None,
    temperatures: Annotated[str, typer.Option(help="Of those texts, with commas, in turns: 0,1 where greedy text is wanted too.")] = "1",
    out: Annotated[Path | None, typer.Option(help="Run directory; default: runs/convert/BASE.")] = None,
    stride: Annotated[int, typer.Option(help="Tokens that a call may commit: 2, 3, 4, 8 ...")] = 4,
    heads: Annotated[int, typer.Option(help="Train so many heads on the last hidden state instead of an adapter (Medusa).")] = 0,
    full: Annotated[bool, typer.Option("--full", help="Train the base itself, not an adapter: no longer lossless.")] = False,
    rank: Annotated[int, typer.Option(help="Of the adapter.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="The adapter's output counts alpha / rank times; default: twice the rank.")] = None,
    targets: Annotated[str, typer.Option(help="Adapted layers of every block.")] = "q,k,v,out,up,down,gate",
    chain: Annotated[int, typer.Option(help="Inner width of what tells a mask the tokens drawn before its own; 0: none.")] = 384,
    init: Annotated[str, typer.Option(help="Begin with this adapter: directory or bundled name.")] = "",
    loss: Annotated[str, typer.Option(help="kl: what the base says of the clean text | ce: the text itself.")] = "kl",
    clean_weight: Annotated[float, typer.Option(help="With --full, of the loss on clean text; 0: the ratio of the two losses.")] = 0.2,
    steps: Annotated[int, typer.Option(help="Updates.")] = 1000,
    batch: Annotated[int, typer.Option(help="Rows of an update.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 256,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    save_every: Annotated[int, typer.Option(help="Steps between saves.")] = 250,
    eval_every: Annotated[int, typer.Option(help="Steps between measurements of acceptance on held-out rows.")] = 250,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last save in --out.")] = False,
    as_json: Json = False,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the base: float32 | bfloat16.")] = "float32",
) -> None:
    """Teach an autoregressive model to draft several tokens a call at masks. Ctrl-C saves and stops; --resume goes on."""
    from dlm.adapters import distillation_data
    from dlm.adapters.train import ConvertConfig, describe
    from dlm.adapters.train import convert as run

    if (data is None) == (self_distill == 0):
        raise InputError("give --data FILE or --self-distill N, one of them")
    if self_distill < 0 or self_distill == 1:
        raise InputError(f"--self-distill counts texts from 2: one to learn from, one to measure on; got {self_distill}")
    if prompts is not None and data is not None:
        raise InputError("--prompts are what --self-distill begins with: leave them away with --data")
    if (warmth := _numbers(temperatures)) != [1.0] and data is not None:
        raise InputError("--temperatures are what --self-distill writes with: leave them away with --data")
    words = tuple(word for word in targets.split(",") if word)
    sizes = {"stride": stride, "heads": heads, "rank": rank, "chain": chain}
    sizes |= {"steps": steps, "batch": batch, "length": length, "save_every": save_every}
    rates = {"alpha": 2.0 * rank if alpha is None else alpha, "lr": lr, "clean_weight": clean_weight}
    config = ConvertConfig(full=full, targets=words, init=init, loss=loss, seed=seed, eval_every=eval_every, **sizes, **rates)  # type: ignore[arg-type]
    lm = load(base, device, dtype)
    config.check(lm)
    out = out or Path("runs") / "convert" / lm.name
    start = lm.config.start_token_id
    if data is not None:
        rows = distillation_data.from_text(data, lm.tokenizer, start, length)
    else:
        with bar(f"{lm.name} writes", self_distill) as progress:
            given = prompt_lines(prompts) if prompts else []
            tell = lambda done: progress.update(progress.task_ids[0], completed=done)  # noqa: E731
            distillation_data.write(
                lm, out / distillation_data.FILE, self_distill, length, prompts=given, temperatures=warmth, seed=seed, tell=tell
            )
        rows = distillation_data.from_base(out / distillation_data.FILE, start, length)
    try:
        figures = run(lm, config, rows, out, resume=resume, console=err)
    except KeyboardInterrupt as stopped:
        fail(str(stopped) or "stopped", 130)
    if not as_json:
        before, after = (describe(figures[f"accept{when}"], figures[f"greedy{when}"]) for when in ("_before", ""))
        print(f"before  {before}\nafter   {after}")
    else:
        print(json.dumps({"base": lm.name, "out": str(out), "stride": config.stride, "heads": heads, "full": full} | figures))


def _numbers(temperatures: str) -> list[float]:
    try:
        found = [float(word) for word in temperatures.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= one < float("inf") for one in found):
        raise InputError(f"--temperatures is one or more numbers from 0 with commas between, as in 0,1; got {temperatures!r}")
    return found
