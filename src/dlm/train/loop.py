"""The training loop, top to bottom.

    dlm train shakespeare-mask                          one process
    accelerate launch -m dlm train shakespeare-mask     as many as accelerate is told: DDP or FSDP2

Everything random at step n is a function of (seed, n), so a killed run that resumes equals one that never stopped.
"""

from __future__ import annotations

import json
import math
import os
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
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from dlm.errors import InputError
from dlm.files import sweep
from dlm.formats import native
from dlm.formats.native import ModelConfig
from dlm.models.transformer import Transformer
from dlm.noise import process
from dlm.text.tokenizer import Tokenizer
from dlm.train import data as reading
from dlm.train import state
from dlm.train.config import TrainConfig
from dlm.train.learner import Learner
from dlm.train.log import Log
from dlm.train.objective import Objective, validate
from dlm.train.setup import noise_settings

__all__ = ["TrainConfig", "train"]

QUIET = 5.0  # seconds between the lines of a run that nobody watches in a terminal


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
    changes = _changes(config, meta["config"], out) if resume else ""
    if first >= config.steps:
        raise InputError(f"{out} is at step {first} of {config.steps} already: raise it with --set steps=N")

    # data
    documents = reading.read(config.data)
    tokenizer = Tokenizer.load(out) if resume else Tokenizer.make(config.tokenizer, "\n".join(documents))
    network_config = config.network.with_(vocab_size=tokenizer.vocab_size + 1)
    parts = zip(("training", "validation"), reading.split(documents, config.val_fraction), strict=True)
    streams = [reading.Stream.encode(part, tokenizer, network_config.window, name=f"{name} part") for name, part in parts]
    train_stream, windows_WT = streams[0], streams[1].windows(config.eval_windows)
    if len(windows_WT) < 2:
        raise InputError(f"the validation part fills one window of {network_config.window}, two are needed: more text or val_fraction")
    window_tokens = config.batch * network_config.window
    epochs = window_tokens / len(train_stream.tokens_N)

    settings = native.load_config(out).noise if resume else noise_settings(config, tokenizer)
    noise = process.make(settings, network_config.vocab_size, tokenizer.mask_id)
    learner = Learner(config, network_config, noise, train_stream, accelerator, resume=resume)
    bare, network, optimizer, ema = learner.bare, learner.network, learner.optimizer, learner.ema
    if resume:
        state.load(saved, network, optimizer, ema)

    # outputs
    facts = {"parameters": bare.parameters_count(), "tokens": len(train_stream.tokens_N)}
    model_config = ModelConfig(
        network=network_config,
        mask_token_id=tokenizer.mask_id,
        objective=config.objective,
        noise=settings,
        context=config.context,
        training=config.to_dict() | facts,
    )
    texts = {
        "tokenizer.json": tokenizer.inner.to_str(),
        "generation_config.json": json.dumps(native.generation_defaults(model_config), indent=2) + "\n",
        "README.md": native.card(model_config, out.resolve().name, facts["parameters"]),
    }
    if main:
        out.mkdir(parents=True, exist_ok=True)
        sweep(out)
    log = Log(out, first, tensorboard=config.tensorboard, main=main)

    def say(text: str) -> None:
        if main:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    def save(step: int, recent_N: Tensor) -> None:
        average = state.averaged(network, ema)
        if main:  # the export first: whatever can be resumed can also be loaded
            native.save(out, average, model_config, files=texts)
        meta = {"step": step, "best": best, "recent": recent_N.tolist(), "config": config.to_dict()}
        state.save(saved, network, optimizer, average, meta, main=main)
        accelerator.wait_for_everyone()

    say(
        f"{facts['parameters']:,} parameters, {facts['tokens']:,} training tokens (sha256 {train_stream.fingerprint()}), "
        f"{config.steps * epochs:.1f} epochs, {ranks} process(es) on {device}, into {out}"
    )
    if changes:
        say(f"changed since the last save: {changes}")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    times = (TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    progress = Progress(*columns, *times, console=console, disable=not (main and console.is_terminal))
    figures: dict[str, Any] = {"step": first}
    recent = [torch.tensor(value, device=device) for value in meta.get("recent", [])]  # losses since the last line of the log
    last = config.steps if stop_after is None else min(config.steps, stop_after)
    interrupted = False
    with Stop(patient=ranks > 1) as stop, progress, log:
        task = progress.add_task("training", total=config.steps, completed=first, note="")
        since, tokens_since, quiet_until = time.perf_counter(), 0, 0.0
        for step in range(first, last):
            loss, norm, lr = learner.update(step)
            recent.append(loss)
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
                nats, gradient = recent_N.mean().item(), float(norm)
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
                    val_nats, stderr = validate(Objective(config, noise), network, windows_WT, device)
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


def _changes(config: TrainConfig, before: dict[str, Any], out: Path) -> str:
    """Settings that are not those of the last save, for people; InputError where the weights would not fit."""
    now = json.loads(json.dumps(config.to_dict()))
    old, new = ({key: value for key, value in c.items() if key != "network"} | c["network"] for c in (before, now))
    changed = [key for key, value in old.items() if new.get(key) != value]
    fixed = before["network"].keys() - {"vocab_size", "dropout", "backend"} | {"objective", "noise", "clusters", "head", "init"}
    wrong = [f"{key}={old[key]}" for key in changed if key in fixed]
    if wrong:
        raise InputError(f"{out} was begun with {', '.join(wrong)}: resume with --set {' --set '.join(wrong)}")
    return ", ".join(f"{key} {old[key]} -> {new.get(key)}" for key in changed)


def _any(accelerator: Accelerator, flag: bool) -> bool:
    """True on every process if it is on one: all must leave at the same step."""
    if accelerator.num_processes == 1:
        return flag
    total: Tensor = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum")
    return bool(total.item() > 0)


class Stop:
    """Ctrl-C and SIGTERM ask the loop to finish its step and save; a second Ctrl-C stops at once.

    patient: it does not, for a launcher passes on the Ctrl-C that its processes have had already.
    """

    def __init__(self, patient: bool) -> None:
        self.patient, self.asked = patient, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
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
