"""What the step boundary costs, as a ratio to the stock classes, in one interleaved run.

`OMP_NUM_THREADS=1 python -m tests.benchmarks.test_scaler_cost --clock thread --out tests/benchmarks/results`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig
from tests.benchmarks.measuring import CLOCKS, interleaved, ratio, write

SIZES = {"1M": (128, 5, 256), "25M": (512, 7, 5000), "110M": (768, 12, 30000)}
"""name → width, layers, vocabulary of a GPT-2-like set of parameters."""
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

    def boundary() -> None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(held, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()

    return boundary


def our_boundary(held: list[nn.Parameter], fused: bool, strategy: str) -> Callable[[], None]:
    """The same with everything of hf_amp on: folded clip, statistics, underflow samples, counters."""
    config = MixedPrecisionConfig(
        scaling_strategy=strategy, init_scale=1.0, min_scale=1.0, max_scale=1.0, growth_interval=10**6
    )
    scaler = AdvancedGradScaler(config, held[0].device)
    optimizer = torch.optim.AdamW(held, lr=1e-5, fused=fused)
    loss = torch.ones((), device=held[0].device)

    def boundary() -> None:
        scaler.scale(loss)
        scaler.clip_grad_norm_(optimizer, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()

    return boundary


class NoStep(torch.optim.SGD):
    """An optimizer that moves nothing, so that what is around it can be timed alone."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        return None


def guard_alone(held: list[nn.Parameter]) -> Callable[[], None]:
    """All that a guard (BF16, FP32) does in a step, without the clip and the optimizer around it."""
    scaler = AdvancedGradScaler(MixedPrecisionConfig(precision_mode="FP32"), held[0].device)
    optimizer = NoStep(held, lr=1.0)

    def boundary() -> None:
        scaler.step(optimizer)
        scaler.update()

    return boundary


def one_read(held: list[nn.Parameter]) -> Callable[[], None]:
    """One read of all gradients: the unit that the guard is measured in."""
    gradients = [p.grad for p in held if p.grad is not None]
    return lambda: [gradient.aminmax() for gradient in gradients] and None


def measure(size: str, rounds: int, device: str, clock: str = "wall") -> dict[str, Any]:
    """All ratios at one size."""
    held = parameters(*SIZES[size], device)
    contenders: dict[str, Callable[[], None]] = {"one read": one_read(held)}
    for name, fused in {"fused": True, "plain": False}.items():
        contenders[f"stock {name}"] = stock_boundary(held, fused)
        for strategy in ("DYNAMIC", "ADAPTIVE", "PERFORMANCE_OPTIMIZED"):
            contenders[f"{strategy} {name}"] = our_boundary(held, fused, strategy)
    contenders["guard alone"] = guard_alone(held)
    seconds = interleaved(contenders, rounds, clock)
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in held)}
    for name, measured in seconds.items():
        strategy, kind = name.rsplit(maxsplit=1)
        if strategy not in ("one", "stock", "guard"):
            result[f"{name} over stock"] = ratio(measured, seconds[f"stock {kind}"])
    result["guard alone over one read"] = ratio(seconds["guard alone"], seconds["one read"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {size: measure(size, options.rounds, device, options.clock) for size in options.sizes}
    write("scaler_cost", {"ratios": results}, options.out)
    for size, ratios in results.items():
        print(f"\n{size}: {ratios.pop('parameters'):,} parameters")
        for name, r in ratios.items():
            print(f"  {name:45} {r['median']:6.2f}  ({r['quartile_1']:.2f} to {r['quartile_3']:.2f})")


def test_every_contender_runs() -> None:
    """The benchmark itself is sound: each contender runs, and there is a ratio for each of ours."""
    result = measure("1M", rounds=2, device="cpu")
    assert len(result) == 1 + 2 * 3 + 1


if __name__ == "__main__":
    main()
