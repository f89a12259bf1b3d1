"""Which operator of a replayed step gives inf or NaN, on which line of the model's source, from what, and why."""

from __future__ import annotations

import functools
import linecache
import math
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from hf_amp.device import runs_backward
from hf_amp.fallback.module_precision import CurrentPrecision, ForwardContext, to_float32
from hf_amp.patch_log import takes_hooks
from hf_amp.precision import PrecisionMode
from hf_amp.statistics import all_finite, extremes, to_host
from hf_amp.tree import map_tensors, tensors_in


class BadOperator(NamedTuple):
    """The first operator of a module that gives inf or NaN from inputs that hold neither NaN nor inf (-inf may be a mask).

    Attributes:
        module: name of the innermost module whose forward calls it; "" for the model itself.
        what: the operator, its line, the range of its inputs and of its output, in the run's format and in FP32.
        left_range: whether its output is finite in FP32 from the very same inputs: it leaves the format's range. Otherwise it
            is not defined on these inputs, whatever the format.
        hint: what that mostly means; "" where nothing more is known.
    """

    module: str
    what: str
    left_range: bool = False
    hint: str = ""


class OperatorTrace(TorchFunctionMode):
    """Watches the operators of one forward pass, and of its backward. Goes on with FP32's result where a format is left.

    Reads the host once an operator: for steps that went wrong only.

    Args:
        current: the precision of the run.
        forward: whether what operators give in the forward pass is looked at, and not only their derivatives.

    Attributes:
        found: by module, its first operator that leaves the format, or else the first that is not defined on its inputs.
        in_backward: the first operator whose derivative is not finite, from finite gradients; None where none.
        is_silent: whether nothing is looked at, because what runs is not the model's.
        repeats_backward: whether `autograd.grad` is called from outside of the model, and not by its forward.
    """

    def __init__(self, current: CurrentPrecision, forward: bool = True) -> None:
        super().__init__()
        self._looks_at_forward = forward
        self.found: dict[str, BadOperator] = {}
        self.in_backward: BadOperator | None = None
        self.repeats_backward = False
        self._current = current
        self._minus_inf: BadOperator | None = None
        self._modules = [""]
        self._is_entered: list[bool] = []
        self.is_silent = False
        self._thread = threading.get_ident()
        self._watched: set[Any] = set()

    @contextmanager
    def watching(self, model: nn.Module, prefix: str = "") -> Iterator[None]:
        """In every module of `model` the innermost mode, entered anew where it is not: contexts of the plan are entered there too; it is called `prefix`."""
        handles = []
        for name, module in model.named_modules(prefix=prefix):
            if not takes_hooks(module):
                continue
            handles.append(module.register_forward_pre_hook(functools.partial(self._enter_module, name)))
            # Its own may be what torch goes through now, while it handles what forward has raised.
            if module is not model:
                handles.append(module.register_forward_hook(self._leave_module, prepend=True, always_call=True))
        try:
            with self:
                yield
        finally:
            while len(self._modules) > 1:
                self._leave_module(model, (), None)
            for handle in handles:
                handle.remove()

    def _is_of_pass(self) -> bool:
        """Whether this thread makes the pass: a GPU's backward, and what it recomputes, runs in one of PyTorch's own."""
        return threading.get_ident() == self._thread or (self.repeats_backward and runs_backward())

    def _enter_module(self, name: str, module: nn.Module, arguments: Any) -> None:
        if self._is_of_pass():
            is_innermost = _get_current_function_mode() is self  # type: ignore[no-untyped-call]
            self._modules.append(name)
            self._is_entered.append(not is_innermost)
            if not is_innermost:
                self.__enter__()  # type: ignore[no-untyped-call]

    def _leave_module(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._is_of_pass() and len(self._modules) > 1:
            self._modules.pop()
            if self._is_entered.pop():
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        outer = func is torch.autograd.grad and self.repeats_backward
        if self.is_silent or outer or getattr(func, "__name__", "__get__") in _NOT_EXAMINED:
            return func(*args, **kwargs)
        self.is_silent = True
        try:
            return self._examined(func, args, kwargs)
        finally:
            self.is_silent = False

    def _examined(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.autograd.grad:
            return self._inner_gradient(args, kwargs)
        name, given = func.__name__, (args, kwargs)
        writes = (name.endswith("_") and not name.startswith("__")) or name in _WRITES
        if writes and not torch.is_grad_enabled():
            given = map_tensors(Tensor.clone, given)
        result = func(*args, **kwargs)
        for _, x in tensors_in(result):
            if x.grad_fn is not None:
                at = (self._modules[-1], name, _source(), given)
                cast(Any, x.grad_fn).metadata.setdefault(self, at)
                if self._watched:  # backward recomputes what was checkpointed
                    self.watch_backward([x])
        if not self._looks_at_forward or all(map(all_finite, _floats(result))) or _is_told_to(given) or _spoilt(given):
            return result
        with ForwardContext.suspended(), self._current.entry.context(PrecisionMode.FP32):
            again = map_tensors(Tensor.clone, given) if writes else given
            exact = func(*to_float32(again[0]), **to_float32(again[1]))
        pairs = zip(_floats(result), _floats(exact), strict=False)
        left_range = any(bool((y.isfinite() & ~x.isfinite()).any()) for x, y in pairs if x.shape == y.shape)
        self._note(name, given, result, exact if left_range else None)
        return exact if left_range and not writes else result

    def _inner_gradient(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """A gradient that forward asks for: its first derivative that is not finite; it leaves the format if a tiny start cures it."""
        self.watch_backward(args[0])
        kwargs = {**kwargs, "retain_graph": True}
        result = torch.autograd.grad(*args, **kwargs)
        if (bad := self.in_backward) is not None:
            starts = kwargs["grad_outputs"]
            starts = tuple(map(torch.ones_like, args[0])) if starts is None else starts
            kwargs["grad_outputs"] = map_tensors(lambda g: g * 2.0**-24, starts)
            left_range = all(map(all_finite, _floats(torch.autograd.grad(*args, **kwargs))))
            self.found.setdefault(bad.module, bad._replace(left_range=left_range))
            self.in_backward = None
        return result

    def _note(self, name: str, given: Any, result: Any, exact: Any) -> None:
        """`exact` is FP32's result where that is finite. Of a -inf that is no mask, what made it of finite values is to blame."""
        module, output = self._modules[-1], _kinds_in(result)
        if exact is not None:
            output = f"{_range_of(exact)} in FP32 and {output} in {self._current.mode.number_format.name}"
        what = f"{_described(name, _source(), given)}; its output is {output}"
        bad = BadOperator(module, what, exact is not None, _hint(name, given))
        from_finite = all(map(all_finite, _floats(given)))
        if exact is None and not _spoilt(result):
            self._minus_inf = bad if from_finite else self._minus_inf
            return
        if exact is None and self._minus_inf and not from_finite and not bad.hint:
            bad = self._minus_inf
        if module not in self.found or (bad.left_range and not self.found[module].left_range):
            self.found[module] = bad

    def watch_backward(self, ends: Any) -> None:
        """Looks at every node of the graph behind `ends` as backward runs it."""
        for node, of_operator in graph_of([x.grad_fn for x in ends], self):
            if node not in self._watched:
                self._watched.add(node)
                if not re.match(MOVES_ONLY, name := node.name()):
                    node.register_hook(functools.partial(self._after_node, name, of_operator))

    def _after_node(self, node: str, of_operator: Any, gradients: tuple[Any, ...], given: tuple[Any, ...]) -> None:
        if self.in_backward is not None or all(bool(all_finite(g)) for g in _floats(gradients)):
            return
        if all(bool(all_finite(g)) for g in _floats(given)):
            module, name, source, inputs = of_operator or ("", node, ("", 0), ())
            self.in_backward = BadOperator(module, f"{node}, the derivative of {_described(name, source, inputs)}")


def graph_of(ends: list[Any], key: Any = None) -> Iterator[tuple[Any, Any]]:
    """Every node of the graph behind the nodes `ends`, with its metadata of that key, or those of the node before it."""
    queue: list[tuple[Any, Any]] = [(node, None) for node in ends]
    seen = set()
    while queue:
        node, data = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            data = node.metadata.get(key, data)  # several nodes may make one operator
            yield node, data
            queue += [(behind, data) for behind, _ in node.next_functions]


def is_reentrant(ends: Iterable[Tensor]) -> bool:
    """Whether the graph behind `ends` holds reentrant checkpointing."""
    return any(node.name() == "CheckpointFunctionBackward" for node, _ in graph_of([x.grad_fn for x in ends]))


MOVES_ONLY = "(Unsafe)?(Alias|Clone|View|Transpose|Permute|T|Slice|Select|Split|Squeeze|Unbind|Unsqueeze)Backward|.*AccumulateGrad"
"""Nodes that make no new values."""
_NOT_EXAMINED = ("__get__", "detach", "requires_grad_", "backward")  # the last runs operators of its own
_WRITES = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")
_OTHERS = tuple(str(Path(at).parent) for at in (torch.__file__, str(Path(__file__).parent)))


def _source() -> tuple[str, int]:
    """File and line of the innermost line outside of torch and hf_amp, in transformers of a model's own file; "" where none is."""
    frame, innermost = sys._getframe(1), ("", 0)
    while frame is not None and frame.f_code.co_name != "repeat_forward":
        file = frame.f_code.co_filename
        if not file.startswith(_OTHERS):
            if "/transformers/" not in file or "/transformers/models/" in file:
                return file, frame.f_lineno
            innermost = innermost if innermost[0] else (file, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return innermost


def _quoted(file: str, line: int) -> str:
    source = linecache.getline(file, line).strip()
    return f" at {Path(file).name}:{line}" + (f" (`{source[:80]}`)" if source else "") if file else ""


def raised_at(error: Exception) -> str:
    """ " at file:line (`source`)" of the innermost line of a model's own file that has raised `error`; "" where none has."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = frame.f_code.co_filename
        if not file.startswith(_OTHERS) and ("/transformers/" not in file or "/transformers/models/" in file):
            return _quoted(file, line)
    return ""


def _floats(value: Any) -> list[Tensor]:
    return [x for _, x in tensors_in(value) if x.is_floating_point() and x.element_size() > 1]


def _spoilt(value: Any) -> bool:
    """Whether a tensor holds NaN or inf; -inf may be a mask."""
    return not all(bool(extremes(x.detach())[1] < math.inf) for x in _floats(value))


def _is_told_to(value: Any) -> bool:
    """Whether a plain number in it is inf or NaN: an operator that is given one writes it by design."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return any(_is_told_to(x) or (isinstance(x, float) and not math.isfinite(x)) for x in items)


def _range_of(value: Any) -> str:
    """From the least to the largest finite element; "" where none is."""
    found = [y for x in _floats(value) if (y := x.detach().float()[x.detach().isfinite()]).numel()]
    ends = to_host({"least": min(y.min() for y in found), "most": max(y.max() for y in found)}) if found else {}
    return "from {least:.4g} to {most:.4g}".format(**ends) if ends else ""


def _kinds_in(value: Any) -> str:
    """Which of NaN, inf and -inf are in it."""
    tests = {"NaN": Tensor.isnan, "inf": Tensor.isposinf, "-inf": Tensor.isneginf}
    return " and ".join(kind for kind, test in tests.items() if any(test(x).any() for x in _floats(value))) or "finite"


def _described(name: str, source: tuple[str, int], given: Any) -> str:
    floats, kinds = _floats(given), {"inputs": False, "parameters": True}
    ranges = {of: _range_of([x for x in floats if isinstance(x, nn.Parameter) is held]) for of, held in kinds.items()}
    known = " and ".join(f"{of} range {values}" for of, values in ranges.items() if values)
    return f"{name}{_quoted(*source)}{f', whose {known}' if known else ''}"


def _hint(name: str, given: Any) -> str:
    """What an operator that is not defined on its inputs was mostly given."""
    args, options = given
    first = next(iter(_floats(given)), None)
    if name == "ctc_loss":
        lengths = [*args[2:4], options.get("input_lengths"), options.get("target_lengths")]
        frames, labels = [torch.as_tensor(each) for each in lengths if each is not None][:2]
        return "labels are longer than inputs" if bool((labels > frames.to(labels.device)).any()) else ""
    if name in ("cross_entropy", "nll_loss") and not bool((args[1] != options.get("ignore_index", -100)).any()):
        return "every label of the batch is ignored (-100), and a mean over none is NaN"
    if first is not None and "softmax" in name and bool(first.isneginf().all(-1).any()):
        return "a row is fully masked (softmax over nothing but -inf)"
    if first is not None and name in ("mean", "std", "var") and first.numel() == 0:
        return f"{name} over no element"
    return ""
