"""The noise of a run as config.json keeps it: the word of the settings, the schedule, and the clusters it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dlm.errors import InputError
from dlm.formats import native
from dlm.noise import clusters, process
from dlm.text.tokenizer import Tokenizer
from dlm.train.config import TrainConfig


def noise_settings(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What `process.make` reads. InputError for clusters that do not belong to the vocabulary."""
    settings = process.parse(config.noise) | {"schedule": config.noise_schedule}
    if settings["process"] != "masked":
        settings["head"] = config.head
    if settings["process"] == "semantic":
        settings["clusters"] = cluster_of(config.clusters, tokenizer)
    try:
        process.make(settings, tokenizer.vocab_size + 1, tokenizer.mask_id)
    except ValueError as error:
        raise InputError(f"--noise {config.noise}: {error}") from None
    return settings


def cluster_of(source: str, tokenizer: Tokenizer) -> list[int]:
    """The cluster of every token, the mask last and by itself.

    source: `classes` (of characters), `MODEL:COUNT` (k-means on the output embedding of a checkpoint, where tokens that stand in
    like places lie together), or a JSON file with a list of groups of tokens as they are written.
    """
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


def _from_file(path: Path, pieces: list[str]) -> list[int]:
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
        label = {piece: n for n, group in enumerate(groups) for piece in group}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} does not hold a list of groups of tokens ({error})") from None
    missing = [piece for piece in pieces if piece not in label]
    if missing:
        raise InputError(f"{path} puts {len(missing)} tokens in no group, {', '.join(map(repr, missing[:5]))} among them: each needs one")
    return clusters.renumber([label[piece] for piece in pieces])
