"""What precision does to training memory, estimated on one step without a second run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hf_amp.precision import FP32_FORMAT
from hf_amp.statistics import local_part

_BYTES_OF_FP32 = FP32_FORMAT.dtype.itemsize


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training step, as it ran and as it would have been in FP32.

    Attributes:
        resident: parameters, buffers, gradients and optimizer state.
        stored: what the forward pass stores for backward, casts of parameters included; parameters themselves not.
        fp32_resident: the same in FP32.
        fp32_stored: the same in FP32.
    """

    resident: int
    stored: int
    fp32_resident: int
    fp32_stored: int

    @property
    def savings(self) -> float:
        """1 - (resident + stored) / (the same in FP32): share of memory saved; negative where precision costs memory."""
        return 1.0 - (self.resident + self.stored) / (self.fp32_resident + self.fp32_stored)


class StoredForBackward:
    """Context around one forward pass that finds out what it stores for backward, and what FP32 would have stored.

    A cast between float formats copies; in FP32 there would be the original alone, with 4 bytes an element, and
    nothing where the original is a parameter. Storages of other dtypes stay as they are. What gradient checkpointing
    recomputes is not stored and not counted. Costs some microseconds an operator, for one step; reads no tensor.

    Args:
        parameters: of the model; not sharded.

    Attributes:
        stored_bytes: what was stored, once the context is left.
        fp32_bytes: what FP32 would have stored, likewise.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.stored_bytes = 0
        self.fp32_bytes = 0
        self._casts = _Casts()
        self._parameters = {self._casts.key(parameter) for parameter in parameters}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._saved: set[int] = set()

    def __enter__(self) -> StoredForBackward:
        self._casts.__enter__()  # type: ignore[no-untyped-call]
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)
        self._casts.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        originals = {self._casts.original.get(key, key) for key in self._saved}
        self.stored_bytes = sum(self._casts.sizes[key].bytes for key in self._saved - self._parameters)
        self.fp32_bytes = sum(self._casts.sizes[key].fp32_bytes for key in originals - self._parameters)

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:
            self._saved.add(self._casts.key(tensor))
        return tensor


class _Size(NamedTuple):
    bytes: int
    fp32_bytes: int


class _Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which storage is a cast of which, by watching the operator that casts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.original: dict[int, int] = {}
        self.sizes: dict[int, _Size] = {}
        self._seen: list[StorageWeakRef] = []  # keeps addresses from being used again, not the memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and _is_reduced(args[0]) and _is_reduced(result):
            source = self.key(args[0])
            self.original[self.key(result)] = self.original.get(source, source)
        return result

    def key(self, tensor: Tensor) -> int:
        """Names the storage of `tensor`, for as long as this object lives."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        if reference.cdata not in self.sizes:
            self._seen.append(reference)
            size = storage.nbytes()
            upcast = size // tensor.itemsize * _BYTES_OF_FP32
            self.sizes[reference.cdata] = _Size(size, upcast if _is_reduced(tensor) else size)
        return int(reference.cdata)


def _is_reduced(tensor: Tensor) -> bool:
    """Whether `tensor` is of a format that a run in FP32 has in FP32; FP64 stays."""
    return tensor.layout is torch.strided and tensor.dtype.is_floating_point and tensor.itemsize <= _BYTES_OF_FP32


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of parameters, buffers, gradients and optimizer state: as they are, and as they would be in FP32.

    Gradients that were set to none count as if they were there, because the step had them. Shards count as they lie
    on this rank. Reads no tensor.
    """
    held = [*model.parameters(), *model.buffers()]
    held += [parameter for parameter in model.parameters() if parameter.requires_grad]  # their gradients
    held += [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]  # fmt: skip
    local = [local_part(tensor) for tensor in held]
    actual = sum(tensor.numel() * tensor.itemsize for tensor in local)
    in_fp32 = sum(
        tensor.numel() * (_BYTES_OF_FP32 if tensor.dtype.is_floating_point else tensor.itemsize) for tensor in local
    )
    return actual, in_fp32
