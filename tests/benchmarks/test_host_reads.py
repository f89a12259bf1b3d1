"""How often a training step reads the host, which on an accelerator waits for the device: stock, peers and hf_amp.

Counted by PyTorch's dispatcher (`tests/host_reads.py`), forward and backward included; the same on every machine.

`python -m tests.benchmarks.test_host_reads --out tests/benchmarks/results`
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from hf_amp import AdvancedGradScaler, AmpSession, MixedPrecisionCallback, MixedPrecisionConfig, PrecisionMode
from hf_amp.device import probe
from tests.benchmarks import fabric
from tests.benchmarks.measuring import Row, parser, write
from tests.benchmarks.models import INIT_SCALE
from tests.host_reads import count_host_reads
from tests.integrations.trainers import StockFP16OnCPU, regression_trainer

OPTIMIZERS = {"fused SGD": True, "SGD": False}
MONITORING: dict[str, dict[str, Any]] = {
    "monitoring off": {"enable_monitoring": False},
    "between two close looks": {"monitor_modules": True, "monitoring_interval": 10**6},
    "at a close look": {"monitor_modules": True, "monitoring_interval": 1},
}
STRATEGIES = ("CONSTANT", "DYNAMIC", "ADAPTIVE", "PERFORMANCE_OPTIMIZED")
STEPS = 5
Step = Callable[[], Any]


def model_and_optimizer(fused: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, fused=fused)


def stock_step(fused: bool) -> Step:
    """Autocast, `torch.amp.GradScaler` and clipping."""
    scaler = torch.amp.GradScaler("cpu", init_scale=INIT_SCALE)
    return step_of(*model_and_optimizer(fused), scaler)


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any) -> Step:
    x = torch.ones(4, 8)

    def step() -> None:
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    return step


def fabric_step(fused: bool) -> Step:
    """Lightning Fabric, which refuses to clip with a fused optimizer and so does not clip there."""
    runner, model, optimizer = fabric.fabric_of(*model_and_optimizer(fused), "cpu")
    x = torch.ones(4, 8)

    def step() -> None:
        optimizer.zero_grad()
        runner.backward(model(x).square().mean())
        if not fused:
            runner.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()

    return step


def our_step(fused: bool, strategy: str, **options: Any) -> tuple[Step, AdvancedGradScaler]:
    """A session with its fallback on, and its scaler."""
    model, optimizer = model_and_optimizer(fused)
    config = MixedPrecisionConfig(init_scale=INIT_SCALE, scaling_strategy=strategy, **options)
    session = AmpSession(config, AdvancedGradScaler(config, "cpu"), PrecisionMode.MIXED, probe("cpu"))
    session.register_model(model)
    return step_of(model, optimizer, session.scaler), session.scaler


def reads_a_step(step: Step, scaler: AdvancedGradScaler | None = None) -> float:
    """Reads that wait for a device.

    A verdict that comes a step late lies in the host's memory by then: on a GPU its copy was not waited for, and on a
    CPU, which the counter sees, it is not copied at all. These are left out.
    """
    late: list[int] = []
    if scaler is not None:
        scaler.observers.append(lambda outcome, _: late.append(outcome.attempt < scaler.decided_steps))
    for _ in range(2):
        step()
    late.clear()
    with count_host_reads() as reads:
        for _ in range(STEPS):
            step()
    return (reads.count - sum(late)) / STEPS


def reads_a_trainer_step(folder: Path, *callbacks: TrainerCallback) -> float:
    """What more steps of a Trainer read more: default optimizer (fused AdamW), clipping, no logging."""
    counts = []
    for steps in (2, 2 + STEPS):
        trainer = regression_trainer(
            folder, *callbacks, fp16=True, max_steps=steps, logging_strategy="no", optim="adamw_torch_fused"
        )
        trainer.remove_callback(PrinterCallback)
        for callback in callbacks:
            callback.trainer = trainer  # the stand-in for stock FP16 wants it
        with count_host_reads() as reads:
            trainer.train()
        counts.append(reads.count)
    return (counts[1] - counts[0]) / STEPS


def measure(folder: Path) -> list[Row]:
    """Host reads a step of everything."""
    rows: list[Row] = []

    def add(what: str, optimizer: str, monitoring: str, reads: float | str) -> None:
        rows.append({"what": what, "optimizer": optimizer, "monitoring": monitoring, "host_reads_a_step": reads})

    for name, fused in OPTIMIZERS.items():
        add("torch.amp.GradScaler", name, "without hf_amp", reads_a_step(stock_step(fused)))
        reads = reads_a_step(fabric_step(fused)) if fabric.INSTALLED else "not installed"
        add("Lightning Fabric", name, "without hf_amp", reads)
        for strategy, (monitoring, options) in product(STRATEGIES, MONITORING.items()):
            add(strategy, name, monitoring, reads_a_step(*our_step(fused, strategy, **options)))
    stock = StockFP16OnCPU(init_scale=INIT_SCALE)
    add("Trainer", "fused AdamW", "without hf_amp", reads_a_trainer_step(folder, stock))
    for monitoring, options in MONITORING.items():
        callback = MixedPrecisionCallback({"init_scale": INIT_SCALE, **options})
        add("Trainer with the callback", "fused AdamW", monitoring, reads_a_trainer_step(folder, callback))
    return rows


def main() -> None:
    options = parser().parse_args()
    with TemporaryDirectory() as folder:
        write("host_reads", {"steps": STEPS, "rows": measure(Path(folder))}, options.out)


def test_our_steps_read_once_or_never() -> None:
    """What the table shows of hf_amp is what it promises, and stock reads where its optimizer is not fused."""
    for name, fused in OPTIMIZERS.items():
        assert reads_a_step(stock_step(fused)) == (0 if fused else 1), name
        for strategy, options in product(STRATEGIES, MONITORING.values()):
            promised = 0 if fused and strategy == "PERFORMANCE_OPTIMIZED" else 1
            assert reads_a_step(*our_step(fused, strategy, **options)) == promised, (name, strategy, options)


if __name__ == "__main__":
    main()
