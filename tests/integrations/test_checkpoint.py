"""`save_state` and `load_state`: exact, whole, and across precisions."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from hf_amp import EventKind
from hf_amp.integrations.checkpoint import FINITE_CHECK_FILE, AtomicCheckpoint, finish_interrupted
from tests.each import for_each
from tests.forking import run_program
from tests.integrations.checkpointed_run import KilledWhileSaved, begin
from tests.reference import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


@pytest.mark.parametrize(("naming", "strategy"), [("automatic", "ADAPTIVE"), ("same folder", "DYNAMIC")])
def test_a_run_killed_while_it_saves_resumes_exactly(tmp_path: Path, naming: str, strategy: str) -> None:
    """Saved at step 6, killed by SIGKILL in the middle of the next save, resumed: steps 6 to 12 are the same to the bit
    as without a break, in parameters, optimizer, schedule, scale, policy and counters."""
    folder = str(tmp_path / "checkpoints_of_a_killed_run")
    killed = run_program("tests.integrations.checkpointed_run", folder, naming, strategy)
    assert killed.codes == [-signal.SIGKILL], killed.output[-2000:]

    resumed = begin(folder=folder if naming == "automatic" else None, scaling_strategy=strategy)
    resumed.accelerator.register_for_checkpointing(KilledWhileSaved())
    resumed.accelerator.load_state(None if naming == "automatic" else folder)
    assert list(resumed.session.plan.modules) == ["0"]
    resumed.train(6, 12)
    unbroken = begin(scaling_strategy=strategy)
    unbroken.train(0, 12)
    (tensors, state), (expected_tensors, expected_state) = resumed.everything(), unbroken.everything()
    assert_bitwise_equal(tensors, expected_tensors)
    assert state == expected_state
    loaded, skipped = (e for e in resumed.session.events if e.kind is not EventKind.ATTACHED)
    assert (loaded.kind, loaded.step) == (EventKind.STATE_LOADED, 6)
    assert (skipped.kind, skipped.step) == (EventKind.STEP_SKIPPED, 8)


@for_each("after", ["fp16", "bf16", "no"])
@for_each("before", ["fp16", "bf16", "no"])
def test_a_run_goes_on_in_another_precision(tmp_path: Path, before: str, after: str) -> None:
    """From each precision into each: counters go on, and the scale does where both have one."""
    first = begin(before, init_scale=4096.0)
    first.train(0, 2)
    first.accelerator.save_state(str(tmp_path / "saved"))
    second = begin(after, init_scale=1024.0)
    second.accelerator.load_state(str(tmp_path / "saved"))
    assert second.session.scaler.get_scale() == {
        ("fp16", "fp16"): 2048.0, ("bf16", "fp16"): 1024.0, ("no", "fp16"): 1024.0,
    }.get((before, after), 1.0)  # fmt: skip
    second.train(3, 6)
    assert second.session.metrics()["skipped_steps"] == 2
    assert second.session.scaler.applied_steps == 3
    assert all(p.isfinite().all() for p in second.model.parameters())


@for_each("before", ["fp16", "bf16"])
@for_each("after", ["fp16", "bf16"])
def test_a_checkpoint_from_without_hf_amp_loads(tmp_path: Path, before: str, after: str) -> None:
    """Stock accelerate on a CPU saves no scaler.pt: model and optimizer load, the scale begins anew, which is told."""
    stock = begin(before, attached=False)
    stock.accelerator.save_state(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "scaler.pt").exists()
    ours = begin(after)
    with torch.no_grad():
        ours.model[0].weight.zero_()
    ours.accelerator.load_state(str(tmp_path / "saved"))
    assert torch.equal(ours.model[0].weight, stock.model[0].weight)
    assert "holds no state of a scaler" in ours.session.events[-1].message


def test_15_stock_looks_for_a_scale_that_was_never_there(tmp_path: Path) -> None:
    """A BF16 checkpoint ends an FP16 run that scales, as accelerate's does on a GPU. With hf_amp it goes on, as above."""
    begin("bf16", attached=False).accelerator.save_state(str(tmp_path / "saved"))
    stock = begin("fp16", attached=False)
    stock.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(FileNotFoundError, match=r"scaler\.pt"):
        stock.accelerator.load_state(str(tmp_path / "saved"))


def test_a_stock_scaler_state_is_taken_up(tmp_path: Path) -> None:
    """The scaler.pt of a stock FP16 run on a GPU: its scale and growth tracker go on."""
    run = begin()
    run.accelerator.save_state(str(tmp_path / "saved"))
    stock = torch.amp.GradScaler("cpu", init_scale=256.0)
    stock.load_state_dict({**stock.state_dict(), "_growth_tracker": 17})
    torch.save(stock.state_dict(), tmp_path / "saved" / "scaler.pt")
    run.accelerator.load_state(str(tmp_path / "saved"))
    state = run.session.scaler.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (256.0, 17)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_our_checkpoint_loads_without_hf_amp(tmp_path: Path, precision: str) -> None:
    """Stock accelerate loads it; a guard's scale of 1 is not where a stock FP16 run would look."""
    ours = begin(precision)
    ours.train(0, 2)
    ours.accelerator.save_state(str(tmp_path / "saved"))
    stock = begin(precision, attached=False)
    stock.accelerator.load_state(str(tmp_path / "saved"))
    assert_bitwise_equal(list(stock.model.parameters()), list(ours.model.parameters()))
    scaler_file = tmp_path / "saved" / "scaler.pt"
    assert scaler_file.exists() == (precision == "fp16")
    if scaler_file.exists():
        torch.amp.GradScaler("cpu").load_state_dict(torch.load(scaler_file, weights_only=True))


def test_replacing_a_checkpoint_keeps_what_else_is_in_the_folder(tmp_path: Path) -> None:
    """A file of the user's stays; what the other precision kept its state in goes."""
    run = begin()
    run.accelerator.save_state(str(tmp_path))
    (tmp_path / "arguments.json").write_text("{}")
    run.session.detach()
    other = begin("bf16")
    other.accelerator.save_state(str(tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"arguments.json", FINITE_CHECK_FILE} < names
    assert not names & {"scaler.pt", ".incomplete", ".complete"}


def test_automatic_checkpoints_are_named_and_counted_as_upstream_does(tmp_path: Path) -> None:
    """With total_limit=1 the newest is there, the older is gone, and nothing else is left behind."""
    run = begin(folder=str(tmp_path))
    for _ in range(2):
        run.accelerator.save_state()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_1"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_resumed_run_keeps_its_newest_checkpoint(tmp_path: Path) -> None:
    """A new process counts from 0 again: what it has just saved stays, and the one it came from goes, as upstream has it."""
    first = begin(folder=str(tmp_path))
    for _ in range(2):
        first.accelerator.save_state()
    resumed = begin(folder=str(tmp_path))
    resumed.accelerator.load_state()
    resumed.train(0, 2)
    resumed.accelerator.save_state()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_0"]
    again = begin(folder=str(tmp_path))
    again.accelerator.load_state()
    assert_bitwise_equal(again.everything()[0], resumed.everything()[0])


def test_a_whole_checkpoint_takes_its_place_after_a_kill(tmp_path: Path) -> None:
    """Killed while the files of a whole checkpoint are moved into their places: the move is completed."""
    target = tmp_path / "saved"
    target.mkdir()
    (target / "model").write_text("old")
    (target / "optimizer").write_text("old")
    staging = AtomicCheckpoint(target)
    (staging.folder / "shards").mkdir(parents=True)
    for name in ("model", "optimizer", "shards/0"):
        (staging.folder / name).write_text("new")
    staging.folder.rename(target / ".complete")
    (target / ".complete" / "model").replace(target / "model")  # as far as the killed process came
    finish_interrupted(target)
    files = {str(p.relative_to(target)): p.read_text() for p in target.rglob("*") if p.is_file()}
    assert files == {"model": "new", "optimizer": "new", "shards/0": "new"}
