"""What our loops cost: steps of `train_step` and epochs of the manager, as a ratio to a loop written by hand.

The hand-written loop is that of PyTorch's documentation: autocast, `torch.amp.GradScaler`, fused AdamW, no clipping
(Lightning Fabric refuses to clip with a fused optimizer). All are in their default options; on a CPU all run in the same
emulated FP16.

`python -m tests.benchmarks.test_loop_cost --out tests/benchmarks/results`
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_amp import AdvancedMixedPrecisionManager, MixedPrecisionConfig, StandardMixedPrecisionTrainer
from tests.benchmarks import fabric
from tests.benchmarks.measuring import Row, compared, device, interleaved, parser, write
from tests.benchmarks.models import INIT_SCALE, MEASURED, SIZES, batch, gpt2, stock_fp16

Epoch = Callable[[], None]


def by_hand(size: str, device: str, steps: int) -> Epoch:
    """A loop over autocast and the stock scaler."""
    model, inputs = gpt2(size, device).train(), batch(size, device)
    scaler = torch.amp.GradScaler(device, init_scale=INIT_SCALE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def epoch() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            with stock_fp16(device):
                loss = model(**inputs).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return epoch


def by_fabric(size: str, device: str, steps: int) -> Epoch:
    """The same loop by Lightning Fabric."""
    plain, inputs = gpt2(size, device).train(), batch(size, device)
    made = torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True)
    runner, model, optimizer = fabric.fabric_of(plain, made, device)

    def epoch() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            runner.backward(model(**inputs).loss)
            optimizer.step()

    return epoch


def by_train_step(size: str, device: str, steps: int) -> Epoch:
    """`StandardMixedPrecisionTrainer`, a step at a time."""
    model, inputs = gpt2(size, device).train(), batch(size, device)
    trainer = StandardMixedPrecisionTrainer(MixedPrecisionConfig(init_scale=INIT_SCALE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def epoch() -> None:
        for _ in range(steps):
            trainer.train_step(inputs, model, optimizer)

    return epoch


def by_manager(size: str, device: str, steps: int) -> Epoch:
    """`AdvancedMixedPrecisionManager`, an epoch at a time."""
    model, inputs = gpt2(size, device), batch(size, device)
    manager = AdvancedMixedPrecisionManager(MixedPrecisionConfig(init_scale=INIT_SCALE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def epoch() -> None:
        manager.train_epoch([inputs] * steps, model, optimizer)

    return epoch


LOOPS = {
    "by hand": by_hand,
    "Lightning Fabric": by_fabric,
    "StandardMixedPrecisionTrainer.train_step": by_train_step,
    "AdvancedMixedPrecisionManager.train_epoch": by_manager,
}


def measure(size: str, rounds: int, device: str, steps: int) -> list[Row]:
    """All ratios at one size; those of what is not installed are missing."""
    loops = {name: loop for name, loop in LOOPS.items() if loop is not by_fabric or fabric.INSTALLED}
    contenders = {name: loop(size, device, steps) for name, loop in loops.items()}
    rows = compared(interleaved(contenders, rounds), "by hand", steps, parameters=size)
    missing = [
        {"parameters": size, "what": name, "over": "by hand", "ratio": "not installed"}
        for name in LOOPS.keys() - loops.keys()
    ]
    return missing + rows


def main() -> None:
    options = parser(MEASURED).parse_args()
    rows = [
        row
        for size in options.sizes
        for row in measure(size, options.rounds or SIZES[size].rounds, device(), SIZES[size].steps)
    ]
    write("loop_cost", {"rows": rows}, options.out)


def test_every_contender_runs() -> None:
    """The benchmark itself is sound: there is a ratio for each loop, or word that it is not installed."""
    rows = measure("tiny", rounds=2, device="cpu", steps=2)
    assert {row["what"] for row in rows} == LOOPS.keys() - {"by hand"}


if __name__ == "__main__":
    main()
