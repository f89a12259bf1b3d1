"""What was expected of hf_amp on a GPU, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.benchmarks.gpu.contenders import STRATEGIES

Case = dict[str, Any]
Figure = float | None


def _speed(way: str, over: str) -> Callable[[Case], Figure]:
    return lambda case: case["ways"][way][f"speed over {over}"]["median"]


def _stored_less(case: Case) -> Figure:
    """Share that FP16 stores less for backward than FP32 does: activations, and casts of parameters."""
    stored = [case["ways"][way].get("stored_bytes") for way in ("FP16 DYNAMIC", "FP32")]
    return None if None in stored else round(1 - stored[0] / stored[1], 4)


def _own_synchronisations(case: Case) -> Figure:
    """Those of the step that BF16 with neither scaler nor hf_amp does not have."""
    ways = case["ways"]
    counts = [ways[way]["synchronisations_per_step"] for way in ("FP16 PERFORMANCE_OPTIMIZED", "BF16")]
    return counts[0] - counts[1]


EXPECTATIONS: list[tuple[str, str, Callable[[float], bool], Callable[[Case], Figure], Callable[..., bool]]] = [
    ("speed of FP16 over FP32", "1.5 or more", lambda x: x >= 1.5, _speed("FP16 DYNAMIC", "FP32"), all),
    ("speed of FP16 over FP32 with TF32", "1.5 or more", lambda x: x >= 1.5, _speed("FP16 DYNAMIC", "FP32 with TF32"), all),
    ("less stored for backward than in FP32", "up to 0.5", lambda x: x >= 0.5, _stored_less, any),
    *((f"speed of {s} over the stock scaler", "1.00 or more", lambda x: x >= 1.0, _speed(f"FP16 {s}", "FP16 stock"), all) for s in STRATEGIES),
    ("speed with 10% of the modules in FP32 over FP16", "0.90 or more", lambda x: x >= 0.9, _speed("FP16 DYNAMIC, 10% in FP32", "FP16 DYNAMIC"), all),
    ("the same where FP32 may be TF32", "0.90 or more", lambda x: x >= 0.9, _speed("FP16 DYNAMIC, 10% in FP32 with TF32", "FP16 DYNAMIC"), all),
    ("synchronisations a step by PERFORMANCE_OPTIMIZED, fused", "0", lambda x: x <= 0, _own_synchronisations, all),
]  # fmt: skip
"""Name, what is wanted in words, whether a figure is that, the figure of one case, and of how many cases it is to be so."""


def expectations(cases: dict[str, Case]) -> list[dict[str, Any]]:
    """Each expectation with its figure in every case; `reached` is "not measured" where there is none."""
    reported = []
    for name, wanted, is_reached, figure, of_cases in EXPECTATIONS:
        measured = {label: figure(case) for label, case in cases.items()}
        known = [value for value in measured.values() if value is not None]
        reached = of_cases(is_reached(value) for value in known) if known else "not measured"
        reported.append({"name": name, "wanted": wanted, "measured": measured, "reached": reached})
    return reported
