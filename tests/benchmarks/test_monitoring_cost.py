"""What seeing costs: whole training steps with monitoring as it is by default, and with all of it, against those without.

`python -m tests.benchmarks.test_monitoring_cost --out tests/benchmarks/results`
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_amp import AdvancedGradScaler, AmpSession, MixedPrecisionConfig, PrecisionMode
from hf_amp.device import probe
from tests.benchmarks.measuring import Row, compared, device, interleaved, parser, write
from tests.benchmarks.models import INIT_SCALE, MEASURED, SIZES, batch, gpt2
from tests.host_reads import count_host_reads

STEPS_A_ROUND = INTERVAL = 10
"""A round has one close look, as ten steps of a run have."""


def training_steps(size: str, device: str, folder: Path, **options: Any) -> Callable[[], None]:
    """A round of optimizer steps under a session that logs once; on a CPU in emulated FP16."""
    model, inputs = gpt2(size, device), batch(size, device)
    config = MixedPrecisionConfig(init_scale=INIT_SCALE, monitoring_interval=INTERVAL, **options)
    scaler = AdvancedGradScaler(config, device)
    session = AmpSession(config, scaler, PrecisionMode.MIXED, probe(device))
    session.register_model(model)
    session.log_to(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def steps() -> None:
        for _ in range(STEPS_A_ROUND):
            with session.autocast():
                loss = model(**inputs).loss
            scaler.scale(loss).backward()
            scaler.clip_grad_norm_(optimizer, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        session.log_metrics()

    return steps


def contenders(size: str, device: str, folder: Path) -> dict[str, Callable[[], None]]:
    """Rounds of steps without monitoring, with what is on by default, and with all that there is."""
    options: dict[str, dict[str, Any]] = {
        "off": {"enable_monitoring": False},
        "default": {},
        "with monitor_modules": {"monitor_modules": True},
    }
    return {name: training_steps(size, device, folder / name, **chosen) for name, chosen in options.items()}


def measure(size: str, rounds: int, device: str) -> list[Row]:
    """All ratios at one size."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = interleaved(contenders(size, device, Path(folder)), rounds)
    return compared(seconds, "off", STEPS_A_ROUND, parameters=size)


def main() -> None:
    options = parser(MEASURED).parse_args()
    rows = [
        row
        for size in options.sizes
        for row in measure(size, options.rounds or max(SIZES[size].rounds // 2, 4), device())
    ]
    write("monitoring_cost", {"interval": INTERVAL, "rows": rows}, options.out)


def test_seeing_adds_no_host_read(tmp_path: Path) -> None:
    """With all of it on, ten steps and their log read the host as often as with none: once a step, beside the model's own."""
    counts = set()
    for steps in contenders("tiny", "cpu", tmp_path).values():
        steps()
        with count_host_reads() as reads:
            steps()
        counts.add(reads.sources.count("tolist"))
    assert counts == {STEPS_A_ROUND}


if __name__ == "__main__":
    main()
