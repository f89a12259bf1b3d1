"""A step boundary holds no copy of the gradients, and needs little beside them while it runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig, ScalingStrategy
from tests.each import for_each

SHAPES = [(256, 128), (4, 32, 128)] + 5 * [
    (128, 384), (384,), (128, 128), (128,), (128, 512), (512,), (512, 128), *[(128,)] * 5
]  # fmt: skip


def model_parameters(sparse: bool) -> list[nn.Parameter]:
    """1M parameters with a gradient each; one more, of 3,000 rows, sparse where asked."""
    torch.manual_seed(0)
    held = [nn.Parameter(torch.randn(shape) * 0.02) for shape in SHAPES]
    for parameter in held:
        parameter.grad = torch.randn(parameter.shape)
    if sparse:
        table = nn.Parameter(torch.zeros(3000, 50))
        rows = torch.randperm(3000)[:1000].sort().values[None]
        table.grad = torch.sparse_coo_tensor(
            rows, torch.randn(1000, 50), table.shape, is_coalesced=True, check_invariants=True
        )
        held.append(table)
    return held


def peak_bytes(work: object, trace: Path) -> tuple[int, int]:
    """The most that was allocated at once while `work()` ran, and what was left after it, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    moments = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    held = peak = 0
    for _, size in moments:
        held += size
        peak = max(peak, held)
    return peak, held


def boundary_bytes(trace: Path, strategy: str, fused: bool, kind: str, sparse: bool = False) -> tuple[int, int, int]:
    """Peak and rest of the third step boundary with everything on, and the bytes of the gradients."""
    held = model_parameters(sparse)
    guard = {"precision_mode": "BF16"} if kind == "guard" else {}
    config = MixedPrecisionConfig(scaling_strategy=strategy, monitoring_interval=1, init_scale=1.0, **guard)
    scaler = AdvancedGradScaler(config, "cpu")
    optimizer = torch.optim.SGD(held, lr=1e-3, fused=fused)

    def record() -> None:
        if kind == "folded":
            scaler.clip_grad_norm_(optimizer, 1.0)
        elif kind == "unscaled":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    loss = torch.ones(())
    for _ in range(2):
        scaler.scale(loss)
        record()
    scaler.scale(loss)
    peak, rest = peak_bytes(record, trace)
    return peak, rest, 4 * sum(p.numel() for p in held)


KINDS = for_each("kind", ["plain", "unscaled", "folded", "guard"])
FEW_NUMBERS = 256


@for_each("strategy", [strategy.value for strategy in ScalingStrategy])
@for_each("fused", [False, True])
@KINDS
def test_a_step_boundary_takes_a_hundredth_of_the_gradients(
    strategy: str, fused: bool, kind: str, tmp_path: Path
) -> None:
    """At most 1% of the gradients' size is allocated at once, in a step that samples, and only some numbers are kept.

    A sample takes some 30 kB at least, which is more than 1% for models of less than 0.85M parameters.
    """
    peak, rest, gradients = boundary_bytes(tmp_path / "trace.json", strategy, fused, kind)
    assert peak <= gradients / 100
    assert rest <= FEW_NUMBERS


@KINDS
def test_sparse_gradients_take_no_more(kind: str, tmp_path: Path) -> None:
    """The same with a sparse gradient, which is neither densified nor copied."""
    peak, rest, gradients = boundary_bytes(tmp_path / "trace.json", "ADAPTIVE", False, kind, sparse=True)
    assert peak <= gradients / 100
    assert rest <= FEW_NUMBERS


def test_a_copy_of_the_gradients_would_be_seen(tmp_path: Path) -> None:
    """The instrument: a copy that is let go shows in the peak, one that is kept in the rest as well."""
    held, kept = model_parameters(sparse=False), []
    gradients = 4 * sum(p.numel() for p in held)
    peak, rest = peak_bytes(lambda: [p.grad.clone() for p in held] and None, tmp_path / "trace.json")
    assert peak >= gradients > rest
    _, rest = peak_bytes(lambda: kept.extend(p.grad.clone() for p in held), tmp_path / "trace.json")
    assert rest >= gradients
