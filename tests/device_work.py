"""Counts what a step asks of a CUDA device, where there is none: kernel launches, passes over the gradients, waits, copies.

Tensors on the "device" are `OnDevice`: they say that they are on `cuda:0`, and compute on the CPU, so that every branch that reads
a value goes as it would. What a call launches is a rule, `launches_of`, from PyTorch's CUDA sources; nothing is timed. There is no
autograd on them, because PyTorch for CPUs cannot build a graph there: gradients are given, the step is what is counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hf_amp import device, statistics
from hf_amp.scaling import scaler as scaler_module

CUDA = torch.device("cuda:0")
CHUNK, BLOCKS = 65536, 320
"""Elements that one block of a multi-tensor kernel reads, and blocks of one launch. Source: ATen/native/cuda/MultiTensorApply.cuh."""
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Lists that a multi-tensor kernel goes through side by side → tensors of each in one launch. Source: the same."""
CONCATENATED = 128
"""Tensors that one launch of `cat` takes, half as many where one has gaps. Source: ATen/native/cuda/Shape.cu, `CAT_ARRAY_BATCH_SIZE`."""
_VIEWS = {
    "detach", "view", "_unsafe_view", "alias", "unbind", "select", "slice", "expand", "as_strided", "t", "transpose", "permute",
    "unsqueeze", "squeeze", "split", "split_with_sizes", "_reshape_alias", "view_as_real", "empty", "empty_like", "new_empty",
    "empty_strided", "new_empty_strided", "lift_fresh", "resolve_conj", "is_same_size", "diagonal", "narrow",
}  # fmt: skip
"""Operators that compute nothing."""
_TWICE = {"masked_fill": 2, "index_add": 2, "clone": 1}
"""Operators that copy first."""


class OnDevice(Tensor):
    """A tensor that says it is on `cuda:0`; `data` is on the CPU. `size_factor` makes it stand for a larger one."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> OnDevice:
        shape, strides = on_cpu.size(), on_cpu.stride()
        made: OnDevice = Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=on_cpu.dtype, device=CUDA)
        made.on_cpu = on_cpu
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.on_cpu!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@dataclass
class DeviceWork:
    """What was asked of the device, by operator.

    Attributes:
        launches: kernels.
        bytes_moved: bytes that kernels read and write, of tensors and their results.
        waits: what the host waited for.
        to_device: copies from the host.
        to_host: copies to the host that it did not wait for.
        order: operators that launch something, "event" where one is recorded, and "wait", in order.
    """

    launches: Counter[str] = field(default_factory=Counter)
    bytes_moved: Counter[str] = field(default_factory=Counter)
    waits: list[str] = field(default_factory=list)
    to_device: list[str] = field(default_factory=list)
    to_host: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    def wait(self, what: str) -> None:
        self.waits.append(what)
        self.order.append("wait")

    def launch(self, name: str, kernels: int = 1) -> None:
        self.launches[name] += kernels
        self.order.append(name)

    def passes(self, gradients: Sequence[Tensor]) -> float:
        """How many times all of the gradients could have been read for what was read and written."""
        return sum(self.bytes_moved.values()) / sum(map(_bytes, gradients))


_counting: list[tuple[DeviceWork, int]] = []


@contextmanager
def count_device_work(size_factor: int = 1) -> Iterator[DeviceWork]:
    """Counts what the block asks of the device.

    Args:
        size_factor: what every dimension of a tensor in a list is multiplied by, in its number of blocks: small tensors then
            stand for the large ones of the same model.
    """
    work = DeviceWork()
    _counting.append((work, size_factor))
    try:
        yield work
    finally:
        _counting.pop()


@contextmanager
def pretended_device() -> Iterator[None]:
    """Inside of it tensors can be made on, and moved to, `cuda`; events and pinned memory are there."""
    with pytest.MonkeyPatch.context() as patch, _Operators(), _Placement(), torch.no_grad():
        patch.setattr(statistics, "new_event", lambda device: _Event())
        patch.setattr(scaler_module, "is_capturing", lambda device: False)
        patch.setattr(device, "is_capturing", lambda device: False)
        # `torch.nn.utils.clip_grad_norm_` goes through all tensors at once only where it knows their class.
        patch.setattr(_foreach_utils, "_foreach_supported_types", [*_foreach_utils._foreach_supported_types, OnDevice])
        yield


class _Event:
    """One that is waited for in the block that has recorded it is a wait; by a later one everything before it is done."""

    def __init__(self) -> None:
        self._work = _counting[-1][0] if _counting else None
        if self._work is not None:
            self._work.order.append("event")

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        if self._work is not None and _counting and _counting[-1][0] is self._work:
            self._work.wait("event")


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _on_cpu(x: Any) -> Any:
    return x.on_cpu if isinstance(x, OnDevice) else x


def _name(func: Any) -> str:
    return str(func._schema.name).split("::")[1]


def launches_of(func: Any, args: Sequence[Any], factor: int) -> int:
    """Kernels that one operator launches. Source: ATen/native/cuda, where no other is named."""
    name = _name(func)
    base = name.removesuffix("_")
    if name in _VIEWS or base in _VIEWS:
        return 0
    if base.startswith(("_foreach", "_fused", "_amp_foreach")):
        lists = [value for value in args if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)]
        # The step counters of fused optimizers are not among what is read block by block.
        depth = {"_fused_adamw": 4, "_fused_adam": 4, "_fused_sgd": 2 + (len(lists) > 2 and bool(lists[2]))}.get(base)
        is_new = not name.endswith("_") and base != "_foreach_norm" and base != "_foreach_max"
        depth = depth or len(lists) + is_new
        of_list = multi_tensor_launches(lists[0], depth, factor)
        # `_foreach_norm` and its kin clear what blocks leave their part in, and put these together.
        return of_list + 2 if base in ("_foreach_norm", "_foreach_max") else of_list
    if base in ("cat", "stack"):
        return math.ceil(
            len(args[0]) / (CONCATENATED if all(x.is_contiguous() for x in args[0]) else CONCATENATED // 2)
        )
    return _TWICE.get(name, 1)


def multi_tensor_launches(tensors: Sequence[Tensor], depth: int, factor: int) -> int:
    """Launches of one multi-tensor kernel over lists of `tensors`' sizes. Source: `multi_tensor_apply`."""
    launches = held = blocks = 0
    for x in tensors:
        chunks = math.ceil(math.prod(size * factor for size in x.shape) / CHUNK)
        if not chunks:
            continue
        held += 1
        for chunk in range(chunks):
            blocks += 1
            is_whole = chunk == chunks - 1
            if (held == TENSORS[depth] and is_whole) or blocks == BLOCKS:
                launches, blocks, held = launches + 1, 0, 0 if is_whole else 1
    return launches + bool(blocks)


_READ_BY_INDEX = ("index", "index_select", "gather", "take")


def _moved(func: Any, args: Sequence[Any], kwargs: Any, result: Any) -> int:
    name = _name(func)
    base = name.removesuffix("_")
    if name in _VIEWS or base in _VIEWS:
        return 0
    outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    read = sum(map(_bytes, outputs if base in _READ_BY_INDEX else given))
    if base.startswith("_fused"):  # which write gradients back only where they divide them
        parameters, gradients, *states = (value for value in args if isinstance(value, (list, tuple)))
        moved = sum(map(_bytes, [*parameters, *(x for state in states for x in state if x.dim())]))
        return 2 * moved + (2 if kwargs.get("grad_scale") is not None else 1) * sum(map(_bytes, gradients))
    if not func._schema.is_mutable:
        return read + sum(map(_bytes, outputs))
    written = [x for argument, x in zip(func._schema.arguments, args, strict=False) if argument.alias_info is not None]
    return read + sum(_bytes(x) for x in tree_leaves(written) if isinstance(x, Tensor))


def _run(func: Any, args: Any, kwargs: Any, placed: bool = True) -> Any:
    name = _name(func)
    plain = tree_map(_on_cpu, kwargs)
    result = func(*tree_map(_on_cpu, args), **plain)
    for work, factor in _counting:
        if name == "_local_scalar_dense":
            work.wait("item")
        elif name == "copy_" and not isinstance(args[1], OnDevice):
            work.to_device.append(name)
        elif name == "copy_" and not isinstance(args[0], OnDevice):
            work.to_host.append(name) if len(args) > 2 and args[2] else work.wait(name)
        else:
            if count := launches_of(func, args, factor):
                work.launch(name, count)
            if moved := _moved(func, args, kwargs, result):
                work.bytes_moved[name] += moved
            if torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags:
                work.wait(name)
    if func._schema.is_mutable and name.endswith("_"):
        return args[0] if func._schema.returns else None
    return tree_map(_placed, result) if placed else result


class _Operators(TorchDispatchMode):
    """What PyTorch's own code makes on the device, such as a number for `torch.where`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        makes = device is not None and torch.device(device).type == "cuda"
        if not makes and not any(issubclass(each, OnDevice) for each in types):
            return func(*args, **kwargs)
        kwargs |= {"device": torch.device("cpu")} if makes else {}
        return _run(func, args, kwargs, placed=makes or device is None)


def _placed(x: Any) -> Any:
    return OnDevice(x) if isinstance(x, Tensor) and not isinstance(x, OnDevice) else x


def _item(x: Tensor, key: Any) -> Tensor:
    """`x[key]`, for which PyTorch itself would look for the device."""
    aten = torch.ops.aten
    if isinstance(key, Tensor):
        return aten.index.Tensor(x, [key])
    dim = 0
    for each in key if isinstance(key, tuple) else (key,):
        if each is None:
            x = aten.unsqueeze.default(x, dim)
        elif isinstance(each, slice):
            x = aten.slice.Tensor(x, dim, each.start, each.stop, each.step or 1)
        else:
            x = aten.select.int(x, dim, each)
            continue
        dim += 1
    return x


class _Placement(TorchFunctionMode):
    """Makes tensors where they are asked for: PyTorch itself would look for the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("to", "cpu", "cuda") and args and isinstance(args[0], Tensor):
            return self._to(func, args, kwargs)
        if name == "tolist" and isinstance(args[0], OnDevice):
            for work, _ in _counting:
                work.wait(name)
            return args[0].on_cpu.tolist()
        if name == "__getitem__" and isinstance(args[0], OnDevice):
            return _item(*args)
        if name == "__invert__" and isinstance(args[0], OnDevice):
            return torch.ops.aten.bitwise_not.default(args[0])
        kwargs.pop("pin_memory", None) if name == "empty" else None
        wanted = kwargs.get("device")
        if wanted is None or torch.device(wanted).type != "cuda":
            if name.startswith("new_") and isinstance(args[0], OnDevice):
                kwargs.pop("device", None)
            return func(*args, **kwargs)
        kwargs["device"] = torch.device("cpu")
        made = func(*args, **kwargs)
        for work, _ in _counting:
            if not name.startswith("empty"):
                work.to_device.append(name) if name in ("tensor", "as_tensor") else work.launch(name)
        return tree_map(_placed, made)

    def _to(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, *rest = args
        given = [*rest, *kwargs.values()]
        device = next((torch.device(v) for v in given if isinstance(v, (torch.device, str))), None)
        if func is Tensor.cpu:
            device = torch.device("cpu")
        dtype = next((v for v in given if isinstance(v, torch.dtype)), None)
        waits = not (kwargs.get("non_blocking") or True in rest)
        like = next((v for v in given if isinstance(v, Tensor)), None)
        if like is not None:
            device, dtype = like.device, like.dtype
        if device is None or (device.type == "cuda") == isinstance(x, OnDevice):
            return x if dtype in (None, x.dtype) else torch.ops.aten._to_copy.default(x, dtype=dtype)
        for work, _ in _counting:
            if isinstance(x, OnDevice):
                work.wait("to") if waits else work.to_host.append("to")
            else:
                work.to_device.append("to")
        moved = _on_cpu(x) if dtype is None else _on_cpu(x).to(dtype)
        return moved.clone() if isinstance(x, OnDevice) else _placed(moved.detach().clone())
