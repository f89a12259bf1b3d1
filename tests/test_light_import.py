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


def test_a_session_is_loaded_where_one_is_named() -> None:
    """`import hf_amp` alone loads no session, which is most of the package; its names are there, and load what they need."""
    program = (
        "import sys, hf_amp; assert 'hf_amp.session' not in sys.modules; hf_amp.AmpSession; assert 'hf_amp.session' in sys.modules; "
        "assert all(hasattr(hf_amp, name) for name in hf_amp.__all__)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(hf_amp.__file__).parents[1], check=True)


BARE = """
import importlib.util
import sys

ABSENT = ("datasets", "structlog", "tensorboard", "sklearn", "matplotlib", "jinja2", "peft", "torchao")
is_absent = lambda name: name.partition(".")[0] in ABSENT

class Absent:
    def find_spec(self, name, path=None, target=None):
        if is_absent(name):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Absent())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if is_absent(name) else found(name, package)
import torch
from transformers import Trainer, TrainingArguments
from hf_amp import AdvancedGradScaler, AmpSession, MixedPrecisionCallback, attach

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).square().mean()}

rows = [{"x": torch.randn(4), "labels": torch.randn(1)} for _ in range(16)]
arguments = TrainingArguments(sys.argv[1], fp16=True, use_cpu=True, max_steps=3, report_to=[], save_strategy="no", disable_tqdm=True)
callback = MixedPrecisionCallback(init_scale=8.0)
Trainer(Model(), arguments, train_dataset=rows, callbacks=[callback]).train()
print(callback.session.metrics()["applied_steps"])
"""


def test_a_trainer_runs_on_a_bare_machine(tmp_path: Path) -> None:
    """PyTorch, transformers and accelerate alone: it trains, and says that it writes no log."""
    completed = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path)],
        cwd=Path(hf_amp.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert completed.stdout.splitlines()[-1] == "3"
    assert "no event log is written (structlog is not installed)" in completed.stderr
