"""What precision does to training memory, estimated on one step without a second run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hf_amp.emulation import stands_for_half
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


class StoredForBackward(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context around one forward pass that finds out what it stores for backward, and what FP32 would have stored.

    A cast between float formats copies; in FP32 there would be the original alone, with 4 bytes an element, and
    nothing where the original is a parameter. Storages of other dtypes stay as they are. What gradient checkpointing
    recomputes is not stored and not counted. Of emulated half precision it is what a device would store: the half-precision
    operands of products, not their FP32 copies. Costs some microseconds an operator, for one step; reads no tensor.

    Args:
        parameters: of the model; not sharded.

    Attributes:
        stored_bytes: what was stored, once the context is left.
        fp32_bytes: what FP32 would have stored, likewise.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stored_bytes = self.fp32_bytes = 0
        self._bytes: dict[int, tuple[int, int]] = {}  # of a storage, as it is and in FP32
        self._storages: list[StorageWeakRef] = []  # keeps addresses from being used again, not the memory
        self._original: dict[int, int] = {}  # of a storage that is a cast of another
        self._cast_from: dict[int, int] = {}  # the same, one cast back
        self._saved: set[int] = set()
        self._emulated: set[int] = set()  # FP32, for what a device has in half precision
        self._parameters = {self._storage_of(parameter) for parameter in parameters}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> StoredForBackward:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        rounded = {wide: half for half, wide in self._cast_from.items()}
        self._saved |= {self._cast_from.get(storage) or rounded.get(storage, storage) for storage in self._emulated}
        originals = {self._original.get(storage, storage) for storage in self._saved}
        self.stored_bytes = sum(self._bytes[storage][0] for storage in self._saved - self._parameters)
        self.fp32_bytes = sum(self._bytes[storage][1] for storage in originals - self._parameters)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and _is_reduced(args[0]) and _is_reduced(result):
            source, copied = self._storage_of(args[0]), self._storage_of(result)
            self._cast_from[copied], self._original[copied] = source, self._original.get(source, source)
        return result

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:
            (self._emulated if stands_for_half() else self._saved).add(self._storage_of(tensor))
        return tensor

    def _storage_of(self, tensor: Tensor) -> int:
        """Names the storage of `tensor`, for as long as this object lives."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        if reference.cdata not in self._bytes:
            self._storages.append(reference)
            size = storage.nbytes()
            in_fp32 = size // tensor.itemsize * _BYTES_OF_FP32 if _is_reduced(tensor) else size
            self._bytes[reference.cdata] = size, in_fp32
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
    held += [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    local = [local_part(tensor) for tensor in held]
    sizes = [(x.itemsize, _BYTES_OF_FP32 if x.dtype.is_floating_point else x.itemsize, x.numel()) for x in local]
    return sum(size * n for size, _, n in sizes), sum(size * n for _, size, n in sizes)
