"""Whether a checkpoint computes here the numbers that its own code computed: logits and losses, for families that draw at random.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dlm.errors import InputError
from dlm.language_model import LanguageModel
from dlm.noise.score import ScoreNoise

NEAR, RELATIVE = 3e-5, 1e-5  # how far numbers of the same network may lie apart

Numbers = Mapping[str, Tensor]


@dataclass(frozen=True)
class Compared:
    """One tensor of the file. apart: the largest distance."""

    name: str
    equal: bool
    apart: float

    @property
    def line(self) -> str:
        told = "equal  " if self.equal else f"differs by up to {self.apart:.2g}"
        return f"{told}  {self.name}  (at most {self.apart:.1e} apart)" if self.equal else f"{told}  {self.name}"


def _logits(lm: LanguageModel, numbers: Numbers) -> Tensor:
    return lm.logits(numbers["input_ids"], numbers.get("attention_mask"), numbers.get("t"))


def _loss(lm: LanguageModel, numbers: Numbers) -> Tensor:
    """The integrand of the bound at t, nats (B, T)."""
    x_BT, z_BT, t_B = numbers["clean_ids"], numbers["input_ids"], numbers["t"].double()
    logits_BTV = lm.predict(z_BT, t_B).double()
    if isinstance(lm.noise, ScoreNoise):
        return lm.noise.score_entropy(logits_BTV, x_BT, z_BT, t_B)
    return lm.noise.nelbo(lm.noise.log_probs(logits_BTV, z_BT, t_B), x_BT, z_BT, t_B)


def _beside(lm: LanguageModel, numbers: Numbers) -> Tensor:
    return lm.predict_beside(numbers["noisy_ids"], numbers["clean_ids"], lm.config.network.block_length)


COMPUTED: dict[str, Callable[[LanguageModel, Numbers], Tensor]] = {
    "logits": _logits,
    "log_score": _logits,
    "loss_per_token": _loss,
    "elbo_per_token": _loss,
    "training_logits_of_the_noisy_half": _beside,
}


@torch.no_grad()
def compare(lm: LanguageModel, path: Path) -> list[Compared]:
    """Every tensor of the file that `COMPUTED` names, against this model's own. InputError for a file that cannot be.

    The file has `input_ids`, `t` where the network reads the noise level, and for losses `clean_ids`.
    """
    if not path.is_file():
        raise InputError(f"no file {path}: give the numbers that the reference computed, as safetensors")
    try:
        numbers = {name: tensor.to(lm.network.device) for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise InputError(f"{path} is no safetensors file ({error})") from None
    names = [name for name in COMPUTED if name in numbers]
    if not names:
        raise InputError(f"{path} holds no numbers to compare: it needs input_ids, t, and one of {', '.join(COMPUTED)}")
    return [_compared(lm, numbers, name, path) for name in names]


def _compared(lm: LanguageModel, numbers: Numbers, name: str, path: Path) -> Compared:
    try:
        found, expected = COMPUTED[name](lm, numbers), numbers[name]
        apart = float((found - expected).abs().max())
        return Compared(name, torch.allclose(found.to(expected), expected, rtol=RELATIVE, atol=NEAR), apart)
    except KeyError as error:
        raise InputError(f"{path}: {name} needs {error} beside it") from None
    except (RuntimeError, IndexError, AttributeError) as error:
        raise InputError(f"{path}: {name} does not fit {lm.name} ({str(error).splitlines()[0]})") from None
