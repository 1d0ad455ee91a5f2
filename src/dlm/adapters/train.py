"""`dlm convert`, top to bottom: an autoregressive base learns to draft at masks.

Everything random at step n is a function of (seed, n), so a run that stopped and resumes equals one that never did.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import Tensor, nn

from dlm.adapters import attach, lora
from dlm.adapters import medusa as extra
from dlm.adapters.distillation_data import Rows
from dlm.adapters.objective import LOSSES, Acceptance, acceptance, consistency, tokens_per_forward
from dlm.errors import InputError
from dlm.files import sweep
from dlm.formats import native
from dlm.models.transformer import Transformer
from dlm.train import state
from dlm.train.learner import step_generator
from dlm.train.log import Log
from dlm.train.loop import QUIET, Stop
from dlm.train.optimisers import adamw, learning_rate

if TYPE_CHECKING:
    from dlm.language_model import LanguageModel

MOMENT = "optimizer."


@dataclass(frozen=True)
class ConvertConfig:
    """One conversion. The defaults suit a small base and minutes of a laptop."""

    stride: int = 4  # tokens that a call may commit: one of the base's own and stride - 1 drafts
    heads: int = 0  # train that many on the last hidden state instead of an adapter; stride is then one more
    full: bool = False  # train the base itself instead of an adapter; then it is no longer lossless
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = lora.TARGETS
    chain: int = 384  # inner width of the adapter's `dlm.adapters.chain`, 0: none
    init: str = ""  # an adapter to begin with, directory or bundled name; one without a chain gets a fresh one
    loss: str = "kl"  # kl: what the clean half says | ce: the text
    clean_weight: float = 0.2  # of the clean half's cross entropy with `full`; 0: the ratio of the two losses
    steps: int = 1000
    batch: int = 8
    length: int = 256  # positions of a row
    lr: float = 2e-3
    warmup: int = 50
    decay_share: float = 0.3
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    log_every: int = 20
    eval_every: int = 250
    save_every: int = 250

    def __post_init__(self) -> None:
        if self.heads:
            extra.HeadsConfig(self.heads)  # its InputErrors are ours
            object.__setattr__(self, "stride", self.heads + 1)
        lora.AdapterConfig(self.rank, self.alpha, self.targets, self.stride, self.chain)  # as are those
        if self.heads and self.full:
            raise InputError("heads stand on a base that stays as it is: leave --full or --heads away")
        if self.heads or self.full:
            object.__setattr__(self, "chain", 0)
            if self.init:
                raise InputError("--init is an adapter to begin with: leave --full and --heads away")
        if self.loss not in LOSSES:
            raise InputError(f"unknown loss {self.loss!r}; known: {', '.join(LOSSES)}")
        least = dict.fromkeys(("steps", "batch", "log_every", "eval_every", "save_every"), 1)
        for name, low in (least | {"seed": 0, "warmup": 0, "clean_weight": 0, "weight_decay": 0}).items():
            if not getattr(self, name) >= low:
                raise InputError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr must be above 0, got {self.lr}")

    def check(self, lm: LanguageModel) -> None:
        """InputError for a model that cannot be converted with these settings."""
        if lm.is_diffusion or lm.config.network.attention != "causal":
            raise InputError(f"{lm.name} is a diffusion model already: convert an autoregressive one")
        if not (least := self.stride + 2) <= self.length <= lm.window:
            raise InputError(f"length must lie in {least} (stride + 2) .. {lm.window} (the window of {lm.name}), got {self.length}")


def convert(
    lm: LanguageModel,
    config: ConvertConfig,
    rows: Rows,
    out: str | Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train into the directory `out`: an adapter for `lm`, or with `heads` those, or with `full` a checkpoint. Returns the last figures.

    resume: go on from the state in `out`. stop_after: leave after that step, as Ctrl-C would. The network of `lm` then has the adapter,
    or the new weights. Raises KeyboardInterrupt after saving when interrupted; InputError for settings that cannot work.
    """
    config.check(lm)
    out, console, network = Path(out), console or Console(stderr=True), lm.network
    device, mask_id = network.device, lm.tokenizer.mask_id
    saved, base = out / state.FILE, lora.fingerprint(network)
    facts = {"base": lm.name, "fingerprint": base, "texts": rows.fingerprint}
    meta = _meta(saved, config, facts, resume=resume)
    first, before_S, before_greedy_S = meta["step"], meta["before"], meta["before_greedy"]
    recent = meta["recent"]  # losses since the last line of the log
    adapter = lora.AdapterConfig(config.rank, config.alpha, config.targets, config.stride, config.chain, lm.name, base)
    heads = None
    if config.full or config.heads:
        lora.detach(network)
        network.requires_grad_(config.full)
    else:
        lora.attach(network, adapter, mask_id, seed=config.seed)
        if config.init and not resume:
            attach.begin_with(network, config.init)
    if config.heads:
        heads = extra.Heads(network, extra.HeadsConfig(config.heads, lm.name, base))
    learner = heads or network
    named = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    optimizer = adamw(learner, lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    if resume:
        _load(saved, named, optimizer)
    held_x, held_free = (part.to(device) for part in rows.held)
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    log = Log(out, first, tensorboard=False, main=True)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def measured() -> Acceptance:
        if heads is not None:
            return extra.acceptance(network, heads, held_x, held_free, mask_id=mask_id, batch=config.batch)
        return acceptance(network, held_x, held_free, stride=config.stride, mask_id=mask_id, batch=config.batch)

    def save(step: int, figures: dict[str, Any]) -> None:
        made = {"settings": asdict(config)} | facts | figures
        if config.full:  # the export first: whatever can be resumed can also be loaded
            trained = replace(lm.config, training=made | {"stride": config.stride})
            native.save(out, network.state_dict(), trained, files=lm.files() | {"README.md": lm.card()})
        elif heads is not None:
            extra.save_heads(out, heads, replace(heads.config, made=made))
        else:
            lora.save_adapter(out, network, replace(adapter, made=made), dtype=torch.bfloat16)  # what is trained on is float32
        before = {"before": before_S, "before_greedy": before_greedy_S}
        _save(saved, named, optimizer, {"step": step, "recent": recent, "config": asdict(config)} | before | facts)

    trained = sum(p.numel() for p in named.values())
    share = f"{trained:,} numbers to train ({trained / network.parameters_count():.1%} of all)"
    say(f"{share}, {rows.tokens:,} tokens to learn from, stride {config.stride}, on {device}, into {out}")
    with Stop(patient=False) as stop, log:
        if first == 0:
            before = measured()
            before_S, before_greedy_S = before.sampled, before.greedy
            _note(log, 0, before)
            say(f"before: {describe(before_S, before_greedy_S)}")
        columns = (TextColumn("converting"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        times = (TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        figures: dict[str, Any] = {"step": first}
        last = config.steps if stop_after is None else min(config.steps, stop_after)
        with Progress(*columns, *times, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=config.steps, completed=first, note="")
            since, counted, quiet_until = time.perf_counter(), first, 0.0
            for step in range(first, last):
                loss, gradient, lr = _update(network, heads, config, rows, optimizer, step, mask_id)
                done, stopping = step + 1, stop.asked or step + 1 == last
                if not math.isfinite(loss + gradient):
                    raise InputError(f"the loss is {loss} at step {done}: lower --lr (now {config.lr}); the last save is kept")
                recent.append(loss)
                nats = sum(recent) / len(recent)
                rate = (done - counted) * config.batch * config.length / (time.perf_counter() - since)
                figures |= {"step": done, "nats": nats, "tokens_per_second": rate}
                if done % config.log_every == 0 or done == config.steps:
                    log.write(done, nats=nats, lr=lr, gradient_norm=gradient, tokens_per_second=rate)
                    if not console.is_terminal and time.perf_counter() >= quiet_until:
                        eta = timedelta(seconds=round((config.steps - done) * config.batch * config.length / rate))
                        say(f"step {done}/{config.steps}: {nats:.4f} nats per mask, {rate:,.0f} tokens/s, eta {eta}")
                        quiet_until = time.perf_counter() + QUIET
                    since, counted = time.perf_counter(), done
                    recent.clear()
                paused = time.perf_counter()
                if done % config.eval_every == 0 or done == config.steps:
                    after = measured()
                    figures |= {"accept_before": before_S, "accept": after.sampled}
                    figures |= {"greedy_before": before_greedy_S, "greedy": after.greedy} | _note(log, done, after)
                    say(f"step {done}: {describe(after.sampled, after.greedy)}")
                if done % config.save_every == 0 or stopping:
                    save(done, figures)
                since += time.perf_counter() - paused
                progress.update(task, completed=done, note=f"{nats:.3f} nats, {rate:,.0f} tokens/s")
                if stopping:
                    break
    network.requires_grad_(False)
    if stop.asked and figures["step"] < config.steps:
        raise KeyboardInterrupt(f"stopped at step {figures['step']}, saved; go on with --resume")
    return figures


def describe(accept_S: list[float], greedy_S: list[float]) -> str:
    """Acceptance by slot, at temperature 1 and 0, and what it is worth, for people."""
    restart, tree = tokens_per_forward(accept_S), tokens_per_forward(accept_S, restart=False)
    slots, greedy = (" ".join(f"{a:.3f}" for a in chances) for chances in (accept_S, greedy_S))
    worth = f"{restart:.2f} tokens per forward, {tree:.2f} where every prefix has drafts (tree)"
    return f"acceptance by slot {slots} (greedy {greedy}): {worth}"


def _note(log: Log, step: int, found: Acceptance) -> dict[str, float]:
    figures = {f"tokens_per_forward{name}": tokens_per_forward(found.sampled, restart=not name) for name in ("", "_tree")}
    slots = {"accept": found.sampled, "greedy": found.greedy}
    log.write(step, **{f"{name}_{slot}": a for name, chances in slots.items() for slot, a in enumerate(chances, 1)}, **figures)
    return figures


def _update(
    network: Transformer,
    heads: extra.Heads | None,
    config: ConvertConfig,
    rows: Rows,
    optimizer: torch.optim.Optimizer,
    step: int,
    mask_id: int,
) -> tuple[float, float, float]:
    """Step `step` of the run: (nats per mask, gradient norm, learning rate)."""
    rng = step_generator(config.seed, step)
    x_BT, free_BT = rows.draw(config.batch, rng)
    phases = torch.arange(config.stride - 1).expand(config.batch, -1)  # every position meets every slot: beside a frozen text at once
    phase_BP = torch.randint(config.stride - 1, (config.batch, 1), generator=rng) if config.full else phases
    lr = learning_rate(step, peak=config.lr, steps=config.steps, warmup=config.warmup, decay_share=config.decay_share)
    for group in optimizer.param_groups:
        group["lr"] = lr
    clean = config.clean_weight if config.full else None
    parts = (part.to(network.device) for part in (x_BT, free_BT, phase_BP))
    if heads is not None:
        nats_B = extra.foresight(network, heads, *itertools.islice(parts, 2), mask_id=mask_id, how=config.loss, measure=False).nats_B
    else:
        nats_B = consistency(network, *parts, stride=config.stride, mask_id=mask_id, how=config.loss, clean=clean, measure=False).nats_B
    nats_B.mean().backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], config.clip)
    optimizer.step()
    optimizer.zero_grad()
    return nats_B.detach().mean().item(), norm.item(), lr


def _meta(saved: Path, config: ConvertConfig, facts: dict[str, str], *, resume: bool) -> dict[str, Any]:
    """Where a run begins. InputError where there is nothing to go on from, or what is there does not go on with these settings."""
    out = saved.parent
    if resume and not saved.is_file():
        raise InputError(f"nothing to resume in {out}: convert without --resume first")
    if not resume and saved.is_file():
        raise InputError(f"{out} holds a run already: add --resume, or choose another --out")
    if not resume:
        return {"step": 0, "before": [], "before_greedy": [], "recent": []}
    meta = state.read_meta(saved)
    if "before" not in meta:
        raise InputError(f"{out} holds a run of dlm train, not of dlm convert: choose another --out")
    if changed := [key for key in ("fingerprint", "texts") if meta[key] != facts[key]]:
        what = {"fingerprint": f"another base ({meta['base']})", "texts": "another text"}
        raise InputError(f"{out} was begun with {' and '.join(what[key] for key in changed)}: choose another --out")
    was, now = meta["config"], json.loads(json.dumps(asdict(config)))
    fixed = ("stride", "heads", "full", "rank", "alpha", "targets", "chain", "loss", "length", "seed")
    if wrong := [f"{key}={was.get(key)}" for key in fixed if was.get(key) != now[key]]:
        raise InputError(f"{out} was begun with {', '.join(wrong)}: resume with the same")
    if meta["step"] >= config.steps:
        raise InputError(f"{out} is at step {meta['step']} of {config.steps} already: raise --steps")
    return meta


def _save(path: Path, named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, meta: dict[str, Any]) -> None:
    """What is trained, its moments and the step in one file, renamed into place; a frozen base is not in it."""
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in named.items()}
    for name, p in named.items():
        tensors |= {f"{MOMENT}{name}.{key}": value for key, value in optimizer.state[p].items()}
    state.write(path, {k: v.cpu().contiguous() for k, v in tensors.items()}, meta)


@torch.no_grad()
def _load(path: Path, named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    tensors = load_file(path)
    for name, p in named.items():
        p.copy_(tensors.pop(name))
    for key, value in tensors.items():
        name, _, moment = key.removeprefix(MOMENT).rpartition(".")
        optimizer.state[named[name]][moment] = value if moment == "step" else value.to(named[name].device)
