"""`StandardMixedPrecisionTrainer` is the loop that one would write by hand, and says what became of each step."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from hf_amp import (
    AttachError,
    BatchError,
    Cause,
    ConfigError,
    EventKind,
    MixedPrecisionConfig,
    PrecisionMode,
    StandardMixedPrecisionTrainer,
)
from tests.each import for_each
from tests.host_reads import count_host_reads
from tests.reference import adamw, assert_bitwise_equal, snapshot, tiny_mlp
from tests.training.loops import FaultyMlp, autocast, parameters_of, real_text, small_gpt2, vectors


def train_by_hand(model, optimizer, batches, *, emulate, clip, accumulate):
    """`torch.autocast` and `torch.amp.GradScaler`, as PyTorch's own examples have it. Returns losses and scale."""
    scaler = torch.amp.GradScaler("cpu")
    losses = []
    for index, batch in enumerate(batches):
        if index % accumulate == 0:
            optimizer.zero_grad()
        with autocast(emulate):
            loss = model(**batch).loss
        scaler.scale(loss / accumulate).backward()
        losses.append(loss.detach())
        if (index + 1) % accumulate == 0:
            if clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
    return losses, scaler.get_scale()


@for_each("fused", [False, True])
@for_each("emulate", [True, False])
@for_each(("clip", "accumulate"), [(None, 1), (0.5, 1), (0.5, 3)])
def test_it_is_the_hand_written_loop_to_the_last_bit(emulate, clip, accumulate, fused):
    """GPT-2 with dropout on real text: same losses, scale, parameters and AdamW state after 12 batches."""
    batches = real_text(12)
    models = [small_gpt2(), small_gpt2()]
    optimizers = [adamw(model, fused) for model in models]
    torch.manual_seed(1)
    expected, scale = train_by_hand(
        models[0], optimizers[0], batches, emulate=emulate, clip=clip, accumulate=accumulate
    )
    config = MixedPrecisionConfig(emulate=emulate)
    trainer = StandardMixedPrecisionTrainer(config, clip_norm=clip, accumulation_steps=accumulate)
    torch.manual_seed(1)
    results = [trainer.train_step(batch, models[1], optimizers[1]) for batch in batches]
    assert_bitwise_equal(expected, [result["loss"] for result in results])
    assert_bitwise_equal(*map(snapshot, models, optimizers))
    assert trainer.scaler.get_scale() == scale
    assert [result["stepped"] for result in results] == [(i + 1) % accumulate == 0 for i in range(12)]


@for_each(("mode", "enabled"), [("FP32", True), ("BF16", True), ("MIXED", False)])
def test_without_fp16_it_is_the_plain_loop(mode, enabled):
    """FP32, BF16 autocast and a disabled config: bitwise the loop without a scaler; the result names the precision."""
    batches = real_text(6)
    models = [small_gpt2(), small_gpt2()]
    optimizers = [adamw(model, fused=False) for model in models]
    torch.manual_seed(1)
    for batch in batches:
        optimizers[0].zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "BF16"):
            loss = models[0](**batch).loss
        loss.backward()
        optimizers[0].step()
    config = MixedPrecisionConfig(precision_mode=mode, enabled=enabled, emulate=False)
    trainer = StandardMixedPrecisionTrainer(config)
    torch.manual_seed(1)
    for batch in batches:
        result = trainer.train_step(batch, models[1], optimizers[1])
    assert_bitwise_equal(*map(snapshot, models, optimizers))
    assert result["precision_mode"] is (PrecisionMode[mode] if enabled else PrecisionMode.FP32)
    assert result["skipped"] is False
    assert trainer.precision_monitor.applied_steps == 6


def test_a_step_reads_the_host_once():
    """In FP16, with monitoring, after the first step, which is measured: one host read, and none in a step without one."""
    model = tiny_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = StandardMixedPrecisionTrainer(
        MixedPrecisionConfig(init_scale=256.0), loss_fn=mse_loss, accumulation_steps=2
    )
    batches = vectors(6)
    for batch in batches[:2]:
        trainer.train_step(batch, model, optimizer)
    counts = []
    for batch in batches[2:]:
        with count_host_reads() as reads:
            trainer.train_step(batch, model, optimizer)
        counts.append(reads.count)
    assert counts == [0, 1, 0, 1]


def test_a_skip_is_told_with_its_cause():
    """An overflow in the second step: skipped, SCALE, no norm, parameters as before; the third step is applied."""
    model = FaultyMlp({2: "overflow"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = StandardMixedPrecisionTrainer(MixedPrecisionConfig(init_scale=256.0), loss_fn=mse_loss)
    reported, moved = [], []
    for batch in vectors(3):
        before = model.layers[0].weight.detach().clone()
        reported.append(trainer.train_step(batch, model, optimizer))
        moved.append(not torch.equal(before, model.layers[0].weight))
    assert moved == [True, False, True]
    assert [result["skipped"] for result in reported] == [False, True, False]
    assert [result["cause"] for result in reported] == [None, Cause.SCALE, None]
    assert [result["scale"] for result in reported] == [256.0, 256.0, 128.0]
    assert reported[1]["grad_norm"] is None
    assert reported[2]["grad_norm"] > 0
    assert reported[2]["step_seconds"] > 0


class Loose(nn.Module):
    """Returns a loss in the form asked for, from one or two arguments."""

    def __init__(self, form):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.form = form

    def forward(self, inputs, labels=None):
        loss = (inputs * self.weight).square().mean() + (0 if labels is None else labels.float().mean())
        return {"object": SimpleNamespace(loss=loss), "mapping": {"loss": loss}, "tensor": loss}[self.form]


@for_each("form", ["object", "mapping", "tensor"])
@for_each(
    "batch",
    [{"inputs": torch.ones(2, 3), "labels": torch.ones(2)}, (torch.ones(2, 3), torch.ones(2)), torch.ones(2, 3)],
)
def test_batches_and_losses_may_have_many_forms(form, batch):
    """Mapping, pair or tensor in; `.loss`, "loss" or the loss itself out."""
    model = Loose(form)
    trainer = StandardMixedPrecisionTrainer(MixedPrecisionConfig(precision_mode="FP32"))
    result = trainer.train_step(batch, model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert result["loss"].item() == (1.0 if isinstance(batch, torch.Tensor) else 2.0)
    assert trainer.performance_tracker.get_stats()["steps"] == 1


@for_each(
    ("batch", "expected"),
    [
        ({"inputs": torch.ones(2, 4), "labels": torch.zeros(2, 3)}, "targets"),
        ((torch.ones(2, 4), torch.zeros(2, 3)), "targets"),
        (torch.ones(2, 4), "itself"),
    ],
)
def test_loss_fn_gets_outputs_and_targets(batch, expected):
    """The labels of a mapping, the second of a pair, and a tensor itself, stand beside the outputs."""
    seen = []

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, inputs):
            return self.layer(inputs)

    def loss_fn(outputs, targets):
        seen.append(targets)
        return outputs.square().mean()

    model = Network()
    trainer = StandardMixedPrecisionTrainer(loss_fn=loss_fn)
    trainer.train_step(batch, model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert seen[0].shape == ((2, 4) if expected == "itself" else (2, 3))


# ---- misuse -------------------------------------------------------------------------------------------------

MODEL, OTHER = tiny_mlp(), tiny_mlp()
SGD = torch.optim.SGD(MODEL.parameters(), lr=0.1)
MISUSES = {
    "optimizer of another model": (
        AttachError, "none is among the 4 trainable ones of this Sequential.*model.parameters()",
        lambda trainer: trainer.train_step(vectors(1)[0], MODEL, torch.optim.SGD(OTHER.parameters())),
    ),
    "no model": (AttachError, "the model is a function", lambda trainer: trainer.train_step(vectors(1)[0], mse_loss, SGD)),
    "no optimizer": (AttachError, "the optimizer is a str", lambda trainer: trainer.train_step(vectors(1)[0], MODEL, "SGD")),
    "batch without labels": (
        BatchError, 'no "labels" for loss_fn; its keys are input',
        lambda trainer: trainer.train_step({"input": torch.ones(2, 4)}, MODEL, SGD),
    ),
    "loss not scalar": (
        BatchError, r"shape \(6, 3\).*loss\.mean\(\)",
        lambda trainer: trainer.train_step(vectors(1)[0], MODEL, SGD, loss_fn=lambda outputs, targets: outputs),
    ),
    "loss not a tensor": (
        BatchError, "the loss is a float",
        lambda trainer: trainer.train_step(vectors(1)[0], MODEL, SGD, loss_fn=lambda outputs, targets: 1.0),
    ),
    "detached loss": (
        BatchError, "does not depend on any parameter",
        lambda trainer: trainer.train_step(vectors(1)[0], MODEL, SGD, loss_fn=lambda o, t: o.detach().mean()),
    ),
    "three things in a batch": (
        BatchError, "the batch is a tuple of 3: pass a mapping",
        lambda trainer: trainer.train_step((1, 2, 3), MODEL, SGD),
    ),
    "window of nothing": (
        BatchError, "train_window got no batch", lambda trainer: trainer.train_window([], MODEL, SGD),
    ),
    "batch of text": (BatchError, "the batch is a str", lambda trainer: trainer.train_step("text", MODEL, SGD)),
}  # fmt: skip


@for_each("misuse", MISUSES)
def test_misuse_is_a_clear_error_and_leaves_the_trainer_usable(misuse):
    """The message says what was passed and what to do; the next step trains, and no gradient is left over."""
    error, words, call = MISUSES[misuse]
    trainer = StandardMixedPrecisionTrainer(loss_fn=mse_loss)
    with pytest.raises(error, match=words):
        call(trainer)
    assert trainer.train_step(vectors(1)[0], MODEL, SGD)["stepped"]
    assert trainer.precision_monitor.applied_steps + trainer.precision_monitor.skipped_steps == 1


def test_a_model_without_a_loss_is_told_what_to_do():
    """A transformers model without labels returns no loss: the message names the batch's keys, "labels" and loss_fn."""
    model = small_gpt2()
    batch = {"input_ids": real_text(1)[0]["input_ids"]}
    with pytest.raises(BatchError, match=r"keys are input_ids.*\"labels\".*loss_fn="):
        StandardMixedPrecisionTrainer().train_step(batch, model, adamw(model, fused=False))


def test_a_pair_without_a_loss_fn_is_told_what_to_do():
    """A model of inputs alone: the message names loss_fn. A TypeError from within a model that takes pairs stays its own."""
    with pytest.raises(BatchError, match=r"Sequential cannot be called with a pair.*pass loss_fn="):
        StandardMixedPrecisionTrainer().train_step(vectors(1)[0], MODEL, SGD)

    class Pairs(nn.Linear):
        def forward(self, inputs, targets):
            return super().forward(inputs) + len(3)

    model = Pairs(4, 3)
    with pytest.raises(TypeError, match=r"'int' has no len"):
        StandardMixedPrecisionTrainer().train_step(vectors(1)[0], model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_config_of_the_wrong_type_is_refused():
    """A dictionary is named, and what to pass instead."""
    with pytest.raises(ConfigError, match=r"StandardMixedPrecisionTrainer\(config=\{\}\): pass a MixedPrecisionConfig"):
        StandardMixedPrecisionTrainer({})


@for_each("failing", [1, 2, 4, 5])
def test_an_exception_in_user_code_leaves_all_clean(failing):
    """Windows of two batches, one forward raises: its window is dropped, and the rest is as if it had never been."""
    config = MixedPrecisionConfig(emulate=False)
    batches = vectors(6)
    models = [FaultyMlp({failing: "raise"}), FaultyMlp()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    trainers = [StandardMixedPrecisionTrainer(config, loss_fn=mse_loss, accumulation_steps=2) for _ in models]
    dropped = [failing - 1] if failing % 2 else [failing - 2, failing - 1]
    for index, batch in enumerate(batches):
        try:
            trainers[0].train_step(batch, models[0], optimizers[0])
        except RuntimeError:
            assert not torch.is_autocast_enabled("cpu")
            assert all(parameter.grad is None for parameter in models[0].parameters())
        if index not in dropped:
            trainers[1].train_step(batch, models[1], optimizers[1])
    left = [list(model.parameters()) for model in models]
    assert trainers[0].scaler.applied_steps == trainers[1].scaler.applied_steps
    assert trainers[0].memory.estimate == trainers[1].memory.estimate
    assert_bitwise_equal(*left)


class FailsOnce(torch.optim.SGD):
    """Raises in its first step."""

    failed = False

    def step(self, closure=None):
        if not self.failed:
            self.failed = True
            raise RuntimeError("no room for state")
        return super().step(closure)


def test_an_exception_in_the_optimizer_leaves_the_scaler_usable():
    """The step that raised is forgotten; the next one is scaled, decided and applied as the first."""
    model = FaultyMlp()
    optimizer = FailsOnce(model.parameters(), lr=0.1)
    trainer = StandardMixedPrecisionTrainer(MixedPrecisionConfig(init_scale=256.0), loss_fn=mse_loss)
    with pytest.raises(RuntimeError, match="no room for state"):
        trainer.train_step(vectors(1)[0], model, optimizer)
    result = trainer.train_step(vectors(1)[0], model, optimizer)
    assert (result["skipped"], result["scale"]) == (False, 256.0)
    assert trainer.scaler.applied_steps == 1


def test_after_cleanup_there_is_no_training():
    """Hooks are gone, statistics remain, and a further step says what to do; cleaning a trainer up again is harmless."""
    model = tiny_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = StandardMixedPrecisionTrainer(loss_fn=mse_loss)
    trainer.train_step(vectors(1)[0], model, optimizer)
    trainer.cleanup()
    trainer.cleanup()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert trainer.precision_monitor.get_precision_stats()["applied_steps"] == 1
    with pytest.raises(AttachError, match="make a new one"):
        trainer.train_step(vectors(1)[0], model, optimizer)


def test_the_trainer_keeps_no_model_alive():
    """Model and optimizer are held weakly: another model can be trained next, by the same scale and counters."""
    trainer = StandardMixedPrecisionTrainer(loss_fn=mse_loss)
    for _ in range(2):
        model = tiny_mlp()
        trainer.train_step(vectors(1)[0], model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert trainer.scaler.decided_steps == 2


def test_models_in_turn_are_bound_once():
    """A GAN's two, and a copy that is evaluated within a window: one hook each, told once, and the window goes on."""
    models = [tiny_mlp(seed).bfloat16() for seed in range(3)]
    trained = [(model, torch.optim.SGD(model.parameters(), lr=0.1)) for model in models[:2]]
    trainer = StandardMixedPrecisionTrainer(MixedPrecisionConfig(precision_mode="BF16"), loss_fn=mse_loss)
    for batch in vectors(4):
        for model, optimizer in trained:
            assert trainer.train_step(batch, model, optimizer)["stepped"]
    assert [len(model._forward_pre_hooks) for model in models] == [1, 1, 0]
    reported = [event.kind for event in trainer.session.events]
    assert reported == [EventKind.TRAINING_STARTED]
    bf16 = MixedPrecisionConfig(precision_mode="BF16")
    trainer, stepped = StandardMixedPrecisionTrainer(bf16, loss_fn=mse_loss, accumulation_steps=2), []
    for batch in vectors(4):
        stepped.append(trainer.train_step(batch, *trained[0])["stepped"])
        with torch.no_grad():
            trainer.evaluate(batch, models[2])
    assert stepped == [False, True, False, True]


def test_trainers_in_turn_on_one_model_each_tell_of_their_own_steps():
    """One at a time has its contexts on the model; what each had counted goes on, also of the one that comes back."""
    model = tiny_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainers = [StandardMixedPrecisionTrainer(loss_fn=mse_loss) for _ in range(2)]
    for batch, trainer in zip(vectors(5), trainers + trainers + trainers[:1], strict=True):
        former = trainer.session
        assert trainer.train_step(batch, model, optimizer)["skipped"] is False
    assert trainer.session is not former
    assert trainer.session.is_attached
    assert not trainers[1].session.is_attached
    assert "another session trains this Sequential" in trainers[1].session.events[-1].message
    assert [trainer.session.metrics()["applied_steps"] for trainer in trainers] == [3, 2]
    assert len(model._forward_pre_hooks) == 1


def test_a_window_that_was_begun_is_finished_first():
    """Neither another model's batch nor `train_window` cuts it short: an error, and then it ends as if nothing had been."""
    batches, parameters = vectors(2), []
    for interrupted in (False, True):
        model, other = tiny_mlp(), tiny_mlp(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = StandardMixedPrecisionTrainer(loss_fn=mse_loss, accumulation_steps=2)
        trainer.train_step(batches[0], model, optimizer)
        if interrupted:
            with pytest.raises(BatchError, match=r"another model or optimizer.*so far: 1\).*train_window takes"):
                trainer.train_step(batches[0], other, torch.optim.SGD(other.parameters(), lr=0.1))
            with pytest.raises(BatchError, match=r"train_window, but.*so far: 1\).*train_step"):
                trainer.train_window(batches, model, optimizer)
        assert trainer.train_step(batches[1], model, optimizer)["stepped"]
        parameters.append(parameters_of(model))
    assert_bitwise_equal(*parameters)


def test_a_model_that_is_gone_leaves_no_window_behind():
    """Its gradients are gone with it, so that the next model begins a window of its own."""
    model, other = tiny_mlp(), tiny_mlp(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = StandardMixedPrecisionTrainer(loss_fn=mse_loss, accumulation_steps=2)
    trainer.train_step(vectors(1)[0], model, optimizer)
    del model, optimizer
    gc.collect()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    assert [trainer.train_step(batch, other, optimizer)["stepped"] for batch in vectors(2)] == [False, True]


def test_memory_savings_are_measured_in_the_first_step():
    """BF16 and emulated FP16 save some memory on GPT-2, FP32 exactly none; the estimate is there in bytes."""
    savings = {}
    for mode in ("FP32", "BF16", "MIXED"):
        model = small_gpt2()
        trainer = StandardMixedPrecisionTrainer(MixedPrecisionConfig(precision_mode=mode))
        trainer.train_step(real_text(1)[0], model, adamw(model, fused=False))
        savings[mode] = trainer.precision_monitor.get_precision_stats()["avg_memory_savings"]
        assert trainer.memory.report()["fp32_stored"] > 0
    assert savings["FP32"] == 0.0
    assert 0.02 < savings["BF16"] < 0.5
    assert (
        0.0 < savings["MIXED"] < savings["BF16"]
    )  # of which a CPU runs `pow` in half precision, where CUDA takes FP32


def test_half_parameters_are_settled_before_the_first_step():
    """Trainable FP16 parameters under MIXED are upcast, and PrecisionMode.FP16 trains them with master weights."""
    model = tiny_mlp().half()
    trainer = StandardMixedPrecisionTrainer(loss_fn=mse_loss)
    trainer.train_step(vectors(1)[0], model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model = tiny_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = MixedPrecisionConfig(precision_mode="FP16", init_scale=64.0)
    trainer = StandardMixedPrecisionTrainer(config, loss_fn=lambda o, t: mse_loss(o.float(), t.float()))
    x, y = vectors(1)[0]
    before = parameters_of(model)
    assert trainer.train_step((x.half(), y.half()), model, optimizer)["skipped"] is False
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert not torch.equal(before[0], model[0].weight.float())
    trainer.cleanup()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
