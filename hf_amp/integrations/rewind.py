"""Going back in a Trainer and in an Accelerate loop: which checkpoints are good, kept from rotation, and loaded while it trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from hf_amp.config import MixedPrecisionConfig
from hf_amp.errors import ConfigError
from hf_amp.integrations._compat import prepared_models
from hf_amp.monitoring.rewind import GOOD_FILE
from hf_amp.session import AmpSession

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

_KEPT = ".{}.kept"


class TrainerCheckpoints:
    """Lets the session know of every checkpoint that `trainer` writes, and keeps rotation from the good one.

    Private names of a Trainer, which it saves and resumes by, stand here; tests/contract fails by name if one goes.

    Args:
        trainer: whose `_save_checkpoint` is replaced until `detach`. It deletes all but its newest and its best, so that those to be
            kept have another name meanwhile.
        session: of its run.
        name: what its checkpoints call the callback, which keeps progress there.

    Attributes:
        random_state_of: the checkpoint whose random state is to be that of the next batch; None where none is.
    """

    def __init__(self, trainer: Trainer, session: AmpSession, name: str) -> None:
        self._trainer, self._session, self._name = trainer, session, name
        self.random_state_of: Path | None = None
        self._save = trainer._save_checkpoint
        session.patches.set_attribute(trainer, "_save_checkpoint", self.save)

    def begin(self, args: TrainingArguments, step: int) -> None:
        """Training begins after so many optimizer steps: looks which checkpoints are there.

        Raises:
            ConfigError: there will be none that `on_stalled="rewind"` could load.
        """
        strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
        for wrong, remedy in (
            (strategy == "no" and "save_strategy='no'", "save_strategy='steps'"),
            (args.save_only_model and "save_only_model=True", "save_only_model=False"),
            (self._session.is_sharded and "a sharded model", "on_stalled='stop'"),
        ):
            if wrong and self._session.config.on_stalled == "rewind":
                raise ConfigError(
                    f"on_stalled='rewind' with {wrong}: there is no checkpoint to go back to; set {remedy}."
                )
        self.random_state_of = None
        if args.output_dir:
            folder = Path(args.output_dir)
            for hidden in folder.glob(_KEPT.format("checkpoint-*")):  # a process was killed while it saved
                _put_back(folder / hidden.name[1 : -len(".kept")])
            self._session.rewinder.find(folder, step)

    def save(self, model: nn.Module, trial: Any = None, *args: Any, **kwargs: Any) -> None:
        """As `Trainer._save_checkpoint`."""
        trainer, rewinder = self._trainer, self._session.rewinder
        self._session.scaler.flush()  # on all ranks, which agree on what still waits: a Trainer asks one of them for our state
        folder, limit = Path(trainer._get_output_dir(trial)), trainer.args.save_total_limit or 0
        place = folder / f"checkpoint-{trainer.state.global_step}"
        (place / GOOD_FILE).unlink(missing_ok=True)  # of a run before
        rotates = limit > 0 and trainer.args.should_save
        kept = [each for each in rewinder.kept() if each.parent == folder and each != place] if rotates else []
        for each in kept:
            each.rename(each.with_name(_KEPT.format(each.name)))
        try:
            self._save(model, trial, *args, **kwargs)
        finally:
            for each in kept:
                _put_back(each)
        rewinder.written(place, trainer.state.global_step)
        if kept:
            _rotate(folder, limit, {place, Path(trainer.state.best_model_checkpoint or place), *kept})

    def act_on_fault(self, step: int) -> str:
        """What `on_stalled` says of a fault of the newest step, the `step`-th; why training is to stop, "" where it is not."""
        session, rewinder = self._session, self._session.rewinder
        fate, why = session.config.on_stalled, rewinder.fault
        if why and fate == "rewind" and session.go_back(self.load, step):
            return ""
        rewinder.fault = ""
        if session.stall.stalled:
            return "the run is stalled" if fate != "report" else ""
        return why if fate == "stop" else ""

    def load(self, folder: Path) -> None:
        """Makes model, optimizer, LR schedule, scaler, progress and random state what a checkpoint holds, as resuming does."""
        trainer = self._trainer
        trainer._load_from_checkpoint(str(folder))
        trainer._load_optimizer_and_scheduler(str(folder))
        trainer._load_scaler(str(folder))
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        if ours := state.get("stateful_callbacks", {}).get(self._name):
            self._session.load_progress(ours["attributes"]["progress"])
        self.random_state_of = folder
        trainer._load_rng_state(str(folder))

    def resume_random_state(self) -> None:
        """After `load`, when the next batch is fetched and not yet run: when a Trainer that resumes does it."""
        folder, self.random_state_of = self.random_state_of, None
        if folder is not None:
            self._trainer._load_rng_state(str(folder))


def refuse_what_cannot_go_back(accelerator: Accelerator, config: MixedPrecisionConfig) -> None:
    """Raises `ConfigError` where `on_stalled="rewind"` is asked for and would not work."""
    kind, sharded = accelerator.distributed_type, (DistributedType.FSDP, DistributedType.DEEPSPEED)
    what = kind.value if kind in sharded else "use_stateful_dataloader"
    if config.on_stalled == "rewind" and (kind in sharded or accelerator.dataloader_config.use_stateful_dataloader):
        raise ConfigError(f"on_stalled='rewind' with {what}: hf_amp cannot go back there; use on_stalled='stop'.")


def go_back_in_loop(accelerator: Accelerator, session: AmpSession) -> bool:
    """At the end of an optimizer's step, goes back to the newest good checkpoint of `save_state`; says whether it did."""
    gone_back = session.go_back(lambda folder: accelerator.load_state(str(folder)))
    for model in prepared_models(accelerator) if gone_back else ():
        model.zero_grad(set_to_none=True)  # other optimizers of this backward have nothing to apply
    return gone_back


def _put_back(place: Path) -> None:
    """Gives a checkpoint that was kept from rotation its name again."""
    with suppress(FileNotFoundError):  # another rank has done it
        if not place.exists():
            place.with_name(_KEPT.format(place.name)).rename(place)


def _rotate(folder: Path, limit: int, kept: Collection[Path]) -> None:
    """As transformers' `rotate_checkpoints`, which knows of one to keep."""
    from transformers.trainer_utils import sort_checkpoints  # not loaded by `attach`

    checkpoints = [Path(path) for path in sort_checkpoints(str(folder), use_mtime=True)]
    others = [path for path in checkpoints if path not in kept]
    for path in others[: max(0, len(checkpoints) - max(limit, len(checkpoints) - len(others)))]:
        shutil.rmtree(path, ignore_errors=True)
