"""DYNAMIC precision: what is measured to be the fastest, among what is stable."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from hf_amp import AdvancedGradScaler, AmpSession, EventKind, MixedPrecisionConfig, PrecisionMode
from hf_amp.device import Hardware
from hf_amp.fallback.controller import TIMED_STEPS, WARMUP_STEPS, PrecisionAutotuner

MIXED, BF16, FP32 = PrecisionMode.MIXED, PrecisionMode.BF16, PrecisionMode.FP32
STEPS_EACH = WARMUP_STEPS + TIMED_STEPS
WITH_UNITS = Hardware("cpu", "a CPU with units", "native", "native")
WITHOUT_UNITS = Hardware("cpu", "a CPU without units", "slow", "slow")


def timed(
    autotuner: PrecisionAutotuner, seconds: dict[PrecisionMode, float], unstable: set[PrecisionMode]
) -> PrecisionAutotuner:
    """Runs the trial to its end; the first steps of each candidate are slow, as compilation is."""
    taken = dict.fromkeys(seconds, 0)
    while (mode := autotuner.running) is not None:
        if mode in unstable and taken[mode] == 4:
            autotuner.reject()
            continue
        taken[mode] += 1
        autotuner.note(seconds[mode] + (100.0 if taken[mode] <= WARMUP_STEPS else 0.0))
    return autotuner


@pytest.mark.parametrize(
    ("seconds", "unstable", "order"),
    [
        ((1.0, 2.0, 3.0), set(), (MIXED, BF16, FP32)),
        ((2.0, 1.0, 3.0), set(), (BF16, FP32)),
        ((2.0, 3.0, 1.0), set(), (FP32,)),
        ((1.0, 2.0, 3.0), {MIXED}, (BF16, FP32)),
        ((1.0, 2.0, 3.0), {MIXED, BF16, FP32}, (FP32,)),
    ],
)
def test_the_fastest_stable_candidate_wins_and_what_is_wider_remains_as_fallback(
    seconds: tuple[float, ...], unstable: set[PrecisionMode], order: tuple[PrecisionMode, ...]
) -> None:
    """Warm-up does not count, a candidate that was not stable is out, and the widest is there for the worst."""
    candidates = (MIXED, BF16, FP32)
    autotuner = timed(PrecisionAutotuner(candidates), dict(zip(candidates, seconds, strict=True)), unstable)
    assert autotuner.fastest() is order[0]
    assert autotuner.choices() == order


def test_a_trial_goes_on_after_a_checkpoint() -> None:
    """Saved in the middle and loaded through JSON, it times what was left and comes to the same choice."""
    autotuner, resumed = PrecisionAutotuner((MIXED, FP32)), PrecisionAutotuner((MIXED, FP32))
    for _ in range(STEPS_EACH + 2):
        autotuner.note(2.0)
    resumed.load_state_dict(json.loads(json.dumps(autotuner.state_dict())))
    assert resumed.running is FP32
    for _ in range(TIMED_STEPS + 1):
        resumed.note(1.0)
    assert (resumed.running, resumed.fastest()) == (None, FP32)


class Run:
    """A small network on the CPU's half kernels, and on FP32 ones; its modules see `dtypes`, one a step."""

    def __init__(self, hardware: Hardware = WITHOUT_UNITS, **options: object) -> None:
        config = MixedPrecisionConfig(precision_mode="DYNAMIC", **options)
        self.scaler = AdvancedGradScaler(config, "cpu")
        self.session = AmpSession(config, self.scaler, MIXED, hardware)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 1))
        self.dtypes: list[torch.dtype] = []
        self.model[0].register_forward_hook(lambda module, inputs, output: self.dtypes.append(output.dtype))
        self.session.register_model(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            with self.session.autocast():
                loss = self.model(torch.ones(256, 256)).mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()


@pytest.mark.parametrize(
    ("hardware", "candidates"),
    [(WITHOUT_UNITS, {"MIXED": torch.float16, "FP32": torch.float32}),
     (WITH_UNITS, {"MIXED": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32})],
    ids=lambda given: given.name if isinstance(given, Hardware) else "",
)  # fmt: skip
def test_all_are_timed_in_the_runs_own_steps_and_the_fastest_one_is_said_and_run(
    hardware: Hardware, candidates: dict[str, torch.dtype]
) -> None:
    """From the narrowest to FP32, each in its own kernels; every change is an event, the last one with the times, of
    which the shortest one won."""
    run = Run(hardware, emulate=False, init_scale=1.0)
    run.steps(len(candidates) * STEPS_EACH + 3)
    changes = [event for event in run.session.events if event.kind is EventKind.PRECISION_CHANGED]
    assert [event.after for event in changes[:-1]] == list(candidates)[1:]
    assert list(dict.fromkeys(run.dtypes[: len(candidates) * STEPS_EACH])) == list(candidates.values())
    seconds = {mode: float(ms) for ms, mode in re.findall(r"([\d.]+) ms in (\w+)", changes[-1].message)}
    assert set(seconds) == set(candidates)
    chosen = run.session.plan.default.value
    assert changes[-1].after == chosen
    assert seconds[chosen] == min(seconds.values())
    assert changes[-1].message.startswith(f"{chosen} is the fastest stable precision here")


def test_resumed_after_its_trial_a_run_keeps_the_choice() -> None:
    """The scaler's checkpoint carries it: the new run is in that precision from its first step and times nothing."""
    first, second = (Run(emulate=False, init_scale=1.0) for _ in range(2))
    first.steps(2 * STEPS_EACH + 3)
    second.scaler.load_state_dict(first.scaler.state_dict())
    assert second.session.plan.default is first.session.plan.default
    second.steps(3)
    assert not second.session.events


def test_the_time_of_emulated_fp16_is_told_as_such() -> None:
    """A CPU that emulates says of its choice that a GPU's would be another matter; real kernels need no such word."""
    messages = []
    for emulate in (True, False):
        run = Run(emulate=emulate, init_scale=1.0)
        run.steps(2 * STEPS_EACH + 3)
        messages.append(run.session.events[-1].message)
    assert [message.endswith("says nothing of a GPU.") for message in messages] == [True, False]
