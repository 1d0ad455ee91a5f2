"""An autoregressive base learns to write draft tokens, as the training loop takes it: an adapter, Medusa heads, or the base itself.

Everything random at step n is a function of (seed, n), so a run that stopped and resumes is bitwise identical to one that never did.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dlm import seeds
from dlm.adapters import attach, lora, medusa
from dlm.adapters.distillation_data import Rows
from dlm.adapters.objective import LOSSES, Acceptance, acceptance, consistency
from dlm.errors import InputError, unknown
from dlm.models.transformer import Transformer
from dlm.sampling.autoregressive.draft_length import tokens_per_forward
from dlm.train import state
from dlm.train.learner import step_generator
from dlm.train.loop import Figures, Update, Validation
from dlm.train.optimisers import Settings, learning_rate, make, set_learning_rate


@dataclass(frozen=True)
class ConvertConfig:
    """One conversion. The defaults suit a small base and minutes of a laptop. InputError for settings that cannot work."""

    stride: int = 4  # tokens that a forward pass may commit: one of the base's own and stride - 1 draft tokens
    heads: int = 0  # Medusa: train so many heads on the last hidden state instead of an adapter; stride is then one more
    full: bool = False  # train the base itself instead of an adapter; then it is no longer lossless
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = lora.TARGETS
    chain: int = 384  # inner width of the adapter's `dlm.adapters.chain`, 0: none
    init: str = ""  # an adapter to begin with, directory or bundled name; one without a chain gets a fresh one
    loss: str = "kl"  # kl: KL divergence from the base's predictions on clean text | ce: cross entropy of the text
    clean_weight: float = 0.2  # with `full`, of the cross entropy on clean text; 0: the ratio of the two losses
    steps: int = 1000
    batch: int = 8
    length: int = 256  # positions of a row
    optimizer: str = "adamw"
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
            medusa.HeadsConfig(self.heads)  # its InputErrors are ours
            object.__setattr__(self, "stride", self.heads + 1)
        lora.AdapterConfig(self.rank, self.alpha, self.targets, self.stride, self.chain)  # as are those
        if self.heads and self.full:
            raise InputError("heads stand on a base that stays as it is: leave --full or --heads away")
        if self.heads or self.full:
            object.__setattr__(self, "chain", 0)
            if self.init:
                raise InputError("--init is an adapter to begin with: leave --full and --heads away")
        if self.loss not in LOSSES:
            raise unknown("loss", self.loss, LOSSES)
        seeds.check(self.seed)
        for name, low in MIN_SETTINGS.items():
            if not getattr(self, name) >= low:
                raise InputError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr must be above 0, got {self.lr}")

    def check(self, base: Base) -> None:
        """InputError for a model that cannot be converted with these settings."""
        if not base.autoregressive:
            raise InputError(f"{base.name} is a diffusion model already: convert an autoregressive one")
        window = base.network.config.window
        if not (least := self.stride + 2) <= self.length <= window:
            raise InputError(f"length must lie in {least} (stride + 2) .. {window} (the window of {base.name}), got {self.length}")


MIN_SETTINGS = {
    **dict.fromkeys(("steps", "batch", "log_every", "eval_every", "save_every"), 1),
    **dict.fromkeys(("warmup", "clean_weight", "weight_decay"), 0),
}
FIXED = ("stride", "heads", "full", "rank", "alpha", "targets", "chain", "loss", "length", "seed")  # by a run from its first step on


@dataclass(frozen=True)
class Base:
    """The model that is converted. save: writes its checkpoint into a directory, with these facts about the training in its config."""

    name: str
    network: Transformer
    mask_id: int
    autoregressive: bool
    save: Callable[[Path, dict[str, Any]], None]


class Drafting(Protocol):
    """The drafters that can be trained."""

    @property
    def module(self) -> nn.Module:
        """Its parameters that require gradients are those to train."""

    def nats(self, x_BT: Tensor, free_BT: Tensor, rng: torch.Generator, /) -> Tensor:
        """Training loss (B,) of each row."""

    def acceptance(self, x_BT: Tensor, free_BT: Tensor) -> Acceptance:
        """Chance that a draft token is accepted, by slot, on held-out rows."""

    def save(self, out: Path, made: Figures) -> None:
        """Write it so that it loads. made: how it was trained."""


class AdapterDrafting:
    """Masks behind the text, with a LoRA adapter that acts at masks alone."""

    def __init__(self, base: Base, config: ConvertConfig, fingerprint: str, *, fresh: bool) -> None:
        self.base, self.config, self.module = base, config, base.network
        self.adapter = lora.AdapterConfig(config.rank, config.alpha, config.targets, config.stride, config.chain, base.name, fingerprint)
        lora.attach(base.network, self.adapter, base.mask_id, seed=config.seed)
        if config.init and fresh:
            attach.begin_with(base.network, config.init)

    def nats(self, x_BT: Tensor, free_BT: Tensor, _rng: torch.Generator) -> Tensor:
        phase_BP = torch.arange(self.config.stride - 1).expand(len(x_BT), -1)  # beside a frozen text every position meets every slot
        return self._nats(x_BT, free_BT, phase_BP, clean=None)

    def _nats(self, x_BT: Tensor, free_BT: Tensor, phase_BP: Tensor, clean: float | None) -> Tensor:
        network, config = self.base.network, self.config
        sizes = {"stride": config.stride, "mask_id": self.base.mask_id}
        phase_BP = phase_BP.to(x_BT.device)
        return consistency(network, x_BT, free_BT, phase_BP, **sizes, how=config.loss, clean=clean, measure=False).nats_B

    def acceptance(self, x_BT: Tensor, free_BT: Tensor) -> Acceptance:
        config = self.config
        return acceptance(self.base.network, x_BT, free_BT, stride=config.stride, mask_id=self.base.mask_id, batch=config.batch)

    def save(self, out: Path, made: Figures) -> None:
        lora.save_adapter(out, self.base.network, replace(self.adapter, made=made), dtype=torch.bfloat16)  # trained in float32


class FullDrafting(AdapterDrafting):
    """Masks behind the text, and all weights of the base."""

    def __init__(self, base: Base, config: ConvertConfig) -> None:
        self.base, self.config, self.module = base, config, base.network
        lora.detach(base.network)
        base.network.requires_grad_(True)

    def nats(self, x_BT: Tensor, free_BT: Tensor, rng: torch.Generator) -> Tensor:
        phase_B1 = torch.randint(self.config.stride - 1, (len(x_BT), 1), generator=rng)
        return self._nats(x_BT, free_BT, phase_B1, clean=self.config.clean_weight)

    def save(self, out: Path, made: Figures) -> None:
        self.base.save(out, made | {"stride": self.config.stride})


class HeadsDrafting:
    """Medusa heads on the last hidden state of a frozen base."""

    def __init__(self, base: Base, config: ConvertConfig, fingerprint: str) -> None:
        self.base, self.config = base, config
        lora.detach(base.network)
        base.network.requires_grad_(False)
        self.heads = medusa.Heads(base.network, medusa.HeadsConfig(config.heads, base.name, fingerprint))
        self.module = self.heads

    def nats(self, x_BT: Tensor, free_BT: Tensor, _rng: torch.Generator) -> Tensor:
        network, mask_id = self.base.network, self.base.mask_id
        return medusa.foresight(network, self.heads, x_BT, free_BT, mask_id=mask_id, how=self.config.loss, measure=False).nats_B

    def acceptance(self, x_BT: Tensor, free_BT: Tensor) -> Acceptance:
        return medusa.acceptance(self.base.network, self.heads, x_BT, free_BT, mask_id=self.base.mask_id, batch=self.config.batch)

    def save(self, out: Path, made: Figures) -> None:
        medusa.save_heads(out, self.heads, replace(self.heads.config, made=made))


def drafting(base: Base, config: ConvertConfig, fingerprint: str, *, fresh: bool) -> Drafting:
    """The adapter of these settings, put on the base. fresh: a new run, which may begin with an adapter."""
    if config.full:
        return FullDrafting(base, config)
    return HeadsDrafting(base, config, fingerprint) if config.heads else AdapterDrafting(base, config, fingerprint, fresh=fresh)


class Conversion:
    """The `Task` of a ConvertConfig. meta: of the run that is resumed, empty for a new one. InputError where it cannot go on."""

    loss = "nats"

    def __init__(self, base: Base, config: ConvertConfig, rows: Rows, out: Path, meta: state.Meta) -> None:
        self.base, self.config, self.rows, self.out = base, config, rows, out
        self.device = base.network.device
        fingerprint = lora.fingerprint(base.network)
        self.facts = {"base": base.name, "fingerprint": fingerprint, "texts": rows.fingerprint}
        if meta:
            check_resumed(config, self.facts, meta, out)
        self.before = Acceptance(meta.get("before", []), meta.get("before_greedy", []))
        self.tokens_per_step = config.batch * config.length
        self.remedy = f"lower --lr (now {config.lr})"
        self.drafting = drafting(base, config, fingerprint, fresh=not meta)
        module = self.drafting.module
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        settings = Settings(config.lr, weight_decay=config.weight_decay, bf16=self.device.type == "cuda")
        self.optimizer = make(config.optimizer, module, settings)
        if meta:
            state.load_trained(out / state.FILE, self.named, self.optimizer)
        self.held_x_BT, self.held_free_BT = (part.to(self.device) for part in rows.held)

    def describe(self) -> str:
        """The adapter and its data, in a line."""
        trained = sum(p.numel() for p in self.named.values())
        share = f"{trained:,} parameters to train ({trained / self.base.network.parameters_count():.1%} of all)"
        return f"{share}, {self.rows.tokens:,} training tokens, stride {self.config.stride}, on {self.device}, into {self.out}"

    def update(self, step: int) -> Update:
        config = self.config
        rng = step_generator(seeds.folded(config.seed), step)
        x_BT, free_BT = (part.to(self.device) for part in self.rows.draw(config.batch, rng))
        lr = learning_rate(step, peak=config.lr, steps=config.steps, warmup=config.warmup, decay_share=config.decay_share)
        set_learning_rate(self.optimizer, lr)
        nats_B = self.drafting.nats(x_BT, free_BT, rng)
        nats_B.mean().backward()
        norm = nn.utils.clip_grad_norm_(self.named.values(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Update(nats_B.detach().mean(), norm, lr)

    def measure_before(self) -> Validation:
        """The acceptance before the first step, which every validation stands beside."""
        self.before = self.drafting.acceptance(self.held_x_BT, self.held_free_BT)
        return Validation({}, self._logged(self.before), f"before: {describe(self.before)}")

    def validate(self, _step: int) -> Validation:
        after = self.drafting.acceptance(self.held_x_BT, self.held_free_BT)
        figures = {"accept_before": self.before.sampled, "accept": after.sampled}
        figures |= {"greedy_before": self.before.greedy, "greedy": after.greedy}
        return Validation(figures | worth(after), self._logged(after), describe(after))

    def _logged(self, found: Acceptance) -> dict[str, float]:
        slots = {"accept": found.sampled, "greedy": found.greedy}
        return {f"{name}_{slot}": a for name, chances in slots.items() for slot, a in enumerate(chances, 1)} | worth(found)

    def save(self, step: int, figures: Figures, recent: list[float]) -> None:
        # the export first: whatever can be resumed can also be loaded
        self.drafting.save(self.out, {"settings": asdict(self.config)} | self.facts | figures)
        meta = {"verb": "convert", "step": step, "recent": recent, "config": asdict(self.config)} | self.facts
        meta |= {"before": self.before.sampled, "before_greedy": self.before.greedy}
        state.save_trained(self.out / state.FILE, self.named, self.optimizer, meta)


def worth(found: Acceptance) -> dict[str, float]:
    """Tokens per forward pass, by a chain of draft tokens and by a tree in which every prefix has some."""
    return {f"tokens_per_forward{name}": tokens_per_forward(found.sampled, restart=not name) for name in ("", "_tree")}


def describe(found: Acceptance) -> str:
    """Acceptance by slot, at temperature 1 and 0, and its worth, as text."""
    slots, greedy = (" ".join(f"{a:.3f}" for a in chances) for chances in (found.sampled, found.greedy))
    chain, tree = worth(found).values()
    return f"acceptance by slot {slots} (greedy {greedy}): {chain:.2f} tokens per forward, {tree:.2f} where every prefix has drafts (tree)"


def check_resumed(config: ConvertConfig, facts: Mapping[str, str], meta: state.Meta, out: Path) -> None:
    """InputError where the run in `out` has another base, text or shape, or no step is left."""
    if changed := [key for key in ("fingerprint", "texts") if meta[key] != facts[key]]:
        names = {"fingerprint": f"another base ({meta['base']})", "texts": "another text"}
        raise InputError(f"{out} was begun with {' and '.join(names[key] for key in changed)}: choose another --out")
    was, now = meta["config"], json.loads(json.dumps(asdict(config)))
    if wrong := [f"{key}={was.get(key)}" for key in FIXED if was.get(key) != now[key]]:
        raise InputError(f"{out} was begun with {', '.join(wrong)}: resume with the same")
    if meta["step"] >= config.steps:
        raise InputError(f"{out} is at step {meta['step']} of {config.steps} already: raise --steps")
