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
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from dlm.errors import InputError
from dlm.models import checkpoint
from dlm.models.checkpoint import ModelConfig
from dlm.models.transformer import Transformer, TransformerConfig
from dlm.noise import loss, schedule
from dlm.noise.masked import MaskedNoise
from dlm.text import Tokenizer
from dlm.train import data as reading
from dlm.train import state
from dlm.train.optim import EMA, adamw, learning_rate


@dataclass(frozen=True)
class TrainConfig:
    """One run. `--set key=value` changes any field here or of the network."""

    data: str = ""
    val_fraction: float = 0.1
    tokenizer: str = "chars"  # chars | bytes | path of a tokenizer.json
    network: TransformerConfig = field(default_factory=lambda: TransformerConfig(vocab_size=1))
    objective: str = "masked"  # masked | autoregressive
    noise_schedule: str = "linear"
    estimator: str = "any_order"  # any_order | continuous
    context: int = 64
    context_share: float = 0.5  # share of training windows whose first `context` tokens are given
    steps: int = 5000
    batch: int = 64  # windows per step over all processes
    lr: float = 1e-3
    warmup: int = 100
    decay_share: float = 0.3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    bf16: bool = False
    compile: bool = False
    tensorboard: bool = False
    log_every: int = 20
    eval_every: int = 250
    eval_passes: int = 2  # Monte-Carlo passes over (a part of) the validation windows
    eval_windows: int = 256
    save_every: int = 250

    def __post_init__(self) -> None:
        if self.objective not in ("masked", "autoregressive"):
            raise InputError(f"unknown objective {self.objective!r}; known: masked, autoregressive")
        if self.estimator not in ("any_order", "continuous"):
            raise InputError(f"unknown estimator {self.estimator!r}; known: any_order, continuous")
        if self.estimator == "any_order" and self.network.time_conditioning:
            raise InputError("a network with time_conditioning needs --set estimator=continuous")
        if self.estimator == "any_order" and self.noise_schedule in ("geometric", "log-linear"):
            raise InputError(f"the {self.noise_schedule} schedule does not run from 1 to 0: --set estimator=continuous")
        if not 0 <= self.context < self.network.window:
            raise InputError(f"context {self.context} must lie in 0 .. {self.network.window - 1}")
        for name in ("steps", "batch", "log_every", "eval_every", "save_every", "eval_passes", "eval_windows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        schedule.parse(self.noise_schedule)

    def with_settings(self, settings: list[str]) -> TrainConfig:
        """Apply `key=value` words; InputError for an unknown key or a value of another type."""
        config = self
        for word in settings:
            key, equals, value = word.partition("=")
            own = {f.name for f in fields(self)} - {"network"}
            net = {f.name for f in fields(TransformerConfig)} - {"vocab_size"}
            if not equals or key not in own | net:
                raise InputError(f"--set {word}: known keys are {', '.join(sorted(own | net))}")
            try:
                parsed = _parse(value, getattr(config if key in own else config.network, key))
                config = replace(config, **({key: parsed} if key in own else {"network": config.network.with_(**{key: parsed})}))
            except InputError:
                raise
            except ValueError as error:
                raise InputError(f"--set {word}: {error}") from None
        return config

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainConfig:
        return cls(**(data | {"network": TransformerConfig(**data["network"]), "betas": tuple(data["betas"])}))


def _parse(value: str, like: Any) -> Any:
    if isinstance(like, bool):
        if value.lower() not in ("true", "false", "1", "0"):
            raise ValueError("give true or false")
        return value.lower() in ("true", "1")
    if isinstance(like, tuple):
        return tuple(float(v) for v in value.split(","))
    return type(like)(value)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of everything drawn at one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2_654_435_761 % (1 << 63))


@dataclass
class Objective:
    """What is minimised and validated: the masked bound or the exact autoregressive loss, nats per predicted token."""

    config: TrainConfig
    noise: MaskedNoise

    def __call__(self, network: nn.Module, x_BT: Tensor, free_BT: Tensor, rng: torch.Generator, t_B: Tensor) -> Tensor:
        """(B,) nats per predicted token of each row."""

        def predict(z_BT: Tensor, t_B: Tensor) -> Tensor:
            logits: Tensor = network(z_BT, t_B).float()
            return logits

        if self.config.objective == "autoregressive":
            nats_B = loss.autoregressive(self.noise, predict, x_BT, free_BT)
        else:
            estimate = loss.any_order if self.config.estimator == "any_order" else loss.continuous
            nats_B = estimate(self.noise, predict, x_BT, free_BT, rng, t_B)
        return nats_B / free_BT.sum(-1)

    def free(self, rows: int, rng: torch.Generator) -> Tensor:
        """Which positions are predicted: in a share of the rows the first `context` tokens are given."""
        config = self.config
        free_BT = torch.ones(rows, config.network.window, dtype=torch.bool)
        if config.objective == "masked" and config.context and config.context_share:
            given_B = torch.rand(rows, generator=rng) < config.context_share
            free_BT[given_B, : config.context] = False
        return free_BT


@torch.no_grad()
def validate(objective: Objective, network: nn.Module, windows_WT: Tensor, device: torch.device) -> tuple[float, float]:
    """(nats per token, standard error over windows) on whole windows without context; the same masks at every call."""
    config = objective.config
    passes = 1 if config.objective == "autoregressive" else config.eval_passes
    rng = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(passes):
        for x_BT in windows_WT.split(64):
            free_BT, t_B = torch.ones_like(x_BT, dtype=torch.bool), loss.draw_levels(len(x_BT), rng)
            device_rng = torch.Generator(device).manual_seed(int(torch.randint(1 << 62, (1,), generator=rng)))
            parts.append(objective(network, x_BT.to(device), free_BT.to(device), device_rng, t_B.to(device)).cpu())
    values = torch.cat(parts).double().view(passes, -1).mean(0)
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


class _Stop:
    """Ctrl-C and SIGTERM ask the loop to finish its step and save; a second Ctrl-C stops at once."""

    def __enter__(self) -> _Stop:
        self.asked = False
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


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
    accelerator = Accelerator(mixed_precision="bf16" if config.bf16 else "no")
    device, main = accelerator.device, accelerator.is_main_process
    if config.batch % accelerator.num_processes:
        raise InputError(f"batch {config.batch} does not divide over {accelerator.num_processes} processes")
    saved = out / state.FILE
    if resume and not saved.is_file():
        raise InputError(f"nothing to resume in {out}: train without --resume first")
    if not resume and saved.is_file():
        raise InputError(f"{out} holds a run already: add --resume, or choose another --out")
    documents = reading.read(config.data)
    tokenizer = Tokenizer.load(out) if resume else Tokenizer.make(config.tokenizer, "".join(documents))
    network_config = config.network.with_(vocab_size=tokenizer.vocab_size + 1)
    parts = reading.split(documents, config.val_fraction)
    train_stream, val_stream = (reading.Stream.encode(part, tokenizer, network_config.window) for part in parts)
    noise = MaskedNoise(network_config.vocab_size, tokenizer.mask_id, schedule.parse(config.noise_schedule))
    objective = Objective(config, noise)
    set_seed(config.seed)
    bare = Transformer(network_config)
    if config.compile:
        bare.compile()
    network, optimizer = accelerator.prepare(
        bare, adamw(bare, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    )
    inner = optimizer.optimizer
    ema = EMA(network.parameters(), config.ema)
    first, best = 0, math.inf
    if resume:
        meta = state.read_meta(saved)
        first, best = meta["step"], meta["best"]
        state.load(saved, network, inner, ema)
        if first >= config.steps:
            raise InputError(f"{out} is at step {first} of {config.steps} already: raise it with --set steps=N")
    model_config = ModelConfig(
        network=network_config,
        mask_token_id=tokenizer.mask_id,
        objective=config.objective,
        noise={"process": "masked", "schedule": config.noise_schedule},
        context=config.context,
        training=config.to_dict() | {"parameters": bare.parameters_count(), "tokens": len(train_stream.tokens_N)},
    )
    windows_WT = val_stream.windows()[: config.eval_windows]
    log = _Log(out, first, config.tensorboard, main)
    figures: dict[str, Any] = {}

    def save(step: int) -> None:
        average = state.save(saved, network, inner, ema, {"step": step, "best": best, "config": config.to_dict()}, main=main)
        if main:
            checkpoint.save(out, average, model_config, files=export_files(model_config, tokenizer, out.name))
        accelerator.wait_for_everyone()

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    times = (TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    progress = Progress(*columns, *times, console=console, disable=not (main and console.is_terminal))
    per_rank = config.batch // accelerator.num_processes
    own = slice(accelerator.process_index * per_rank, (accelerator.process_index + 1) * per_rank)
    last = min(config.steps, stop_after or config.steps)
    if main:
        console.print(
            f"{bare.parameters_count():,} parameters, {len(train_stream.tokens_N):,} training tokens "
            f"(sha256 {train_stream.fingerprint()}), {config.steps * config.batch * network_config.window / len(train_stream.tokens_N):.1f} "
            f"epochs, {accelerator.num_processes} process(es) on {device}, into {out}"
        )
    with _Stop() as stop, progress:
        task = progress.add_task("training", total=config.steps, completed=first, note="")
        network.train()
        since, tokens_since = time.perf_counter(), 0
        running: list[Tensor] = []
        for step in range(first, last):
            rng = step_generator(config.seed, step)
            torch.manual_seed(config.seed * 7919 + step)  # dropout
            x_BT, t_B = train_stream.draw(config.batch, rng), loss.draw_levels(config.batch, rng)
            free_BT = objective.free(config.batch, rng)
            mask_rng = torch.Generator(device).manual_seed(step_generator(config.seed + 1 + accelerator.process_index, step).initial_seed())
            lr = learning_rate(step, peak=config.lr, steps=config.steps, warmup=config.warmup, decay_share=config.decay_share)
            for group in inner.param_groups:
                group["lr"] = lr
            nats_B = objective(network, x_BT[own].to(device), free_BT[own].to(device), mask_rng, t_B[own].to(device))
            accelerator.backward(nats_B.mean())
            norm = accelerator.clip_grad_norm_(network.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(step)
            running.append(nats_B.detach().mean())
            tokens_since += config.batch * network_config.window
            done = step + 1
            stopping = _any(accelerator, stop.asked) or done == last
            if done % config.log_every == 0 or stopping:
                value = accelerator.reduce(torch.stack(running).mean(), "mean").item()
                rate = tokens_since / (time.perf_counter() - since)
                if not math.isfinite(value):
                    raise InputError(f"the loss is {value} at step {done}: lower --set lr (now {config.lr}); the last save is kept")
                figures |= {"step": done, "train_nats": value, "tokens_per_second": rate}
                log.write(done, train_nats=value, lr=lr, gradient_norm=float(norm), tokens_per_second=rate)
                running, since, tokens_since = [], time.perf_counter(), 0
            if done % config.eval_every == 0 or stopping:
                network.eval()
                with ema.swapped():
                    nats, stderr = validate(objective, network, windows_WT, device)
                    text = preview(bare, model_config, tokenizer) if preview and main and accelerator.num_processes == 1 else ""
                network.train()
                best = min(best, nats)
                figures |= {"val_nats": nats, "val_stderr": stderr, "best_val_nats": best}
                log.write(done, val_nats=nats, val_stderr=stderr, epochs=done * config.batch * network_config.window / len(train_stream.tokens_N))
                if main:
                    console.print(f"step {done}: validation {nats:.4f} +- {stderr:.4f} nats per token" + (f"\n{text}" if text else ""))
                since = time.perf_counter()
            progress.update(task, completed=done, note=f"{figures.get('train_nats', math.nan):.3f} nats, {figures.get('tokens_per_second', 0):,.0f} tokens/s")
            if done % config.save_every == 0 or stopping:
                save(done)
                since = time.perf_counter()
            if stopping:
                break
    log.close()
    if stop.asked and figures["step"] < config.steps:
        raise KeyboardInterrupt(f"stopped at step {figures['step']}, saved; go on with --resume")
    return figures


def _any(accelerator: Accelerator, flag: bool) -> bool:
    """True on every process if it is on one: all must leave at the same step."""
    if accelerator.num_processes == 1:
        return flag
    total: Tensor = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum")
    return bool(total.item() > 0)


class _Log:
    """log.jsonl, one object a line, and TensorBoard if asked. A resumed run drops the lines after the step it resumes from."""

    def __init__(self, out: Path, step: int, tensorboard: bool, main: bool) -> None:
        self.file = self.board = None
        if not main:
            return
        out.mkdir(parents=True, exist_ok=True)
        path = out / "log.jsonl"
        kept = []
        if step and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    kept += [line] if json.loads(line)["step"] <= step else []
                except json.JSONDecodeError:
                    pass  # a kill may leave half a line
        partial = path.with_suffix(".tmp")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)
        self.file = path.open("a", encoding="utf-8")
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError:
                raise InputError("TensorBoard logs need the viz extra: pip install 'dlm[viz]'") from None
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, **values: float) -> None:
        if self.file:
            self.file.write(json.dumps({"step": step} | values) + "\n")
            self.file.flush()
        for name, value in values.items():
            if self.board:
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        for sink in (self.file, self.board):
            if sink:
                sink.close()


def export_files(config: ModelConfig, tokenizer: Tokenizer, name: str) -> dict[str, str]:
    """The text files of a checkpoint beside its weights."""
    generation = {"steps": config.network.window, "sampler": "ancestral", "temperature": 1.0}
    if config.objective == "autoregressive":
        generation = {"sampler": "autoregressive", "temperature": 1.0}
    kind = "Masked diffusion" if config.objective == "masked" else "Autoregressive"
    card = (
        f"---\nlibrary_name: dlm\npipeline_tag: text-generation\n---\n# {name}\n\n{kind} language model, "
        f"{config.training.get('parameters', 0):,} parameters, window {config.network.window}, context {config.context}, trained with dlm.\n"
        f"\n```python\nimport dlm\nprint(dlm.load({name!r}).generate(length=256, seed=0).text)\n```\n"
    )
    return {
        "tokenizer.json": tokenizer.inner.to_str(),
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        "README.md": card,
    }
