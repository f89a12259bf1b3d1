"""Plays somebody who has just cloned the repository: `python -m tests.newcomer`, a few minutes, needs a package index.

Runs README's install line in an empty environment, in a copy of the checkout, takes every next step that the demo prints, reads
what it opens, and looks in README for the words of what people ask first. Ends at what does not work.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
QUESTIONS = {
    "Can I use it with LoRA, QLoRA, TRL?": ("LoRA", "QLoRA", "TRL"),
    "Can I compile the model, and checkpoint activations?": ("torch.compile", "gradient checkpointing"),
    "Can I use several GPUs?": ("accelerate launch", "DDP", "FSDP2", "DeepSpeed"),
    "Does it run on my device?": ("CUDA", "ROCm", "MPS", "CPU"),
    "Does it help in BF16?": ("BF16",),
    "Can I use it without Trainer and Accelerate?": ("AmpSession.for_model",),
    "Can I replace torch.amp.GradScaler by it?": ("AdvancedGradScaler", "torch.amp.GradScaler"),
    "How do I pass options?": ("keywords", "YAML", "OPTIONS.md"),
    "A step was skipped: is that bad?": ("A step was skipped", "nothing: the scale is being found"),
    "How do I stop a run that learns nothing?": ("on_stalled",),
    "Can I forbid it to change the precision?": ("automatic_fallback=False",),
    "Can I resume in another precision?": ("resume", "any precision"),
    "Will my model overflow?": ("preflight",),
    "Which precision should I use?": ("hf-amp choose",),
    "Where do two runs part?": ("hf-amp diff",),
    "Can I change the precision during a run?": ("precision_schedule",),
    "Where do I see it?": ("TensorBoard", "W&B", "hf-amp report", "hf-amp watch"),
    "What does it cost?": ("Measured", "scaler_cost"),
}
"""What people ask first → words that README answers it with."""


def unanswered() -> list[str]:
    """Questions for whose words a search in README finds nothing."""
    text = README.read_text(encoding="utf-8").lower()
    return [question for question, words in QUESTIONS.items() if not all(word.lower() in text for word in words)]


def install_line() -> str:
    """README's first command."""
    block = README.read_text(encoding="utf-8").split("```sh ci\n")[1].split("```")[0]
    return block.splitlines()[0]


def next_steps(shown: str) -> list[str]:
    """The commands that the demo prints under "To see more", joined where a terminal has broken them."""
    return [line.strip() for line in shown.split("To see more:\n")[1].splitlines() if line.startswith("  ")]


def take(step: str, folder: Path, binaries: Path) -> str:
    """What a printed command gives, run with the programs in `binaries`: its output, the page it has written, or what it serves."""
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    if step.startswith("tensorboard"):
        command = ["bash", "-c", f"exec {step} --port 6123"]
        server = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL)
        try:
            for _ in range(60):
                time.sleep(1)
                try:
                    return urllib.request.urlopen("http://127.0.0.1:6123/data/plugin/scalars/tags").read().decode()
                except OSError:
                    continue
            raise RuntimeError(f"{step}: nothing was served")
        finally:
            server.kill()
    command = ["bash", "-c", step]
    shown = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    pages = [folder / line for line in shown.splitlines() if line.endswith(".html")]
    return shown + "".join(page.read_text(encoding="utf-8") for page in pages)


EXPECTED = {
    "hf-amp report": "mixed-precision report",
    "tensorboard": "amp/scale",
    "cat": "training_ended",
    "python": "GPT2",
}
"""How a printed command begins → what is to be seen."""


def main() -> None:
    """Does all of it."""
    assert not unanswered(), unanswered()
    with tempfile.TemporaryDirectory() as empty:
        clone = Path(empty) / "hf_amp"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        subprocess.run([sys.executable, "-m", "venv", f"{empty}/venv"], check=True)
        binaries = Path(empty) / "venv" / "bin"
        shown = take(install_line(), clone, binaries)
        assert "What was seen: " in shown
        steps = next_steps(shown)
        assert len(steps) == len(EXPECTED), steps
        for step in steps:
            words = next(words for beginning, words in EXPECTED.items() if step.startswith(beginning))
            assert words in take(step, clone, binaries), step
            print(f"{step}: as expected")
    print("all of it works")


if __name__ == "__main__":
    main()
