"""`MixedPrecisionCallback`: hf_amp on a stock `transformers.Trainer`."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from hf_amp.config import MixedPrecisionConfig, is_real
from hf_amp.errors import AttachError
from hf_amp.events import LOG_FILE, Cause, EventKind, counted_names
from hf_amp.integrations._compat import forget_skip
from hf_amp.integrations.accelerate import attach, session_of
from hf_amp.integrations.rewind import TrainerCheckpoints
from hf_amp.integrations.trackers import log_entry
from hf_amp.monitoring.metrics import INCIDENT, LOG_PREFIX, in_brief
from hf_amp.patch_log import PatchLog
from hf_amp.session import AmpSession, counted
from hf_amp.statistics import to_host

if TYPE_CHECKING:
    from hf_amp.monitoring.sinks.jsonl import JsonLinesSink

_CALLBACK = "_hf_amp_callback"
_log = logging.getLogger("hf_amp")


class MixedPrecisionCallback(TrainerCallback, ExportableState):
    """Loss scaling, truthful skips, fallback and precision metrics for a stock `Trainer`.

    Pass it in `callbacks=[...]`, or to `trainer.add_callback`. It follows `fp16`, `bf16` or neither of
    `TrainingArguments`. Metrics go where the Trainer logs (`log_history`, TensorBoard, W&B and the others) with
    `amp/` before their names; events go to `amp_events.jsonl` in `output_dir`, one line each.

    Args:
        config: options, as a `MixedPrecisionConfig`, a mapping, or the path of a YAML or JSON file; None for the
            defaults.
        trainer: a Trainer that exists already: the callback is added to it and attached at once. None where it is passed in
            `callbacks=[...]` or to `add_callback`.
        options: options as keywords, in place of a config.

    Attributes:
        session: the `AmpSession`; None until the Trainer is known. It stays attached until `session.detach()`, also after
            `trainer.remove_callback`, which a Trainer reports to nobody.

    Raises:
        ConfigError: an option is wrong, or contradicts `TrainingArguments`.
        AttachError: something other than a Trainer calls it, or the Trainer runs what hf_amp does not support.
    """

    def __init__(
        self,
        config: MixedPrecisionConfig | dict[str, Any] | str | Path | None = None,
        *,
        trainer: Trainer | None = None,
        **options: Any,
    ) -> None:
        self.config = MixedPrecisionConfig.from_any(config, options, type(self).__name__)
        self.session: AmpSession | None = None
        self._trainer: Trainer | None = None
        self._checkpoints: TrainerCheckpoints | None = None
        self._accelerator: Accelerator | None = None
        self._sink: JsonLinesSink | None = None
        self._is_copied = False
        if trainer is not None:
            trainer.add_callback(self)
            self._attach_to(trainer)
            self._save_valid_json(trainer.state)

    def __getstate__(self) -> dict[str, Any]:
        """A copied Trainer has a copy of its callback, which makes a session of its own when that Trainer trains."""
        self._is_copied = True
        return {
            **vars(self),
            "session": None,
            "_trainer": None,
            "_accelerator": None,
            "_sink": None,
            "_checkpoints": None,
        }

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._attach_to(calling_trainer(self))
        self._save_valid_json(state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = calling_trainer(self)
        session = self._attach_to(trainer)
        session.scaler.abandon_step()
        self._save_valid_json(state)
        # Where it has no entry of ours, saving fails with a KeyError.
        session.total_steps = self.config.total_steps or state.max_steps
        saved = cast(Any, state.stateful_callbacks).setdefault(type(self).__name__, self.state())
        precision_before = session.load_progress(saved["attributes"]["progress"] if state.global_step else {})
        session.begin_at(state.global_step)
        if self._checkpoints is not None:
            self._checkpoints.begin(args, state.global_step)
        session.throughput.pause()
        session.throughput.samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if self.config.fold_clipping is None:
            # Somebody who listens between clipping and the optimizer step would find gradients that are still scaled.
            others = (type(each) for each in trainer.callback_handler.callbacks if each is not self)
            silent = TrainerCallback.on_pre_optimizer_step
            session.folds_clipping = all(other.on_pre_optimizer_step is silent for other in others)
        begins = f"resumes after step {state.global_step}" if state.global_step else "starts"
        former = f"; it was {precision_before} before" if precision_before != session.requested_mode.value else ""
        message = f"training {begins}: {session.describe()}{former}."
        begin: Callable[..., None] = functools.partial(session.note, EventKind.TRAINING_STARTED)
        if state.is_world_process_zero and self._sink is None:
            try:
                from hf_amp.monitoring.sinks.jsonl import JsonLinesSink  # loads structlog

                self._sink = JsonLinesSink(Path(args.output_dir or ".") / LOG_FILE, session.run_id, rank=0)
                begin = functools.partial(session.begin_log, self._sink.write)
            except (OSError, ImportError) as error:  # a Trainer that saves nothing need not be able to write
                _log.warning("no event log is written (%s); hf-amp report and watch will not know this run", error)
        begin(message, **session.run_metadata(), settings=settings_of(args, state, kwargs["optimizer"]))
        session.begin_run(self._sink.path if self._sink else None)
        if isinstance(trainer.model_wrapped, nn.DataParallel) or args.n_gpu > 1:
            session.note(EventKind.SETUP, _DATA_PARALLEL)
        non_finite = session.non_finite_parameters(on_any_rank=True)
        if non_finite:
            reason = f"before the first step, inf or NaN is in {counted_names(non_finite)}"
            session.record(session.stall.mark_stalled(session.newest_step, Cause.WEIGHTS, reason))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.session is None and self._trainer is None:
            self._trainer = calling_trainer(self)
            _log.warning("MixedPrecisionCallback was added while training runs, and begins with the next train()")
        self.on_epoch_begin()
        # A Trainer calls no `step` in micro-steps, in which a prepared optimizer would take back what it last said.
        if self.config.enabled and isinstance(kwargs["optimizer"], AcceleratedOptimizer):
            forget_skip(kwargs["optimizer"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        session = self.session
        if self._checkpoints is not None and session is not None and (session.rewinder.fault or session.stall.stalled):
            self._stop(session, args, control, self._checkpoints.act_on_fault(state.global_step))
        # One with non-finite weights or buffers would rotate a good one out, and be resumed from.
        if control.should_save and self._are_weights_bad("this checkpoint is not written"):
            control.should_save = False
        return control

    on_epoch_end = on_step_end

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        if self._checkpoints is not None and self._checkpoints.random_state_of is not None:
            self._checkpoints.resume_random_state()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # `save_strategy="best"` decides after this, and what a broken model scores can be the best so far.
        metrics: dict[str, float] = kwargs.get("metrics") or {}
        best = f"eval_{(args.metric_for_best_model or '').removeprefix('eval_')}"
        in_training = self._trainer is not None and self._trainer.is_in_train
        if in_training and best in metrics and self._are_weights_bad(f"{best} counts as NaN"):
            metrics[best] = math.nan

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (session := self.session) is None:
            return
        session.end_run()
        self._leave_run(session)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, fit for JSON: its options, and the progress that `on_train_begin` goes on from.

        It is also the first that a callback added after construction hears of its Trainer in `train()`: it attaches,
        so that the Trainer can load a checkpoint of any precision.
        """
        trainer = find_calling_trainer(self)
        if trainer is not None and getattr(trainer, "is_in_train", False):
            self._attach_to(trainer)
        progress = {} if self.session is None else self.session.progress()
        return {"args": {"config": self.config.to_dict()}, "attributes": {"progress": progress}}

    def _stop(self, session: AmpSession, args: TrainingArguments, control: TrainerControl, why: str) -> None:
        if control.should_training_stop or not why:
            return
        control.should_training_stop = True
        folder = args.output_dir or "."
        newest = get_last_checkpoint(folder) if Path(folder).is_dir() else None  # type: ignore[no-untyped-call]
        checkpoint = session.rewinder.good.place if session.rewinder.good else newest
        session.note(
            EventKind.TRAINING_STOPPED,
            f"{why} and on_stalled is '{self.config.on_stalled}'; "
            + (f"the last good checkpoint is {checkpoint}." if checkpoint else "there is no checkpoint."),
        )

    def _are_weights_bad(self, so: str) -> bool:
        """Whether a parameter or buffer is not finite, in which case what follows is reported. GPU-CPU syncs."""
        session = self.session
        non_finite = session.non_finite_parameters(on_any_rank=True, saved_buffers=True) if session is not None else []
        if session is None or not non_finite:
            return False
        which = f"inf or NaN is in {counted_names(non_finite, 'tensor')} of the model"
        session.note(EventKind.CHECKPOINT_WITHHELD, f"{which}: {so}, so that the last good checkpoint stays.")
        return True

    def _attach_to(self, trainer: Trainer) -> AmpSession:
        """The session for this Trainer and its accelerator, which a hyperparameter search replaces between trials."""
        self._take_over(trainer)
        accelerator = trainer.accelerator
        if self.session is not None:
            same = self._trainer is trainer and self._accelerator is accelerator
            if same and (session_of(accelerator) is self.session or not self.config.enabled):
                return self.session
            self.session.detach()
            self._leave_run(self.session)
        elif getattr(trainer, _CALLBACK, None) is not None:
            raise AttachError("this Trainer has two MixedPrecisionCallbacks: leave one of them out.")
        if self._is_copied and (other := session_of(accelerator)):
            other.detach()  # deep copies of a Trainer have one Accelerator, and train in turn
        self.session = session = attach(accelerator, self.config)
        self._trainer, self._accelerator = trainer, accelerator
        session.patches.set_attribute(trainer, _CALLBACK, self)
        session.on_fault = None  # `on_step_end` goes back
        if self.config.enabled:
            patch_logging(trainer, session)
            session.on_trial(functools.partial(retry_for_want_of_memory, trainer, session))
            load_scaler_where_there_is_one(trainer, session)
            keep_state_without_scaler(trainer, session)
            self._checkpoints = TrainerCheckpoints(trainer, session, type(self).__name__)
        return session

    def _take_over(self, trainer: Trainer) -> None:
        """Goes on with the session of a callback that the Trainer has replaced by this one, as it does on resuming."""
        former = getattr(trainer, _CALLBACK, None)
        if self.session is None and former is not None and former not in trainer.callback_handler.callbacks:
            self.config = former.config
            self.session, self._trainer, self._accelerator = former.session, trainer, former._accelerator
            self._sink, self._checkpoints = former._sink, former._checkpoints
            former.session.patches.set_attribute(trainer, _CALLBACK, self)

    def _save_valid_json(self, state: TrainerState) -> None:
        """Makes `state.save_to_json` write null for NaN and Infinity, which no JSON parser but Python's reads."""
        if self.session is not None and self.config.enabled and "save_to_json" not in vars(state):
            save = functools.partial(_save_as_json, state.save_to_json)
            self.session.patches.set_attribute(state, "save_to_json", save)

    def _leave_run(self, session: AmpSession) -> None:
        if self._sink is not None:
            session.end_log(self._sink.write)
            self._sink.close()
            self._sink = None


_DATA_PARALLEL = (
    "this Trainer runs nn.DataParallel, which it does not pass through accelerator.prepare: hf_amp scales and skips, but repeats no "
    "forward pass to find a cause, and puts no module in FP32. Start it with torchrun or accelerate launch for that, or let it see one GPU."
)


def calling_trainer(callback: TrainerCallback) -> Trainer:
    """The Trainer whose event `callback` is answering.

    Raises:
        AttachError: none is there.
    """
    trainer = find_calling_trainer(callback)
    if trainer is None:
        raise AttachError(
            "MixedPrecisionCallback was not called by a transformers.Trainer that holds it: pass it in "
            "Trainer(callbacks=[...]) or to trainer.add_callback. In a loop of your own use hf_amp.attach(accelerator)."
        )
    return trainer


def find_calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """The same, or None: events carry no Trainer, so it is looked up in the call stack."""
    frame = inspect.currentframe()
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and callback in candidate.callback_handler.callbacks:
            return candidate
        frame = frame.f_back
    return None


def settings_of(args: TrainingArguments, state: TrainerState, optimizer: Any) -> dict[str, Any]:
    """What people ask first of a Trainer's run; of the optimizer itself, which may have been handed to the Trainer."""
    rows, parts, ranks = args.train_batch_size, args.gradient_accumulation_steps, args.world_size
    rates = sorted({float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups})
    inner = getattr(optimizer, "optimizer", optimizer)  # DeepSpeed's has no defaults
    kind = type(inner).__name__ + ", fused" * bool(getattr(inner, "defaults", {}).get("fused"))
    rate, schedule = " to ".join(f"{rate:g}" for rate in dict.fromkeys([rates[0], rates[-1]])), args.lr_scheduler_type
    return {
        "batch": f"{rows * parts * ranks:,} rows a step: {rows} by {counted(parts, 'micro-batch', 'es')} by {counted(ranks, 'process', 'es')}",
        "optimizer": f"{kind}, learning rate {rate}, {getattr(schedule, 'value', schedule)} schedule",
        "steps planned": state.max_steps,
    }


def load_scaler_where_there_is_one(trainer: Trainer, session: AmpSession) -> None:
    """Lets a run without loss scaling leave a checkpoint's loss scale alone, which Trainer loads into nothing."""
    load_scaler = trainer._load_scaler  # private; tests/contract fails by name if it goes

    @functools.wraps(load_scaler)
    def load_or_leave(checkpoint: str | None) -> None:
        if trainer.accelerator.scaler is not None:
            load_scaler(checkpoint)

    session.patches.set_attribute(trainer, "_load_scaler", load_or_leave)


def keep_state_without_scaler(trainer: Trainer, session: AmpSession) -> None:
    """Lets an optimizer of shards be saved and loaded, which steps it on gradients of zero (accelerate#4289), outside of our count."""
    for name in ("_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler"):
        keep = getattr(trainer, name)  # private; tests/contract fails by name if one goes

        def without_scaler(*args: Any, keep: Callable[..., Any] = keep, **kwargs: Any) -> Any:
            with session.without_scaler():
                return keep(*args, **kwargs)

        session.patches.set_attribute(trainer, name, functools.wraps(keep)(without_scaler))


def patch_logging(trainer: Trainer, session: AmpSession) -> None:
    """Makes what `trainer` logs hold our metrics, so that `log_history` and every reporter get one entry.

    Training entries get six of the session's metrics at most, or all with `log_all_metrics`, and name what needed attention
    since the last one, evaluation entries the number of batches that their loss leaves out; reporters get all. A step that was skipped has no gradient norm, whatever the Trainer has
    made of it, and where no loss since the last entry was finite, their mean is NaN, not 0.
    """
    log = trainer.log
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "MLflowCallback":  # which warns of text
            session.patches.set_attribute(callback, "on_log", functools.partial(_log_numbers, callback.on_log))
    lost_batches = _count_lost_batches(trainer, session)

    @functools.wraps(log)
    def log_with_metrics(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        training = {"loss", "learning_rate"} <= logs.keys()  # a compute_loss may log losses of its own
        if training and session.monitor.non_finite_loss_fraction == 1 and logs["loss"] == 0:
            logs["loss"] = math.nan
        ours = log_entry(session, logs, trainer.state.global_step) if training else {}
        figures = {name: value for name, value in ours.items() if name != INCIDENT}
        if training and not session.config.log_all_metrics:
            named = {name.removeprefix(LOG_PREFIX): value for name, value in figures.items()}
            if session.scaler.no_scaling:
                named.pop("scale", None)
            brief = in_brief(named)
            ours = {name: value for name, value in ours.items() if name.removeprefix(LOG_PREFIX) in {*brief, INCIDENT}}
        rest = {name: value for name, value in figures.items() if name not in ours}
        evaluated = {name: value for name, value in logs.items() if name.startswith("eval_") and is_real(value)}
        if evaluated:
            session.record_metrics(trainer.state.global_step, evaluated)
        for prefix in [p for p in lost_batches if f"{p}_runtime" in logs]:
            ours[f"{LOG_PREFIX}{prefix}_non_finite_batches"] = lost_batches.pop(prefix)
        entry = {**logs, **ours}
        newest = session.scaler.last_outcome
        skipped = newest is not None and not newest.applied and newest.attempt == session.scaler.decided_steps
        if training and (skipped or not math.isfinite(entry.get("grad_norm", 0.0))):
            entry.pop("grad_norm", None)
        log(entry, *args, **kwargs)
        for callback in trainer.callback_handler.callbacks if rest else ():
            # Those that write to TensorBoard, W&B and others.
            if any(base.__module__.startswith("transformers.integrations.") for base in type(callback).__mro__):
                callback.on_log(trainer.args, trainer.state, trainer.control, model=trainer.model, logs=dict(rest))
        # The Trainer adds to what it is given, callbacks take away, and the user gets it back, less our figures.
        logs.clear()
        logs.update({name: value for name, value in entry.items() if name not in ours})
        if training:
            session.monitor.begin_window()
            # It subtracts the sum from itself, so that with `logging_nan_inf_filter=False` one NaN would stay for good.
            trainer._tr_loss.zero_()  # private; tests/contract fails by name if it goes

    session.patches.set_attribute(trainer, "log", log_with_metrics)


def retry_for_want_of_memory(trainer: Trainer, session: AmpSession, log: PatchLog) -> None:
    """Has the next batch trained again under the former plan where its backward finds no memory.

    Where it is the first of its step: gradients of others, to which backward may have added in part, would be lost.
    """
    training_step = trainer.training_step

    @functools.wraps(training_step)
    def step(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        is_first = all(p.grad is None for p in model.parameters())
        try:
            return training_step(model, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            if not is_first or not session.recover(error):
                raise
        return training_step(model, *args, **kwargs)  # outside of the handler, which holds what has filled the memory

    log.set_attribute(trainer, "training_step", step)


def _log_numbers(on_log: Callable[..., None], *args: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
    on_log(*args, logs={name: value for name, value in logs.items() if name != INCIDENT}, **kwargs)


def _count_lost_batches(trainer: Trainer, session: AmpSession) -> dict[str, int]:
    """Counts evaluation batches without a finite loss; returns prefix → number for evaluations not yet logged.

    One GPU-CPU sync, and with several processes one sum over them, an evaluation.
    """
    prediction_step, evaluation_loop = trainer.prediction_step, trainer.evaluation_loop
    lost_batches: dict[str, int] = {}
    flags: list[Tensor] = []

    @functools.wraps(prediction_step)
    def note_loss(*args: Any, **kwargs: Any) -> Any:
        result = prediction_step(*args, **kwargs)
        if isinstance(result[0], Tensor):
            seen = torch.stack([~result[0].detach().isfinite().all(), result[0].new_ones((), dtype=torch.bool)])
            flags[:] = [seen.int() + (flags[0] if flags else 0)]
        return result

    @functools.wraps(evaluation_loop)
    def count_and_tell(*args: Any, **kwargs: Any) -> Any:
        flags.clear()
        output = evaluation_loop(*args, **kwargs)
        if flags:
            lost, seen = trainer.accelerator.reduce(flags.pop(), "sum").unbind()
            count = to_host({"lost": lost, "seen": seen})
            prefix = kwargs.get("metric_key_prefix", "eval")
            lost_batches[prefix] = int(count["lost"])
            loss = (output.metrics or {}).get(f"{prefix}_loss", math.nan)
            _report_evaluation(session, prefix, int(count["lost"]), int(count["seen"]), loss)
        return output

    session.patches.set_attribute(trainer, "prediction_step", note_loss)
    session.patches.set_attribute(trainer, "evaluation_loop", count_and_tell)
    return lost_batches


def _report_evaluation(session: AmpSession, prefix: str, lost: int, seen: int, loss: float) -> None:
    session.monitor.eval_non_finite_batches = lost
    if not lost:
        return
    # transformers leaves them out from 5.23 on.
    what = "the mean of the others" if math.isfinite(loss) else f"{loss:g} for that"
    session.note(
        EventKind.EVALUATION_LOST_BATCHES,
        f"{lost} of {seen} batches had no finite loss, and {prefix}_loss is {what}: look at the data, or "
        "for activations beyond the range of the precision that was evaluated in.",
        eval_non_finite_batches=lost,
    )


def _save_as_json(save_to_json: Any, json_path: str) -> None:
    save_to_json(json_path)
    found: list[str] = []
    file = Path(json_path)
    content = json.loads(file.read_text(encoding="utf-8"), parse_constant=found.append)
    if found:
        file.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
