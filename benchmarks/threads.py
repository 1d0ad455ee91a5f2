"""Threads of a small network beside another program: how they wait for one another, and how many there are.

    python benchmarks/threads.py

Forward passes of `shakespeare-mask` in fresh processes, alone and beside a program that keeps one core busy. Threads spin while they wait
where torch is imported first, which is OpenMP's default, and sleep where dlm is. Milliseconds and CPU milliseconds of a forward pass, the
medians of all rounds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

FIRST = {"spin": "import sys, torch", "sleep": "import sys, dlm, torch"}  # OpenMP reads its settings when torch is imported
FORWARDS = """
import time
import dlm
threads, positions, rounds = map(int, sys.argv[1:])
torch.set_num_threads(threads)
network = dlm.load("shakespeare-mask").network
z_BT = torch.zeros(1, positions, dtype=torch.long)
with torch.no_grad():
    network(z_BT)
    for _ in range(rounds):
        begin, cpu = time.perf_counter(), time.process_time()
        network(z_BT)
        print(1e3 * (time.perf_counter() - begin), 1e3 * (time.process_time() - cpu))
"""


@contextmanager
def busy(programs: int) -> Iterator[None]:
    """So many programs that keep a core busy each."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        yield
    finally:
        for one in running:
            one.kill()
            one.wait()


def measured(waiting: str, threads: int, positions: int, rounds: int) -> dict[str, float]:
    """The median of the milliseconds of a forward pass, and of its CPU milliseconds."""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")}
    command = [sys.executable, "-c", FIRST[waiting] + FORWARDS, str(threads), str(positions), str(rounds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    passes = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
    wall, cpu = (sorted(column)[len(passes) // 2] for column in zip(*passes, strict=True))
    return {"ms": wall, "cpu_ms": cpu}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    rounds, lengths, counts = (2, (16,), (args.threads,)) if args.quick else (args.rounds, (64, 256), (1, args.threads))
    table, rows = Table("beside", "waiting", "threads", "positions", "ms", "CPU ms"), []
    for programs in (0, 1):
        with busy(programs):
            for waiting, threads, positions in itertools.product(FIRST, counts, lengths):
                about: dict[str, Any] = {"beside": programs, "waiting": waiting, "threads": threads, "positions": positions}
                found = measured(waiting, threads, positions, rounds)
                rows.append(about | found)
                table.add_row(*map(str, about.values()), f"{found['ms']:.1f}", f"{found['cpu_ms']:.1f}")
    Console().print(table)
    print(json.dumps({"benchmark": "threads", "rounds": rounds, "runs": rows}))


if __name__ == "__main__":
    main()
