"""What the fallback costs while nothing goes wrong: whole training steps with it on, as a ratio to those with it off.

`python -m tests.benchmarks.test_fallback_cost --out tests/benchmarks/results`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_amp import AdvancedGradScaler, AmpSession, MixedPrecisionConfig, PrecisionMode
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.hardware import probe
from tests.benchmarks.measuring import interleaved, ratio, write

SIZES = {"1M": (128, 5, 256), "25M": (512, 7, 5000)}
"""name → width, layers, vocabulary of a GPT-2."""
TOKENS = (4, 128)
"""Batch, length: 512 tokens a step."""


def training_step(size: str, device: str, fp32_share: float = 0.0, **options: Any) -> Callable[[], None]:
    """One optimizer step under a session; on a CPU in emulated FP16.

    Args:
        fp32_share: share of the layers that a plan holds in FP32.
    """
    width, layers, vocabulary = SIZES[size]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_positions=TOKENS[1], n_embd=width, n_layer=layers, n_head=4,
            bos_token_id=0, eos_token_id=0,
        )
    ).to(device)  # fmt: skip
    config = MixedPrecisionConfig(init_scale=256.0, **options)
    scaler = AdvancedGradScaler(config, device)
    session = AmpSession(config, scaler, PrecisionMode.MIXED, probe(device))
    session.adopt(model)
    held = [f"transformer.h.{i}" for i in range(round(fp32_share * layers))]
    plan = PrecisionPlan(PrecisionMode.MIXED).with_modules(held, PrecisionMode.FP32)
    session._keeper.runner.apply(plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(vocabulary, TOKENS, device=device)

    def step() -> None:
        with session.autocast():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.clip_grad_norm_(optimizer, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def measure(size: str, rounds: int, device: str) -> dict[str, Any]:
    """All ratios at one size."""
    contenders = {
        "off": training_step(size, device, automatic_fallback=False),
        "on": training_step(size, device),
        "10% of the layers in FP32": training_step(size, device, fp32_share=0.15),
        "half of the layers in FP32": training_step(size, device, fp32_share=0.5),
    }
    seconds = interleaved(contenders, rounds)
    return {
        f"{name} over off": ratio(taken, seconds["off"]) for name, taken in seconds.items() if name != "off"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {size: measure(size, options.rounds, device) for size in options.sizes}
    write("fallback_cost", {"ratios": results}, options.out)
    for size, ratios in results.items():
        print(f"\n{size}")
        for name, r in ratios.items():
            print(f"  {name:40} {r['median']:6.3f}  ({r['quartile_1']:.3f} to {r['quartile_3']:.3f})")


def test_every_contender_runs() -> None:
    """The benchmark itself is sound: each contender runs, and there is a ratio for each."""
    assert len(measure("1M", rounds=2, device="cpu")) == 3


if __name__ == "__main__":
    main()
