"""The training loop, top to bottom.

    dlm train shakespeare-mask                          one process
    accelerate launch -m dlm train shakespeare-mask     as many as accelerate is told: DDP or FSDP2

Everything random at step n is a function of (seed, n), so a killed run that resumes equals one that never stopped.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.distributed.tensor import DTensor

from dlm.errors import InputError
from dlm.models import checkpoint
from dlm.models.checkpoint import ModelConfig
from dlm.models.transformer import Transformer
from dlm.noise import loss, schedule
from dlm.noise.masked import MaskedNoise
from dlm.text import Tokenizer
from dlm.train import data as reading
from dlm.train import state
from dlm.train.config import TrainConfig
from dlm.train.log import Log
from dlm.train.objective import Objective, RowsOf, levels_on, validate
from dlm.train.optim import EMA, adamw, learning_rate

__all__ = ["TrainConfig", "train"]

QUIET = 5.0  # seconds between the lines of a run that nobody watches in a terminal


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of everything drawn at one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2_654_435_761 % (1 << 63))


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    preview: Callable[[Transformer, ModelConfig, Tokenizer], str] | None = None,
    console: Console | None = None,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train into the directory `out`, which is a loadable checkpoint after every save. Returns the last figures.

    resume: go on from the state in `out`. stop_after: leave after that step, as Ctrl-C would. Raises KeyboardInterrupt
    after saving when interrupted; InputError for data or settings that cannot work.
    """
    out = Path(out)
    console = console or Console(stderr=True)
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(mixed_precision="bf16" if config.bf16 else "no")
    device, main, ranks = accelerator.device, accelerator.is_main_process, accelerator.num_processes
    if ranks < (launched := int(os.environ.get("WORLD_SIZE", 1))):
        raise InputError(f"launched as {launched} processes that know nothing of each other: on CPUs set ACCELERATE_USE_CPU=true")
    if config.batch % ranks:
        raise InputError(f"batch {config.batch} does not divide over {ranks} processes")
    saved = out / state.FILE
    if resume and not saved.is_file():
        raise InputError(f"nothing to resume in {out}: train without --resume first")
    if not resume and saved.is_file():
        raise InputError(f"{out} holds a run already: add --resume, or choose another --out")
    meta: dict[str, Any] = state.read_meta(saved) if resume else {"step": 0, "best": math.inf}
    first, best = meta["step"], meta["best"]
    if resume:
        _require_same_network(config, meta["config"], out)
    if first >= config.steps:
        raise InputError(f"{out} is at step {first} of {config.steps} already: raise it with --set steps=N")

    # data
    documents = reading.read(config.data)
    tokenizer = Tokenizer.load(out) if resume else Tokenizer.make(config.tokenizer, "\n".join(documents))
    network_config = config.network.with_(vocab_size=tokenizer.vocab_size + 1)
    parts = zip(("training", "validation"), reading.split(documents, config.val_fraction), strict=True)
    streams = [reading.Stream.encode(part, tokenizer, network_config.window, name=f"{name} part") for name, part in parts]
    train_stream, windows_WT = streams[0], streams[1].windows()[: config.eval_windows]
    if len(windows_WT) < 2:
        raise InputError(f"the validation part fills one window of {network_config.window}, two are needed: more text or val_fraction")
    window_tokens = config.batch * network_config.window
    epochs = window_tokens / len(train_stream.tokens_N)

    # network, optimiser, average; accelerate wraps the first two for one process, DDP or FSDP2
    set_seed(config.seed)
    bare = Transformer(network_config)
    if config.compile:
        bare.compile()
    fused = device.type == "cuda"
    network, optimizer = accelerator.prepare(
        bare, adamw(bare, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=fused)
    )
    inner = optimizer.optimizer
    ema = EMA(network, config.ema)
    if resume:
        state.load(saved, network, inner, ema)

    # objective: this process takes the rows `own` of every batch
    noise = MaskedNoise(network_config.vocab_size, tokenizer.mask_id, schedule.parse(config.noise_schedule))
    per_rank = config.batch // ranks
    own = slice(accelerator.process_index * per_rank, (accelerator.process_index + 1) * per_rank)
    rows_noise = RowsOf(noise.vocab_size, noise.mask_id, noise.schedule, batch=config.batch, own=own)
    validation, objective = Objective(config, noise), Objective(config, rows_noise)

    # outputs
    facts = {"parameters": bare.parameters_count(), "tokens": len(train_stream.tokens_N)}
    model_config = ModelConfig(
        network=network_config,
        mask_token_id=tokenizer.mask_id,
        objective=config.objective,
        noise={"process": "masked", "schedule": config.noise_schedule},
        context=config.context,
        training=config.to_dict() | facts,
    )
    texts = {
        "tokenizer.json": tokenizer.inner.to_str(),
        "generation_config.json": json.dumps(checkpoint.generation_defaults(model_config), indent=2) + "\n",
        "README.md": checkpoint.card(model_config, out.resolve().name, facts["parameters"]),
    }
    if main:
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(".saving-*"):  # of a run killed while it saved
            shutil.rmtree(left, ignore_errors=True)
    log = Log(out, first, tensorboard=config.tensorboard, main=main)

    def say(text: str) -> None:
        if main:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    def save(step: int, recent_N: Tensor) -> None:
        average = state.averaged(network, ema)
        if main:  # the export first: whatever can be resumed can also be loaded
            checkpoint.save(out, average, model_config, files=texts)
        meta = {"step": step, "best": best, "recent": recent_N.tolist(), "config": config.to_dict()}
        state.save(saved, network, inner, average, meta, main=main)
        accelerator.wait_for_everyone()

    say(
        f"{facts['parameters']:,} parameters, {facts['tokens']:,} training tokens (sha256 {train_stream.fingerprint()}), "
        f"{config.steps * epochs:.1f} epochs, {ranks} process(es) on {device}, into {out}"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    times = (TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    progress = Progress(*columns, *times, console=console, disable=not (main and console.is_terminal))
    figures: dict[str, Any] = {"step": first}
    recent = [torch.tensor(value, device=device) for value in meta.get("recent", [])]  # losses since the last line of the log
    last = config.steps if stop_after is None else min(config.steps, stop_after)
    interrupted = False
    with _Stop(patient=ranks > 1) as stop, progress, log:
        task = progress.add_task("training", total=config.steps, completed=first, note="")
        network.train()
        since, tokens_since, quiet_until = time.perf_counter(), 0, 0.0
        for step in range(first, last):
            rng = step_generator(config.seed, step)
            torch.manual_seed(config.seed * 7919 + step + accelerator.process_index * 1_000_000_007)  # dropout
            x_BT, t_B = train_stream.draw(config.batch, rng), loss.draw_levels(config.batch, rng)
            free_BT = objective.free(config.batch, rng)
            mask_rng = torch.Generator(device).manual_seed(step_generator(config.seed + 1, step).initial_seed())
            lr = learning_rate(step, peak=config.lr, steps=config.steps, warmup=config.warmup, decay_share=config.decay_share)
            for group in inner.param_groups:
                group["lr"] = lr
            nats_B = objective(network, x_BT[own].to(device), free_BT[own].to(device), mask_rng, levels_on(device, t_B[own]))
            accelerator.backward(nats_B.mean())
            norm = accelerator.clip_grad_norm_(network.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(step)
            recent.append(nats_B.detach().mean().float())
            tokens_since += window_tokens
            done = step + 1
            interrupted = _any(accelerator, stop.asked)
            stopping = interrupted or done == last
            logging = done % config.log_every == 0 or done == config.steps
            evaluating = done % config.eval_every == 0 or done == config.steps
            saving = done % config.save_every == 0 or stopping

            if logging or saving:
                recent_N = accelerator.reduce(torch.stack(recent), "mean")
                recent = list(recent_N)
                nats, gradient = recent_N.mean().item(), float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
                if not math.isfinite(nats + gradient):
                    raise InputError(
                        f"the loss is {nats} and its gradient {gradient} at step {done}: lower --set lr (now {config.lr}); "
                        "the last save is kept"
                    )
                figures |= {"step": done, "train_nats": nats}
            if logging:
                rate = tokens_since / (time.perf_counter() - since)
                figures["tokens_per_second"] = rate
                log.write(done, train_nats=nats, lr=lr, gradient_norm=gradient, tokens_per_second=rate)
                if not console.is_terminal and (time.perf_counter() >= quiet_until or done == config.steps):
                    eta = timedelta(seconds=round((config.steps - done) * window_tokens / rate))
                    say(f"step {done}/{config.steps}: {nats:.4f} nats per token, {rate:,.0f} tokens/s, eta {eta}")
                    quiet_until = time.perf_counter() + QUIET
                recent, since, tokens_since = [], time.perf_counter(), 0
            paused = time.perf_counter()
            if evaluating:
                network.eval()
                with ema.swapped():
                    val_nats, stderr = validate(validation, network, windows_WT, device)
                    text = preview(bare, model_config, tokenizer) if preview and ranks == 1 else ""
                network.train()
                best = min(best, val_nats)
                figures |= {"val_nats": val_nats, "val_stderr": stderr, "best_val_nats": best}
                log.write(done, val_nats=val_nats, val_stderr=stderr, epochs=done * epochs)
                say(f"step {done}: validation {val_nats:.4f} +- {stderr:.4f} nats per token" + (f"\n{text}" if text else ""))
            rate_note = f"{figures.get('train_nats', math.nan):.3f} nats, {figures.get('tokens_per_second', 0):,.0f} tokens/s"
            progress.update(task, completed=done, note=rate_note)
            if saving:
                save(done, torch.stack(recent) if recent else torch.empty(0))
            since += time.perf_counter() - paused
            if stopping:
                break
    if interrupted and figures["step"] < config.steps:
        raise KeyboardInterrupt(f"stopped at step {figures['step']}, saved; go on with --resume")
    return figures


def _require_same_network(config: TrainConfig, before: dict[str, Any], out: Path) -> None:
    now = config.to_dict()
    free = ("vocab_size", "dropout", "backend")
    pairs = [(key, now["network"].get(key), value) for key, value in before["network"].items() if key not in free]
    pairs.append(("objective", now["objective"], before["objective"]))
    wrong = [f"{key}={value}" for key, current, value in pairs if current != value]
    if wrong:
        raise InputError(f"{out} was begun with {', '.join(wrong)}: resume with --set {' --set '.join(wrong)}")


def _any(accelerator: Accelerator, flag: bool) -> bool:
    """True on every process if it is on one: all must leave at the same step."""
    if accelerator.num_processes == 1:
        return flag
    total: Tensor = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum")
    return bool(total.item() > 0)


class _Stop:
    """Ctrl-C and SIGTERM ask the loop to finish its step and save; a second Ctrl-C stops at once.

    patient: it does not, for a launcher passes on the Ctrl-C that its processes have had already.
    """

    def __init__(self, patient: bool) -> None:
        self.patient, self.asked = patient, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        if not self.patient:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
