"""Under DeepSpeed hf_amp observes: what it tells is what DeepSpeed did, and what DeepSpeed does is what it does without.

Real engines, through accelerate and Trainer, with FP16 parameters also on a CPU that has kernels for them.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from torch import nn

import hf_amp
from hf_amp import AttachError, ConfigError, MixedPrecisionCallback, MixedPrecisionConfig
from hf_amp.integrations.deepspeed import loss_scale
from tests.each import for_each
from tests.host_reads import count_host_reads
from tests.integrations.launching import CONFIGS, ROOT
from tests.peers.gloo_alone import compile_nothing
from tests.reference import tiny_mlp

deepspeed = pytest.importorskip("deepspeed", reason="needs deepspeed, which the extra hf_amp[peers] brings")

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state", "one_process")
needs_fp16 = pytest.mark.skipif(
    not deepspeed.get_accelerator().is_fp16_supported(), reason="DeepSpeed runs no FP16 on this device"
)
FP16 = {"initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 3, "min_loss_scale": 1}
CLEAN, OVERFLOW, NAN = 1.0, 1e10, math.nan


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """What a launcher sets, for a group of this process alone, and as it was afterwards, PyTorch too: ZeRO 3 leaves a
    `linear` of its own there."""
    compile_nothing()
    linear = nn.functional.linear
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}.items():
            environment.setenv(name, str(value))
        environment.setenv("MASTER_ADDR", "127.0.0.1")
        for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"):  # which accelerate sets by itself
            environment.setenv(name, "false" if name.endswith("DEEPSPEED") else "no")
        yield
        nn.functional.linear = linear
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def accelerator_with(
    precision: str = "fp16", stage: int = 1, window: int = 1, torch_autocast: Any = None, **section: Any
) -> Accelerator:
    """An Accelerator of DeepSpeed; `section` goes into that of the precision."""
    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 5,
        "gradient_accumulation_steps": window,
        "zero_optimization": {"stage": stage},
    }
    if precision != "no":
        options[precision] = {"enabled": True, **(FP16 if precision == "fp16" else {}), **section}
    if torch_autocast:
        options["torch_autocast"] = torch_autocast
    AcceleratorState._reset_state(reset_partial_state=True)  # a second plugin in one process is refused
    plugin = DeepSpeedPlugin(hf_ds_config=options)
    return Accelerator(deepspeed_plugin=plugin, mixed_precision=precision, gradient_accumulation_steps=window)


def prepared(accelerator: Accelerator) -> tuple[Any, Any]:
    """A tiny model and its SGD, under DeepSpeed."""
    model = tiny_mlp()
    return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))


def train(accelerator: Accelerator, model: Any, optimizer: Any, factors: list[float]) -> list[float]:
    """One micro-batch for every factor, which its loss is multiplied by; the engine's scale after each."""
    parameter = next(model.parameters())
    batch = torch.linspace(-1, 1, 20, dtype=parameter.dtype, device=parameter.device).reshape(5, 4)
    scales = []
    for factor in factors:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).float().square().mean() * factor)
            optimizer.step()
            optimizer.zero_grad()
        scales.append(loss_scale(model))
    return scales


@needs_fp16
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_skips_and_scales_are_told_as_deepspeed_made_them(stage: int) -> None:
    """Each skip at its step, with the scale before and after; a cause only where the loss shows it; growth is followed."""
    accelerator = accelerator_with(stage=stage)
    session = hf_amp.attach(accelerator)
    model, optimizer = prepared(accelerator)
    scales = train(accelerator, model, optimizer, [CLEAN, OVERFLOW, CLEAN, NAN, *[CLEAN] * 8])
    skips = [(e.step, e.cause, e.before, e.after) for e in session.events if e.kind == "step_skipped"]
    assert skips == [(2, "SCALE", 256.0, scales[1]), (4, "UNKNOWN", scales[2], scales[3])]
    assert scales[1] == 128.0
    assert max(scales[4:]) > scales[3]
    metrics = session.metrics()
    assert metrics["skipped_steps"] == model.skipped_steps == 2
    assert metrics["applied_steps"] == model.global_steps - model.skipped_steps == 10
    assert metrics["non_finite_losses"] == 1
    assert metrics["scale"] == scales[-2]  # that of the newest step
    assert session.scaler.get_scale() == scales[-1]
    assert metrics["grad_norm"] == pytest.approx(float(model.get_global_grad_norm()), rel=1e-6)


@pytest.mark.parametrize(("precision", "stage"), [pytest.param("fp16", 2, marks=needs_fp16), ("bf16", 1), ("no", 2)])
def test_training_is_to_the_last_bit_what_it_is_without(precision: str, stage: int) -> None:
    """Parameters and scales of a run with NaN in it, observed and not; a skip is told where DeepSpeed makes one, which
    without a loss scale depends on its version."""
    runs = []
    for observed in (True, False):
        accelerator = accelerator_with(precision, stage)
        session = hf_amp.attach(accelerator) if observed else None
        model, optimizer = prepared(accelerator)
        scales = train(accelerator, model, optimizer, [CLEAN, NAN, CLEAN, CLEAN])
        runs.append((scales, [p.tolist() for p in model.parameters()]))
        if session is not None:
            skips = [(e.step, e.cause, e.before) for e in session.events if e.kind == "step_skipped"]
            assert skips == [(2, "UNKNOWN", scales[0])] * model.skipped_steps
            assert session.metrics()["applied_steps"] == 4 - model.skipped_steps
            stats = session.monitor.get_precision_stats()
            assert stats["usage_by_format"] == {{"no": "FP32"}.get(precision, precision.upper()): 1.0}
    assert str(runs[0]) == str(runs[1])  # NaN is not equal to itself


def test_without_deepspeeds_check_a_lost_loss_is_told_and_nothing_is_guarded() -> None:
    """FP32 without ZeRO, which DeepSpeed does not check: no skip is made up, and the losses that were NaN are counted."""
    accelerator = accelerator_with("no", stage=0)
    session = hf_amp.attach(accelerator)
    model, optimizer = prepared(accelerator)
    train(accelerator, model, optimizer, [CLEAN, NAN, CLEAN])
    assert session.metrics()["skipped_steps"] == model.skipped_steps == 0
    assert session.metrics()["non_finite_losses"] == 2
    assert all(p.isnan().all() for p in model.parameters())


@needs_fp16
def test_micro_batches_are_no_steps() -> None:
    """Two micro-batches a step: one event, with both losses in it, and half as many steps."""
    accelerator = accelerator_with(window=2)
    session = hf_amp.attach(accelerator)
    train(accelerator, *prepared(accelerator), [CLEAN, CLEAN, NAN, CLEAN, CLEAN, CLEAN])
    (skip,) = [event for event in session.events if event.kind == "step_skipped"]
    assert skip.step == 2
    assert (skip.figures["losses"], skip.figures["non_finite_losses"]) == (2, 1)
    assert (session.metrics()["applied_steps"], session.scaler.decided_steps) == (2, 3)


@needs_fp16
def test_a_clean_step_reads_the_host_no_more_often_than_without() -> None:
    """DeepSpeed reads its own flag; observing reads nothing on top until a step is skipped."""
    reads = []
    for observed in (True, False):
        accelerator = accelerator_with(stage=1)
        if observed:
            hf_amp.attach(accelerator)
        model, optimizer = prepared(accelerator)
        train(accelerator, model, optimizer, [CLEAN])
        with count_host_reads() as seen:
            train(accelerator, model, optimizer, [CLEAN] * 3)
        reads.append([source for source in seen.sources if source != "tolist"])
        in_step = seen.sources.count("tolist")
        assert in_step == (3 if observed else 0)  # of figures that have arrived, in pinned memory
    assert reads[0] == reads[1]


@needs_fp16
def test_the_floor_is_told_before_deepspeed_ends_the_run() -> None:
    """The skip that brings the scale down to min_loss_scale is followed by what to do; at the next one DeepSpeed raises."""
    accelerator = accelerator_with(initial_scale_power=1)
    session = hf_amp.attach(accelerator)
    model, optimizer = prepared(accelerator)
    train(accelerator, model, optimizer, [CLEAN, NAN])
    floor = session.events[-1]
    assert (floor.kind, floor.step, floor.before, floor.after) == ("scale_at_floor", 2, 2.0, 1.0)
    assert "bf16 section of the DeepSpeed config" in floor.message
    with pytest.raises(Exception, match="already at minimum"):
        train(accelerator, model, optimizer, [NAN])


@for_each(
    ("option", "value"),
    [
        ("precision_mode", "BF16"),
        ("half_parameters", "upcast"),
        ("scaling_strategy", "ADAPTIVE"),
        ("init_scale", 1024.0),
        ("growth_interval", 7),
        ("fold_clipping", True),
        ("fallback_threshold", 0.5),
        ("precision_schedule", {5: "FP32"}),
        ("sync_grad_scaler", True),
        ("monitor_modules", True),
    ],
)
def test_an_option_that_would_act_is_refused(option: str, value: Any) -> None:
    """The error names the option and says who acts; nothing is changed by the attempt."""
    accelerator = accelerator_with("bf16")
    before = dict(vars(accelerator))
    with pytest.raises(ConfigError, match=f"{option}=.*DeepSpeed scales losses and skips.*leave {option} out"):
        hf_amp.attach(accelerator, MixedPrecisionConfig(**{option: value}))
    assert vars(accelerator) == before


def test_options_of_our_loops_are_refused() -> None:
    """As for every Accelerator."""
    with pytest.raises(ConfigError, match="memory_efficient=True"):
        hf_amp.attach(accelerator_with("bf16"), MixedPrecisionConfig(memory_efficient=True))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_torch_autocasts_skips_are_told(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scaler is torch's: without ZeRO the engine takes each step for an applied one, with ZeRO DeepSpeed 0.19.8 never lowers the scale."""
    # DeepSpeed keeps this for all engines of a process; afterwards it is what it was.
    monkeypatch.setattr("deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED", False)
    accelerator = accelerator_with("no", stage, torch_autocast={"enabled": True, "dtype": "float16"})
    session = hf_amp.attach(accelerator)
    model, optimizer = prepared(accelerator)
    scales = train(accelerator, model, optimizer, [CLEAN, OVERFLOW, CLEAN, NAN, CLEAN])
    assert scales == ([2.0**16, 2.0**15, 2.0**15, 2.0**14, 2.0**14] if stage == 0 else [2.0**16] * 5)
    skips = [(e.step, e.cause, e.before, e.after) for e in session.events if e.kind == "step_skipped"]
    assert skips == [(2, "SCALE", 2.0**16, scales[1]), (4, "UNKNOWN", scales[2], scales[3])]
    assert (session.metrics()["applied_steps"], session.metrics()["skipped_steps"]) == (3, 2)
    if stage:
        assert 0.1 < session.metrics()["grad_norm"] < 10.0
    assert all(p.isfinite().all() for p in model.parameters())
    assert session.plan.default.number_format.name == "FP16"


def test_detach_restores_what_was_there(tmp_path: Path) -> None:
    """Accelerator, engine and DeepSpeed's optimizer are built as before attach; a second attach works."""
    accelerator = accelerator_with("bf16")
    model, optimizer = prepared(accelerator)
    train(accelerator, model, optimizer, [CLEAN])
    owners = [accelerator, model, optimizer, model.optimizer, *model.module.modules()]
    before = [{name: value for name, value in vars(owner).items() if callable(value)} for owner in owners]
    hooks = [len(accelerator._save_model_state_pre_hook), len(accelerator._load_model_state_pre_hook)]
    for _ in range(2):
        with hf_amp.attach(accelerator):
            assert "backward" in vars(accelerator)
            with pytest.raises(AttachError, match="detach"):
                hf_amp.attach(accelerator)
            train(accelerator, model, optimizer, [CLEAN, NAN])
        assert [{name: value for name, value in vars(owner).items() if callable(value)} for owner in owners] == before
        assert [
            len(accelerator._save_model_state_pre_hook), len(accelerator._load_model_state_pre_hook)
        ] == hooks  # fmt: skip
        assert "_hf_amp_session" not in vars(accelerator)


@needs_fp16
def test_counters_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    """A run that loads counts on where it was saved, beside DeepSpeed's own scale."""
    accelerator = accelerator_with()
    session = hf_amp.attach(accelerator)
    model, optimizer = prepared(accelerator)
    scales = train(accelerator, model, optimizer, [CLEAN, NAN, CLEAN])
    accelerator.save_state(str(tmp_path))
    session.detach()
    resumed = hf_amp.attach(accelerator)
    train(accelerator, model, optimizer, [NAN])
    accelerator.load_state(str(tmp_path))
    train(accelerator, model, optimizer, [OVERFLOW])
    assert loss_scale(model) == scales[-1] / 2
    assert (resumed.metrics()["applied_steps"], resumed.metrics()["skipped_steps"]) == (2, 2)
    assert (resumed.events[-1].step, resumed.events[-1].before) == (4, scales[-1])


class Regression(nn.Module):
    """What a Trainer trains: returns its loss. Has FP16 parameters under DeepSpeed, and takes FP32 batches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_mlp()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.body(x.to(self.body[0].weight.dtype))
        return {"loss": (output.float() - labels).square().mean()}


@needs_fp16
def test_a_trainer_logs_what_deepspeed_did(tmp_path: Path) -> None:
    """The callback: scale and skips in log_history, the events in the run's folder, and a run that ends."""
    from transformers import Trainer, TrainingArguments

    rows = [{"x": torch.full((4,), 0.1 * i), "labels": torch.zeros(3)} for i in range(20)]
    rows[5]["labels"] = torch.full((3,), math.inf)
    options = {"zero_optimization": {"stage": 1}, "fp16": {"enabled": True, **FP16}}
    arguments = TrainingArguments(
        str(tmp_path), deepspeed={**options, "train_micro_batch_size_per_gpu": "auto"}, fp16=True, max_steps=4,
        per_device_train_batch_size=5, logging_steps=1, report_to="none", save_strategy="no", train_sampling_strategy="sequential",
    )  # fmt: skip
    callback = MixedPrecisionCallback()
    trainer = Trainer(Regression(), arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["amp/skipped_steps"] for entry in logged] == [0, 1, 1, 1]
    assert [entry["amp/scale"] for entry in logged] == [256.0, 128.0, 128.0, 128.0]
    assert ["grad_norm" in entry for entry in logged] == [True, False, True, True]
    reported = [json.loads(line) for line in (tmp_path / "amp_events.jsonl").read_text().splitlines()]
    assert [(line["step"], line["cause"]) for line in reported if line["event"] == "step_skipped"] == [(2, "UNKNOWN")]
    assert callback.session.metrics()["applied_steps"] == 3


@needs_fp16
def test_two_processes_tell_the_same(tmp_path: Path) -> None:
    """accelerate_configs/deepspeed_zero2_fp16.yaml: NaN on rank 1 alone is no fault of the scale on either rank."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, "--config_file", str(CONFIGS / "deepspeed_zero2_fp16.yaml"), "tests/peers/deepspeed_worker.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    first, second = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    assert first == second
    assert (first["kind"], first["stage"], first["precision"]) == ("DEEPSPEED", 2, "fp16")
    assert first["skips"] == [[2, "UNKNOWN", 65536.0, 65536.0]]  # DeepSpeed's hysteresis of 2
    assert first["counts"] == [4, 1, 1]
