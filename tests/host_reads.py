"""Counts host reads: moments at which Python learns a tensor's values, which on an accelerator waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# These copy a whole tensor out. On CPU tensors they dispatch no operator at all, so they are seen as functions.
_WHOLE_TENSOR_READS = {
    Tensor.tolist: "tolist",
    Tensor.numpy: "numpy",
    Tensor.cpu: "cpu",
    Tensor.__array__: "__array__",
    Tensor.__dlpack__: "__dlpack__",
    Tensor.__repr__: "__repr__",
    Tensor.__format__: "__format__",
}


@dataclass
class HostReads:
    """What was read, in order: names of functions and operators."""

    sources: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of host reads so far."""
        return len(self.sources)


@contextmanager
def count_host_reads() -> Iterator[HostReads]:
    """Counts the host reads of the block, on any device: `with count_host_reads() as reads: ...; reads.count`.

    Counted once each: `.item()`, `bool`, `int`, `float`; `.tolist()`, `.numpy()`, `.cpu()`, printing; copies to the
    CPU from elsewhere; operators whose result or shape depends on values (`torch.equal`, `nonzero`, boolean masks,
    `unique`, coalescing). `.to(device)` between equal devices moves nothing and is not counted. Adam and its kin,
    unless fused, read step counters that live on the CPU, which is counted as any other read: use SGD.
    """
    reads = HostReads()
    with _Operators(reads) as operators, _Functions(reads, operators):
        yield reads


@contextmanager
def count_synchronisations() -> Iterator[HostReads]:
    """Counts how often the block makes the host wait for a CUDA device, by file and line; known when the block is left.

    Source: `torch.cuda.set_sync_debug_mode`, which does not see events and streams that are waited for by name.
    """
    reads = HostReads()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as reported:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield reads
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in reported:
        if "called a synchronizing CUDA operation" in str(warning.message):
            reads.sources.append("/".join([*warning.filename.split("/")[-3:], str(warning.lineno)]))


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads
        self.muted = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.muted and (_depends_on_values(func, args) or _leaves_device(args, kwargs, result)):
            self._reads.sources.append(str(func))
        return result


class _Functions(TorchFunctionMode):
    def __init__(self, reads: HostReads, operators: _Operators) -> None:
        super().__init__()
        self._reads, self._operators = reads, operators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _WHOLE_TENSOR_READS:
            return func(*args, **(kwargs or {}))
        self._reads.sources.append(_WHOLE_TENSOR_READS[func])
        self._operators.muted = True  # one read, whatever operators it is made of
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._operators.muted = False


def _depends_on_values(func: Any, args: Any) -> bool:
    if func is torch.ops.aten.index.Tensor:  # by integers its shape is known, by a mask it is not
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return (
        torch.Tag.data_dependent_output in func.tags  # aten._local_scalar_dense, which is .item(), among them
        or torch.Tag.dynamic_output_shape in func.tags
        or func is torch.ops.aten._coalesce.default
    )


def _leaves_device(args: Any, kwargs: Any, result: Any) -> bool:
    if not (isinstance(result, Tensor) and result.device.type == "cpu"):
        return False
    if (kwargs or {}).get("non_blocking") or any(argument is True for argument in args):
        return False  # a copy that is not waited for; `copy_` takes that as its third argument
    return any(isinstance(argument, Tensor) and argument.device.type != "cpu" for argument in args)
