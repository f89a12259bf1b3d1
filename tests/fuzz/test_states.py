"""Any mutation of a saved state loads into a valid one, or is refused and changes nothing."""

from __future__ import annotations

import copy
import functools
import io
import json
from collections.abc import Iterator, MutableMapping, MutableSequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_amp import AdvancedGradScaler, AdvancedMixedPrecisionManager, MixedPrecisionConfig, PrecisionMode, StateError
from hf_amp.config import is_real
from hf_amp.device import probe
from hf_amp.events import Cause
from hf_amp.fallback.controller import FallbackState, StepFacts
from hf_amp.fallback.plan import precision_order
from hf_amp.session import AmpSession
from tests.fuzz.anything import ANYTHING
from tests.reference import OverflowInBackward, tiny_mlp

CASES = {
    "constant": {"scaling_strategy": "CONSTANT"},
    "dynamic": {"scaling_strategy": "DYNAMIC", "hysteresis": 2},
    "adaptive": {"scaling_strategy": "ADAPTIVE"},
    "performance": {"scaling_strategy": "PERFORMANCE_OPTIMIZED"},
    "guard": {"precision_mode": "BF16"},
    "trial": {"precision_mode": "DYNAMIC"},
}
BOUNDS = {"min_scale": 2.0**-10, "max_scale": 2.0**20, "init_scale": 2.0**10}


PARTS = [(), ("hf_amp", "policy"), ("hf_amp", "stateful", "fallback"), ("hf_amp", "stateful", "monitor")]
NAMES = st.text(max_size=4) | st.sampled_from(["record_skipped", "patience", "config"])
NEAR_NUMBERS = [lambda x: -x, lambda x: 2 * x, lambda x: x + 0.5, lambda x: 1e300 * float(x)]
NEAR_TEXTS = ["", "FP8", "BF16", "DYNAMIC", "UNKNOWN"]


class Run:
    """A session with one model, and what trains it."""

    def __init__(self, case: str) -> None:
        self.config = MixedPrecisionConfig(**BOUNDS, **CASES[case])
        mode = PrecisionMode.BF16 if case == "guard" else PrecisionMode.MIXED
        hardware = probe("cpu")
        self.order = precision_order(mode, hardware, emulate=True)
        self.session = AmpSession(self.config, AdvancedGradScaler(self.config, "cpu"), mode, hardware)
        self.model = tiny_mlp()
        self.session.register_model(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, fused=True)

    def step(self, fault: bool = False) -> None:
        self.optimizer.zero_grad()
        with self.session.autocast():
            loss = self.model(torch.ones(2, 4)).square().mean()
        self.session.scaler.scale(OverflowInBackward.apply(loss) if fault else loss).backward()
        self.session.scaler.step(self.optimizer)
        self.session.scaler.update()

    def check(self) -> None:
        """Everything is as it may be."""
        scaler, plan = self.session.scaler, self.session.plan
        scaler.flush()
        low, high = (1.0, 1.0) if scaler.no_scaling else (BOUNDS["min_scale"], BOUNDS["max_scale"])
        assert low <= scaler.get_scale() <= high
        assert plan.default in self.order
        assert set(plan.modules.values()) <= {PrecisionMode.FP32}
        assert scaler.decided_steps == scaler.applied_steps + scaler.skipped_steps
        self.session.metrics()
        self.session.monitor.get_precision_stats()


@functools.cache
def saved(case: str) -> dict[str, Any]:
    """The state of a run that has seen everything."""
    run = Run(case)
    for fault in (False, True, False, True, True, False):
        run.step(fault)
    state = run.session.scaler.state_dict()
    keeper: FallbackState = FallbackState.from_plain(state["hf_amp"]["stateful"]["fallback"])
    facts = StepFacts(Cause.ACTIVATION, ("0",), 0.5)
    moved = run.session._fallback._policy.next_state(keeper, facts)
    moved = run.session._fallback._policy.next_state(moved, StepFacts(Cause.UNKNOWN, (), 0.5))
    state["hf_amp"]["stateful"]["fallback"].update(moved.to_plain(), scale_at_rest=4.0)
    return state


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a nest of mappings and lists."""
    keys = (
        list(node)
        if isinstance(node, MutableMapping)
        else range(len(node))
        if isinstance(node, MutableSequence)
        else ()
    )
    for key in keys:
        yield node, key
        yield from places(node[key])


def mutated(state: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """`state` with one or two of its places changed, removed or joined by a foreign one."""
    state = json.loads(json.dumps(state))
    for _ in range(data.draw(st.integers(1, 2))):
        part = state
        for name in data.draw(st.sampled_from(PARTS)):
            part = part[name] if isinstance(part, dict) and isinstance(part.get(name), dict) else part
        everywhere = list(places(part)) or list(places(state))
        container, key = everywhere[data.draw(st.integers(0, len(everywhere) - 1))]
        change = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if change == "remove":
            del container[key]
        elif change == "add" and isinstance(container, dict):
            container[data.draw(NAMES)] = data.draw(ANYTHING)
        else:
            near = container[key]
            container[key] = data.draw(ANYTHING | st.sampled_from(NEAR_NUMBERS if is_real(near) else NEAR_TEXTS))
            if callable(container[key]):
                container[key] = container[key](near)
    return state


@pytest.mark.parametrize("case", CASES)
@given(stepped=st.booleans(), data=st.data())
def test_any_state_of_a_session(case: str, stepped: bool, data: st.DataObject) -> None:
    """The scaler's state, with policy, counters, plan, trial, monitor, hope and pace in it, before or after a first step."""
    run = Run(case)
    if stepped:
        run.step()
    before, options = copy.deepcopy(run.session.scaler.state_dict()), run.session.scaler.config
    try:
        run.session.scaler.load_state_dict(mutated(saved(case), data))
    except StateError as error:
        assert len(str(error)) < 2000  # noqa: PT017
        assert run.session.scaler.state_dict() == before
        assert run.session.scaler.config == options
    run.check()
    for fault in (False, True):
        run.step(fault)
        run.check()
    file = io.BytesIO()
    torch.save(run.session.scaler.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == run.session.scaler.state_dict()


@given(data=st.data())
def test_any_state_of_a_manager(data: st.DataObject) -> None:
    """The state that a manager saves, with a scaler's in it."""
    config = MixedPrecisionConfig(**BOUNDS)
    state = {**AdvancedMixedPrecisionManager(config).state_dict(), "scaler": saved("dynamic")}
    manager = AdvancedMixedPrecisionManager(config)
    before = copy.deepcopy(manager.state_dict())
    try:
        manager.load_state_dict(mutated(state, data))
    except StateError:
        assert manager.state_dict() == before
    assert BOUNDS["min_scale"] <= manager.trainer.scaler.get_scale() <= BOUNDS["max_scale"]
    assert manager.epochs >= 0
