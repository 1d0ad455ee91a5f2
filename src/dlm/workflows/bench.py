"""Decoding speed of an autoregressive model on this machine: drafters, dtypes and other engines beside the autoregressive baseline."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dlm.adapters import attach
from dlm.bench import decoding, peers
from dlm.bench.decoding import Decoding
from dlm.bench.prompts import KINDS, SHAKESPEARE
from dlm.errors import InputError
from dlm.formats import huggingface, native
from dlm.inference.preparation import held_bytes
from dlm.language_model import LanguageModel, load
from dlm.models.transformer import Transformer
from dlm.sampling.autoregressive.draft import Draft
from dlm.sampling.autoregressive.plain import AutoregressiveSampler
from dlm.sampling.autoregressive.speculative import SpeculativeDecoder
from dlm.trajectory import Canvas
from dlm.workflows.inputs import FORMAT, Counter, Progress, check_device, fields_of, silent

BASELINE = "autoregressive"


@dataclass(frozen=True)
class DecodingReport:
    """rows: one for each kind of prompt, batch and method. adapter, heads: their directories, empty for none."""

    base: str
    adapter: str
    heads: str
    new: int
    top_k: int
    temperature: float
    seed: int
    dtype: str
    deterministic: bool
    compile: bool
    threads: int
    device: str
    peers: str
    rows: tuple[Decoding, ...]

    def record(self) -> dict[str, object]:
        """As `dlm bench decode --json` prints it."""
        return {"format": FORMAT} | fields_of(self) | {"rows": [row.record() for row in self.rows]}


@dataclass(frozen=True)
class Contender:
    """sampler: of our own, or another engine. baseline: the label of the method whose text it must write; networks: those it runs."""

    sampler: decoding.Method
    baseline: str
    networks: Sequence[Transformer] = ()

    def memory(self, lm: LanguageModel, rows: int, length: int) -> int:
        """Bytes of weights, and of the KV cache of texts of this length."""
        weights = held_bytes(*self.networks) if isinstance(self.sampler, OWN) else self.sampler.weights()
        config = lm.config.network
        size = 2 if isinstance(self.sampler, peers.LlamaCpp) else lm.network.embed.weight.element_size()  # llama.cpp caches in 16 bits
        features = 2 * config.kv_heads * config.head_dim + config.conv_width
        return weights + config.layers * rows * min(length, config.window) * features * size


OWN = (AutoregressiveSampler, SpeculativeDecoder)


def decode(
    model: str,
    *,
    methods: Sequence[str] = ("lookup:4", "strided:4"),
    engines: Sequence[str] = (),
    adapter: str | Path | None = None,
    heads: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    kinds: Sequence[str] = (),
    batches: Sequence[int] = (1, 4),
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    rounds: int = 3,
    seed: int = 0,
    device: str = "cpu",
    dtypes: Sequence[str] = ("float32",),
    deterministic: bool = False,
    compile: bool = False,
    progress: Progress = silent,
) -> DecodingReport:
    """Tokens a second and a forward pass, acceptance by position, memory, and whether the text is the baseline's.

    methods: samplers in their short form; the autoregressive baseline comes first in any case. engines: transformers, llama.cpp; they need
    temperature 0. adapter, heads: directories of `dlm convert`. prompts: by default four lines of Shakespeare's kind; kinds: story,
    question, summary, code instead. batches: rows at once; rounds: the least time of so many is kept; dtypes: compared side by side.
    progress counts runs. InputError for a diffusion model, and for settings that cannot be.
    """
    check_device(device)
    _check(kinds, prompts, rounds, max_new_tokens, batches)
    learned = [path for path in (adapter, heads) if path]
    models = {
        dtype: load(model, device=device, dtype=dtype, adapter=learned or None, deterministic=deterministic, compile=compile)
        for dtype in dict.fromkeys(dtypes)
    }
    lm = next(iter(models.values()))
    if lm.is_diffusion:
        raise InputError(f"{lm.name} is a diffusion model: its samplers are compared by dlm calibrate")
    contenders = _contenders(models, methods, temperature, top_k)
    texts = {kind: KINDS[kind] for kind in kinds} or {"": ()}
    groups = {(k, rows): _canvases(lm, rows, max_new_tokens, some, prompts) for k, some in texts.items() for rows in batches}
    longest = max(len(canvas.tokens_BT[0]) for group in groups.values() for canvas in group) + 1
    contenders |= _engines(engines, model, lm, dtypes[0], longest, temperature)
    count = Counter(progress, sum(decoding.runs(len(contenders), len(group), rounds) for group in groups.values()))
    found: list[Decoding] = []
    for (kind, rows), group in groups.items():
        samplers = {label: one.sampler for label, one in contenders.items()}
        against = {label: one.baseline for label, one in contenders.items()}
        made = decoding.compare(samplers, group, against=against, kind=kind, seed=seed, rounds=rounds, progress=count.add)
        length = max(len(canvas.tokens_BT[0]) for canvas in group)
        found += [replace(one, memory=contenders[one.method].memory(lm, rows, length)) for one in made]
    return DecodingReport(
        base=lm.name,
        adapter=str(adapter or ""),
        heads=str(heads or ""),
        new=max_new_tokens,
        top_k=top_k,
        temperature=temperature,
        seed=seed,
        dtype=",".join(dtypes),
        deterministic=deterministic,
        compile=compile,
        threads=torch.get_num_threads(),
        device=device,
        peers=",".join(engines),
        rows=tuple(found),
    )


def bundled_adapter(model: str) -> Path | None:
    """The adapter that ships for this base, with heads beside it, told by its weights before they are quantized."""
    return attach.bundled_for(load(model).network)


def _check(kinds: Sequence[str], prompts: Sequence[str] | None, rounds: int, new: int, batches: Sequence[int]) -> None:
    if rounds < 1 or new < 2 or not batches or min(batches) < 1:
        raise InputError(f"rounds and rows count from 1 and new tokens from 2, got {rounds}, {', '.join(map(str, batches))} and {new}")
    if kinds and prompts is not None:
        raise InputError("kinds and prompts both name the prompts: give one")
    if strange := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"unknown kind of prompt {strange[0]!r}; known: {', '.join(KINDS)}")


def _contenders(models: Mapping[str, LanguageModel], methods: Sequence[str], temperature: float, top_k: int) -> dict[str, Contender]:
    """Our own methods by label, which tells the dtype from the second one on."""
    found: dict[str, Contender] = {}
    for number, (dtype, lm) in enumerate(models.items()):
        suffix = f" {dtype}" if number else ""
        for word in dict.fromkeys([BASELINE, *methods]):
            draft = Draft.from_word(word)
            if lm.network.quantized and draft is not None and draft.source == "self":
                continue  # its weights are quantized already
            sampler = lm.sampler(sampler=word, temperature=temperature, top_k=top_k, top_p=1.0)
            assert isinstance(sampler, OWN)
            drafter = None if draft is None else lm.draft_network(draft)
            networks = [lm.network, *([] if drafter is None else [drafter])]
            found[word + suffix] = Contender(sampler, BASELINE + suffix, networks)
    return found


def _canvases(lm: LanguageModel, rows: int, new: int, texts: Sequence[str], prompts: Sequence[str] | None) -> list[Canvas]:
    """All prompts of a kind in batches of so many rows, as conversations where the base has a template; else one batch."""
    device = lm.network.device
    if not texts:
        lines = SHAKESPEARE if prompts is None else prompts
        return [lm.canvas([lines[i % len(lines)] for i in range(rows)], max_new_tokens=new).to(device)]
    batches = [[texts[(begin + i) % len(texts)] for i in range(rows)] for begin in range(0, len(texts), rows)]
    rows_of = ([[*lm.prompt_ids(text), *[None] * new] for text in batch] for batch in batches)
    return [Canvas.from_rows(made, fill=lm.tokenizer.mask_id).to(device) for made in rows_of]


def _engines(names: Sequence[str], model: str, lm: LanguageModel, dtype: str, positions: int, temperature: float) -> dict[str, Contender]:
    """Other engines by name, on the weights of the base before they are quantized."""
    if strange := [name for name in names if name not in peers.NAMES]:
        raise InputError(f"unknown peer {strange[0]!r}; known: {', '.join(peers.NAMES)}")
    if names and temperature:
        raise InputError("other engines draw with other random numbers: compare them with --temperature 0")
    found: dict[str, Contender] = {}
    for name in names:
        engine = _llama_cpp(model, lm, positions) if name == "llama.cpp" else _transformers(model, lm, dtype)
        found[name] = Contender(engine, BASELINE)
    return found


def _llama_cpp(model: str, lm: LanguageModel, positions: int) -> peers.LlamaCpp:
    if (file := native.find(model)).suffix != ".gguf":
        raise InputError(f"llama.cpp reads GGUF files, and {model} is none: take smollm2-135m, or the path of one")
    return peers.LlamaCpp(file, sorted(lm.stops), lm.config.start_token_id, positions=positions, threads=torch.get_num_threads())


def _transformers(model: str, lm: LanguageModel, dtype: str) -> peers.Transformers:
    device, kind = lm.network.device, torch.bfloat16 if dtype == "bfloat16" else torch.float32
    plain = load(model) if lm.network.quantized else lm
    with tempfile.TemporaryDirectory() as directory:
        huggingface.to_hugging_face(plain.network, plain.config, directory, files=plain.files())
        compiled = device.type == "cuda"
        stops = sorted(lm.stops)
        return peers.Transformers(Path(directory), stops, lm.config.start_token_id, device=str(device), dtype=kind, compiled=compiled)
