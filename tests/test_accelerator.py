"""The accelerator made of CPU tensors against the rules of CUDA: what works, what waits for the GPU, what raises.

On a machine with CUDA every line is run there as well, so that the rules are not taken on faith.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accelerator import Accelerator, Sync, on_gpu

WORKS = """
g + c.sum()
c.sum() * g
g.clamp(max=c.max())
torch.where(g > 0, c.sum(), c.max())
g.masked_fill(g > 0, c.sum())
torch.cat([g, g])
torch.zeros_like(c, device="cuda") + g
g.new_zeros(3) + g
torch.rand(3, generator=torch.Generator("cuda"), device="cuda") + g
torch.randint(4, (3,), generator=torch.Generator("cuda"), device="cuda") + g
torch.full((3,), 2.0, device=g.device) + g
torch.arange(3, device="cuda:0") + g
g[1:] + g[0]
g[i.to("cuda", non_blocking=True)] + g
g.gather(0, torch.zeros(3, dtype=torch.long, device=g.device))
torch.empty_like(g).copy_(g)
g.index_put_((g > 9,), g.sum()[None])
g.expand_as(torch.zeros(2, 3))
F.cross_entropy(g[None], torch.zeros(1, dtype=torch.long, device="cuda"))
F.one_hot(torch.zeros(3, dtype=torch.long, device="cuda"), 4)
nn.Linear(3, 2, device="cuda")(g)
torch.repeat_interleave(g, torch.ones(3, dtype=torch.long, device="cuda"), output_size=3) + g
g.masked_scatter(g > 0, g)
g.sort().values + g.cumsum(0) + g.topk(3).values
torch.broadcast_tensors(g, c)[0] + g
g.to(g.device) + g.to("cuda")
g.__setitem__(g > 0, 0.0)
g.__setitem__(slice(1), 0.0)
g.grad_fn
g.shape[0]
"""

WAITS = """
g.sum().item()
g.tolist()
bool(g.any())
int(g.sum())
float(g[0])
g.cpu()
g.to("cpu")
c.to("cuda")
c.cuda()
c.to(g)
g.nonzero()
torch.where(g > 0)
g[g > 0]
g[i]
g[[0, 1]]
g[g.sum().long() * 0]
g[: g.sum().long()]
g.__setitem__(g > 0, torch.ones(3, device="cuda"))
g.__setitem__(slice(None), c)
torch.empty_like(g).copy_(c)
torch.empty_like(c).copy_(g)
torch.tensor([1.0], device="cuda")
torch.as_tensor(c, device="cuda")
torch.unique(g)
g.index_put_((g > 0,), torch.ones(3, dtype=g.dtype).to(g, non_blocking=True))
g.masked_select(g > 0)
torch.equal(g, g)
torch.repeat_interleave(g, torch.ones(3, dtype=torch.long, device="cuda"))
1.0 in g
f"{g[0]}"
nn.Linear(3, 2).to("cuda")
"""

RAISES = """
g + c
c + g
c.add_(g)
g.add_(c)
c.sum().add_(g.sum())
torch.where(g > 0, c, g)
torch.cat([g, c])
torch.stack([g.sum(), c.sum()])
torch.full((3,), 1.0) + g
torch.zeros_like(c) + g
c.new_zeros(3) + g
c[g > 0]
c[torch.zeros(3, dtype=torch.long, device="cuda")]
g.gather(0, i)
g.index_select(0, i)
g.masked_fill(c > 0, 0.0)
torch.searchsorted(g, c)
F.cross_entropy(g[None], torch.zeros(1, dtype=torch.long))
F.embedding(torch.zeros(1, dtype=torch.long), g[:, None])
nn.Linear(3, 2)(g)
nn.Linear(3, 2, device="cuda")(c)
g @ c
torch.rand(3, generator=torch.Generator(), device="cuda")
torch.rand(3, generator=torch.Generator("cuda"))
torch.multinomial(g, 1, generator=torch.Generator())
g.uniform_(generator=torch.Generator())
g.numpy()
g.__setitem__(torch.zeros(3, dtype=torch.long, device="cuda"), c)
torch.clamp(g, c.min(), c.max())
torch._foreach_add_([g], [c])
nn.Parameter(g) + nn.Parameter(c)
"""

LINES = [(line, kind) for kind, lines in (("works", WORKS), ("waits", WAITS), ("raises", RAISES)) for line in lines.strip().splitlines()]


def tensors(device: str) -> dict[str, Any]:
    """g on the GPU, c on the host, i an index on the host."""
    numbers = [0.5, 1.0, 1.5]
    return {
        "torch": torch,
        "nn": nn,
        "F": nn.functional,
        "g": torch.tensor(numbers, device=device),
        "c": torch.tensor(numbers),
        "i": torch.tensor([0, 1, 2]),
    }


@pytest.mark.parametrize(("line", "kind"), LINES)
def test_a_line(line: str, kind: str, gpu: Accelerator) -> None:
    names = tensors("cuda")
    gpu.syncs.clear()
    if kind == "raises":
        with pytest.raises((RuntimeError, TypeError), match="device"):
            eval(line, names)
        return
    eval(line, names)
    assert bool(gpu.syncs) == (kind == "waits"), gpu.syncs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="holds the rules to a real GPU")
@pytest.mark.parametrize(("line", "kind"), LINES)
def test_a_line_on_cuda(line: str, kind: str) -> None:
    names = tensors("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        if kind == "works":
            eval(line, names)
            return
        with pytest.raises((RuntimeError, TypeError), match="device" if kind == "raises" else "synchronizing"):
            eval(line, names)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_labels_are_carried(gpu: Accelerator) -> None:
    x = torch.zeros(2, 3, device="cuda")
    assert x.device == torch.device("cuda", 0) != torch.device("cuda")
    assert x.is_cuda
    assert not x.is_cpu
    assert x.get_device() == 0
    for made in (x + 1, x[0], x.view(6), x.clone(), x.double(), x.detach(), x.T, *x.split(1), x.max(-1).values, torch.empty_like(x)):
        assert on_gpu(made)
    for host in (x.cpu(), x.to("cpu"), x.new_zeros(1, device="cpu"), torch.zeros_like(x, device="cpu"), torch.zeros(1)):
        assert not on_gpu(host)
        assert host.device.type == "cpu"


def test_a_copy_is_a_copy(gpu: Accelerator) -> None:
    host = torch.zeros(3)
    there = host.to("cuda")
    back = there.cpu()
    there += 1
    assert host.sum() == back.sum() == 0
    assert there.cuda() is there
    assert there.sum().item() == 3


def test_modules_gradients_and_optimisers(gpu: Accelerator) -> None:
    layer = nn.Linear(3, 2)
    weight = layer.weight
    layer.register_buffer("rows", torch.zeros(2))
    assert layer.to("cuda") is layer
    assert layer.weight is weight
    assert {on_gpu(x) for x in (*layer.parameters(), *layer.buffers())} == {True}
    layer(torch.ones(1, 3, device="cuda")).sum().backward()
    assert weight.grad is not None
    assert weight.grad.is_cuda
    with pytest.raises(RuntimeError, match="different type"):
        weight.grad = torch.zeros(2, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    norm = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()
    assert on_gpu(norm)
    assert {on_gpu(x) for values in optimizer.state.values() for x in values.values()} == {True}
    (gradient,) = torch.autograd.grad(layer.weight.square().sum(), [layer.weight])
    assert on_gpu(gradient)
    assert on_gpu(nn.Parameter(torch.zeros(2, device="cuda")))


def test_where_the_host_waits(gpu: Accelerator) -> None:
    x = torch.zeros(3, device="cuda")
    for _ in range(2):
        x.sum().item()
    x.nonzero()
    assert gpu.count() == gpu.count("read") == 3
    reads = [sync for sync in gpu.syncs if sync.name == "item"]
    line = test_where_the_host_waits.__code__.co_firstlineno + 3
    assert reads == [Sync("read", "item", f"tests/test_accelerator.py:{line}")]
    assert gpu.syncs[reads[0]] == 2


def test_threads_have_it(gpu: Accelerator) -> None:
    seen: list[Tensor] = []
    thread = threading.Thread(target=lambda: seen.append(torch.zeros(2, device="cuda")))
    thread.start()
    thread.join()
    assert on_gpu(seen[0])


def test_without_it_there_is_none(gpu: Accelerator) -> None:
    x = torch.zeros(3)
    assert x.device.type == "cpu"
    assert not x.is_cuda
    assert (x + 1).sum().item() == 3
    assert x[x > 0].tolist() == []
    assert gpu.count() == 0
