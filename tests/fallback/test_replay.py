"""The modules in which a forward pass leaves FP16's range are named, and the look changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BatchEncoding, DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.utils import ModelOutput

import hf_amp
from hf_amp import AdvancedGradScaler, AmpSession, Cause, MixedPrecisionConfig, PrecisionMode
from hf_amp.device import probe
from hf_amp.fallback.diagnosis import Diagnosis, diagnose, non_finite_source
from hf_amp.fallback.module_precision import CurrentPrecision, ForwardContext, PlanRunner, PrecisionEntry
from hf_amp.fallback.recorder import RecordedForward
from hf_amp.fallback.replay import ReplayFindings, replay, replay_backward
from tests.each import for_each

KERNELS = for_each("emulate", [False, True])
X = torch.linspace(-1, 1, 24).reshape(3, 8) + 0.01


def fp16(emulate: bool = True) -> CurrentPrecision:
    return CurrentPrecision(PrecisionEntry("cpu", emulate), PrecisionMode.MIXED)


def found_in(model: nn.Module, *arguments: Any, emulate: bool = True, **options: Any) -> ReplayFindings:
    return replay(RecordedForward(model, arguments, options), fp16(emulate))


def told_of(model: nn.Module, *arguments: Any, **options: Any) -> Diagnosis:
    forward = RecordedForward(model, arguments, options)
    runner = PlanRunner(PrecisionEntry("cpu", emulate=True), PrecisionMode.MIXED)
    runner.register_model(model)
    return non_finite_source((), [forward]) or diagnose(False, [forward], runner)


def enlarge(*layers: nn.Module, by: float = 1e6) -> None:
    """Makes the output of the layers overflow FP16."""
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(by)


class Halves(nn.Module):
    """Two layers; the first one's output is brought back into the range before the second."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.big, self.small = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.small(torch.tanh(self.big(x).float() * 1e-6))


def network(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(copy.deepcopy(block) for block in blocks))


@KERNELS
def test_every_layer_that_overflows_is_named_in_one_look(emulate: bool) -> None:
    """Names are qualified, in the order in which the layers run, and nobody else is among them."""
    model = network(Halves(), nn.Linear(8, 8), Halves())
    assert found_in(model, X, emulate=emulate).overflowing == []
    enlarge(model[0].big, model[2].big)
    assert found_in(model, X, emulate=emulate).overflowing == ["0.big", "2.big"]


def tiny_gpt2(**options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, **options
        )
    )  # fmt: skip


TOKENS = torch.arange(16).reshape(2, 8)


@KERNELS
def test_a_layer_of_gpt2_is_named(emulate: bool) -> None:
    """The projection that leaves the range, in a model that returns a ModelOutput with a loss."""
    model = tiny_gpt2().eval()
    enlarge(model.transformer.h[1].mlp.c_fc, by=1e7)
    found = found_in(model, input_ids=TOKENS, labels=TOKENS, emulate=emulate)
    assert found.overflowing[0] == "transformer.h.1.mlp.c_fc"
    assert found.returns_loss


@KERNELS
def test_products_of_activations_are_put_down_to_the_module_that_makes_them(emulate: bool) -> None:
    """Attention scores beyond 65504 arise in no projection but in the attention itself: it is named, and not its
    neighbours that NaN passes through."""
    model = tiny_gpt2(attn_implementation="eager").eval()
    attention = model.transformer.h[0].attn
    with torch.no_grad():
        attention.c_attn.weight[:, :32] *= 1e4
    found = found_in(model, input_ids=TOKENS, emulate=emulate)
    assert found.overflowing == ["transformer.h.0.attn"]


class AtTheRoot(nn.Module):
    """Overflows outside of any submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).float() * 1e3
        return (x @ x.mT) * 1e-6


class Twice(nn.Module):
    """Calls one layer twice; only the second call overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).float() * 1e6).float() * 1e-6


class Tied(nn.Module):
    """Input and output layer share their weight; what the latter gets is large."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x.argsort(-1)) * 3e4) * 1e-6


class Recomputes(nn.Module):
    """Its block is checkpointed, and overflows."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.block, self.reentrant = nn.Linear(8, 8), Halves(), reentrant
        enlarge(self.block.big)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)


@for_each(
    ("model", "names"),
    [
        (AtTheRoot(), [""]),
        (nn.Sequential(AtTheRoot(), nn.Linear(3, 3)), ["0"]),
        (Twice(), ["layer"]),
        (Tied(), ["head"]),
        (Recomputes(False), ["block.big"]),
        (Recomputes(True), ["block.big"]),
    ],
)
@KERNELS
def test_who_is_to_blame(model: nn.Module, names: list[str], emulate: bool) -> None:
    """The model itself ("") for what it computes outside of its modules; a module called twice, once; a tied layer, not
    its twin; a recomputed one."""
    assert found_in(model, X, emulate=emulate).overflowing == names


@dataclasses.dataclass
class Parcel:
    x: Tensor


@dataclasses.dataclass
class Output(ModelOutput):
    x: Tensor | None = None


class Packs(nn.Module):
    def __init__(self, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.pack = nn.Linear(8, 8), pack
        enlarge(self.layer)

    def forward(self, x: Tensor) -> Any:
        # The layer's own output is hidden in the parcel's own product.
        return self.pack(x @ self.layer.weight)


@for_each("pack", [lambda x: (x, 1), lambda x: [None, x], lambda x: {"a": {"b": x}}, Parcel, lambda x: Output(x=x)])
def test_any_kind_of_output_is_looked_into(pack: Callable[[Tensor], Any]) -> None:
    """Values beyond the range are seen in tuples, lists, dicts and dataclasses."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packs = Packs(pack)

        def forward(self, x: Tensor) -> Tensor:
            self.packs(x)
            return x.sum()

    assert found_in(Around(), X).overflowing == ["packs"]


class Masked(nn.Module):
    """Attention-like: makes an additive mask in a module of its own and adds it to scores."""

    def __init__(self, lowest: float, fault: str = "none") -> None:
        super().__init__()
        self.mask, self.layer, self.fault = MakesMask(lowest), nn.Linear(8, 8), fault
        self.after = Faulty(fault)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.layer(x) + self.mask(x)
        return self.after(scores.softmax(-1))


class MakesMask(nn.Module):
    def __init__(self, lowest: float) -> None:
        super().__init__()
        self.lowest = lowest

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.lowest).triu(1)


class Faulty(nn.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        return x / 0 if self.fault == "division" else x


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_masks_are_not_blamed(lowest: float) -> None:
    """-inf, and the lowest number, made by a module as a mask, are nobody's fault where the model's output is finite;
    where it is not, the module with the fault is named, not the mask."""
    sound = found_in(Masked(lowest), X)
    assert (sound.overflowing, sound.first_non_finite) == ([], None)
    faulty = found_in(nn.Sequential(Masked(lowest, "division"), nn.Linear(8, 8)), X)
    assert (faulty.overflowing, faulty.first_non_finite) == ([], "0.after")


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_masks_among_the_inputs_are_not_bad_inputs(lowest: float) -> None:
    """An additive `attention_mask` with -inf or the lowest number is no NaN batch; one with NaN is."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return (self.layer(x) + attention_mask).softmax(-1)

    model = Attends()
    mask = torch.full((3, 8), lowest).triu(1)
    assert told_of(model, X, mask).cause is not Cause.INPUT
    enlarge(model.layer)
    assert told_of(model, X, attention_mask=mask).cause is Cause.ACTIVATION
    mask[0, 0] = torch.nan
    assert told_of(model, X, mask).cause is Cause.INPUT


def test_modules_that_only_pass_a_fault_on_are_not_blamed() -> None:
    """NaN that a container's own forward makes is not put down to the layer that gets it."""

    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer((x - x) / (x - x))

    assert found_in(nn.Sequential(nn.Linear(8, 8), Divides(), nn.Linear(8, 8)), X).first_non_finite == "1"
    assert found_in(Divides(), X).first_non_finite == ""


class Remembers(nn.Module):
    """All that a training forward pass leaves behind: running statistics, a counter, random draws, a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout, self.layer = nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        self.calls = self.calls + 1
        x = self.layer(self.dropout(self.norm(x)))
        if cache is not None:
            cache.append(x)
        return x


def test_the_look_leaves_no_trace() -> None:
    """Buffers (also replaced ones), random state, gradients, hooks, modes and parameters are bit for bit what they were."""
    model = Remembers()
    model(X).sum().backward()
    enlarge(model.layer)
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    random_state = torch.get_rng_state()
    cache: list[Tensor] = []
    assert found_in(model, X, cache=cache).overflowing == ["layer"]
    assert cache == []
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training
    assert torch.is_grad_enabled()


def test_a_cache_of_keys_and_values_does_not_grow() -> None:
    """Neither one that the model would make itself, nor one that it is given."""
    model = tiny_gpt2()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=TOKENS, past_key_values=cache)
    length = cache.get_seq_length()
    assert found_in(model, input_ids=TOKENS[:, :1], past_key_values=cache).error is None
    assert cache.get_seq_length() == length


@pytest.mark.parametrize("error", [ValueError("no such token"), torch.OutOfMemoryError("4 GiB")])
def test_a_pass_that_cannot_be_repeated_is_unknown_and_says_why(error: Exception) -> None:
    """The cause is UNKNOWN with the error's own text; nothing is raised, and no hook stays."""

    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    model = nn.Sequential(nn.Linear(8, 8), Raises())
    reported = told_of(model, X)
    assert reported.cause is Cause.UNKNOWN
    assert f"{type(error).__name__}: {error}" in reported.message
    assert not any(m._forward_hooks for m in model.modules())


def session_on(model: nn.Module, entry_point: nn.Module | None = None) -> AmpSession:
    config = MixedPrecisionConfig()
    session = AmpSession(config, AdvancedGradScaler(config, "cpu"), PrecisionMode.MIXED, probe("cpu"))
    ForwardContext(session.current_precision).install(model)
    session.register_model(model, entry_point)
    return session


def failed_step(session: AmpSession, model: nn.Module, *batch: Any) -> Any:
    """One training step on `batch`; the newest event's cause and modules."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output = model(*batch)
    session.scaler.scale(output.float().square().mean()).backward()
    session.scaler.step(optimizer)
    session.scaler.update()
    skips = [event for event in session.events if event.kind is hf_amp.EventKind.STEP_SKIPPED]
    return (skips[-1].cause, skips[-1].modules) if skips else None


def test_a_batch_that_the_model_wrote_into_is_not_looked_at() -> None:
    """A model that works in place has made the batch something else: UNKNOWN says so, instead of blaming the batch."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(torch.inf)
            return self.layer(x)

    model = InPlace()
    session = session_on(model)
    assert failed_step(session, model, X.clone()) == (Cause.UNKNOWN, ())
    assert "written into" in next(e.message for e in session.events if e.cause)


class AddsToItsBatch(nn.Module):
    """Puts its output into the mapping that it was given, as the modules of sentence-transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))

    def forward(self, batch: Any) -> Any:
        batch.update(x=batch["x"] @ self.weight / 1e4)
        return batch


class Unpacks(nn.Module):
    """The output alone."""

    def forward(self, batch: Any) -> Tensor:
        return batch["x"]


@for_each("mapping", [dict, OrderedDict, BatchEncoding])
def test_a_batch_that_the_model_adds_its_outputs_to_is_repeated_as_it_came(mapping: Callable[[Any], Any]) -> None:
    """The module that overflows is named, and nobody else: neither the batch, nor a module for what it has added."""
    model = nn.Sequential(AddsToItsBatch(), AddsToItsBatch(), Unpacks())
    enlarge(model[0])
    assert failed_step(session_on(model), model, mapping({"x": X})) == (Cause.ACTIVATION, ("0",))


def test_what_a_model_adds_to_its_batch_is_not_kept_alive() -> None:
    """The recorder keeps what came in: outputs, and what autograd saved for them, go when the caller lets go of them."""
    model = AddsToItsBatch()
    session = session_on(model)
    output = weakref.ref(model({"x": X})["x"])
    assert output() is None
    assert session.plan.default is PrecisionMode.MIXED


@pytest.fixture
def one_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_under_ddp_names_are_those_of_the_model() -> None:
    """Called through DistributedDataParallel, a layer keeps the name that it has without."""
    model = network(nn.Linear(8, 8), Halves())
    enlarge(model[1].big)
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert failed_step(session_on(model, wrapped), wrapped, X) == (Cause.ACTIVATION, ("1.big",))


@pytest.mark.usefixtures("fresh_accelerator_state")
def test_compiled_by_accelerate_names_are_those_of_the_model() -> None:
    """Called through `torch.compile`, as `prepare` leaves it, a layer keeps its name, and FP32 there is a cure."""
    torch.compiler.reset()
    accelerator = Accelerator(mixed_precision="fp16", cpu=True, dynamo_plugin=TorchDynamoPlugin(backend="aot_eager"))
    session = hf_amp.attach(accelerator)
    plain = network(nn.Linear(8, 8), nn.Linear(8, 8))
    enlarge(plain[1])
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.0))
    applied = []
    for _ in range(3):
        accelerator.backward((model(X) * 1e-6).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        applied.append(not accelerator.optimizer_step_was_skipped)
    torch.compiler.reset()
    assert dict(session.plan.modules) == {"1": PrecisionMode.FP32}
    assert applied == [False, True, True]


@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.usefixtures("fresh_accelerator_state")
def test_a_healthy_model_has_hooks_at_its_door_alone(precision: str) -> None:
    """Where nothing is emulated there are two hooks on what is called (its batch; what it raises), and none on submodules, before
    and after a fault."""
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    hf_amp.attach(accelerator)
    model = network(Halves(), nn.Linear(8, 8))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def hooks() -> dict[str, int]:
        count = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()}
        return {name: number for name, number in count.items() if number}

    for value in (1.0, torch.nan, 1.0):
        assert hooks() == {"": 2}
        accelerator.backward(model(X * value).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    assert hooks() == {"": 2}


class WideBackward(torch.autograd.Function):
    """Identity whose backward multiplies in FP32 what FP16 does not hold."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient.float() * 1e6) @ torch.eye(gradient.shape[-1]) * 1e-6


class BehindOne(nn.Module):
    """A layer behind such a function, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return WideBackward.apply(self.layer(x).float()).sum()


@KERNELS
def test_backward_is_repeated_outside_of_autocast(emulate: bool) -> None:
    """As the step's own: what a user's function multiplies in FP32 there stays in FP32, and is not said to overflow."""
    found = replay_backward(RecordedForward(BehindOne(), (X,), {}), fp16(emulate), 1.0, 1.0)
    assert found is not None
    assert found.parameters == []
    assert found.moved == {"layer.weight", "layer.bias"}
