"""Buffers that a forward pass writes outlive a skipped step; one that was bad before it is named, and in no checkpoint unseen."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import Trainer, TrainerCallback, set_seed

from hf_amp import AmpEvent, Cause, EventKind, MixedPrecisionCallback
from hf_amp.fallback import recorder
from tests.each import for_each
from tests.fallback.test_batch_norm_statistics import Loop, batch
from tests.host_reads import count_host_reads
from tests.integrations.trainers import Regression, arguments, numbers
from tests.reference import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


class Codebook(nn.Module):
    """A vector quantizer whose codebook is a moving average, written through `.data` as EnCodec's is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(4, 8))
        self.register_buffer("size", torch.ones(4))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, z: Tensor) -> Tensor:
        nearest = torch.cdist(z.float(), self.codes).argmin(1)
        if self.training:
            chosen = nn.functional.one_hot(nearest, 4).float()
            self.size.data.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
            self.sums.data.mul_(0.9).add_(chosen.T @ z.detach().float(), alpha=0.1)
            self.codes.data.copy_(self.sums / self.size.clamp(min=1e-5)[:, None])
        return z - self.codes[nearest]


class RunningAmax(nn.Module):
    """Divides by the largest magnitude so far, a buffer that every forward pass replaces by another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("amax", torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        if self.training:
            self.amax = torch.maximum(self.amax, z.detach().float().abs().max())
        return z / (self.amax + 1e-6)


class Mask(nn.Module):
    """Adds a constant whose upper half is -inf, as causal masks do, and takes a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0] * 4 + [-math.inf] * 4))

    def forward(self, z: Tensor) -> Tensor:
        return (z + self.mask).softmax(-1)


class Moving(Mask):
    """The same, written anew in every forward pass; with a constant that nobody has set."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unset", torch.tensor(math.nan))

    def forward(self, z: Tensor) -> Tensor:
        self.mask.copy_(self.mask.roll(1))
        return super().forward(z)


class Root(nn.Module):
    """A square root, of what is negative while `breaks` is set."""

    breaks = False

    def forward(self, z: Tensor) -> Tensor:
        return (z.square() + (-100 if self.breaks else 1)).sqrt()


def model_with(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), middle, nn.Linear(8, 1))


def writers() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    normalised = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), spectral_norm(nn.Linear(8, 8)), RunningAmax())
    return {"codebook": Codebook(), "amax": RunningAmax(), "spectral_norm": normalised}


def floats_of(model: nn.Module) -> list[Tensor]:
    return [x.detach().clone() for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()]


def reported(loop: Loop, kind: EventKind) -> list[AmpEvent]:
    return [event for event in loop.session.events if event.kind is kind]


@for_each("kind, precision, bad", [(k, p, bad) for k in writers() for p in ("no", "bf16") for bad in (0, 2)])
def test_a_bad_batch_leaves_the_run_that_has_never_seen_it(kind: str, precision: str, bad: int) -> None:
    """Every parameter and buffer after every step, to the last bit, against a loop without hf_amp; also in the first step."""
    ours = Loop(model_with(writers()[kind]), precision)
    reference = Loop(model_with(writers()[kind]), precision, attached=False)
    for number in range(5):
        x = batch(number)
        if number == bad:
            x[3] = math.inf
        else:
            reference.step(x)
        ours.step(x)
        assert_bitwise_equal(floats_of(ours.plain), floats_of(reference.plain))
    assert [event.step for event in ours.put_back] == [bad + 1]


def test_an_overflow_in_fp16_costs_one_step() -> None:
    loop = Loop(model_with(Codebook()), "fp16", init_scale=1.0)
    loop.step(batch(0))
    before = floats_of(loop.plain[1])
    loop.step(batch(1) * 1e6)
    assert_bitwise_equal(floats_of(loop.plain[1]), before)
    loop.step(batch(2))
    (skip,) = reported(loop, EventKind.STEP_SKIPPED)
    assert (skip.step, skip.cause) == (2, Cause.ACTIVATION)


@for_each("kind, name", [("codebook", "codes"), ("amax", "amax")])
def test_a_buffer_that_was_bad_before_is_named(kind: str, name: str, tmp_path: Path) -> None:
    """It stays as it is, the scale too, the run is stalled, and a checkpoint says that it holds it."""
    loop = Loop(model_with(writers()[kind]), "fp16", init_scale=1.0)
    loop.step(batch(0))
    loop.accelerator.save_state(str(tmp_path / "good"))
    assert not reported(loop, EventKind.CHECKPOINT_NON_FINITE)
    for x in loop.plain[1].buffers():
        x.data.fill_(math.nan)
    loop.step(batch(1))
    (skip,) = reported(loop, EventKind.STEP_SKIPPED)
    assert (skip.cause, skip.modules, skip.before, skip.after) == (Cause.BUFFER, ("1",), 1.0, 1.0)
    assert f"1.{name}" in skip.message
    assert not loop.put_back
    assert [event.cause for event in reported(loop, EventKind.STALLED)] == [Cause.BUFFER]
    loop.accelerator.save_state(str(tmp_path / "bad"))
    (event,) = reported(loop, EventKind.CHECKPOINT_NON_FINITE)
    assert f"1.{name}" in event.message
    assert (tmp_path / "bad").is_dir()


def test_a_bad_buffer_that_forward_does_not_use_is_not_to_blame(tmp_path: Path) -> None:
    """A batch norm in training only writes its statistics: the batch is to blame, or the loss; a checkpoint names them still."""
    loop = Loop(model_with(nn.Sequential(nn.BatchNorm1d(8), Root())), "fp16", init_scale=1.0)
    loop.step(batch(0))
    loop.plain[1][0].running_mean.fill_(math.nan)
    loop.step(batch(1))
    loop.step(batch(2) * math.nan)
    loop.step(batch(3), end=lambda loss: loss * math.nan)
    loop.plain[1][1].breaks = True
    loop.step(batch(4))
    causes = [skip.cause for skip in reported(loop, EventKind.STEP_SKIPPED)]
    assert causes == [Cause.INPUT, Cause.LOSS, Cause.MODEL]
    loop.accelerator.save_state(str(tmp_path / "it"))
    assert "1.0.running_mean" in reported(loop, EventKind.CHECKPOINT_NON_FINITE)[0].message


def test_a_mask_is_bad_by_design(tmp_path: Path) -> None:
    loop = Loop(model_with(Moving()), "fp16", init_scale=1.0)
    loop.step(batch(0))
    loop.step(batch(1) * math.nan)
    loop.accelerator.save_state(str(tmp_path / "it"))
    assert [skip.cause for skip in reported(loop, EventKind.STEP_SKIPPED)] == [Cause.INPUT]
    assert not loop.put_back
    assert not reported(loop, EventKind.CHECKPOINT_NON_FINITE)


def test_large_constants_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is larger than a limit, only what is written: in place, or by another tensor in its place."""
    monkeypatch.setattr(recorder, "ELEMENTS_COPIED_UNSEEN", 10)
    model = model_with(nn.Sequential(Mask(), RunningAmax(), nn.BatchNorm1d(8)))
    model.register_buffer("table", torch.zeros(100))
    model.register_buffer("count", torch.zeros(200))
    buffers = recorder.ModelBuffers(model)
    first = {buffer.path for buffer, *_ in buffers.snapshot()}
    model.count.add_(1)
    then = {buffer.path for buffer, *_ in buffers.snapshot()}
    assert (first, then - first) == ({"1.0.mask", "1.1.amax"}, {"count"})


def test_a_replay_is_no_write() -> None:
    """The version counter of a constant is what it was, so that it is not copied from then on."""
    loop = Loop(model_with(nn.Sequential(Mask(), RunningAmax())), "fp16", init_scale=1.0)
    loop.step(batch(0))
    versions = [x._version for x in loop.plain[1].buffers()]
    loop.step(batch(1), end=lambda loss: loss * math.nan)
    assert reported(loop, EventKind.STEP_SKIPPED)[0].cause is Cause.LOSS
    assert [x._version for x in loop.plain[1].buffers()] == versions


def test_a_backward_to_come_finds_what_nothing_wrote_untouched() -> None:
    """Restoring moves no version counter of a constant."""
    model = model_with(nn.Sequential(Mask(), RunningAmax()))
    buffers = recorder.ModelBuffers(model)
    before = buffers.snapshot()
    model(batch(0) * math.nan)
    version = model[1][0].mask._version
    assert buffers.put_back(before) == [model[1][1]]
    assert (model[1][0].mask._version, model[1][1].amax.item()) == (version, 0.0)


def test_a_healthy_step_reads_the_host_no_more_often() -> None:
    """The codebook is left out: its own `one_hot` reads the host."""
    counts = []
    for middle in (writers()["amax"], writers()["spectral_norm"], nn.Identity()):
        loop = Loop(model_with(middle), "fp16", init_scale=1.0)
        with count_host_reads() as reads:
            loop.step(batch(0))
            loop.step(batch(1))
        counts.append(reads.count)
        assert loop.session.metrics()["applied_steps"] == 2
    assert len(set(counts)) == 1


class Normed(Regression):
    """The small regression, with its input divided by the largest magnitude so far."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = RunningAmax()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return super().forward(self.scale(x), labels)


class PoisonAt4(TrainerCallback):
    """Makes the buffer NaN before the fourth step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            kwargs["model"].scale.amax.fill_(math.nan)


def trained(folder: Path, data: Dataset, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    given = {"fp16": False, "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant", **options}
    set_seed(0)
    trainer = Trainer(Normed(), arguments(folder, **given), train_dataset=data, callbacks=list(callbacks))
    trainer.train()
    return trainer


def test_a_trainer_goes_on_as_if_the_bad_batch_had_not_been(tmp_path: Path) -> None:
    """Against a stock Trainer whose data lacks the third batch."""
    ours = trained(tmp_path / "ours", numbers(nan_rows=(9,)), MixedPrecisionCallback(), max_steps=6)
    stock = trained(tmp_path / "stock", numbers().select([*range(8), *range(12, 64)]), max_steps=5)
    assert_bitwise_equal(floats_of(ours.model), floats_of(stock.model))


def test_a_trainer_writes_no_checkpoint_with_a_bad_buffer(tmp_path: Path) -> None:
    callback = MixedPrecisionCallback()
    trained(tmp_path, numbers(), callback, PoisonAt4(), max_steps=6, save_strategy="steps", save_steps=2)
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    withheld = [event for event in callback.session.events if event.kind is EventKind.CHECKPOINT_WITHHELD]
    assert [event.step for event in withheld] == [4, 6]
    assert "scale.amax" in withheld[0].message
    causes = [event.cause for event in callback.session.events if event.kind is EventKind.STEP_SKIPPED]
    assert causes == [Cause.BUFFER] * 3
