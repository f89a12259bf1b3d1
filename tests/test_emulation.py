"""Emulated FP16 overflows and underflows where real FP16 does."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

import hf_amp
from hf_amp import MixedPrecisionConfig
from hf_amp.emulation import EmulatedPrecision, round_to
from hf_amp.fallback.module_precision import ForwardContext, InnerForwardContext
from hf_amp.precision import FP32_FORMAT
from hf_amp.scaling.scaler import AdvancedGradScaler
from tests.each import for_each
from tests.reference import OnDevice, cuda_rules


def tiny_gpt2(activation: str = "gelu") -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, activation_function=activation,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def scaled_gradients(model: nn.Module, tokens: Tensor, scale: float, context: object) -> Tensor:
    """All gradients of the scaled loss, flat."""
    model.zero_grad()
    with context:
        loss = model(input_ids=tokens, labels=tokens).loss
    (loss * scale).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(("activation", "smallest"), [("gelu", -14), ("gelu_new", -8)])
def test_zero_fractions_and_overflowing_scales_are_those_of_real_half(activation: str, smallest: int) -> None:
    """For scales up to 2^26: zero fractions agree with CPU half kernels within 0.005, the same scales overflow.

    From 2^-14 where the activation function is one kernel; from 2^-8 where it is a chain of elementwise operations.
    """
    model = tiny_gpt2(activation)
    tokens = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1))
    overflowing: dict[str, set[int]] = {"real": set(), "emulated": set()}
    underflows = False
    for exponent in range(smallest, 27, 2):
        real = scaled_gradients(model, tokens, 2.0**exponent, torch.autocast("cpu", torch.float16))
        emulated = scaled_gradients(model, tokens, 2.0**exponent, EmulatedPrecision())
        for name, gradient in (("real", real), ("emulated", emulated)):
            if not gradient.isfinite().all():
                overflowing[name].add(exponent)
        if exponent not in overflowing["real"]:
            zeros = [(g == 0).float().mean().item() for g in (real, emulated)]
            assert abs(zeros[0] - zeros[1]) <= 0.005, (exponent, zeros)
            underflows |= zeros[0] > 0.05
    assert underflows
    assert overflowing["real"] == overflowing["emulated"] != set()


def test_forward_is_close_to_real_half() -> None:
    """The loss of a forward pass agrees with CPU half kernels to FP16's precision, and differs from FP32's."""
    model, tokens = tiny_gpt2(), torch.arange(16)[None]
    values = []
    for context in (nullcontext(), torch.autocast("cpu", torch.float16), EmulatedPrecision()):
        with context:
            values.append(model(input_ids=tokens, labels=tokens).loss.item())
    fp32, real, emulated = values
    assert emulated != fp32
    assert emulated == pytest.approx(real, rel=2e-3)


@for_each(
    "product",
    [
        lambda a, b: a @ b,
        lambda a, b: torch.matmul(a, b),
        lambda a, b: torch.einsum("ij,jk->ik", a, b),
        lambda a, b: nn.functional.linear(a, b.T),
        lambda a, b: torch.bmm(a[None], b[None]),
        lambda a, b: torch.addmm(torch.zeros(2, 2), a, b),
    ],
)
def test_products_beyond_65504_become_inf(product: object) -> None:
    """300 * 300 is 90000, which FP16 does not have; other functions keep it."""
    a = torch.full((2, 1), 300.0)
    with EmulatedPrecision():
        assert product(a, a.T).isinf().all()
        assert (a * a).eq(90000.0).all()


def test_rounding_is_ieee_and_rounds_gradients_too() -> None:
    """Values and gradients take the nearest FP16 value; 2^-25 becomes 0 and 2^-24 stays."""
    x = torch.tensor([1 / 3, 2.0**-24, 2.0**-26, 65519.0, 65520.0], requires_grad=True)
    y = round_to(x, torch.float16)
    assert torch.equal(y, x.half().float())
    assert y.tolist()[1:] == [2.0**-24, 0.0, 65504.0, torch.inf]
    y.backward(torch.tensor([1 / 3, 2.0**-26, 1e6, 1.0, 1.0]))
    assert x.grad.tolist() == [torch.tensor(1 / 3).half().item(), 0.0, torch.inf, 1.0, 1.0]


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_what_a_model_keeps_out_of_autocast_is_fp32(device_type: str) -> None:
    """Inside of `torch.autocast(enabled=False)`, as around attention, nothing is rounded; after it everything is."""
    large = torch.full((2, 2), 250.0)
    # The outermost says nothing of what is inside.
    with torch.autocast("cpu", enabled=False), EmulatedPrecision():
        assert (large @ large).isinf().all()
        with torch.autocast(device_type, enabled=False):
            assert (large @ large).isfinite().all()
            with EmulatedPrecision():
                assert (large @ large).isinf().all()
        assert (large @ large).isinf().all()


class TwoStages(nn.Module):
    """A network whose second stage is recomputed in backward when `recompute`."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.recompute = nn.Linear(8, 8), nn.Linear(8, 8), recompute

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return checkpoint(self.second, x, use_reentrant=False) if self.recompute else self.second(x)


class BareFunction(nn.Module):
    """A network that checkpoints a function of tensors, which is in no module."""

    is_reentrant, has_product = False, True

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.weight, self.recompute = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8)), recompute

    def forward(self, x: Tensor) -> Tensor:
        def function(h: Tensor) -> Tensor:
            return (h @ self.weight if self.has_product else h * self.weight[:4]).softmax(-1).exp() * h.pow(
                2
            ).half() + h

        h = self.layer(x)
        return checkpoint(function, h, use_reentrant=self.is_reentrant) if self.recompute else function(h)


class Reentrant(BareFunction):
    """The same by reentrant checkpointing."""

    is_reentrant = True


class WithoutProduct(BareFunction):
    """The same of operators that autocast runs in FP32 alone."""

    has_product = False


def gradients_inside_context(model: nn.Module) -> list[Tensor]:
    remove = ForwardContext(EmulatedPrecision).install(model)
    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    AdvancedGradScaler(MixedPrecisionConfig(init_scale=1.0), "cpu").scale(model(x).square().sum()).backward()
    remove()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return gradients


def test_gradient_checkpointing_recomputes_in_the_same_precision() -> None:
    """What is recomputed in backward is emulated too: gradients equal those without checkpointing."""
    for network in (TwoStages, BareFunction, Reentrant, WithoutProduct):
        plain, recomputed = (gradients_inside_context(network(flag)) for flag in (False, True))
        for a, b in zip(plain, recomputed, strict=True):
            assert torch.equal(a, b)
        assert not EmulatedPrecision.is_entered()


class Scaled(torch.autograd.Function):
    """A product whose backward autocasts as its forward did."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight.T, x.T @ gradient


class OwnFunction(nn.Module):
    """A layer, and a product in an autograd function, or in none."""

    def __init__(self, in_function: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.weight, self.in_function = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8)), in_function

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return Scaled.apply(h, self.weight) if self.in_function else h @ self.weight


@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_functions_written_for_cuda_autocast_in_backward() -> None:
    """The backward of `custom_bwd` casts its operands to half precision; gradients are those of the same product without it."""
    for a, b in zip(*(gradients_inside_context(OwnFunction(flag)) for flag in (False, True)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_transforms_of_torch_func_round_as_backward_does() -> None:
    """Gradients by example, and a directional derivative as consistency models take it, are those of one backward each."""
    model = TwoStages(recompute=False)
    x, direction = torch.linspace(-1, 1, 32).reshape(4, 8), torch.ones(4, 8)

    def loss(x: Tensor) -> Tensor:
        return model(x).square().sum()

    ForwardContext(EmulatedPrecision).install(model)
    one_by_one = torch.stack([torch.autograd.functional.jacobian(loss, row) for row in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), one_by_one, rtol=0, atol=1e-3)
    value, slope = torch.func.jvp(loss, (x,), (direction,))
    assert value == loss(x)
    assert slope.item() == pytest.approx((one_by_one * direction).sum().item(), rel=1e-2)


def test_compiled_model_rounds_as_the_eager_one() -> None:
    """Inductor, which drops casts to FP16 and back, does not drop ours."""
    eager = TwoStages(recompute=False)
    ForwardContext(EmulatedPrecision).install(eager)
    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    compiled = torch.compile(eager)
    assert torch.allclose(compiled(x), eager(x), rtol=0, atol=1e-6)
    assert not compiled(x * 1e6).isfinite().all()


def test_exception_leaves_the_context_clean() -> None:
    """After a forward pass that raised, nothing outside of the model is rounded."""
    model = TwoStages(recompute=False)
    ForwardContext(EmulatedPrecision).install(model)
    with pytest.raises(RuntimeError):
        model(torch.ones(4, 5))
    a = torch.full((2, 1), 300.0)
    assert (a @ a.T).isfinite().all()


def test_removal_leaves_no_hook() -> None:
    """After removal a module has the hooks it had before, and computes in FP32."""
    model = TwoStages(recompute=False)
    x = torch.ones(2, 8) / 3
    expected = model(x)
    remove = ForwardContext(EmulatedPrecision).install(model)
    assert not torch.equal(model(x), expected)
    remove()
    assert torch.equal(model(x), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_copies_are_emulated_on_their_own() -> None:
    """A deep copy computes as its original does, also after that one's removal; an unpickled one in FP32."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    remove = ForwardContext(EmulatedPrecision).install(model)
    x = torch.ones(2, 8) / 3
    expected = model(x)
    twin, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    remove()
    assert torch.equal(twin(x), expected)
    assert not torch.equal(model(x), expected)
    assert torch.equal(unpickled(x), model(x))


# ---- FP16 parameters --------------------------------------------------------------------------------------------


def test_half_model_is_close_to_real_half_forward_and_backward() -> None:
    """A GPT-2 with FP16 parameters: losses and gradients agree with the CPU's half kernels, gradients are FP16."""
    model, tokens = tiny_gpt2("gelu_new").half(), torch.arange(16)[None]
    results = {}
    for name, context in (("real", torch.autocast("cpu", torch.float16)), ("emulated", EmulatedPrecision())):
        model.zero_grad()
        with context:
            output = model(input_ids=tokens, labels=tokens)
        (output.loss * 1024).backward()
        assert output.logits.dtype == torch.float16
        assert {p.grad.dtype for p in model.parameters()} == {torch.float16}
        results[name] = (output.loss.item(), torch.cat([p.grad.float().flatten() for p in model.parameters()]))
    assert results["emulated"][0] == pytest.approx(results["real"][0], rel=2e-3)
    real, emulated = results["real"][1], results["emulated"][1]
    assert (real - emulated).norm() < 0.02 * real.norm()


def test_half_operands_of_what_autocast_runs_in_fp32() -> None:
    """Normalisation and losses take FP16 and FP32 mixed, compute in FP32 and give FP32, as under autocast on CUDA."""
    half, wide = torch.randn(4, 8, dtype=torch.float16), torch.randn(8)
    with EmulatedPrecision():
        normalised = nn.functional.layer_norm(half, (8,), wide, wide.half())
        loss = nn.functional.cross_entropy(half, torch.tensor([0, 1, 2, 3]))
    assert normalised.dtype == loss.dtype == torch.float32
    assert torch.equal(normalised, nn.functional.layer_norm(half.float(), (8,), wide, wide.half().float()))
    # PyTorch asks for its inner log-softmax in the dtype of the logits; what follows is FP32.
    rounded = half.float().log_softmax(-1).half().float()
    assert torch.equal(loss, nn.functional.nll_loss(rounded, torch.tensor([0, 1, 2, 3])))


def test_products_of_half_operands_are_rounded_once() -> None:
    """FP16 operands, mixed with FP32 or not, give FP16: the FP32 product rounded; beyond 65504 it is inf."""
    half, wide = torch.randn(4, 4, dtype=torch.float16), torch.randn(4, 4)
    with EmulatedPrecision():
        mixed, pure = wide @ half, half @ half
        beyond = (half * 0 + 250) @ (half * 0 + 250)
    assert torch.equal(mixed, (wide.half().float() @ half.float()).half())
    assert torch.equal(pure, (half.float() @ half.float()).half())
    assert beyond.isinf().all()


def test_fp32_context_takes_half_parameters() -> None:
    """An FP32 context, which a fallback enters, computes in FP32 also from FP16 weights."""
    layer = nn.Linear(4, 4).half()
    x = torch.randn(2, 4) * 1e4
    with EmulatedPrecision(FP32_FORMAT):
        y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, nn.functional.linear(x, layer.weight.float(), layer.bias.float()))


def test_fp32_context_looks_up_half_weights_in_fp32() -> None:
    """What is looked up in an FP16 embedding is FP32 there, so that a product after it may leave FP16's range."""
    embedding = nn.Embedding(4, 4).half()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), EmulatedPrecision(FP32_FORMAT):
            looked_up = embedding(torch.arange(4))
        assert looked_up.dtype == torch.float32
        assert torch.equal(looked_up, embedding.weight.float())
    assert embedding(torch.arange(4)).dtype == torch.float16


class InterruptedOnce(nn.Module):
    """Raises what Ctrl-C raises in its first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.interrupted = nn.Linear(8, 8), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt
        return self.inner(x)


def test_an_interrupted_forward_pass_is_left_at_the_next_step() -> None:
    """After Ctrl-C in a forward pass, as in a notebook, nothing outside of the model stays rounded or in FP32."""
    model = nn.Sequential(InterruptedOnce())
    outer = ForwardContext(EmulatedPrecision).install(model)
    inner = InnerForwardContext(lambda: EmulatedPrecision(FP32_FORMAT)).install(model[0])
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 8))
    model(torch.ones(2, 8))
    ForwardContext.leave_interrupted()
    a = torch.full((2, 1), 300.0)
    assert (a @ a.T).isfinite().all()
    with EmulatedPrecision():
        assert (a @ a.T).isinf().all()
    inner()
    x = torch.ones(2, 8) / 3
    rounded = model(x)
    outer()
    assert not torch.equal(rounded, model(x))


# ---- what is computed between matrix products -------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("where", ["values", "scores"])
def test_attention_of_torch_overflows_inside(need_weights: bool, where: str) -> None:
    """`nn.MultiheadAttention` with values or scores beyond 65504, and weights in it: as with the CPU's half kernels."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True, bias=False)
    with torch.no_grad():
        if where == "values":
            attention.in_proj_weight[32:].mul_(1e5)
            attention.out_proj.weight.mul_(1e-5)
        else:
            attention.in_proj_weight[:32].mul_(2000.0)
    x = torch.randn(2, 5, 16) * 3
    finite = {}
    for name, context in (("real", torch.autocast("cpu", torch.float16)), ("emulated", EmulatedPrecision())):
        with context:
            finite[name] = attention(x, x, x, need_weights=need_weights)[0].isfinite().all().item()
    if where == "values" or need_weights:  # a fused kernel keeps scores in FP32
        assert not finite["emulated"]
    assert finite["emulated"] == finite["real"] or (where == "scores" and not need_weights)


def test_inference_of_a_half_encoder_overflows_where_training_does() -> None:
    """Without gradients PyTorch takes one operator for a whole layer; its hidden values are half precision all the same."""
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(2, 5, 16)
    for wide, narrow in (
        ("linear1.weight", "linear2.weight"),
        ("self_attn.in_proj_weight", "self_attn.out_proj.weight"),
    ):
        large = copy.deepcopy(layer)
        large.get_parameter(wide).data.mul_(1.5e5)
        large.get_parameter(narrow).data.mul_(1e-3)
        for model, finite in ((copy.deepcopy(layer).half(), True), (large.half(), False)):
            for with_gradients in (False, True):
                with torch.set_grad_enabled(with_gradients), hf_amp.emulate(torch.float16, autocast=False):
                    assert bool(model(x.half()).isfinite().all()) == finite, (wide, with_gradients)


def test_sums_of_half_precision_overflow() -> None:
    """Two convolutions of 4e4 each, added before a norm, are inf, as with the CPU's half kernels; so is a gated product."""
    a, b, norm = nn.Conv1d(1, 8, 1), nn.Conv1d(1, 8, 1), nn.GroupNorm(1, 8)
    for layer in (a, b):
        nn.init.constant_(layer.weight, 4e4)
    x = torch.ones(2, 1, 4)
    for context in (EmulatedPrecision(), torch.autocast("cpu", torch.float16)):
        with context:
            assert not norm(a(x) + b(x)).isfinite().all()
            assert not (a(x) * b(x)).isfinite().all()
    with hf_amp.emulate(torch.bfloat16):
        assert norm(a(x) + b(x)).isfinite().all()


def test_a_model_of_half_precision_keeps_nothing_in_fp32() -> None:
    """With `autocast=False` a square, a sum and a norm's input are half precision; products of half and FP32 are an error."""
    half, steps = torch.full((4, 300), 300.0, dtype=torch.float16), torch.linspace(0.01, 4, 1000).half()
    with hf_amp.emulate(torch.float16, autocast=False):
        assert not torch.is_autocast_enabled("cpu")
        assert half.pow(2).isinf().all()
        assert half.sum().isinf()
        assert half.mean() == 300.0  # one kernel, FP32 inside
        for x in steps.split(5):  # of so few, a CPU's kernels round on the way
            assert torch.equal(x.rsqrt(), x.float().rsqrt().half())
            assert torch.equal(x.erf(), x.float().erf().half())
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                assert torch.equal(leaf.rsqrt(), x.float().rsqrt().half())
        small = torch.tensor([5e-4], dtype=torch.float16, requires_grad=True)
        assert torch.autograd.grad(small.rsqrt(), small)[0].isinf()  # a step of it is result³
        assert (half @ half.T * 0 + 1).isnan().all()
        with pytest.raises(RuntimeError, match="dtype"):
            half @ torch.ones(300, 2)
        with pytest.raises(RuntimeError, match="aten::layer_norm raises on a device where dtypes differ"):
            nn.functional.layer_norm(half, (300,), torch.ones(300))
        with pytest.raises(RuntimeError, match="aten::group_norm raises"):
            nn.functional.group_norm(half, 2, torch.ones(300))
    with hf_amp.emulate(torch.float16):
        assert half.pow(2).eq(90000.0).all()
        assert half.sum() == 300.0 * 1200


def test_sums_in_backward_of_half_models_are_in_fp32() -> None:
    """Of 4,096 rows into one: within a unit of the last place of FP32's, as CUDA's kernels, and no inf on the way."""
    x, rows = torch.randn(4096, 8).half(), torch.zeros(4096, dtype=torch.long)
    image, of_unfold = torch.randn(1, 1, 8, 8).half(), torch.randn(1, 9, 36).half()
    cases = {
        "embedding": (lambda w: nn.functional.embedding(rows, w), torch.randn(1, 8).half(), x),
        "embedding bag": (lambda w: nn.functional.embedding_bag(rows[:, None], w), torch.randn(1, 8).half(), x),
        "layer norm": (lambda w: nn.functional.layer_norm(x.to(w), (8,), w, w), torch.randn(8).half(), x),
        "unfold": (lambda w: nn.functional.unfold(w, 3), image, of_unfold),
    }
    for name, (function, operand, gradient) in cases.items():
        found = []
        for dtype in (torch.float16, torch.float32):
            leaf = operand.to(dtype).requires_grad_()
            with hf_amp.emulate(torch.float16, autocast=False):
                result = function(leaf)
            found.append(torch.autograd.grad(result, leaf, gradient.to(dtype))[0])
        half, exact = found
        assert half.dtype == torch.float16
        units = 2.0 ** exact.abs().log2().floor() * torch.finfo(torch.float16).eps
        assert ((half.float() - exact).abs() <= units).all(), name


def test_what_no_device_does_is_an_error() -> None:
    """Of a dtype that cannot be emulated, with those that can; of a loss that raises under autocast on a device."""
    with pytest.raises(hf_amp.ConfigError, match=r"emulate\(torch.float32\): .* torch.float16"):
        hf_amp.emulate(torch.float32)
    with hf_amp.emulate(), pytest.raises(RuntimeError, match="binary_cross_entropy_with_logits"):
        nn.functional.binary_cross_entropy(torch.rand(2), torch.rand(2))
    half = torch.randn(4, 4).half()
    for context, matrix in ((cuda_rules(torch.float16), OnDevice(half)), (hf_amp.emulate(), half)):
        with context, pytest.raises(RuntimeError, match="Low precision dtypes not supported"):
            torch.linalg.matrix_norm(matrix, 2)
    other, wide = torch.ones(2, dtype=torch.bfloat16), torch.ones(2)
    for operands, dtype in (((other, other, other), None), ((wide, other, other), torch.float32)):
        for context, moved in ((cuda_rules(torch.float16), OnDevice), (hf_amp.emulate(), Tensor.clone)):
            with context, nullcontext() if dtype else pytest.raises(RuntimeError, match=r"Unexpected|addcmul raises"):
                assert torch.addcmul(*map(moved, operands)).dtype == dtype


def test_recurrent_networks_have_half_precision_states() -> None:
    """LSTM, GRU and RNN, also of packed sequences: states are half precision, and overflow as such."""
    x = torch.randn(5, 2, 4)
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        network = kind(4, 6, num_layers=2, bidirectional=True)
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
        with EmulatedPrecision():
            out, _ = network(x)
            of_packed, _ = network(packed)
        assert out.dtype == of_packed.data.dtype == torch.float16
        assert (out.float() - network(x)[0]).abs().max() < 1e-2
        out.sum().backward()
        assert all(p.grad.isfinite().all() for p in network.parameters())


def test_models_are_told_that_autocast_is_on() -> None:
    """Inside of the context `torch.is_autocast_enabled` says so, for a CPU and for CUDA; after it, what it said before."""
    with torch.autocast("cpu", torch.bfloat16):
        with EmulatedPrecision():
            assert torch.is_autocast_enabled("cpu")
            assert torch.is_autocast_enabled()
            assert torch.get_autocast_dtype("cpu") == torch.float16
            with torch.autocast("cpu", torch.bfloat16):
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled()


_OTHER_PACKAGE = """
import torch

library = torch.library.Library("other_package", "DEF")
library.define("double(Tensor x, Tensor factor) -> Tensor")
library.impl("double", lambda x, factor: x * factor + 2.0**-12, "CompositeExplicitAutograd")
library.define("double_(Tensor(a!) x) -> ()")
library.impl("double_", lambda x: (x.mul_(2), None)[1], "CompositeExplicitAutograd")
for name in ("double", "double_", "not_defined"):
    library.impl(name, lambda x, factor=None: x, "AutocastCUDA")

import hf_amp

x, factor = torch.ones(3, dtype=torch.float16), torch.full((3,), 2.0)
for context in (hf_amp.emulate(), hf_amp.emulate()):
    with context:
        y = torch.ops.other_package.double(x, factor)
        z = torch.ops.other_package.double(x.float(), factor)
assert y.dtype == torch.float16 and z.dtype == torch.float32, (y.dtype, z.dtype)
assert y.eq(2).all() and z.gt(2).all()
with hf_amp.emulate():
    torch.ops.other_package.double_(y)
assert y.eq(4).all()
"""


def test_operators_of_other_packages_that_autocast_knows() -> None:
    """torchvision registers its own with autocast: they compute in FP32, and give the dtype that they were given.

    One that writes into its argument does so; one that is not defined is passed by.
    """
    done = subprocess.run([sys.executable, "-c", _OTHER_PACKAGE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@for_each(
    ("transform", "dtype", "fits", "not_of"),
    [
        (lambda x: torch.fft.rfft(x[:, :8]), torch.float16, True, ""),
        (lambda x: torch.fft.rfft(x), torch.float16, False, "[12]"),
        (lambda x: torch.fft.rfft(x, n=16), torch.float16, True, ""),
        (lambda x: torch.fft.fft2(x), torch.float16, False, "[4, 12]"),
        (lambda x: torch.fft.fftn(x, s=(4, 8)), torch.float16, True, ""),
        (lambda x: torch.fft.rfftn(x, dim=(0,)), torch.float16, True, ""),
        (lambda x: torch.fft.rfft2(x[:, :8], s=(8, -1)), torch.float16, True, ""),
        (lambda x: torch.fft.rfft2(x, s=(8, -1)), torch.float16, False, "[8, 12]"),
        (lambda x: torch.fft.irfft(torch.fft.rfft(x[:, :8]), n=12), torch.float16, False, "[12]"),
        (lambda x: torch.fft.rfft(x.float()), torch.float16, True, ""),
        (lambda x: torch.fft.rfft(x[:, :8]), torch.bfloat16, False, "Unsupported dtype BFloat16"),
        (lambda x: torch.view_as_real(torch.stft(x, 8, window=x[0, :8], return_complex=True)), torch.float16, True, ""),
        (lambda x: torch.stft(x, 6, window=x[0, :6], return_complex=True), torch.float16, False, "[6]"),
    ],
)
def test_signals_are_as_long_as_a_device_takes_them(
    transform: Callable[[Tensor], Tensor], dtype: torch.dtype, fits: bool, not_of: str
) -> None:
    """FP16 signals of a power of two alone, and none of BF16, raise as they do on a device, with what to do."""
    with hf_amp.emulate(dtype):
        x = nn.functional.linear(torch.randn(4, 8), torch.randn(12, 8))
        with nullcontext() if fits else pytest.raises(RuntimeError, match=re.escape(not_of)):
            assert transform(x).isfinite().all()


def test_operators_of_higher_order() -> None:
    """`flex_attention` and `torch.cond` run inside of the context, with half precision in what they call."""
    q, layer = torch.randn(1, 2, 16, 16).half(), nn.Linear(8, 8)
    with torch.no_grad(), hf_amp.emulate(torch.float16, autocast=False):
        attended = torch.compile(flex_attention, backend="eager")(q, q, q)
    expected = nn.functional.scaled_dot_product_attention(q.float(), q.float(), q.float())
    torch.testing.assert_close(attended.float(), expected, rtol=5e-3, atol=5e-3)
    with hf_amp.emulate():
        y = torch.cond(torch.tensor(True), lambda x: layer(x), lambda x: layer(-x), (torch.ones(2, 8),))
    assert y.dtype == torch.float16
