"""A config resolved once: text, tokenizer, network, noise and clusters, before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.files import read_json
from dlm.formats import native
from dlm.models.config import TransformerConfig
from dlm.noise import clusters, process
from dlm.noise.process import Process
from dlm.noise.replacement import ReplacementNoise
from dlm.text.tokenizer import Tokenizer
from dlm.train import data as reading
from dlm.train import data_kinds
from dlm.train.config import TrainConfig
from dlm.train.data import Stream

SHUFFLED = "shuffled"


@dataclass(frozen=True)
class Setup:
    """The parts of a run. noise_settings: the entry of config.json that makes the noise again; W windows to validate on, and their
    positions to predict: a condition is given where every row of the training has one."""

    tokenizer: Tokenizer
    network: TransformerConfig
    noise: Process
    noise_settings: dict[str, Any]
    training: Stream
    validation_WT: Tensor
    validation_free_WT: Tensor


def resolve(config: TrainConfig, resumed: Path | None = None) -> Setup:
    """resumed: the directory of a run that goes on with the tokenizer and the noise that it began with.

    InputError for text, tokenizer, clusters or noise that do not fit together.
    """
    tokenizer, training, validation = _streams(config, resumed)
    training = replace(training, augment=config.augment)
    settings = native.load_config(resumed).noise if resumed else noise_settings(config, tokenizer, training)
    tokenizer = tokenizer.with_classes(settings.get("names", ()))
    network = config.network.with_(vocab_size=tokenizer.ids)
    validation_WT = validation.windows(config.eval_windows)
    if len(validation_WT) < 2:
        raise InputError(f"the validation part fills one window of {network.window}, two are needed: more text or val_fraction")
    noise = process.make(settings, network.vocab_size, tokenizer.mask_id)
    all_WT, always = torch.ones_like(validation_WT, dtype=torch.bool), float(config.context_share == 1)
    free_WT = validation.free(validation_WT, all_WT, always, torch.Generator().manual_seed(0))
    return Setup(tokenizer, network, noise, settings, training, validation_WT, free_WT)


def _streams(config: TrainConfig, resumed: Path | None) -> tuple[Tokenizer, Stream, Stream]:
    """The tokenizer, and the parts to train and to validate on."""
    if (kind := data_kinds.find(config.data)) is not None:
        window, share = config.network.window, config.val_fraction
        return kind.tokenizer(), kind.stream("train", window, share), kind.stream("val", window, share)
    parts = reading.split(reading.read(config.data), config.val_fraction)
    tokenizer = Tokenizer.load(resumed) if resumed else Tokenizer.make(config.tokenizer, *("\n".join(part) for part in parts))
    training, validation = (
        Stream.encode(part, tokenizer, config.network.window, name=f"{name} part")
        for name, part in zip(("training", "validation"), parts, strict=True)
    )
    return tokenizer, training, validation


def noise_settings(config: TrainConfig, tokenizer: Tokenizer, training: Stream) -> dict[str, Any]:
    """The settings that `process.make` reads. InputError for noise or clusters of another vocabulary."""
    words = config.to_dict()
    if not isinstance(config.noise, str | type):
        found, classes = (config.noise.vocab_size, config.noise.mask_id), getattr(config.noise, "classes", 0)
        if found != (wanted := (tokenizer.vocab_size + 1 + classes, tokenizer.mask_id)):
            raise InputError(
                f"the noise is for {found[0]} ids with mask {found[1]}, this run has {wanted[0]} with mask {wanted[1]}: "
                f"make it with those, or give its class"
            )
        settings: dict[str, Any] = words["noise"]
        return settings | ({"names": names_of(settings["clusters"], tokenizer, training)} if classes and "names" not in settings else {})
    settings = process.parse(words["noise"]) | {"schedule": words["noise_schedule"]}
    if issubclass(process.PROCESSES[config.process], ReplacementNoise):
        settings["head"] = config.head
    if settings["process"] == "semantic":
        settings["clusters"] = cluster_of(config.clusters, tokenizer)
    if settings["process"] == "classes":
        settings["clusters"] = cluster_of(config.clusters, tokenizer)[:-1]
        settings["names"] = names_of(settings["clusters"], tokenizer, training)
    try:
        process.make(settings, tokenizer.vocab_size + 1 + len(settings.get("names", ())), tokenizer.mask_id)
    except ValueError as error:
        raise InputError(f"--noise {config.noise}: {error}") from None
    return settings


def cluster_of(source: str, tokenizer: Tokenizer) -> list[int]:
    """The cluster of every token, the mask last and by itself.

    source: `classes` (of characters), `MODEL:COUNT` (k-means on the output embedding of a checkpoint, in which tokens of similar contexts
    are close), or a JSON file with a list of groups of tokens as they are written; after `shuffled:` the clusters of that source with
    their members dealt out at random, a control of equal sizes. InputError where it does not fit the vocabulary.
    """
    kind, _, rest = source.partition(":")
    if kind == SHUFFLED:
        dealt = clusters.shuffled(cluster_of(rest, tokenizer)[:-1])
        return [*dealt, max(dealt) + 1]
    pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    name, colon, count = source.rpartition(":")
    if source == "classes":
        found = clusters.classes(pieces)
    elif Path(source).is_file():
        found = _from_file(Path(source), pieces)
    elif colon and count.isdigit():
        path = native.find(name)
        if Tokenizer.load(path).fingerprint() != tokenizer.fingerprint():
            raise InputError(f"clusters={source}: the embedding of {name} is of another vocabulary")
        try:
            found = clusters.k_means(native.load(path)[0].head.weight[: tokenizer.vocab_size], int(count))
        except ValueError as error:
            raise InputError(f"clusters={source}: {error}") from None
    else:
        raise InputError(f"clusters={source} is neither `classes`, a JSON file, nor MODEL:COUNT as in shakespeare-mask:12")
    return [*found, max(found) + 1]


def names_of(found: Sequence[int], tokenizer: Tokenizer, training: Stream) -> list[str]:
    """Of each class its commonest token in the training text and a tilde, a line break drawn: no two share one."""
    counts = np.bincount(np.asarray(training.tokens_N), minlength=tokenizer.vocab_size)
    best: dict[int, int] = {}
    for token, label in enumerate(found):
        if label not in best or counts[token] > counts[best[label]]:
            best[label] = token
    drawn = str.maketrans({"\n": "↵", "\r": "↵", "\t": "→"})
    return [f"{tokenizer.piece(best[label]).translate(drawn)}~" for label in sorted(best)]


def _from_file(path: Path, pieces: list[str]) -> list[int]:
    try:
        groups = read_json(path)
        label = {piece: n for n, group in enumerate(groups) for piece in group}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} does not hold a list of groups of tokens ({error})") from None
    if several := [piece for piece, count in Counter(piece for group in groups for piece in set(group)).items() if count > 1]:
        raise InputError(f"{path} puts {', '.join(map(repr, several[:5]))} in several groups: each token needs one")
    missing = [piece for piece in pieces if piece not in label]
    if missing:
        raise InputError(f"{path} puts {len(missing)} tokens in no group, {', '.join(map(repr, missing[:5]))} among them: each needs one")
    return clusters.renumber([label[piece] for piece in pieces])
