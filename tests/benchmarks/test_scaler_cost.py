"""What the step boundary costs, as a ratio to the stock classes, in one interleaved run.

`OMP_NUM_THREADS=1 python -m tests.benchmarks.test_scaler_cost --clock thread --out tests/benchmarks/results`
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig
from tests.benchmarks.measuring import CLOCKS, Row, compared, device, interleaved, parser, write
from tests.benchmarks.models import MEASURED, SIZES

ROUNDS = {"1M": 40, "25M": 20, "110M": 8}
STRATEGIES = ("DYNAMIC", "ADAPTIVE", "PERFORMANCE_OPTIMIZED")
OPTIMIZERS = {"fused": True, "plain": False}
MAX_NORM = 1.0


def parameters(width: int, layers: int, vocabulary: int, device: str) -> list[nn.Parameter]:
    """Parameters with the shapes of a GPT-2, each with a gradient."""
    shapes: list[tuple[int, ...]] = [(vocabulary, width), (128, width), (width,), (width,)]
    for _ in range(layers):
        shapes += [(width, 3 * width), (3 * width,), (width, width), (width,), (width, 4 * width)]
        shapes += [(4 * width,), (4 * width, width), (width,)] + [(width,)] * 4
    held = [nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
    for parameter in held:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return held


def stock_boundary(held: list[nn.Parameter], fused: bool) -> Callable[[], None]:
    """unscale, clip, step, update of `torch.amp.GradScaler`: the Trainer's default path."""
    scaler = torch.amp.GradScaler(held[0].device.type, init_scale=1.0, growth_interval=10**6)
    optimizer = torch.optim.AdamW(held, lr=1e-5, fused=fused)
    scaler.scale(torch.ones((), device=held[0].device))

    def record() -> None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(held, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()

    return record


def our_boundary(held: list[nn.Parameter], fused: bool, strategy: str) -> Callable[[], None]:
    """The same with everything of hf_amp on: folded clip, statistics, underflow samples, counters."""
    config = MixedPrecisionConfig(
        scaling_strategy=strategy, init_scale=1.0, min_scale=1.0, max_scale=1.0, growth_interval=10**6
    )
    scaler = AdvancedGradScaler(config, held[0].device)
    optimizer = torch.optim.AdamW(held, lr=1e-5, fused=fused)
    loss = torch.ones((), device=held[0].device)

    def record() -> None:
        scaler.scale(loss)
        scaler.clip_grad_norm_(optimizer, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()

    return record


class NoStep(torch.optim.SGD):
    """An optimizer that moves nothing, so that what is around it can be timed alone."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        return None


def guard_alone(held: list[nn.Parameter]) -> Callable[[], None]:
    """All that a guard (BF16, FP32) does in a step, around a call of an optimizer that moves nothing."""
    scaler = AdvancedGradScaler(MixedPrecisionConfig(precision_mode="FP32"), held[0].device)
    optimizer = NoStep(held, lr=1.0)

    def record() -> None:
        scaler.step(optimizer)
        scaler.update()

    return record


def one_read(held: list[nn.Parameter]) -> Callable[[], None]:
    """What the guard is held against: one read of all gradients, and the same call of an optimizer that moves nothing."""
    gradients = [p.grad for p in held if p.grad is not None]
    optimizer = NoStep(held, lr=1.0)

    def record() -> None:
        for gradient in gradients:
            gradient.aminmax()
        optimizer.step()

    return record


def measure(size: str, rounds: int, device: str, clock: str = "wall") -> list[Row]:
    """All ratios at one size."""
    shape = SIZES[size]
    held = parameters(shape.width, shape.layers, shape.vocabulary, device)
    rows: list[Row] = []
    contenders = {f"stock {kind}": stock_boundary(held, fused) for kind, fused in OPTIMIZERS.items()}
    for kind, fused in OPTIMIZERS.items():
        contenders |= {f"{name} {kind}": our_boundary(held, fused, name) for name in STRATEGIES}
    contenders |= {"one read": one_read(held), "guard alone": guard_alone(held)}
    seconds = interleaved(contenders, rounds, clock)
    for kind in OPTIMIZERS:
        taken = {name.removesuffix(f" {kind}"): s for name, s in seconds.items() if name.endswith(f" {kind}")}
        rows += compared(taken, "stock", parameters=size, optimizer=f"AdamW, {kind}")
    guard = {name: seconds[name] for name in ("guard alone", "one read")}
    return rows + compared(guard, "one read", parameters=size, optimizer="none")


def main() -> None:
    command = parser(MEASURED)
    command.add_argument("--clock", default="wall", choices=list(CLOCKS))
    options = command.parse_args()
    rows = [
        row for size in options.sizes for row in measure(size, options.rounds or ROUNDS[size], device(), options.clock)
    ]
    write("scaler_cost", {"clock": options.clock, "rows": rows}, options.out)


def test_every_contender_runs() -> None:
    """The benchmark itself is sound: each contender runs, and there is a ratio for each of ours."""
    assert len(measure("tiny", rounds=2, device="cpu")) == 2 * 3 + 1


if __name__ == "__main__":
    main()
