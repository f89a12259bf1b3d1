"""What the callback costs: `Trainer.train` in FP16 with it, as a ratio to the same with the stock scaler.

Default options, default optimizer (fused AdamW) and clipping, no logging. On a CPU both run in emulated FP16. Every round
is one call of `train`, at whose beginning the callback looks once whether the parameters are finite; that is in the ratio.

`python -m tests.benchmarks.test_trainer_cost --out tests/benchmarks/results`
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PrinterCallback, Trainer

from hf_amp import MixedPrecisionCallback
from hf_amp.emulation import EmulatedPrecision
from hf_amp.fallback.module_precision import ForwardContext
from tests.benchmarks.measuring import Row, compared, interleaved, parser, write
from tests.benchmarks.models import INIT_SCALE, MEASURED, SIZES, gpt2
from tests.integrations.trainers import StockFP16OnCPU, arguments

STEPS = 8
"""Of a round."""


def training(size: str, folder: Path, ours: bool, steps: int) -> Callable[[], None]:
    """A few steps of one Trainer, which go on where the last call has ended."""
    count, length = SIZES[size].tokens
    model = gpt2(size, "cpu")
    rows = torch.randint(SIZES[size].vocabulary, (count * steps, length)).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    on_gpu = torch.cuda.is_available()
    options = arguments(
        folder, max_steps=steps, logging_strategy="no", use_cpu=not on_gpu, log_level="error",
        per_device_train_batch_size=count,
    )  # fmt: skip
    stock = StockFP16OnCPU(init_scale=INIT_SCALE)
    callbacks = [MixedPrecisionCallback({"init_scale": INIT_SCALE})] if ours else [] if on_gpu else [stock]
    stock.trainer = trainer = Trainer(model, options, train_dataset=data, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    if not ours and not on_gpu:
        ForwardContext(EmulatedPrecision).install(model)
    return lambda: trainer.train() and None


def measure(size: str, rounds: int, steps: int) -> list[Row]:
    """The ratio at one size."""
    with TemporaryDirectory() as folder:
        contenders = {
            "without": training(size, Path(folder) / "stock", False, steps),
            "with the callback": training(size, Path(folder) / "ours", True, steps),
        }
        return compared(interleaved(contenders, rounds), "without", steps, parameters=size)


def main() -> None:
    options = parser(("demo", *MEASURED)).parse_args()
    rows = [row for size in options.sizes for row in measure(size, options.rounds or SIZES[size].rounds, STEPS)]
    write("trainer_cost", {"rows": rows}, options.out)


def test_both_contenders_run() -> None:
    """The benchmark itself is sound: both train, and there is a ratio."""
    assert measure("tiny", rounds=2, steps=1)[0]["ratio"]["median"] > 0


if __name__ == "__main__":
    main()
