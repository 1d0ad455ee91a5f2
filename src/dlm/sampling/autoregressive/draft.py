"""The drafter of speculative decoding, the number of draft tokens, and their shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dlm import plugins
from dlm.errors import InputError, in_range, unknown
from dlm.sampling.autoregressive.draft_length import MAX_STRIDE

if TYPE_CHECKING:
    from dlm.protocols import Denoiser
    from dlm.sampling.autoregressive.protocols import Drafter

SOURCES = ("adapter", "ngram", "heads", "self", "block", "model")
DTYPES = ("int8", "int4")  # of a quantized copy of the network that drafts for it
BRANCHING = ("adapter", "heads")  # the drafters that know second choices, which a tree needs
MAX_TREE_NODES = 64
DEFAULT_TOKENS = 3  # of a short form without a number
BLOCK_TOKENS = 31  # of the drafter `block`: its block of 32 begins with a known token
MODEL = "model:"  # in front of a name that is also the name of a drafter
WORDS = {"adapter": "strided", "ngram": "lookup", "heads": "heads", "self": "draft", "block": "block", "model": "draft"}
"""The name of each drafter in the short form, a word of `--sampler`."""
SHORT = ("strided", "lookup", "draft", "heads", "block")


@dataclass(frozen=True)
class DraftFacts:
    """The arguments of a drafter of your own: the network, its ids (the mask is one), the start token if it has one, and how many draft
    tokens a forward pass verifies at most."""

    denoiser: Denoiser
    vocab_size: int
    mask_id: int
    start: int | None
    tokens: int


DrafterFactory = Callable[[DraftFacts], "Drafter"]
REGISTERED: dict[str, DrafterFactory] = {}
"""Drafters by name, of `dlm.sampling.registry.register_drafter`."""


def sources() -> tuple[str, ...]:
    """The names of all drafters: built in, registered, and of other packages."""
    return tuple(dict.fromkeys([*SOURCES, *REGISTERED, *plugins.found(plugins.DRAFTERS)]))


def factory(source: str) -> DrafterFactory:
    """Of a registered drafter, or of another package's."""
    made: DrafterFactory = REGISTERED[source] if source in REGISTERED else plugins.load(plugins.DRAFTERS, source)
    return made


def is_short(name: str) -> bool:
    """Whether this name in front of a colon is the short form of a drafter."""
    return name in SHORT or name in REGISTERED or name in plugins.found(plugins.DRAFTERS)


@dataclass(frozen=True)
class Draft:
    """Speculative decoding of an autoregressive model: a drafter drafts, the model verifies; the text stays that of plain decoding.

    source: `adapter`, masks of the same forward pass that a gated LoRA reads (I-DLM, arXiv 2604.11035); `ngram`, prompt lookup in the
    text so far; `heads`, Medusa heads (2401.10774); `self`, the network's own weights quantized to the dtype in `model`, int8 or int4
    (empty: the one that suits the weights); `block`, the network's own reading of a block of masks, where it has one beside its causal
    reading (Nemotron-Labs-Diffusion); `model`, another autoregressive model of the same vocabulary (2211.17192), in `model` its
    directory or name; or the name of a registered drafter.
    tokens: draft tokens that one forward pass verifies; None: as many as pay, by measurement. 0 is plain decoding.
    tree: nodes of a draft tree (SpecInfer, 2305.09781), 0 for a chain. floor: no draft token after one whose running confidence, a
    probability, is below it. InputError for values that do not go together.
    """

    source: str
    model: str = ""
    tokens: int | None = None
    tree: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.source not in sources():
            raise unknown("drafter", self.source, sources())
        if self.source == "model" and not self.model:
            raise InputError("a draft model needs its directory or name")
        if self.source == "self" and self.model not in ("", *DTYPES):
            raise unknown("dtype of a draft", self.model, DTYPES)
        if self.source not in ("self", "model") and self.model:
            raise InputError(f"the drafter {self.source} has no model, got {self.model!r}")
        if self.tokens is not None:
            in_range(self.tokens, 0, MAX_STRIDE - 1, "the draft tokens of a forward pass")
        in_range(self.floor, 0, 1, "the confidence floor of a draft")
        if self.tree and self.source not in BRANCHING:
            raise InputError(f"a draft tree needs second choices, which {' and '.join(BRANCHING)} know; got the drafter {self.source}")
        if self.tree and not (self.tokens or 1) <= self.tree <= MAX_TREE_NODES:
            raise InputError(f"a draft tree has a node for each of its draft tokens at least and {MAX_TREE_NODES} at most, got {self.tree}")

    @classmethod
    def parse(cls, text: str, *, tokens: int | None = None, tree: int = 0, floor: float = 0.0) -> Draft:
        """From `adapter`, `ngram`, `heads`, `block`, `self`, `self:int4`, or a draft model's directory or name; `model:NAME` is a model.

        Nothing after a comma or an x is taken off a name. InputError as the constructor.
        """
        name, colon, dtype = text.partition(":")
        if text.startswith(MODEL):
            return cls("model", text.removeprefix(MODEL), tokens, tree, floor)
        if name == "self":
            if colon and not dtype:
                raise unknown("dtype of a draft", dtype, DTYPES)
            return cls("self", dtype, tokens, tree, floor)
        if text in sources() and text != "model":
            return cls(text, "", tokens, tree, floor)
        return cls("model", text, tokens, tree, floor)

    @classmethod
    def from_word(cls, word: str) -> Draft | None:
        """From the short form, a word of `--sampler`; None for the name of another sampler.

        Its number counts the tokens that a forward pass may commit: one more than the draft tokens. `strided:4`, `lookup:8:0.2` (and the
        floor), `heads:auto` (as many as pay), `strided:4x16` (and the nodes of a tree), `draft:NAME:4`, `draft:int4:auto`. A comma
        instead of a later colon is an old spelling.
        """
        name, *settings = word.replace(",", ":").split(":")
        if not is_short(name):
            return None
        model = settings.pop(0) if name == "draft" and settings else ""
        count, floor, *more = *settings, *[""] * (2 - len(settings))
        count, branches, nodes = count.partition("x") if name in ("strided", "heads") else (count, "", "")
        own = {"strided": "adapter", "lookup": "ngram", "draft": "self" if model in DTYPES else "model"}
        source = own.get(name, name)
        try:
            tokens = None if count == "auto" else int(count or (BLOCK_TOKENS if name == "block" else DEFAULT_TOKENS) + 1) - 1
            tree, least = int(nodes) if branches else 0, float(floor or 0)
            if more or (tokens is not None and tokens < 0) or bool(model) != (name == "draft"):
                raise ValueError
        except ValueError:
            raise InputError(f"sampler {word!r}: write {_usage(name)}") from None
        if branches and (tokens is None or not tokens <= tree <= MAX_TREE_NODES):
            raise InputError(f"sampler {word!r}: STRIDExCANDIDATES has stride - 1 candidates at least and {MAX_TREE_NODES} at most")
        return cls(source, model, tokens, tree, least)

    @property
    def word(self) -> str:
        """The short form, as records and reports name it."""
        count = "auto" if self.tokens is None else str(self.tokens + 1)
        clashes = self.source == "model" and self.model in DTYPES
        parts = [f"./{self.model}" if clashes else self.model] if self.source in ("self", "model") else []
        parts.append(f"{count}x{self.tree}" if self.tree else count)
        parts += [f"{self.floor:g}"] if self.floor else []
        return f"{WORDS.get(self.source, self.source)}:{':'.join(parts)}"


def _usage(name: str) -> str:
    head = "draft:MODEL, draft:MODEL:4" if name == "draft" else f"{name}, {name}:4"
    tree = f"{name}:4x16 (stride, candidates), " if name in ("strided", "heads") else ""
    return f"{head} (stride, or auto), {tree}or {head.split()[-1]}:0.2 (stride, floor)"
