"""The JSON of `test_gpu_training`, and of `tests.gpu`, as rows and verdicts."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.measuring import Row

FIGURES = {
    "units_per_second": "units_per_second",
    "speed over FP32": "speed over FP32",
    "speed over FP16 stock": "speed over stock",
    "peak_bytes": "peak_bytes",
    "synchronisations_per_step": "synchronisations a step",
}
"""Figure of a way → column."""


def gpu_rows(result: dict[str, Any]) -> list[Row]:
    """A row for each model, batch and way to train it; what a device does not tell is left empty."""
    return [
        {"model": case, "mode": way} | {column: figures[name] for name, column in FIGURES.items() if name in figures}
        for case, measured in result["cases"].items()
        for way, figures in measured["ways"].items()
    ]


def stage_rows(result: dict[str, Any]) -> list[Row]:
    """A row for each figure of each stage of `tests.gpu`, but for those of training, which have a table of their own."""
    found = {name: stage["found"] for name, stage in result["stages"].items() if "found" in stage}
    rows: list[Row] = []
    for stage in ("correctness", "emulation", "causes", "predictions"):
        figures = found.get(stage, {})
        figures = {**figures, **figures.get("counts", {})}
        rows += [
            {"stage": stage, "what": what, "figure": len(figure) if isinstance(figure, (list, dict)) else figure}
            for what, figure in figures.items()
            if what not in ("exit", "counts")
        ]
    for way, steps in found.get("launches", {}).items():
        kernels = ", ".join(f"{step['kernels']} {what}" for what, step in steps.items())
        rows.append({"stage": "kernels of a step boundary", "what": way, "figure": kernels})
    for strategy, figure in found.get("scaler cost", {}).get("over stock", {}).items():
        rows.append({"stage": "time of a step boundary over stock", "what": strategy, "figure": figure})
    for row in found.get("skips", {}).get("rows", []):
        what = f"{row['what']}, {row['parameters']} parameters"
        rows.append({"stage": "time of a skip over an applied step", "what": what, "figure": row["ratio"]})
    return rows


def gpu_verdicts(result: dict[str, Any]) -> list[str]:
    """What was expected, and whether it was reached, with the figure of every model."""
    words = {True: "**reached**", False: "**missed**"}
    return [
        f"{wish['name']}, {wish['wanted']}: {words.get(wish['reached'], '**not measured**')}"
        + "".join(f"; {case} {_shown(figure)}" for case, figure in wish["measured"].items())
        + "."
        for wish in result["expectations"]
    ]


def _shown(figure: float | None) -> str:
    return "not measured" if figure is None else f"{figure:.2f}"
