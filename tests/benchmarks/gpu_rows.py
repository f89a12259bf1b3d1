"""The JSON of `test_gpu_training` as rows and verdicts."""

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
