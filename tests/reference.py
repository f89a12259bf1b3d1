"""Small models, data and runs that several tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, enable_reentrant_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from hf_amp.monitoring.metrics import CATALOGUE

StepPlan = Callable[[int], bool]


def tiny_mlp(seed: int = 0) -> nn.Module:
    """Two layers, 4 → 8 → 3; equal for equal seeds."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


TIMINGS = frozenset(metric.name for metric in CATALOGUE if metric.unit in ("s", "samples/s", "B"))
"""Metrics that the machine has a part in: not the same in two equal runs."""


class OverflowInBackward(torch.autograd.Function):
    """Identity whose gradient is inf: what a scale that is too large does to a finite loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.inf


def losses(model: nn.Module, steps: int, overflows: StepPlan, seed: int = 0) -> Iterator[Tensor]:
    """One finite loss a step; where `overflows(step)`, its gradient is inf."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        loss = model(torch.randn(5, 4, generator=generator)).square().mean()
        yield OverflowInBackward.apply(loss) if overflows(step) else loss


def adamw(model: nn.Module, fused: bool) -> torch.optim.AdamW:
    """AdamW, fused or not."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all parameters and of all optimizer state tensors, in a fixed order."""
    tensors = [p.detach().clone() for p in model.parameters()]
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        tensors += [state[key].clone() for key in sorted(state) if isinstance(state[key], Tensor)]
    return tensors


def assert_bitwise_equal(left: list[Tensor], right: list[Tensor]) -> None:
    """Same number of tensors, each equal to the last bit."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


# ---- CUDA's arithmetic, on a machine without CUDA ----------------------------------------------------------------


class OnDevice(Tensor):
    """A tensor that PyTorch takes for one on a CUDA device; what it holds, and its gradient's graph, are on the CPU.

    So autocast is PyTorch's own for CUDA, in C++, and every composite function is made of what it is made of there. What a
    kernel computes is done here: in FP32 of half-precision operands, rounded once. Slow.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        x: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="cuda:0",
        )
        x.held = held
        return x

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_held, args), tree_map(_held, kwargs or {})
        with enable_reentrant_dispatch():
            result = _KERNELS.get(func, _computed)(func, args, kwargs)
        return tree_map(_placed, result)


_CASTS = WeakIdKeyDictionary()


def _held(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.held if isinstance(x, OnDevice) else x


def _placed(x: Any) -> Any:
    return OnDevice(x) if isinstance(x, Tensor) else x


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """What a CUDA kernel gives for half-precision operands: FP32's result, rounded once to the dtype that it has there."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    half = {x.dtype for x in tensors} & {torch.float16, torch.bfloat16, torch.complex32}
    aliases = any(result.alias_info is not None for result in func._schema.returns)
    if half and func._schema.is_mutable and tensors[0].dtype in half:  # what is written is of that dtype
        args = tree_map(lambda x: x.to(tensors[0].dtype) if _is_scalar(x) and tensors[0].dim() else x, args)
    in_fp32 = kwargs.get("dtype") == torch.float32  # its derivative takes the operand as it is
    if not half or aliases or func._schema.is_mutable or in_fp32:
        return func(*args, **kwargs)
    meta = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
    with torch.no_grad():
        dtypes = [x.dtype for x in tree_leaves(func(*meta[0], **meta[1])) if isinstance(x, Tensor)]

    def rounded(x: Any) -> Any:
        return x.to(dtypes[0]) if _is_scalar(x) and dtypes[0] in half else x  # beside the format's tensors, on CUDA

    def wide(x: Any) -> Any:
        return x.to(torch.complex64 if x.is_complex() else torch.float32) if x.dtype in half else x

    args, kwargs = tree_map(rounded, (args, kwargs))
    widened = tree_map(lambda x: wide(x) if isinstance(x, Tensor) else x, (args, kwargs))
    results = iter(dtypes)
    if torch.Tag.pointwise not in func.tags or len(dtypes) != 1:
        return tree_map(lambda x: x.to(next(results)) if isinstance(x, Tensor) else x, func(*widened[0], **widened[1]))
    result = func(*args, **kwargs)  # for PyTorch's own derivative, whose steps are rounded there, too
    with torch.no_grad():
        result.data.copy_(func(*widened[0], **widened[1]))
    return result


def _is_scalar(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 0 and x.dtype == torch.float32


def _cast(func: Any, args: Any, kwargs: Any) -> Any:
    """A cast; of a parameter under autocast once, which a wrapper without a gradient of its own is not cached for."""
    (x,) = args
    if not (x.is_leaf and x.requires_grad and kwargs["dtype"] in (torch.float16, torch.bfloat16)):
        return func(*args, **kwargs)
    casts = _CASTS.setdefault(x, {})
    if kwargs["dtype"] not in casts:
        casts[kwargs["dtype"]] = func(*args, **kwargs)
    return casts[kwargs["dtype"]]


def _softmax(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim, half_to_float = args
    return func(x.float(), dim, False).to(torch.float32 if half_to_float else x.dtype)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """As one kernel on CUDA does it: operands cast, scores and softmax in FP32, the result rounded."""
    assert not dropout_p
    operands = [query, key, value, *([] if attn_mask is None or attn_mask.dtype == torch.bool else [attn_mask])]
    if torch.is_autocast_enabled("cuda"):
        operands = [x.to(torch.get_autocast_dtype("cuda")) for x in operands]
    dtype, (q, k, v, *bias) = operands[0].dtype, [_held(x).float() for x in operands]
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = (q @ k.mT) * (scale or q.shape[-1] ** -0.5)
    if bias:
        scores = scores + bias[0]
    elif attn_mask is not None:
        scores = scores.masked_fill(~_held(attn_mask), -torch.inf)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return OnDevice((scores.softmax(-1) @ v).to(dtype))


def _histogram(func: Any, args: Any, kwargs: Any) -> Any:
    """CUDA's counts integers too."""
    return func(args[0].float(), *args[1:], **kwargs)


def _batch_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """CUDA's keeps mean and variance of the batch in FP32, and writes running ones, whatever their dtype."""
    wide = tree_map(lambda x: x.float() if isinstance(x, Tensor) else x, args)
    result, *saved = func(*wide, **kwargs)
    for statistic, updated in zip(args[3:5], wide[3:5], strict=True):
        if updated is not statistic:
            statistic.copy_(updated)
    return result.to(args[0].dtype), *saved


def _convolution(func: Any, args: Any, kwargs: Any) -> Any:
    """cuDNN's, to which PyTorch adds the bias in half precision. Source: aten/src/ATen/native/Convolution.cpp."""
    x, weight, bias, *others = args
    is_depthwise = weight.shape[1] == 1 and x.shape[1] > 1
    if bias is None or x.dtype not in (torch.float16, torch.bfloat16) or is_depthwise:
        return _computed(func, args, kwargs)
    return _computed(func, (x, weight, None, *others), kwargs) + bias.view(-1, *[1] * (weight.dim() - 2))


_KERNELS = {
    torch.ops.aten.convolution.default: _convolution,
    torch.ops.aten.nan_to_num.default: lambda func, args, kwargs: func(*args, **kwargs),  # of the format's own limits
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten.histc.default: _histogram,
    torch.ops.aten._to_copy.default: _cast,
    torch.ops.aten._softmax.default: _softmax,
    torch.ops.aten._log_softmax.default: _softmax,
}


_ASKING_CUDA = (Tensor.__getitem__, Tensor.__setitem__, Tensor.contiguous, Tensor.item, Tensor.nonzero, Tensor.tolist)
"""They move or read values only, and ask CUDA for its current device by themselves; as whatever has no float."""


_MULTI_HEAD: Any = nn.functional.multi_head_attention_forward
_ATTENTION_OF_TORCH = FunctionType(
    _MULTI_HEAD.__code__,
    {**_MULTI_HEAD.__globals__, "has_torch_function": lambda _: False},
    argdefs=_MULTI_HEAD.__defaults__,
)
"""What it is made of, which otherwise no mode sees."""


class _Placement(TorchFunctionMode):
    """What is made on the CUDA device is made on the CPU, and taken for one of the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if func is torch.autograd.grad:  # a derivative that forward takes: the graph is that of what is held
            return tree_map(_placed, func(*tree_map(_held, args), **tree_map(_held, kwargs)))
        if func is nn.functional.multi_head_attention_forward:
            with self:
                return _ATTENTION_OF_TORCH(*args, **kwargs)
        if func == Tensor.requires_grad.__set__ and isinstance(args[0], OnDevice):
            return None  # what is held has its own
        moved = [x for x in tree_leaves((args, kwargs)) if isinstance(x, OnDevice)]
        has_floats = any(x.is_floating_point() or x.is_complex() for x in moved)
        without_floats = moved and not has_floats and func is not torch.histc and func != Tensor.device.__get__
        if func in _ASKING_CUDA or without_floats:
            return tree_map(_placed, func(*tree_map(_held, args), **tree_map(_held, kwargs)))

        def is_device(x: Any) -> bool:
            return isinstance(x, (str, torch.device)) and str(x).startswith("cuda")

        if not any(map(is_device, (*args, *kwargs.values()))) or "autocast" in func.__name__:
            return func(*args, **kwargs)
        if args and isinstance(args[0], OnDevice):
            args, kwargs = [x for x in args if not is_device(x)], {k: x for k, x in kwargs.items() if not is_device(x)}
            return func(*args, **kwargs) if len(args) > 1 or kwargs else args[0]
        args, kwargs = tree_map(lambda x: "cpu" if is_device(x) else _held(x), (list(args), kwargs))
        return _placed(func(*args, **kwargs))


def _apply(kind: Any, *args: Any) -> Any:
    """An `autograd.Function` of the device: in the graph of what is held, with forward and backward on tensors of the device."""

    def on_held(function: Any) -> Any:
        return staticmethod(lambda ctx, *given: tree_map(_held, function(ctx, *tree_map(_placed, given))))

    names = ("forward", "backward") if kind.setup_context is torch.autograd.Function.setup_context else ("backward",)
    twin = type(kind.__name__, (kind,), {name: on_held(getattr(kind, name)) for name in names})
    if "forward" not in names:
        twin.forward = staticmethod(lambda *given: tree_map(_held, kind.forward(*tree_map(_placed, given))))
        twin.setup_context = staticmethod(lambda ctx, *given: kind.setup_context(ctx, *tree_map(_placed, given)))
    return tree_map(_placed, _FUNCTION_APPLY(twin, *tree_map(_held, args)))


_FUNCTION_APPLY = torch.autograd.Function.apply.__func__


class _Factories(TorchDispatchMode):
    """The same for what composite functions make."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if OnDevice in types or str(kwargs.get("device")) != "cuda:0":
            return func(*args, **kwargs)
        return tree_map(_placed, func(*args, **{**kwargs, "device": "cpu"}))


@contextmanager
def cuda_rules(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside of it what `on_device` moved computes as on a CUDA device, under autocast to `dtype` unless that is None."""
    former = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or former[1])
    torch.autocast_increment_nesting()
    torch.autograd.Function.apply = classmethod(_apply)  # which no mode of torch's sees
    try:
        with _Placement(), _Factories():
            yield
    finally:
        torch.autograd.Function.apply = classmethod(_FUNCTION_APPLY)
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", former[0])
        torch.set_autocast_dtype("cuda", former[1])
        _CASTS.clear()


def on_device(model: nn.Module) -> nn.Module:
    """A copy of `model` on a CUDA device, whose parameters are held by those of `model` itself, where gradients arrive."""
    memo: dict[int, Any] = {id(x): OnDevice(x.clone()) for x in model.buffers()}
    for x in model.parameters():
        memo[id(x)] = nn.Parameter(OnDevice(x), requires_grad=False)
        memo[id(x)].held = x  # which PyTorch has detached
    return copy.deepcopy(model, memo)
