"""What a factor on an operator's inputs does to its output: the rules by which `hf_amp.rescale` moves powers of two.

A forward pass is recorded operator by operator (`Recording`). Every parameter has an unknown integer exponent, by which its power
of two would grow; an exponent of any other tensor is a sum of these (`Exponents`). `Rules` goes through the recording once:
a product adds exponents, a sum wants them equal, GELU wants 0. An operator without a rule wants 0 for all that goes in
and out, which is always right, and only loses freedom.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from hf_amp.patch_log import takes_hooks

Exponent = tuple[tuple[int, int], ...]
"""(variable, coefficient) in ascending order; () is 0: the tensor stays as it is."""
ZERO, FREE = 0, -1
"""Numbers of two exponents: of what stays as it is, and of 0 and inf, which any factor leaves as they are."""
MASK_VALUE = 1e38
"""Beyond it are masks such as `finfo.min`, which another format makes with a value of its own."""
SMALL = 1e-3
"""An epsilon at most, where nothing of the module's is called so."""
MOST_SLICES = 64
"""A parameter in more slices than these has one exponent."""


@dataclass(eq=False)
class Value:
    """A tensor of the recorded pass, without its elements.

    Attributes:
        shape, dtype: of the tensor.
        family: number that it shares with all tensors on the same memory.
        parameter: its name, where it is a parameter or persistent buffer.
        pure: name of the parameter that it is a view or a copy of.
        is_free: whether it holds 0 and inf alone, whatever the batch is.
        amax, rms: over what is finite and no mask; 0 for what holds no floating-point numbers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    family: int
    parameter: str | None = None
    pure: str | None = None
    is_free: bool = False
    amax: float = 0.0
    rms: float = 0.0

    @property
    def is_float(self) -> bool:
        """Whether it has an exponent."""
        return self.dtype.is_floating_point


@dataclass(eq=False)
class Node:
    """One operator of the pass: arguments with a `Value` for every tensor, what came out, and the innermost module around it.

    Attributes:
        least: for an operator that adds an epsilon, or clamps, the least that is not 0 of what it adds to; else None.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Value]
    module: str
    least: float | None = None

    @property
    def name(self) -> str:
        """As torch.ops.aten has it."""
        return str(self.func._schema.name).removeprefix("aten::")

    @property
    def results(self) -> list[Value]:
        """What it gives to others; statistics that norms and attention keep for their derivatives are left out."""
        return self.outputs[:1] if "norm" in self.name or "attention" in self.name else self.outputs

    @property
    def inputs(self) -> list[Value]:
        """Every tensor of floating-point numbers that goes in."""
        return [v for v in _values((self.args, self.kwargs)) if v.is_float]

    def argument(self, name: str) -> Any:
        """An argument by the name that the schema gives it, or its default."""
        for i, wanted in enumerate(self.func._schema.arguments):
            if wanted.name == name:
                return self.args[i] if i < len(self.args) else self.kwargs.get(name, wanted.default_value)
        return None

    def __str__(self) -> str:
        return f"{self.name} in {self.module or 'the model itself'}"


def _values(item: Any) -> Iterator[Value]:
    if isinstance(item, Value):
        yield item
    elif isinstance(item, (list, tuple)):
        for each in item:
            yield from _values(each)
    elif isinstance(item, dict):
        yield from _values(list(item.values()))


def _mapped(item: Any, convert: Callable[[Any], Any]) -> Any:
    """`item` with everything in its lists, tuples and dicts converted."""
    if isinstance(item, (list, tuple)):
        return type(item)([_mapped(each, convert) for each in item])
    return {k: _mapped(v, convert) for k, v in item.items()} if isinstance(item, dict) else convert(item)


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operators of forward passes of one model. Reads the host several times an operator.

    Args:
        model: its hooks are used while it is recorded.
        named: name → parameter or persistent buffer of it; one tensor may have several names.
        dtype: of the model; what has it is what would be half in FP16.

    Attributes:
        nodes: the operators in the order in which they ran.
        parameters: name → its value, which `nodes` share; of several names for one tensor the first.
        names: every name → the one in `parameters`.
        outputs: what the model has returned.
    """

    def __init__(self, model: nn.Module, named: dict[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype
        self.nodes: list[Node] = []
        self.parameters: dict[str, Value] = {}
        self.names: dict[str, str] = {}
        self.outputs: list[Value] = []
        self._known: Any = WeakIdKeyDictionary()
        self._families = 0
        self._model = model
        self._modules = [""]
        self._epsilons = {
            name: [x for k, x in vars(module).items() if "eps" in k and isinstance(x, float)]
            for name, module in model.named_modules()
        }
        memory: dict[tuple[int, ...], Value] = {}
        for name, tensor in named.items():
            place = (tensor.data_ptr(), *tensor.shape)
            if place not in memory:
                memory[place] = self.add(tensor, parameter=name, pure=name)
                self.parameters[name] = memory[place]
            self._known[tensor] = memory[place]
            self.names[name] = str(memory[place].parameter)
        for module in model.modules():
            for item in (*vars(module).values(), *module._buffers.values()):
                if isinstance(item, Tensor) and item not in self._known:
                    self.add(item, is_free=_holds_nothing(item))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While a forward pass runs."""
        handles = []
        for name, module in self._model.named_modules():
            if takes_hooks(module):
                enter, leave = functools.partial(self._enter, name), functools.partial(self._leave, name)
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            with self:
                yield
        finally:
            self._modules = [""]
            for handle in handles:
                handle.remove()

    def release(self) -> None:
        """Lets go of the model, which takes memory; nothing can be recorded any more."""
        self._model = nn.Module()

    def unused(self) -> list[str]:
        """Parameters that no operator has taken; buffers left out."""
        used = {v.pure for node in self.nodes for v in node.inputs}
        return [name for name, value in self.parameters.items() if name not in used]

    def is_epsilon(self, node: Node, number: float) -> bool:
        """Whether a number that is added to something, or bounds it, is there to keep it from 0, by its size or by its name."""
        if node.least is None or number <= 0:
            return False
        return number < SMALL or any(math.isclose(x, number, rel_tol=1e-9) for x in self._epsilons[node.module])

    def amax_by_module(self) -> dict[str, float]:
        """Module → largest absolute value that its operators give in half precision."""
        found: dict[str, float] = {}
        for node in self.nodes:
            for value in node.results:
                if value.dtype is self.dtype:
                    found[node.module] = max(found.get(node.module, 0.0), value.amax)
        return found

    def _enter(self, name: str, module: nn.Module, arguments: Any) -> None:
        self._modules.append(name)

    def _leave(self, name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        while len(self._modules) > 1 and self._modules.pop() != name:
            pass

    def add(self, tensor: Tensor, family: int | None = None, **facts: Any) -> Value:
        """The value for a tensor that was not known before, with its magnitudes."""
        if family is None:
            family = self._families = self._families + 1
        value = Value(tuple(tensor.shape), tensor.dtype, family, **facts)
        self._known[tensor] = value
        if value.parameter is None:  # these are looked at slice by slice, when it is known which there are
            self._measure(tensor, value)
        return value

    def value_of(self, tensor: Tensor) -> Value | None:
        """The value of a tensor that the pass has made or used; None for others."""
        return self._known.get(tensor)  # type: ignore[no-any-return]

    def _measure(self, tensor: Tensor, value: Value) -> None:
        if not value.is_float or tensor.numel() == 0 or value.is_free:
            return
        size = tensor.detach().abs()
        amax = float(size.amax())
        if not amax < MASK_VALUE:
            size = torch.where(size < MASK_VALUE, size, 0.0)
            amax = float(size.amax())
        value.amax = max(value.amax, amax)
        if amax:
            rms = float(torch.linalg.vector_norm(size / amax, dtype=torch.float32)) * amax / math.sqrt(size.numel())
            value.rms = max(value.rms, rms)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        least = _least_beside_epsilon(func, args)
        result = func(*args, **kwargs)

        def value_for(item: Any) -> Any:
            if not isinstance(item, Tensor):
                return item
            literal = item.ndim == 0 and _holds_nothing(item)
            return self._known.get(item) or self.add(item, is_free=literal)

        given = _mapped(tuple(args), value_for), _mapped(kwargs, value_for)
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        aliases = [each.alias_info for each in func._schema.returns]
        name = func._schema.name.removeprefix("aten::")
        outputs = []
        for i, tensor in enumerate(results):
            if not isinstance(tensor, Tensor):
                continue
            alias = aliases[min(i, len(aliases) - 1)]
            value = self._known.get(tensor)
            if value is not None:
                self._measure(tensor, value)
            elif alias is not None and (source := next(_values(given), None)) is not None:
                if name in _SLICING.split() and source.is_float:
                    value = self.add(tensor, source.family, pure=source.pure)
                else:
                    value = Value(tuple(tensor.shape), tensor.dtype, source.family, pure=source.pure)
                    value.amax, value.rms = source.amax, source.rms
                    self._known[tensor] = value
            else:
                made = name in _CREATING.split() and (name.startswith(("empty", "new_empty")) or _holds_nothing(tensor))
                value = self.add(tensor, is_free=made)
                if name in ("_to_copy", "clone"):
                    value.pure = next(_values(given)).pure
            outputs.append(value)
        self.nodes.append(Node(func, *given, outputs, self._modules[-1], least))
        return result


def epsilon_attributes(module: nn.Module, number: float) -> list[str]:
    """Attributes of a module that hold this number and are called an epsilon."""
    return [
        k
        for k, x in vars(module).items()
        if "eps" in k and isinstance(x, float) and math.isclose(x, number, rel_tol=1e-9)
    ]


def _holds_nothing(tensor: Tensor) -> bool:
    """Whether every element is 0, inf or -inf: no factor changes these."""
    if not tensor.is_floating_point():
        return False
    return bool(((tensor == 0) | tensor.isinf()).all())


def _least_beside_epsilon(func: Any, args: Sequence[Any]) -> float | None:
    """The smallest number, 0 left out, to which the operator adds an epsilon, or which it clamps; None for other operators."""
    name = func._schema.name.removeprefix("aten::")
    if name in ("add", "add_", "clamp_min", "clamp") and len(args) > 1:
        numbers = [x for x in args[:2] if isinstance(x, (int, float)) and not isinstance(x, bool)]
        tensors = [x for x in args[:2] if isinstance(x, Tensor) and x.is_floating_point()]
        if len(numbers) != 1 or len(tensors) != 1:
            return None
        if bool((tensors[0] < 0).any()):
            return None
        spread = tensors[0]
    elif name in ("native_layer_norm", "_fused_rms_norm"):
        x = args[0].float().flatten(-len(args[1]))
        spread = x.var(-1, correction=0) if name == "native_layer_norm" else x.square().mean(-1)
    elif name == "native_group_norm":
        spread = args[0].float().reshape(args[3] * args[6], -1).var(-1, correction=0)
    elif name in ("_native_batch_norm_legit_no_training", "native_batch_norm", "cudnn_batch_norm"):
        spread = args[4].float()
    else:
        return None
    above = spread[spread > 0]
    return float(above.min()) if above.numel() else math.inf


@dataclass
class Exponents:
    """Numbers for exponents: equal ones have one number."""

    terms: list[Exponent] = field(default_factory=lambda: [()])
    _numbers: dict[Exponent, int] = field(default_factory=lambda: {(): ZERO})

    def number(self, terms: Exponent) -> int:
        """The number of an exponent."""
        if terms not in self._numbers:
            self._numbers[terms] = len(self.terms)
            self.terms.append(terms)
        return self._numbers[terms]

    def variable(self, index: int) -> int:
        """The number of the exponent that is one variable."""
        return self.number(((index, 1),))

    def sum(self, a: int, b: int, sign: int = 1) -> int:
        """a + b, or a - b; free where either is."""
        if FREE in (a, b):
            return FREE
        total = dict(self.terms[a])
        for variable, count in self.terms[b]:
            total[variable] = total.get(variable, 0) + sign * count
        return self.number(tuple(sorted((v, n) for v, n in total.items() if n)))

    def times(self, a: int, factor: float) -> int | None:
        """a · factor; None where that is not in whole numbers."""
        if a == FREE:
            return FREE
        terms = [(v, n * factor) for v, n in self.terms[a]]
        if any(n != int(n) for _, n in terms):
            return None
        return self.number(tuple((v, int(n)) for v, n in terms if n))


@dataclass(frozen=True)
class Variable:
    """An unknown exponent: of a slice of a parameter, or of (offset + parameter), as norms have it that multiply by 1 + weight.

    Attributes:
        parameter: its name.
        dim, rows: the slice; dim is None for all of it.
        offset: 0 for the parameter itself.
    """

    parameter: str
    dim: int | None = None
    rows: tuple[int, ...] = ()
    offset: float = 0.0


@dataclass(frozen=True)
class EpsilonSite:
    """Where an epsilon is added to, or bounds, something whose exponent is known.

    Attributes:
        node: the operator.
        epsilon: as a number.
        exponent: of what it is added to.
        least: the smallest that it was added to.
        bits: how many bits smaller the epsilon has to be to be nothing: 26 for a sum in FP32, 4 for a bound.
    """

    node: Node
    epsilon: float
    exponent: int
    least: float
    bits: int


Rule = Callable[["Rules", Node], Any]
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Enters a rule for operators of these names, with spaces between; those that work in place have no underscore here."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return enter


class Rules:
    """Goes through a recording once, and gathers what must hold.

    The exponents of a tensor are a field: an int64 tensor of their numbers that broadcasts to the tensor's shape.

    Args:
        recording: of one or several forward passes.
        slices: (parameter, dimension) → class of every row, from `find_slices`.
        offsets: whether the exponent of 1 + weight may be other than 0.

    Attributes:
        exponents, variables: what the numbers mean.
        zero: number of an exponent that has to be 0 → the first operator that wants it; None for the model's outputs.
        sites: epsilons.
        fields: value → its exponents.
    """

    def __init__(self, recording: Recording, slices: dict[str, tuple[int, list[int]]], offsets: bool) -> None:
        self.recording = recording
        self.exponents = Exponents()
        self.variables: list[Variable] = []
        self.zero: dict[int, Node | None] = {}
        self.sites: list[EpsilonSite] = []
        self.fields: dict[Value, Tensor] = {}
        self._direct: dict[str, Node] = {}
        self._offsets = offsets
        self._offset_fields: dict[tuple[str, float], int] = {}
        self._offset_uses: list[Node] = []
        self._families: dict[int, list[Value]] = {}
        for name, value in recording.parameters.items():
            if value.is_float:
                self._put(value, self._of_parameter(name, value, slices.get(name)))
        for node in recording.nodes:
            self._apply(node)
        self._join_offsets()

    def _join_offsets(self) -> None:
        """1 + weight moves instead of the weight, if that is used in no other way."""
        for (name, _), number in self._offset_fields.items():
            others = [n for (other, _), n in self._offset_fields.items() if other == name and n != number]
            node = self._direct.get(name)
            if node is not None or others:
                self.require_zero(torch.tensor(number), node)
            self.require_equal(number, int(self.of(self.recording.parameters[name])), node)

    def _of_parameter(self, name: str, value: Value, slicing: tuple[int, list[int]] | None) -> Tensor:
        if slicing is None:
            return self._uniform(self._variable(Variable(name)), len(value.shape))
        dim, classes = slicing
        numbers = {}
        for each in sorted(set(classes)):
            rows = tuple(i for i, c in enumerate(classes) if c == each)
            numbers[each] = self._variable(Variable(name, dim, rows))
        shape = [1] * len(value.shape)
        shape[dim] = len(classes)
        return torch.tensor([numbers[c] for c in classes]).reshape(shape)

    def _variable(self, variable: Variable) -> int:
        self.variables.append(variable)
        return self.exponents.variable(len(self.variables) - 1)

    @staticmethod
    def _uniform(number: int, ndim: int) -> Tensor:
        return torch.full([1] * ndim, number)

    def _put(self, value: Value, exponents: Tensor) -> None:
        self.fields[value] = exponents
        self._families.setdefault(value.family, []).append(value)

    def of(self, value: Value) -> Tensor:
        """The field of a value; 0 for what the pass has not made itself, such as the batch."""
        if value not in self.fields:
            self._put(value, self._uniform(FREE if value.is_free else ZERO, len(value.shape)))
        return self.fields[value]

    def _apply(self, node: Node) -> None:
        inputs = node.inputs
        outputs = [v for v in node.outputs if v.is_float]
        if not inputs:
            for value in outputs:
                self.of(value)
            return
        mutated = [a.alias_info is not None and a.alias_info.is_write for a in node.func._schema.arguments]
        target = next((x for x, writes in zip(node.args, mutated, strict=False) if writes), None)
        name = node.name.removesuffix("_") if target is not None else node.name
        known = RULES.get(name)
        if known is not None and not outputs and name not in _MADE_OF_SIGNS.split():
            known = None  # numbers that are no floating-point ones any more
        offsets = len(self._offset_uses)
        result = self.pinned(node) if known is None else known(self, node)
        if len(self._offset_uses) == offsets and name not in _COPIES.split() and name not in _LAYOUT.split():
            self._direct.update({v.pure: node for v in inputs if v.pure is not None})
        results = result if isinstance(result, list) else [result]
        if isinstance(target, Value):
            if target.is_float:
                self._write(target, results[0], node)
            return
        for value, exponents in zip(outputs, results, strict=True):
            if not any(size != 1 and size != full for size, full in zip(exponents.shape, value.shape, strict=True)):
                self._put(value, exponents)
            else:
                raise AssertionError(f"{node}: {tuple(exponents.shape)} is no field of {value.shape}")

    def _write(self, target: Value, written: Tensor, node: Node) -> None:
        """In place: what is on the same memory keeps its exponents, but for zeros, which take those of what is written."""
        before = self.of(target)
        merged = self.merge(before, written, node)
        if bool((before == FREE).any()):
            number = self.scalar(merged, node)
            for value in self._families[target.family]:
                known = self.fields[value]
                self.fields[value] = torch.where(known == FREE, number, known)

    # -- what rules are made of ------------------------------------------------------------------------------------------------

    def pinned(self, node: Node) -> list[Tensor]:
        """Everything that goes in and out stays as it is: the rule of operators that have none."""
        for value in node.inputs:
            self.require_zero(self.of(value), node)
        return [self._uniform(ZERO, len(v.shape)) for v in node.outputs if v.is_float]

    def require_zero(self, exponents: Tensor, node: Node | None) -> None:
        """Every exponent of the field has to be 0."""
        for number in _numbers_in(exponents):
            if number not in (ZERO, FREE):
                self.zero.setdefault(number, node)

    def require_equal(self, a: int, b: int, node: Node | None) -> None:
        """Two exponents have to be equal."""
        if a != b and FREE not in (a, b):
            self.zero.setdefault(self.exponents.sum(a, b, -1), node)

    def pairs(self, f: Tensor, g: Tensor, combine: Callable[[int, int], int]) -> Tensor:
        """A field of what `combine` makes of every pair of exponents, element by element, broadcast."""
        if f.numel() == 1 and g.numel() == 1:
            return self._uniform(combine(int(f), int(g)), max(f.ndim, g.ndim))
        count = len(self.exponents.terms) + 1
        return _compact(self.each((f + 1) * count + (g + 1), lambda k: combine(k // count - 1, k % count - 1)))

    def each(self, f: Tensor, convert: Callable[[int], int]) -> Tensor:
        """A field of what `convert` makes of every exponent."""
        numbers = torch.tensor(_numbers_in(f))
        return torch.tensor([convert(n) for n in numbers.tolist()])[torch.searchsorted(numbers, f.contiguous())]

    def sum(self, f: Tensor, g: Tensor, sign: int = 1) -> Tensor:
        """Of a product, or with sign -1 of a quotient."""
        return self.pairs(f, g, lambda a, b: self.exponents.sum(a, b, sign))

    def merge(self, f: Tensor, g: Tensor, node: Node) -> Tensor:
        """Of a sum: equal exponents."""

        def equal(a: int, b: int) -> int:
            self.require_equal(a, b, node)
            return b if a == FREE else a

        return self.pairs(f, g, equal)

    def times(self, f: Tensor, factor: float, node: Node) -> Tensor:
        """Of a power."""

        def power(a: int) -> int:
            number = self.exponents.times(a, factor)
            if number is None:
                self.require_zero(torch.tensor(a), node)
                return ZERO
            return number

        return self.each(f, power)

    def uniform(self, f: Tensor, dims: Iterable[int], node: Node) -> Tensor:
        """The field with size 1 in these dimensions, along which all exponents have to be equal."""
        for dim in dims:
            if f.shape[dim] == 1:
                continue
            rows, firsts = f.movedim(dim, -1), []
            for row in rows.reshape(-1, rows.shape[-1]).tolist():
                numbers = sorted({n for n in row if n != FREE})
                for other in numbers[1:]:
                    self.require_equal(numbers[0], other, node)
                firsts.append(numbers[0] if numbers else FREE)
            f = torch.tensor(firsts).reshape(rows.shape[:-1]).unsqueeze(-1).movedim(-1, dim)
        return f

    def scalar(self, f: Tensor, node: Node) -> int:
        """The one exponent that all of the field has to have."""
        return int(self.uniform(f, range(f.ndim), node))

    def whole(self, value: Value, node: Node, ndim: int) -> Tensor:
        """A field of `ndim` dimensions with the one exponent that all of `value` has to have."""
        return self._uniform(self.scalar(self.of(value), node), ndim)

    def product(self, f: Tensor, g: Tensor, node: Node) -> Tensor:
        """Of a matrix product over the last dimension of f and the last but one of g."""
        if f.shape[-1] == 1 and g.shape[-2] == 1:
            return self.sum(f, g)
        if f.shape[-2] > 1 and g.shape[-1] > 1:
            f = self.uniform(f, [-2], node)
        total = self.sum(f.unsqueeze(-2), g.transpose(-1, -2).unsqueeze(-3))
        return self.uniform(total, [-1], node).squeeze(-1)

    def epsilon(self, node: Node, epsilon: float, squared: Tensor, bits: int = 26) -> None:
        """An epsilon that is added to what has these exponents."""
        number = self.scalar(squared, node)
        if number not in (FREE, ZERO) or epsilon:
            self.sites.append(EpsilonSite(node, epsilon, number, node.least or math.inf, bits))

    def offset(self, name: str, offset: float, node: Node) -> int:
        """The exponent of offset + parameter, which moves by moving the parameter along."""
        if not self._offsets:
            self.require_zero(self.of(self.recording.parameters[name]), node)
            return ZERO
        key = (name, offset)
        self._offset_uses.append(node)
        if key not in self._offset_fields:
            self._offset_fields[key] = self._variable(Variable(name, offset=offset))
        return self._offset_fields[key]


def _numbers_in(f: Tensor) -> list[int]:
    """Every number of a field once, in ascending order."""
    return sorted(set(f.flatten().tolist()))


def _compact(f: Tensor) -> Tensor:
    """The field with size 1 in the dimensions along which it is constant."""
    for dim in range(f.ndim):
        if f.shape[dim] > 1 and (f.stride(dim) == 0 or bool((f == f.narrow(dim, 0, 1)).all())):
            f = f.narrow(dim, 0, 1)
    return f


def _in_shape(f: Tensor, ndim: int) -> Tensor:
    """The field with as many dimensions as its tensor has."""
    return f.reshape([1] * (ndim - f.ndim) + list(f.shape))


def _laid_out(node: Node, fields: dict[Value, Tensor]) -> list[Tensor]:
    """The operator's own doing on fields in place of tensors: for operators that only move elements."""
    func = torch.ops.aten.reshape.default if node.name in ("view", "_unsafe_view", "_reshape_alias") else node.func
    args, kwargs = _mapped(
        (node.args, node.kwargs), lambda x: fields[x].expand(x.shape) if isinstance(x, Value) and x in fields else x
    )
    result = func(*args, **kwargs)
    return [_compact(x) for x in (result if isinstance(result, (tuple, list)) else [result])]


_LAYOUT = """view _unsafe_view _reshape_alias t transpose permute unsqueeze squeeze expand select slice split
    split_with_sizes unbind unfold narrow diagonal flip roll repeat repeat_interleave cat stack pixel_shuffle
    chunk unsafe_split movedim reflection_pad1d replication_pad1d pixel_unshuffle channel_shuffle"""
_CREATING = """empty empty_like new_empty empty_strided zeros zeros_like new_zeros full full_like new_full scalar_tensor
    lift_fresh"""
_SLICING = "select slice split split_with_sizes unbind narrow chunk unsafe_split"
_COPIES = "alias detach clone contiguous lift_fresh _to_copy lift positive"
_MADE_OF_SIGNS = """gt lt ge le eq ne isinf isnan isfinite argmax argmin argsort logical_not isposinf isneginf zeros_like
    new_zeros empty_like new_empty searchsorted"""
"""Their results are no floating-point numbers and still follow from their rules; so do those that only look at shapes."""


@rule(_LAYOUT)
def _moves_elements(rules: Rules, node: Node) -> list[Tensor]:
    fields = {v: rules.of(v) for v in node.inputs}
    # An empty tensor, as of a cache that holds nothing yet, has no say.
    parts = [f for v, f in fields.items() if 0 not in v.shape]
    numbers = {n for f in parts for n in _numbers_in(f)} or {FREE}
    outputs = [v for v in node.outputs if v.is_float]
    if len(numbers) == 1:
        (number,) = numbers
        return [rules._uniform(number, len(v.shape)) for v in outputs]
    if any(v.is_float is False for v in _values(node.args)):
        return rules.pinned(node)
    return _laid_out(node, fields)


@rule(_COPIES + " neg abs relu tril triu real native_dropout dropout")
def _elementwise(rules: Rules, node: Node) -> list[Tensor]:
    if not node.outputs or any(not v.is_float for v in node.outputs[:1]):
        return rules.pinned(node)
    f = rules.of(node.inputs[0])
    return [f] * sum(v.is_float for v in node.outputs)


@rule("leaky_relu threshold hardtanh clamp clamp_min clamp_max")
def _bounded(rules: Rules, node: Node) -> Any:
    """ReLU and its kin, and bounds that are 0 or inf; a small lower bound of something positive is an epsilon."""
    name, x = node.name.removesuffix("_"), rules.of(node.inputs[0])
    if name == "leaky_relu":
        return x
    bounds = [b for b in (*node.args[1:], *node.kwargs.values()) if b is not None]
    if len(node.inputs) == 1 and all(isinstance(b, (int, float)) for b in bounds):
        if all(b == 0 or abs(b) >= MASK_VALUE for b in bounds):
            return x
        if name in ("clamp_min", "clamp") and len(bounds) == 1 and rules.recording.is_epsilon(node, bounds[0]):
            rules.epsilon(node, float(bounds[0]), x, bits=4)
            return x
    return rules.pinned(node)


@rule("add sub rsub")
def _sum(rules: Rules, node: Node) -> Any:
    a, b = node.args[:2]
    if isinstance(a, Value) and isinstance(b, Value):
        if not (a.is_float and b.is_float):
            return rules.pinned(node)
        return rules.merge(rules.of(a), rules.of(b), node)
    value, number = (a, b) if isinstance(a, Value) else (b, a)
    f = rules.of(value)
    if number == 0 or math.isinf(number):
        return f
    if node.name == "add" and len(node.args) == 2 and not node.kwargs:
        if value.pure is not None and f.numel() == 1 and int(f) != FREE:
            return rules._uniform(rules.offset(value.pure, float(number), node), len(value.shape))
        if rules.recording.is_epsilon(node, number):
            rules.epsilon(node, float(number), f)
            return rules._uniform(rules.scalar(f, node), len(value.shape))
    return rules.pinned(node)


@rule("mul div true_divide")
def _product(rules: Rules, node: Node) -> Any:
    a, b = node.args[:2]
    sign = 1 if node.name.startswith("mul") else -1
    if node.kwargs or len(node.args) > 2:
        return rules.pinned(node)  # division that rounds
    if isinstance(a, Value) and isinstance(b, Value):
        f, g = (rules.of(v) if v.is_float else rules._uniform(ZERO, len(v.shape)) for v in (a, b))
        return rules.sum(f, g, sign)
    value, number = (a, b) if isinstance(a, Value) else (b, a)
    if number == 0:
        return rules._uniform(FREE, len(value.shape))
    f = rules.of(value)
    return f if value is a or sign == 1 else rules.times(f, -1, node)


@rule("pow sqrt rsqrt square reciprocal")
def _power(rules: Rules, node: Node) -> Any:
    powers = {"sqrt": 0.5, "rsqrt": -0.5, "square": 2, "reciprocal": -1}
    power = powers[node.name.removesuffix("_")] if node.name.removesuffix("_") in powers else node.args[1]
    if not isinstance(power, (int, float)) or len(node.inputs) != 1:
        return rules.pinned(node)
    return rules.times(rules.of(node.inputs[0]), power, node)


@rule("sign sgn")
def _signs(rules: Rules, node: Node) -> Tensor:
    return rules._uniform(ZERO, len(node.outputs[0].shape))


@rule("zeros_like new_zeros empty_like new_empty")
def _zeros(rules: Rules, node: Node) -> list[Tensor]:
    return [rules._uniform(FREE, len(v.shape)) for v in node.outputs if v.is_float]


@rule("zero fill")
def _filled(rules: Rules, node: Node) -> Tensor:
    number = 0.0 if node.name == "zero_" else node.args[1]
    if isinstance(number, Value):
        return rules.of(number) if number.is_float else rules._uniform(ZERO, 0)
    return rules._uniform(FREE if number == 0 or math.isinf(number) else ZERO, 0)


@rule("full_like new_full ones_like new_ones")
def _constant(rules: Rules, node: Node) -> list[Tensor]:
    number = node.argument("fill_value") if "full" in node.name else 1.0
    free = isinstance(number, (int, float)) and (number == 0 or math.isinf(number))
    return [rules._uniform(FREE if free else ZERO, len(v.shape)) for v in node.outputs if v.is_float]


@rule("isinf isnan isfinite logical_not isposinf isneginf")
def _kinds(rules: Rules, node: Node) -> list[Tensor]:
    return []


@rule("gt lt ge le eq ne")
def _compared(rules: Rules, node: Node) -> list[Tensor]:
    a, b = node.args[:2]
    if isinstance(a, Value) and isinstance(b, Value) and a.is_float and b.is_float:
        rules.merge(rules.of(a), rules.of(b), node)
    elif not (isinstance(b, (int, float)) and (b == 0 or math.isinf(b))):
        rules.pinned(node)
    return []


@rule("argmax argmin argsort")
def _ranked(rules: Rules, node: Node) -> list[Tensor]:
    rules.whole(node.inputs[0], node, 0)
    return []


@rule("where")
def _chosen(rules: Rules, node: Node) -> Any:
    condition, *branches = node.args
    if len(branches) != 2 or condition.is_float:
        return rules.pinned(node)
    fields = []
    for each in branches:
        if isinstance(each, Value):
            fields.append(rules.of(each) if each.is_float else torch.tensor(ZERO))
        else:
            fields.append(torch.tensor(FREE if each == 0 or math.isinf(each) else ZERO))
    return _in_shape(rules.merge(fields[0], fields[1], node), len(node.outputs[0].shape))


@rule("masked_fill")
def _masked(rules: Rules, node: Node) -> Any:
    number = node.args[2]
    free = number.is_free if isinstance(number, Value) else number == 0 or math.isinf(number)
    filled = rules.of(node.args[0])
    if not free:
        rules.require_zero(filled, node)
    return filled


@rule("maximum minimum fmax fmin")
def _extremes(rules: Rules, node: Node) -> Any:
    return (
        rules.merge(rules.of(node.args[0]), rules.of(node.args[1]), node)
        if len(node.inputs) == 2
        else rules.pinned(node)
    )


@rule("""embedding gather index_select index take max_pool2d_with_indices avg_pool2d avg_pool1d max_pool1d
    _adaptive_avg_pool2d _adaptive_avg_pool1d adaptive_avg_pool1d upsample_bilinear2d upsample_nearest2d
    upsample_nearest1d upsample_bicubic2d _upsample_bilinear2d_aa topk sort max min amax amin mean sum cumsum
    linalg_vector_norm norm std median im2col cummax aminmax col2im constant_pad_nd avg_pool3d
    max_pool3d_with_indices masked_select""")
def _first_degree(rules: Rules, node: Node) -> Any:
    """Sums, means, maxima, choices of elements: a common factor passes through."""
    name = node.name
    if len(node.inputs) != 1 or (name in ("linalg_vector_norm", "norm") and node.args[1:2] == (0,)):
        return rules.pinned(node)
    if name == "constant_pad_nd" and node.argument("value") not in (None, 0):
        return rules.pinned(node)
    outputs = [v for v in node.outputs if v.is_float]
    f, dims = rules.of(node.inputs[0]), node.argument("dim") if name in ("sum", "mean", "amax", "amin") else None
    if dims not in (None, []) and f.numel() > 1 and node.argument("keepdim"):
        return [rules.uniform(f, dims if isinstance(dims, (list, tuple)) else [dims], node)]
    number = rules.scalar(f, node)
    return [rules._uniform(number, len(v.shape)) for v in outputs]


@rule("var var_mean std_mean")
def _second_degree(rules: Rules, node: Node) -> list[Tensor]:
    x = rules.whole(node.inputs[0], node, len(node.outputs[0].shape))
    first = x if node.name == "std_mean" else rules.times(x, 2, node)
    return [first, x][: len(node.outputs)]


@rule("""index_add index_put _index_put_impl _unsafe_index_put scatter scatter_add index_copy slice_scatter
    select_scatter masked_scatter copy scatter_reduce""")
def _written(rules: Rules, node: Node) -> Any:
    """What is written has the exponents of what it is written to."""
    if node.name == "copy_":
        source, target = node.args[1], node.args[0]
        if not source.is_float:
            return rules._uniform(ZERO, len(target.shape))
        return _in_shape(rules.of(source), len(target.shape))
    target, *others = node.inputs
    number, reduce = node.argument("value"), node.argument("reduce")
    written = isinstance(number, (int, float)) and not (number == 0 or math.isinf(number))
    if written or len(others) > 1 or reduce in ("prod", "multiply"):
        return rules.pinned(node)
    merged = rules.whole(target, node, len(target.shape))
    if others:
        merged = rules.merge(merged, rules.whole(others[0], node, len(target.shape)), node)
    return merged


@rule("mm bmm matmul")
def _matrices(rules: Rules, node: Node) -> Any:
    a, b = node.args[:2]
    return rules.product(rules.of(a), rules.of(b), node)


@rule("addmm baddbmm")
def _added_matrices(rules: Rules, node: Node) -> Any:
    bias, a, b = node.args[:3]
    scaled = [node.argument(name) for name in ("beta", "alpha")]
    product = rules.product(rules.of(a), rules.of(b), node)
    return product if scaled[0] == 0 else rules.merge(product, rules.of(bias), node)


@rule("linear")
def _linear(rules: Rules, node: Node) -> Any:
    x, weight = node.args[:2]
    out = rules.product(_rows(rules.of(x)), rules.of(weight).t(), node)
    out = out if len(x.shape) > 1 else out.squeeze(-2)
    bias = node.argument("bias")
    return out if bias is None else rules.merge(out, rules.of(bias), node)


def _rows(f: Tensor) -> Tensor:
    return f if f.ndim > 1 else f.unsqueeze(0)


@rule("_grouped_mm")
def _grouped_matrices(rules: Rules, node: Node) -> Any:
    """Rows of the first by the matrices of the second in turn, as mixtures of experts have it."""
    a, b = node.args[:2]
    if len(a.shape) != 2 or len(b.shape) != 3 or node.argument("bias") is not None:
        return rules.pinned(node)
    experts = rules.uniform(rules.of(b), [0], node)[0]
    return rules.product(rules.of(a), experts, node)


@rule("convolution")
def _convolution(rules: Rules, node: Node) -> Any:
    x, weight, bias = node.args[:3]
    ndim = len(node.outputs[0].shape)
    transposed = bool(node.argument("transposed"))
    by_row = rules.uniform(rules.of(weight), [d for d in range(ndim) if d or transposed], node)
    channels = rules.sum(rules.whole(x, node, 1), by_row.reshape(-1))
    if bias is not None:
        channels = rules.merge(channels, rules.of(bias), node)
    return channels.reshape([1, -1, *[1] * (ndim - 2)])


def _affine(rules: Rules, node: Node, weight: Value | None, bias: Value | None) -> Tensor:
    """Of what has no factor any more times a weight plus a bias."""
    out = torch.tensor([ZERO]) if weight is None else rules.of(weight)
    out = out if bias is None else rules.merge(out, rules.of(bias), node)
    return out if node.name == "native_layer_norm" else rules.uniform(out, range(out.ndim), node)


@rule("native_layer_norm _fused_rms_norm")
def _normalised(rules: Rules, node: Node) -> list[Tensor]:
    """Free of the factor of its input, but for its epsilon."""
    x, shape, weight = [*node.args, None][:3]
    bias = node.argument("bias")
    ndim = len(x.shape)
    exponent = rules.uniform(rules.of(x), range(ndim - len(shape), ndim), node)
    epsilon = node.argument("eps")
    rules.epsilon(node, torch.finfo(x.dtype).eps if epsilon is None else float(epsilon), rules.times(exponent, 2, node))
    out = _affine(rules, node, weight, bias)
    statistics = [exponent, rules.times(exponent, -1, node)][-(len(node.outputs) - 1) :]  # mean, 1 / deviation
    return [_in_shape(out, ndim), *statistics]


@rule("native_group_norm")
def _group_normalised(rules: Rules, node: Node) -> list[Tensor]:
    x, weight, bias = node.args[:3]
    exponent = rules.whole(x, node, 2)
    rules.epsilon(node, float(node.args[7]), rules.times(exponent, 2, node))
    out = _affine(rules, node, weight, bias)
    return [_in_shape(out, len(x.shape)), exponent, rules.times(exponent, -1, node)]


@rule("_native_batch_norm_legit_no_training native_batch_norm cudnn_batch_norm")
def _batch_normalised(rules: Rules, node: Node) -> list[Tensor]:
    """With running statistics: the mean has the factor of the input, the variance its square."""
    x, weight, bias, mean, variance = node.args[:5]
    if node.argument("training") or mean is None:
        return rules.pinned(node)
    exponent = rules.whole(x, node, 1)
    rules.merge(exponent, rules.of(mean), node)
    squared = rules.times(exponent, 2, node)
    rules.merge(squared, rules.of(variance), node)
    rules.epsilon(node, float(node.argument("eps") or node.argument("epsilon")), squared)
    out = _affine(rules, node, weight, bias)
    others = [v for v in node.outputs[1:] if v.is_float]
    return [_in_shape(out, len(x.shape)), *(rules._uniform(ZERO, len(v.shape)) for v in others)]


@rule("""_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math
    scaled_dot_product_attention""")
def _attention(rules: Rules, node: Node) -> list[Tensor]:
    """The scores stay as they are; the output has the values' factor."""
    query, key, value = node.args[:3]
    ndim = len(query.shape)
    scores = rules.sum(rules.whole(query, node, ndim), rules.whole(key, node, ndim))
    rules.require_zero(scores, node)
    for other in node.inputs[3:]:
        rules.require_zero(rules.of(other), node)
    rest = [v for v in node.outputs[1:] if v.is_float]
    return [rules.whole(value, node, ndim), *(rules._uniform(ZERO, len(v.shape)) for v in rest)]


def find_slices(recording: Recording) -> dict[str, tuple[int, list[int]]]:
    """Parameter that is used in slices, such as one for queries, keys and values → (dimension, class of every row).

    Rows are followed from the parameter, or from the product that has a column for each, until an operator cuts them apart.
    """
    rows: dict[Value, list[tuple[str, int, Tensor]]] = {}
    cuts: dict[tuple[str, int], list[frozenset[int]]] = {}
    for name, value in recording.parameters.items():
        if value.is_float:
            for dim, size in enumerate(value.shape):
                if 1 < size <= 2**16:
                    field = torch.arange(size, dtype=torch.int32).reshape(
                        [size if d == dim else 1 for d in range(len(value.shape))]
                    )
                    rows.setdefault(value, []).append((name, dim, field))
    for node in recording.nodes:
        _follow_rows(node, rows, cuts)
    found: dict[str, tuple[int, list[int]]] = {}
    for (name, dim), parts in cuts.items():
        size = recording.parameters[name].shape[dim]
        distinct = list(dict.fromkeys(parts))
        classes: dict[tuple[bool, ...], int] = {}
        by_row = [classes.setdefault(tuple(i in part for part in distinct), len(classes)) for i in range(size)]
        covered = frozenset().union(*distinct) == frozenset(range(size))
        if name not in found and covered and 1 < len(classes) <= MOST_SLICES:
            found[name] = (dim, by_row)
    return found


def _follow_rows(
    node: Node, rows: dict[Value, list[tuple[str, int, Tensor]]], cuts: dict[tuple[str, int], list[frozenset[int]]]
) -> None:
    name, inputs = node.name, node.inputs
    known = [v for v in inputs if v in rows]
    outputs = [v for v in node.outputs if v.is_float]
    if not known or not outputs:
        return
    if name in _COPIES.split():
        rows[outputs[0]] = rows[known[0]]
    elif name in _LAYOUT.split() and len(inputs) == 1:
        for parameter, dim, field in rows[known[0]]:
            parts = _laid_out(node, {known[0]: field})
            for output, part in zip(outputs, parts, strict=True):
                rows.setdefault(output, []).append((parameter, dim, part))
                if name in _SLICING.split() and (known[0].pure is None or name not in ("select", "unbind")):
                    held = frozenset(_numbers_in(part))
                    if len(held) < field.numel():
                        cuts.setdefault((parameter, dim), []).append(held)
    elif name in ("mm", "bmm", "addmm", "baddbmm", "convolution", "linear", "_grouped_mm"):
        weight = node.args[2 if "add" in name else 1]
        ndim, out = len(outputs[0].shape), 0 if name in ("linear", "convolution") else -1
        at = 1 if name == "convolution" else ndim - 1
        for parameter, dim, field in rows.get(weight, []) if weight.pure is not None else []:
            if field.shape[out] == field.numel() == weight.shape[out]:
                rows.setdefault(outputs[0], []).append(
                    (parameter, dim, field.reshape([-1 if d == at else 1 for d in range(ndim)]))
                )
        bias = node.args[0] if "add" in name else node.args[2] if len(node.args) > 2 else None
        if outputs[0] in rows and isinstance(bias, Value):
            for parameter, dim, field in rows.get(bias, []):
                rows[outputs[0]].append((parameter, dim, field.reshape([-1 if d == at else 1 for d in range(ndim)])))
    elif name == "add" and len(known) == 2 and any(v.pure and len(v.shape) == 1 for v in known):
        ndim = len(outputs[0].shape)
        for value in known:
            for parameter, dim, field in rows[value]:
                rows.setdefault(outputs[0], []).append((parameter, dim, _in_shape(field, ndim)))
    elif name in ("mul", "div", "clamp") and len(inputs) == 1:
        rows[outputs[0]] = rows[known[0]]
