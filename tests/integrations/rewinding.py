"""Runs that go back, beside manual resumes: a Trainer's, from a checkpoint whose `global_step` somebody has edited."""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, set_seed

from hf_amp import EventKind, MixedPrecisionCallback
from hf_amp.statistics import is_distributed, is_main_process
from tests.integrations.trainers import arguments
from tests.rank_end import leave_together
from tests.reference import TIMINGS

GOOD_AFTER, SAVE_STEPS = 4, {"weights": 3, "stall": 3, "spike": 16}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        fault: "weights" (one becomes NaN), "stall" (a row of NaN batches) or "spike" (labels far out).
        at: optimizer step of the fault.
        arguments: of the Trainer.
        options: of the callback.
    """

    fault: str
    at: int
    steps: int
    rows: int
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


PRECISIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"bf16": True}, {}),
    ({"fp16": True}, {"init_scale": 1024.0, "growth_interval": 5}),
    ({"fp16": True}, {"scaling_strategy": "ADAPTIVE"}),
    ({"fp16": True, "optim": "adamw_torch_fused"}, {"scaling_strategy": "PERFORMANCE_OPTIMIZED"}),
    ({"fp16": True, "half": True}, {"half_parameters": "master_weights", "init_scale": 1024.0}),
    ({"bf16": True, "half": True}, {"half_parameters": "kahan"}),
    ({"bf16": True, "half": True}, {"half_parameters": "stochastic_rounding"}),
]
LOOPS: list[dict[str, Any]] = [
    {"eval_strategy": "steps", "eval_steps": 1},  # which draws random numbers between two steps
    {"gradient_accumulation_steps": 2},
    {"optim": "sgd"},
    {"lr_scheduler_type": "cosine", "warmup_steps": 5},
    {"train_sampling_strategy": "random", "dataloader_num_workers": 0},
    {"optim": "adafactor"},
]


def case_number(number: int) -> Case:
    """One of as many as wanted: precision, loop, fault and the place of the fault differ."""
    draw = random.Random(number)
    precision, options = PRECISIONS[number % len(PRECISIONS)]
    loop = dict(LOOPS[number % len(LOOPS)])
    if "optim" in precision or "half" in precision:
        loop.pop("optim", None)
    fault = ("weights", "spike", "stall")[number % 3]
    options = {**options, "on_stalled": "rewind", "good_after": GOOD_AFTER, "patience": 3}
    if fault == "spike":
        at = draw.randint(104, 118)
        options["loss_spikes"] = True
        options.setdefault("init_scale", 1024.0)  # a step that overflows is skipped, and nothing to go back from
        options.pop("growth_interval", None)
    else:
        at = draw.randint(9, 26)
    micro = loop.get("gradient_accumulation_steps", 1)
    several_epochs = fault == "weights"
    steps = at + draw.randint(6, 12)
    rows = 4 * micro * (draw.randint(6, 12) if several_epochs else steps + 2)
    return Case(fault, at, steps, rows, {**precision, **loop}, options)


class Noisy(nn.Module):
    """Two layers over 4 floats with dropout and batch norm, so that random numbers and running statistics count."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.output = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        hidden = self.hidden(x.to(self.hidden.weight.dtype))
        y = self.output(self.dropout(torch.tanh(self.norm(hidden.float()).to(hidden.dtype)))).squeeze(-1).float()
        return {"loss": (y - labels).square().mean(), "logits": y} if labels is not None else {"logits": y}


def rows_for(case: Case, world: int = 1) -> list[dict[str, Any]]:
    """The data: with NaN or labels far out in the batches of the fault, where it is of that kind."""
    generator = torch.Generator().manual_seed(case.rows)
    x = torch.rand(case.rows * world, 4, generator=generator) - 0.5
    labels = x.sum(1)
    size = 4 * case.arguments.get("gradient_accumulation_steps", 1) * world
    first = size * (case.at - 1)
    if case.fault == "stall":
        x[first : first + 3 * size] = torch.nan
    elif case.fault == "spike":
        labels[first : first + size] = 3.0
    return [{"x": row.tolist(), "labels": label} for row, label in zip(x, labels.tolist(), strict=True)]


class Poison(TrainerCallback):
    """Makes a weight NaN before an optimizer step, as memory that fails does."""

    def __init__(self, at: int) -> None:
        self._at = at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._at - 1:
            with torch.no_grad():
                kwargs["model"].get_parameter(
                    "hidden.weight" if not hasattr(kwargs["model"], "module") else "module.hidden.weight"
                )[0, 0] = torch.nan
            self._at = 0


def trainer_of(case: Case, folder: Path, *callbacks: TrainerCallback, world: int = 1, seed: int = 3) -> Trainer:
    """A stock Trainer on it."""
    set_seed(seed)
    model = Noisy()
    options = dict(case.arguments)
    if options.pop("half", False):
        dtype = torch.float16 if options.get("fp16") else torch.bfloat16
        for layer in (model.hidden, model.output):
            layer.to(dtype)
    defaults = {
        "fp16": False,
        "train_sampling_strategy": "sequential",
        "max_steps": case.steps,
        "save_strategy": "steps",
    }
    if case.fault != "weights":
        options["train_sampling_strategy"] = "sequential"
    given = arguments(
        folder, **{**defaults, "save_steps": SAVE_STEPS.get(case.fault, 3), "learning_rate": 1e-2, **options}
    )
    rows = rows_for(case, world)
    return Trainer(model, given, train_dataset=rows, eval_dataset=rows[:4], callbacks=list(callbacks))


def state_of(trainer: Trainer, callback: MixedPrecisionCallback) -> dict[str, Any]:
    """All that training goes on from."""
    session = callback.session
    assert session is not None
    progress = session.progress()
    for part in ("throughput", "rewind"):
        progress["stateful"].pop(part, None)
    return {
        "model": dict(trainer.model.state_dict()),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
        "scaler": {k: v for k, v in session.scaler.state_dict().items() if k != "hf_amp"},
        "policy": session.scaler.state_dict().get("hf_amp", {}).get("policy"),
        "progress": progress,
        "figures": {n: v for n, v in session.metrics().items() if n not in {*TIMINGS, "rewinds"}},
        "step": trainer.state.global_step,
        "epoch": trainer.state.epoch,
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e][-3:],
    }


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested states differ, to the last bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return (
            []
            if same and one.contiguous().view(-1).view(torch.uint8).equal(other.contiguous().view(-1).view(torch.uint8))
            else [where]
        )
    if isinstance(one, dict):
        if not isinstance(other, dict) or list(one) != list(other):
            return [f"{where}: keys {list(one)} {list(other) if isinstance(other, dict) else other}"]
        return [d for key in one for d in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, (list, tuple)):
        if not isinstance(other, (list, tuple)) or len(one) != len(other):
            return [where]
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{where}[{i}]")]
    return [] if one == other or (one != one and other != other) else [f"{where}: {one!r} {other!r}"]


def edited(checkpoint: Path, folder: Path, step: int) -> Path:
    """A copy of a checkpoint that says that it is from after `step` steps."""
    place = folder / f"checkpoint-{step}"
    if is_main_process():
        shutil.copytree(checkpoint, place)
        file = place / "trainer_state.json"
        state = json.loads(file.read_text())
        file.write_text(json.dumps({**state, "global_step": step}))
    if is_distributed():
        dist.barrier()
    return place


def rewound_run(case: Case, folder: Path, world: int = 1) -> tuple[Trainer, MixedPrecisionCallback]:
    """The run that goes back by itself."""
    callback = MixedPrecisionCallback(case.options)
    poison = [Poison(case.at)] if case.fault == "weights" else []
    trainer = trainer_of(case, folder, callback, *poison, world=world)
    trainer.train()
    return trainer, callback


def resumed_run(case: Case, place: Path, folder: Path, world: int = 1) -> dict[str, Any]:
    """The state at the end of a run of another process that goes on from a checkpoint."""
    callback = MixedPrecisionCallback({**case.options, "on_stalled": "report"})
    trainer = trainer_of(case, folder, callback, world=world, seed=77)
    trainer.train(resume_from_checkpoint=str(place))
    return state_of(trainer, callback)


def compare(case: Case, folder: Path, world: int = 1) -> list[str]:
    """Where a run that goes back once differs at its end from a manual resume without the batches in between."""
    trainer, callback = rewound_run(case, folder / "rewound", world)
    events = [e for e in callback.session.events if e.kind is EventKind.REWOUND]
    if len(events) != 1:
        return [f"{len(events)} rewinds: {[e.message for e in callback.session.events]}"]
    ours = state_of(trainer, callback)
    place = edited(folder / "rewound" / f"checkpoint-{events[0].after}", folder / "manual", int(events[0].before))
    return differences(ours, resumed_run(case, place, folder / "manual", world))


def main() -> None:
    """One of two processes: prints where rank 0 or rank 1 differs, by case."""
    folder, *numbers = sys.argv[1:]
    found = {n: compare(case_number(int(n)), Path(folder) / n, world=2) for n in numbers}
    every: list[Any] = [None, None]
    dist.all_gather_object(every, found)
    if dist.get_rank() == 0:
        print(json.dumps(every))
    leave_together()


if __name__ == "__main__":
    main()
