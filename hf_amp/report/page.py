"""The report as one page of HTML: no script, nothing loaded from anywhere, everything from a run escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files

from hf_amp.events import printable
from hf_amp.monitoring.metrics import CATALOGUE
from hf_amp.report.pictures import COLORS, DARK, LIGHT, Theme, pictures_for_page
from hf_amp.report.reader import Incident, RunHistory
from hf_amp.report.verdict import formatted, verdict_on

CARDS = ("applied_steps", "skipped_steps", "scale", "headroom_bits", "underflow_fraction", "loss")
INCIDENTS_SHOWN = 200
MODULES_SHOWN = 12

_STATES = {
    "finished": "finished",
    "unfinished": "no end in the log: still running, or killed",
    "empty": "the log is empty",
}
_METRICS = {metric.name: metric for metric in CATALOGUE}
_CATALOGUE_ORDER = {name: place for place, name in enumerate(_METRICS)}

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main class="{layout}" style="--runs: {count}">
<header>
<p class="kicker">hf_amp · mixed-precision report</p>
{heads}
</header>
{pictures}
{incidents}
{figures}
<footer>Made by hf_amp {version} from {logs}.</footer>
</main>
</body>
</html>
"""


def page(runs: Sequence[RunHistory], version: str) -> str:
    """The whole page for one run or several.

    Args:
        version: of hf_amp, for the last line.
    """
    return _PAGE.format(
        title=_text("hf_amp report: " + ", ".join(run.name for run in runs)),
        style=_style(),
        layout="one" if len(runs) == 1 else "several",
        count=len(runs),
        heads="\n".join(map(_head, runs)),
        pictures=_picture_section(runs),
        incidents=_incident_section(runs),
        figures=_figure_section(runs),
        version=_text(version),
        logs=_text(", ".join(str(run.path) for run in runs)),
    )


def _style() -> str:
    """The style sheet, with the colours of both themes before it and those of the causes after it."""

    def variables(theme: Theme) -> str:
        return " ".join(f"--{role}: {color};" for role, color in theme.items())

    causes = [role.removeprefix("cause-") for role in COLORS if role.startswith("cause-")]
    return "\n".join([
        f":root {{ {variables(LIGHT)} }}",
        f"@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}",
        files("hf_amp.report").joinpath("page.css").read_text(encoding="utf-8"),
        *(f".cause.{cause} {{ color: var(--cause-{cause}); }}" for cause in causes),
    ])  # fmt: skip


def _text(value: object) -> str:
    """Text from a run, made harmless: markup escaped, control characters made visible."""
    return html.escape(printable(str(value)))


def _head(run: RunHistory) -> str:
    """Verdict, facts and cards of one run."""
    verdict = verdict_on(run)
    resumed = ", ".join(f"{step:,}" for step in run.resumed_at)
    facts = {
        "Ran": run.what_ran,
        "Steps": f"{run.newest_step:,}",
        "State": _STATES[run.state],
        "Scaling": run.config.get("scaling_strategy", ""),
        "Resumed": f"after step {resumed}" if resumed else "",
        "From": _time(run.started),
        "To": _time(run.newest),
        "Log": _remarks(run),
    }
    rows = "".join(_pair(name, _text(fact)) for name, fact in facts.items() if fact)
    cards = "".join(_card(run, name) for name in CARDS if name in run.latest)
    return (
        f'<section class="run" aria-label="{_text(run.name)}">\n<h1>{_text(run.name)}</h1>\n'
        f'<p class="verdict {verdict.level.value}"><span class="level" aria-hidden="true"></span>'
        f'<span>{_text(verdict.sentence)}</span></p>\n<dl class="facts">{rows}</dl>\n'
        + (f'<dl class="cards">{cards}</dl>\n' if cards else "")
        + "</section>"
    )


def _pair(name: str, value: str) -> str:
    return f"<div><dt>{name}</dt><dd>{value}</dd></div>"


def _remarks(run: RunHistory) -> str:
    torn = f"{run.torn_lines:,} line{'s were' if run.torn_lines > 1 else ' was'} cut off by a kill"
    former = f"{run.former_runs:,} earlier run{'s' if run.former_runs > 1 else ''} in the same file left out"
    return "; ".join([torn] * bool(run.torn_lines) + [former] * bool(run.former_runs))


def _time(timestamp: str | None) -> str:
    return timestamp[:19].replace("T", " ") + " UTC" if timestamp else ""


def _card(run: RunHistory, name: str) -> str:
    unit = _METRICS[name].unit if name in _METRICS else "1"
    shown = f"{run.latest[name]:.2%}" if name == "underflow_fraction" else _text(formatted(run.latest[name]))
    return _pair(
        name.replace("_", " "), shown + (f" <small>{unit}</small>" if unit not in ("1", "steps") else "")
    )


def _picture_section(runs: Sequence[RunHistory]) -> str:
    figures = []
    for drawn, svg in (one for kind in pictures_for_page(runs) for one in kind):
        whose, column = "", ""
        if len(runs) > 1:
            whose = f" <small>{_text(runs[drawn.run].name)}</small>"
            column = f' style="--column: {drawn.run + 1}"'
        figures.append(
            f"<figure{column}>\n<h3>{_text(drawn.picture.title)}{whose}</h3>\n{svg}\n"
            f"<figcaption>{_text(drawn.description)}</figcaption>\n</figure>"
        )
    return (
        _section("pictures", "Over the run", '<div class="pictures">', *figures, "</div>") if figures else ""
    )


def _incident_section(runs: Sequence[RunHistory]) -> str:
    columns = ("Step", "What", "Cause", "Modules", "Change", "What to do")
    parts = []
    for run in runs:
        if len(runs) > 1:
            parts.append(f"<h3>{_text(run.name)}</h3>")
        rows = [_incident_cells(incident) for incident in run.incidents]
        if not rows:
            parts.append("<p>Nothing that needs attention is in the log.</p>")
            continue
        parts.append(_table("incidents", columns, rows[:INCIDENTS_SHOWN]))
        if len(rows) > INCIDENTS_SHOWN:
            parts.append(f"<p>{len(rows) - INCIDENTS_SHOWN:,} more kinds of incidents are in the log.</p>")
    return _section("incidents", "Incidents, and what to do", *parts)


def _incident_cells(incident: Incident) -> list[str]:
    steps = f"{incident.first_step:,}"
    if incident.count > 1:
        steps += f" to {incident.last_step:,}, {incident.count:,} times"
    names = [f"<code>{_text(name or 'the model')}</code>" for name in incident.modules[:MODULES_SHOWN]]
    if len(incident.modules) > MODULES_SHOWN:
        names.append(f"and {len(incident.modules) - MODULES_SHOWN} more")
    cause = _text(incident.cause)
    change = "" if incident.before is None else f"{_value(incident.before)} → {_value(incident.after)}"
    return [
        steps,
        _text(incident.event.replace("_", " ")),
        f'<span class="cause {cause.lower()}">{cause}</span>' if cause else "",
        "<br>".join(names),
        change,
        _text(incident.message),
    ]


def _value(value: object) -> str:
    return _text(formatted(value) if isinstance(value, (int, float)) else value)


def _figure_section(runs: Sequence[RunHistory]) -> str:
    names = {name for run in runs for name in run.latest}
    if not names:
        return ""
    columns = ("Figure", *(run.name for run in runs), "Unit", "Meaning", "When it is bad")
    rows = []
    for name in sorted(names, key=lambda name: (_CATALOGUE_ORDER.get(name, len(_CATALOGUE_ORDER)), name)):
        metric = _METRICS.get(name)
        values = [formatted(run.latest[name]) if name in run.latest else "" for run in runs]
        about = (metric.unit, metric.meaning, metric.remedy) if metric else ("", "as the run logged it", "")
        rows.append([f"<code>{_text(name)}</code>", *map(_text, (*values, *about))])
    return _section("figures", "Newest figures", _table("figures", columns, rows))


def _section(name: str, heading: str, *parts: str) -> str:
    body = "\n".join(parts)
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{heading}</h2>\n{body}\n</section>'


def _table(kind: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; on a narrow screen every cell stands under the other, with its column's name before it."""
    head = "".join(f'<th role="columnheader" scope="col">{_text(column)}</th>' for column in columns)
    body = "".join(
        '<tr role="row">'
        + "".join(
            f'<td role="cell" data-label="{_text(column)}">{cell}</td>'
            for column, cell in zip(columns, row, strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<table role="table" class="{kind}"><thead role="rowgroup"><tr role="row">{head}</tr></thead>\n'
        f'<tbody role="rowgroup">\n{body}</tbody></table>'
    )
