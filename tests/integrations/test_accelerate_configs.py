"""The files of accelerate_configs/, and the Accelerate examples that they start."""

from __future__ import annotations

import re
from pathlib import Path

from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from tests.each import for_each
from tests.forking import printed_by
from tests.integrations.launching import CONFIGS, ROOT, launch
from tests.readme import command

FILES = sorted(CONFIGS.glob("*.yaml"))


@for_each("file", FILES)
def test_a_config_is_what_its_name_says(file: Path) -> None:
    """accelerate's own loader takes it; precision, number of processes and machines, and sharding are those of its name."""
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    words = file.stem.split("_")
    assert config.mixed_precision in words or file.stem == "cpu_2_processes"
    assert config.use_cpu == ("cpu" in words)
    assert (config.num_machines > 1) == ("node" in words)
    assert config.num_processes % config.num_machines == 0
    assert (config.num_processes == 1) == ("single" in words)
    assert bool(config.fsdp_config) == ("fsdp2" in words)
    assert bool(config.deepspeed_config) == ("deepspeed" in words)


@for_each("file", FILES)
def test_a_config_says_how_to_start_it(file: Path) -> None:
    """Its comment has a sentence, and a command that names the file itself and an example that is there."""
    comment = [line.removeprefix("#") for line in file.read_text().splitlines() if line.startswith("#")]
    assert comment[0].strip()[0].isupper()
    lines = [line.strip() for line in comment if "accelerate launch" in line]
    assert lines
    for line in lines:
        assert f"--config_file accelerate_configs/{file.name}" in line
        for example in re.findall(r"examples/\S+", line):
            assert (ROOT / example).is_file()


def losses(output: str) -> list[float]:
    """What an example prints as its loss."""
    return [float(text) for text in re.findall(r"(?:loss|generator) +(-?[\d.]+)", output)]


def test_the_loop_trains_on_two_processes() -> None:
    """README's own command, for fewer steps: one line a report, from one of the two, and a loss that falls on real text."""
    *_, option, config, example = command("accelerate launch")
    assert option == "--config_file"
    reported = losses(launch(ROOT / config, example, "--steps", "21", "--batch-size", "4"))
    assert len(reported) == 2
    assert reported[-1] < reported[0] - 1.0


def test_the_loop_trains_on_one() -> None:
    """The configuration for one CPU starts it too."""
    output = launch("single_cpu_fp16.yaml", "examples/accelerate_loop.py", "--steps", "2", "--batch-size", "4")
    assert len(losses(output)) == 2
    assert "emulated" in output


def test_the_gan_trains_on_two_processes() -> None:
    """Two models and two optimizers under DistributedDataParallel: all steps are applied or told, none is lost."""
    output = printed_by("examples.accelerate_gan", "--epochs", "1")
    applied, skipped = (int(n) for n in re.search(r"applied (\d+)  skipped (\d+)", output).groups())
    assert applied + skipped == 2 * (1797 // 64 // 2)
    assert skipped <= 2
