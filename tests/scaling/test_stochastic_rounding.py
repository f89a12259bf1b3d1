"""Half-precision parameters whose updates are not lost: rounded stochastically, or with their rounding error kept."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_amp import AdvancedGradScaler, MixedPrecisionConfig
from hf_amp.precision import BF16_FORMAT, FP16_FORMAT, NumberFormat
from hf_amp.scaling import stochastic_rounding
from hf_amp.scaling.stochastic_rounding import COMPENSATION, RoundedWeights, RoundingNoise
from tests.each import for_each
from tests.host_reads import count_host_reads
from tests.reference import OverflowInBackward

BF16, FP16 = torch.bfloat16, torch.float16
REMEDIES = ("stochastic_rounding", "kahan")
ROUNDINGS = 10_000


# ---- rounding ---------------------------------------------------------------------------------------------------


def rounded(values: Tensor, number_format: NumberFormat, seed: int = 0) -> Tensor:
    """`values`, shape [n], float32, rounded stochastically, in float64."""
    noisy = values.clone()
    RoundingNoise(seed).add_(noisy, number_format)
    return noisy.to(number_format.dtype).double()


def neighbours(value: float, number_format: NumberFormat) -> tuple[float, float]:
    """The nearest values that the format holds on both sides, by halving intervals of its bit patterns."""
    held = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(number_format.dtype).double()
    held = held[held.isfinite()].unique()
    above = int(torch.searchsorted(held, torch.tensor(value, dtype=torch.float64)))
    return held[above - 1].item(), held[above].item()


def values_between(number_format: NumberFormat) -> list[float]:
    """Values of many magnitudes that the format does not hold, as FP32 has them."""
    smallest, tiny, largest = number_format.smallest_normal, number_format.smallest_subnormal, number_format.largest
    below_largest = largest * (1 - 0.3 * torch.finfo(number_format.dtype).eps)
    small = [0.3 * tiny, 0.01 * tiny, 1.7 * tiny, 4.9 * tiny, 0.77 * smallest, 0.9999 * smallest, 1.003 * smallest]
    chosen = [1.0001, 0.9999, 0.0202, math.pi, 300.1, 1e4 + 0.7, below_largest, *small]
    return [float(torch.tensor(sign * x, dtype=torch.float32)) for x in chosen for sign in (1, -1)]


@pytest.mark.parametrize("number_format", [BF16_FORMAT, FP16_FORMAT], ids=lambda f: f.name)
def test_rounding_is_unbiased(number_format: NumberFormat) -> None:
    """The mean of 10,000 roundings is the value, within 4.5 standard errors, from subnormal to largest; only neighbours occur.

    In one call, whose numbers are pairwise independent, and in one element of 400 calls.
    """
    for value in values_between(number_format):
        low, high = neighbours(value, number_format)
        share = (value - low) / (high - low)
        for got in (
            rounded(torch.full((ROUNDINGS,), value), number_format),
            torch.stack([rounded(torch.full((3,), value), number_format, seed)[1] for seed in range(400)]),
        ):
            assert set(got.tolist()) <= {low, high}
            error = (high - low) * (math.sqrt(share * (1 - share) / len(got)) + 2**-12 / math.sqrt(len(got)))
            assert abs(got.mean().item() - value) <= 4.5 * error, value


@pytest.mark.parametrize("number_format", [BF16_FORMAT, FP16_FORMAT], ids=lambda f: f.name)
def test_what_the_format_holds_stays(number_format: NumberFormat) -> None:
    """Every value of the format, zeros, subnormals and the largest among them, is rounded to itself."""
    held = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(number_format.dtype)
    held = held[held.isfinite()]
    for part in (held[held.abs() < 1e15], held[-2:], held):
        for seed in range(3):
            assert torch.equal(rounded(part.float(), number_format, seed), part.double())


@pytest.mark.parametrize("number_format", [BF16_FORMAT, FP16_FORMAT], ids=lambda f: f.name)
def test_rounding_makes_no_inf_and_hides_none(number_format: NumberFormat) -> None:
    """Values up to half a step above the largest stay finite; inf and every kind of NaN stay what they are."""
    largest = number_format.largest
    step = largest - float(neighbours(largest, number_format)[0])
    near = torch.tensor([largest, largest + 0.49 * step, -largest, largest - 0.3 * step], dtype=torch.float64).float()
    for seed in range(50):
        assert rounded(near, number_format, seed).isfinite().all()
    patterns = torch.tensor(
        [0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000, -0x800000], dtype=torch.int32
    )  # CUDA's NaN is the first
    for seed in range(50):
        got = rounded(torch.cat([patterns.view(torch.float32), torch.ones(3)]), number_format, seed)
        assert got[:3].isnan().all()
        assert got[3:5].isinf().all()
        assert torch.equal(got[5:], torch.ones(3, dtype=torch.float64))


def test_errors_of_different_elements_do_not_add_up() -> None:
    """The sum of rounding errors over a matrix is that of independent ones: rows and columns included."""
    value, seeds = 1.0 + 2**-9, 300
    sums = {"all": [], "a row": [], "a column": []}
    for seed in range(seeds):
        error = rounded(torch.full((64 * 1024,), value), BF16_FORMAT, seed).view(64, 1024) - value
        for name, part in (("all", error), ("a row", error[3]), ("a column", error[:, 5])):
            sums[name].append(part.sum().item() / math.sqrt(part.numel()))
    one = 2**-7 * math.sqrt(0.25 * 0.75)
    for name, found in sums.items():
        deviation = torch.tensor(found).std().item() / one
        assert 0.85 < deviation < 1.15, name


def test_rows_share_random_numbers() -> None:
    """Rows of a matrix are rounded as the first would be alone: an average as its parameter; the elements of a row are not."""
    value = torch.full((3, 5000), 1.0 + 2**-9)
    value[1] *= 2.0**-20
    RoundingNoise(0).add_(value, BF16_FORMAT)
    alone = torch.full((5000,), 1.0 + 2**-9)
    RoundingNoise(0).add_(alone, BF16_FORMAT)
    assert torch.equal(value[0], alone)
    assert torch.equal(value[2], alone)
    assert torch.equal(value[1], alone * 2.0**-20)
    assert len(alone.unique()) == 2


@for_each("name", ["adamw", "adafactor", "amsgrad"])
def test_elements_of_a_kind_do_not_share_random_numbers(name: str) -> None:
    """Two elements of the parameters, or of the averages of the same name, are never in one column of what is rounded together."""
    run = Run(OPTIMIZERS[name], "stochastic_rounding")
    run.step()
    parameters = list(run.model.parameters())
    block = stochastic_rounding._Block(run.optimizer, parameters, False)
    elements = sum(p.numel() for p in parameters)
    columns: dict[str, list[int]] = {}
    for place in block._places:
        start = place.values.storage_offset()
        columns.setdefault(place.name, []).extend(i % elements for i in range(start, start + place.values.numel()))
    block.narrow(RoundingNoise(0))
    assert all(len(set(found)) == len(found) for found in columns.values())
    assert len(columns) == {"adamw": 3, "adafactor": 2, "amsgrad": 4}[name]


# ---- around any optimizer ---------------------------------------------------------------------------------------


class Lion(torch.optim.Optimizer):
    """Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023)."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                update = average.lerp(p.grad, 1 - group["betas"][0]).sign()
                p.data = p.data - group["lr"] * update  # not in place, as some do
                self.state[p]["exp_avg"] = average.lerp(p.grad, 1 - group["betas"][1])


Maker = Callable[[Any], torch.optim.Optimizer]
LR = 2e-4
OPTIMIZERS: dict[str, Maker] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=LR, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=LR, foreach=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=LR, amsgrad=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=10 * LR, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=LR),
    "lion": lambda p: Lion(p, lr=LR),
    "muon": lambda p: torch.optim.Muon([x for x in p if x.dim() == 2], lr=LR),
}


class Run:
    """Steps of a small model on fixed data."""

    def __init__(self, make: Maker, remedy: str | None, dtype: torch.dtype = BF16, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48), nn.Tanh(), nn.Linear(48, 64)).to(dtype)
        mode = "BF16" if dtype is not FP16 else "MIXED"
        options = {"precision_mode": mode, "half_parameters": remedy, "init_scale": 1024.0, **options}
        self.scaler = AdvancedGradScaler(MixedPrecisionConfig(**options), "cpu")
        self.optimizer = make(list(self.model.parameters()))
        self.steps = 0

    def step(self, overflow: bool = False) -> None:
        generator = torch.Generator().manual_seed(self.steps % 7)
        self.steps += 1
        x = torch.randn(16, 32, generator=generator).to(next(self.model.parameters()).dtype)
        y = torch.randn(16, 64, generator=generator)
        loss = (self.model(x).float() - y).square().mean()
        self.scaler.scale(OverflowInBackward.apply(loss) if overflow else loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def loss(self) -> float:
        total = 0.0
        for seed in range(7):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(16, 32, generator=generator)
            wide = copy.deepcopy(self.model).float()
            total += (wide(x) - torch.randn(16, 64, generator=generator)).square().mean().item()
        return total / 7

    def tensors(self) -> list[Tensor]:
        state = [v for p in self.model.parameters() for _, v in sorted(self.optimizer.state.get(p, {}).items())]
        return [p.detach().clone() for p in self.model.parameters()] + [
            v.clone() for v in state if isinstance(v, Tensor)
        ]


def gain(make: Maker, remedy: str | None, dtype: torch.dtype = BF16, steps: int = 60) -> float:
    run = Run(make, remedy, dtype)
    before = run.loss()
    for _ in range(steps):
        run.step()
    return before - run.loss()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_gains_what_it_gains_in_fp32(name: str) -> None:
    """60 steps with updates of less than a rounding step: both remedies gain within 5% of what FP32 gains."""
    make = OPTIMIZERS[name]
    exact = gain(make, None, torch.float32)
    for remedy in REMEDIES:
        assert gain(make, remedy) == pytest.approx(exact, rel=0.05), remedy


@for_each("remedy", REMEDIES)
@for_each("name", ["adamw", "sgd momentum"])
def test_fp16_parameters_too(name: str, remedy: str) -> None:
    """FP16 parameters under FP16 autocast, whose gradients are unscaled in FP32: the same."""
    exact = gain(OPTIMIZERS[name], None, torch.float32)
    assert gain(OPTIMIZERS[name], remedy, FP16) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("remedy", REMEDIES)
def test_plain_bf16_loses_what_they_keep(remedy: str) -> None:
    """The same at a learning rate at which plain BF16 gains less than half."""
    lower: Maker = lambda p: torch.optim.AdamW(p, lr=2e-5)  # noqa: E731
    exact = gain(lower, None, torch.float32)
    assert gain(lower, None) < 0.5 * exact
    assert gain(lower, remedy) == pytest.approx(exact, rel=0.1)


@for_each("remedy", REMEDIES)
def test_kept_between_steps_is_half_precision(remedy: str) -> None:
    """Parameters, gradients and averages stay BF16, counters FP32; kahan keeps one more BF16 tensor a parameter."""
    run = Run(OPTIMIZERS["adamw"], remedy)
    for _ in range(3):
        run.step()
    for parameter in run.model.parameters():
        state = dict(run.optimizer.state[parameter])
        assert parameter.dtype is BF16
        assert state.pop("step") == 3
        assert (COMPENSATION in state) == (remedy == "kahan")
        assert {value.dtype for value in state.values()} == {BF16}
        assert {value.shape for value in state.values()} == {parameter.shape}
        assert len(state) == 2 + (remedy == "kahan")


def test_averages_follow_gradients_that_fall() -> None:
    """After gradients a tenth as large, AdamW's second average is FP32's within 2%; rounded to nearest it stays where it was."""
    means = {}
    for name, dtype, weights in (
        ("FP32", torch.float32, None),
        ("BF16", BF16, None),
        ("ours", BF16, RoundedWeights(False)),
    ):
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.ones(4096, dtype=dtype))
        optimizer = torch.optim.AdamW([weight], lr=1e-5, fused=True)
        for step in range(1500):
            weight.grad = (torch.randn(4096, generator=generator) * (1e-2 if step < 100 else 1e-3)).to(dtype)
            weights.run(optimizer, optimizer.step, in_parts=True) if weights else optimizer.step()
        means[name] = optimizer.state[weight]["exp_avg_sq"].float().mean().item()
    assert means["ours"] == pytest.approx(means["FP32"], rel=0.02)
    assert means["BF16"] > 2 * means["FP32"]


def test_kahan_is_fp32_but_for_its_own_rounding() -> None:
    """Parameter and rounding error together follow FP32 master weights ten times closer than the parameter, which is their sum, rounded."""
    run = Run(OPTIMIZERS["sgd momentum"], "kahan")
    exact = Run(OPTIMIZERS["sgd momentum"], "master_weights")
    for _ in range(20):
        run.step()
        exact.step()
    masters = exact.optimizer.state_dict()["hf_amp_master_weights"].values()
    off = off_alone = 0.0
    for parameter, master in zip(run.model.parameters(), masters, strict=True):
        total = parameter.detach().float() + run.optimizer.state[parameter][COMPENSATION].float()
        assert (total.to(BF16) == parameter).float().mean() > 0.97  # but for errors that are half a step by now
        off += (total - master).abs().sum().item()
        off_alone += (parameter.detach() - master).abs().sum().item()
    assert off < 0.1 * off_alone


@for_each("remedy", REMEDIES)
@for_each("name", ["adamw", "adamw fused", "sgd momentum", "adafactor"])
def test_in_parts_or_whole_is_the_same(monkeypatch: pytest.MonkeyPatch, name: str, remedy: str) -> None:
    """Classes that treat each parameter by itself are stepped on some at a time, with the bits of a step on all."""
    monkeypatch.setitem(stochastic_rounding._TOGETHER, "cpu", 2000)
    ends, calls = [], []
    for hooked in (False, True):  # with a hook of somebody else it is one step
        run = Run(OPTIMIZERS[name], remedy)
        if hooked:
            run.optimizer.register_step_pre_hook(lambda *_: calls.append(1))
        for _ in range(4):
            run.step()
        ends.append(run.tensors())
    assert len(calls) == 4
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class SomeOfIt(torch.optim.AdamW):
    """Of a class that hf_amp does not know."""


def test_fewer_values_are_fp32_at_once_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts the optimizer holds few FP32 stand-ins at once, and all of them otherwise; the parameters' order stays."""
    monkeypatch.setitem(stochastic_rounding._TOGETHER, "cpu", 2000)
    sizes: dict[str, list[int]] = {}
    for make in (torch.optim.AdamW, SomeOfIt):
        run = Run(lambda p, make=make: make(p, lr=LR), "stochastic_rounding")
        seen = sizes[make.__name__] = []
        inner = make.step

        def step(self: Any, closure: None = None, seen: Any = seen, inner: Any = inner) -> None:
            seen.append(sum(p.numel() for g in self.param_groups for p in g["params"]))
            inner(self)

        monkeypatch.setattr(run.optimizer, "step", step.__get__(run.optimizer))
        held = list(run.optimizer.param_groups[0]["params"])
        run.step()
        assert all(a is b for a, b in zip(held, run.optimizer.param_groups[0]["params"], strict=True))
    total = sum(p.numel() for p in held)
    assert sizes["SomeOfIt"] == [total]
    assert sum(sizes["AdamW"]) == total
    assert max(sizes["AdamW"]) < total


@for_each("dtype", [BF16, FP16])
@for_each("remedy", REMEDIES)
@for_each("name", ["adamw fused", "amsgrad", "adafactor", "lion"])
def test_resume_is_bitwise(name: str, remedy: str, dtype: torch.dtype) -> None:
    """Six steps equal three, saved, loaded into new objects through a file, and three more."""
    straight = Run(OPTIMIZERS[name], remedy, dtype)
    for _ in range(6):
        straight.step()
    first, second = (Run(OPTIMIZERS[name], remedy, dtype) for _ in range(2))
    for _ in range(3):
        first.step()
    file = io.BytesIO()
    torch.save([first.model.state_dict(), first.optimizer.state_dict(), first.scaler.state_dict()], file)
    file.seek(0)
    model, optimizer, scaler = torch.load(file)
    second.model.load_state_dict(model)
    second.scaler.keep_master_weights(second.optimizer)
    second.optimizer.load_state_dict(optimizer)
    second.scaler.load_state_dict(scaler)
    second.steps = 3
    for _ in range(3):
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(straight.tensors(), second.tensors(), strict=True))


@for_each("remedy", REMEDIES)
def test_random_numbers_are_its_own(remedy: str) -> None:
    """The run's generator is left alone, and has no say: ranks that hold the same parameters round them alike."""
    ends = []
    for seed in (1, 2):
        run = Run(OPTIMIZERS["adamw"], remedy)
        run.step()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        run.step()
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(run.tensors())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_two_steps_round_differently() -> None:
    """The random numbers of a step are not those of the one before."""
    run = Run(lambda p: torch.optim.SGD(p, lr=1e-5), "stochastic_rounding")
    moved = []
    for _ in range(2):
        before = run.tensors()[0]
        run.step()
        run.steps = 0  # the same data
        moved.append(run.tensors()[0] != before)
    assert not torch.equal(*moved)


@for_each("dtype", [BF16, FP16])
@for_each("remedy", REMEDIES)
@for_each("options", [{}, {"scaling_strategy": "PERFORMANCE_OPTIMIZED"}])
def test_a_skipped_step_moves_nothing(options: dict[str, str], remedy: str, dtype: torch.dtype) -> None:
    """Neither parameters nor state, also where the device skips; the next step is applied."""
    if dtype is BF16:
        options = {**options, "precision_mode": "MIXED"}
    run = Run(OPTIMIZERS["adamw fused"], remedy, dtype, **options)
    run.step()
    run.step()
    before = run.tensors()
    run.step(overflow=True)
    after = run.tensors()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    run.step()
    run.scaler.flush()
    assert (run.scaler.applied_steps, run.scaler.skipped_steps) == (3, 1)
    assert not torch.equal(after[0], run.tensors()[0])


@for_each("remedy", REMEDIES)
def test_no_host_read_is_added(remedy: str) -> None:
    """A step reads the host once, for its verdict."""
    run = Run(lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9), remedy)
    run.step()
    with count_host_reads() as reads:
        run.step()
    assert reads.count == 1


def test_an_optimizer_that_raises_leaves_all_in_place() -> None:
    """After an exception in the step the optimizer holds the parameters again, with their state and gradients."""

    class Raises(torch.optim.AdamW):
        broken = False

        def step(self, closure: None = None) -> None:  # type: ignore[override]
            if self.broken:
                raise RuntimeError("no memory")
            super().step()

    run = Run(lambda p: Raises(p, lr=LR), "kahan")
    run.step()
    before = run.tensors()
    run.optimizer.broken = True
    with pytest.raises(RuntimeError, match="no memory"):
        run.step()
    assert run.optimizer.param_groups[0]["params"] == list(run.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, run.tensors(), strict=True))
    run.optimizer.broken = False
    run.optimizer.zero_grad()
    run.step()


def test_a_pruning_mask_stays() -> None:
    """A parameter that was set to 0 from outside is within half a rounding step of it, and never NaN."""
    run = Run(OPTIMIZERS["adamw"], "kahan")
    run.step()
    weight = next(iter(run.model.parameters()))
    former = weight.detach().clone()
    weight.data.zero_()
    run.step()
    assert (weight.abs() <= former.abs() * 2**-8 + 2 * LR).all()


def test_frozen_and_fp32_parameters_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """An FP32 norm beside BF16 matrices takes its plain step, once, whatever the parts."""
    monkeypatch.setitem(stochastic_rounding._TOGETHER, "cpu", 64)
    ends = []
    for remedy in ("stochastic_rounding", None):
        run = Run(OPTIMIZERS["adamw"], remedy)
        run.model[1].float()
        run.model[1].register_forward_pre_hook(lambda _, args: (args[0].float(),))
        run.model[1].register_forward_hook(lambda _, args, output: output.to(BF16))
        run.model[0].requires_grad_(False)
        run.step()
        ends.append(run.model[1].weight.detach().clone())
        assert run.optimizer.state[run.model[1].weight]["step"] == 1
    assert torch.equal(*ends)
