"""`import hf_amp` is light: the libraries that only a part of it needs are loaded by that part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import hf_amp

HEAVY = ["transformers", "accelerate", "datasets", "tensorboard", "structlog", "matplotlib", "torch._dynamo"]
STEPS = {
    "import": "import hf_amp",
    "scaler": "hf_amp.AdvancedGradScaler(hf_amp.MixedPrecisionConfig(), 'cpu')",
    "command line": "import hf_amp.cli",
    "attach": "hf_amp.attach",
    "callback": "hf_amp.MixedPrecisionCallback",
}


def test_a_library_is_loaded_by_the_part_that_needs_it() -> None:
    """Importing hf_amp, scaling with PyTorch alone, and the command line, so that `hf-amp --help` and completion answer at
    once, load no heavy library; a name that needs one loads it when it is first used, so that the check can fail."""
    loaded = f"[name for name in {HEAVY} if name in sys.modules]"
    steps = "\n".join(f"{step}\nloaded[{name!r}] = {loaded}" for name, step in STEPS.items())
    program = f"import json, sys\nloaded = {{}}\n{steps}\nprint(json.dumps(loaded))"
    completed = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(hf_amp.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    after = json.loads(completed.stdout)
    assert after["import"] == after["scaler"] == after["command line"] == []
    assert "accelerate" in after["attach"]
    assert "transformers" not in after["attach"]
    assert "transformers" in after["callback"]
