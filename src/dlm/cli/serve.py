"""`dlm serve`."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from dlm import bundled
from dlm.cli.app import (
    AllThreads,
    BridgeOption,
    Compile,
    Deterministic,
    Device,
    DeviceMap,
    Dtype,
    FamilyOption,
    TrustOption,
    app,
    between,
    check_names,
    is_adapter,
    load,
)
from dlm.errors import InputError


@app.command()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODELS", show_default="the bundled models of text", help="Bundled names, directories, GGUF files or hub ids."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(callback=between(0, 65535), help="0 takes a free one.")] = 8000,
    api_key: Annotated[list[str] | None, typer.Option(help="A key that requests must send; also DLM_API_KEYS, with commas.")] = None,
    max_batch: Annotated[int, typer.Option(help="Texts that run at once.", rich_help_panel="Limits")] = 64,
    max_queue: Annotated[int, typer.Option(help="Texts that may wait; more get status 429.", rich_help_panel="Limits")] = 256,
    max_length: Annotated[int, typer.Option(help="Tokens of a text at most, its prompt included.", rich_help_panel="Limits")] = 4096,
    max_steps: Annotated[int, typer.Option(help="Denoising steps of a window at most.", rich_help_panel="Limits")] = 1024,
    max_positions: Annotated[
        int, typer.Option(help="Positions that a forward pass reads for one text at most, draft tokens included.", rich_help_panel="Limits")
    ] = 4096,
    max_body: Annotated[int, typer.Option(help="Bytes of a request at most.", rich_help_panel="Limits")] = 2**20,
    deadline: Annotated[float, typer.Option(help="Seconds for a request, waiting included.", rich_help_panel="Limits")] = 300.0,
    threads: AllThreads = 0,
    adapter: Annotated[
        Path | None, typer.Option(callback=is_adapter, help="Directory of `dlm convert`, for the one model that is named.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    deterministic: Deterministic = False,
    compile: Compile = False,
    family: FamilyOption = "",
    bridge: BridgeOption = "",
    trust_remote_code: TrustOption = False,
    device_map: DeviceMap = "",
) -> None:
    """Serve models by the OpenAI protocol, with a page to watch.

    Ctrl-C finishes the texts that are under way.
    """
    if adapter is not None and len(models or []) != 1:
        raise InputError("--adapter belongs to one base: name that model alone")
    if (family or bridge) and len(models or []) != 1:
        raise InputError("--family and --bridge say what one checkpoint is: name that model alone")
    if deadline <= 0 or min(max_body, max_length, max_steps, max_positions) < 1:
        raise InputError("--deadline and the other limits are above 0")
    names = models or bundled.text_models()
    check_names(names, dtype)
    if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "sse_starlette", "prometheus_client", "jinja2")):
        raise InputError("the server needs the serve extra: pip install 'dlm[serve]'")
    from dlm.serve import run
    from dlm.serve.engine.cost import CostLimits
    from dlm.serve.engine.scheduler import Engine
    from dlm.serve.engine.shelf import Shelf
    from dlm.serve.guard import LOCAL, Limits

    keys = tuple(key.strip() for key in [*(api_key or []), *os.environ.get("DLM_API_KEYS", "").split(",")] if key.strip())
    engine = Engine(max_batch=max_batch, max_queue=max_queue, threads=threads, device=device)
    how = (device, dtype, adapter, deterministic, compile, family, bridge, trust_remote_code, device_map)
    loaded = [load(name, *how) for name in names]
    shelf = Shelf(loaded, max_length, max_steps, CostLimits(max_positions))
    local = host in LOCAL
    limits = Limits(keys=keys, max_body_bytes=max_body, hosts=LOCAL if local else (), deadline=deadline)
    if not local and not keys:
        typer.echo("dlm: other machines can use this server without a key: --api-key asks for one", err=True)
    run.forever(shelf, engine, limits, host, port)
