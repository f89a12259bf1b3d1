"""FP16 or BF16 on a machine without units for it: FP32 arithmetic rounded to the format around every matrix product.

What autocast would run in half precision runs in FP32 on operands rounded to the format, and its result is rounded
too, forward and backward: values beyond 65504 become inf and values below 2^-25 become 0, where real FP16 has them.
What is computed between two matrix products stays in FP32: an activation function of many elementwise operations (GPT-2's
`gelu_new`) loses a little more to underflow in real FP16, at scales where most of the gradient is lost already.

Where parameters are FP16 (or BF16) themselves, what is computed from them is FP16 as well, also between two matrix
products, and what autocast runs in FP32 does so from FP16 operands: as on a device that runs FP16.
"""

from __future__ import annotations

import math
import threading
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_amp.precision import FP16_FORMAT, HALF_DTYPES, NumberFormat, upcast
from hf_amp.tree import map_tensors

# Source: PyTorch documentation, "Autocast Op Reference", ops that can autocast to float16, as Python sees them.
_REDUCED_PRECISION_FUNCTIONS = frozenset(
    [
        F.linear, F.bilinear, F.scaled_dot_product_attention, F.multi_head_attention_forward,
        torch.conv1d, torch.conv2d, torch.conv3d,  # those of torch.nn.functional are the same objects
        torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d, torch.convolution,
        torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.addmv, torch.addr, torch.addbmm,
        torch.baddbmm, torch.chain_matmul, torch.linalg.multi_dot, torch.einsum,
        torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu,
        torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell, torch.prelu,
        Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.mv,
        Tensor.addmm, Tensor.addmv, Tensor.addr, Tensor.addbmm, Tensor.baddbmm,
    ]
)  # fmt: skip

# Source: the same page, ops that autocast to float32 on CUDA; of them those that Python code calls by these names.
_FULL_PRECISION_FUNCTIONS = frozenset(
    [
        F.layer_norm, F.group_norm, F.rms_norm, F.softmax, F.log_softmax, F.softmin, F.softplus, F.cosine_similarity,
        F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div, F.soft_margin_loss,
        F.binary_cross_entropy_with_logits, F.cosine_embedding_loss, F.hinge_embedding_loss, F.margin_ranking_loss,
        F.multilabel_margin_loss, F.multi_margin_loss, F.triplet_margin_loss, F.poisson_nll_loss, F.pdist,
        torch.softmax, torch.log_softmax, torch.exp, torch.expm1, torch.log, torch.log10, torch.log1p, torch.log2,
        torch.pow, torch.rsqrt, torch.reciprocal, torch.sum, torch.prod, torch.cumsum, torch.cumprod, torch.norm,
        torch.cdist, torch.dist, torch.renorm, torch.acos, torch.asin, torch.cosh, torch.sinh, torch.tan,
        torch.erfinv, torch.layer_norm, torch.group_norm, torch.rms_norm,
        Tensor.softmax, Tensor.log_softmax, Tensor.exp, Tensor.expm1, Tensor.log, Tensor.log10, Tensor.log1p, Tensor.log2,
        Tensor.pow, Tensor.__pow__, Tensor.__rpow__, Tensor.rsqrt, Tensor.reciprocal, Tensor.sum, Tensor.prod,
        Tensor.cumsum, Tensor.cumprod, Tensor.norm, Tensor.dist, Tensor.renorm, Tensor.acos, Tensor.asin, Tensor.cosh,
        Tensor.sinh, Tensor.tan, Tensor.erfinv,
    ]
)  # fmt: skip
_WITHOUT_INFINITY = frozenset([torch.float8_e4m3fn])


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest value of `dtype`; inf beyond its largest, also in a format without infinity, where casts saturate."""
    rounded = x.to(dtype).to(x.dtype)
    if dtype in _WITHOUT_INFINITY:
        facts = torch.finfo(dtype)
        spacing = 2.0 ** math.floor(math.log2(facts.max)) * facts.eps
        rounded = torch.where(x.abs() < facts.max + spacing / 2, rounded, x * math.inf)
    return rounded


_LIBRARY = torch.library.Library("hf_amp", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("round_to(Tensor x, ScalarType dtype) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl(  # type: ignore[no-untyped-call]
    "round_to", _rounded, "CompositeExplicitAutograd"
)
torch.library.register_fake("hf_amp::round_to", lambda x, _dtype: torch.empty_like(x), lib=_LIBRARY)
torch.library.register_autograd(
    "hf_amp::round_to",
    lambda ctx, gradient: (torch.ops.hf_amp.round_to(gradient, ctx.dtype), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "dtype", inputs[1]),
    lib=_LIBRARY,
)


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x`, and in backward its gradient, rounded to the nearest value of `dtype`; shape and dtype stay.

    Under `torch.compile` an opaque operator does it, because Inductor removes a cast to FP16 and back; and to a format without
    infinity, whose casts are not their own derivative.
    """
    if torch.compiler.is_compiling() or dtype in _WITHOUT_INFINITY:
        return cast(Tensor, torch.ops.hf_amp.round_to(x, dtype))
    return _rounded(x, dtype)  # autograd casts gradients there and back as well, also those of torch.func


class EmulatedPrecision(TorchFunctionMode):
    """Context in which the functions that autocast runs in half precision run as emulated `number_format`.

    Contexts nest as autocast does: the innermost one alone acts. In FP32's nothing is rounded, and neither is what runs
    inside of `torch.autocast(..., enabled=False)`, where models keep what FP16 does not hold.
    """

    _innermost: ClassVar[threading.local] = threading.local()  # DataParallel calls replicas from several threads

    def __init__(self, number_format: NumberFormat = FP16_FORMAT) -> None:
        super().__init__()
        self.number_format = number_format
        self._outer: EmulatedPrecision | None = None
        self._autocasts_around = 0.0

    def __enter__(self) -> EmulatedPrecision:
        self._outer = getattr(self._innermost, "mode", None)
        self._innermost.mode = self
        self._autocasts_around = _entered_autocasts()
        return cast(EmulatedPrecision, super().__enter__())  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        self._innermost.mode = self._outer
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    @classmethod
    def is_entered(cls) -> bool:
        """Whether this thread is inside of any."""
        return getattr(cls._innermost, "mode", None) is not None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        rounds, widens = func in _REDUCED_PRECISION_FUNCTIONS, func in _FULL_PRECISION_FUNCTIONS
        # `out=` is how compiled code, which rounds by itself, calls kernels.
        if (
            not (rounds or widens)
            or getattr(self._innermost, "mode", self) is not self
            or kwargs.get("out") is not None
        ):
            return func(*args, **kwargs)
        half = _holds_half(args) or _holds_half(tuple(kwargs.values()))
        rounds = rounds and self.number_format.dtype != torch.float32 and not self._is_switched_off()
        if not (rounds or half):
            return func(*args, **kwargs)
        convert = self._round if rounds else upcast
        converted = {name: map_tensors(convert, value) for name, value in kwargs.items()}
        result = func(*map_tensors(convert, args), **converted)
        if not rounds:
            return result
        return map_tensors(self._downcast if half else self._round, result)

    def _is_switched_off(self) -> bool:
        """Whether autocast was disabled since this context was entered. Not seen in compiled code."""
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        return _entered_autocasts() > self._autocasts_around

    def _round(self, x: Tensor) -> Tensor:
        """An operand or result as the format has it, in FP32. Autocast leaves FP64 and integers alone, and so does this."""
        x = upcast(x)
        return round_to(x, self.number_format.dtype) if x.dtype == torch.float32 else x

    def _downcast(self, x: Tensor) -> Tensor:
        return x.to(self.number_format.dtype) if x.dtype == torch.float32 else x


def _entered_autocasts() -> float:
    """How many `torch.autocast` this thread is inside of; in compiled code, which does not count them, no end of them."""
    if torch.compiler.is_compiling():
        return math.inf
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _holds_half(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dtype in HALF_DTYPES
    return isinstance(value, (list, tuple)) and any(map(_holds_half, value))
