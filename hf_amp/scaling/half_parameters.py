"""Preflight of parameter dtypes: what becomes of trainable half-precision parameters before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from hf_amp.config import MixedPrecisionConfig
from hf_amp.errors import AttachError
from hf_amp.events import AmpEvent, EventKind, mentioned
from hf_amp.precision import FP16_FORMAT, HALF_DTYPES, PrecisionMode
from hf_amp.scaling.master_weights import MasterWeights, widen_state
from hf_amp.statistics import snapshot
from hf_amp.statistics.gradients import total_amax

_STAY_FP32 = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Their running statistics are FP32 buffers, and on a CPU they take no others beside them."""

Named = Mapping[str, nn.Parameter]


def settle(
    model: nn.Module,
    config: MixedPrecisionConfig,
    mode: PrecisionMode,
    optimizers: Iterable[torch.optim.Optimizer],
    masters: MasterWeights | None,
    fixed: bool,
) -> AmpEvent | None:
    """Does to `model`'s trainable parameters what `config.half_parameters` says, or what `mode` FP16 needs.

    Parameters are converted in place and stay the same objects. Reads the host only where FP32 becomes FP16.

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
        return _narrow(model, masters, fixed)
    if not half:
        return None
    needs_fp32 = mode is PrecisionMode.MIXED or config.precision_mode is PrecisionMode.DYNAMIC
    remedy = config.half_parameters or ("upcast" if needs_fp32 else "warn")
    if remedy == "error":
        raise AttachError(
            f'half_parameters="error": trainable in half precision are {_listed(half)}, and {mode.value} trains FP32 '
            "parameters. Load them in FP32 (dtype=torch.float32 in from_pretrained, or model.float()), freeze them, or "
            'set half_parameters to "upcast" or "master_weights".'
        )
    if remedy == "upcast":
        return _upcast(half, optimizers, fixed)
    if remedy == "master_weights":
        return _kept(half)
    return AmpEvent(
        0,
        EventKind.HALF_PARAMETERS,
        message=f"trainable in half precision: {_listed(half)}. Updates smaller than half a rounding step are lost, which "
        'the metric lost_update_fraction measures; half_parameters="master_weights" or "upcast" keeps them.',
        figures=_counted(half),
    )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The floating-point parameters of `model` that require gradients, by qualified name; tied ones once."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}


def _kept(half: Named) -> AmpEvent:
    return AmpEvent(
        0,
        EventKind.MASTER_WEIGHTS_KEPT,
        message=f"the optimizer moves FP32 master weights of {_listed(half)}.",
        figures=_counted(half),
    )


def _upcast(half: Named, optimizers: Iterable[torch.optim.Optimizer], fixed: bool) -> AmpEvent:
    if fixed:
        raise _too_late(half, "FP32")
    before = _formats(half)
    listed = _listed(half)
    for parameter in half.values():
        parameter.grad = None
        parameter.data = parameter.data.float()
    for optimizer in optimizers:
        widen_state(optimizer, half.values())
    return AmpEvent(
        0,
        EventKind.PARAMETERS_CONVERTED,
        before=before,
        after="FP32",
        message=f"made FP32, also beyond detach, in twice the memory and without loss: {listed}. To load them so: "
        'dtype=torch.float32 in from_pretrained. To keep them small: half_parameters="master_weights".',
        figures=_counted(half),
    )


def _narrow(model: nn.Module, masters: MasterWeights, fixed: bool) -> AmpEvent | None:
    normalizing = {id(p) for m in model.modules() if isinstance(m, _STAY_FP32) for p in m.parameters()}
    wide = {
        n: p for n, p in trainable(model).items() if p.dtype != FP16_FORMAT.dtype and id(p) not in normalizing
    }
    if not wide:
        return _kept(trainable(model))
    if fixed:
        raise _too_late(wide, "FP16")
    _refuse_out_of_range(wide)
    before = _formats(wide)
    listed = _listed(wide)
    masters.narrow_(wide.values())
    return AmpEvent(
        0,
        EventKind.PARAMETERS_CONVERTED,
        before=before,
        after="FP16",
        message=f"made FP16: {listed}. The optimizer moves FP32 master weights, which have their exact values.",
        figures=_counted(wide),
    )


def _refuse_out_of_range(wide: Named) -> None:
    peaks = snapshot.read({n: total_amax([p.detach()], p.device) for n, p in wide.items()})
    beyond = {n: wide[n] for n, peak in peaks.items() if not peak <= FP16_FORMAT.largest}
    if beyond:
        raise AttachError(
            f"precision_mode=FP16: values beyond {FP16_FORMAT.largest:g}, or NaN, are in {_listed(beyond)}, and FP16 cannot "
            "hold them: train with precision_mode=MIXED or in BF16."
        )


def _too_late(parameters: Named, wanted: str) -> AttachError:
    return AttachError(
        f"to become {wanted}: {_listed(parameters)}, but the model is inside DistributedDataParallel already, which counts "
        "on their dtype. Attach hf_amp before accelerator.prepare (in a Trainer: "
        "Trainer(callbacks=[MixedPrecisionCallback(...)]), not add_callback), or convert the model before that."
    )


def _listed(parameters: Named) -> str:
    noun = "parameter" if len(parameters) == 1 else "parameters"
    return f"{len(parameters)} {_formats(parameters)} {noun} ({mentioned(list(parameters))})"


def _formats(parameters: Named) -> str:
    names = {torch.float16: "FP16", torch.bfloat16: "BF16", torch.float32: "FP32", torch.float64: "FP64"}
    return " and ".join(sorted({names[p.dtype] for p in parameters.values()}))


def _counted(parameters: Named) -> dict[str, int]:
    return {"parameters": len(parameters), "elements": sum(p.numel() for p in parameters.values())}
