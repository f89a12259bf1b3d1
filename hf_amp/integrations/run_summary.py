"""What became of a training run, in one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hf_amp.monitoring.sinks import console
from hf_amp.session import AmpSession


def sentence(session: AmpSession) -> str:
    """Steps applied and skipped by cause, changes of precision, final scale, time in each precision."""
    if not session.config.enabled:
        return "hf_amp, which the config disables, counted nothing"
    figures = session.metrics()
    causes = _named(figures, "skipped_steps_", "")
    times = _named(figures, "", "_seconds")
    times.pop("STEP", None)
    applied, changes, modules = (
        figures[name] for name in ("applied_steps", "transitions", "modules_in_fp32")
    )
    parts = [
        f"{applied:g} step{'' if applied == 1 else 's'} applied",
        f"{figures['skipped_steps']:g} skipped"
        + _in_brackets(f"{n:g} {cause}" for cause, n in causes.items()),
        f"{changes:g} change{'' if changes == 1 else 's'} of precision",
        *([f"{modules:g} module{'' if modules == 1 else 's'} in FP32"] if modules else []),
        *([] if session.scaler.guards_only else [f"final scale {session.scaler.get_scale():g}"]),
        *(f"{spent:.1f} s in {name}" for name, spent in times.items()),
    ]
    return ", ".join(parts)


def show(session: AmpSession) -> None:
    """The sentence on the console: a warning where something happened, else for who asks for INFO."""
    figures = session.metrics()
    happened = figures["skipped_steps"] or figures["transitions"] or figures.get("non_finite_losses", 0)
    console.summarise(f"training ended: {sentence(session)}", bool(happened))


def _named(figures: Mapping[str, float], prefix: str, suffix: str) -> dict[str, float]:
    """Figures between whose `prefix` and `suffix` a name stands, by that name in capitals."""
    return {
        name.removeprefix(prefix).removesuffix(suffix).upper(): value
        for name, value in figures.items()
        if name.startswith(prefix) and name.endswith(suffix)
    }


def _in_brackets(words: Iterable[str]) -> str:
    listed = ", ".join(words)
    return f" ({listed})" if listed else ""
