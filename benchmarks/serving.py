"""Throughput and time to the first token against concurrency, batched against one request at a time; and a soak.

    python benchmarks/serving.py                        # bundled models, and smollm2-135m if it was pulled
    python benchmarks/serving.py --soak 10              # ten minutes of everything that clients do, good and bad

The servers are processes of their own, `dlm serve` with its usual batch and with `--max-batch 1`; clients stream, each its next request
after the last. Tokens count those of the final texts; the first token is the first text that is shown for good. The soak holds every answer
to the same request alone, and every error to one shape. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from dlm import bundled
from dlm.evaluation import card

PROMPTS = ("ROMEO:\n", "First Citizen:\nBefore we", "To be, or not to be", "JULIET:\nO", "KING HENRY:\n", "What light")


@dataclass(frozen=True)
class Case:
    """Requests of one kind: a model with options, tokens to write."""

    label: str
    model: str
    tokens: int
    options: dict[str, Any]


CASES = [
    Case("mask diffusion, 32 steps", "shakespeare-mask", 128, {"steps": 32}),
    Case("mask diffusion, confidence", "shakespeare-mask", 128, {"sampler": "confidence:0.5", "steps": 128}),
    Case("autoregressive", "shakespeare-ar", 64, {}),
]
LARGE = [Case("SmolLM2, plain", "smollm2-135m", 32, {}), Case("SmolLM2, lossless", "smollm2-135m", 32, {"lossless": True})]


@dataclass(frozen=True)
class Point:
    """One case at one concurrency. first, whole: median seconds to the first token and to the end; forwards: of the network, by rows."""

    label: str
    concurrency: int
    max_batch: int
    requests: int
    tokens_per_second: float
    first: float
    first_p95: float
    whole: float
    tokens_per_forward: float


@contextmanager
def server(models: list[str], *words: str) -> Iterator[tuple[str, int]]:
    """(address, process id) of `dlm serve` on a free port."""
    command = [sys.executable, "-m", "dlm", "serve", *models, "--port", "0", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0]
        for _ in range(600):
            try:
                httpx.get(f"{url}/healthz")
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield url, process.pid
    finally:
        process.terminate()
        process.communicate(timeout=60)


def body(case: Case, k: int) -> dict[str, Any]:
    return {"model": case.model, "prompt": PROMPTS[k % len(PROMPTS)], "max_tokens": case.tokens, "seed": k, **case.options}


async def ask(client: httpx.AsyncClient, case: Case, k: int) -> tuple[float, float, dict[str, Any]]:
    """(seconds to the first token, seconds in all, usage)."""
    begin, first, usage = time.perf_counter(), 0.0, dict[str, Any]()
    more = {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body(case, k) | more) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if not first and any(choice["text"] for choice in chunk["choices"]):
                first = time.perf_counter() - begin
            usage = chunk.get("usage") or usage
    return first, time.perf_counter() - begin, usage


async def load(url: str, case: Case, concurrency: int, requests: int, max_batch: int) -> Point:
    """So many clients at once, until so many requests are answered."""
    left, found = iter(range(requests)), list[tuple[float, float, dict[str, Any]]]()
    async with httpx.AsyncClient(base_url=url, timeout=900, limits=httpx.Limits(max_connections=None)) as client:
        await ask(client, case, 0)  # the sampler is made, the code is warm
        begin = time.perf_counter()

        async def one() -> None:
            for k in left:
                found.append(await ask(client, case, k))

        await asyncio.gather(*(one() for _ in range(concurrency)))
        seconds = time.perf_counter() - begin
    firsts, wholes = sorted(first for first, _, _ in found), [whole for _, whole, _ in found]
    tokens, forwards = (sum(usage[name] for _, _, usage in found) for name in ("completion_tokens", "forwards"))
    late = firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))]
    middle = statistics.median(firsts), late, statistics.median(wholes)
    return Point(case.label, concurrency, max_batch, requests, tokens / seconds, *middle, tokens / forwards)


# --- the soak ----------------------------------------------------------------------------------------------------

BROKEN: list[tuple[bytes, int]] = [
    (b"{", 400),
    (b'{"prompt": "\xff"}', 400),
    (b'{"prompt": 7}', 400),
    (b'{"max_tokens": -3}', 400),
    (b'{"model": "nobody"}', 404),
    (b'{"prompt": "' + b"a" * 3_000_000 + b'"}', 413),
    (b'{"prompt": "' + b"a" * 900_000 + b'"}', 400),
    (b'{"prompt": "\xe2\x96\x88"}', 400),
]


def mixture(count: int) -> list[dict[str, Any]]:
    """Requests of all kinds, small ones."""
    kinds: list[dict[str, Any]] = [
        {"model": "shakespeare-mask", "steps": 8},
        {"model": "shakespeare-mask", "steps": 8, "suffix": " to be"},
        {"model": "shakespeare-mask", "sampler": "confidence:0.4", "steps": 64},
        {"model": "shakespeare-mask", "sampler": "remdm-conf", "steps": 8},
        {"model": "shakespeare-mask", "sampler": "speculative:4"},
        {"model": "shakespeare-uniform", "steps": 8},
        {"model": "shakespeare-ar"},
        {"model": "shakespeare-ar", "sampler": "lookup:4"},
        {"model": "shakespeare-ar", "stop": ["\n", "the"]},
        {"model": "shakespeare-block", "steps": 16},
    ]
    common = ({"prompt": PROMPTS[k % 6], "max_tokens": 8 + 7 * (k % 6), "seed": k} for k in range(count))
    return [one | kinds[k % len(kinds)] for k, one in enumerate(common)]


class Soak:
    """Clients of all kinds on one server, and what came of them."""

    def __init__(self, client: httpx.AsyncClient, seed: int) -> None:
        self.client, self.seed = client, seed
        self.asked, self.counts, self.wrong = mixture(40), Counter[str](), list[str]()
        self.alone: list[Any] = []

    async def whole(self, one: dict[str, Any]) -> Any:
        while (answer := await self.client.post("/v1/completions", json=one)).status_code == 429:
            self.counts["queue full"] += 1
            await asyncio.sleep(int(answer.headers["Retry-After"]))
        return answer.json().get("choices", answer.text)

    async def leave(self, one: dict[str, Any], draw: random.Random) -> None:
        async with self.client.stream("POST", "/v1/completions", json=one | {"stream": True, "max_tokens": 200}) as answer:
            lines = answer.aiter_lines()
            for _ in range(draw.randint(0, 6)):
                await anext(lines, None)
        self.counts["left early"] += 1

    async def spoil(self, draw: random.Random) -> None:
        content, status = draw.choice(BROKEN)
        answer = await self.client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        proper = answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
        self.counts["refused" if proper else "WRONGLY REFUSED"] += 1

    async def check(self, k: int) -> None:
        answer = await self.whole(self.asked[k])
        right = answer == self.alone[k]
        self.counts["right" if right else "WRONG"] += 1
        if not right and len(self.wrong) < 5:
            self.wrong.append(f"{self.asked[k]}: {answer} instead of {self.alone[k]}")

    async def one(self, number: int, end: float) -> None:
        draw = random.Random(self.seed + number)
        while time.monotonic() < end:
            k, chance = draw.randrange(len(self.asked)), draw.random()
            try:
                if chance < 0.15:
                    await self.leave(self.asked[k], draw)
                elif chance < 0.3:
                    await self.spoil(draw)
                else:
                    await self.check(k)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self.counts["LOST"] += 1
                self.wrong.append(repr(error))


async def soak(url: str, pid: int, minutes: float, clients: int, seed: int) -> dict[str, Any]:
    """What came of it: counts, the first wrong answers, memory of the server."""
    memory: list[tuple[float, float]] = []
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        run = Soak(client, seed)
        run.alone = [await run.whole(one) for one in run.asked]
        end = time.monotonic() + 60 * minutes

        async def watch() -> None:
            begin = time.monotonic()
            while time.monotonic() < end:
                memory.append((time.monotonic() - begin, resident(pid)))
                await asyncio.sleep(min(2.0, max(0.05, 6 * minutes)))

        await asyncio.gather(watch(), *(run.one(number, end) for number in range(clients)))
        await asyncio.sleep(1)
        health = (await client.get("/healthz")).json()
    return {"counts": dict(run.counts), "wrong": run.wrong[:5], "health": health, "memory": flatness(memory)}


def resident(pid: int) -> float:
    """Megabytes."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def flatness(memory: list[tuple[float, float]]) -> dict[str, float]:
    """Megabytes in the second and the last quarter, and the slope after the first quarter, in megabytes a minute."""
    quarter = max(1, len(memory) // 4)
    settled = memory[quarter:] or memory
    seconds, sizes = zip(*settled, strict=True)
    mean = statistics.fmean(seconds)
    spread = sum((s - mean) ** 2 for s in seconds)
    slope = sum((s - mean) * size for s, size in settled) / spread if spread else 0.0
    parts = {"early": statistics.median(sizes[:quarter]), "late": statistics.median(sizes[-quarter:]), "most": max(sizes)}
    return {name: round(value, 1) for name, value in (parts | {"slope_per_minute": 60 * slope}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=0, help="of each point; 0: the concurrency, at least 8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES")
    parser.add_argument("--clients", type=int, default=16, help="of the soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose label holds this")
    parser.add_argument("--quick", action="store_true", help="two points and a soak of seconds: does it run?")
    args = parser.parse_args()
    cases = CASES + (LARGE if (bundled.cache_directory() / "smollm2-135m.gguf").is_file() else [])
    cases = [case for case in cases if args.only in case.label]
    if args.quick:
        cases, args.concurrency, args.requests = [Case("mask diffusion", "shakespeare-mask", 8, {"steps": 4})], [1, 3], 4
        args.soak, args.clients = 0.05, 4
    console, figures = Console(stderr=True), dict[str, Any]()
    threads = ["--threads", str(args.threads)]
    if not args.soak or args.quick:
        points = []
        models = sorted({case.model for case in cases})
        with server(models, *threads) as (batched, _), server(models, "--max-batch", "1", *threads) as (by_one, _):
            for case in cases:
                for concurrency in args.concurrency:
                    requests = args.requests or max(8, concurrency)
                    for url, most in ((batched, 64), (by_one, 1)):
                        points.append(asyncio.run(load(url, case, concurrency, requests, most)))
                        console.print(points[-1], highlight=False)
        Console(width=120).print(table(points))
        figures["points"] = [asdict(point) for point in points]
    if args.soak:
        names = sorted({one["model"] for one in mixture(40)})
        with server(names, "--max-batch", "16", "--max-queue", "8", *threads) as (url, pid):
            figures["soak"] = asyncio.run(soak(url, pid, args.soak, args.clients, args.seed))
        Console().print(figures["soak"])
    settings = vars(args)
    print(card.dumps(card.make(figures, device="cpu", dtype="float32", seed=args.seed, settings=settings, data={})))


def table(points: list[Point]) -> Table:
    """Pairs of points: batched, and one at a time."""
    made = Table("requests", "at once", "tokens/s", "one by one", "ratio", "first token, s", "one by one", "tokens/call", box=None)
    for ours, theirs in zip(points[::2], points[1::2], strict=True):
        speeds = f"{ours.tokens_per_second:.1f}", f"{theirs.tokens_per_second:.1f}"
        ratio = f"{ours.tokens_per_second / theirs.tokens_per_second:.2f}"
        firsts = f"{ours.first:.2f}", f"{theirs.first:.2f}"
        made.add_row(ours.label, str(ours.concurrency), *speeds, ratio, *firsts, f"{ours.tokens_per_forward:.2f}")
    return made


if __name__ == "__main__":
    main()
