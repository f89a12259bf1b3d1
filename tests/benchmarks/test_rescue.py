"""Models that stock FP16 cannot train at all, trained in FP16.

Emulated FP16, 200 steps, a skipped batch tried again, final loss as the mean of the last 20 steps.

`OMP_NUM_THREADS=1 python -m tests.benchmarks.test_rescue --out tests/benchmarks/results`
"""

from __future__ import annotations

import pytest

from tests.benchmarks.measuring import Row, parser, write
from tests.fallback.range_reference import fp16_flop_share
from tests.fallback.rescaled import ZOO, RescaledModel
from tests.fallback.rescue_runs import STEPS, final_loss_in_fp32, stock_skips, train

STOCK_STEPS = 20


def rescue(entry: RescaledModel, steps: int = STEPS) -> Row:
    """One model: what stock skips, what hf_amp skips and holds in FP32, and where both of FP32 and it end."""
    run = train(entry, steps)
    held = set(run.session.plan.modules)
    expected = final_loss_in_fp32(entry.name, steps)
    return {
        "model": entry.name,
        "stock_skipped_share": stock_skips(entry, STOCK_STEPS) / STOCK_STEPS,
        "skipped_steps": run.session.metrics()["skipped_steps"],
        "modules_in_fp32": len(held),
        "products_in_fp16": round(fp16_flop_share(run.model, next(entry.batches(0)), held), 3),
        "final_loss": round(run.final_loss, 4),
        "final_loss_in_FP32": round(expected, 4),
        "final_loss_over_FP32": round(run.final_loss / expected, 4),
    }


def main() -> None:
    options = parser().parse_args()
    write("rescue", {"rows": [rescue(entry) for entry in ZOO]}, options.out)


@pytest.mark.usefixtures("fresh_accelerator_state")
def test_a_row_is_that_of_the_model() -> None:
    """The benchmark is sound: stock skips every step of GPT-2, hf_amp holds some modules and trains."""
    row = rescue(ZOO[0], steps=2)
    assert row["stock_skipped_share"] == 1
    assert row["modules_in_fp32"] > 0
    assert 0 < row["products_in_fp16"] < 1


if __name__ == "__main__":
    main()
