"""What seeing costs: whole training steps with monitoring as it is by default, and with all of it, against those without.

`python -m tests.benchmarks.test_monitoring_cost --out tests/benchmarks/results`
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_amp import AdvancedGradScaler, AmpSession, MixedPrecisionConfig, PrecisionMode
from hf_amp.hardware import probe
from tests.benchmarks.measuring import interleaved, ratio, write
from tests.host_reads import count_host_reads

SIZES = {"tiny": (16, 1, 64), "25M": (512, 7, 5000)}
"""name → width, layers, vocabulary of a GPT-2."""
TOKENS = (4, 128)
"""Batch, length: 512 tokens a step."""
INTERVAL = 10
STEPS_A_ROUND = INTERVAL
"""A round has one close look, as ten steps of a run have."""


def training_steps(size: str, device: str, folder: Path, **options: Any) -> Callable[[], None]:
    """A round of optimizer steps under a session that logs once; on a CPU in emulated FP16."""
    width, layers, vocabulary = SIZES[size]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_positions=TOKENS[1], n_embd=width, n_layer=layers, n_head=4,
            bos_token_id=0, eos_token_id=0,
        )
    ).to(device)  # fmt: skip
    config = MixedPrecisionConfig(init_scale=256.0, monitoring_interval=INTERVAL, **options)
    scaler = AdvancedGradScaler(config, device)
    session = AmpSession(config, scaler, PrecisionMode.MIXED, probe(device))
    session.adopt(model)
    session.log_to(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(vocabulary, TOKENS, device=device)

    def steps() -> None:
        for _ in range(STEPS_A_ROUND):
            with session.autocast():
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
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
        "all": {"monitor_modules": True},
    }
    return {name: training_steps(size, device, folder / name, **chosen) for name, chosen in options.items()}


def test_seeing_adds_no_host_read(tmp_path: Path) -> None:
    """With all of it on, ten steps and their log read the host as often as with none: once a step, beside the model's own."""
    counts = set()
    for steps in contenders("tiny", "cpu", tmp_path).values():
        steps()
        with count_host_reads() as reads:
            steps()
        counts.add(reads.sources.count("tolist"))
    assert counts == {STEPS_A_ROUND}


def main() -> None:
    """Measures and writes the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        seconds = interleaved(contenders("25M", device, Path(folder)), options.rounds)
    ratios = {name: ratio(seconds[name], seconds["off"]) for name in seconds}
    for name, measured in ratios.items():
        print(name, measured)
    write("monitoring_cost", {"interval": INTERVAL, "ratio_to_off": ratios}, options.out)


if __name__ == "__main__":
    main()
