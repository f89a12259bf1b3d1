"""`hf-amp demo` trains, shows what it did, and leaves a run folder that other tools read."""

import json
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from hf_amp.cli import app
from hf_amp.hardware import probe

STEPS = 12


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


def row(result, name: str) -> str:
    """The value beside a name in the printed table, over all its lines."""
    cells = [line.split("│")[1:3] for line in result.stdout.splitlines() if line.startswith("│")]
    start = next(i for i, (key, _) in enumerate(cells) if key.strip() == name)
    value = [cells[start][1]]
    for key, continued in cells[start + 1 :]:
        if key.strip():
            break
        value.append(continued)
    return " ".join(part.strip() for part in value)


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


def test_the_table_names_what_ran(run):
    """Emulated FP16 on a CPU is never passed off as the real thing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert row(run, "ran") == probe(device).describe_fp16(emulate=True)


def test_the_table_accounts_for_every_step(run):
    """Applied and skipped steps add up to the steps asked for."""
    skips = re.findall(r"(\d+) [A-Z]+", row(run, "skipped steps"))
    applied = float(row(run, "applied steps"))
    assert applied + sum(map(int, skips)) == STEPS
    assert applied > 0


def test_the_model_learns(run):
    """The loss falls from that of guessing among 256 bytes."""
    first, last = map(float, re.findall(r"[\d.]+", row(run, "loss")))
    assert 5.0 < first < 6.0
    assert last < first - 0.5


def test_the_scale_is_in_tensorboard(run, folder):
    """Every logged step has the loss scale beside the loss."""
    (file,) = folder.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(file))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    (scale_tag,) = [tag for tag in tags if tag.endswith("amp/scale")]
    (loss_tag,) = [tag for tag in tags if tag.endswith("/loss")]
    scales, losses = accumulator.Scalars(scale_tag), accumulator.Scalars(loss_tag)
    assert [scale.step for scale in scales] == [loss.step for loss in losses]
    assert scales[-1].step == STEPS
    assert all(scale.value > 0 for scale in scales)


def test_the_event_log_tells_the_run_from_start_to_end(run, folder):
    """Every line parses; training starts once and ends once, with the counts of the table."""
    kinds = [event["event"] for event in events(folder)]
    assert (kinds.count("training_started"), kinds.count("training_ended")) == (1, 1)
    last = events(folder)[-1]
    assert last["event"] == "training_ended"
    assert last["applied_steps"] + last["skipped_steps"] == STEPS


def test_every_skip_of_the_table_is_in_the_event_log(run, folder):
    """The log and the table are of the same run."""
    skips = [event for event in events(folder) if event["event"] == "step_skipped"]
    assert len(skips) == sum(map(int, re.findall(r"(\d+) [A-Z]+", row(run, "skipped steps"))))


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


def test_fp32_runs_without_a_scale(tmp_path):
    """The same run without mixed precision, which says so."""
    result = invoke("demo", "--steps", 4, "--precision", "fp32", "--output-dir", tmp_path)
    assert result.exit_code == 0, result.output
    assert row(result, "ran").startswith("FP32 on ")
    assert row(result, "scale").startswith("none: only FP16 is scaled")
    assert (tmp_path / "checkpoint-4" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--strategy", "NOPE", "--steps", "1"], "one of CONSTANT, DYNAMIC, ADAPTIVE, PERFORMANCE_OPTIMIZED"),
        (["--precision", "fp8"], "'fp16', 'bf16', 'fp32'"),
        (["--steps", "0"], "1"),
    ],
)
def test_a_wrong_option_ends_at_once_and_says_what_is_allowed(tmp_path, arguments, expected):
    """Exit code 2, the option, the allowed values, and no run folder."""
    result = invoke("demo", *arguments, "--output-dir", tmp_path / "run")
    assert result.exit_code == 2
    assert arguments[0] in words(result)
    assert expected in words(result)
    assert not (tmp_path / "run").exists()


def test_options_come_from_a_file_too(tmp_path):
    """--config takes a YAML file; a typo in it ends at once and names the nearest option and the file."""
    file = tmp_path / "amp.yaml"
    file.write_text("init_scale: 256.0\nscaling_strategy: CONSTANT\n")
    result = invoke("demo", "--steps", 1, "--config", file, "--output-dir", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert row(result, "scale") == "256 (CONSTANT)"
    assert row(result, "step time") == "not measured: one step only"
    file.write_text("init_scal: 256.0\n")
    result = invoke("demo", "--config", file, "--output-dir", tmp_path / "other")
    assert result.exit_code == 2
    assert "init_scale" in words(result)
    assert not (tmp_path / "other").exists()
