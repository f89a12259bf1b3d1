"""One run in many processes, each killed by SIGKILL somewhere and the next going on from what it has saved.

Run as a program it is the parent: it has everything imported, and forks a process for every life of the run. A life ends
at a random time, or at a random operation on the checkpoint's files.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_amp import MixedPrecisionCallback
from tests.integrations.checkpointed_run import begin
from tests.integrations.trainers import OverflowAt, regression_trainer
from tests.reference import TIMINGS, snapshot

SAVED_EVERY = 3
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
OPTIONS = {
    "automatic": {"scaling_strategy": "ADAPTIVE"},
    "same folder": {"scaling_strategy": "DYNAMIC", "growth_interval": 3, "recovery_steps": 5},
}
"""How `save_state` names its checkpoints → options of that run."""
RUNS = (*OPTIONS, "Trainer")


def live(folder: Path, kind: str, steps: int, saves: bool = True, mortal: bool = False) -> Any:
    """The run, from its newest checkpoint to its end; all that it came to, but for what a clock has measured.

    Args:
        steps: of a whole run; a Trainer takes half as many.
        mortal: it is to be killed before its end, because a Trainer that goes on from its last step takes one more.
    """
    if kind != "Trainer":
        return live_in_a_loop(folder, kind, steps, saves)
    return live_in_a_trainer(folder, steps // 2, saves, *([DiesInItsLastStep()] if mortal else []))


def live_in_a_loop(folder: Path, naming: str, steps: int, saves: bool) -> Any:
    automatic = naming == "automatic"
    run = begin(folder=str(folder) if automatic else None, **OPTIONS[naming])
    run.period = 20
    checkpoints = sorted((folder / "checkpoints").glob("*"), key=lambda p: int(p.name.split("_")[1]))
    if automatic and checkpoints:
        run.accelerator.load_state()
        run.accelerator.project_configuration.iteration = int(checkpoints[-1].name.split("_")[1]) + 1
    elif not automatic and (folder / "saved").is_dir():
        run.accelerator.load_state(str(folder / "saved"))
    assert run.session is not None
    for step in range(run.session.scaler.decided_steps, steps):
        run.train(step, step + 1)
        if saves and step % SAVED_EVERY == 0:
            run.accelerator.save_state(None if automatic else str(folder / "saved"))
    return run.everything()


class DiesInItsLastStep(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == args.max_steps - 1:
            die()


def live_in_a_trainer(folder: Path, steps: int, saves: bool, *callbacks: TrainerCallback) -> Any:
    callback = MixedPrecisionCallback({"growth_interval": 3})
    trainer = regression_trainer(
        folder, callback, *callbacks, OverflowAt(*range(2, steps, 7)), fp16=True, max_steps=steps,
        save_strategy="steps" if saves else "no", save_steps=SAVED_EVERY,
    )  # fmt: skip
    whole = [path for path in folder.glob("checkpoint-*") if is_whole(path)]
    newest = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    assert callback.session is not None
    state = callback.state()
    del state["attributes"]["progress"]["stateful"]["throughput"]
    figures = {name: v for name, v in callback.session.metrics().items() if name not in TIMINGS}
    return snapshot(trainer.model, trainer.optimizer), (state, figures)


def is_whole(checkpoint: Path) -> bool:
    """Whether a Trainer, which writes `trainer_state.json` last and in its place, was through with it."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def dies_within_a_save(root: Path) -> bool:
    return any(root.rglob("*complete")) or not all(map(is_whole, root.rglob("checkpoint-*")))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def live_until_a_file(folder: Path, kind: str, steps: int, number: int) -> None:
    """Lives up to the `number`th operation on the checkpoint's files; at the latest to the end."""
    seen = itertools.count(1)

    def hook(event: str, arguments: Any) -> None:
        if event in FILE_EVENTS and str(folder) in str(arguments[0]) and next(seen) == number:
            die()

    sys.addaudithook(hook)
    live(folder, kind, steps, mortal=True)
    die()


def live_until_killed(folder: Path, kind: str, steps: int) -> None:
    live(folder, kind, steps, mortal=True)
    signal.pause()


def forked(life: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> int:
    """How a process ended that did `life`, killed after that many seconds where it did not end before."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            life(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_and_unbroken(root: Path, kind: str, kills: int, steps: int) -> dict[str, Any]:
    """How the lives ended, how many of them within a save, and how the last one did and a run without a break.

    Both leave all that they came to in a file of their name.
    """
    chance, run = random.Random(kind), root / "killed"
    run.mkdir(parents=True)
    endings, within_a_save = [], 0
    for number in range(kills):
        if number % 2:
            endings.append(forked(live_until_a_file, run, kind, steps, chance.randint(1, 60)))
        else:
            endings.append(forked(live_until_killed, run, kind, steps, seconds=chance.uniform(0.02, 0.2)))
        within_a_save += dies_within_a_save(root)

    def keep(place: Path, saves: bool) -> None:
        torch.save(live(place, kind, steps, saves), f"{place}.pt")

    ended = [forked(keep, run, True), forked(keep, root / "unbroken", False)]
    return {"endings": endings, "within a save": within_a_save, "ended": ended}


def main(folder: str, kills: int, steps: int) -> None:
    torch.set_num_threads(1)
    print(json.dumps({kind: killed_and_unbroken(Path(folder) / kind, kind, kills, steps) for kind in RUNS}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
