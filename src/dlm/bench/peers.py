"""Other engines on the same prompts, for `dlm bench decode`: transformers, and llama.cpp through xllamacpp; greedy.

A peer takes the token ids of B prompts and returns the ids that it wrote and the seconds until the first one.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from dlm.errors import InputError

NAMES = ("transformers", "llama.cpp")


class Peer(Protocol):
    """rows: at most so many at once, 0 for any number; start: the ids that it reads before every prompt."""

    rows: int
    start: list[int]

    def write(self, prompts: Sequence[list[int]], new: int) -> tuple[list[list[int]], float]:
        """(the new ids of each row up to one that ends it, seconds until the first token)."""
        ...

    def weights(self) -> int:
        """Bytes."""
        ...


class Transformers:
    """`generate` of transformers with its defaults, greedy. directory: as `from_pretrained` takes it; compiled: the forward, on a GPU."""

    rows = 0

    def __init__(
        self, directory: Path, stops: Sequence[int], start: int | None, *, device: str, dtype: torch.dtype, compiled: bool = False
    ) -> None:
        try:
            import transformers
        except ImportError:
            raise InputError("transformers is not installed: pip install 'dlm[eval]'") from None
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        self.model, self.device = loaded.to(device).eval(), device
        self.stops, self.start = sorted(stops), [] if start is None else [start]
        self.options: dict[str, Any] = {"cache_implementation": "static"} if compiled else {}

    def write(self, prompts: Sequence[list[int]], new: int) -> tuple[list[list[int]], float]:
        began, came = time.perf_counter(), []

        class Clock:
            """A streamer: put is called with the prompts first, then with every token."""

            def put(self, _value: object) -> None:
                came.append(time.perf_counter() - began)

            def end(self) -> None:
                pass

        width = max(map(len, prompts))  # padded on the left, as its documentation asks
        ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=self.device)
        options = self.options | {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
        options |= {"eos_token_id": self.stops or None, "streamer": Clock() if len(prompts) == 1 else None}
        out = self.model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
        return [_up_to(row, self.stops) for row in out], came[1] if len(came) > 1 else float("nan")

    def weights(self) -> int:
        return int(self.model.get_memory_footprint())


class LlamaCpp:
    """llama.cpp on a GGUF file, one row at a time, as many threads as torch has; it runs as a server of its own, on this machine alone."""

    rows = 1

    def __init__(self, file: Path, stops: Sequence[int], start: int | None, *, positions: int, threads: int) -> None:
        try:
            import xllamacpp
        except ImportError:
            raise InputError("llama.cpp is not installed: pip install xllamacpp") from None
        self.file, self.stops, self.start = file, sorted(stops), [] if start is None else [start]
        settings: Any = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = str(file), positions, 1, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        self.server: Any = xllamacpp.Server(settings)

    def write(self, prompts: Sequence[list[int]], new: int) -> tuple[list[list[int]], float]:
        # cache_prompt: else it would keep the common beginning of two prompts
        asked = {"prompt": prompts[0], "n_predict": new, "temperature": 0, "cache_prompt": False, "return_tokens": True}
        request = urllib.request.Request(
            f"{self.server.listening_address}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            told = json.load(answer)
        written = [int(token) for token in told["tokens"]]
        if told["stop_type"] == "eos" and not set(written) & set(self.stops):  # it keeps the token to itself
            written += self.stops[:1]
        return [_up_to(written, self.stops)], told["timings"]["prompt_ms"] / 1000

    def weights(self) -> int:
        return self.file.stat().st_size


def _up_to(row: list[int], stops: Sequence[int]) -> list[int]:
    """The row up to the first token that ends it, that included."""
    ends = [i for i, token in enumerate(row) if token in stops]
    return row[: ends[0] + 1] if ends else row
