"""The one place where hf_amp reads a device: at once, or later without waiting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def read(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Brings small tensors to the host in one transfer per device, which waits for the device.

    Args:
        values: name → tensor of shape [] or [n], any real dtype. FP64 carries them, so FP32 and integers up to 2^53 arrive
            exactly.

    Returns:
        name → value, in the same order; the elements of a tensor of shape [n] under `name[0]`, `name[1]` and so on.
        Booleans arrive as 0.0 and 1.0.
    """
    if len({value.device for value in values.values()}) == 1:
        return dict(zip(_labels(values, values), _packed(values, list(values)).tolist(), strict=True))
    by_device: dict[torch.device, list[str]] = {}
    for name, value in values.items():
        by_device.setdefault(value.device, []).append(name)
    host: dict[str, float] = {}
    for names in by_device.values():
        host.update(zip(_labels(values, names), _packed(values, names).tolist(), strict=True))
    return {label: host[label] for label in _labels(values, values)}


def elements(host: Mapping[str, float], name: str) -> list[float]:
    """The elements of what was read as a tensor of shape [n] under `name`; none where it was not."""
    found: list[float] = []
    while f"{name}[{len(found)}]" in host:
        found.append(host[f"{name}[{len(found)}]"])
    return found


def read_all(values: Sequence[Tensor]) -> list[float]:
    """The same for 0-d tensors without names."""
    named = read({str(index): value for index, value in enumerate(values)})
    return list(named.values())


def read_vector(values: Tensor) -> list[float]:
    """Brings a tensor of shape [n] to the host in one transfer, which waits for the device."""
    return [float(value) for value in values.tolist()]


class PendingRead:
    """Values on their way to the host: copied into pinned memory behind the work already queued, with an event.

    That is on CUDA. Other devices, which have no such event here, are read in `result`, and waited for.

    Args:
        values: name → tensor of shape [] or [n], all on one device.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._labels = _labels(values, values)
        packed = _packed(values, list(values)).detach()
        self._event: torch.cuda.Event | None = None
        if packed.device.type == "cuda":
            self._host = torch.empty(packed.shape, dtype=packed.dtype, device="cpu", pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(packed.device))
        else:
            self._host = packed

    def ready(self) -> bool:
        """Whether `result` would not wait, as far as there is somebody to ask."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def result(self) -> dict[str, float]:
        """The values; waits for the device where `ready` is False."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._labels, self._host.tolist(), strict=True))


def _packed(values: Mapping[str, Tensor], names: list[str]) -> Tensor:
    tensors = [values[name] for name in names]
    if all(tensor.dtype == torch.float32 for tensor in tensors):
        if not any(tensor.dim() for tensor in tensors):
            return torch.stack(tensors)
        return torch.cat([tensor.reshape(-1) for tensor in tensors])
    wide = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    return torch.cat([tensor.to(wide).reshape(-1) for tensor in tensors])


def _labels(values: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
    """What the elements of `_packed` are called."""
    labels: list[str] = []
    for name in names:
        value = values[name]
        labels += [name] if value.dim() == 0 else [f"{name}[{i}]" for i in range(value.numel())]
    return labels
