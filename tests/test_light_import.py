"""`import hf_amp` is light: the libraries that only a part of it needs are loaded by that part."""

import subprocess
import sys
from pathlib import Path

import pytest

import hf_amp

HEAVY = ["transformers", "accelerate", "datasets", "tensorboard", "structlog", "matplotlib", "torch._dynamo"]


def loaded_by(statement: str) -> set[str]:
    """Those of the heavy libraries that a new interpreter has loaded after a statement."""
    program = f"import sys\n{statement}\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    completed = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(hf_amp.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(completed.stdout.split())


def test_importing_hf_amp_loads_no_heavy_library():
    """Neither HuggingFace nor logging and plotting libraries come with it."""
    assert loaded_by("import hf_amp") == set()


def test_scaling_without_huggingface_loads_no_heavy_library():
    """A config and a scaler need PyTorch alone."""
    assert (
        loaded_by("import hf_amp; hf_amp.AdvancedGradScaler(hf_amp.MixedPrecisionConfig(), 'cpu')") == set()
    )


def test_the_command_line_loads_no_heavy_library():
    """`hf-amp --help` and completion answer at once: a command loads what it needs when it runs."""
    assert loaded_by("import hf_amp.cli") == set()


@pytest.mark.parametrize(
    ("name", "expected"), [("attach", "accelerate"), ("MixedPrecisionCallback", "transformers")]
)
def test_a_lazy_name_loads_its_library(name, expected):
    """The check can fail: a name that needs a heavy library loads it when it is first used."""
    assert expected in loaded_by(f"import hf_amp; hf_amp.{name}")
