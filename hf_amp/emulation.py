"""FP16 or BF16 on a machine without units for it: what CUDA's autocast does, and what half-precision tensors do, on a CPU.

Autocast's casts are those of CUDA, operator by operator: to the format, to FP32, to the widest, or none. Tensors between
operators are half-precision tensors, which the CPU's elementwise kernels compute as a device does: in FP32, rounded once.
Matrix products, which a CPU without units for the format computes slowly, run in FP32 on operands that hold values of the
format, and their results are rounded to it; the same in backward. So values beyond 65504 become inf, and values below 2^-25
become 0, where they do on a device.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from hf_amp.errors import ConfigError
from hf_amp.patch_log import compile_disabled, is_one_graph
from hf_amp.precision import EMULATED_FORMATS, FP16_FORMAT, FP32_FORMAT, HALF_DTYPES, NumberFormat, upcast
from hf_amp.tree import map_tensors, tensors_of

# Source: aten/src/ATen/autocast_mode.h of PyTorch, AT_FORALL_LOWER_PRECISION_FP.
_REDUCED = [
    "_convolution", "_convolution.deprecated", "_scaled_dot_product_flash_attention", "addbmm", "addmm", "addmv",
    "addr", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d.input",
    "conv_transpose3d.input", "convolution", "mm", "mv", "prelu", "scaled_dot_product_attention",
]  # fmt: skip
# The same list, and cuDNN's: what is made of others, which run as these do without autocast, as inside of it on CUDA.
_COMPOSITE = [
    "chain_matmul", "einsum", "gru.data", "gru.input", "gru_cell", "linalg_multi_dot", "linalg_vecdot", "linear",
    "lstm.data", "lstm.input", "lstm_cell", "matmul", "rnn_relu.data", "rnn_relu.input", "rnn_relu_cell",
    "rnn_tanh.data", "rnn_tanh.input", "rnn_tanh_cell",
]  # fmt: skip
# Source: the same file, AT_FORALL_PROMOTE; but for these and those above, what autocast knows runs in FP32.
_PROMOTED = [
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "grid_sampler", "index_put", "scatter_add",
    "tensordot", "vdot",
]  # fmt: skip
# What the CPU's half kernels round on the way, or what it has none for, beside transforms of Fourier: FP32, rounded once.
# Source: a comparison of the operators in PyTorch's OpInfo that have half kernels for CPUs, but for products and linear algebra.
_WITHOUT_HALF = {"both": [
    "_adaptive_avg_pool3d", "_fft_c2c", "_fft_c2r", "_fft_r2c", "_log_softmax", "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa", "addr", "avg_pool3d", "col2im", "fft_hfft2", "fft_hfftn", "fft_ihfft2", "fft_ihfftn",
    "grid_sampler_2d", "grid_sampler_3d", "logit", "mean", "mean.dim", "multi_margin_loss", "multilabel_margin_loss",
    "nll_loss", "round.decimals", "rrelu", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d",
]}  # fmt: skip
# The same; the derivative is made of operators, in half precision on CUDA too, where a step of it may overflow.
_WITHOUT_HALF["result"] = ["erf", "polygamma", "prod", "prod.dim_int", "rsqrt"]
# Whose derivative sums in half precision there, and in FP32 on CUDA: the same, where gradients are on. Source: EmbeddingBag.cu,
# EmbeddingBackwardKernel.cu, ActivationGluKernel.cu, im2col.cuh and layer_norm_kernel.cu of aten/src/ATen/native/cuda.
_WITHOUT_HALF["backward"] = ["embedding", "embedding_bag", "embedding_bag.padding_idx", "glu", "im2col", "layer_norm"]
_WITHOUT_INFINITY = frozenset([torch.float8_e4m3fn])


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest value of `dtype`; inf beyond its largest, also in a format without infinity, where casts saturate."""
    rounded = x.to(dtype).to(x.dtype)
    if dtype in _WITHOUT_INFINITY:
        facts = torch.finfo(dtype)
        spacing = 2.0 ** math.floor(math.log2(facts.max)) * facts.eps
        return torch.where(x.abs() < facts.max + spacing / 2, rounded, x * math.inf)
    return rounded


_LIBRARY = torch.library.Library("hf_amp", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("round_to(Tensor x, ScalarType dtype) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("round_to", _rounded, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
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
    if dtype in _WITHOUT_INFINITY or _is_traced():
        return cast(Tensor, torch.ops.hf_amp.round_to(x, dtype))
    return _rounded(x, dtype)  # autograd casts gradients there and back as well, also those of torch.func


class EmulatedPrecision:
    """Context in which tensors of this thread compute as under autocast to `number_format` on CUDA.

    Contexts nest as autocast does: the innermost acts, `torch.autocast(..., enabled=False)` inside of it switches it off, and
    `torch.is_autocast_enabled` says that it is on. In FP32's nothing is rounded, and half-precision operands, which no kernel
    mixes with FP32, are cast to FP32. FP8 is rounded to around products alone: no device computes in it between them.

    Args:
        number_format: the format to which autocast casts.
        autocast: False for no casts at all, as where a model is half precision itself: its tensors compute as they do on a
            device, matrix products included.
        casts_mixed: with `autocast=False`, what takes both dtypes casts to the format, where a device raises an error.
    """

    _of_thread: ClassVar[threading.local] = threading.local()  # DataParallel calls replicas from several threads

    def __init__(
        self, number_format: NumberFormat = FP16_FORMAT, autocast: bool = True, casts_mixed: bool = False
    ) -> None:
        self.number_format = number_format
        self._casts_mixed = casts_mixed
        self.autocasts = autocast and number_format.dtype != torch.float32
        self._outer: list[Any] = []
        self._trace: Any = None
        self._records_gradients = False
        self._cast_weights: dict[tuple[int, bool], tuple[Tensor, int, Tensor]] = {}

    def __enter__(self) -> EmulatedPrecision:
        if torch.compiler.is_compiling() and is_one_graph() and _is_allowed_in_graph():
            _enter_in_graph(self.number_format.dtype, self.autocasts, self._casts_mixed)
        else:
            self._enter_eagerly()
        return self

    def __exit__(self, *exception: Any) -> None:
        if torch.compiler.is_compiling() and is_one_graph() and _is_allowed_in_graph():
            _leave_in_graph()
        else:
            self._leave_eagerly()

    def _enter(self) -> None:
        _register_kernels()
        trace = torch._guards.TracingContext.try_get()  # of torch.compile, which this is called from
        while (left := self.innermost()) is not None and left._trace is not None and left._trace is not trace:
            left._leave()  # torch.compile gave that trace up, and began anew
        self._trace = trace
        of_thread = self._of_thread.__dict__
        flags = [(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES]
        self._outer.append((of_thread.get("innermost"), flags))
        of_thread["innermost"] = self
        self._records_gradients = torch.is_grad_enabled()
        for device in _DEVICES:
            if self.autocasts:
                torch.set_autocast_dtype(device, _storage(self.number_format.dtype))
            torch.set_autocast_enabled(device, self.autocasts)
        _set_active(True)

    def _leave(self) -> None:
        outer, flags = self._outer.pop()
        self._of_thread.__dict__["innermost"] = outer
        for device, enabled, dtype in flags:
            torch.set_autocast_dtype(device, dtype)
            torch.set_autocast_enabled(device, enabled)
        _set_active(outer is not None)
        self._cast_weights.clear()
        self._trace = None

    _enter_eagerly = compile_disabled(_enter)
    _leave_eagerly = compile_disabled(_leave)

    @classmethod
    def innermost(cls) -> EmulatedPrecision | None:
        """The one that acts in this thread."""
        return cls._of_thread.__dict__.get("innermost")

    @classmethod
    def is_entered(cls) -> bool:
        """Whether this thread is inside of any."""
        return cls.innermost() is not None

    def dtype_in_force(self) -> torch.dtype | None:
        """What autocast casts to here; None where a `torch.autocast` inside of this context has switched it off."""
        if not all(map(torch.is_autocast_enabled, _DEVICES if self.autocasts else _DEVICES[:1])):
            return None
        dtype, own = torch.get_autocast_dtype("cpu"), self.number_format.dtype
        return own if dtype == _storage(own) else dtype

    def dtype_of_mixed(self, args: Any, kwargs: Any) -> torch.dtype | None:
        """The format, where operands of it and of FP32 meet and are to be cast."""
        casts = self._casts_mixed and self.dtype_in_force() is None
        dtypes = {x.dtype for x in tensors_of((args, kwargs))} if casts else set()
        return self.number_format.dtype if {torch.float32, self.number_format.dtype} <= dtypes else None

    def operand(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` as autocast casts it, cached likewise: a parameter that is used twice gathers its gradients in the format."""
        if not _is_cast(x) or x.dtype == dtype:
            return x
        if dtype not in HALF_DTYPES:
            return round_to(upcast(x), dtype)
        if _is_traced():
            return round_to(upcast(x), dtype).to(dtype)
        if not (x.is_leaf and x.requires_grad):
            return x.to(dtype)
        key = id(x), torch.is_grad_enabled()
        of, version, kept = self._cast_weights.get(key, (None, 0, x))
        if of is not x or version != x._version:
            kept = x.to(dtype)
            self._cast_weights[key] = x, x._version, kept
        return kept


def _enter_in_graph(dtype: torch.dtype, autocasts: bool, casts_mixed: bool) -> None:
    """What a graph that may not break calls in place of `__enter__`, while it is traced and when it runs."""
    formats = {each.dtype: each for each in (*EMULATED_FORMATS, FP32_FORMAT)}
    EmulatedPrecision(formats[dtype], autocasts, casts_mixed)._enter()


def _leave_in_graph() -> None:
    cast(EmulatedPrecision, EmulatedPrecision.innermost())._leave()


def _is_allowed_in_graph() -> bool:
    """Called while such a graph is traced, to let it call them."""
    for function in (_enter_in_graph, _leave_in_graph):
        torch.compiler.allow_in_graph(torch.fx.has_side_effect(function))  # type: ignore[no-untyped-call]
    return True


# As `torch.compiler.assume_constant_result`, which loads the compiler.
cast(Any, _is_allowed_in_graph)._dynamo_marked_constant = True


def emulate(dtype: torch.dtype = torch.float16, *, autocast: bool = True) -> EmulatedPrecision:
    """Context in which a model on a CPU computes as on a device with units for `dtype`: `with hf_amp.emulate(torch.float16): ...`

    Backward belongs outside of it, as with autocast. What gradient checkpointing recomputes then, and what a function of
    `custom_bwd` multiplies, is emulated where `AdvancedGradScaler.scale(loss).backward()` runs it. `custom_fwd` of CUDA with
    `cast_inputs` casts no tensor of a CPU.

    Args:
        dtype: torch.float16 or torch.bfloat16; or an FP8 format, to which the operands and results of matrix products are
            rounded, without a scale for each tensor.
        autocast: as inside of `torch.autocast` on CUDA. False for a model whose parameters are of that dtype (`model.half()`),
            which inference runs without autocast.

    Raises:
        ConfigError: another dtype.
    """
    formats = {each.dtype: each for each in EMULATED_FORMATS}
    if dtype not in formats:
        known = ", ".join(map(str, formats))
        raise ConfigError(f"emulate({dtype}): a dtype must be one of {known}; FP32 needs no emulation.")
    return EmulatedPrecision(formats[dtype], autocast)


def in_backward(forward: object) -> AbstractContextManager[Any]:
    """What the backward of a forward pass inside of the context `forward` runs in: no autocast, as on a device.

    But what gradient checkpointing recomputes is emulated, and what a function of `custom_bwd` multiplies is cast, for which
    PyTorch switches autocast on again; for CUDA's it cannot on a CPU.
    """
    if not isinstance(forward, EmulatedPrecision) or not forward.autocasts:
        return nullcontext()
    return EmulatedPrecision(forward.number_format, autocast=False, casts_mixed=True)


def emulated_in_backward(loss: Tensor) -> Tensor:
    """`loss`, whose `backward()` runs `in_backward`: what is recomputed or a function of its own, also outside of modules.

    Only where there was any in this thread since the last call.
    """
    mode = EmulatedPrecision._of_thread.__dict__.pop("recomputed", None)
    if mode is None:
        return loss

    def backward(*args: Any, **kwargs: Any) -> None:
        with in_backward(mode):
            loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    alias = loss.view_as(loss)  # itself would keep itself alive
    alias.backward = backward  # type: ignore[method-assign]
    return alias


def notes_kept() -> Callable[[], None]:
    """What gives this thread's notes for its next `emulated_in_backward` back as they are now."""
    of_thread = EmulatedPrecision._of_thread.__dict__
    return functools.partial(of_thread.update, recomputed=of_thread.get("recomputed"))


_DEVICES = ("cpu", "cuda")  # a model may ask for either whether autocast is on, or switch either off
_ACTIVE = threading.local()


def _storage(dtype: torch.dtype) -> torch.dtype:
    """In what tensors that hold values of `dtype` are kept, where that is what autocast may be told."""
    return dtype if dtype in HALF_DTYPES else torch.bfloat16


def stands_for_half() -> bool:
    """Whether what the running operator stores for backward are FP32 copies of what it would store in half precision on a device."""
    return _ACTIVE.__dict__.get("kernel") == "half"


def _is_cast(x: Tensor) -> bool:
    """Whether autocast casts it: it leaves FP64 and integers alone."""
    return x.is_floating_point() and x.dtype != torch.float64


def _is_asked_for_dtype(args: Any, kwargs: Any) -> bool:
    return any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))


def _holds_half(args: Any, kwargs: Any) -> bool:
    return any(x.dtype in HALF_DTYPES for x in tensors_of((args, kwargs)))


class _Kernel:
    """What one operator does inside of the context."""

    def __init__(self, operator: Any, policy: Callable[..., Any] | None, lacks: str) -> None:
        self._operator, self.schema = operator, operator._schema
        self._lacks = lacks  # a kernel of half precision: "", "both", "result" or "backward"
        self._in_fp32 = _attention if operator is torch.ops.aten.scaled_dot_product_attention.default else operator
        self._policy = policy

    def __call__(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        mode = EmulatedPrecision.innermost()
        if mode is None or self._policy is None or _ACTIVE.__dict__.get("kernel"):
            return self.plain(keyset, args, kwargs)
        _note_recomputation(mode)
        return self._policy(self, mode, keyset, args, kwargs)

    def plain(self, keyset: Any, args: Any, kwargs: Any) -> Any:
        """The operator as it is; what it is made of is emulated."""
        return self._operator.redispatch(keyset & _REGISTERED[1], *args, **kwargs)

    def opened(self, mode: EmulatedPrecision, keyset: Any, args: Any, kwargs: Any) -> Any:
        """The same without autocast in it, which FP8 alone needs there; what has been cast to half precision stays so, in FP32 too."""
        on, former = torch.is_autocast_enabled("cpu"), _ACTIVE.__dict__.get("opened", False)
        _ACTIVE.opened = former or mode.dtype_in_force() in HALF_DTYPES
        torch.set_autocast_enabled("cpu", on and not _ACTIVE.opened)
        try:
            return self.plain(keyset, args, kwargs)
        finally:
            torch.set_autocast_enabled("cpu", on)
            _ACTIVE.opened = former

    def alone(self, convert: Callable[[Tensor], Tensor], args: Any, kwargs: Any, kernel: str = "FP32") -> Any:
        """The operator on converted tensors; nothing in it is emulated. Also not where torch.func calls it again, layer by layer."""
        args, kwargs = map_tensors(convert, args), map_tensors(convert, kwargs)
        _ACTIVE.kernel = kernel
        try:
            with torch._C._DisableAutocast():
                return self._in_fp32(*args, **kwargs)
        finally:
            _ACTIVE.kernel = ""

    def half_if_lacking(self, mode: EmulatedPrecision, keyset: Any, args: Any, kwargs: Any) -> Any:
        records = torch.is_grad_enabled()
        lacks = self._lacks in ("both", "backward" if records else "result")
        result = (self.half if lacks else self.plain)(keyset, args, kwargs)
        if self._lacks == "result" and records and _holds_half(args, kwargs) and not _is_traced():
            with torch.no_grad():
                result.data.copy_(self.half(keyset, args, kwargs))
        widens = self._lacks and _widens(mode, args, kwargs) and not _is_asked_for_dtype(args, kwargs)
        return map_tensors(upcast, result) if widens else result  # an embedding, without a copy of its weight

    def half(self, keyset: Any, args: Any, kwargs: Any) -> Any:
        """Half-precision tensors without autocast: the FP32 result, rounded; anything else as it is."""
        dtypes = {x.dtype for x in tensors_of((args, kwargs)) if _is_cast(x)}
        if len(dtypes) != 1 or not dtypes <= set(HALF_DTYPES) or _is_asked_for_dtype(args, kwargs):
            return self.plain(keyset, args, kwargs)
        return _to(self.alone(upcast, args, kwargs, "half"), dtypes.pop())


def _reduced(kernel: _Kernel, mode: EmulatedPrecision, keyset: Any, args: Any, kwargs: Any) -> Any:
    dtype = mode.dtype_in_force() or mode.dtype_of_mixed(args, kwargs)
    if dtype is None:
        return kernel.alone(upcast, args, kwargs) if _widens(mode, args, kwargs) else kernel.half(keyset, args, kwargs)
    result = kernel.alone(lambda x: upcast(mode.operand(x, dtype)), args, kwargs, "half")
    return _to(result, dtype)


def _convolution(kernel: _Kernel, mode: EmulatedPrecision, keyset: Any, args: Any, kwargs: Any) -> Any:
    """The bias is added to rounded sums, as with cuDNN; but where channels stay apart, which has a kernel of its own."""
    x, weight, bias = [*args, None][:3]
    dtype = mode.dtype_in_force() or (x.dtype if bias is not None and x.dtype == bias.dtype else None)
    if bias is None or dtype not in HALF_DTYPES or (weight.shape[1] == 1 < x.shape[1 - weight.dim()]):
        return _reduced(kernel, mode, keyset, args, kwargs)
    sums = _reduced(kernel, mode, keyset, (x, weight, None, *args[3:]), kwargs)
    return sums + mode.operand(bias, dtype).view(-1, *[1] * (weight.dim() - 2))


def _attention(*args: Any, **kwargs: Any) -> Any:
    """By its formula where an operand is not finite: of some NaN the CPU's fused kernel makes finite values."""
    try:
        finite = _is_traced() or bool(sum(x.detach().sum() for x in args[:3]).isfinite())
    except RuntimeError:  # torch.func.vmap knows no single value
        finite = True
    if finite:
        return torch.ops.aten.scaled_dot_product_attention.default(*args, **kwargs)
    options = (None, 0.0, False)
    return torch.ops.aten._scaled_dot_product_attention_math(*args, *options[len(args) - 3 :], None, **kwargs)[0]


def _composite(kernel: _Kernel, mode: EmulatedPrecision, keyset: Any, args: Any, kwargs: Any) -> Any:
    dtype = mode.dtype_in_force() or mode.dtype_of_mixed(args, kwargs)
    if dtype is None and not _widens(mode, args, kwargs):
        return kernel.plain(keyset, args, kwargs)
    convert = upcast if dtype is None else functools.partial(mode.operand, dtype=dtype)
    return kernel.opened(mode, keyset, map_tensors(convert, args), map_tensors(convert, kwargs))


def _full(kernel: _Kernel, mode: EmulatedPrecision, keyset: Any, args: Any, kwargs: Any) -> Any:
    """In FP32; but for a reduction that is asked for another dtype. Where one may be asked for, autocast does so: FP32."""
    on = mode.dtype_in_force() is not None
    if mode.dtype_of_mixed(args, kwargs) is not None:
        return _reduced(kernel, mode, keyset, args, kwargs)
    if (on or _widens(mode, args, kwargs)) and _holds_half(args, kwargs) and not _is_asked_for_dtype(args, kwargs):
        if on and any(known.name == "dtype" for known in kernel.schema.arguments):
            return kernel.alone(lambda x: x, args, kwargs | {"dtype": torch.float32})
        return kernel.alone(upcast, args, kwargs)
    return kernel.half_if_lacking(mode, keyset, args, kwargs)


def _promoted(kernel: _Kernel, mode: EmulatedPrecision, keyset: Any, args: Any, kwargs: Any) -> Any:
    dtypes, dtype = [x.dtype for x in tensors_of((args, kwargs)) if _is_cast(x)], mode.dtype_in_force()
    first = next((each for each in dtypes if each != dtype), torch.float32)
    if dtype in HALF_DTYPES and first != torch.float32:
        raise RuntimeError(
            f"{kernel.schema.name} raises under autocast to {dtype} on a device where it is given {first}."
        )
    if torch.float32 in dtypes and len(set(dtypes)) > 1 and (dtype is not None or _widens(mode, args, kwargs)):
        return kernel.alone(upcast, args, kwargs)
    return kernel.opened(mode, keyset, args, kwargs)


def _unsafe(kernel: _Kernel, mode: EmulatedPrecision, keyset: Any, args: Any, kwargs: Any) -> Any:
    if mode.dtype_in_force() is not None:
        raise RuntimeError(
            "binary_cross_entropy raises under autocast on a device, because sigmoid's result in half precision may be 0 or 1: "
            "use binary_cross_entropy_with_logits, or torch.autocast(..., enabled=False) and FP32 arguments."
        )
    return kernel.plain(keyset, args, kwargs)


def _fourier(kernel: _Kernel, mode: EmulatedPrecision, keyset: Any, args: Any, kwargs: Any) -> Any:
    """As cuFFT has them: of FP16 where signals are powers of two long, with results in half precision too; of BF16 none."""
    if not {x.dtype for x in tensors_of((args, kwargs))} & {torch.float16, torch.complex32}:
        return kernel.plain(keyset, args, kwargs)
    result = kernel.alone(lambda x: x.to(torch.complex64) if x.dtype == torch.complex32 else upcast(x), args, kwargs)
    given = {known.name: known.default_value for known in kernel.schema.arguments} | kwargs
    given |= dict(zip(given, args, strict=False))
    length, dim = given.get("n", given.get("s")), given["dim"]
    dims = [dim] if isinstance(dim, int) else dim or range(-len(length or result.shape), 0)
    sizes = [result.shape[at] for at in dims]
    if result.is_complex() and not given["self"].is_complex():  # half of what a real signal gives is left out
        last = length if isinstance(length, int) else (length or [-1])[-1]  # -1: as it is
        sizes[-1] = last if last > 0 else given["self"].shape[dims[-1]]
    if any(size & (size - 1) for size in sizes):
        raise RuntimeError(
            f"cuFFT, on a device, transforms FP16 signals of 2, 4, 8, ... elements, not of {sizes}: use x.float()."
        )
    return result.to(torch.complex32 if result.is_complex() else torch.float16)


def _norm(kernel: _Kernel, mode: EmulatedPrecision, keyset: Any, args: Any, kwargs: Any) -> Any:
    """A CPU takes FP32 parameters beside half precision; a device does under autocast alone."""
    dtypes = {x.dtype for x in tensors_of((args, kwargs))}
    casts = mode.dtype_in_force() or mode.dtype_of_mixed(args, kwargs) or _widens(mode, args, kwargs)
    if len(dtypes) > 1 and not casts:
        raise RuntimeError(f"{kernel.schema.name} raises on a device where dtypes differ, without autocast: {dtypes}")
    return _full(kernel, mode, keyset, args, kwargs)


def _batch_norm(kernel: _Kernel, _mode: EmulatedPrecision, keyset: Any, args: Any, kwargs: Any) -> Any:
    """In FP32, results in half precision, as Normalization.cu has it: a CPU rounds the mean, and sums of backward."""
    dtype, is_training = args[0].dtype, args[5]
    if not is_training or dtype not in HALF_DTYPES or len({x.dtype for x in tensors_of(args[1:5])}) > 1:
        return kernel.plain(keyset, args, kwargs)
    wide = map_tensors(upcast, args)
    result = _to(kernel.alone(lambda x: x, wide, kwargs, "half"), dtype)
    for statistic, updated in zip(tensors_of(args[3:5]), tensors_of(wide[3:5]), strict=True):
        if updated is not statistic:
            statistic.copy_(updated)
    return result


def _of_another_package(kernel: _Kernel, mode: EmulatedPrecision, keyset: Any, args: Any, kwargs: Any) -> Any:
    """As torchvision's have it under autocast: in FP32, results in the dtype of the first operand; but for what writes into operands."""
    if not _holds_half(args, kwargs) or kernel.schema.is_mutable:
        return kernel.plain(keyset, args, kwargs)
    first = next(x for x in tensors_of((args, kwargs)) if _is_cast(x))
    return _to(kernel.alone(upcast, args, kwargs), first.dtype)


def _widens(mode: EmulatedPrecision, args: Any, kwargs: Any) -> bool:
    is_wide = mode.number_format.dtype == torch.float32 and not _ACTIVE.__dict__.get("opened")
    return is_wide and _holds_half(args, kwargs)


def _to(value: Any, dtype: torch.dtype) -> Any:
    """FP32 results in the format; opaque to Inductor, which would drop a rounding."""

    def convert(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return x
        rounded = x if dtype in HALF_DTYPES and not _is_traced() else round_to(x, dtype)
        return rounded.to(dtype) if dtype in HALF_DTYPES else rounded

    return map_tensors(convert, value)


# ---- private names of PyTorch ------------------------------------------------------------------------------------

_REGISTERED: list[Any] = []
_REGISTERING = threading.Lock()
_KEY = "AutocastIPU"
_DISPATCH_KEY = getattr(torch._C.DispatchKey, _KEY)


def _set_active(active: bool) -> None:
    """Lets operators of this thread go by the kernels of the context, or not."""
    torch._C._dispatch_tls_set_dispatch_key_excluded(_DISPATCH_KEY, not active)
    torch._C._dispatch_tls_set_dispatch_key_included(_DISPATCH_KEY, active)


def _is_traced() -> bool:
    """Whether torch.compile or torch.export looks at what is called, on tensors without values."""
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.FUNCTIONAL, keys.PROXY))


def _note_recomputation(mode: EmulatedPrecision) -> None:
    """Whether what runs will be recomputed in backward by gradient checkpointing, or is in an `autograd.Function`."""
    if not mode.autocasts:
        return
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if (mode._records_gradients and not torch.is_grad_enabled()) or (hooks and "checkpoint" in hooks[0].__qualname__):
        mode._of_thread.recomputed = mode


def _register_kernels() -> None:
    """Once in a process: kernels for what autocast casts on CUDA or on a CPU, whose own are passed by."""
    with _REGISTERING:
        if _REGISTERED:
            return
        on_cuda, on_cpu = map(torch._C._dispatch_get_registrations_for_dispatch_key, ("AutocastCUDA", "AutocastCPU"))
        lacking = {f"aten::{name}": what for what, names in _WITHOUT_HALF.items() for name in names}
        policies: dict[str, Any] = dict.fromkeys(on_cpu) | dict.fromkeys(lacking, _Kernel.half_if_lacking)
        policies |= dict.fromkeys([name for name in policies if "fft_" in name], _fourier)
        policies |= dict.fromkeys(on_cuda, _full)
        for names, policy in (
            (_REDUCED, _reduced), (_COMPOSITE, _composite), (_PROMOTED, _promoted), (["batch_norm"], _batch_norm),
            ([name for name in _REDUCED if "conv" in name and name != "conv_tbc"], _convolution),
            (["layer_norm", "group_norm"], _norm), (["binary_cross_entropy"], _unsafe),
        ):  # fmt: skip
            policies |= {f"aten::{name}": policy for name in names}
        others = [name for name in policies if not name.startswith("aten::")]
        policies |= dict.fromkeys(others, _of_another_package)
        for name in others:  # of which a package may name one to autocast that it does not define
            if not torch._C._jit_get_schemas_for_operator(name.partition(".")[0]):
                del policies[name]
        kernels = [(name, _Kernel(_operator(name), policy, lacking.get(name, ""))) for name, policy in policies.items()]
        fallthrough = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
        fallthrough.fallback(torch.library.fallthrough_kernel, _KEY)  # type: ignore[no-untyped-call]
        torch._ops._HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS.append(_DISPATCH_KEY)
        for operator in torch._ops._higher_order_ops.values():  # `flex_attention`, `cond` and `scan`, which pass it by
            operator.fallthrough(_DISPATCH_KEY)  # type: ignore[no-untyped-call]
        library: Any = functools.cache(lambda of: torch.library.Library(of, "IMPL"))  # type: ignore[no-untyped-call]
        for name, kernel in kernels:
            library(name.partition("::")[0]).impl(name, kernel, _KEY, with_keyset=True)
        below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.AutocastCPU)
        _REGISTERED.extend([library, below, fallthrough])


def _operator(name: str) -> Any:
    """That of a qualified name, such as "aten::add.Tensor"."""
    namespace, _, name = name.partition("::")
    base, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")
