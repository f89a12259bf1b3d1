"""What a step asks of a CUDA device, counted on tensors that stand for GPT-2's 148 of 124 million elements, beside the stock scaler."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig, ScalingStrategy, statistics
from hf_amp.fallback.diagnosis import non_finite_names
from hf_amp.scaling import stochastic_rounding
from hf_amp.scaling.policies import DynamicScale, DynamicState, Observation
from hf_amp.scaling.stochastic_rounding import RoundingNoise
from tests.device_work import CUDA, DeviceWork, OnDevice, count_device_work, multi_tensor_launches, pretended_device

SIZE_FACTOR = 64
"""Every dimension of GPT-2 is as many times that of the tensors here."""
LAYER = [(12,), (12,), (12, 36), (36,), (12, 12), (12,), (12,), (12,), (12, 48), (48,), (48, 12), (12,)]
SHAPES = [(786, 12), (16, 12), *LAYER * 12, (12,), (12,)]
STEPS = {"between": 2, "sampled": 3, "skipped": 4}
"""The first, of which nothing is counted, makes the optimizer's state; every third is sampled."""


@dataclass(frozen=True)
class Counted:
    launches: int
    passes: float
    waits: int
    to_device: int


def counted(work: DeviceWork, gradients: list[Tensor]) -> Counted:
    return Counted(sum(work.launches.values()), work.passes(gradients), len(work.waits), len(work.to_device))


def clip_as_trainer(
    scaler: AdvancedGradScaler, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]
) -> None:
    scaler.clip_grad_norm_(optimizer, 1.0)


def clip_in_raw_loop(
    scaler: AdvancedGradScaler, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]
) -> None:
    """What `accelerator.clip_grad_norm_` comes to."""
    scaler.clip_grad_norm_(optimizer, 1.0, in_place=True)


def clip_by_torch(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]
) -> None:
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)


def steps_of(
    scaler: torch.amp.GradScaler, clip: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Counted], list[nn.Parameter]]:
    """Five steps of fused AdamW, the last of them skipped; and the parameters."""
    share = sum(math.prod(shape) for shape in SHAPES) / sum(
        math.prod(s * SIZE_FACTOR for s in shape) for shape in SHAPES
    )
    for name in ("SAMPLES", "ELEMENTS_COUNTED_AT_ONCE", "_FEWEST"):
        monkeypatch.setattr(statistics, name, max(1, int(getattr(statistics, name) * share)))
    torch.manual_seed(0)
    parameters = [nn.Parameter(OnDevice(torch.randn(shape))) for shape in SHAPES]
    optimizer, works = torch.optim.AdamW(parameters, lr=1e-3, fused=True), []
    for step in range(5):
        factor = math.nan if step == STEPS["skipped"] else 100.0
        for parameter in parameters:
            parameter.grad = OnDevice(torch.randn(parameter.shape) * factor)
        loss = OnDevice(torch.tensor(2.0))
        with count_device_work(SIZE_FACTOR) as work:
            scaler.scale(loss)
            clip(scaler, optimizer, parameters)
            scaler.step(optimizer)
            scaler.update()
        works.append(counted(work, [p.grad for p in parameters]))
    return {name: works[step] for name, step in STEPS.items()}, parameters


@pytest.fixture(scope="module")
def stock() -> dict[str, Counted]:
    with pretended_device(), pytest.MonkeyPatch.context() as patch:
        return steps_of(torch.amp.GradScaler("cpu"), clip_by_torch, patch)[0]


def ours(strategy: ScalingStrategy, precision_mode: str | None = None) -> AdvancedGradScaler:
    options = {"scaling_strategy": strategy, "precision_mode": precision_mode, "monitoring_interval": 3}
    return AdvancedGradScaler(MixedPrecisionConfig(**options), "cpu")


@pytest.mark.parametrize("strategy", list(ScalingStrategy))
@pytest.mark.parametrize("clip", [clip_as_trainer, clip_in_raw_loop])
def test_a_step_launches_no_more_than_stock(
    strategy: ScalingStrategy, clip: Callable[..., None], stock: dict[str, Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches, passes over the gradients, waits, and copies from the host. ADAPTIVE's extremes cost a pass where the gradients are
    divided in place, which takes it 4 launches beyond stock's 49, and an 11th pass: AdamW moves 7, the product with the clip 2, and
    norm and amax read 1 each, for PyTorch has no kernel over many tensors that gives both."""
    with pretended_device():
        scaler = ours(strategy)
        seen, parameters = steps_of(scaler, clip, monkeypatch)
        scaler.flush()
        with count_device_work(SIZE_FACTOR) as naming:
            assert len(non_finite_names((str(i), p) for i, p in enumerate(parameters))) == 0
    adaptive_in_place = (
        strategy in (ScalingStrategy.ADAPTIVE, ScalingStrategy.PERFORMANCE_OPTIMIZED) and clip is clip_in_raw_loop
    )
    assert stock["between"].launches == 49
    assert seen["between"].launches <= (53 if adaptive_in_place else 47)
    assert seen["sampled"].launches <= 73
    assert seen["between"].passes <= (11.1 if adaptive_in_place else 10.1) < stock["between"].passes
    assert {counted.to_device for counted in seen.values()} == {0}
    assert (scaler.applied_steps, scaler.skipped_steps) == (4, 1)
    is_late = strategy.defers
    assert (seen["between"].waits, seen["sampled"].waits) == ((0, 0) if is_late else (1, 1))
    assert seen["skipped"].waits <= 2
    assert seen["skipped"].launches - seen["between"].launches + sum(naming.launches.values()) <= 60


def test_the_guard_launches_no_more_than_stock(stock: dict[str, Counted], monkeypatch: pytest.MonkeyPatch) -> None:
    """BF16: the norm of the check is that of the clip."""
    with pretended_device():
        seen, _ = steps_of(ours(ScalingStrategy.DYNAMIC, "BF16"), clip_in_raw_loop, monkeypatch)
    assert seen["between"].launches <= 39 < stock["between"].launches
    assert seen["between"].passes <= 10.1
    assert (seen["between"].waits, seen["between"].to_device) == (1, 0)


@pytest.mark.parametrize("strategy", list(ScalingStrategy))
def test_a_loop_that_clips_by_torch_costs_another_norm(
    strategy: ScalingStrategy, stock: dict[str, Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`unscale_` and torch's clip, which takes a norm of its own: one read of ours is all that it costs beyond stock.

    The least: what is finite may overflow where it is divided by a scale below 1, and gradients may all be 0, and the kernel that
    divides tells of neither. Where `scaler.clip_grad_norm_` clips, its norm does.
    """
    with pretended_device():
        seen, _ = steps_of(ours(strategy), clip_by_torch, monkeypatch)
    assert seen["between"].launches - stock["between"].launches <= 13 + strategy.defers
    assert seen["between"].passes - stock["between"].passes <= 1.1


@pytest.mark.parametrize("strategy", [ScalingStrategy.CONSTANT, ScalingStrategy.DYNAMIC, ScalingStrategy.ADAPTIVE])
def test_the_host_goes_on_while_a_fused_optimizer_runs(strategy: ScalingStrategy) -> None:
    """What it waits for is queued before the optimizer, which is launched before it waits, and skips by itself. After an applied
    step nothing is launched any more: the next is the user's forward pass."""
    with pretended_device():
        weight = nn.Parameter(OnDevice(torch.ones(4)))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        scaler = ours(strategy)
        for value in (1.0, math.inf, 1.0):
            weight.grad = OnDevice(torch.full((4,), value))
            scaler.scale(OnDevice(torch.tensor(1.0)))
            before = weight.on_cpu.clone()
            with count_device_work() as work:
                scaler.step(optimizer)
                scaler.update()
            order = work.order[work.order.index("event") :]
            assert order[0] == "event"
            assert "_fused_adamw_" in order[: order.index("wait")]
            assert value == math.inf or order[-1] == "wait"
            assert torch.equal(weight.on_cpu, before) == (value == math.inf)
        assert optimizer.state[weight]["step"].on_cpu.item() == 2
        assert (scaler.applied_steps, scaler.skipped_steps) == (2, 1)


@pytest.mark.parametrize(("remedy", "most"), [(None, 28), ("stochastic_rounding", 171), ("kahan", 209)])
def test_half_parameters_launch_some_kernels_a_block(
    remedy: str | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 blocks of 2^24 BF16 elements, as a GPU's are: 21 launches each beside plain BF16's 28, with kahan 26; and one wait as before."""
    monkeypatch.setattr(stochastic_rounding, "_TOGETHER_ELSEWHERE", 2**24 // SIZE_FACTOR**2)
    inner = stochastic_rounding._is_like  # takes tensors of PyTorch's own class only
    monkeypatch.setattr(stochastic_rounding, "_is_like", lambda p, x, dtypes: inner(p, getattr(x, "on_cpu", x), dtypes))
    generators = {CUDA: torch.Generator()}  # PyTorch for CPUs makes none for CUDA
    monkeypatch.setattr(
        RoundingNoise, "__init__", lambda self, seed: vars(self).update(_seed=seed, _generators=generators)
    )
    with pretended_device():
        parameters = [nn.Parameter(OnDevice(torch.randn(shape).bfloat16())) for shape in SHAPES]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        scaler = AdvancedGradScaler(
            MixedPrecisionConfig(precision_mode="BF16", half_parameters=remedy, enable_monitoring=False), "cpu"
        )
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = OnDevice(torch.randn(parameter.shape).bfloat16())
            with count_device_work(SIZE_FACTOR) as work:
                scaler.step(optimizer)
                scaler.update()
    assert sum(work.launches.values()) <= most
    assert (len(work.waits), len(work.to_device)) == (1, 0)


@dataclass(frozen=True)
class NotedPolicy(DynamicScale):
    """Notes among what is asked of the device when it is asked for the next scale."""

    order: ClassVar[list[str]]

    def next_state(self, state: DynamicState, observation: Observation) -> DynamicState:
        self.order.append("policy")
        return super().next_state(state, observation)


@pytest.mark.parametrize("value", [1.0, math.inf])
def test_what_an_applied_step_leads_to_is_known_before_the_wait(value: float) -> None:
    """A policy that needs neither amax nor underflow is asked while the host would wait anyhow, and again only after a skip."""
    with pretended_device():
        weight = nn.Parameter(OnDevice(torch.ones(4)))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        policy = NotedPolicy(65536.0, 2.0, 0.5, 1, 1, 1.0, 2.0**24)
        scaler = AdvancedGradScaler(MixedPrecisionConfig(), "cpu", policy=policy)
        for step in range(3):
            weight.grad = OnDevice(torch.full((4,), value if step == 2 else 1.0))
            scaler.scale(OnDevice(torch.tensor(1.0)))
            with count_device_work() as work:
                NotedPolicy.order = work.order
                scaler.step(optimizer)
                scaler.update()
    order = [name for name in work.order if name in ("policy", "wait")]
    assert order[:2] == ["policy", "wait"]
    assert (order[-1] == "policy") == (value == math.inf)
    assert scaler.get_scale() == 65536.0 * (8 if value == 1.0 else 2)


def clip_nothing(*_: object) -> None:
    """A loop without a clip."""


@pytest.mark.parametrize("strategy", list(ScalingStrategy))
def test_a_loop_without_a_clip_reads_the_gradients_once(
    strategy: ScalingStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between samples: for the norm, or where a strategy asks for it the amax, and then as the optimizer does (8). Stock: 2 and 7."""
    with pretended_device(), pytest.MonkeyPatch.context() as patch:
        stock, _ = steps_of(torch.amp.GradScaler("cpu"), clip_nothing, patch)
    with pretended_device():
        seen, _ = steps_of(ours(strategy), clip_nothing, monkeypatch)
    assert seen["between"].passes <= 9.1
    assert seen["between"].passes <= stock["between"].passes + 0.1
    assert seen["between"].launches <= stock["between"].launches + 7


# ---- the counting itself --------------------------------------------------------------------------------------


def test_the_rule_is_a_hand_count() -> None:
    """Three tensors through a norm, a clip and an optimizer, each counted by hand from PyTorch's CUDA sources."""
    with pretended_device():
        weights = [nn.Parameter(OnDevice(torch.ones(100_000))) for _ in range(3)]
        optimizer = torch.optim.SGD(weights, lr=0.1, fused=True)
        for weight in weights:
            weight.grad = OnDevice(torch.ones(100_000))
        with count_device_work() as work:
            norms = torch._foreach_norm([w.grad for w in weights])  # zeros, one kernel, one that adds up its blocks
            total = torch.linalg.vector_norm(torch.stack(norms))  # a cat, a norm
            torch._foreach_mul_([w.grad for w in weights], 1 / total)  # a reciprocal, a product, one kernel
            optimizer.step()  # one kernel
            assert total.item() == pytest.approx(math.sqrt(300_000))
            total.to("cpu", non_blocking=True)
            torch.zeros((), device="cuda")
    expected = {"_foreach_norm": 3, "stack": 1, "linalg_vector_norm": 1, "reciprocal": 1, "mul": 1, "_foreach_mul_": 1}
    assert dict(work.launches) == expected | {"_fused_sgd_": 1, "zeros": 1}
    assert (len(work.waits), len(work.to_host), len(work.to_device)) == (1, 1, 0)
    read, multiplied, moved = 1, 2, 3
    assert work.passes([w.grad for w in weights]) == pytest.approx(read + multiplied + moved, abs=1e-3)


def test_lists_are_cut_where_a_kernel_is_full() -> None:
    """110 tensors of one list, 36 of four, or 320 blocks of 65,536 elements."""
    small, large = [torch.empty(8)] * 148, [torch.empty(2**16 * 200, device="meta")] * 2
    assert multi_tensor_launches(small, 1, 1) == 2
    assert multi_tensor_launches(small, 4, 1) == 5
    assert multi_tensor_launches(large, 1, 1) == 2
    assert multi_tensor_launches([torch.empty(16, 16)], 1, 2**10) == 2**20 * 256 // 65536 // 320 + 1
