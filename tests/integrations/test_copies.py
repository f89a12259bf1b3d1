"""An attached Accelerator, a Trainer with the callback and their models are copied, pickled and saved as without hf_amp."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from torch import nn

import hf_amp
from hf_amp import Cause, MixedPrecisionCallback
from hf_amp.integrations.accelerate import session_of
from tests.integrations.trainers import OverflowAt, regression_trainer

X = torch.ones(2, 8) / 3
COPIES = pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)


@pytest.fixture(autouse=True)
def _no_loaders_of_earlier_tests() -> None:
    """accelerate's shared state refers to them weakly, and could not be pickled for that."""
    GradientState._reset_state()


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("copied", [copy.copy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_an_attached_accelerator(copied: Callable[[Any], Any], prepared: bool) -> None:
    """The copy is without a session, its optimizer too; it can be attached to, and trains on its own.

    accelerate's deep copy of an Accelerator is that Accelerator itself.
    """
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator)
    if prepared:
        model = nn.Linear(8, 1)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
        assert copied(optimizer).scaler is None
        assert not {"step", "__getstate__"} & vars(copied(optimizer)).keys()
    twin = copied(accelerator)
    assert session_of(twin) is None
    assert (twin.scaler, twin.native_amp) == (None, False)
    assert "__getstate__" not in vars(twin)
    assert session.is_attached
    if copied is not copy.copy:
        with hf_amp.attach(twin, init_scale=4.0) as own:
            model = nn.Linear(8, 1)
            model, optimizer = twin.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
            twin.backward(model(X).sum())
            optimizer.step()
            assert own.scaler.applied_steps == 1
    assert session.scaler.decided_steps == 0
    session.detach()
    assert "__getstate__" not in vars(accelerator)
    assert not prepared or "__getstate__" not in vars(accelerator._optimizers[0])


@COPIES
def test_a_trainer_with_the_callback(tmp_path: Path, copied: Callable[[Any], Any]) -> None:
    """Before training, as a hyperparameter search does: the copy trains with a session of its own, and the original too."""
    trainer = regression_trainer(
        tmp_path, MixedPrecisionCallback({"init_scale": 256.0}), OverflowAt(2), fp16=True, max_steps=3
    )
    twin = copied(trainer)
    for each in (twin, trainer):
        (callback,) = [c for c in each.callback_handler.callbacks if isinstance(c, MixedPrecisionCallback)]
        assert (callback.session is None) is (each is twin)
        each.train()
        figures = callback.session.metrics()
        assert (figures["applied_steps"], figures["skipped_steps"]) == (2, 1)
        assert callback.session is session_of(each.accelerator)


def test_a_trainer_after_training_is_copied(tmp_path: Path) -> None:
    """As without hf_amp, where such a Trainer can be deep-copied, not pickled."""
    trainer = regression_trainer(tmp_path, MixedPrecisionCallback(), fp16=True, max_steps=2)
    trainer.train()
    twin = copy.deepcopy(trainer)
    assert "save_to_json" not in vars(twin.state)
    twin.train()
    assert twin.state.global_step == 2


def test_a_copied_model_in_a_session_of_its_own() -> None:
    """A fallback of the run that it was copied from says nothing of its own."""
    one, two = (Accelerator(mixed_precision="fp16", cpu=True) for _ in range(2))
    first = hf_amp.attach(one, init_scale=256.0)
    model = one.prepare_model(nn.Linear(8, 1, bias=False))
    expected = model(X)
    twin = copy.deepcopy(model)
    first._fallback.runner.apply(first.plan.with_default(hf_amp.PrecisionMode.FP32))
    assert not torch.equal(model(X), expected)
    second = hf_amp.attach(two, init_scale=256.0)
    assert torch.equal(two.prepare_model(twin)(X), expected)
    second.detach()
    first.detach()


def test_copies_are_emulated_until_detach() -> None:
    """A deep copy, such as an EMA, computes as its original, and after `detach` in FP32 as that does; a copy made then too."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    in_fp32 = model(X)
    session = hf_amp.attach(accelerator)
    model = accelerator.prepare(model)
    ema = copy.deepcopy(model)
    assert torch.equal(ema(X), model(X))
    assert not torch.equal(ema(X), in_fp32)
    session.detach()
    for each in (model, ema, copy.deepcopy(model), copy.deepcopy(ema)):
        assert torch.equal(each(X), in_fp32)


WITHOUT_HF_AMP = """
import sys, torch
class Refuse:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("hf_amp", "accelerate"): raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
print(torch.load(sys.argv[1], weights_only=False).float()(torch.ones(2, 8) / 3).tolist())
"""


@pytest.mark.parametrize("options", [{}, {"precision_mode": "FP16"}, {"emulate": False}], ids=str)
def test_a_saved_model_needs_no_hf_amp(tmp_path: Path, options: dict[str, Any]) -> None:
    """After a fallback of a module too: what `unwrap_model` gives is saved, and loads where hf_amp is not installed."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    session = hf_amp.attach(accelerator, **options)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.0))
    for factor in (1.0, 1e6):
        accelerator.backward(model(X * factor).sum())
        optimizer.step()
        optimizer.zero_grad()
    if not options:
        assert session.plan.modules
        assert session.events[-1].cause is Cause.ACTIVATION
    torch.save(accelerator.unwrap_model(model), tmp_path / "model.pt")
    session.detach()
    expected = model.float()(X).tolist()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HF_AMP, str(tmp_path / "model.pt")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if "precision_mode" not in options:
        assert eval(done.stdout) == expected
