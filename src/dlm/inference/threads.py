"""How many threads a network is worth on a CPU: one where handing out the work takes as long as the work.

`import dlm` has set how threads wait (`dlm._wait_passively`), so that more threads than that cost little.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dlm.models.transformer import Transformer

WORK = 2**28  # products of a forward pass below which one thread is as fast as two, about 10 ms of a core (`benchmarks/threads.py`)
READING = 10  # positions whose products take as long as it takes to read the weights


def threads_for(network: Transformer, positions: int) -> int:
    """1 for forward passes of little work, else as many as torch has now (OMP_NUM_THREADS, or one for each core).

    A function of sizes and never of times: another number of threads may change the last digits of a logit. positions: rows times
    positions of a forward pass.
    """
    products = sum(network.config.forward_flops()) // 2
    return 1 if products * (positions + READING) < WORK else torch.get_num_threads()


def use_threads(asked: int, networks: Iterable[tuple[Transformer, int]]) -> None:
    """Set the threads of torch: to `asked`, or where that is 0 to the most that one of the (network, positions) is worth on a CPU."""
    worth = [threads_for(*one) for one in networks if one[0].device.type == "cpu"]
    if asked or worth:
        torch.set_num_threads(asked or max(worth))
