"""What a Trainer logs and saves, with what it leaves out: our metrics, lost batches, JSON without bare NaN."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerState

from hf_amp.events import EventKind
from hf_amp.integrations.trackers import log_entry
from hf_amp.monitoring.metrics import LOG_PREFIX
from hf_amp.session import AmpSession
from hf_amp.statistics import snapshot


def tell_in_logs(trainer: Trainer, session: AmpSession) -> None:
    """Makes what `trainer` logs hold our metrics, so that `log_history` and every reporter get one entry.

    Training entries get the session's metrics and name what needed attention since the last one, evaluation entries the
    number of batches that their loss leaves out. A step that was skipped has no gradient norm, whatever the Trainer has
    made of it, and where no loss since the last entry was finite, their mean is NaN, not 0.
    """
    log = trainer.log
    lost_batches = _count_lost_batches(trainer, session)

    @functools.wraps(log)
    def log_with_metrics(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        training = {"loss", "learning_rate"} <= logs.keys()  # a compute_loss may log losses of its own
        if training and session.monitor.non_finite_loss_fraction == 1 and logs["loss"] == 0:
            logs["loss"] = math.nan
        ours = log_entry(session, logs, trainer.state.global_step) if training else {}
        for prefix in [p for p in lost_batches if f"{p}_runtime" in logs]:
            ours[f"{LOG_PREFIX}{prefix}_non_finite_batches"] = lost_batches.pop(prefix)
        entry = {**logs, **ours}
        if training and _newest_step_has_no_norm(session, entry):
            entry.pop("grad_norm", None)
        log(entry, *args, **kwargs)
        # The Trainer adds to what it is given, callbacks take away, and the user gets it back, less our figures.
        logs.clear()
        logs.update({name: value for name, value in entry.items() if name not in ours})
        if training:
            session.monitor.begin_window()
            forget_logged_loss(trainer)

    session.changes.set_attribute(trainer, "log", log_with_metrics)


def _newest_step_has_no_norm(session: AmpSession, entry: dict[str, float]) -> bool:
    newest = session.scaler.last_outcome
    skipped = newest is not None and not newest.applied and newest.attempt == session.scaler.decided_steps
    return skipped or not math.isfinite(entry.get("grad_norm", 0.0))


def _count_lost_batches(trainer: Trainer, session: AmpSession) -> dict[str, int]:
    """Counts evaluation batches without a finite loss; returns prefix → number for evaluations not yet logged.

    One host read, and with several processes one sum over them, an evaluation.
    """
    prediction_step, evaluation_loop = trainer.prediction_step, trainer.evaluation_loop
    lost_batches: dict[str, int] = {}
    flags: list[Tensor] = []

    @functools.wraps(prediction_step)
    def note_loss(*args: Any, **kwargs: Any) -> Any:
        result = prediction_step(*args, **kwargs)
        if isinstance(result[0], Tensor):
            seen = torch.stack(
                [~result[0].detach().isfinite().all(), result[0].new_ones((), dtype=torch.bool)]
            )
            flags[:] = [seen.int() + (flags[0] if flags else 0)]
        return result

    @functools.wraps(evaluation_loop)
    def count_and_tell(*args: Any, **kwargs: Any) -> Any:
        flags.clear()
        output = evaluation_loop(*args, **kwargs)
        if flags:
            lost, seen = trainer.accelerator.reduce(flags.pop(), "sum").unbind()
            count = snapshot.read({"lost": lost, "seen": seen})
            prefix = kwargs.get("metric_key_prefix", "eval")
            lost_batches[prefix] = int(count["lost"])
            _tell_of_evaluation(session, prefix, int(count["lost"]), int(count["seen"]))
        return output

    session.changes.set_attribute(trainer, "prediction_step", note_loss)
    session.changes.set_attribute(trainer, "evaluation_loop", count_and_tell)
    return lost_batches


def _tell_of_evaluation(session: AmpSession, prefix: str, lost: int, seen: int) -> None:
    session.monitor.eval_non_finite_batches = lost
    if not lost:
        return
    session.note(
        EventKind.EVALUATION_LOST_BATCHES,
        f"{lost} of {seen} batches had no finite loss, and {prefix}_loss is the mean of the others, if any: look at "
        "the data, or for activations beyond the range of the precision that was evaluated in.",
        eval_non_finite_batches=lost,
    )


def save_valid_json(state: TrainerState, session: AmpSession) -> None:
    """Makes `state.save_to_json` write null where it writes NaN or Infinity, which no JSON parser but Python's reads."""
    if "save_to_json" not in vars(state):
        save = functools.partial(_save_and_mend, state.save_to_json)
        session.changes.set_attribute(state, "save_to_json", save)


def _save_and_mend(save_to_json: Any, json_path: str) -> None:
    save_to_json(json_path)
    found: list[str] = []
    file = Path(json_path)
    content = json.loads(file.read_text(encoding="utf-8"), parse_constant=found.append)
    if found:
        mended = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
        file.write_text(mended, encoding="utf-8")


# ---- private names of transformers, each read in one place; tests/contract fails by name if one goes -------------------


def forget_logged_loss(trainer: Trainer) -> None:
    """Starts the Trainer's sum of losses anew after it was logged.

    It subtracts the sum from itself, so that with `logging_nan_inf_filter=False` one NaN stays for the rest of the run.
    """
    trainer._tr_loss.zero_()
