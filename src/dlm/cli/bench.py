"""`dlm bench decode`: what writes an autoregressive model's text fastest on this machine, other engines beside our own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dlm.cli.app import Compile, Deterministic, Device, Json, Seed, app, bar, listed, load, prompt_lines, renamed
from dlm.cli.tables import console
from dlm.errors import InputError

bench = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
app.add_typer(bench, name="bench")

PLAIN = "autoregressive"
SHORT = {"ar": PLAIN, "draft": "draft:int4:24", "ngram": "lookup:4", "mtp": "heads:4", "isd": "strided:4"}  # what papers call them
PROMPTS = (
    "ROMEO:\nBut soft, what light through yonder window breaks? It is the east,",
    "First Citizen:\nWe are accounted poor citizens, the patricians good.",
    "The king shall live. The king shall live. The king shall",
    "What say you to the matter of the people, and to the matter of the people",
)


@bench.callback()
def _group() -> None:
    """Measure speed on this machine."""


@bench.command(cls=renamed({"--base": "MODEL", "--model": "MODEL", "-m": "MODEL", "--new": "--max-new-tokens"}))
def decode(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An autoregressive model.")] = "shakespeare-ar",
    methods: Annotated[
        str, typer.Option(help="Samplers, with commas, or ar, draft, ngram, mtp, isd; the autoregressive baseline comes first.")
    ] = "lookup:4,strided:4",
    peers: Annotated[str, typer.Option(help="Other engines, with commas: transformers, llama.cpp. They need --temperature 0.")] = "",
    adapter: Annotated[Path | None, typer.Option(help="What `dlm convert` made for this base.")] = None,
    heads: Annotated[Path | None, typer.Option(help="What `dlm convert --heads` made for it, for the method heads:4.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, a prompt a line; default: four of Shakespeare's kind.")] = None,
    kind: Annotated[str, typer.Option(help="Prompts of ours instead, with commas: story, question, summary, code.")] = "",
    batch: Annotated[str, typer.Option(help="Rows at once, with commas.")] = "1,4",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many likeliest tokens; 0: all.")] = 0,
    rounds: Annotated[int, typer.Option(help="The least of so many is kept.")] = 3,
    threads: Annotated[int, typer.Option(help="Of the CPU, for all engines; 0: as many as torch takes.")] = 0,
    seed: Seed = 0,
    as_json: Json = False,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 | bfloat16 | int8 | int4; several with commas are compared.")] = "float32",
    deterministic: Deterministic = False,
    compile: Compile = False,
) -> None:
    """Tokens a second and a call, acceptance by position, memory, and whether the text is the plain one, for each method and batch."""
    import torch

    from dlm.bench import decoding
    from dlm.sampling.autoregressive.draft import Draft

    if rounds < 1 or max_new_tokens < 2 or threads < 0:
        raise InputError(
            f"--rounds counts from 1, --max-new-tokens from 2 and --threads from 0, got {rounds}, {max_new_tokens} and {threads}"
        )
    if threads:
        torch.set_num_threads(threads)
    sizes, kinds = _sizes(batch), _kinds(kind)
    if kind and prompts is not None:
        raise InputError("--kind and --prompts both say what to write after: give one")
    asked = listed(methods, "--methods")
    words = list(dict.fromkeys([PLAIN, *(SHORT.get(word, word) for word in asked)]))
    if adapter is None and heads is None and {"isd", "mtp"} & set(asked):
        adapter = _bundled(model)
    samplers: dict[str, Any] = {}
    against: dict[str, str] = {}
    models: dict[str, Any] = {}
    for number, name in enumerate(dict.fromkeys(dtype.split(","))):
        lm = models[name] = load(model, device, name, [path for path in (adapter, heads) if path], deterministic, compile)
        if lm.is_diffusion:
            raise InputError(f"{model} is a diffusion model: its samplers are compared by dlm calibrate")
        for word in words:
            if lm.network.quantized and (draft := Draft.from_word(word)) is not None and draft.source == "self":
                continue  # its weights are quantized already
            label = f"{word} {name}" if number else word
            samplers[label], against[label] = (
                lm.sampler(sampler=word, temperature=temperature, top_k=top_k),
                f"{PLAIN} {name}" if number else PLAIN,
            )
    lm = next(iter(models.values()))
    canvases = {(k, rows): _canvases(lm, rows, max_new_tokens, device, texts, prompts) for k, texts in kinds.items() for rows in sizes}
    longest = max(len(canvas.tokens_BT[0]) for group in canvases.values() for canvas in group) + 1
    ours = list(samplers)
    for name, peer in _peers(peers, model, lm, device, next(iter(models)), longest, temperature).items():
        samplers[name] = peer
    found: list[Any] = []
    with bar(f"decoding with {lm.name}", len(samplers) * rounds * sum(map(len, canvases.values()))) as progress:
        for (name, rows), group in canvases.items():
            settings = {"kind": name, "seed": seed, "rounds": rounds, "progress": progress.forward}
            made = decoding.compare(samplers, group, against=against, **settings)
            huggingface = {label: _weights(*_networks(models, label)) for label in ours}
            huggingface |= {label: samplers[label].weights() for label in samplers if label not in ours}
            cache = {label: _cache(lm, label, rows, max(len(canvas.tokens_BT[0]) for canvas in group)) for label in samplers}
            found += [replace(one, memory=huggingface[one.method] + cache[one.method]) for one in made]
    out = console(as_json)
    for name in kinds:
        out.print(_table([one for one in found if one.kind == name], list(samplers), sizes, name))
    if as_json:
        learned = {"adapter": str(adapter or ""), "heads": str(heads or "")}
        facts = (
            {"base": lm.name} | learned | {"new": max_new_tokens, "top_k": top_k, "temperature": temperature, "seed": seed, "dtype": dtype}
        )
        facts |= {"deterministic": deterministic, "compile": compile, "threads": torch.get_num_threads(), "device": device, "peers": peers}
        print(json.dumps(facts | {"rows": [one.record() for one in found]}))


def _bundled(base: str) -> Path | None:
    """The adapter that ships for this base, with heads beside it, told by its weights before they are rounded."""
    from dlm.adapters import attach

    return attach.bundled_for(load(base).network)


def _sizes(batch: str) -> list[int]:
    try:
        sizes = [int(word) for word in batch.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise InputError(f"--batch is one or more numbers of rows with commas between, as in 1,4,16; got {batch!r}")
    return sizes


def _kinds(words: str) -> dict[str, Sequence[str]]:
    from dlm.bench.prompts import KINDS

    if not words:
        return {"": ()}
    if unknown := set(words.split(",")) - KINDS.keys():
        raise InputError(f"unknown kind of prompt {sorted(unknown)[0]!r}; known: {', '.join(KINDS)}")
    return {word: KINDS[word] for word in words.split(",")}


def _canvases(lm: Any, rows: int, new: int, device: str, texts: Sequence[str], prompts: Path | None) -> list[Any]:
    """All prompts of a kind in batches of so many rows, as conversations where the base has a template; else one batch."""
    from dlm.trajectory import Canvas

    if not texts:
        texts = PROMPTS if prompts is None else prompt_lines(prompts)
        return [lm.canvas([texts[i % len(texts)] for i in range(rows)], max_new_tokens=new).to(device)]
    batches = [[texts[(begin + i) % len(texts)] for i in range(rows)] for begin in range(0, len(texts), rows)]
    rows_of = ([[*lm.prompt_ids(text), *[None] * new] for text in batch] for batch in batches)
    return [Canvas.from_rows(made, fill=lm.tokenizer.mask_id).to(device) for made in rows_of]


def _peers(words: str, base: str, lm: Any, device: str, dtype: str, positions: int, temperature: float) -> dict[str, Any]:
    """Engines by name, on the weights of the base before any rounding."""
    import torch

    from dlm.bench import peers
    from dlm.formats import huggingface, native

    names = [word for word in words.split(",") if word]
    if unknown := set(names) - set(peers.NAMES):
        raise InputError(f"unknown peer {sorted(unknown)[0]!r}; known: {', '.join(peers.NAMES)}")
    if names and temperature:
        raise InputError("other engines draw with other random numbers: compare them with --temperature 0")
    made: dict[str, Any] = {}
    start = lm.config.start_token_id
    if "llama.cpp" in names:
        if (file := native.find(base)).suffix != ".gguf":
            raise InputError(f"llama.cpp reads GGUF files, and {base} is none: take smollm2-135m, or the path of one")
        made["llama.cpp"] = peers.LlamaCpp(file, lm.stops, start, positions=positions, threads=torch.get_num_threads())
    if "transformers" in names:
        plain = load(base) if lm.network.quantized else lm
        with tempfile.TemporaryDirectory() as directory:
            huggingface.to_hugging_face(plain.network, plain.config, directory, files=plain.files())
            kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
            made["transformers"] = peers.Transformers(
                Path(directory), lm.stops, start, device=device, dtype=kind, compiled=torch.device(device).type == "cuda"
            )
    return {name: made[name] for name in names}


def _networks(models: dict[str, Any], label: str) -> list[Any]:
    """The networks that a method runs: the base, and the one that drafts for it."""
    from dlm.sampling.autoregressive.draft import Draft

    word, _, dtype = label.partition(" ")
    lm, draft = models[dtype or next(iter(models))], Draft.from_word(word)
    drafter = None if draft is None else lm.draft_network(draft)
    return [lm.network, *([] if drafter is None else [drafter])]


def _weights(*networks: Any) -> int:
    """Bytes of their tensors, those that share memory counted once."""
    from dlm.inference.preparation import held_bytes

    return held_bytes(*networks)


def _cache(lm: Any, label: str, rows: int, length: int) -> int:
    """Bytes of keys and values of a text of this length; llama.cpp holds them in 16 bits."""
    config, size = lm.config.network, 2 if label == "llama.cpp" else lm.network.embed.weight.element_size()
    return int(2 * config.layers * rows * config.kv_heads * min(length, config.window) * config.head_dim * size)


def _table(found: Sequence[Any], words: Sequence[str], sizes: Sequence[int], kind: str) -> Any:
    from rich.table import Table

    caption = (
        "acceptance: of the 1st, 2nd ... proposal of a call; memory: weights and cache of the first batch; same text:\n"
        "as the plain sampler's of that dtype; speed against the first plain sampler of the same batch, in one run"
    )
    table = Table(box=None, header_style="bold", caption=caption, caption_justify="left")
    table.add_column(f"method, {kind}" if kind else "method", no_wrap=True, min_width=max(map(len, words)))
    for head in ("same text", "tokens/forward", "acceptance", "first token", "memory", *(f"tok/s, {rows}" for rows in sizes)):
        table.add_column(head, justify="right", no_wrap=True)
    by = {(one.method, one.batch): one for one in found}
    for word in words:
        own = [by[word, rows] for rows in sizes if (word, rows) in by]
        if not own:
            continue
        speeds = []
        for rows in sizes:
            if (word, rows) not in by:
                speeds.append("-")
                continue
            one, plain = by[word, rows], by[PLAIN, rows]
            rate = one.tokens / one.seconds
            speeds.append(f"{rate:.1f} ({rate / (plain.tokens / plain.seconds):.2f}x)")
        accepted = " ".join(f"{a:.2f}" for a in own[0].accepted)
        same = "yes" if all(one.same for one in own) else "no"
        calls = f"{own[0].per_call:.2f}" if own[0].calls else "-"
        table.add_row(word, same, calls, accepted, f"{own[0].first * 1000:.0f} ms", f"{own[0].memory / 1e6:.0f} MB", *speeds)
    return table
