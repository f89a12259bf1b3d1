"""`AdvancedMixedPrecisionManager`: epochs that add up, schedules that wait for skipped steps, state that comes back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import hf_amp
from hf_amp import (
    AdvancedMixedPrecisionManager,
    AttachError,
    BatchError,
    ConfigError,
    MixedPrecisionConfig,
    PrecisionMode,
    StateError,
)
from tests.each import for_each
from tests.host_reads import count_host_reads
from tests.reference import adamw, assert_bitwise_equal, snapshot
from tests.training.loops import FaultyMlp, real_text, small_gpt2, vectors


def made(config=None, faults=None, accumulation_steps=1, **options):
    """A manager, a model and its optimizer."""
    model = FaultyMlp(faults)
    manager = AdvancedMixedPrecisionManager(
        config or MixedPrecisionConfig(init_scale=256.0, **options),
        loss_fn=mse_loss,
        accumulation_steps=accumulation_steps,
    )
    return manager, model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_losses_in_one_memory_are_told_apart():
    """As the outputs of a model that runs as a CUDA graph: each is written where the one before was."""
    memory = torch.zeros(())
    manager, model, _ = made()
    batches = [(x, torch.full_like(y, index)) for index, (x, y) in enumerate(vectors(3))]

    def index_of_batch(outputs, targets):
        return memory.copy_(targets.mean())

    assert manager.validate_epoch(batches, model, loss_fn=index_of_batch)["losses"] == [0.0, 1.0, 2.0]


def test_two_epochs_learn_and_add_up():
    """GPT-2 on real text through the document's calls: losses fall, and the figures of both epochs are their own."""
    model = small_gpt2(dropout=0.0)
    optimizer = adamw(model, fused=False)
    batches = real_text(30)
    with AdvancedMixedPrecisionManager(MixedPrecisionConfig()) as manager:
        before = manager.validate_epoch(batches[:5], model)
        first, second = (manager.train_epoch(batches, model, optimizer) for _ in range(2))
        after = manager.validate_epoch(batches[:5], model)
    assert len(first["losses"]) == len(second["losses"]) == 30
    assert first["steps"] == second["steps"] == 30
    assert first["applied_steps"] + first["skipped_steps"] == 30
    assert (first["epoch"], second["epoch"], manager.epochs) == (1, 2, 2)
    assert first["samples"] == 120
    assert before["loss"] > first["loss"] > second["loss"]
    assert after["loss"] < before["loss"] - 0.5
    stats = manager.get_training_stats()
    assert stats["precision_stats"]["fp16_usage_rate"] == 1.0
    assert stats["performance_stats"]["steps"] == 60
    assert stats["performance_stats"]["time_share"] == {"FP16": 1.0}
    assert stats["precision_stats"]["avg_loss"] == pytest.approx((sum(first["losses"]) + sum(second["losses"])) / 60)
    assert "emulated" in stats["description"]


def test_losses_are_told_as_they_are():
    """A NaN batch stands in `losses`, is counted, and does not make the epoch's mean NaN."""
    manager, model, optimizer = made(faults={2: "nan"})
    epoch = manager.train_epoch(vectors(4), model, optimizer)
    assert math.isnan(epoch["losses"][1])
    assert (epoch["non_finite_losses"], epoch["skipped_steps"]) == (1, 1)
    assert math.isfinite(epoch["loss"])


def test_the_schedule_waits_for_skipped_steps():
    """Five steps, one of them skipped: the schedule has moved four times."""
    manager, model, optimizer = made(faults={3: "overflow"})
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    epoch = manager.train_epoch(vectors(5), model, optimizer, scheduler=schedule)
    assert epoch["applied_steps"] == 4
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**4


def test_what_is_left_over_is_a_window_of_its_own():
    """Five batches in windows of two: three steps, the last one equal to a step on the fifth batch alone."""
    batches = vectors(5)
    manager, model, optimizer = made(precision_mode="FP32", accumulation_steps=2)
    assert manager.train_epoch(batches, model, optimizer)["steps"] == 3
    twin = FaultyMlp()
    by_hand = torch.optim.SGD(twin.parameters(), lr=0.1)
    for window in (batches[:2], batches[2:4], batches[4:]):
        by_hand.zero_grad()
        for x, y in window:
            (mse_loss(twin(x), y) / len(window)).backward()
        by_hand.step()
    assert_bitwise_equal(list(model.parameters()), list(twin.parameters()))


def test_validation_changes_nothing():
    """Modes, gradients, running statistics, scale and counters are as before; a frozen part in eval mode stays there."""
    manager, model, optimizer = made()
    manager.train_epoch(vectors(2), model, optimizer)
    model.train()
    model.normalise.eval()
    before = [buffer.clone() for buffer in model.buffers()]
    with count_host_reads() as reads:
        figures = manager.validate_epoch(vectors(3), model)
    assert reads.count == 1
    assert figures["batches"] == len(figures["losses"]) == 3
    assert model.training
    assert not model.normalise.training
    assert_bitwise_equal(before, list(model.buffers()))
    assert manager.trainer.scaler.decided_steps == 2


def test_validation_before_training_works():
    """A model is bound by whichever comes first."""
    manager, model, optimizer = made()
    assert math.isfinite(manager.validate_epoch(vectors(2), model)["loss"])
    assert manager.train_epoch(vectors(2), model, optimizer)["steps"] == 2


def test_data_loaders_and_generators_are_taken():
    """A DataLoader, and a generator that has no length."""
    manager, model, optimizer = made()
    data = TensorDataset(torch.randn(10, 4), torch.randn(10, 3))
    assert manager.train_epoch(DataLoader(data, batch_size=4), model, optimizer)["batches"] == 3
    assert manager.train_epoch((batch for batch in vectors(2)), model, optimizer)["batches"] == 2


@pytest.mark.parametrize("shown", [True, False, None])
def test_the_progress_bar_can_be_turned_off(shown, capsys):
    """On when asked for; off when not, and where stderr is no terminal."""
    manager, model, optimizer = made()
    manager.train_epoch(vectors(3), model, optimizer, progress=shown)
    bar = capsys.readouterr().err
    assert ("epoch 1: 100%" in bar and "loss=" in bar and "scale=256" in bar) is bool(shown)


# ---- misuse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [[], DataLoader(TensorDataset(torch.ones(2, 4)), batch_size=4, drop_last=True)])
def test_an_empty_loader_is_an_error(loader):
    """Training and validating on nothing says where to look; the next epoch trains and is the first."""
    manager, model, optimizer = made()
    for call in (lambda: manager.train_epoch(loader, model, optimizer), lambda: manager.validate_epoch(loader, model)):
        with pytest.raises(BatchError, match=r"gave no batch.*drop_last"):
            call()
    assert manager.train_epoch(vectors(2), model, optimizer)["epoch"] == 1


def test_cleanup_twice_is_an_error_but_with_is_not():
    """The second call says that there is nothing left to clean; leaving a `with` after one is fine; statistics remain."""
    manager, model, optimizer = made()
    with manager:
        manager.train_epoch(vectors(2), model, optimizer)
        manager.cleanup()
    with pytest.raises(AttachError, match=r"cleaned up before.*get_training_stats"):
        manager.cleanup()
    assert manager.get_training_stats()["precision_stats"]["applied_steps"] == 2
    for call in (
        lambda: manager.train_epoch(vectors(1), model, optimizer),
        lambda: manager.validate_epoch(vectors(1), model),
    ):
        with pytest.raises(AttachError, match="make a new one"):
            call()


@pytest.mark.parametrize("model", [None, vectors(1)])
def test_a_model_of_the_wrong_type_is_refused(model):
    """As when model and dataloader are interchanged: what was passed is told, and what to pass."""
    manager, _, optimizer = made()
    for call in (
        lambda: manager.train_epoch(vectors(1), model, optimizer),
        lambda: manager.validate_epoch(vectors(1), model),
    ):
        with pytest.raises(AttachError, match=rf"the model is a {type(model).__name__}: pass a torch.nn.Module"):
            call()


@for_each("config", [{}, "fp16", 3])
def test_a_config_of_the_wrong_type_is_refused(config):
    """What was passed is shown, to whom, and what to pass instead."""
    with pytest.raises(ConfigError, match=r"AdvancedMixedPrecisionManager\(config=.*pass a MixedPrecisionConfig"):
        AdvancedMixedPrecisionManager(config)


@for_each("options", [{"memory_efficient": True}, {"gradient_accumulation_friendly": True}])
def test_options_of_our_loops_are_not_ignored_elsewhere(options):
    """`attach` refuses what only these loops follow, by name."""
    from accelerate import Accelerator

    (name,) = options
    with pytest.raises(ConfigError, match=f"{name}=.*only the trainers and the manager of hf_amp follow it"):
        hf_amp.attach(Accelerator(cpu=True), MixedPrecisionConfig(**options))


# ---- state --------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_run(tmp_path):
    """Save after 8 of 16 steps with overflows, load into a new manager: parameters, scale, counters and errors are equal."""
    batches = vectors(16)
    config = MixedPrecisionConfig(init_scale=2.0**12, growth_interval=3)
    whole = made(config, faults={3: "overflow", 12: "overflow"})
    halves = made(config, faults={3: "overflow", 12: "overflow"})
    whole[0].train_epoch(batches[:8], *whole[1:])
    whole[0].train_epoch(batches[8:], *whole[1:])
    halves[0].train_epoch(batches[:8], *halves[1:])
    halves[0].save(tmp_path / "manager.pt")
    resumed = AdvancedMixedPrecisionManager(config, loss_fn=mse_loss)
    resumed.load(tmp_path / "manager.pt")
    resumed.train_epoch(batches[8:], *halves[1:])
    assert_bitwise_equal(snapshot(*whole[1:]), snapshot(*halves[1:]))
    assert resumed.state_dict()["scaler"]["scale"] == whole[0].state_dict()["scaler"]["scale"]
    assert resumed.epochs == 2
    ours, theirs = (m.get_training_stats()["precision_stats"] for m in (resumed, whole[0]))
    for name in ("numerical_errors", "applied_steps", "skipped_steps", "usage_by_format", "gradient_scale"):
        assert ours[name] == theirs[name]
    assert [path.name for path in tmp_path.iterdir()] == ["manager.pt"]


def test_what_was_loaded_is_kept_where_the_model_is_elsewhere(tmp_path):
    """A model on another device than this machine's fastest has a session made for it, which goes on from the saved one."""
    manager, model, optimizer = made(faults={3: "overflow"})
    manager.train_epoch(vectors(4), model, optimizer)
    manager.save(tmp_path / "manager.pt")
    resumed = AdvancedMixedPrecisionManager(loss_fn=mse_loss)
    resumed.load(tmp_path / "manager.pt")
    former = resumed.trainer.session
    resumed.trainer._stepping.bind(model.to("meta"))
    assert resumed.trainer.session is not former
    ours, theirs = (m.get_training_stats()["precision_stats"] for m in (resumed, manager))
    for name in ("numerical_errors", "applied_steps", "skipped_steps", "usage_by_format", "gradient_scale"):
        assert ours[name] == theirs[name]


@for_each("content", [b"", b"text", None])
def test_a_file_that_is_no_state_is_refused(tmp_path, content):
    """Empty, text, or a stock scaler's state: a StateError that names the file or what to pass."""
    path = tmp_path / "state.pt"
    if content is None:
        torch.save(torch.amp.GradScaler("cpu").state_dict(), path)
    else:
        path.write_bytes(content)
    manager, model, optimizer = made()
    with pytest.raises(StateError, match="scaler.load_state_dict" if content is None else "state.pt"):
        manager.load(path)
    assert manager.train_epoch(vectors(1), model, optimizer)["steps"] == 1


@for_each(
    ("options", "trainer"),
    [
        ({}, "StandardMixedPrecisionTrainer"),
        ({"precision_mode": PrecisionMode.DYNAMIC}, "DynamicMixedPrecisionTrainer"),
        ({"scaling_strategy": "PERFORMANCE_OPTIMIZED"}, "PerformanceOptimizedMixedPrecisionTrainer"),
    ],
)
def test_the_config_chooses_the_trainer(options, trainer):
    """By precision mode, then by scaling strategy."""
    assert type(AdvancedMixedPrecisionManager(MixedPrecisionConfig(**options)).trainer).__name__ == trainer


def test_a_disabled_manager_is_the_plain_loop():
    """enabled=False: FP32, nothing scaled or guarded, epochs counted all the same."""
    manager, model, optimizer = made(MixedPrecisionConfig(enabled=False))
    epoch = manager.train_epoch(vectors(3), model, optimizer)
    assert (epoch["steps"], epoch["precision_mode"]) == (3, PrecisionMode.FP32)
    assert manager.get_training_stats()["precision_stats"]["fp16_usage_rate"] == 0.0


class Detector(nn.Module):
    """Returns a mapping of its losses, as torchvision's detectors do."""

    def __init__(self, **extra: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.extra = nn.Linear(4, 2), extra

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        a, b = (self.layer(images) - targets).square().mean(0)
        return {"loss_classifier": a, "loss_box_reg": b, **self.extra}


@pytest.mark.parametrize("as_mapping", [True, False])
def test_a_mapping_of_losses_is_their_sum(as_mapping: bool) -> None:
    """Trained on and validated; a mapping that holds something else too has no loss that can be told."""
    x, y = torch.ones(2, 4), torch.zeros(2, 2)
    batch = {"images": x, "targets": y} if as_mapping else (x, y)
    model = Detector()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected = sum(model(x, y).values()).item()
    with AdvancedMixedPrecisionManager(MixedPrecisionConfig(precision_mode="FP32")) as manager:
        assert manager.train_epoch([batch], model, optimizer)["loss"] == pytest.approx(expected)
        assert manager.validate_epoch([batch], model)["loss"] < expected
    other = Detector(boxes=torch.ones(2, 4))
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    with AdvancedMixedPrecisionManager() as manager, pytest.raises(BatchError, match="returned no loss but a dict"):
        manager.train_epoch([batch], other, optimizer)
