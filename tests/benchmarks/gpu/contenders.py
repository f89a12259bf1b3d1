"""The ways to train a model that the GPU benchmark compares.

All ways of one model train the very same parameters with the very same optimizer, in turn: what is resident on the
device besides a step is the same for all, and peak memory is that of the way alone.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hf_amp
from hf_amp import AmpSession, MixedPrecisionConfig, PrecisionMode
from hf_amp.fallback.plan import PrecisionPlan
from tests.benchmarks.gpu.models import Batch

MAX_NORM = 1.0
STRATEGIES = ("DYNAMIC", "ADAPTIVE", "PERFORMANCE_OPTIMIZED")


@dataclass
class Contender:
    """One way to train.

    Attributes:
        forward: the loss of a batch.
        finish: all that follows: backward, clip, step, update, cleared gradients.
        scale: the loss scale by now.
        tf32: whether FP32 products may run in TF32.
        session: hf_amp's; None without it.
        facts: what is to be known of it beside the figures.
    """

    forward: Callable[[Batch], Tensor]
    finish: Callable[[Tensor], None]
    scale: Callable[[], float]
    tf32: bool
    session: AmpSession | None
    facts: dict[str, Any]

    def step(self, batch: Batch) -> None:
        self.finish(self.forward(batch))


def plain(
    model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype | None, tf32: bool = False
) -> Contender:
    """PyTorch alone: autocast to `dtype` where there is one, and the stock scaler where that is FP16."""
    device = next(model.parameters()).device.type
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)
    parameters = list(model.parameters())

    def forward(batch: Batch) -> Tensor:
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
            return model(**batch)

    def finish(loss: Tensor) -> None:
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return Contender(forward, finish, scaler.get_scale, tf32, None, {})


def accelerated(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    strategy: str | None = "DYNAMIC",
    share: float = 0.0,
    default: PrecisionMode = PrecisionMode.MIXED,
    tf32: bool = False,
) -> Contender:
    """An Accelerate loop in FP16 with hf_amp and everything of it on; clipping folds, as it does in a Trainer.

    Args:
        strategy: None leaves hf_amp out.
        share: of the modules with matrix products, held in FP32 by the plan; at least one of them if above 0.
        default: of the plan.
    """
    shared = {id(x): x for x in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, shared)  # modules of its own, which hooks go on; no parameter of its own
    accelerator = Accelerator(mixed_precision="fp16", cpu=next(model.parameters()).device.type == "cpu")
    session, facts = None, {}
    if strategy is not None:
        config = MixedPrecisionConfig(scaling_strategy=strategy, fold_clipping=True, recovery_steps=10**9)
        session = hf_amp.attach(accelerator, config)
    prepared, wrapped = accelerator.prepare(twin, optimizer)
    if session is not None:
        held = modules_to_hold(twin, share)
        follow(session, PrecisionPlan(default).with_modules(held, PrecisionMode.FP32))
        share_held = 1.0 if default is PrecisionMode.FP32 else weight_share(twin, held)
        facts = {"share_of_product_weights_in_fp32": share_held}

    def finish(loss: Tensor) -> None:
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), MAX_NORM)
        wrapped.step()
        wrapped.zero_grad()

    def scale() -> float:
        return accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0

    return Contender(lambda batch: prepared(**batch), finish, scale, tf32, session, facts)


def follow(session: AmpSession, plan: PrecisionPlan) -> None:
    """Puts `plan` in force as a resumed run does: as if the controller had chosen it."""
    saved = session.scaler.progress()["stateful"]["fallback"]
    session.scaler.load_progress({"stateful": {"fallback": {**saved, "plan": plan.to_plain()}}})
    if session.plan != plan:
        raise ValueError(f"the session follows {session.plan.describe()}, not {plan.describe()}")


def products(model: nn.Module) -> dict[str, int]:
    """Qualified name → elements of the weight, of the leaf modules that multiply matrices, which autocast runs in half."""
    kinds = (nn.Linear, nn.Conv2d, Conv1D)
    return {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, kinds)}


def modules_to_hold(model: nn.Module, share: float) -> list[str]:
    """A random `share` of the modules with matrix products, the same at every call; one at least if above 0."""
    names = list(products(model))
    return random.Random(0).sample(names, max(1, round(share * len(names)))) if share > 0 else []


def weight_share(model: nn.Module, names: list[str]) -> float:
    """What part of the weights of all matrix products the modules `names` hold: about their part of the arithmetic."""
    sizes = products(model)
    return round(sum(sizes[name] for name in names) / sum(sizes.values()), 4)


def contenders(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Contender]:
    """All ways, by name, in the order in which they take turns."""
    smallest = 1e-9  # of a share: one module
    return {
        "FP32": plain(model, optimizer, None),
        "FP32 with TF32": plain(model, optimizer, None, tf32=True),
        "BF16": plain(model, optimizer, torch.bfloat16),
        "FP16 stock": plain(model, optimizer, torch.float16),
        "FP16 stock, accelerate": accelerated(model, optimizer, None),
        **{f"FP16 {strategy}": accelerated(model, optimizer, strategy) for strategy in STRATEGIES},
        "FP16 DYNAMIC, one module in FP32": accelerated(model, optimizer, share=smallest),
        "FP16 DYNAMIC, 10% in FP32": accelerated(model, optimizer, share=0.1),
        "FP16 DYNAMIC, 10% in FP32 with TF32": accelerated(model, optimizer, share=0.1, tf32=True),
        "FP16 DYNAMIC, 50% in FP32": accelerated(model, optimizer, share=0.5),
        "FP16 DYNAMIC, plan all in FP32": accelerated(model, optimizer, default=PrecisionMode.FP32),
    }
