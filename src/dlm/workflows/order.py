"""What a model with learned weights of its noise writes first: its positions, or its tokens, by weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter

import torch

from dlm.errors import InputError
from dlm.noise.learned import LearnedNoise
from dlm.noise.masked import MaskedNoise
from dlm.noise.process import name_of
from dlm.workflows.inputs import FORMAT, Model, language_model


@dataclass(frozen=True)
class Place:
    """A position, counted from 0, or a token as it is written. half: the time at which half of them are masked, 1 being noise: the higher,
    the earlier it is written."""

    label: str
    weight: float
    half: float


@dataclass(frozen=True)
class LearnedOrder:
    """The places of a model in their own order. what: position or token."""

    model: str
    process: str
    what: str
    places: tuple[Place, ...]

    @property
    def first(self) -> tuple[Place, ...]:
        """Those written first at the front."""
        return tuple(sorted(self.places, key=attrgetter("weight"), reverse=True))

    def record(self) -> Mapping[str, object]:
        """As `dlm show --json` prints it."""
        return {"format": FORMAT} | asdict(self)


def learned_order(model: Model, device: str = "cpu") -> LearnedOrder:
    """The weights of a model of ordered noise or GenMD4's. InputError for a model of other noise."""
    lm = language_model(model, device)
    noise = lm.noise
    if not isinstance(noise, LearnedNoise):
        raise InputError(f"{lm.name} has no learned weights to show: train one with --noise ordered or --noise genmd4")
    by_position = isinstance(noise, MaskedNoise)
    weights = noise.weight_N(noise.count(lm.window), torch.zeros(())).tolist()
    labels = map(str, range(lm.window)) if by_position else map(lm.tokenizer.piece, range(lm.tokenizer.vocab_size))
    half = 0.5 ** (1 / torch.tensor(weights, dtype=torch.float64))  # the share of the noise, as `schedule` has it in time
    times = noise.schedule.inverse(1 - half).tolist()
    places = tuple(Place(label, w, t) for label, w, t in zip(labels, weights, times, strict=False))  # the mask has no place
    return LearnedOrder(lm.name, name_of(type(noise)), "position" if by_position else "token", places)
