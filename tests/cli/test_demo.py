"""`hf-amp demo` trains side by side, shows what became of it, and leaves a run folder that other tools read."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from hf_amp.cli import app
from hf_amp.cli.demo_training import small_gpt2, text_blocks, train
from hf_amp.device import probe
from tests.fallback.range_reference import fp16_flop_share, modules_out_of_range

STEPS = 12
COLUMNS = ("FP32", "stock FP16", "hf_amp FP16")
OVERFLOWING = {f"transformer.h.{i}.{part}.c_proj" for i in range(2) for part in ("attn", "mlp")}


@pytest.fixture(scope="module", autouse=True)
def quiet_libraries():
    """The command quietens transformers for its process, which here is that of all tests."""
    verbosity, progress = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    yield
    transformers_logging.set_verbosity(verbosity)
    if progress:
        transformers_logging.enable_progress_bar()


def invoke(*arguments: object):
    """`hf-amp` with these arguments."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def words(result) -> str:
    """What was printed, without frames and line breaks."""
    return " ".join(re.sub(r"[^\x00-\x7f]", " ", result.output).split())


def row(result, name: str) -> list[str]:
    """The values beside a name in the printed table, one a run, each over all its lines."""
    lines = [line for line in result.stdout.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    start = next(i for i, (key, *_) in enumerate(cells) if key == name)
    stop = next((i for i in range(start + 1, len(cells)) if cells[i][0]), len(cells))
    return [" ".join(filter(None, parts)) for parts in list(zip(*cells[start:stop], strict=True))[1:]]


def numbers(text: str) -> list[float]:
    """The numbers in a cell."""
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo") / "run"


@pytest.fixture(scope="module")
def run(folder):
    return invoke("demo", "--steps", STEPS, "--output-dir", folder)


def events(folder: Path):
    """The event log, line by line."""
    return [json.loads(line) for line in (folder / "amp_events.jsonl").read_text().splitlines()]


def test_the_demo_succeeds(run):
    """The default run ends well."""
    assert run.exit_code == 0, run.output


def test_the_demo_model_overflows_in_what_writes_to_its_stream():
    """In FP64 exactly those modules are beyond FP16, three quarters of the work is not; plainly scaled, none is."""
    ids = torch.tensor(text_blocks()[:4])
    batch = {"input_ids": ids, "labels": ids}
    torch.manual_seed(0)
    rescaled = small_gpt2().eval()
    torch.manual_seed(0)
    plain = small_gpt2(factor=1.0).eval()
    assert modules_out_of_range(rescaled, batch) == OVERFLOWING
    assert modules_out_of_range(plain, batch) == set()
    assert fp16_flop_share(rescaled, batch, OVERFLOWING) > 0.7
    with torch.no_grad():
        torch.testing.assert_close(rescaled(**batch).logits, plain(**batch).logits)


def test_the_table_has_a_column_for_every_run(run):
    """FP32, FP16 as it comes, and FP16 with hf_amp, in that order."""
    heading = next(line for line in run.stdout.splitlines() if line.startswith("┃"))
    assert tuple(cell.strip() for cell in heading.split("┃")[2:-1]) == COLUMNS


def test_the_table_names_what_ran(run):
    """Emulated FP16 on a CPU is never passed off as the real thing."""
    hardware = probe("cuda" if torch.cuda.is_available() else "cpu")
    fp16 = hardware.describe_fp16(emulate=True)
    assert row(run, "ran") == [f"FP32 on {hardware.name}", fp16, fp16]


def test_stock_fp16_never_applies_a_step_and_hf_amp_does_but_for_a_few(run):
    """Applied and skipped steps add up in every run; the stock scale was halved at every step, for nothing."""
    applied = [int(cell) for cell in row(run, "applied steps")]
    skipped = [sum(map(int, re.findall(r"\d+", cell))) for cell in row(run, "skipped steps")]
    assert [a + s for a, s in zip(applied, skipped, strict=True)] == [STEPS] * 3
    assert applied[:2] == [STEPS, 0]
    assert STEPS - 5 <= applied[2] < STEPS
    assert row(run, "skipped steps")[2] == f"{skipped[2]} ACTIVATION"
    assert row(run, "scale") == ["none", f"{2.0**16 / 2**STEPS:g}", "65536 (DYNAMIC)"]


def test_a_loss_of_nan_is_not_shown_as_zero(tmp_path):
    """What a stock Trainer logs for NaN is 0, which looks like a perfect fit: the demo shows NaN."""
    losses = []
    train("fp16", None, 2, tmp_path, lambda step, loss: losses.append(loss))
    assert all(math.isnan(loss) for loss in losses if loss is not None)
    assert losses[-1] is not None


def test_hf_amp_names_the_modules_and_keeps_them_in_fp32(run):
    """They are those that leave the range."""
    assert row(run, "in FP32")[:2] == ["no plan", "no plan"]
    assert set(row(run, "in FP32")[2].split()) == OVERFLOWING


def test_hf_amp_learns_and_stock_fp16_does_not(run):
    """On text that was not trained on hf_amp falls as FP32 does, a few steps behind; stock stays where it was."""
    losses = [numbers(cell) for cell in row(run, "held-out loss")]
    assert len({first for first, _ in losses}) == 1
    assert losses[1][0] == losses[1][1]
    assert losses[0][1] < losses[0][0] - 0.5
    assert losses[2][1] == pytest.approx(losses[0][1], rel=0.1)


def test_the_scale_is_in_tensorboard(run, folder):
    """Every logged step of hf_amp's run has the loss scale beside the loss; the other runs are there to compare with."""
    (file,) = (folder / "runs").rglob("events.out.tfevents.*")
    assert len(list(folder.rglob("events.out.tfevents.*"))) == 3
    accumulator = EventAccumulator(str(file))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    (scale_tag,) = [tag for tag in tags if tag.endswith("amp/scale")]
    (loss_tag,) = [tag for tag in tags if tag.endswith("/loss")]
    scales, losses = accumulator.Scalars(scale_tag), accumulator.Scalars(loss_tag)
    assert [scale.step for scale in scales] == [loss.step for loss in losses]
    assert scales[-1].step == STEPS
    assert all(scale.value > 0 for scale in scales)


def test_the_event_log_has_the_run_from_start_to_end(run, folder):
    """Every line parses; training starts once and ends once, with the counts of the table."""
    kinds = [event["event"] for event in events(folder)]
    assert (kinds.count("training_started"), kinds.count("training_ended")) == (1, 1)
    last = events(folder)[-1]
    assert last["event"] == "training_ended"
    assert last["applied_steps"] + last["skipped_steps"] == STEPS


def test_every_skip_of_the_table_is_in_the_event_log(run, folder):
    """The log and the table are of the same run."""
    skips = [event for event in events(folder) if event["event"] == "step_skipped"]
    assert len(skips) == sum(numbers(row(run, "skipped steps")[2]))
    (change,) = [event for event in events(folder) if event["event"] == "precision_changed"]
    assert set(change["modules"]) == OVERFLOWING


def test_the_checkpoint_is_a_model(run, folder):
    """It loads with transformers alone, in FP32, and holds finite numbers."""
    model = AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{STEPS}")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert model(torch.tensor([[72, 105]])).logits.shape == (1, 2, 256)


def test_the_commands_that_are_suggested_name_the_run_folder(run, folder):
    """What the demo says to look at is there."""
    shown = "".join(run.stdout.split())
    assert f"tensorboard--logdir{folder}" in shown
    assert f"{folder}/amp_events.jsonl" in shown
    assert f"from_pretrained('{folder}/checkpoint-{STEPS}')" in shown


def test_another_precision_runs_without_a_scale(tmp_path):
    """BF16 takes the place of FP16; FP32 has nothing beside it but itself; hf_amp says what it does there."""
    for precision, columns, in_fp32 in (("fp32", 2, "the whole model"), ("bf16", 3, "nothing")):
        folder = tmp_path / precision
        result = invoke("demo", "--steps", 2, "--precision", precision, "--output-dir", folder)
        assert result.exit_code == 0, result.output
        assert row(result, "ran")[-1].startswith(f"{precision.upper()} on ")
        assert row(result, "scale")[0] == "none"
        assert row(result, "scale")[-1].startswith("none: only FP16 is scaled")
        assert row(result, "applied steps") == ["2"] * columns
        assert row(result, "in FP32")[-1] == in_fp32
        assert (folder / "checkpoint-2" / "model.safetensors").is_file()


def test_real_half_is_real_in_both_fp16_runs(tmp_path):
    """The kernels give the same verdicts as the emulation: stock applies nothing, hf_amp all but the first step."""
    file = tmp_path / "amp.yaml"
    file.write_text("emulate: false\n")
    result = invoke("demo", "--steps", 2, "--config", file, "--output-dir", tmp_path)
    assert result.exit_code == 0, result.output
    assert "real FP16" in row(result, "ran")[1]
    assert row(result, "ran")[1] == row(result, "ran")[2]
    assert row(result, "applied steps") == ["2", "0", "1"]
    assert set(row(result, "in FP32")[2].split()) == OVERFLOWING


def test_a_wrong_option_ends_at_once_and_says_what_is_allowed(tmp_path):
    """Exit code 2, the option, the allowed values, and no run folder."""
    file = tmp_path / "amp.yaml"
    file.write_text("scaling_strategy: NOPE\n")
    for option, value, expected in (
        ("--config", file, "one of CONSTANT, DYNAMIC, ADAPTIVE, PERFORMANCE_OPTIMIZED"),
        ("--precision", "fp8", "'fp16', 'bf16', 'fp32'"),
        ("--steps", 0, "1"),
    ):
        result = invoke("demo", option, value, "--output-dir", tmp_path / "run")
        assert result.exit_code == 2
        assert option in words(result)
        assert expected in words(result)
        assert not (tmp_path / "run").exists()


def test_options_come_from_a_file_too(tmp_path):
    """--config takes a YAML file; a typo in it ends at once and names the nearest option and the file."""
    file = tmp_path / "amp.yaml"
    file.write_text("init_scale: 256.0\nscaling_strategy: CONSTANT\n")
    result = invoke("demo", "--steps", 1, "--config", file, "--output-dir", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert row(result, "scale")[2] == "256 (CONSTANT)"
    assert row(result, "step time") == ["not measured: one step only"] * 3
    file.write_text("init_scal: 256.0\n")
    result = invoke("demo", "--config", file, "--output-dir", tmp_path / "other")
    assert result.exit_code == 2
    assert "init_scale" in words(result)
    assert not (tmp_path / "other").exists()
