"""A plan in force: the modules that it names compute in FP32, everything else as without it."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

import hf_amp
from hf_amp import AdvancedGradScaler, AmpSession, Cause, MixedPrecisionConfig, PrecisionMode
from hf_amp.device import probe
from hf_amp.fallback.diagnosis import Diagnosis
from hf_amp.fallback.module_precision import ForwardContext, PlanRunner, PrecisionEntry
from hf_amp.fallback.plan import PrecisionPlan
from tests.each import for_each

KERNELS = pytest.mark.parametrize("emulate", [False, True], ids=["half kernels", "emulated"])
X = torch.linspace(-1, 1, 24).reshape(3, 8) / 3


class Mlp(nn.Module):
    """Two layers and what lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Network(nn.Module):
    """A layer, a nested module that is called twice, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.body, self.last = nn.Linear(8, 8), Mlp(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.body(self.body(x))
        return self.last(x)


def plan_of(*names: str, default: PrecisionMode = PrecisionMode.MIXED) -> PrecisionPlan:
    return PrecisionPlan(default, MappingProxyType(dict.fromkeys(names, PrecisionMode.FP32)))


def runner_of(emulate: bool, *models: nn.Module) -> PlanRunner:
    runner = PlanRunner(PrecisionEntry("cpu", emulate), PrecisionMode.MIXED)
    for model in models:
        runner.register_model(model)
    return runner


def run(runner: PlanRunner, model: nn.Module, *arguments: Any) -> Any:
    with runner.current():
        return model(*arguments)


@contextmanager
def watched(module: nn.Module) -> Iterator[list[tuple[Any, Any]]]:
    """(arguments, output) of each call of `module`."""
    calls: list[tuple[Any, Any]] = []
    handle = module.register_forward_hook(lambda _, args, output: calls.append((args, output)))
    yield calls
    handle.remove()


def no_context_is_left() -> bool:
    """Whether neither autocast nor emulation is on, and products are exact."""
    a = torch.full((2, 1), 300.0)
    return not torch.is_autocast_enabled("cpu") and torch.equal(a @ a.T, torch.full((2, 2), 90000.0))


@KERNELS
@for_each("name", ["first", "body", "body.up", "last"])
def test_a_named_module_computes_in_fp32_and_the_rest_as_without_it(emulate: bool, name: str) -> None:
    """Outputs of the named module equal FP32 kernels on its inputs, bit for bit; every other module's those in FP16."""
    model = Network()
    runner = runner_of(emulate, model)
    runner.apply(plan_of(name))
    leaves = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    calls: dict[str, list[tuple[Any, Any]]] = {n: [] for n in leaves}
    for leaf, module in leaves.items():
        module.register_forward_hook(lambda _, args, out, leaf=leaf: calls[leaf].append((args[0], out)))
    run(runner, model, X)
    runner.remove()
    for module in leaves.values():
        module._forward_hooks.clear()
    for leaf, seen in calls.items():
        assert len(seen) == (2 if leaf.startswith("body") else 1)
        for x, output in seen:
            exact = leaves[leaf](x.float())
            rounded = run(runner, leaves[leaf], x)
            inside = leaf == name or leaf.startswith(f"{name}.")
            assert torch.equal(output, exact if inside else rounded)
            assert not torch.equal(exact, rounded.float())


@KERNELS
def test_gradients_through_a_named_module_are_those_of_fp32(emulate: bool) -> None:
    """Backward of the named module equals FP32 kernels on the same inputs and output gradients, bit for bit."""
    model = Network()
    runner = runner_of(emulate, model)
    runner.apply(plan_of("last"))
    with watched(model.last) as calls:
        run(runner, model, X).float().square().sum().backward()
    (x,), output = calls[0]
    twin = copy.deepcopy(model.last)
    twin.zero_grad()
    runner.remove()
    twin._forward_hooks.clear()
    twin._forward_pre_hooks.clear()
    twin(x.detach().float()).backward(2 * output.detach())
    assert torch.equal(model.last.weight.grad, twin.weight.grad)
    assert torch.equal(model.last.bias.grad, twin.bias.grad)


class TiedLanguageModel(nn.Module):
    """Embedding and output layer share their weight; a product with it comes before each of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(12, 8)
        self.body, self.head, self.probe = nn.Linear(8, 8), nn.Linear(8, 12, False), nn.Linear(8, 12, False)
        self.head.weight = self.probe.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.probe(x) + self.head(self.body(x)) + self.probe(x)


def rounded(x: Tensor) -> Tensor:
    return x.half().float()


@pytest.mark.parametrize("emulate", [False, True], ids=["half kernels", "emulated"])
def test_a_tied_weight_is_used_in_both_precisions_and_gets_the_gradients_of_both(emulate: bool) -> None:
    """The cast that autocast's cache holds for the FP16 uses is not taken for the FP32 use, nor is its gradient lost."""
    model = TiedLanguageModel()
    runner = runner_of(emulate, model)
    runner.apply(plan_of("head"))
    tokens = torch.arange(12).reshape(2, 6)
    for _ in range(2):  # the cache lives as long as the outermost autocast, and no longer
        model.zero_grad()
        with watched(model.head) as calls:
            run(runner, model, tokens).float().square().mean().backward()
        (x,), output = calls[0]
        assert torch.equal(output, nn.functional.linear(x.float(), model.head.weight))
    # By hand, in FP32, with the casts written out; the gradient of each use apart.
    weight = model.embedding.weight.detach()
    uses = [weight.clone().requires_grad_() for _ in range(3)]
    embedded = nn.functional.embedding(tokens, uses[0])
    probed = rounded(rounded(embedded) @ rounded(uses[1]).T)
    hidden = rounded(rounded(embedded) @ rounded(model.body.weight).T + rounded(model.body.bias))
    by_hand = probed + hidden @ uses[2].T + probed
    gradients = torch.autograd.grad(by_hand.square().mean(), uses)
    assert all(g.abs().amax() > 0.1 for g in gradients)
    assert torch.allclose(model.embedding.weight.grad, sum(gradients), rtol=1e-2, atol=2e-3)


class Recomputed(nn.Module):
    """A container that recomputes its block in backward."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.wrapped = Container(reentrant)

    def forward(self, x: Tensor) -> Tensor:
        return self.wrapped(self.first(x))


class Container(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.block, self.reentrant = Mlp(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


@KERNELS
@for_each("reentrant", [False, True])
@for_each("name", ["wrapped", "wrapped.block", "wrapped.block.up"])
def test_what_is_recomputed_in_backward_is_recomputed_in_fp32(emulate: bool, reentrant: bool, name: str) -> None:
    """With a checkpointed block inside of what the plan names, gradients equal those without checkpointing."""
    gradients = []
    for kind in (None, reentrant):
        model = Recomputed(kind)
        runner = runner_of(emulate, model)
        removal = ForwardContext(runner.current).install(model)  # as accelerate's models have it on a CPU
        runner.apply(plan_of(name))
        model(X).float().square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        removal()
        assert no_context_is_left()
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


Pair = namedtuple("Pair", "x label")


@dataclasses.dataclass
class Given:
    x: Tensor
    label: str = "kept"


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor


@dataclasses.dataclass
class Output(ModelOutput):
    x: Tensor | None = None


class Unpacks(nn.Module):
    """Multiplies what `take` finds in its argument, and gives it back in the same kind of parcel."""

    def __init__(self, take: Callable[[Any], Tensor], pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.take, self.pack = nn.Linear(8, 8), take, pack

    def forward(self, parcel: Any) -> Any:
        return self.pack(self.layer(self.take(parcel)))


PARCELS: dict[str, tuple[Callable[[Any], Tensor], Callable[[Tensor], Any]]] = {
    "tuple": (lambda p: p[0], lambda x: (x, 1)),
    "list": (lambda p: p[0], lambda x: [x]),
    "dict": (lambda p: p["x"], lambda x: {"x": x}),
    "named tuple": (lambda p: p.x, lambda x: Pair(x, "kept")),
    "dataclass": (lambda p: p.x, lambda x: Given(x)),
    "frozen dataclass": (lambda p: p.x, lambda x: Frozen(x)),
    "ModelOutput": (lambda p: p.x, lambda x: Output(x=x)),
    "nested": (lambda p: p["a"][0].x, lambda x: {"a": (Pair(x, "kept"),)}),
}


@KERNELS
@for_each("kind", PARCELS)
def test_half_tensors_are_widened_wherever_they_are(emulate: bool, kind: str) -> None:
    """An FP32 module takes FP16 values in any parcel, computes in FP32, and gives back the kind that it makes."""
    torch.manual_seed(0)
    take, pack = PARCELS[kind]
    model = nn.Sequential(Unpacks(take, pack), Unpacks(take, pack))
    runner = runner_of(emulate, model)
    runner.apply(plan_of("1"))
    with watched(model[1].layer) as calls:
        output = run(runner, model, pack(X))
    (x,), product = calls[0]
    assert type(output) is type(pack(X))
    runner.remove()
    assert torch.equal(take(output), nn.functional.linear(x.float(), *model[1].layer.parameters()))
    assert x.dtype == product.dtype == torch.float32


class Collects(nn.Module):
    """Adds what it computes to the list that it is given, as U-Nets and mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, collected: list[Tensor], by_name: dict[str, Tensor]) -> Tensor:
        x = self.layer(x + collected.pop() if collected else x)
        by_name["newest"] = x
        collected.append(x)
        return x


class Collector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Collects(), Collects()

    def forward(self, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        collected, by_name = [], {}
        self.b(self.a(x, collected, by_name), collected, by_name)
        return collected, by_name


@KERNELS
def test_what_a_module_does_to_its_callers_list_is_not_lost(emulate: bool) -> None:
    """A module in FP32 that pops from and appends to a list or dict of its caller does so to that very object."""
    model = Collector()
    runner = runner_of(emulate, model)
    runner.apply(plan_of("b"))
    with watched(model.b.layer) as calls:
        collected, by_name = run(runner, model, X)
    assert len(collected) == 1
    assert collected[0] is by_name["newest"] is calls[0][1]


class Fails(nn.Module):
    """Raises on demand, in its forward or in a forward pre-hook."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.where = nn.Linear(8, 8), "nowhere"
        self.register_forward_pre_hook(self.check)

    def check(self, module: nn.Module, arguments: Any) -> None:
        if self.where == "hook":
            raise ValueError("bad batch")

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.where == "forward":
            raise ValueError("bad batch")
        return x


@KERNELS
@for_each("where", ["forward", "hook"])
@for_each("name", ["1", "1.layer"])
def test_an_exception_leaves_nothing_behind(emulate: bool, where: str, name: str) -> None:
    """After an exception in the module or a hook of it, autocast, emulation and the plan are as if it had never been."""
    model = nn.Sequential(nn.Linear(8, 8), Fails())
    runner = runner_of(emulate, model)
    removal = ForwardContext(runner.current).install(model)
    runner.apply(plan_of(name))
    expected = model(X)
    model[1].where = where
    for _ in range(2):
        with pytest.raises(ValueError, match="bad batch"):
            model(X)
        assert no_context_is_left()
        assert torch.is_autocast_cache_enabled()
    model[1].where = "nowhere"
    assert torch.equal(model(X), expected)
    removal()


class Forgives(nn.Module):
    """Goes on without what has failed."""

    def __init__(self) -> None:
        super().__init__()
        self.risky, self.layer = Fails(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        try:
            self.risky(x)
        except ValueError:
            return x @ self.layer.weight
        return x


@KERNELS
@for_each("where", ["forward", "hook"])
@pytest.mark.filterwarnings("error")
def test_an_exception_that_is_caught_inside_ends_nothing(emulate: bool, where: str) -> None:
    """A container in FP32 that catches the exception of a part goes on in FP32."""
    model = nn.Sequential(nn.Linear(8, 8), Forgives())
    model[1].risky.where = where
    runner = runner_of(emulate, model)
    runner.apply(plan_of("1"))
    with watched(model[1]) as calls:
        run(runner, model, X)
    (x,), output = calls[0]
    assert torch.equal(output, x.float() @ model[1].layer.weight)
    assert no_context_is_left()


@KERNELS
def test_detached_models_are_as_before(emulate: bool) -> None:
    """`remove` leaves no hook on any module, and outputs equal those before the plan."""
    model = Network()
    runner = runner_of(emulate, model)
    before = run(runner, model, X)
    runner.apply(plan_of("first", "body"))
    assert not torch.equal(run(runner, model, X).float(), before.float())
    runner.remove()
    assert torch.equal(run(runner, model, X), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@KERNELS
def test_models_adopted_later_follow_the_plan_in_force(emulate: bool) -> None:
    """A second model is "model_2"; a model in place of one that is gone takes its number, and the plan for its modules."""
    first = Network()
    runner = runner_of(emulate, first)
    runner.apply(plan_of("first", "model_2.last"))
    second = Network()
    runner.register_model(second)
    assert [n for n, _ in runner.named_modules() if n.endswith("last")] == ["last", "model_2.last"]
    assert runner.name_of(second) == "model_2"

    def in_fp32(model: Network, name: str) -> bool:
        with watched(getattr(model, name)) as calls:
            run(runner, model, X)
        (x,), output = calls[0]
        module = getattr(model, name)
        return torch.equal(output, nn.functional.linear(x.float(), module.weight, module.bias))

    assert [in_fp32(first, n) for n in ("first", "last")] == [True, False]
    assert [in_fp32(second, n) for n in ("first", "last")] == [False, True]
    del first
    third = Network()
    runner.register_model(third)
    assert runner.name_of(third) == ""
    assert [in_fp32(third, n) for n in ("first", "last")] == [True, False]
    runner.remove()
    assert not any(m._forward_hooks for m in third.modules())


def session_of(model: nn.Module) -> AmpSession:
    config = MixedPrecisionConfig()
    session = AmpSession(config, AdvancedGradScaler(config, "cpu"), PrecisionMode.MIXED, probe("cpu"))
    session.register_model(model)
    return session


def test_copies_compute_alike_and_are_not_watched() -> None:
    """A deep copy (an EMA) under a plan computes as the original until `detach`; its calls are not the run's."""
    model = nn.Sequential(nn.Linear(8, 8), Mlp())
    session = session_of(model)
    keeper = session._fallback
    removal = ForwardContext(session.current_precision).install(model)
    keeper.runner.apply(plan_of("1"))
    expected = model(X)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), expected)
    assert len(keeper.recorder.forwards_of(1)) == 1
    session.detach()
    removal()
    assert torch.equal(twin(X), model(X))
    assert not torch.equal(model(X), expected)


@pytest.mark.parametrize(
    ("inside_compile", "backend"), [(False, "eager"), (True, "aot_eager")], ids=["compile outside", "hooks inside"]
)
def test_compiled_models_follow_every_change_of_plan(inside_compile: bool, backend: str) -> None:
    """Compiled before the plan, under it and after it: outputs are those of the eager model each time."""
    torch.compiler.reset()
    model = Network()
    runner = runner_of(True, model)
    if inside_compile:
        ForwardContext(runner.current).install(model)
    compiled = torch.compile(model, backend=backend)

    def both() -> tuple[Tensor, Tensor]:
        with runner.current():
            return compiled(X), model(X)

    outputs = []
    for plan in (plan_of(), plan_of("body"), plan_of("body", "last"), plan_of(default=PrecisionMode.FP32), plan_of()):
        runner.apply(plan)
        for _ in range(2):
            a, b = both()
            assert torch.allclose(a, b, rtol=0, atol=1e-6), plan
        outputs.append(b.float())
    torch.compiler.reset()
    assert torch.equal(outputs[0], outputs[-1])
    assert all(not torch.allclose(outputs[0], o, rtol=0, atol=1e-5) for o in outputs[1:4])


@pytest.fixture
def one_process_group() -> Iterator[None]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@KERNELS
@pytest.mark.usefixtures("one_process_group")
def test_under_ddp_gradients_are_those_without_it(emulate: bool) -> None:
    """DistributedDataParallel around a model under a plan, wrapped before or after it: the same gradients, bit for bit."""

    def gradients(wrap: Callable[[nn.Module], nn.Module], late: bool) -> list[Tensor]:
        model = Network()
        runner = runner_of(emulate, model)
        if not late:
            runner.apply(plan_of("body", "last"))
        wrapped = wrap(model)
        runner.apply(plan_of("body", "last"))
        run(runner, wrapped, X).float().square().sum().backward()
        return [p.grad for p in model.parameters()]

    plain = gradients(lambda model: model, late=False)
    for late in (False, True):
        for a, b in zip(plain, gradients(nn.parallel.DistributedDataParallel, late), strict=True):
            assert torch.equal(a, b)


def leave_for_fp32(session: AmpSession) -> None:
    """The whole model overflows, whatever half precision it is in."""
    while session.plan.default is not PrecisionMode.FP32:
        session._fallback.after_skipped(Diagnosis(Cause.ACTIVATION, "it overflowed"), 1.0, scale=1.0)


def return_from_fp32(session: AmpSession) -> None:
    """Steps without an overflow, until the run is back where it began."""
    while session.plan.default is not session.requested_mode:
        session._fallback.after_applied()


@pytest.mark.usefixtures("fresh_accelerator_state")
def test_the_whole_model_leaves_and_re_enters_accelerates_own_autocast() -> None:
    """BF16 → FP32 and back: outputs are those of FP32, then of BF16 again; `unwrap_model` and `detach` find what they
    expect."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(recovery_steps=1))
    plain = Network()
    in_fp32 = plain(X)
    model = accelerator.prepare(plain)
    wrapped = vars(plain)["forward"]
    in_bf16 = model(X)
    assert not torch.equal(in_bf16, in_fp32)
    leave_for_fp32(session)
    assert torch.equal(model(X), in_fp32)
    assert torch.equal(accelerator.unwrap_model(model)(X), in_fp32)
    return_from_fp32(session)
    assert torch.equal(model(X), in_bf16)
    leave_for_fp32(session)
    session.detach()
    assert vars(plain)["forward"] is wrapped
    assert torch.equal(model(X), in_bf16)
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert torch.equal(bare(X), in_fp32)


@pytest.mark.usefixtures("fresh_accelerator_state")
def test_a_bare_model_can_be_taken_out_under_a_changed_default() -> None:
    """`unwrap_model(keep_fp32_wrapper=False)` in FP32 gives the model as its author wrote it, which can be pickled."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(recovery_steps=1))
    plain = nn.Sequential(nn.Linear(8, 8))
    in_fp32 = plain(X)
    model = accelerator.prepare(plain)
    leave_for_fp32(session)
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert torch.equal(bare(X), in_fp32)
    assert torch.equal(pickle.loads(pickle.dumps(bare))(X), in_fp32)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.usefixtures("fresh_accelerator_state")
def test_accelerator_autocast_follows_the_default(precision: str) -> None:
    """Products in `accelerator.autocast()` are half precision, exact while the default is FP32, and half again."""
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(recovery_steps=1))
    a = torch.full((1, 1), 1 / 3)

    def product() -> float:
        with accelerator.autocast():
            return (a @ a).float().item()

    exact = (a @ a).item()
    assert product() != exact
    leave_for_fp32(session)
    assert product() == exact
    return_from_fp32(session)
    assert product() != exact
    assert no_context_is_left()
