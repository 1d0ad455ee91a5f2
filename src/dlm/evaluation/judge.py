"""Judges with a vocabulary of their own, which read text: bits of each. Shapes: N texts of T tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dlm.errors import InputError
from dlm.evaluation.generative import distinct_each, entropy_each

TextBits = Callable[[Sequence[str]], Tensor]
"""Texts -> bits of each (N,)."""


def of_ids(nats: Callable[[Tensor], Tensor], encode: Callable[[str], list[int]], name: str, window: int) -> TextBits:
    """A judge by the nats (1,) of token ids (1, T), T at most `window`. InputError for a text of one token, or that it cannot encode."""

    @torch.no_grad()
    def bits(texts: Sequence[str]) -> Tensor:
        found = []
        for text in texts:
            try:
                x_1T = torch.tensor([encode(text)])
            except InputError as error:
                raise InputError(f"the judge {name} cannot read the text: {error}") from None
            found.append(_strided(nats, x_1T, window, name))
        return torch.cat(found).double().cpu() / math.log(2)

    return bits


def of_transformers(name: str, device: str = "cpu") -> TextBits:
    """Any causal model that transformers reads, from a directory or a hub id; no code of the checkpoint is run.

    The first token costs nothing where the tokenizer has no beginning of text. InputError where there is no such model.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError:
        raise InputError(f"{name} is no model of dlm's: as a judge it needs the eval extra: pip install 'dlm[eval]'") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        network: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
        network = network.to(device).eval()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{name} is no causal model that transformers can read ({str(error).splitlines()[0]})") from None

    def nats(x_1T: Tensor) -> Tensor:
        logits_1TV = network(x_1T).logits[:, :-1].double()
        return torch.nn.functional.cross_entropy(logits_1TV.transpose(1, 2), x_1T[:, 1:], reduction="none").sum(1)

    @torch.no_grad()
    def bits(texts: Sequence[str]) -> Tensor:
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = [[*begin, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
        window = getattr(network.config, "max_position_embeddings", 1 << 30)
        return torch.cat([_strided(nats, torch.tensor([one], device=device), window, name) for one in ids]).cpu() / math.log(2)

    return bits


def _strided(nats: Callable[[Tensor], Tensor], x_1T: Tensor, window: int, name: str) -> Tensor:
    """Nats (1,) of a text of any length: in windows that overlap by half, each token counted once, after half a window at least."""
    if x_1T.shape[1] < 2:
        raise InputError(f"the judge {name} reads texts of two tokens or more, one has {x_1T.shape[1]}: longer texts, or another judge")
    total, read = nats(x_1T[:, :window]), window
    while read < x_1T.shape[1]:
        begin = read - window // 2
        total = total + nats(x_1T[:, begin : begin + window]) - nats(x_1T[:, begin:read])  # by the chain rule
        read = begin + window
    return total


def figures(bits: TextBits, decode: Callable[[list[int]], str]) -> Callable[[Tensor], dict[str, Tensor]]:
    """As `generative.figures`, through text: bits for each token of the sample, whatever tokens the judge cuts it into."""

    def measure(samples_NT: Tensor) -> dict[str, Tensor]:
        texts = [decode(row) for row in samples_NT.tolist()]
        diversity = {"entropy": entropy_each(samples_NT), "distinct_4": distinct_each(samples_NT, 4)}
        return {"bits": bits(texts) / samples_NT.shape[1]} | diversity

    return measure
