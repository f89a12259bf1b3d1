"""The precisions that a whole run can fall back to, on this machine and on those it trains with."""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_amp.hardware import Hardware
from hf_amp.precision import PrecisionMode
from hf_amp.statistics import agreement


def ladder_of(mode: PrecisionMode, hardware: Hardware, emulate: bool) -> tuple[PrecisionMode, ...]:
    """The precisions from `mode` to the widest: BF16 where there are units for it.

    Emulation stands for a GPU whose units are for FP16 alone (V100, T4), whatever this CPU has: a run is the same on
    every machine.
    """
    if mode in (PrecisionMode.MIXED, PrecisionMode.FP16):
        middle = (PrecisionMode.BF16,) if hardware.bf16 == "native" and not emulate else ()
        return (mode, *middle, PrecisionMode.FP32)
    return (mode, PrecisionMode.FP32) if mode is PrecisionMode.BF16 else (mode,)


def common_to_ranks(hardware: Hardware, device: torch.device) -> Hardware:
    """`hardware`, with units for BF16 only where every rank has them, so that all have the same ladder.

    Called by all ranks. One all-reduce and one host read where there are several, nothing elsewhere.
    """
    if not agreement.is_needed():
        return hardware
    lacks_bf16 = torch.tensor([float(hardware.bf16 != "native")], device=device)
    (somebody_lacks_it,) = agreement.largest_elements_over_ranks(lacks_bf16)
    return replace(hardware, bf16="slow") if somebody_lacks_it and hardware.bf16 == "native" else hardware
