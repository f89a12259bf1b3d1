"""What the callback costs: `Trainer.train` in FP16 with it, as a ratio to the same with the stock scaler.

Default options, default optimizer (fused AdamW) and clipping, no logging. On a CPU both run in emulated FP16. Every round
is one call of `train`, at whose beginning the callback looks once whether the parameters are finite; that is in the ratio.

`python -m tests.benchmarks.test_trainer_cost --out tests/benchmarks/results`
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
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
        model.register_forward_hook(
            lambda module, given, output: convert_to_fp32(output)
        )  # as accelerate does on devices
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


def calls_of(train: Callable[[], None]) -> Counter[str]:
    """How many functions of Python ("call") and of C ("c_call") one more `train` calls, after two that warm up."""
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: Any) -> None:
        calls[event] += 1

    train()
    train()
    sys.setprofile(count)
    try:
        train()
    finally:
        sys.setprofile(None)
    return calls


def test_a_healthy_step_and_a_run_make_few_calls_more_than_stock(tmp_path: Path) -> None:
    """In a step 210 more of each kind at most, of 2,900 in all; once in a call of `train` 7,000 and 10,000.

    Counted, because no clock tells so little apart. What is done once is what 16 steps do not double.
    """
    counted = {
        (ours, steps): calls_of(training("tiny", tmp_path / f"{ours} {steps}", ours, steps))
        for ours in (False, True)
        for steps in (8, 16)
    }
    for kind, once_at_most in (("call", 7000), ("c_call", 10000)):
        extra = {steps: counted[True, steps][kind] - counted[False, steps][kind] for steps in (8, 16)}
        assert extra[16] - extra[8] <= 8 * 210, (kind, extra)
        assert 2 * extra[8] - extra[16] <= once_at_most, (kind, extra)


if __name__ == "__main__":
    main()
