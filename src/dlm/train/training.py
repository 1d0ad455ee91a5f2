"""A diffusion or autoregressive model in training, as the loop takes it: its directory loads as a checkpoint after every save."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import load_file

from dlm.errors import InputError
from dlm.formats import native
from dlm.formats.native import ModelConfig
from dlm.models.hardware import multiplies_bf16
from dlm.models.transformer import Transformer
from dlm.noise.learned import LearnedNoise
from dlm.text.tokenizer import Tokenizer
from dlm.train import state
from dlm.train.config import TrainConfig
from dlm.train.learner import Learner
from dlm.train.loop import Figures, Update, Validation
from dlm.train.objective import Objective, validate
from dlm.train.setup import Setup

MANY_EPOCHS, USUAL_EPOCHS = 250, 90  # the recipes of Shakespeare, of a million characters, take the latter
Preview = Callable[[Transformer, ModelConfig, Tokenizer], str]
"""Text of the model in training, beside every validation."""


class Training:
    """The `Task` of a TrainConfig. meta: of the run that is resumed, empty for a new one."""

    loss = "train_nats"

    def __init__(
        self, config: TrainConfig, setup: Setup, accelerator: Accelerator, out: Path, meta: state.Meta, preview: Preview | None = None
    ) -> None:
        self.config, self.setup, self.accelerator, self.out = config, setup, accelerator, out
        self.preview = preview if accelerator.num_processes == 1 else None
        self.best: float = meta.get("best", math.inf)
        self.tokens_per_step = config.batch * setup.network.window
        self.remedy = f"lower --set lr (now {config.lr})"
        self.learner = Learner(config, setup.network, setup.noise, setup.training, accelerator, resume=bool(meta))
        if meta:
            state.load(out / state.FILE, self.learner.network, self.learner.optimizer, self.learner.ema)
            if self.learner.noise_weights is not None:
                self.learner.noise_weights.put_back(load_file(out / state.FILE))
        self.objective = Objective.of(config, self.learner.noise)
        self.passes = 1 if config.objective == "autoregressive" else config.eval_passes
        self.facts = {"parameters": self.learner.bare.parameters_count(), "tokens": len(setup.training.tokens_N)}
        self.text = setup.training.fingerprint()
        self.model = ModelConfig(
            network=setup.network,
            mask_token_id=setup.tokenizer.mask_id,
            objective=config.objective,
            noise=setup.noise_settings,
            context=config.context,
            training=config.to_dict() | self.facts,
            colours=setup.training.colours,
        )

    @property
    def epochs_per_step(self) -> float:
        return self.tokens_per_step / self.facts["tokens"]

    def describe(self) -> str:
        """The network and its data, in a line."""
        size = f"{self.facts['parameters']:,} parameters, {self.facts['tokens']:,} training tokens"
        epochs = f"{self.config.steps * self.epochs_per_step:.1f} epochs"
        several = f"{count} processes " if (count := self.accelerator.num_processes) > 1 else ""
        where = f"{several}on {self.accelerator.device}, into {self.out}"
        return f"{size} (sha256 {self.text}), {epochs}, {where}"

    def warning(self) -> str:
        """A line where the settings read a small text very often; empty where they do not, and for draws that vary."""
        epochs = self.config.steps * self.epochs_per_step
        if epochs <= MANY_EPOCHS or self.setup.training.varies:
            return ""
        fewer = max(1, round(USUAL_EPOCHS / self.epochs_per_step))
        return (
            f"warning: {self.config.steps} steps are {epochs:,.0f} epochs of {self.facts['tokens']:,} tokens, which are learned by heart: "
            f"--set steps={fewer} makes {USUAL_EPOCHS}, or give more text"
        )

    def precision(self) -> str:
        """A line where the other precision takes less time on this CPU; empty elsewhere."""
        has, asked = multiplies_bf16(self.learner.device), self.config.bf16
        if self.learner.device.type != "cpu" or has == asked:
            return ""
        if asked:
            return "warning: this CPU emulates bfloat16, which takes longer than float32: leave --set bf16=true away"
        return "this CPU multiplies bfloat16: --set bf16=true takes about half the time"

    def update(self, step: int) -> Update:
        return self.learner.update(step)

    def validate(self, step: int) -> Validation:
        """Of the averaged weights."""
        learner = self.learner
        learner.network.eval()
        with learner.averaged():
            setup, device = self.setup, learner.device
            nats, stderr = validate(self.objective, learner.network, setup.validation_WT, device, self.passes, setup.validation_free_WT)
            text = self.preview(learner.bare, self.described(), self.setup.tokenizer) if self.preview else ""
        learner.network.train()
        self.best = min(self.best, nats)
        return Validation(
            figures={"val_nats": nats, "val_stderr": stderr, "best_val_nats": self.best},
            logged={"val_nats": nats, "val_stderr": stderr, "epochs": step * self.epochs_per_step},
            text=f"validation {nats:.4f} +- {stderr:.4f} nats per token" + (f"\n{text}" if text else ""),
        )

    def described(self) -> ModelConfig:
        """config.json as it is now, with the weights of learned noise."""
        noise = self.learner.noise
        if not isinstance(noise, LearnedNoise):
            return self.model
        return replace(self.model, noise=self.setup.noise_settings | {"weights": list(noise.fixed())})

    def save(self, step: int, _figures: Figures, recent: list[float]) -> None:
        learner, main = self.learner, self.accelerator.is_main_process
        average = state.averaged(learner.network, learner.ema)
        if main:  # the export first: whatever can be resumed can also be loaded
            with learner.averaged():
                model = self.described()
            native.save(self.out, average, model, files=self._files())
        meta = {"verb": "train", "step": step, "best": self.best, "recent": recent, "config": self.config.to_dict()}
        meta["text"] = self.text
        more = learner.noise_weights.state() if learner.noise_weights is not None else {}
        state.save(self.out / state.FILE, learner.network, learner.optimizer, average, meta, main=main, more=more)

    def _files(self) -> dict[str, str]:
        return {
            "tokenizer.json": self.setup.tokenizer.inner.to_str(),
            "generation_config.json": json.dumps(native.generation_defaults(self.model), indent=2) + "\n",
            "README.md": native.card(self.model, self.out.resolve().name, self.facts["parameters"], str(self.out)),
        }


FIXED = {"objective", "noise", "noise_schedule", "clusters", "head", "init", "tokenizer", "val_fraction"}
"""Settings besides those of the network that a run keeps from its first step: the noise and the vocabulary are read from its directory,
and another split would validate on text that was trained on."""


def check_text(setup: Setup, data: str, meta: state.Meta, out: Path) -> None:
    """InputError where a run that is resumed would go on with another text; the same one may lie elsewhere by now."""
    was, now = meta.get("text"), setup.training.fingerprint()  # before the first release a state did not have it
    if was not in (None, now):
        raise InputError(
            f"{out} was begun with another text than {data} holds now (sha256 {was}, not {now}): give that one, or another --out"
        )


def changes(config: TrainConfig, meta: state.Meta, out: Path) -> str:
    """Settings that are not those of the last save, for people.

    InputError where the weights would not fit, or no step is left.
    """
    before = meta["config"]
    now = json.loads(json.dumps(config.to_dict()))
    old, new = ({key: value for key, value in c.items() if key != "network"} | c["network"] for c in (before, now))
    changed = [key for key, value in old.items() if new.get(key) != value]
    fixed = before["network"].keys() - {"vocab_size", "dropout", "backend"} | FIXED
    wrong = [f"{key}={old[key]}" for key in changed if key in fixed]
    if wrong:
        raise InputError(f"{out} was begun with {', '.join(wrong)}: resume with --set {' --set '.join(wrong)}")
    if meta["step"] >= config.steps:
        raise InputError(f"{out} is at step {meta['step']} of {config.steps} already: raise it with --set steps=N")
    return ", ".join(f"{key} {old[key]} -> {new.get(key)}" for key in changed)
