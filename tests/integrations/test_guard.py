"""BF16 and FP32 runs: the same finite check and skip, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import hf_amp
from hf_amp import Cause, EventKind, MixedPrecisionCallback
from tests.each import forget_accelerators
from tests.integrations.trainers import OverflowAt, trainer_with
from tests.reference import adamw, assert_bitwise_equal, tiny_mlp

FP32, BF16 = {"fp16": False}, {"fp16": False, "bf16": True}


@pytest.mark.parametrize("mode", [FP32, BF16], ids=["fp32", "bf16"])
def test_one_bad_batch_kills_a_stock_run(tmp_path: Path, mode: dict[str, Any]) -> None:
    """Without the callback one batch with non-finite gradients makes every later loss NaN: the reason for the guard."""
    trainer, _ = trainer_with(tmp_path, OverflowAt(3), logging_nan_inf_filter=False, **mode)
    trainer.train()
    assert not all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("mode", "optim"), [(FP32, "adamw_torch_fused"), (BF16, "adamw_torch"), (BF16, "adamw_torch_fused"), (FP32, "sgd")]
)
def test_guard_skips_the_bad_batch(tmp_path: Path, mode: dict[str, Any], optim: str) -> None:
    """With it the step is skipped, told and counted; parameters and optimizer state stay finite and the run goes on."""
    callback = MixedPrecisionCallback()
    trainer, witness = trainer_with(tmp_path, callback, OverflowAt(3), optim=optim, **mode)
    trainer.train()
    assert witness.moved == [True, True, False, True, True, True]
    assert witness.skipped == [False, False, True, False, False, False]
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    skip = next(e for e in callback.session.events if e.kind is EventKind.STEP_SKIPPED)
    assert (skip.step, skip.cause) == (3, Cause.UNKNOWN)
    assert "no loss scale to blame" in skip.message
    assert callback.session.metrics()["skipped_steps"] == 1


@pytest.mark.parametrize(("mode", "late"), [(FP32, True), (BF16, False)], ids=["fp32, late", "bf16"])
def test_without_faults_the_callback_changes_no_bit(tmp_path: Path, mode: dict[str, Any], late: bool) -> None:
    """Losses, gradient norms and parameters of a run with and without the callback are the same to the last bit."""
    histories, parameters = [], []
    for guarded in (False, True):
        callback = MixedPrecisionCallback()
        trainer, _ = trainer_with(tmp_path, *([callback] if guarded and not late else []), **mode)
        if guarded and late:
            trainer.add_callback(callback)
        trainer.train()
        timing = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
        histories.append(
            [
                {k: v for k, v in entry.items() if not k.startswith("amp/") and k not in timing}
                for entry in trainer.state.log_history
            ]
        )
        parameters.append([p.detach().clone() for p in trainer.model.parameters()])
    assert histories[0] == histories[1]
    assert all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))


def test_guarded_checkpoint_resumes_without_hf_amp(tmp_path: Path) -> None:
    """A guard leaves no scaler.pt behind, which a Trainer without a scaler could not load."""
    options = {"fp16": False, "save_strategy": "steps", "save_steps": 3}
    trainer, _ = trainer_with(tmp_path, MixedPrecisionCallback(), **options)
    trainer.train()
    assert not (tmp_path / "checkpoint-3" / "scaler.pt").exists()
    stock, _ = trainer_with(tmp_path / "stock", **options)
    stock.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for a, b in zip(trainer.model.parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradients_may_be_clipped_in_every_micro_step() -> None:
    """As stock Accelerate allows where nothing is scaled; to the last bit. NaN that is added after a clip is seen."""
    runs = []
    for guarded in (False, True):
        forget_accelerators()
        accelerator = Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=2)
        session = hf_amp.attach(accelerator) if guarded else None
        plain = tiny_mlp()
        model, optimizer = accelerator.prepare(plain, adamw(plain, fused=True))
        torch.manual_seed(0)
        for _ in range(8):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.randn(5, 4)).square().mean())
                accelerator.clip_grad_norm_(model.parameters(), 0.01)
                optimizer.step()
                optimizer.zero_grad()
        runs.append([p.detach().clone() for p in plain.parameters()])
    assert_bitwise_equal(*runs)
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(5, 4)).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 0.01)
            plain[0].weight.grad[0, 0] = torch.nan
            optimizer.step()
            optimizer.zero_grad()
    assert session.metrics()["skipped_steps"] == 1
    assert_bitwise_equal(runs[1], [p.detach() for p in plain.parameters()])
