"""An accelerator made of CPU tensors: tensors that are made on or moved to `cuda` are labelled, and mix as CUDA tensors mix.

    with Accelerator() as gpu:
        x = torch.zeros(3, device="cuda")
        x + torch.ones(3)  # RuntimeError: Expected all tensors to be on the same device
        x.sum().item()
    gpu.syncs  # Counter({Sync(kind="read", name="item", where="tests/..."): 1})

The label is an attribute of the tensor object. It is carried from the arguments of a torch function to its results, `.device` and
`.is_cuda` answer with it, and whatever makes a host wait for a GPU is counted. `tests/test_accelerator.py` holds the rules to those of
CUDA, on a machine that has it. Not seen: the backward pass, kernels inside a composite torch function, other devices' memory.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


def names(words: str) -> frozenset[str]:
    """A set of words."""
    return frozenset(words.split())


ELEMENTWISE = names(
    "add sub mul div truediv floordiv true_divide divide multiply subtract floor_divide remainder fmod mod pow rsub eq ne lt le gt ge "
    "less greater less_equal greater_equal not_equal and or xor bitwise_and bitwise_or bitwise_xor logical_and logical_or logical_xor "
    "maximum minimum clamp clamp_min clamp_max clip where masked_fill fill lerp addcmul addcdiv atan2 xlogy hypot logaddexp fmin fmax "
    "isclose lshift rshift nextafter copysign special_xlogy dist"
)
"""Functions whose operands may include one CPU tensor without dimensions beside CUDA tensors."""
SHAPE_ALONE = names(
    "expand_as view_as reshape_as broadcast_tensors result_type can_cast is_same_size promote_types size dim "
    "_has_compatible_shallow_copy_type"
)
"""Functions that read no value of a second tensor."""
READS = names(
    "item tolist numpy __bool__ __int__ __float__ __index__ __complex__ __array__ __contains__ __repr__ __format__ nonzero argwhere "
    "masked_select equal allclose is_nonzero unique unique_consecutive bincount"
)
"""Functions that wait until a value, or a size that depends on one, is on the host."""
SIZES = names("view reshape expand repeat narrow select new_zeros new_ones new_full new_empty unfold roll")
"""Functions that read a tensor given as a size on the host."""
FACTORIES = names(
    "tensor as_tensor asarray empty zeros ones full rand randn randint randperm arange linspace logspace eye scalar_tensor empty_strided "
    "tril_indices triu_indices normal"
)


class Sync(NamedTuple):
    """Once that the host waits. kind: `read`, device to host, or `upload`, host to device; where: the nearest line of this project."""

    kind: str
    name: str
    where: str


def on_gpu(x: Tensor) -> bool:
    """Whether the tensor has the label."""
    return getattr(x, "_on_gpu", False)


def _label(x: Tensor, gpu: bool) -> Tensor:
    x._on_gpu = gpu  # type: ignore[attr-defined]
    return x


def _is_gpu(device: Any) -> bool:
    """Of whatever torch takes for a device."""
    return device is not None and (isinstance(device, int) or torch.device(device).type == "cuda")


PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)


def _tensors(*values: Any) -> list[Tensor]:
    """The tensors in nested arguments, in their order; called for every torch function, and quick for that."""
    found: list[Tensor] = []
    for value in values:
        kind = type(value)
        if kind in PLAIN:
            continue
        if kind in (Tensor, torch.nn.Parameter):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(*value)
        elif isinstance(value, dict):
            found += _tensors(*value.values())
        elif isinstance(value, slice):
            found += _tensors(value.start, value.stop, value.step)
        elif isinstance(value, Tensor):
            found.append(value)
    return found


class Generator(torch.Generator):
    """A CPU generator that says which device it is for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls)

    def __init__(self, device: Any = "cpu") -> None:
        self._on = CUDA if _is_gpu(device) else CPU

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._on


class Accelerator(TorchFunctionMode):
    """While entered, `cuda` exists. syncs: what the host has waited for, and where."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs: Counter[Sync] = Counter()

    def count(self, kind: str = "") -> int:
        """How often the host waited."""
        return sum(times for sync, times in self.syncs.items() if kind in ("", sync.kind))

    def _wait(self, kind: str, name: str) -> None:
        frame: Any = sys._getframe(2)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and path.name != "accelerator.py":
                break
            frame = frame.f_back
        where = f"{path.relative_to(ROOT)}:{frame.f_lineno}" if frame is not None else "elsewhere"
        self.syncs[Sync(kind, name, where)] += 1

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name: str = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            name = f"{func.__self__.__name__}.{name}"
        special = getattr(self, "_" + SPECIAL.get(name, ""), None)
        if special is not None:
            return special(func, name, args, kwargs)
        if "device" in kwargs or name in FACTORIES or name.startswith("new_") or name.endswith("_like"):
            return self._made(func, name, args, kwargs)
        if name.startswith("_foreach_"):
            return self._each(func, name, args, kwargs)
        return self._computed(func, name, args, kwargs)

    # Every handler takes the function, its name and its arguments.

    def _device_of(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        gpu = on_gpu(args[0])
        if name == "get_device":
            return 0 if gpu else -1
        return {"device.__get__": CUDA if gpu else CPU, "is_cuda.__get__": gpu, "is_cpu.__get__": not gpu}[name]

    def _moved(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """`to`, `cuda`, `cpu`, and what is set to another tensor's kind."""
        x, rest, kwargs = args[0], list(args[1:]), dict(kwargs)
        gpu = {"cuda": True, "cpu": False}.get(name, on_gpu(x))
        if name == "to" and rest and (isinstance(rest[0], str | torch.device) or type(rest[0]) is int):
            kwargs["device"] = rest[0]
            rest = [CPU, *rest[1:]]
        elif rest and isinstance(rest[0], Tensor):
            gpu = on_gpu(rest[0])
        if (device := kwargs.pop("device", None)) is not None:
            gpu = _is_gpu(device)
        out = x.cpu() if name in ("cuda", "cpu") else func(x, *rest, **kwargs)
        if gpu == on_gpu(x):
            return out if out is x else _label(out, gpu)
        if not (gpu and (kwargs.get("non_blocking") or rest[2:3] == [True])):
            self._wait("upload" if gpu else "read", name)
        return _label(out.clone() if out is x or out.data_ptr() == x.data_ptr() else out, gpu)

    def _copied(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """In place into the first tensor, from any device."""
        x, source = args[0], args[1] if len(args) > 1 else kwargs["src"]
        if isinstance(source, Tensor) and on_gpu(x) != on_gpu(source):
            self._wait("upload" if on_gpu(x) else "read", name)
        return func(*args, **kwargs)

    def _set(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """`x.data = y` takes the device of y; `x.grad = y` must have it already."""
        x, value = args
        if name == "grad.__set__" and value is not None and on_gpu(x) != on_gpu(value):
            raise RuntimeError(f"assigned grad has data of a different type: {_named(value)} for {_named(x)}")
        func(x, value)
        if name == "data.__set__":
            _label(x, on_gpu(value))

    def _to_numpy(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
        return func(*args, **kwargs)

    def _index(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """CPU indices may index CUDA tensors, and are uploaded; CUDA indices may not index CPU tensors."""
        x, index = args[0], args[1]
        parts = index if isinstance(index, tuple) else (index,)
        gpu = on_gpu(x)
        value = args[2] if name == "__setitem__" else None
        for part in parts:
            self._index_part(x, part, name, value)
        advanced = any(isinstance(part, Tensor | list | range | np.ndarray) for part in parts)
        if isinstance(value, Tensor) and on_gpu(value) != gpu:
            if advanced and value.dim() and any(isinstance(p, list | np.ndarray) or (isinstance(p, Tensor) and p.dim()) for p in parts):
                raise RuntimeError(f"expected self and values to be on the same device, got {_named(x)} and {_named(value)}")
            self._wait("upload" if gpu else "read", name)
        out = func(*args, **kwargs)
        return _label(out, gpu) if isinstance(out, Tensor) else out

    def _index_part(self, x: Tensor, part: Any, name: str, value: Any) -> None:
        gpu = on_gpu(x)
        if isinstance(part, slice):
            for end in _tensors(part):
                if on_gpu(end):
                    self._wait("read", name)
        elif isinstance(part, list | range | np.ndarray):
            if gpu:
                self._wait("upload", name)
        elif isinstance(part, Tensor):
            whole = part.dim() == 0 and part.dtype not in (torch.bool, torch.uint8)
            if on_gpu(part) and not gpu and not whole:
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            filled = name == "__setitem__" and (not isinstance(value, Tensor) or value.numel() == 1)  # masked_fill, without nonzero
            if on_gpu(part) and (whole or (part.dtype == torch.bool and not filled)):
                self._wait("read", name)
            elif gpu and not on_gpu(part) and not whole:
                self._wait("upload", name)

    def _made(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A tensor of given values or random numbers."""
        kwargs = dict(kwargs)
        device = kwargs.pop("device", None)
        alike = name.startswith("new_") or name.endswith("_like")
        given = args[0] if args else kwargs.get("data", kwargs.get("input"))
        copied = name in ("tensor", "as_tensor", "asarray", "new_tensor")
        data = args[1] if name == "new_tensor" else given
        source = given if alike and not copied else data if copied and isinstance(data, Tensor) and name != "new_tensor" else None
        gpu = _is_gpu(device) if device is not None else on_gpu(source) if isinstance(source, Tensor) else alike and on_gpu(given)
        self._suits(kwargs.get("generator"), gpu, name)
        if copied:
            self._uploaded(data, gpu, name)
        else:
            for _ in (x for x in _tensors(args[1:] if alike else args, kwargs) if on_gpu(x) and name not in ("normal",)):
                self._wait("read", name)
        out: Tensor = func(*args, **kwargs)
        if isinstance(data, Tensor) and (out is data) and gpu != on_gpu(data):
            out = out.clone()
        return out if out is data and on_gpu(out) == gpu else _label(out, gpu)

    def _uploaded(self, data: Any, gpu: bool, name: str) -> None:
        if isinstance(data, Tensor):
            if on_gpu(data) != gpu:
                self._wait("upload" if gpu else "read", name)
            return
        for x in _tensors(data):
            if on_gpu(x):
                self._wait("read", name)
        if gpu:
            self._wait("upload", name)

    def _each(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Lists of tensors, place by place; a tensor beside lists is an operand of every place."""
        lists = [part for part in args if isinstance(part, list | tuple)]
        alone = [part for part in args if isinstance(part, Tensor)]
        labels = [self._together(name.removeprefix("_foreach_"), [*_tensors(list(place)), *alone]) for place in zip(*lists, strict=False)]
        out = func(*args, **kwargs)
        for x, gpu in zip(out or (), labels, strict=False):
            if isinstance(x, Tensor) and not any(x is one for one in lists[0]):
                _label(x, gpu)
        return out

    def _computed(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Anything else: the operands are on one device, and so is the result."""
        if name in SIZES:
            operands = _tensors(args[0])
            for _ in (size for size in _tensors(args[1:], kwargs) if on_gpu(size)):
                self._wait("read", name)
        else:
            operands = _tensors(args, kwargs)
        gpu = on_gpu(operands[0]) if name in SHAPE_ALONE and operands else self._together(name, operands)
        for part in (*args, *kwargs.values()):
            if isinstance(part, torch.Generator):
                self._suits(part, gpu, name)
        if gpu and (name in READS or self._reads(name, args, kwargs)):
            self._wait("read", name)
        out = func(*args, **kwargs)
        for x in _tensors(out):
            if not any(x is one for one in operands):
                _label(x, gpu)
        return out

    @staticmethod
    def _reads(name: str, args: Any, kwargs: Any) -> bool:
        """Functions that wait in some of their forms."""
        if name == "where":
            return len(args) + len(kwargs) == 1
        if name == "repeat_interleave":
            return len(_tensors(args, kwargs)) > 1 and kwargs.get("output_size") is None
        if name in ("index_put", "index_put_"):
            return args[2].numel() > 1 and any(index.dtype == torch.bool for index in _tensors(args[1]))
        return name == "one_hot" and len(args) + len(kwargs) == 1

    @staticmethod
    def _together(name: str, operands: list[Tensor]) -> bool:
        """Whether the operands are on the GPU. RuntimeError where they do not mix there."""
        if not any(on_gpu(x) for x in operands):
            return False
        hosts = [x for x in operands if not on_gpu(x)]
        plain = name.strip("_")
        known = plain in ELEMENTWISE or (name.startswith("__") and plain[1:] in ELEMENTWISE)
        most = len(hosts) if plain == "where" else 1
        in_place = name.endswith("_") and hosts and operands[0] is hosts[0]
        if hosts and (any(x.dim() for x in hosts) or not known or len(hosts) > most or in_place):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})")
        return True

    @staticmethod
    def _suits(rng: Any, gpu: bool, name: str) -> None:
        if isinstance(rng, torch.Generator) and (rng.device.type == "cuda") != gpu:
            wanted, found = ("cuda", "cpu") if gpu else ("cpu", "cuda")
            raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}' ({name})")


SPECIAL = (
    dict.fromkeys(("device.__get__", "is_cuda.__get__", "is_cpu.__get__", "get_device"), "device_of")
    | dict.fromkeys(("to", "cuda", "cpu", "type_as"), "moved")
    | dict.fromkeys(("data.__set__", "grad.__set__"), "set")
    | dict.fromkeys(("numpy", "__array__"), "to_numpy")
    | dict.fromkeys(("__getitem__", "__setitem__"), "index")
    | {"copy_": "copied"}
)


def _named(x: Tensor) -> str:
    return "cuda:0" if on_gpu(x) else "cpu"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    """`cuda` made of CPU tensors, also in threads that begin while it is there, and for accelerate."""
    from accelerate.state import AcceleratorState

    from dlm.models import elementwise

    mode = Accelerator()
    install(mode, monkeypatch)
    monkeypatch.setattr(elementwise, "pay", lambda x: False)  # these round otherwise than the operations of a GPU
    AcceleratorState._reset_state(reset_partial_state=True)
    with mode:
        yield mode
    AcceleratorState._reset_state(reset_partial_state=True)


def install(mode: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a function mode does not see: generators, parameters, threads, the device that accelerate chooses."""
    importlib.import_module("torch._dynamo")  # it reads functions of torch as they are when it is first imported
    made, run = torch.Tensor._make_subclass, threading.Thread.run

    def make_subclass(cls: Any, data: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        return _label(made(cls, data, *rest, **kwargs), on_gpu(data))

    def in_thread(self: threading.Thread) -> None:
        with mode:
            run(self)

    group = torch.utils._foreach_utils._group_tensors_by_device_and_dtype

    def grouped(lists: Any, *rest: Any, **kwargs: Any) -> Any:
        """By the labels too, of tensors of one device."""
        found = group(lists, *rest, **kwargs)
        return {(CUDA if on_gpu(lists[0][0]) else device, dtype): same for (device, dtype), same in found.items()}

    autocast = torch.amp.autocast_mode.autocast.__init__

    def on_cpu(self: Any, device_type: str, *rest: Any, **kwargs: Any) -> None:
        autocast(self, "cpu" if device_type == "cuda" else device_type, *rest, **kwargs)

    for module in ("torch.nn.utils.clip_grad", "torch.optim.optimizer"):
        monkeypatch.setattr(importlib.import_module(module), "_group_tensors_by_device_and_dtype", grouped)
    monkeypatch.setattr(torch.amp.autocast_mode.autocast, "__init__", on_cpu)
    monkeypatch.setattr(torch.Tensor, "_make_subclass", staticmethod(make_subclass))
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "CPU tensors")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: mode._wait("read", "synchronize"))
    monkeypatch.setattr(threading.Thread, "run", in_thread)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda")
