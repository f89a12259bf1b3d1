"""The table of `hf-amp demo`: one column a run, every figure as the run gave it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table

from hf_amp.precision import PrecisionMode

if TYPE_CHECKING:
    from hf_amp.cli.demo_training import DemoResult

LONGEST_NAME = 27
"""Characters of `transformer.h.0.attn.c_proj`, which is not to be broken on a terminal of 80 columns."""


def table_of(results: Mapping[str, DemoResult], steps: int) -> Table:
    """Runs side by side.

    Args:
        results: heading → run.
        steps: optimizer steps that each run was to make.
    """
    table = Table(title="hf-amp demo", show_lines=True)
    table.add_column("")
    for heading, result in results.items():
        table.add_column(heading, width=LONGEST_NAME if _modules_in_fp32(result) else None)
    runs = list(results.values())
    table.add_row("ran", *(run.ran for run in runs))
    table.add_row("logged loss", *(_change(run.losses[0][1], run.losses[-1][1]) for run in runs))
    table.add_row("held-out loss", *(_change(*run.held_out_losses) for run in runs))
    table.add_row("applied steps", *(str(run.applied_steps) for run in runs))
    table.add_row("skipped steps", *(_skipped(run, steps) for run in runs))
    table.add_row("scale", *(_scale(run) for run in runs))
    table.add_row("in FP32", *(_in_fp32(run) for run in runs))
    table.add_row("step time", *(_step_time(run) for run in runs))
    return table


def _change(first: float, last: float) -> str:
    return f"{first:.3f} → {last:.3f}"


def _skipped(run: DemoResult, steps: int) -> str:
    if run.session is None:
        skipped = steps - run.applied_steps
        return f"{skipped}, cause not told" if skipped else "0"
    causes = [
        f"{value:g} {name.removeprefix('skipped_steps_').upper()}"
        for name, value in run.session.metrics().items()
        if name.startswith("skipped_steps_")
    ]
    return ", ".join(causes) or "0"


def _scale(run: DemoResult) -> str:
    if run.scale is not None:
        strategy = f" ({run.session.config.scaling_strategy.value})" if run.session is not None else ""
        return f"{run.scale:g}{strategy}"
    if run.session is not None:
        return "none: only FP16 is scaled; non-finite steps are skipped all the same"
    return "none"


def _modules_in_fp32(run: DemoResult) -> list[str]:
    if run.session is None:
        return []
    return [name for name, mode in run.session.plan.modules.items() if mode is PrecisionMode.FP32]


def _in_fp32(run: DemoResult) -> str:
    """What the plan says, where there is one."""
    if run.session is None:
        return "no plan"
    if run.session.plan.default is PrecisionMode.FP32:
        return "the whole model"
    return "\n".join(_modules_in_fp32(run)) or "nothing"


def _step_time(run: DemoResult) -> str:
    if math.isfinite(run.step_seconds):
        return f"{run.step_seconds * 1000:.0f} ms"
    return "not measured: one step only"
