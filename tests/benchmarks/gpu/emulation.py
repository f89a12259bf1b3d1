"""Emulated FP16 on a CPU beside the real one of a device: tiny models of many architectures, eight kinds of overflow, both semantics."""

from __future__ import annotations

import copy
from typing import Any

import torch

import hf_amp
from tests.test_cuda_rules import ALL, Tried, case, units_apart


def differences(number: int, device: str) -> dict[str, Any]:
    """One case of `ALL`, by its number: what is not the same, in words, and the largest difference of an output.

    Compared are the modules that are called, dtype and finite elements of every output, and which parameters have a gradient that
    is not finite: how far a NaN spreads within one is a matter of kernels. Where `device` is the CPU, both are emulated.
    """
    name, kind, half = ALL[number]
    what = f"{name} {kind.__name__ if kind else 'healthy'} {'half' if half else 'autocast'}"
    torch.backends.cudnn.allow_tf32 = False
    model, batch = case(name, kind, half)
    twin, there = copy.deepcopy(model).to(device), {key: x.to(device) for key, x in batch.items()}
    ours = Tried(model, model, batch, hf_amp.emulate(torch.float16, autocast=not half))
    if device == "cpu":
        theirs = Tried(twin, twin, there, hf_amp.emulate(torch.float16, autocast=not half))
    else:
        theirs = Tried(twin, twin, there, torch.autocast(device, torch.float16, enabled=not half))
    found, worst = [], 0.0
    if [module for module, _ in ours.outputs] != [module for module, _ in theirs.outputs]:
        found.append("other modules are called")
    for (module, x), (_, on_device) in zip(ours.outputs, theirs.outputs, strict=False):
        y = on_device.cpu()
        if x.dtype != y.dtype:
            found.append(f"{module} is {x.dtype} here and {y.dtype} there")
        elif not torch.equal(x.isfinite(), y.isfinite()):
            found.append(
                f"{module}: {int((~x.isfinite()).sum())} of {x.numel()} are not finite here, {int((~y.isfinite()).sum())} there"
            )
        worst = max(worst, units_apart(x, y))
    if ours.gradients.keys() != theirs.gradients.keys():
        found.append("other parameters have a gradient")
    overflows = [{name for name, g in each.gradients.items() if not g.isfinite().all()} for each in (ours, theirs)]
    for where, names in (("here", overflows[0] - overflows[1]), ("there", overflows[1] - overflows[0])):
        if names:
            found.append(f"only {where} a gradient overflows, of {', '.join(sorted(names)[:3])}")
    return {"case": what, "differs": found, "units_apart": round(worst, 2)}


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and the cases that differ."""
    kept = [case for case in cases if "differs" in case]
    return {
        "cases": len(cases),
        "equal": sum(not case["differs"] for case in kept),
        "within 2 units of the last place": sum(case["units_apart"] <= 2 for case in kept),
        "largest difference in units of the last place": max((case["units_apart"] for case in kept), default=None),
        "failed": [case for case in cases if "error" in case],
        "different": {case["case"]: case["differs"][:3] for case in kept if case["differs"]},
        "beyond 2 units": {case["case"]: case["units_apart"] for case in kept if case["units_apart"] > 2},
    }
