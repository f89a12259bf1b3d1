"""Makes every other file of this folder, as hf_amp wrote them at commit 76f9429, and `expected.json`: what hf_amp said
there on loading each.

At that commit, with this folder put into its tests: python -m tests.data.at_76f9429.make
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, set_seed

from hf_amp import AdvancedGradScaler, MixedPrecisionCallback, MixedPrecisionConfig
from hf_amp.monitoring.run_history import read_run
from hf_amp.monitoring.verdict import verdict_on
from tests.data.at_76f9429 import runs

HERE = Path(__file__).resolve().parent
LOG = "amp_events.jsonl"
NOT_NEEDED = (
    "accelerate_bf16/random_states_0.pkl",
    f"trainer_fp16/checkpoint-{runs.SAVED_AT}/rng_state.pth",
    f"trainer_fp16/checkpoint-{runs.SAVED_AT}/training_args.bin",
)
"""Of what was saved: left out, to keep it small."""


@contextmanager
def empty_folder() -> Iterator[Path]:
    """A new folder, in which everything is written under relative names, because messages name files."""
    former = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(former)


def keep_checkpoint(name: str) -> None:
    shutil.copytree(name, HERE / name)
    for path in NOT_NEEDED:
        if path.startswith(name):
            (HERE / path).unlink()


def keep_log(name: str) -> None:
    shutil.copy(LOG, HERE / f"amp_events_{name}.jsonl")


# ---- states -----------------------------------------------------------------------------------------------------


def save_scalers() -> None:
    """One for each strategy, with hysteresis, and a guard: 15 steps, of which the second and the tenth overflow."""
    short = {"init_scale": 1024.0, "growth_interval": 4}
    options: dict[str, dict[str, Any]] = {
        "CONSTANT": {"scaling_strategy": "CONSTANT", "init_scale": 256.0},
        "DYNAMIC": {"scaling_strategy": "DYNAMIC", **short},
        "ADAPTIVE": {"scaling_strategy": "ADAPTIVE", **short},
        "PERFORMANCE_OPTIMIZED": {"scaling_strategy": "PERFORMANCE_OPTIMIZED", **short},
        "DYNAMIC_with_hysteresis": {
            "scaling_strategy": "DYNAMIC", **short, "hysteresis": 2, "overflow_tolerance": 0.05,
        },
        "guard_BF16": {"precision_mode": "BF16"},
    }  # fmt: skip
    for name, chosen in options.items():
        scaler = AdvancedGradScaler(MixedPrecisionConfig(**chosen), "cpu")
        # The second overflow of two in a row backs off with hysteresis too
        overflows = (1, 2, 9) if "hysteresis" in name else (1, 9)
        runs.scaler_steps(scaler, range(15), overflows, fused=name == "PERFORMANCE_OPTIMIZED")
        torch.save(scaler.state_dict(), HERE / f"scaler_{name}.pt")


def save_half_run() -> None:
    run = runs.HalfRun()
    run.train(range(15), (1, 9))
    torch.save(run.saved(), HERE / "fp16_master_weights.pt")


def save_accelerate() -> None:
    """FP16: skips of three causes, and a module in FP32. BF16: two overflows that nothing explains; all of it in FP32."""
    loop = runs.Loop("fp16", init_scale=1024.0, growth_interval=4, recovery_steps=8, monitoring_interval=2)
    loop.train(range(1, 13), overflows=(2,), large=(5,), nan=(9,), zero=(12,))
    loop.accelerator.save_state("accelerate_fp16")
    loop.session.detach()
    loop = runs.Loop("bf16", recovery_steps=8, monitoring_interval=2)
    loop.train(range(1, 10), nan=(2,), overflows=(4, 5))
    loop.accelerator.save_state("accelerate_bf16")
    loop.session.detach()
    for name in ("accelerate_fp16", "accelerate_bf16"):
        keep_checkpoint(name)


def save_trainer() -> None:
    """Ten steps, of which the second overflows and the fourth has a module fall back; the checkpoint is of the sixth."""
    trainer = runs.gpt2_trainer(
        "trainer_fp16", MixedPrecisionCallback(runs.TRAINER_OPTIONS), runs.InfiniteGradientsAt(2),
        runs.LargeWeightsAt(4), save_strategy="steps", save_steps=runs.SAVED_AT,
    )  # fmt: skip
    trainer.train()
    keep_checkpoint(f"trainer_fp16/checkpoint-{runs.SAVED_AT}")
    shutil.copy(Path("trainer_fp16") / LOG, HERE / "trainer_fp16" / LOG)


def save_managers() -> None:
    """Two epochs each; in FP16 with skips of three causes, and with DYNAMIC through its choice of a precision."""
    for name, options in (
        ("manager_fp16", {"init_scale": 1024.0, "growth_interval": 4, "monitoring_interval": 2}),
        ("manager_dynamic", {"precision_mode": "DYNAMIC", "init_scale": 1024.0}),
    ):
        batches = [(runs.batch(step), torch.zeros(1)) for step in range(24 if "dynamic" in name else 8)]
        batches[1] = (batches[1][0], torch.ones(1))
        if name == "manager_fp16":
            batches[3] = (batches[3][0] * 1e6, torch.zeros(1))
            batches[5] = (batches[5][0] * torch.nan, torch.zeros(1))
        model = runs.Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with runs.new_manager(**options) as manager:
            for _ in range(2):
                manager.train_epoch(batches, model, optimizer, progress=False)
            manager.save(HERE / f"{name}.pt")


# ---- logs -------------------------------------------------------------------------------------------------------


def logged_loop(precision: str, model: nn.Module | None = None, **options: Any) -> runs.Loop:
    loop = runs.Loop(precision, model, **options)
    loop.session.log_to(".")
    return loop


def no_step() -> None:
    logged_loop("fp16").session.detach()


def fallback_and_recovery() -> None:
    """The scale is too large twice, an activation once, and the module is tried in FP16 again."""
    loop = logged_loop("fp16", init_scale=1024.0, recovery_steps=6)
    loop.train(range(1, 19), overflows=(1, 2), large=(6,), log_every=3)
    loop.session.detach()


def module_metrics() -> None:
    loop = logged_loop("fp16", init_scale=1024.0, monitor_modules=True, monitoring_interval=2)
    loop.train(range(1, 9), large=(5,), log_every=2)
    loop.session.detach()


def stalled() -> None:
    loop = logged_loop("fp16", init_scale=1024.0, patience=4)
    loop.train(range(1, 11), nan=range(5, 11), log_every=2)
    loop.session.detach()


def nothing_learned() -> None:
    loop = logged_loop("bf16", patience=4)
    loop.train(range(1, 7), nan=range(1, 7), log_every=2)
    loop.session.detach()


def zero_gradients() -> None:
    loop = logged_loop("fp16", init_scale=1024.0)
    loop.train(range(1, 9), zero=(3, 4), log_every=2)
    loop.session.detach()


def whole_model() -> None:
    loop = logged_loop("bf16")
    loop.train(range(1, 9), overflows=(3, 4), log_every=4)
    loop.session.detach()


def at_floor() -> None:
    loop = logged_loop("fp16", init_scale=2.0, min_scale=1.0)
    loop.train(range(1, 9), overflows=(2, 3, 4), log_every=4)
    loop.session.detach()


def choice_of_precision() -> None:
    """DYNAMIC tries each precision, and runs the fastest."""
    loop = logged_loop("fp16", precision_mode="DYNAMIC", init_scale=1024.0)
    loop.train(range(1, 41), log_every=20)
    loop.session.detach()


def half_parameters_told() -> None:
    loop = logged_loop("bf16", runs.Net().bfloat16(), monitoring_interval=1)
    loop.train(range(1, 5), log_every=2)
    loop.session.detach()


def parameters_converted() -> None:
    loop = logged_loop("fp16", runs.Net().half(), init_scale=1024.0)
    loop.train(range(1, 5), log_every=2)
    loop.session.detach()


def master_weights_kept() -> None:
    loop = logged_loop("fp16", runs.Net().half(), init_scale=1024.0, half_parameters="master_weights")
    loop.train(range(1, 5), overflows=(2,), log_every=2)
    loop.session.detach()


class Normalised(nn.Module):
    """Two layers with a batch norm in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def buffers_restored() -> None:
    loop = logged_loop("fp16", Normalised(), init_scale=1024.0)
    loop.train(range(1, 7), nan=(3,), log_every=3)
    loop.session.detach()


def state_loaded() -> None:
    """Killed two steps after it was saved, and taken up again in the same folder."""
    loop = logged_loop("fp16", init_scale=1024.0, recovery_steps=1000)
    loop.train(range(1, 7), overflows=(2,), large=(5,), log_every=2)
    loop.accelerator.save_state("saved")
    loop.train(range(7, 9), nan=(7,), log_every=2)
    again = runs.Loop("fp16", recovery_steps=1000)
    again.accelerator.load_state("saved")
    again.session.log_to(".")
    again.train(range(7, 11), overflows=(9,), log_every=2)
    again.session.detach()


def begun_anew_and_killed() -> None:
    """A run that ended, one that was begun in its place, and a kill in the middle of a line."""
    first = logged_loop("fp16", init_scale=1024.0)
    first.train(range(1, 4), overflows=(1,), log_every=3)
    first.session.detach()
    again = logged_loop("fp16", init_scale=1024.0)
    again.train(range(1, 7), overflows=(1, 3), log_every=2)
    log = Path(LOG)
    log.write_bytes(log.read_bytes()[:-100])


class Regression(nn.Module):
    """Two layers over 4 floats; takes NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        y = self.output(torch.tanh(self.hidden(x))).squeeze(-1)
        return {"logits": y} if labels is None else {"loss": (y - labels).square().mean(), "logits": y}


def rows(nan: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """64 rows of 4 floats, of which `nan` hold NaN, and their sums."""
    x = torch.rand(64, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    labels = x.sum(1).tolist()
    x[list(nan)] = torch.nan
    return [{"x": values, "labels": label} for values, label in zip(x.tolist(), labels, strict=True)]


def regression_trainer(callback: MixedPrecisionCallback, *others: TrainerCallback, **options: Any) -> Trainer:
    set_seed(0)
    given = {name: options.pop(name) for name in ("train_dataset", "eval_dataset") if name in options}
    return Trainer(
        Regression(), runs.arguments(".", **{"max_steps": 6, "logging_steps": 2, **options}),
        **{"train_dataset": rows(), **given}, callbacks=[callback, *others],
    )  # fmt: skip


class PoisonAt4(TrainerCallback):
    """Makes a weight NaN before the fourth step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            nn.init.constant_(kwargs["model"].output.bias, torch.nan)


def checkpoint_withheld() -> None:
    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    regression_trainer(callback, PoisonAt4(), save_strategy="steps", save_steps=2).train()


def evaluation_lost_batches() -> None:
    callback = MixedPrecisionCallback({"init_scale": 1024.0})
    regression_trainer(
        callback, runs.InfiniteGradientsAt(2), eval_strategy="steps", eval_steps=3, eval_dataset=rows((1, 9))
    ).train()


def training_stopped() -> None:
    """Batch after batch holds NaN, and the run was to be stopped then, after a good checkpoint."""
    options = {"patience": 4, "stop_when_stalled": True, "init_scale": 1024.0}
    regression_trainer(
        MixedPrecisionCallback(options), train_dataset=rows(tuple(range(8, 64))), max_steps=12,
        save_strategy="steps", save_steps=2,
    ).train()  # fmt: skip


def labels_ignored() -> None:
    """Every gradient is zero, and the run was to be stopped then; in a Trainer."""
    options = {"patience": 3, "stop_when_stalled": True, "init_scale": 1024.0}
    runs.gpt2_trainer(".", MixedPrecisionCallback(options), labelled=False).train()


LOGS: tuple[Callable[[], None], ...] = (
    no_step, fallback_and_recovery, module_metrics, stalled, nothing_learned, zero_gradients, whole_model, at_floor,
    choice_of_precision, half_parameters_told, parameters_converted, master_weights_kept, buffers_restored,
    state_loaded, begun_anew_and_killed, checkpoint_withheld, evaluation_lost_batches, training_stopped,
    labels_ignored,
)  # fmt: skip


# ---- what was said of them --------------------------------------------------------------------------------------


def history_facts(run: Path) -> dict[str, Any]:
    history = read_run(run)
    return runs.log_facts(history, verdict_on(history).level.value)


def expected() -> dict[str, Any]:
    """What this version says on loading each file."""
    with empty_folder() as folder:
        shutil.copytree(HERE / "trainer_fp16", "trainer_fp16")
        trainer = runs.resumed_trainer(folder / "trainer_fp16")
        trainer_log = history_facts(folder / "trainer_fp16")
        for name in ("latest", "lines"):
            del trainer_log[name]
    return {
        "scalers": {
            name: runs.loaded_scaler(HERE / f"scaler_{name}.pt", options)
            for name, options in runs.SCALERS.items()
        },
        "optimizers": {"fp16_master_weights": runs.loaded_half_run(HERE / "fp16_master_weights.pt")},
        "accelerate": {
            f"{saved} loaded in {precision}": runs.loaded_loop(HERE / saved, precision)
            for saved in ("accelerate_fp16", "accelerate_bf16")
            for precision in ("fp16", "bf16")
        },
        "trainers": {"trainer_fp16": trainer, "its log after resuming": trainer_log},
        "managers": {
            "manager_fp16": runs.loaded_manager(HERE / "manager_fp16.pt"),
            "manager_dynamic": runs.loaded_manager(HERE / "manager_dynamic.pt", precision_mode="DYNAMIC"),
        },
        "logs": {
            log.relative_to(HERE).as_posix(): history_facts(log)
            for log in sorted([*HERE.glob("amp_events_*.jsonl"), HERE / "trainer_fp16" / LOG])
        },
    }


def as_text(facts: dict[str, Any]) -> str:
    """JSON with a line for each file."""
    parts = []
    for name, of_files in facts.items():
        lines = ",\n".join(
            f"  {json.dumps(file)}: {json.dumps(value, allow_nan=False)}" for file, value in of_files.items()
        )
        parts.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    for path in HERE.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".py":
            path.unlink()
    save_scalers()
    save_half_run()
    save_managers()
    for save in (save_accelerate, save_trainer):
        with empty_folder():
            save()
    for make_log in LOGS:
        with empty_folder():
            make_log()
            keep_log(make_log.__name__)
    (HERE / "expected.json").write_text(as_text(expected()), encoding="utf-8")


if __name__ == "__main__":
    main()
