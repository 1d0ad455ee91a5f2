"""Trainings worth repeating: a function that returns a TrainConfig, the measured result beside it.

The first line of each docstring stands in `dlm list`, which imports no torch: neither does this file until a recipe is made.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from dlm.errors import InputError

if TYPE_CHECKING:
    from dlm.models.config import TransformerConfig
    from dlm.train.config import TrainConfig

SHAKESPEARE = "shakespeare"  # bundled: dlm.bundled


def _config(**settings: object) -> TrainConfig:
    from dlm.train.config import TrainConfig

    return TrainConfig(**settings)  # type: ignore[arg-type]


def _network(**sizes: object) -> TransformerConfig:
    from dlm.models.config import TransformerConfig

    return TransformerConfig(vocab_size=1, **sizes)  # type: ignore[arg-type]


def shakespeare_mask() -> TrainConfig:
    """Masked diffusion, 2.7M parameters, 20.4 epochs, two hours of CPU; <= 1.931 +- 0.009 nats per character on the validation split."""
    return _config(data=SHAKESPEARE, steps=5000)


def shakespeare_ar() -> TrainConfig:
    """The autoregressive baseline, 6.4 epochs; 1.4714 nats per character on the validation split."""
    network = _network(width=192, attention="causal")
    return _config(data=SHAKESPEARE, network=network, objective="autoregressive", steps=1570)


def shakespeare_uniform() -> TrainConfig:
    """900 steps of uniform noise on top of shakespeare-mask, half an hour of one core."""
    return _config(data=SHAKESPEARE, init="shakespeare-mask", noise="uniform", steps=900, eval_every=200)


def shakespeare_semantic() -> TrainConfig:
    """900 steps of semantic noise: first to a character of the same class, then to any."""
    return replace(shakespeare_uniform(), noise="semantic")


def shakespeare_hybrid() -> TrainConfig:
    """900 steps with masks and replacements, half and half at alpha = 1/2."""
    return replace(shakespeare_uniform(), noise="hybrid:0.5")


def shakespeare_light(layers: int) -> TrainConfig:
    """`shakespeare-mask` in fewer blocks: begun with blocks of its own and taught by it."""
    base = _config(data=SHAKESPEARE, init="shakespeare-mask", teacher="shakespeare-mask", lr=1e-3, warmup=20)
    return replace(base, network=base.network.with_(layers=layers), eval_every=200, eval_windows=128, save_every=50)


def shakespeare_mask_2() -> TrainConfig:
    """shakespeare-mask in a third of its blocks, taught by it."""
    return replace(shakespeare_light(2), steps=1000)


def shakespeare_mask_1() -> TrainConfig:
    """shakespeare-mask in a sixth of its blocks, taught by it."""
    return replace(shakespeare_light(1), steps=1200)


def shakespeare_mask_early() -> TrainConfig:
    """shakespeare-mask-2 trained further at noise levels above one half, where it works alone."""
    base = replace(shakespeare_mask_2(), init="shakespeare-mask-2", levels=(0.5, 1.0))
    return replace(base, steps=1500)


def kjv_mask() -> TrainConfig:
    """Masked diffusion on the King James Bible in subwords.

    The text: `bible -l100000 -f Gen1:1-Rev22:21 | sed 's/^[^ ]* //' > kjv.txt`
    with Debian's bible-kjv."""
    network = _network(width=192, window=128)
    base = _config(data="kjv.txt", tokenizer="bpe:1024", network=network, batch=32, context=0, context_share=0.0)
    return replace(base, steps=900, eval_every=200, eval_windows=128, save_every=100)


def kjv_mask_2() -> TrainConfig:
    """kjv-mask in a third of its blocks, taught by it."""
    base = replace(kjv_mask(), init="runs/kjv-mask", teacher="runs/kjv-mask", lr=1e-3, warmup=20, steps=250)
    return replace(base, network=base.network.with_(layers=2))


def kjv_ar() -> TrainConfig:
    """The autoregressive judge of both."""
    base = kjv_mask()
    return replace(base, network=base.network.with_(attention="causal"), objective="autoregressive", steps=400)


def shakespeare_block() -> TrainConfig:
    """Block diffusion on top of shakespeare-mask, one network for blocks of 1 to 256; 700 steps, 40 minutes of one core."""
    network = _network(width=192, attention="block_causal", block_length=16)
    base = _config(data=SHAKESPEARE, network=network, block_lengths=(1, 4, 16, 64, 256), init="shakespeare-mask", lr=1e-3)
    return replace(base, steps=700, batch=8, warmup=20, eval_every=175, eval_windows=128, save_every=50)


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "shakespeare-mask": shakespeare_mask,
    "shakespeare-mask-2": shakespeare_mask_2,
    "shakespeare-mask-1": shakespeare_mask_1,
    "shakespeare-ar": shakespeare_ar,
    "shakespeare-mask-early": shakespeare_mask_early,
    "kjv-mask": kjv_mask,
    "kjv-mask-2": kjv_mask_2,
    "kjv-ar": kjv_ar,
    "shakespeare-uniform": shakespeare_uniform,
    "shakespeare-semantic": shakespeare_semantic,
    "shakespeare-hybrid": shakespeare_hybrid,
    "shakespeare-block": shakespeare_block,
}


def find(name: str) -> TrainConfig:
    """The recipe of that name; InputError suggests the nearest."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
        raise InputError(f"no recipe {name!r}; " + (f"did you mean {close[0]}?" if close else f"known: {', '.join(RECIPES)}"))
    return RECIPES[name]()
