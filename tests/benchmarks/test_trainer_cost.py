"""What the callback costs: `Trainer.train` in FP16 with it, as a ratio to the same with the stock scaler.

Default options, default optimizer (fused AdamW) and clipping, no logging. On a CPU both run in emulated FP16.

`python -m tests.benchmarks.test_trainer_cost --out tests/benchmarks/results`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer

from hf_amp import MixedPrecisionCallback
from hf_amp.emulation import EmulatedPrecision
from hf_amp.forward_context import ForwardContext
from tests.benchmarks.measuring import interleaved, ratio, write
from tests.integrations.trainers import StockFP16OnCPU, arguments

SIZES = {"1M": (128, 5, 256), "25M": (512, 7, 5000)}
"""name → width, layers, vocabulary of a GPT-2."""
BATCH, LENGTH = 4, 128
STEPS_A_ROUND = 8


def training(size: str, folder: Path, ours: bool, steps: int) -> Callable[[], None]:
    """A few steps of one Trainer, which go on where the last call has ended."""
    from datasets import Dataset

    width, layers, vocabulary = SIZES[size]
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=vocabulary, n_positions=LENGTH, n_embd=width, n_layer=layers, n_head=4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    rows = torch.randint(vocabulary, (BATCH * steps, LENGTH)).tolist()
    on_gpu = torch.cuda.is_available()
    options = arguments(folder, max_steps=steps, logging_strategy="no", use_cpu=not on_gpu, log_level="error")
    model = GPT2LMHeadModel(shape)
    stock = StockFP16OnCPU(init_scale=256.0)
    callbacks = [MixedPrecisionCallback({"init_scale": 256.0})] if ours else [] if on_gpu else [stock]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    stock.trainer = trainer = Trainer(model, options, train_dataset=data, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    if not ours and not on_gpu:
        ForwardContext(EmulatedPrecision).install(model)
    return lambda: trainer.train() and None


def measure(size: str, rounds: int, steps: int = STEPS_A_ROUND) -> dict[str, Any]:
    """The ratio at one size."""
    with TemporaryDirectory() as folder:
        contenders = {
            name: training(size, Path(folder) / name, name == "ours", steps) for name in ("stock", "ours")
        }
        seconds = interleaved(contenders, rounds)
    return {"ours over stock": ratio(seconds["ours"], seconds["stock"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    results = {size: measure(size, options.rounds) for size in options.sizes}
    write("trainer_cost", {"ratios": results, "steps_a_round": STEPS_A_ROUND}, options.out)
    for size, ratios in results.items():
        for name, r in ratios.items():
            print(f"{size:6} {name:20} {r['median']:6.3f}  ({r['quartile_1']:.3f} to {r['quartile_3']:.3f})")


def test_both_contenders_run() -> None:
    """The benchmark itself is sound: both train, and there is a ratio."""
    assert measure("1M", rounds=2, steps=1)["ours over stock"]["median"] > 0


if __name__ == "__main__":
    main()
