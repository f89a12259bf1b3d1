"""Models, loops and Trainers whose saved states are in this folder, and what is read of them once they are loaded.

Names that are private to hf_amp do not occur here, so that every later version can run it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_amp
from hf_amp import (
    AdvancedGradScaler,
    AdvancedMixedPrecisionManager,
    AmpSession,
    MixedPrecisionCallback,
    MixedPrecisionConfig,
)


class InfiniteGradient(torch.autograd.Function):
    """Identity whose gradient is inf: what a scale that is too large does to a finite loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.inf


# ---- a scaler alone ---------------------------------------------------------------------------------------------

SCALERS: dict[str, dict[str, Any]] = {
    "CONSTANT": {"scaling_strategy": "CONSTANT"},
    "DYNAMIC": {"scaling_strategy": "DYNAMIC"},
    "ADAPTIVE": {"scaling_strategy": "ADAPTIVE"},
    "PERFORMANCE_OPTIMIZED": {"scaling_strategy": "PERFORMANCE_OPTIMIZED"},
    "DYNAMIC_with_hysteresis": {"scaling_strategy": "DYNAMIC"},
    "guard_BF16": {"precision_mode": "BF16"},
}
"""Name of the file → options of the scaler that loads it: none that the file brings with it, and no hysteresis."""


def scaler_steps(
    scaler: AdvancedGradScaler, steps: Iterable[int], overflows: Iterable[int], fused: bool = False
) -> list[float]:
    """Optimizer steps `steps` on eight weights, whose gradients are exact; the scale after each."""
    weights = nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.SGD([weights], lr=0.5, fused=fused)
    scales = []
    for step in steps:
        loss = (weights * torch.arange(1.0, 9.0) * 2.0 ** (step % 4)).sum()
        scaler.scale(InfiniteGradient.apply(loss) if step in overflows else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales


def scaler_facts(scaler: AdvancedGradScaler) -> dict[str, Any]:
    """Scale, counters, growth tracker, and the options that come with a state."""
    scaler.flush()
    return {
        "scale": scaler.get_scale(),
        "applied_steps": scaler.applied_steps,
        "skipped_steps": scaler.skipped_steps,
        "growth_tracker": scaler.state_dict()["_growth_tracker"],
        "growth_factor": scaler.get_growth_factor(),
        "backoff_factor": scaler.get_backoff_factor(),
        "growth_interval": scaler.get_growth_interval(),
    }


def loaded_scaler(file: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What a new scaler is after loading `file`, and the scale after each of 24 more steps, three of which overflow."""
    scaler = AdvancedGradScaler(MixedPrecisionConfig(**options), "cpu")
    scaler.load_state_dict(torch.load(file, weights_only=True))
    fused = options.get("scaling_strategy") == "PERFORMANCE_OPTIMIZED"
    return {**scaler_facts(scaler), "goes_on": scaler_steps(scaler, range(15, 39), (18, 19, 30), fused)}


# ---- FP16 parameters with FP32 master weights -------------------------------------------------------------------


@dataclass
class HalfRun:
    """FP16 parameters, the optimizer that moves their FP32 master weights, and their scaler."""

    scaler: AdvancedGradScaler = field(
        default_factory=lambda: AdvancedGradScaler(MixedPrecisionConfig(precision_mode="FP16"), "cpu")
    )

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.weights = nn.Parameter(torch.randn(16).half())
        self.optimizer = torch.optim.AdamW([self.weights], lr=1e-3)

    def train(self, steps: Iterable[int], overflows: Iterable[int]) -> None:
        for step in steps:
            loss = (self.weights.float() - 0.25 * (step % 3)).square().sum() * 2.0**-8
            self.scaler.scale(InfiniteGradient.apply(loss) if step in overflows else loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()

    def saved(self) -> dict[str, Any]:
        return {
            "weights": self.weights.detach().clone(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, saved: dict[str, Any]) -> None:
        with torch.no_grad():
            self.weights.copy_(saved["weights"])
        self.scaler.load_state_dict(saved["scaler"])
        self.scaler.keep_master_weights(self.optimizer)
        self.optimizer.load_state_dict(saved["optimizer"])


def loaded_half_run(file: Path) -> dict[str, Any]:
    """What a run of FP16 parameters is after loading `file`, and its master weights as they are saved again."""
    run = HalfRun()
    run.load(torch.load(file, weights_only=True))
    again = run.optimizer.state_dict()
    (masters,) = (value for name, value in again.items() if name not in ("state", "param_groups"))
    facts = {**scaler_facts(run.scaler), "master_weights": masters[0].tolist()}
    run.train(range(15, 20), (17,))
    return {**facts, "weights_after_20_steps": run.weights.tolist()}


# ---- a loop with Accelerate -------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers, 4 → 16 → 3."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def batch(step: int) -> Tensor:
    """Eight rows of four numbers, others in every step."""
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


class Loop:
    """A loop with Accelerate on a CPU, from an optimizer step on."""

    def __init__(self, precision: str, model: nn.Module | None = None, **options: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
        GradientState._reset_state()
        self.accelerator = Accelerator(mixed_precision=precision, cpu=True)
        self.session = hf_amp.attach(self.accelerator, MixedPrecisionConfig(**options))
        model = Net() if model is None else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 30)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)

    def train(
        self,
        steps: Iterable[int],
        *,
        overflows: Iterable[int] = (),
        large: Iterable[int] = (),
        nan: Iterable[int] = (),
        zero: Iterable[int] = (),
        log_every: int = 0,
    ) -> None:
        """Steps, counted from 1. `overflows` have gradients of inf; `large`, `nan` and `zero` are told by their names."""
        for step in steps:
            x = batch(step) * (1e6 if step in large else torch.nan if step in nan else 1.0)
            loss = self.model(x).float().square().mean() * (0.0 if step in zero else 1.0)
            self.accelerator.backward(InfiniteGradient.apply(loss) if step in overflows else loss)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            if log_every and step % log_every == 0:
                self.session.log_metrics(loss=loss.item())


def session_facts(session: AmpSession) -> dict[str, Any]:
    """Scale, counters, growth tracker, plan and metrics."""
    plan = session.plan
    return {
        **scaler_facts(session.scaler),
        "plan": {"default": plan.default.value, "modules": {n: m.value for n, m in plan.modules.items()}},
        "metrics": session.metrics(),
    }


def events_after(session: AmpSession, step: int) -> list[list[Any]]:
    """[step, kind, cause, before, after, modules] of every event after optimizer step `step`."""
    return [
        [e.step, e.kind.value, e.cause and e.cause.value, e.before, e.after, list(e.modules)]
        for e in session.events
        if e.step > step
    ]


def loaded_loop(folder: Path, precision: str) -> dict[str, Any]:
    """What a new loop is after `accelerator.load_state(folder)`, what it tells of 26 more steps, and of five whose
    gradients are zero.
    """
    loop = Loop(precision, recovery_steps=8)
    loop.accelerator.load_state(str(folder))
    facts = session_facts(loop.session)
    if (
        precision not in folder.name
    ):  # newest figures of another precision say nothing here; what is counted does
        counted = ("applied_steps", "skip", "non_finite_losses")
        facts["metrics"] = {n: v for n, v in facts["metrics"].items() if n.startswith(counted)}
    rate = loop.scheduler.get_last_lr()[0]
    begins = loop.session.newest_step
    loop.train(range(begins + 1, begins + 27), overflows=(begins + 3,), large=(begins + 9,))
    end = {name: value for name, value in session_facts(loop.session).items() if name != "metrics"}
    events = events_after(loop.session, begins)
    loop.session.detach()
    stalled = Loop(precision, patience=3)
    stalled.accelerator.load_state(str(folder))
    stalled.train(range(begins + 1, begins + 6), zero=range(begins + 1, begins + 6))
    reported = events_after(stalled.session, begins)
    stalled.session.detach()
    return {
        **facts,
        "newest_step": begins,
        "learning_rate": rate,
        "then": {"events": events, "end": end},
        "with zero gradients": {"events": reported},
    }


# ---- a Trainer --------------------------------------------------------------------------------------------------

TRAINER_OPTIONS = {"init_scale": 1024.0, "growth_interval": 3}
LARGE_MODULE = "transformer.h.0.mlp.c_proj"
SAVED_AT = 6
TRAINER_STEPS = 10


def tiny_gpt2() -> GPT2LMHeadModel:
    """One layer of width 8 over 64 tokens, without dropout."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_positions=16, n_embd=8, n_layer=1, n_head=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def token_rows(labelled: bool = True) -> list[dict[str, list[int]]]:
    """64 rows of 16 tokens; without labels the loss ignores every one of them."""
    rows = [[(7 * row + column * column) % 64 for column in range(16)] for row in range(64)]
    return [{"input_ids": row, "labels": row if labelled else [-100] * 16} for row in rows]


def arguments(folder: str, **options: Any) -> TrainingArguments:
    """FP16 on the CPU, a log entry every two steps, four rows a batch in order, nothing saved; changed by `options`."""
    defaults: dict[str, Any] = {
        "fp16": True,
        "use_cpu": True,
        "max_steps": TRAINER_STEPS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
    }
    return TrainingArguments(folder, **{**defaults, **options})


class InfiniteGradientsAt(TrainerCallback):
    """Makes a gradient of the given optimizer steps, counted from 1, inf."""

    def __init__(self, *steps: int) -> None:
        self._steps = steps
        self._handle: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 in self._steps:
            parameter = next(kwargs["model"].parameters())
            self._handle = parameter.register_hook(lambda gradient: gradient * torch.inf)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._handle is not None:
            self._handle.remove()


class LargeWeightsAt(TrainerCallback):
    """Makes one module's weights so large, before the given optimizer step, that its output is beyond 65504."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self._step:
            with torch.no_grad():
                kwargs["model"].get_submodule(LARGE_MODULE).weight.mul_(1e8)


class Beginning(TrainerCallback):
    """Notes what the session is before the first step, its checkpoint loaded."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.session: AmpSession | None = None
        self.facts: dict[str, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.session is None:
            assert self.trainer is not None
            held = self.trainer.callback_handler.callbacks
            (callback,) = (c for c in held if isinstance(c, MixedPrecisionCallback))
            self.session = callback.session
            self.facts = {**session_facts(self.session), "global_step": state.global_step}


def gpt2_trainer(folder: str, *callbacks: Any, labelled: bool = True, **options: Any) -> Trainer:
    """A stock Trainer on the tiny GPT-2."""
    set_seed(0)
    return Trainer(
        tiny_gpt2(),
        arguments(folder, **options),
        train_dataset=token_rows(labelled),
        callbacks=list(callbacks),
    )


def resumed_trainer(folder: Path, restore: bool = False) -> dict[str, Any]:
    """What a Trainer is after resuming from the checkpoint in `folder`, to which it writes, and at its end.

    Args:
        restore: whether the Trainer makes the callback anew from what the checkpoint says of it, options included.
    """
    beginning = Beginning()
    trainer = beginning.trainer = gpt2_trainer(
        str(folder), MixedPrecisionCallback(TRAINER_OPTIONS), beginning, InfiniteGradientsAt(8),
        restore_callback_states_from_checkpoint=restore,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED_AT}"))
    session = beginning.session
    assert session is not None
    end = {name: value for name, value in session_facts(session).items() if name != "metrics"}
    entries = [e for e in trainer.state.log_history if "loss" in e and e["step"] > SAVED_AT]
    return {
        **beginning.facts,
        "then": {
            "events": [e for e in events_after(session, SAVED_AT) if e[0] == 8],
            "end": end,
            "losses": [entry["loss"] for entry in entries],
        },
    }


# ---- the manager ------------------------------------------------------------------------------------------------


def new_manager(**options: Any) -> AdvancedMixedPrecisionManager:
    """One whose loss overflows in backward where the first target is 1."""

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = outputs.float().square().mean()
        return InfiniteGradient.apply(loss) if targets[0] == 1 else loss

    return AdvancedMixedPrecisionManager(MixedPrecisionConfig(**options), loss_fn=loss_fn)


def loaded_manager(file: Path, **options: Any) -> dict[str, Any]:
    """What a new manager is after `load(file)`."""
    with new_manager(**options) as manager:
        manager.load(file)
        stats = manager.get_training_stats()["precision_stats"]
        return {
            "epochs": manager.epochs,
            **session_facts(manager.trainer.session),
            "precision_stats": {
                "fallback_count": stats["fallback_count"],
                "numerical_error_counts": dict(stats["numerical_error_counts"]),
                "gradient_scale": {
                    **stats["gradient_scale"],
                    "history": [list(change) for change in stats["gradient_scale"]["history"]],
                },
            },
        }


# ---- logs -------------------------------------------------------------------------------------------------------


def log_facts(history: Any, level: str) -> dict[str, Any]:
    """What the history of a run says, and the level of its verdict."""
    return {
        "level": level,
        "newest_step": history.newest_step,
        "ended": history.ended,
        "precision": history.precision,
        "resumed_at": list(history.resumed_at),
        "former_runs": history.former_runs,
        "lines": history.lines,
        "torn_lines": int(history.torn_lines),
        "skipped_by_cause": dict(history.skipped_by_cause),
        "transitions": [[t.step, t.before, t.after, list(t.modules), t.cause] for t in history.precision_changes],
        "incidents": [
            {
                "event": incident.event,
                "cause": incident.cause,
                "modules": list(incident.modules),
                "count": incident.count,
                "first_step": incident.first_step,
                "last_step": incident.last_step,
            }
            for incident in history.incidents
        ],
        "latest": {name: _json_number(value) for name, value in history.latest.items()},
        "module_figures": {
            name: {module: series.values[-1] for module, series in modules.items()}
            for name, modules in history.modules.items()
        },
    }


def _json_number(value: float) -> float | str:
    return value if abs(value) < float("inf") else str(value)
