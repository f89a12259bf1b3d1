"""The share of low-precision weights that an optimizer step leaves as they were."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig
from hf_amp.scaling.step import StepOutcome
from tests.each import for_each
from tests.host_reads import count_host_reads
from tests.reference import OverflowInBackward

BF16 = torch.bfloat16


def wide_mlp(dtype: torch.dtype = BF16) -> nn.Module:
    """Matrices of 64 by 64 and 64 by 128, larger than a sample; weights of many magnitudes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 128)).to(dtype)


class Run:
    """Steps of one model, each with the exact share that it left alone."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        options = {"precision_mode": "BF16", "monitoring_interval": 1, **options}
        self.scaler = AdvancedGradScaler(MixedPrecisionConfig(**options), "cpu")
        self.reported: list[StepOutcome] = []
        self.scaler.observers.append(lambda outcome, _: self.reported.append(outcome))
        self.model, self.optimizer = model, optimizer
        self.exact: list[float] = []
        self.steps = 0

    def backward(self, overflow: bool = False) -> None:
        generator = torch.Generator().manual_seed(self.steps)
        self.steps += 1
        self.optimizer.zero_grad()
        x = torch.randn(8, 64, generator=generator).to(next(self.model.parameters()).dtype)
        loss = self.model(x).float().square().mean()
        self.scaler.scale(OverflowInBackward.apply(loss) if overflow else loss).backward()

    def step(self, overflow: bool = False) -> None:
        self.backward(overflow)
        before = [p.detach().clone() for p in self.model.parameters()]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        same = sum((p == old).sum().item() for p, old in zip(self.model.parameters(), before, strict=True))
        self.exact.append(same / sum(p.numel() for p in before))

    def fractions(self) -> list[float | None]:
        return [outcome.lost_update_fraction for outcome in self.reported]


@for_each("lr", [1e-5, 1e-4, 1e-3])
@for_each("dtype", [BF16, torch.float16])
def test_fraction_is_that_of_an_exact_count(dtype: torch.dtype, lr: float) -> None:
    """Within 0.02 of counting every element of every step, and told with the step after; at 1e-5 BF16 loses most."""
    model = wide_mlp(dtype)
    run = Run(model, torch.optim.AdamW(model.parameters(), lr=lr, eps=1e-4))  # 1e-8 is 0 in FP16
    for _ in range(6):
        run.step()
    assert run.fractions()[0] is None
    assert run.fractions()[1:] == pytest.approx(run.exact[:-1], abs=0.02)
    if dtype is BF16 and lr == 1e-5:
        assert min(run.exact) > 0.7


@pytest.mark.parametrize("fused", [False, True])
def test_frozen_norm_weights_are_lost_whole(fused: bool) -> None:
    """Weights of 1 (a norm's) in BF16 at lr 1e-5: all of every update is lost, and that is what is told."""
    model = nn.LayerNorm(64).to(BF16)
    nn.init.zeros_(model.bias.requires_grad_(False))
    run = Run(model, torch.optim.AdamW([model.weight], lr=1e-5, weight_decay=0.0, fused=fused))
    for _ in range(3):
        run.step()
    assert run.fractions()[1:] == [pytest.approx(1.0), pytest.approx(1.0)]


def test_skipped_steps_are_not_measured() -> None:
    """A skipped step changes nothing and loses nothing: the step after it tells no share."""
    model = wide_mlp()
    run = Run(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for overflow in (False, True, False, False):
        run.step(overflow)
    assert [fraction is None for fraction in run.fractions()] == [True, False, True, False]


def test_steps_that_the_device_skips_are_not_measured() -> None:
    """The same where the optimizer is called in any case and skips by itself."""
    model = wide_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    run = Run(model, optimizer, precision_mode="MIXED", scaling_strategy="PERFORMANCE_OPTIMIZED", init_scale=8.0)
    for overflow in (False, True, False, False):
        run.step(overflow)
    run.scaler.flush()
    assert [outcome.applied for outcome in run.reported] == [True, False, True, True]
    assert [fraction is None for fraction in run.fractions()] == [True, False, True, False]


@pytest.mark.parametrize("options", [{}, {"half_parameters": "master_weights"}])
def test_no_fraction_where_fp32_is_moved(options: dict[str, Any]) -> None:
    """FP32 parameters, and low-precision ones with master weights, lose nothing: no share is told."""
    model = wide_mlp(BF16 if options else torch.float32)
    run = Run(model, torch.optim.AdamW(model.parameters(), lr=1e-5), **options)
    for _ in range(3):
        run.step()
    assert run.fractions() == [None] * 3


def test_monitoring_off_takes_none() -> None:
    """enable_monitoring=False leaves the counters, and no share."""
    model = wide_mlp()
    run = Run(model, torch.optim.AdamW(model.parameters(), lr=1e-5), enable_monitoring=False)
    run.step()
    run.step()
    assert run.fractions() == [None, None]


class Operators(TorchDispatchMode):
    """Counts the operators of a block, and the elements that the largest operand of each has."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.read = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        moves = not any(view in str(func) for view in ("view", "slice", "detach")) and "index" not in str(func)
        sizes = [a.numel() for a in args if isinstance(a, Tensor)] if moves else []
        self.read += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


def operators_of_step(run: Run) -> Operators:
    run.backward()
    with Operators() as operators:
        run.scaler.step(run.optimizer)
        run.scaler.update()
    return operators


def test_steps_between_two_looks_cost_nothing() -> None:
    """At interval 100 the first two steps look, the third tells, the fourth runs the operators of no monitoring."""
    runs = []
    for monitoring in (True, False):
        model = wide_mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        run = Run(model, optimizer, monitoring_interval=100, enable_monitoring=monitoring)
        runs.append([operators_of_step(run).calls for _ in range(4)])
    looking, blind = runs
    assert looking[0] != blind[0]
    assert looking[1] != blind[1]
    assert looking[3] == blind[3]


def test_a_look_reads_a_sample_only() -> None:
    """A step that looks reads at most 2048 elements a tensor more than one that does not."""
    model = wide_mlp()
    reads = []
    for monitoring in (True, False):
        run = Run(model, torch.optim.SGD(model.parameters(), lr=1e-3), enable_monitoring=monitoring)
        reads.append(operators_of_step(run).read)
    sampled = sum(min(p.numel(), 1024) for p in model.parameters())
    assert reads[0] - reads[1] <= 24 * sampled  # every sample goes through some operators
    assert sampled * 4 < sum(p.numel() for p in model.parameters()) * 1.5


@pytest.mark.parametrize("interval", [1, 100])
def test_no_host_read_is_added(interval: int) -> None:
    """Looking or not, a step reads the host once."""
    model = wide_mlp()
    run = Run(model, torch.optim.SGD(model.parameters(), lr=1e-3), monitoring_interval=interval)
    for _ in range(4):
        run.backward()
        with count_host_reads() as reads:
            run.scaler.step(run.optimizer)
            run.scaler.update()
        assert reads.count == 1
