"""`MixedPrecisionCallback`: hf_amp on a stock `transformers.Trainer`."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_amp.config import MixedPrecisionConfig
from hf_amp.errors import AttachError, ConfigError
from hf_amp.events import AmpEvent, EventKind
from hf_amp.integrations.accelerate import attach
from hf_amp.monitoring.metrics import LOG_PREFIX
from hf_amp.monitoring.sinks.jsonl import FILE_NAME, JsonLinesSink
from hf_amp.monitoring.sinks.tensorboard import TensorBoardSink
from hf_amp.reversible import ReversibleChanges
from hf_amp.session import AmpSession

INCIDENT = "amp_incident"
"""Key of a log entry's words for what needed attention; apart from `amp/`, under which there are only numbers."""


class MixedPrecisionCallback(TrainerCallback):
    """Adaptive loss scaling, truthful skips and precision metrics for a stock `Trainer`.

    Pass it in `callbacks=[...]`, or to `trainer.add_callback`. It follows `fp16`, `bf16` or neither of
    `TrainingArguments`. Metrics go where the Trainer logs (`log_history`, TensorBoard, W&B and the others) with
    `amp/` before their names; events go to `amp_events.jsonl` in `output_dir`, one line each.

    Args:
        config: options, as a `MixedPrecisionConfig`, a mapping, or the path of a YAML or JSON file; None for the
            defaults.

    Attributes:
        session: the `AmpSession`; None until the Trainer is known.

    Raises:
        ConfigError: an option is wrong, or contradicts `TrainingArguments`.
        AttachError: something other than a Trainer calls it, or the Trainer runs what hf_amp does not support.
    """

    def __init__(self, config: MixedPrecisionConfig | dict[str, Any] | str | Path | None = None) -> None:
        self.config = _as_config(config)
        self.session: AmpSession | None = None
        self._trainer: Trainer | None = None
        self._accelerator: Accelerator | None = None
        self._sink: JsonLinesSink | None = None
        self._tensorboard: list[Callable[[AmpEvent], None]] = []

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._attach_to(calling_trainer(self))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = calling_trainer(self)
        session = self._attach_to(trainer)
        session.begin_at(state.global_step)
        session.pace.pause()
        session.pace.samples_per_step = (
            args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        if self.config.fold_clipping is None:
            session.folds_clipping = not _others_look_at_gradients(trainer, self)
        if state.is_world_process_zero and self._sink is None:
            self._sink = JsonLinesSink(Path(args.output_dir or ".") / FILE_NAME, session.run_id, rank=0)
            session.sinks.append(self._sink.write)
            self._tensorboard = _tensorboard_sinks(trainer)
            session.sinks += self._tensorboard
        session.note(
            EventKind.TRAINING_STARTED,
            f"training starts: {session.what_runs()}.",
            precision=session.plan.default.value,
            config=self.config.to_dict(),
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.session is None:
            return
        self.session.scaler.flush()
        figures = self.session.metrics()
        self.session.note(
            EventKind.TRAINING_ENDED,
            f"training ends: {figures.get('applied_steps', 0):g} steps applied, "
            f"{figures.get('skipped_steps', 0):g} skipped.",
            **figures,
        )
        self._close_sink(self.session)

    def _close_sink(self, session: AmpSession) -> None:
        if self._sink is not None:
            for write in (self._sink.write, *self._tensorboard):
                session.sinks.remove(write)
            self._sink.close()
            self._sink = None

    def _attach_to(self, trainer: Trainer) -> AmpSession:
        """The session for this Trainer and its accelerator, which a hyperparameter search replaces between trials."""
        accelerator = trainer.accelerator
        if self.session is not None:
            if self._trainer is trainer and self._accelerator is accelerator:
                return self.session
            self.session.detach()
            self._close_sink(self.session)
        self.session = session = attach(accelerator, self.config)
        self._trainer, self._accelerator = trainer, accelerator
        _merge_metrics_into_logs(trainer, session, session.changes)
        return session


def _tensorboard_sinks(trainer: Trainer) -> list[Callable[[AmpEvent], None]]:
    """A sink for the writer of the Trainer's own TensorBoard callback, where it has one."""
    writers = (getattr(callback, "tb_writer", None) for callback in trainer.callback_handler.callbacks)
    return [TensorBoardSink(writer, "train/").write for writer in writers if writer is not None]


def _others_look_at_gradients(trainer: Trainer, ours: TrainerCallback) -> bool:
    """Whether a callback listens between clipping and the optimizer step, where folded gradients are still scaled."""
    silent = TrainerCallback.on_pre_optimizer_step
    return any(
        type(callback).on_pre_optimizer_step is not silent
        for callback in trainer.callback_handler.callbacks
        if callback is not ours
    )


def _as_config(config: Any) -> MixedPrecisionConfig:
    if config is None:
        return MixedPrecisionConfig()
    if isinstance(config, MixedPrecisionConfig):
        return config
    if isinstance(config, dict):
        return MixedPrecisionConfig.from_dict(config)
    if isinstance(config, (str, Path)):
        return MixedPrecisionConfig.from_file(config)
    raise ConfigError(
        f"MixedPrecisionCallback(config={config!r}): pass a MixedPrecisionConfig, a dict of its options, or the path "
        "of a YAML or JSON file; leave it out for the defaults."
    )


def calling_trainer(callback: TrainerCallback) -> Trainer:
    """The Trainer whose event `callback` is answering: events carry no Trainer, so it is looked up in the call stack.

    Raises:
        AttachError: none is there.
    """
    frame = inspect.currentframe()
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and callback in candidate.callback_handler.callbacks:
            return candidate
        frame = frame.f_back
    raise AttachError(
        "MixedPrecisionCallback was not called by a transformers.Trainer that holds it: pass it in "
        "Trainer(callbacks=[...]) or to trainer.add_callback. In a loop of your own use hf_amp.attach(accelerator)."
    )


def _merge_metrics_into_logs(trainer: Trainer, session: AmpSession, changes: ReversibleChanges) -> None:
    """Makes `trainer.log` add our metrics to training logs, so that `log_history` and every reporter get one entry.

    What needed attention since the last entry is named in words. A skipped step has no gradient norm: what the Trainer made of it (nan or inf) is left out, which also keeps
    `trainer_state.json` valid JSON.
    """
    log = trainer.log

    @functools.wraps(log)
    def log_with_metrics(logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            if not math.isfinite(logs.get("grad_norm", 0.0)):
                del logs["grad_norm"]
            for name, value in session.metrics().items():
                logs[LOG_PREFIX + name] = value
            incidents = session.unlogged_incidents()
            if incidents:
                logs[INCIDENT] = incidents
            beside = {name: logs[name] for name in ("loss", "learning_rate") if name in logs}
            session.log_metrics(trainer.state.global_step, **beside)
        log(logs, *args, **kwargs)

    changes.set_attribute(trainer, "log", log_with_metrics)
