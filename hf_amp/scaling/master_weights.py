"""FP32 master weights: half-precision parameters whose optimizer moves FP32 copies of them.

A weight in FP16 or BF16 cannot take an update that is smaller than half the distance to its neighbour, so the optimizer
works on an FP32 copy, from which the half-precision weight is rounded after every step.
Source: Micikevicius et al., "Mixed Precision Training" (2018), section 3.1.

`optimizer.param_groups`, `optimizer.state` and the model go on holding the parameters themselves: the copies stand in for
them while the optimizer runs, and at no other time, so that schedulers, `zero_grad`, checkpoints and all code that keeps a
reference see what they saw before.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from hf_amp.config import KEEPS_UPDATES, MixedPrecisionConfig
from hf_amp.errors import AttachError, ScalerError
from hf_amp.events import AmpEvent, EventKind, join_names
from hf_amp.precision import FP16_FORMAT, FP32_FORMAT, HALF_DTYPES, PrecisionMode
from hf_amp.statistics import held_by, is_sharded, to_host, total_amax

STATE_KEY = "hf_amp_master_weights"
"""Where the master weights stand in `optimizer.state_dict()`, by the parameter's index."""

_WIDE = FP32_FORMAT.dtype


@dataclass
class _Master:
    weight: torch.nn.Parameter
    """FP32, of the parameter's shape, on its device."""
    agreed_with: tuple[int, int] | None
    """The parameter's memory and version when the two last agreed; None where that is to be checked."""


class MasterWeights:
    """The FP32 copies of all half-precision parameters of the optimizers that one scaler steps.

    Writes to a parameter between two steps (loading a checkpoint, clamping) are followed: elements that are no
    longer the rounded master replace it. Writes through `.data`, which PyTorch does not count, are looked for in the first
    steps and in sampled ones; once there was one, in all from then on (`follows_data`).
    No GPU-CPU sync anywhere here. Optimizers and parameters are not kept alive.
    """

    upcasts: tuple[torch.dtype, ...] = HALF_DTYPES
    """Gradients of these are FP32 from their check until the step."""
    state_dtype: torch.dtype | None = _WIDE
    """What half-precision state becomes; None where it stays."""

    def __init__(self) -> None:
        self.follows_data = False
        self._masters: MutableMapping[Tensor, _Master] = WeakTensorKeyDictionary()
        self._former_dtypes: MutableMapping[Tensor, torch.dtype] = WeakTensorKeyDictionary()
        self._hooks: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[RemovableHandle]] = (
            weakref.WeakKeyDictionary()
        )
        self._loading: weakref.WeakKeyDictionary[torch.optim.Optimizer, dict[str, Any]] = weakref.WeakKeyDictionary()

    def downcast_(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Makes `parameters` FP16 in place; their values, unrounded, become the master weights.

        The caller has seen to it that they are below 65504, and that nothing counts on their dtype, as
        DistributedDataParallel does.
        """
        for parameter in parameters:
            self._follow([parameter])
            self._former_dtypes[parameter] = parameter.dtype
            parameter.grad = None
            parameter.data = parameter.data.to(FP16_FORMAT.dtype)
            self._masters[parameter].agreed_with = _memory_of(parameter)

    def register_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets `optimizer`'s checkpoints carry the master weights from now on. Harmless when called again.

        State that it has made in half precision already is converted to FP32.
        """
        if optimizer in self._hooks:
            return
        if self.state_dtype is not None:
            upcast_state(optimizer, half_parameters(optimizer))
        for name in ("train", "eval"):  # in which those that are free of a schedule move their parameters
            if callable(getattr(optimizer, name, None)):
                vars(optimizer)[name] = functools.partial(self._call_on_masters, weakref.ref(optimizer), name)
        self._hooks[optimizer] = [
            optimizer.register_state_dict_post_hook(self._add_to_state_dict),
            optimizer.register_load_state_dict_pre_hook(self._loading.__setitem__),
            optimizer.register_load_state_dict_post_hook(self._load_unrounded),
        ]

    def _call_on_masters(self, reference: weakref.ref[torch.optim.Optimizer], name: str) -> None:
        optimizer = cast(torch.optim.Optimizer, reference())
        self.run(optimizer, functools.partial(getattr(type(optimizer), name), optimizer), whole=True)

    def release(self, restore: bool = True) -> None:
        """Undoes `register_optimizer` and, where `restore`, `downcast_`: parameters get their former dtype and the master's value."""
        for handle in itertools.chain.from_iterable(self._hooks.values()):
            handle.remove()
        for optimizer in self._hooks:
            vars(optimizer).pop("train", None)
            vars(optimizer).pop("eval", None)
        self._hooks.clear()
        for parameter, dtype in list(self._former_dtypes.items()) if restore else ():
            self._follow([parameter])
            parameter.grad = None
            parameter.data = self._masters[parameter].weight.data.to(dtype)
        self._former_dtypes.clear()
        self._masters.clear()

    @torch.no_grad()
    def upcast_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes half-precision gradients FP32, exactly, so that they can be unscaled without rounding.

        `p.grad` of a half-precision parameter is FP32 from then until the step, or until it is set to None.

        Raises:
            ScalerError: the optimizer loaded or made its state before it was registered here, or a
                parameter is sharded.
        """
        narrow = [p for p in half_parameters(optimizer) if p.grad is not None and p.grad.dtype in self.upcasts]
        if not narrow:
            return
        if optimizer not in self._hooks:
            half_state = (_is_half(value) for p in narrow for value in optimizer.state.get(p, {}).values())
            if self.state_dtype is not None and any(half_state):
                raise ScalerError(
                    f"{type(optimizer).__name__} has half-precision state from before its first step with master weights, so "
                    "a checkpoint was rounded when it was loaded: call scaler.keep_master_weights(optimizer) before "
                    "optimizer.load_state_dict(...), or, if the state is as you want it, before the first step."
                )
            self.register_optimizer(optimizer)
        gradients = [cast(Tensor, p.grad) for p in narrow]
        if any(map(is_sharded, gradients)):
            raise ScalerError(
                f"sharded parameters are {narrow[0].dtype}: master weights are for parameters that are "
                "whole. Shard them in FP32 and let FSDP cast (MixedPrecisionPolicy(param_dtype=torch.float16)), which makes "
                "the FP32 shards the master weights."
            )
        wide = [g.to(_WIDE).coalesce() if g.is_sparse else torch.empty_like(g, dtype=_WIDE) for g in gradients]
        dense = [index for index, g in enumerate(gradients) if not g.is_sparse]
        if dense:
            torch._foreach_copy_([wide[index] for index in dense], [gradients[index] for index in dense])
        for parameter, gradient in zip(narrow, wide, strict=True):
            # Assigning it would want the parameter's dtype, and the gradient itself may be DDP's view into a bucket.
            parameter.grad = cast(Tensor, parameter.grad).detach()
            parameter.grad.data = gradient

    @torch.no_grad()
    def downcast_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Rounds gradients back to their parameters' dtype after a skipped step, for the search for its cause."""
        for parameter in half_parameters(optimizer):
            if parameter.grad is not None and parameter.grad.dtype == _WIDE:
                gradient, parameter.grad = parameter.grad.to(parameter.dtype), None
                parameter.grad = gradient

    def run(
        self,
        optimizer: torch.optim.Optimizer,
        step: Callable[[], Any],
        *,
        found: list[Tensor] | None = None,
        in_parts: bool = False,
        whole: bool = False,
    ) -> Any:
        """Calls `step` while `optimizer` holds the masters with the FP32 gradients; then parameters are rounded from them.

        The gradients are used up: `p.grad` of a half-precision parameter is None afterwards.

        Args:
            found: where given, writes through `.data` are looked for, and each parameter adds whether there was one.
            in_parts: `step` may be called several times, for some of the parameters each, where that saves memory.
            whole: all masters, also without a gradient, and gradients stay.
        """
        moved = [p for p in half_parameters(optimizer) if whole or p.grad is not None]
        self._follow(moved, found)
        masters = {p: self._masters[p].weight for p in moved}
        for parameter, master in masters.items() if not whole else ():
            master.grad, parameter.grad = parameter.grad, None
        groups = [(group, group["params"]) for group in optimizer.param_groups]
        for group, parameters in groups:
            group["params"] = [masters.get(p, p) for p in parameters]
        rename_state(optimizer, masters)
        try:
            return step()
        finally:
            for group, parameters in groups:
                group["params"] = parameters
            rename_state(optimizer, {master: p for p, master in masters.items()})
            self._round(masters)

    @torch.no_grad()
    def _round(self, masters: Mapping[torch.nn.Parameter, torch.nn.Parameter]) -> None:
        if masters:
            torch._foreach_copy_(list(masters), list(masters.values()))
        for parameter, master in masters.items():
            master.grad = None
            self._masters[parameter].agreed_with = _memory_of(parameter)

    @torch.no_grad()
    def _follow(self, parameters: Iterable[Tensor], found: list[Tensor] | None = None) -> None:
        """Gives every parameter a master, and brings those up to date whose parameter was written to."""
        for parameter in parameters:
            master = self._masters.get(parameter)
            if master is None:
                weight = torch.nn.Parameter(parameter.detach().to(_WIDE, copy=True))
                self._masters[parameter] = _Master(weight, _memory_of(parameter))
            elif self.follows_data or found is not None or master.agreed_with != _memory_of(parameter):
                former = master.weight.to(parameter.device)
                same = former.to(parameter.dtype) == parameter
                if found is not None and master.agreed_with == _memory_of(parameter):
                    found.append(~same.all())
                master.weight = torch.nn.Parameter(torch.where(same, former, parameter.to(_WIDE)))
                master.agreed_with = _memory_of(parameter)

    def _add_to_state_dict(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        held = {i: p for i, p in enumerate(held_by(optimizer)) if p in self._masters}
        if not held:
            return
        self._follow(held.values())
        state_dict[STATE_KEY] = {i: self._masters[p].weight.detach() for i, p in held.items()}

    def _load_unrounded(self, optimizer: torch.optim.Optimizer) -> None:
        """Loads again, in FP32, what `Optimizer.load_state_dict` has rounded to its parameters' dtype."""
        saved = self._loading.pop(optimizer)
        masters = saved.get(STATE_KEY, {})
        indices = itertools.chain.from_iterable(group["params"] for group in saved["param_groups"])
        for index, parameter in zip(indices, held_by(optimizer), strict=True):
            if parameter.dtype not in HALF_DTYPES:
                continue
            for name, rounded in optimizer.state.get(parameter, {}).items():
                if _is_half(rounded):
                    unrounded = saved["state"][index][name]
                    optimizer.state[parameter][name] = unrounded.to(
                        parameter.device, self.state_dtype or unrounded.dtype
                    )
            if self.state_dtype is not None and index in masters:
                weight = masters[index].to(parameter.device, _WIDE, copy=True)
                self._masters[parameter] = _Master(torch.nn.Parameter(weight), None)


def half_parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """The FP16 and BF16 parameters that `optimizer` holds, in its order."""
    return [p for p in held_by(optimizer) if p.dtype in HALF_DTYPES]


def upcast_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Makes the half-precision state that `optimizer` has for `parameters` FP32, in place of the old."""
    for parameter in parameters:
        for name, value in optimizer.state.get(parameter, {}).items():
            if _is_half(value):
                optimizer.state[parameter][name] = value.to(_WIDE)


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in HALF_DTYPES


def rename_state(optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, torch.nn.Parameter]) -> None:
    """Gives the state of each key of `names` to its value."""
    for old, new in names.items():
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)


def _memory_of(parameter: Tensor) -> tuple[int, int]:
    """Changes whenever a parameter is written to, or given other memory. `_version` is autograd's own counter."""
    return parameter._version, parameter.data_ptr()


_STAY_FP32 = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Their running statistics are FP32 buffers, and on a CPU they take no others beside them."""

Named = Mapping[str, nn.Parameter]


def convert_parameters(
    model: nn.Module,
    config: MixedPrecisionConfig,
    mode: PrecisionMode,
    optimizers: Iterable[torch.optim.Optimizer],
    masters: MasterWeights | None,
    fixed: bool,
) -> AmpEvent | None:
    """Does to `model`'s trainable parameters what `config.half_parameters` says, or what `mode` FP16 needs.

    Parameters are converted in place and stay the same objects. A GPU-CPU sync only where FP32 becomes FP16.

    Args:
        model: unwrapped, on any device.
        config: whose `half_parameters` decides.
        mode: what the run computes in.
        optimizers: those that exist already; what they hold in half precision is converted along with its parameter.
        masters: who keeps FP32 copies; not None where `mode` or `config` ask for them.
        fixed: the model is inside DistributedDataParallel, which counts on the dtypes that it found.

    Returns:
        What was done or found, as an event; None where there was nothing to do.

    Raises:
        AttachError: `half_parameters="error"` and there are some; or a conversion comes too late; or a weight is
            beyond the range of FP16.
    """
    half = {n: p for n, p in trainable(model).items() if p.dtype in HALF_DTYPES}
    if mode is PrecisionMode.FP16 and masters is not None:
        return _downcast(model, masters, fixed)
    if not half:
        return None
    needs_fp32 = mode is PrecisionMode.MIXED or config.precision_mode is PrecisionMode.DYNAMIC
    remedy = config.half_parameters or ("upcast" if needs_fp32 else "warn")
    if remedy == "upcast" and any(map(is_sharded, half.values())):
        if config.half_parameters is not None:
            raise AttachError(
                f'half_parameters="upcast": {_listed(half)} are sharded, and FSDP gives gradients in the precision that it has '
                "found. Load and shard them in FP32 (dtype=torch.float32 in from_pretrained)."
            )
        remedy = "warn"
    if remedy == "error":
        raise AttachError(
            f'half_parameters="error": trainable in half precision are {_listed(half)}, and {mode.value} trains FP32 '
            "parameters. Load them in FP32 (dtype=torch.float32 in from_pretrained, or model.float()), freeze them, or "
            'set half_parameters to "upcast" or "master_weights".'
        )
    if remedy == "upcast":
        return _upcast(half, optimizers, fixed)
    if remedy in KEEPS_UPDATES:
        return _kept(half, remedy)
    if config.enable_monitoring:
        return None  # the first sampled steps say how much is lost
    message = (
        f"trainable in half precision: {_listed(half)}. Updates smaller than half a rounding step are lost; how many is not "
        "measured, because enable_monitoring is False."
    )
    return AmpEvent(0, EventKind.HALF_PARAMETERS, message=message, figures=_counted(half))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The floating-point parameters of `model` that require gradients, by qualified name; tied ones once."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}


_KEPT = {
    "master_weights": (EventKind.MASTER_WEIGHTS_KEPT, "the optimizer moves FP32 master weights of"),
    "stochastic_rounding": (
        EventKind.UPDATES_ROUNDED,
        "the optimizer steps in FP32, and results are rounded stochastically:",
    ),
    "kahan": (EventKind.UPDATES_ROUNDED, "the optimizer steps in FP32, and the rounding error is kept of"),
}


def _kept(half: Named, remedy: str = "master_weights") -> AmpEvent:
    kind, words = _KEPT[remedy]
    return AmpEvent(0, kind, message=f"{words} {_listed(half)}.", figures=_counted(half))


def _upcast(half: Named, optimizers: Iterable[torch.optim.Optimizer], fixed: bool) -> AmpEvent:
    if fixed:
        raise _too_late(half, "FP32")
    message = (
        f"made FP32, also beyond detach, in twice the memory and without loss: {_listed(half)}. To load them so: "
        'dtype=torch.float32 in from_pretrained. To keep them small: half_parameters="master_weights".'
    )
    event = AmpEvent(0, EventKind.PARAMETERS_CONVERTED, None, _formats(half), "FP32", (), message, _counted(half))
    for parameter in half.values():
        parameter.grad = None
        parameter.data = parameter.data.float()
    for optimizer in optimizers:
        upcast_state(optimizer, half.values())
    return event


def _downcast(model: nn.Module, masters: MasterWeights, fixed: bool) -> AmpEvent | None:
    normalizing = {id(p) for m in model.modules() if _stays_fp32(m) for p in m.parameters()}
    wide = {n: p for n, p in trainable(model).items() if p.dtype != FP16_FORMAT.dtype and id(p) not in normalizing}
    if not wide:
        return _kept(trainable(model))
    if fixed:
        raise _too_late(wide, "FP16")
    peaks = to_host({n: total_amax([p.detach()], p.device) for n, p in wide.items()})
    if beyond := {n: wide[n] for n, peak in peaks.items() if not peak <= FP16_FORMAT.largest}:
        raise AttachError(
            f"precision_mode=FP16: values beyond {FP16_FORMAT.largest:g}, or NaN, are in {_listed(beyond)}, and FP16 cannot "
            "hold them: train with precision_mode=MIXED or in BF16."
        )
    message = f"made FP16: {_listed(wide)}. The optimizer moves FP32 master weights, which have their exact values."
    event = AmpEvent(0, EventKind.PARAMETERS_CONVERTED, None, _formats(wide), "FP16", (), message, _counted(wide))
    masters.downcast_(wide.values())
    return event


def _stays_fp32(module: nn.Module) -> bool:
    """Whether `module` needs FP32 parameters. What computes a weight from others does: spectral norms, orthogonal maps."""
    by_hook = any(hasattr(hook, "n_power_iterations") for hook in module._forward_pre_hooks.values())
    return isinstance(module, _STAY_FP32) or by_hook or nn.utils.parametrize.is_parametrized(module)


def _too_late(parameters: Named, wanted: str) -> AttachError:
    return AttachError(
        f"to become {wanted}: {_listed(parameters)}, but the model is inside DistributedDataParallel already, which counts "
        "on their dtype. Attach hf_amp before accelerator.prepare (in a Trainer: "
        "Trainer(callbacks=[MixedPrecisionCallback(...)]), not add_callback), or convert the model before that."
    )


def _listed(parameters: Named) -> str:
    noun = "parameter" if len(parameters) == 1 else "parameters"
    return f"{len(parameters)} {_formats(parameters)} {noun} ({join_names(list(parameters))})"


def _formats(parameters: Named) -> str:
    names = {torch.float16: "FP16", torch.bfloat16: "BF16", torch.float32: "FP32", torch.float64: "FP64"}
    return " and ".join(sorted({names[p.dtype] for p in parameters.values()}))


def _counted(parameters: Named) -> dict[str, int]:
    return {"parameters": len(parameters), "elements": sum(p.numel() for p in parameters.values())}
