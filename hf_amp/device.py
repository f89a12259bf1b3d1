"""Devices: what they can run in half precision, and what differs between them, over `torch.accelerator`.

Every question about a device type that hf_amp asks is answered here: units for a format, FP64, generators, events, peak memory,
CUDA graphs. NVIDIA and AMD GPUs and CPUs are known; MPS, XPU and NPU are driven by the same public API of torch, and what
their units are is said to be unknown.
"""

from __future__ import annotations

import functools
import os
import platform
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_amp.precision import PrecisionMode


@dataclass(frozen=True)
class Hardware:
    """What FP16 and BF16 mean on one device.

    Attributes:
        device: the device's type, such as `cuda` or `cpu`.
        name: the device's name as its driver or the operating system gives it.
        fp16: `native` (units for it), `slow` (kernels without units), `unknown` or `none`. Units are no promise of speed.
        bf16: the same for BF16.
        fp8: `native` or `none`.
        tf32: the same for TF32, in which FP32 matrix products may run on request.
        capability: compute capability of an NVIDIA device; None elsewhere.
    """

    device: str
    name: str
    fp16: str
    bf16: str
    fp8: str = "none"
    tf32: str = "none"
    capability: tuple[int, int] | None = None

    def describe(self, mode: PrecisionMode, emulate: bool = False) -> str:
        """One phrase: a precision, and what that means on this device."""
        if mode in (PrecisionMode.MIXED, PrecisionMode.FP16):
            return self.describe_fp16(emulate)
        return f"{mode.value} on {self.name}"

    def describe_fp16(self, emulate: bool) -> str:
        """One phrase that says what FP16 is on this device."""
        if self.device == "cpu" and emulate:
            return "FP16 emulated on the CPU (FP32 arithmetic rounded to FP16; not faster than FP32)"
        if self.fp16 == "slow":
            return f"real FP16 kernels on {self.name}, which has no units for them (many times slower than FP32)"
        known = "" if self.fp16 == "native" else ", a kind of device that hf_amp has not been tried on"
        return f"real FP16 on {self.name}{known}"


_NVIDIA_UNITS = {"fp16": (7, 0), "bf16": (8, 0), "fp8": (8, 9), "tf32": (8, 0)}
"""Format → compute capability since which there are tensor cores for it. Source: CUDA C++ Programming Guide, table of arithmetic
instructions.
"""
_AMD_UNITS = {
    "fp16": ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12"),
    "bf16": ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12"),
    "fp8": ("gfx94", "gfx95", "gfx12"),
    "tf32": ("gfx94",),
}
"""Format → how the names of architectures with matrix units for it begin. Source: ROCm, Data types and precision support."""
_CPU_UNITS = {
    "fp16": ("avx512_fp16", "amx_fp16", "fp16_arith"),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
}
"""Format → names of `torch.cpu.get_capabilities` for arithmetic in it, on x86 and ARM."""
_LIMITS_WITHOUT_BF16 = ("AVX512_CORE", "AVX512_CORE_VNNI")
"""Limits of oneDNN under which it has BF16 kernels, but none on units. Source: oneDNN, CPU dispatcher control."""


def probe(device: torch.device | str) -> Hardware:
    """What `device` can run. Reads no tensor."""
    device = torch.device(device)
    if device.type == "cuda" and torch.version.hip:
        architecture = torch.cuda.get_device_properties(device).gcnArchName
        return amd_gpu(torch.cuda.get_device_name(device), architecture)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        return _gpu(name, lambda number_format: capability >= _NVIDIA_UNITS[number_format], capability)
    if device.type == "cpu":
        name = platform.processor() or platform.machine()
        return Hardware(device="cpu", name=name, fp16=_on_cpu("fp16"), bf16=_on_cpu("bf16"))
    return Hardware(device=device.type, name=device.type, fp16="unknown", bf16="unknown")


def amd_gpu(name: str, architecture: str) -> Hardware:
    """What an AMD GPU can run, by the name of its architecture, such as "gfx90a:sramecc+:xnack-".

    The capability that ROCm gives is the number in that name: that of gfx90a is (9, 0), which is Hopper's.
    """
    return _gpu(name, lambda number_format: architecture.startswith(_AMD_UNITS[number_format]))


def _gpu(name: str, has_units: Callable[[str], bool], capability: tuple[int, int] | None = None) -> Hardware:
    """Without units a GPU has kernels for FP16 and BF16 all the same, and none for the others."""
    fp16, bf16 = ("native" if has_units(number_format) else "slow" for number_format in ("fp16", "bf16"))
    fp8, tf32 = ("native" if has_units(number_format) else "none" for number_format in ("fp8", "tf32"))
    return Hardware("cuda", name, fp16, bf16, fp8, tf32, capability)


def _on_cpu(number_format: str) -> str:
    """`native` where the CPU has units for matrix products in `number_format`, and oneDNN has kernels that may use them.

    What the CPU has does not change with ONEDNN_MAX_CPU_ISA, and what oneDNN has kernels for does; which of these do
    without units is only told by the limit itself. ATEN_CPU_CAPABILITY does not concern matrix products.
    """
    has_units = any(torch.cpu.get_capabilities().get(unit, False) for unit in _CPU_UNITS[number_format])
    has_kernels = getattr(torch.ops.mkldnn, f"_is_mkldnn_{number_format}_supported", lambda: False)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    is_kept_off = number_format == "bf16" and limit in _LIMITS_WITHOUT_BF16
    return "native" if has_units and has_kernels() and not is_kept_off else "slow"


def default_device() -> torch.device:
    """The accelerator of this machine; the CPU where there is none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


@functools.cache
def widest_float(device: torch.device) -> torch.dtype:
    """FP64 where `device` has it, else FP32, as on MPS and some XPUs."""
    lacks_it = device.type == "mps" or (device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64)
    return torch.float32 if lacks_it else torch.float64


def runs_backward() -> bool:
    """Whether this thread runs a backward. That of a GPU runs in a thread of PyTorch's own, and so does what it recomputes."""
    return bool(cast(Any, torch._C)._current_graph_task_id() != -1)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which nothing may be read, and no generator asked."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def copies_without_waiting(device: torch.device) -> bool:
    """Whether a copy from `device` into pinned memory can be waited for later, by an event."""
    return device.type in ("cuda", "xpu")


def new_event(device: torch.device, timed: bool = False) -> torch.Event:
    """An event of `device`, recorded on its current stream."""
    event = torch.Event(device, enable_timing=timed)
    event.record(torch.accelerator.current_stream(device))
    return event


def peak_bytes(devices: Iterable[torch.device]) -> int | None:
    """The most bytes that PyTorch had allocated at once on any one of `devices`; None where it counts on none.

    Of several, as a model is split over, it is those of the fullest: peaks of different moments have no sum, and the
    fullest runs out first. A device without an index is the thread's current one. No GPU-CPU sync.
    """
    counted = [
        int(torch.get_device_module(device).max_memory_allocated(device))
        for device in devices
        if device.type in ("cuda", "xpu", "npu")
    ]
    return max(counted, default=None)


def devices_of(model: nn.Module) -> set[torch.device]:
    """Where `model`'s parameters are."""
    return {parameter.device for parameter in model.parameters()}


def products_use_tf32() -> bool:
    """Whether matrix products of FP32 tensors on a GPU run in TF32. `allow_tf32` raises where the newer setting was used."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def room_on(device: torch.device) -> tuple[int, int] | None:
    """Between steps: bytes that PyTorch could still allocate on `device`, its own reserve included, and the most that a step has
    taken so far beyond what is there now; None where it cannot say. No GPU-CPU sync."""
    if device.type not in ("cuda", "xpu"):
        return None
    module = torch.get_device_module(device)
    held = module.memory_allocated(device)
    free = module.mem_get_info(device)[0] + module.memory_reserved(device) - held
    return int(free), int(module.max_memory_allocated(device) - held)


def _generator_of(device: torch.device) -> tuple[Any, tuple[torch.device, ...]]:
    """The module whose `get_rng_state` and `set_rng_state` are for `device`, and which device they take: MPS has one only."""
    return torch.get_device_module(device), () if device.type == "mps" else (device,)


@dataclass(frozen=True, eq=False)
class RandomState:
    """The states of torch's generators on the CPU and on some other devices, of Python's and of NumPy's. No GPU-CPU sync.

    Attributes:
        cpu: of the CPU's, shape [n], uint8.
        others: device → that of its generator, likewise.
        python: of the module `random`, and None where it is left out: to ask for both takes 60 µs.
        numpy: of the module `numpy.random`, likewise; None too where nothing has imported it.
    """

    cpu: Tensor
    others: Mapping[torch.device, Tensor]
    python: tuple[Any, ...] | None
    numpy: tuple[Any, ...] | None

    @classmethod
    def now(cls, devices: Iterable[torch.device], only_torch: bool = False) -> RandomState:
        """The present one, of the CPU and of those of `devices` that have a generator."""
        others = {device: _generator_of(device) for device in devices if device.type not in ("cpu", "meta")}
        states = {device: module.get_rng_state(*which) for device, (module, which) in others.items()}
        numpy = None if only_torch else sys.modules.get("numpy.random")
        python = None if only_torch else random.getstate()
        return cls(torch.get_rng_state(), states, python, numpy.get_state() if numpy else None)

    def restore(self) -> None:
        """Makes it the present one."""
        torch.set_rng_state(self.cpu)
        for device, state in self.others.items():
            module, which = _generator_of(device)
            module.set_rng_state(state, *which)
        if self.python is not None:
            random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy.random"].set_state(self.numpy)

    def has_moved(self) -> bool:
        """Whether anything was drawn since."""
        now = RandomState.now(self.others, only_torch=self.python is None)
        same = (torch.equal(now.others[device], state) for device, state in self.others.items())
        return not (torch.equal(now.cpu, self.cpu) and all(same)) or self.has_moved_outside_of_torch()

    def has_moved_outside_of_torch(self) -> bool:
        """Whether anything was drawn from Python's or NumPy's generator since; False where they were left out."""
        if self.python is None:
            return False
        now = RandomState.now(())
        return repr((now.python, now.numpy)) != repr((self.python, self.numpy))
