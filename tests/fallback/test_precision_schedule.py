"""`precision_schedule`: the run, or modules of it, in another precision after so many steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, TrainerCallback

import hf_amp
from hf_amp import (
    AdvancedMixedPrecisionManager,
    AmpSession,
    ConfigError,
    EventKind,
    MixedPrecisionCallback,
    MixedPrecisionConfig,
    PrecisionMode,
)
from hf_amp.events import Cause
from hf_amp.fallback.diagnosis import Diagnosis
from hf_amp.fallback.plan import PrecisionPlan
from hf_amp.report.reader import read_run
from hf_amp.report.verdict import Level, verdict_on
from tests.each import for_each, forget_accelerators
from tests.integrations.trainers import logged, parameters_of, regression_trainer, trainer_with

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")
FLAGS: dict[str, dict[str, bool]] = {
    "FP16": {"fp16": True},
    "BF16": {"fp16": False, "bf16": True},
    "FP32": {"fp16": False},
}
FP32, MIXED = PrecisionMode.FP32, PrecisionMode.MIXED


class StopAfter(TrainerCallback):
    """Ends a run after so many steps, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_save = state.global_step == self.step


def changes(session: AmpSession | None) -> list[tuple[int, Any, Any, tuple[str, ...]]]:
    """Step, before, after and modules of every change of precision."""
    assert session is not None
    kept = [e for e in session.events if e.kind is EventKind.PRECISION_CHANGED]
    assert all(e.cause is None and e.message for e in kept)
    return [(e.step, e.before, e.after, e.modules) for e in kept]


def equal(one: Any, other: Any) -> bool:
    """Whether two Trainers' models are the same to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(parameters_of(one), parameters_of(other), strict=True))


@pytest.mark.parametrize(
    ("schedule", "first", "second", "step", "options"),
    [
        ({0.0: "FP16", 0.5: "FP32"}, "FP16", "FP32", 4, {}),
        ({0: "FP32", 3: "FP16"}, "FP32", "FP16", 3, {"growth_interval": 2, "init_scale": 1024.0}),
        ({0.5: "BF16"}, "FP16", "BF16", 4, {}),
        ({0: "fp32", 3: "bf16"}, "FP32", "BF16", 3, {}),
        ({1: "FP32"}, "FP16", "FP32", 1, {"scaling_strategy": "PERFORMANCE_OPTIMIZED"}),
    ],
)
def test_it_is_a_run_that_was_stopped_and_restarted(
    tmp_path: Path, schedule: Any, first: str, second: str, step: int, options: dict[str, Any]
) -> None:
    """In the other precision, from its checkpoint: the same parameters to the last bit, and not those of the first alone."""
    runs = "FP16" if "FP16" in (first, second) else "BF16"
    callback = MixedPrecisionCallback(precision_schedule=schedule, **options)
    scheduled, _ = trainer_with(tmp_path / "scheduled", callback, max_steps=8, **FLAGS[runs])
    scheduled.train()
    begun, _ = trainer_with(
        tmp_path / "begun", MixedPrecisionCallback(**options), StopAfter(step), max_steps=8,
        **{**FLAGS[first], "save_strategy": "steps", "save_steps": 100},
    )  # fmt: skip
    begun.train()
    ended, _ = trainer_with(tmp_path / "ended", MixedPrecisionCallback(**options), max_steps=8, **FLAGS[second])
    ended.train(resume_from_checkpoint=str(tmp_path / "begun" / f"checkpoint-{step}"))
    alone, _ = trainer_with(tmp_path / "alone", MixedPrecisionCallback(**options), max_steps=8, **FLAGS[first])
    alone.train()
    assert equal(scheduled, ended)
    assert not equal(scheduled, alone)
    assert verdict_on(read_run(tmp_path / "scheduled")).level is Level.SOUND  # in FP32 by choice is nothing to look at
    at, _, after, modules = changes(callback.session)[-1]
    assert (at, after, modules) == (step, {"FP16": "MIXED"}.get(second, second), ())


def test_it_resumes_in_the_middle(tmp_path: Path) -> None:
    """Three changes, stopped between the first two, just at one, and at another: the same run, with the same plan and scale."""
    options: dict[str, Any] = {
        "precision_schedule": {2: "FP32", 4: {"": "FP16", "transformer.h.0": "FP32"}, 6: {"transformer.h.0": "FP16"}},
        "growth_interval": 3, "init_scale": 512.0,
    }  # fmt: skip
    saves = {"save_strategy": "steps", "save_steps": 1}
    whole = MixedPrecisionCallback(**options)
    trainer, _ = trainer_with(tmp_path, whole, max_steps=8, **saves)
    trainer.train()
    assert changes(whole.session) == [
        (2, "MIXED", "FP32", ()),
        (4, "FP32", "MIXED", ()),
        (4, "MIXED", "FP32", ("transformer.h.0",)),
        (6, "FP32", "MIXED", ("transformer.h.0",)),
    ]
    assert logged(trainer, "amp_incident")[1] == "step 2: precision_changed"
    assert whole.session.metrics()["precision_changes"] == 4
    assert whole.session.metrics()["scale"] == 1024.0  # three clean steps in FP16; those in FP32 do not count
    assert verdict_on(read_run(tmp_path)).level is Level.SOUND
    for step in (3, 4, 5):
        callback = MixedPrecisionCallback(**options)
        resumed, _ = trainer_with(tmp_path / "again", callback, max_steps=8)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert equal(resumed, trainer)
        assert [change for change in changes(callback.session) if change[0]] == [
            c for c in changes(whole.session) if c[0] > step
        ]
        assert callback.session.metrics()["scale"] == whole.session.metrics()["scale"]


def test_resumed_without_it_the_run_is_in_its_own_precision_again(tmp_path: Path) -> None:
    """Saved in FP32 by schedule; what the schedule asked for is no fallback that waits for clean steps."""
    saves = {"save_strategy": "steps", "save_steps": 4}
    regression_trainer(
        tmp_path, MixedPrecisionCallback(precision_schedule={2: "FP32"}), fp16=True, max_steps=4, **saves
    ).train()
    callback = MixedPrecisionCallback()
    trainer = regression_trainer(tmp_path / "again", callback, fp16=True, max_steps=6)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback.session.plan.default is MIXED
    assert changes(callback.session) == [(4, "FP32", "MIXED", ())]


def test_a_second_train_begins_it_anew(tmp_path: Path) -> None:
    """As the Trainer's own steps do."""
    callback = MixedPrecisionCallback(precision_schedule={0.5: "FP32"})
    trainer = regression_trainer(tmp_path, callback, fp16=True, max_steps=4)
    for _ in range(2):
        trainer.train()
        assert callback.session.plan.default is FP32
    assert [after for _, _, after, _ in changes(callback.session)] == ["FP32", "MIXED", "FP32"]


def accelerated(steps: int, late: bool = False, **options: Any) -> tuple[AmpSession, list[str]]:
    """A loop with Accelerate in FP16; what each step ran in."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    session = None if late else hf_amp.attach(accelerator, **options)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    session = session or hf_amp.attach(accelerator, **options)
    ran = []
    for _ in range(steps):
        output = model(torch.ones(2, 4))
        ran.append(session.plan.default.value)
        accelerator.backward(output.square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return session, ran


@for_each("late", [False, True])
def test_with_accelerate_fractions_are_of_total_steps(late: bool) -> None:
    """Attached before `prepare` or after it. Without `total_steps` it is an error before the first step."""
    schedule = {0.0: "FP32", 0.5: "FP16", 0.8: "FP32"}
    session, ran = accelerated(10, late, precision_schedule=schedule, total_steps=10)
    assert ran == ["FP32"] * 5 + ["MIXED"] * 3 + ["FP32"] * 2
    assert [change[0] for change in changes(session)] == [0, 5, 8]
    assert session.metrics()["precision_changes"] == 2
    session.detach()
    forget_accelerators()
    with pytest.raises(ConfigError, match="set total_steps"):
        accelerated(1, late, precision_schedule=schedule)


class Product(nn.Module):
    """One whose own forward multiplies, outside of any child."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 4), 1.001))
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight
        self.dtypes.append(y.dtype)
        return y


@for_each("late", [False, True])
def test_a_model_follows_it_from_its_first_forward_pass(late: bool) -> None:
    """Under real autocast, to which accelerate has bound its forward: attached before `prepare` or after it."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    session = None if late else hf_amp.attach(accelerator, precision_schedule={0: "FP32", 1: "BF16"})
    model = accelerator.prepare(Product())
    session = session or hf_amp.attach(accelerator, precision_schedule={0: "FP32", 1: "BF16"})
    model(torch.ones(2, 4))
    at(session, 1)
    model(torch.ones(2, 4))
    assert accelerator.unwrap_model(model).dtypes == [torch.float32, torch.bfloat16]


def test_the_manager_and_a_loop_of_ones_own_follow_it(tmp_path: Path) -> None:
    """And the log holds the changes."""
    data = DataLoader([(torch.ones(4), torch.zeros(1))] * 12, batch_size=2)
    config = MixedPrecisionConfig(precision_schedule={0: "FP32", 2: "FP16", 4: "FP32"})
    model = nn.Linear(4, 1)
    with AdvancedMixedPrecisionManager(config, loss_fn=nn.functional.mse_loss) as manager:
        result = manager.train_epoch(data, model, torch.optim.SGD(model.parameters(), lr=0.1), progress=False)
        assert changes(manager.trainer.session)[1:] == [(2, "FP32", "MIXED", ()), (4, "MIXED", "FP32", ())]
        assert result["precision_mode"] is FP32
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = AmpSession.for_model(model, optimizer, precision_schedule={1: "BF16"})
    session.log_to(tmp_path)
    dtypes = []
    for _ in range(2):
        output = model(torch.ones(2, 4))
        dtypes.append(output.dtype)
        session.scaler.scale(output.float().square().mean()).backward()
        session.scaler.step(optimizer)
        session.scaler.update()
    session.detach()
    assert dtypes == [torch.float16, torch.bfloat16]
    lines = [json.loads(line) for line in (tmp_path / "amp_events.jsonl").read_text().splitlines()]
    (change,) = [line for line in lines if line["event"] == "precision_changed"]
    assert (change["step"], change["before"], change["after"], change["by_choice"]) == (1, "MIXED", "BF16", True)


def session_of(**options: Any) -> AmpSession:
    """One on two layers, which it keeps alive, before the first step."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    session = AmpSession.for_model(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    session.patches.on_undo(model.eval)
    return session


def at(session: AmpSession, step: int) -> None:
    session.begin_at(step)


def test_what_has_fallen_back_stays_in_fp32() -> None:
    """A module that overflowed, through FP32 and back, also where the schedule lets it go; and a whole model that fell back."""
    schedule = {2: {"": "FP32", "0": "FP32", "1": "FP32"}, 4: {"": "FP16", "0": "FP16", "1": "FP16"}}
    session = session_of(precision_schedule=schedule)
    session._fallback.after_skipped(Diagnosis(Cause.ACTIVATION, "", ("0",)), 1.0, 8.0)
    at(session, 2)
    assert (session.plan.default, [*session.plan.modules]) == (FP32, ["0", "1"])
    at(session, 4)
    assert (session.plan.default, [*session.plan.modules]) == (MIXED, ["0"])
    session._fallback.after_skipped(Diagnosis(Cause.ACTIVATION, "", ("0",)), 1.0, 8.0)
    assert session.plan.default is FP32  # a module in FP32 is to blame: the whole model
    at(session, 1)
    at(session, 4)
    assert session.plan.default is FP32


def test_the_way_back_ends_where_the_schedule_is() -> None:
    """Clean steps in FP32 by schedule bring neither the model nor a module back to FP16."""
    session = session_of(precision_schedule={2: "FP32"}, recovery_steps=1)
    session._fallback.after_skipped(Diagnosis(Cause.ACTIVATION, "", ("0",)), 1.0, 8.0)
    at(session, 2)
    assert [session._fallback.after_applied() for _ in range(5)] == [None] * 5
    assert (session.plan.default, [*session.plan.modules]) == (FP32, ["0"])
    at(session, 1)
    session._fallback.after_applied()
    assert (session.plan.default, [*session.plan.modules]) == (MIXED, [])


def test_modules_by_name_glob_and_class_and_fp32_modules_beside_them() -> None:
    """Those of `fp32_modules` are in FP32 also where the run has begun in FP32."""
    session = session_of(
        precision_schedule={0: "FP32", 2: {"": "FP16", "Linear": "FP32"}, 4: {"0*": "FP16"}}, fp32_modules=["1"]
    )
    assert [*session.plan.modules] == ["1"]
    at(session, 2)
    assert (session.plan.default, sorted(session.plan.modules)) == (MIXED, ["0", "1"])
    at(session, 4)
    assert [*session.plan.modules] == ["1"]


@for_each(
    ("options", "words"),
    [
        ({"precision_schedule": {0.5: "FP32"}}, "set total_steps"),
        ({"precision_schedule": {5: {"nowhere": "FP32"}}}, "no module is called 'nowhere'"),
        ({"precision_schedule": {5: {"0": "FP16"}}, "fp32_modules": ["Linear"]}, "fp32_modules keeps '0' in FP32 for good"),
        ({"precision_schedule": {5: {"0": "BF16"}}}, "'0' can run in FP32, or again in the run's FP16"),
        ({"precision_schedule": {5: "FP16"}, "precision_mode": "BF16"}, "a run that starts in BF16 can run in BF16 or FP32, not in FP16"),
        ({"precision_schedule": {5: "FP32"}, "precision_mode": "FP16", "emulate": False}, "a CPU's half kernels"),
        ({"precision_schedule": {0.5: "FP32", 2: "FP16"}, "total_steps": 4}, "2 and 0.5 are both step 2 of 4"),
        ({"precision_schedule": {5: "FP32"}, "precision_mode": "DYNAMIC"}, "both choose the precision"),
        ({"precision_schedule": {1.0: "FP32"}}, "after the first step is 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_an_error_before_the_first_step(options: dict[str, Any], words: str) -> None:
    """It says what is wrong, and what is allowed."""
    with pytest.raises(ConfigError, match=words):
        session_of(**options).begin_run()


def test_an_entry_behind_the_end_of_the_run_is_reported_before_the_first_step() -> None:
    """By steps or as a fraction that rounds to all of them; not where it holds for the last step, or nobody knows the end."""
    for at, total, passed_over in ((4, 4, True), (900, 4, True), (0.99, 4, True), (3, 4, False), (900, None, False)):
        options = {} if total is None else {"total_steps": total}
        session = session_of(precision_schedule={at: "FP32"}, **options)
        session.begin_run()
        reported = [e.message for e in session.events if "never holds" in e.message]
        assert len(reported) == passed_over, (at, total)
        assert all(f"entry {at} " in message and "4 steps" in message for message in reported)


def test_where_another_library_runs_the_precision_it_is_refused() -> None:
    """FSDP of accelerate at attach; a model that is sharded by hand before the first step. FP8 and DeepSpeed have tests of theirs."""
    with pytest.raises(ConfigError, match="fp16=True or bf16=True"):
        hf_amp.attach(Accelerator(cpu=True), precision_schedule={5: "FP16"})
    forget_accelerators()
    sharding = Accelerator(cpu=True)
    PartialState().distributed_type = sharding.state.distributed_type = DistributedType.FSDP  # which needs a GPU
    with pytest.raises(
        ConfigError,
        match=r"precision_schedule=.*under FSDP the run stays in the format that parameters are gathered in",
    ):
        hf_amp.attach(sharding, precision_schedule={5: "FP32"})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(nn.Linear(4, 1))
        session = AmpSession.for_model(
            model, torch.optim.SGD(model.parameters(), lr=0.1), precision_schedule={5: "FP32"}
        )
        with pytest.raises(ConfigError, match="parameters are sharded"):
            session.begin_run()
    finally:
        dist.destroy_process_group()


def test_it_is_plain_data() -> None:
    """Through JSON, whose keys are text and sorted, from the command line, and equal to what it was."""
    config = MixedPrecisionConfig(
        precision_schedule={0.9: "FP32", 10: {"lm_head": "fp32"}, 9: PrecisionMode.BF16, 1e-5: "FP16"}
    )
    plain = json.loads(json.dumps(config.to_dict(), sort_keys=True))
    assert MixedPrecisionConfig.from_dict(plain) == config
    assert hash(MixedPrecisionConfig.from_dict(plain)) == hash(config)
    assert plain["precision_schedule"] == {"9": "BF16", "10": {"lm_head": "FP32"}, "1e-05": "FP16", "0.9": "FP32"}
    parsed = HfArgumentParser((MixedPrecisionConfig,)).parse_args_into_dataclasses(
        ["--precision_schedule", '{"0.9": "FP32"}']
    )
    assert parsed[0] == MixedPrecisionConfig(precision_schedule={0.9: "FP32"})


def test_a_compiled_model_is_compiled_anew() -> None:
    """At every change, as for the fallback: the outputs' precision follows."""
    torch._dynamo.reset()
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = AmpSession.for_model(model, optimizer, precision_schedule={1: "FP32"})
    compiled = torch.compile(model, backend="eager")
    assert compiled(torch.ones(2, 4)).dtype is torch.float16
    at(session, 1)
    assert compiled(torch.ones(2, 4)).dtype is torch.float32
    torch._dynamo.reset()


def test_a_plan_in_fp32_does_not_count_modules_in_fp32() -> None:
    """Of a run that is all in FP32 there are no exceptions to speak of."""
    wide = {"lm_head": PrecisionMode.FP32}
    assert PrecisionPlan(PrecisionMode.FP32, wide).describe() == "FP32"
    assert PrecisionPlan(PrecisionMode.MIXED, wide).describe() == "FP16 with 1 module in FP32"
