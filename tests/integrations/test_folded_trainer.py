"""Trainer's `max_grad_norm` folds into the optimizer step where nobody looks at gradients in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_amp import MixedPrecisionCallback, MixedPrecisionConfig
from tests.integrations.trainers import OverflowAt, trainer_with


class Onlooker(TrainerCallback):
    """Looks at gradients before the optimizer step, as some users' callbacks do."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad.flatten() for p in kwargs["model"].parameters()]
        self.norms.append(torch.cat(gradients).norm().item())


def run(folder: Path, *callbacks: Any, **options: Any) -> tuple[Any, MixedPrecisionCallback]:
    fold = options.pop("fold", None)
    callback = MixedPrecisionCallback(MixedPrecisionConfig(fold_clipping=fold, init_scale=1024.0))
    trainer, witness = trainer_with(folder, callback, OverflowAt(3), *callbacks, **options)
    trainer.remove_callback(witness)
    trainer.train()
    return trainer, callback


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize("max_grad_norm", [0.5, 0.0])
def test_folding_trains_as_the_plain_path(tmp_path: Path, optim: str, max_grad_norm: float) -> None:
    """With and without folding: the same losses, gradient norms, skips and parameters."""
    runs = [run(tmp_path, optim=optim, max_grad_norm=max_grad_norm, fold=fold) for fold in (False, None)]
    assert [callback.session.folds_clipping for _, callback in runs] == [False, True]
    plain, folded = (trainer.state.log_history[:-1] for trainer, _ in runs)
    for a, b in zip(plain, folded, strict=True):
        assert a.keys() == b.keys()
        for key in ("loss", "grad_norm", "amp/grad_norm", "amp/grad_amax", "amp/skipped_steps"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-4)
    for a, b in zip(*(trainer.model.parameters() for trainer, _ in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_an_onlooker_sees_unscaled_clipped_gradients(tmp_path: Path) -> None:
    """Where another callback listens before the step nothing is folded: what it sees is what it always saw."""
    onlooker = Onlooker()
    _, callback = run(tmp_path, onlooker, max_grad_norm=0.5)
    assert callback.session.folds_clipping is False
    clean = [norm for step, norm in enumerate(onlooker.norms) if step != 2]
    assert max(clean) <= 0.5 + 1e-4


def test_a_step_hook_sees_unscaled_clipped_gradients(tmp_path: Path) -> None:
    """Nor where a hook on the optimizer listens."""
    norms: list[float] = []

    class AddsHook(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            def hook(optimizer: Any, *_: Any) -> None:
                held = [p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]
                norms.append(torch.cat(held).norm().item())

            kwargs["optimizer"].optimizer.register_step_pre_hook(hook)

    run(tmp_path, AddsHook(), max_grad_norm=0.5)
    assert len(norms) == 5
    assert max(norms) <= 0.5 + 1e-4


def test_performance_mode_in_a_trainer(tmp_path: Path) -> None:
    """No wait in the step: the overflow is skipped on the device, counted and told once training ends."""
    callback = MixedPrecisionCallback({"scaling_strategy": "PERFORMANCE_OPTIMIZED", "init_scale": 1024.0})
    trainer, witness = trainer_with(tmp_path, callback, OverflowAt(3))
    trainer.train()
    assert witness.moved == [True, True, False, True, True, True]
    assert witness.skipped == [False] * 6  # accelerate infers skips from calls: documented
    figures = callback.session.metrics()
    assert (figures["applied_steps"], figures["skipped_steps"]) == (5, 1)
    assert [e.step for e in callback.session.events if e.kind.value == "step_skipped"] == [3]
