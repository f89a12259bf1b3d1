"""Half-precision parameters with FP32 master weights: bit for bit a loop that keeps the copies by hand."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig, ScalerError
from hf_amp.scaling.master_weights import STATE_KEY
from tests.each import for_each
from tests.reference import OverflowInBackward, assert_bitwise_equal, snapshot, tiny_mlp

MAX_NORM = 0.05
OVERFLOWS = {3, 11}

Maker = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Maker] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw for-loop": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def half_mlp(dtype: torch.dtype = torch.float16) -> nn.Module:
    return tiny_mlp().to(dtype)


def micro_losses(model: nn.Module, steps: int, accumulation: int = 1) -> Iterator[list[Tensor]]:
    """The losses of every step's micro-batches, FP32; where the step is to overflow the last one's gradient is inf."""
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        window = []
        for micro in range(accumulation):
            x = torch.randn(5, 4, generator=generator).to(dtype)
            loss = model(x).float().square().mean() / accumulation
            last = micro == accumulation - 1
            window.append(OverflowInBackward.apply(loss) if last and step in OVERFLOWS else loss)
        yield window


def reference_run(
    make: Maker, max_norm: float | None = None, accumulation: int = 1, steps: int = 20, dtype: Any = torch.float16
) -> tuple[list[Tensor], list[float]]:
    """Explicit copies and the plain rules: scale, backward, FP32 gradients over the scale, skip or step, round."""
    model = half_mlp(dtype)
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    optimizer, scale, norms = make(masters), 1024.0, []
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for window in micro_losses(model, steps, accumulation):
        for p in model.parameters():
            p.grad = None
        for loss in window:
            (loss * scale).backward()
        for p, master in zip(model.parameters(), masters, strict=True):
            master.grad = p.grad.float() / scale
        if not all(master.grad.isfinite().all() for master in masters):
            scale /= 2
            continue
        if max_norm is not None:
            norms.append(nn.utils.clip_grad_norm_(masters, max_norm).item())
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters, strict=True):
                p.copy_(master)
    held = nn.ParameterList(masters)
    return [p.detach().clone() for p in model.parameters()] + snapshot(held, optimizer), norms


class Run:
    """The same with hf_amp."""

    def __init__(self, make: Maker, dtype: torch.dtype = torch.float16, **options: Any) -> None:
        options = {"precision_mode": "FP16", "init_scale": 1024.0, **options}
        self.scaler = AdvancedGradScaler(MixedPrecisionConfig(**options), "cpu")
        self.model = half_mlp(dtype)
        self.optimizer = make(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.norms: list[float] = []

    def step(self, window: list[Tensor], clip: str = "none", set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)
        for loss in window:
            self.scaler.scale(loss).backward()
        norm = None
        if clip == "unscale":
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        elif clip == "fold":
            norm = self.scaler.clip_grad_norm_(self.optimizer, MAX_NORM)
        skipped = self.scaler.skipped_steps
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scaler.flush()
        if self.scaler.skipped_steps == skipped:
            self.schedule.step()
            if norm is not None:
                self.norms.append(norm.item())

    def state(self) -> list[Tensor]:
        """Parameters, masters, optimizer state."""
        masters = list(self.optimizer.state_dict()[STATE_KEY].values())
        parameters = [p.detach().clone() for p in self.model.parameters()]
        return parameters + masters + snapshot(self.model, self.optimizer)[len(parameters) :]


# ---- equality ---------------------------------------------------------------------------------------------------


def test_stock_scaler_refuses_fp16_parameters() -> None:
    """The failure to be cured (FIELD.md 12): torch's scaler cannot unscale them, and neither can ours unasked."""
    model = half_mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    stock = torch.amp.GradScaler("cpu")
    stock.scale(model(torch.ones(1, 4).half()).float().sum()).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        stock.unscale_(optimizer)
    ours = AdvancedGradScaler(device="cpu")
    ours.scale(model(torch.ones(1, 4).half()).float().sum()).backward()
    with pytest.raises(ScalerError, match="half_parameters='master_weights'"):
        ours.unscale_(optimizer)


@for_each("accumulation", [1, 3])
@for_each("name", OPTIMIZERS)
def test_run_is_the_reference_bit_for_bit(name: str, accumulation: int) -> None:
    """Parameters, masters and optimizer state after 20 steps, two of which overflow, with and without accumulation."""
    run = Run(OPTIMIZERS[name])
    for window in micro_losses(run.model, 20, accumulation):
        run.step(window)
    reference, _ = reference_run(OPTIMIZERS[name], accumulation=accumulation)
    assert run.scaler.skipped_steps == len(OVERFLOWS)
    assert_bitwise_equal(run.state(), reference)


@for_each("set_to_none", [True, False])
@for_each("name", ["adamw", "adamw fused", "sgd"])
def test_clipping_after_unscale_is_the_references(name: str, set_to_none: bool) -> None:
    """`unscale_` and torch's own clip: the norm is that of the unscaled FP32 gradients, and the masters get the clip."""
    run = Run(OPTIMIZERS[name])
    for window in micro_losses(run.model, 20, 2):
        run.step(window, "unscale", set_to_none)
    reference, norms = reference_run(OPTIMIZERS[name], MAX_NORM, 2)
    assert run.norms == norms
    assert_bitwise_equal(run.state(), reference)


@pytest.mark.parametrize("strategy", ["DYNAMIC", "PERFORMANCE_OPTIMIZED"])
def test_folded_clipping_is_the_references(strategy: str) -> None:
    """A folded clip of a fused optimizer on masters agrees to FP32's precision, also where the device decides."""
    make = OPTIMIZERS["adamw fused"]
    run = Run(make, scaling_strategy=strategy)
    for window in micro_losses(run.model, 20):
        run.step(window, "fold")
    reference, norms = reference_run(make, MAX_NORM)
    assert run.norms == pytest.approx(norms, rel=1e-5)
    count = len(list(run.model.parameters()))
    for ours, theirs in zip(run.state()[count:], reference[count:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-8)


def test_gradients_that_fp16_cannot_hold_unscaled_arrive() -> None:
    """An unscaled gradient of 1e-9 is 0 in FP16; the master moves by it, which is what scaling is for."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = AdvancedGradScaler(MixedPrecisionConfig(precision_mode="FP16", init_scale=2.0**16), "cpu")
    scaler.scale((weight.float() * 1e-9).sum()).backward()
    scaler.unscale_(optimizer)
    assert weight.grad.dtype == torch.float32
    assert weight.grad.item() == pytest.approx(1e-9, rel=1e-3)
    scaler.step(optimizer)
    assert optimizer.state_dict()[STATE_KEY][0].item() == pytest.approx(-1e-9, rel=1e-3)


def test_small_updates_add_up() -> None:
    """A thousand updates of 1e-5 move a weight of 1; without masters FP16 loses every one of them."""
    ends = []
    for masters in (True, False):
        weight = nn.Parameter(torch.ones(1, dtype=torch.float16))
        optimizer = torch.optim.SGD([weight], lr=1e-5)
        options = {"half_parameters": "master_weights"} if masters else {}
        scaler = AdvancedGradScaler(MixedPrecisionConfig(precision_mode="FP32", **options), "cpu")
        for _ in range(1000):
            optimizer.zero_grad()
            weight.sum().backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append(weight.item())
    assert ends == [pytest.approx(0.99, abs=5e-4), 1.0]


def test_bf16_parameters_under_a_guard_are_the_reference() -> None:
    """half_parameters="master_weights" in a BF16 run: nothing is scaled, and masters move as with copies by hand."""
    run = Run(OPTIMIZERS["adamw"], torch.bfloat16, precision_mode="BF16", half_parameters="master_weights")
    for window in micro_losses(run.model, 20):
        run.step(window, "unscale")
    reference, norms = reference_run(OPTIMIZERS["adamw"], MAX_NORM, dtype=torch.bfloat16)
    assert run.norms == pytest.approx(norms, rel=1e-5)
    for ours, theirs in zip(run.state(), reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-7)


# ---- what others see --------------------------------------------------------------------------------------------


def test_optimizer_looks_as_before() -> None:
    """After steps `param_groups` and `state` hold the model's own parameters; gradients are used up; hooks see masters."""
    run = Run(OPTIMIZERS["adamw"])
    seen = []
    run.optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["params"][0].dtype))
    groups = run.optimizer.param_groups[0]["params"]
    for window in micro_losses(run.model, 5):
        run.step(window)
    parameters = list(run.model.parameters())
    assert run.optimizer.param_groups[0]["params"] is groups
    assert all(held is p for held, p in zip(groups, parameters, strict=True))
    assert list(run.optimizer.state) == parameters
    assert {p.dtype for p in parameters} == {torch.float16}
    assert [p.grad for p in parameters] == [None] * len(parameters)
    run.model.float()(torch.ones(1, 4)).sum().backward()
    assert {p.grad.dtype for p in parameters} == {torch.float32}
    assert set(seen) == {torch.float32}


def test_skipped_step_leaves_gradients_to_look_at() -> None:
    """After a skip the gradients are there, in the parameters' dtype, with what was not finite."""
    run = Run(OPTIMIZERS["sgd"])
    for _, window in zip(range(max(OVERFLOWS)), micro_losses(run.model, min(OVERFLOWS) + 1), strict=False):
        run.step(window, "unscale")
    assert run.scaler.skipped_steps == 1
    assert {p.grad.dtype for p in run.model.parameters()} == {torch.float16}
    assert not all(p.grad.isfinite().all() for p in run.model.parameters())


def test_parameters_without_gradients_and_fp32_ones_are_left_alone() -> None:
    """Beside FP16 parameters, FP32 ones move as ever; one without a gradient moves in neither form."""
    half, wide, idle = (nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.float16, torch.float32, torch.float16))
    optimizer = torch.optim.AdamW([half, wide, idle], lr=0.5, weight_decay=0.0)
    scaler = AdvancedGradScaler(MixedPrecisionConfig(precision_mode="FP16", init_scale=1024.0), "cpu")
    scaler.scale(half.float().sum() + wide.sum()).backward()
    scaler.step(optimizer)
    assert [p.tolist() for p in (half, wide, idle)] == [[0.5, 0.5], pytest.approx([0.5, 0.5]), [1.0, 1.0]]
    assert set(optimizer.state_dict()[STATE_KEY]) == {0}


def test_sparse_gradients() -> None:
    """A sparse embedding gradient moves the rows that it names."""
    table = nn.Embedding(4, 2, sparse=True, dtype=torch.float16)
    before = table.weight.detach().clone()
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    scaler = AdvancedGradScaler(MixedPrecisionConfig(precision_mode="FP16", init_scale=1024.0), "cpu")
    scaler.scale(table(torch.tensor([1, 1, 3])).float().sum()).backward()
    scaler.step(optimizer)
    moved = [(before[row].float() - table.weight[row].float()).tolist() for row in range(4)]
    assert moved[0] == moved[2] == [0.0, 0.0]
    assert moved[1] == pytest.approx([2.0, 2.0], abs=2e-3)
    assert moved[3] == pytest.approx([1.0, 1.0], abs=2e-3)


def test_optimizer_that_raises_leaves_everything_in_place() -> None:
    """An exception in the step: the groups hold the parameters again, and the next step is a step."""
    run = Run(OPTIMIZERS["sgd"])
    windows = micro_losses(run.model, 2)

    def fail(*_: Any) -> None:
        raise MemoryError

    handle = run.optimizer.register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        run.step(next(windows))
    handle.remove()
    assert all(a is b for a, b in zip(run.optimizer.param_groups[0]["params"], run.model.parameters(), strict=True))
    run.scaler.update()
    before = snapshot(run.model, run.optimizer)
    run.step(next(windows))
    assert not torch.equal(before[0], next(run.model.parameters()))


# ---- somebody writes to the parameters --------------------------------------------------------------------------


@for_each("write", ["clamp", "load_state_dict", "data"])
def test_written_parameters_become_the_masters(write: str) -> None:
    """What was written is where the next step starts; what was not keeps the master's unrounded value."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float16))
    holder = nn.ParameterList([weight])
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    scaler = AdvancedGradScaler(MixedPrecisionConfig(precision_mode="FP16", init_scale=1024.0), "cpu")

    def step() -> None:
        optimizer.zero_grad()
        scaler.scale(weight.float().sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    step()
    target = torch.tensor([1.0, 1.5], dtype=torch.float16)
    if write == "clamp":
        with torch.no_grad():
            weight.clamp_(max=1.5)
    elif write == "load_state_dict":
        holder.load_state_dict({"0": target})
    else:
        weight.data = target
    step()
    masters = optimizer.state_dict()[STATE_KEY][0]
    assert masters.tolist() == pytest.approx([1 - 2e-4, 1.5 - 1e-4], rel=1e-7)


# ---- checkpoints ------------------------------------------------------------------------------------------------


@for_each("order", list(itertools.permutations(["model", "optimizer", "scaler"])))
@for_each("name", ["adamw", "adamw fused", "sgd momentum"])
def test_resume_is_exact(name: str, order: tuple[str, ...]) -> None:
    """Ten steps, saved to bytes and loaded in any order, and ten more equal twenty; weights_only reads the file."""
    whole = Run(OPTIMIZERS[name])
    for window in micro_losses(whole.model, 20):
        whole.step(window)
    first = Run(OPTIMIZERS[name])
    windows = micro_losses(first.model, 20)
    for _ in range(10):
        first.step(next(windows))
    file = io.BytesIO()
    parts = ("model", "optimizer", "scaler", "schedule")
    torch.save({part: getattr(first, part).state_dict() for part in parts}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Run(OPTIMIZERS[name])
    resumed.scaler.keep_master_weights(resumed.optimizer)
    for part in (*order, "schedule"):
        getattr(resumed, part).load_state_dict(saved[part])
    for step, window in enumerate(micro_losses(resumed.model, 20)):
        if step >= 10:
            resumed.step(window)
    assert_bitwise_equal(resumed.state(), whole.state())


def test_checkpoint_loads_without_hf_amp() -> None:
    """An optimizer that knows nothing of masters loads the file and steps; masters are left unread."""
    run = Run(OPTIMIZERS["adamw"])
    for window in micro_losses(run.model, 3):
        run.step(window)
    model = copy.deepcopy(run.model).float()
    stock = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stock.load_state_dict(run.optimizer.state_dict())
    model(torch.ones(1, 4)).sum().backward()
    stock.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_loading_before_the_scaler_knows_the_optimizer_is_a_clear_error() -> None:
    """torch rounds loaded state to FP16; the first step says so, and which call prevents it."""
    run = Run(OPTIMIZERS["adamw"])
    for window in micro_losses(run.model, 3):
        run.step(window)
    late = Run(OPTIMIZERS["adamw"])
    late.optimizer.load_state_dict(run.optimizer.state_dict())
    with pytest.raises(ScalerError, match=r"keep_master_weights\(optimizer\) before optimizer.load_state_dict"):
        late.step(next(micro_losses(late.model, 1)))


def test_nothing_is_kept_alive() -> None:
    """A scaler with masters lets model and optimizer go."""
    run = Run(OPTIMIZERS["adamw"])
    for window in micro_losses(run.model, 2):
        run.step(window)
    references = [weakref.ref(run.model), weakref.ref(run.optimizer), weakref.ref(next(run.model.parameters()))]
    scaler = run.scaler
    del run, window
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    assert scaler.applied_steps == 2
