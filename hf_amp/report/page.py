"""The report as one page of HTML: no script, nothing loaded from anywhere, everything from a run escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files

from hf_amp.events import printable
from hf_amp.monitoring.metrics import CATALOGUE
from hf_amp.report.pictures import (
    DARK,
    LIGHT,
    Drawn,
    Theme,
    css_variable,
    formatted,
    pictures_for_page,
    state_of,
)
from hf_amp.report.reader import Incident, RunHistory
from hf_amp.report.verdict import verdict_on

CARDS = ("applied_steps", "skipped_steps", "scale", "headroom_bits", "underflow_fraction", "loss")
INCIDENTS_SHOWN = 200

_STATES = {
    "finished": "finished",
    "unfinished": "no end in the log: still running, or killed",
    "empty": "the log is empty",
}
_METRICS = {metric.name: metric for metric in CATALOGUE}


def page(runs: Sequence[RunHistory], version: str) -> str:
    """The whole page for one run or several.

    Args:
        version: of hf_amp, for the last line.
    """
    title = "hf_amp report: " + ", ".join(run.name for run in runs)
    body = "\n".join(
        [
            f'<main class="{"one" if len(runs) == 1 else "several"}" style="--runs: {len(runs)}">',
            "<header>",
            '<p class="kicker">hf_amp · mixed-precision report</p>',
            *map(_head, runs),
            "</header>",
            *_picture_sections(runs),
            _incident_section(runs),
            _figure_section(runs),
            f"<footer>Made by hf_amp {_text(version)} from {_text(', '.join(str(run.path) for run in runs))}.</footer>",
            "</main>",
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>{_text(title)}</title>\n<style>\n{_style()}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _style() -> str:
    """The style sheet, with the colours of both themes before it."""

    def variables(theme: Theme) -> str:
        return " ".join(f"{css_variable(role)}: {color};" for role, color in asdict(theme).items())

    sheet = files("hf_amp.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        f":root {{ {variables(LIGHT)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}\n{sheet}"
    )


def _text(value: object) -> str:
    """Text from a run, made harmless: markup escaped, control characters made visible."""
    return html.escape(printable(str(value)))


def _head(run: RunHistory) -> str:
    verdict = verdict_on(run)
    facts = {
        "Ran": run.what_ran,
        "Steps": f"{run.newest_step:,}",
        "State": _STATES[state_of(run)],
        "Scaling": run.config.get("scaling_strategy", ""),
        "Resumed": "after step " + ", ".join(f"{step:,}" for step in run.resumed_at)
        if run.resumed_at
        else "",
        "From": _time(run.started),
        "To": _time(run.newest),
        "Log": _remarks(run),
    }
    rows = "".join(
        f"<div><dt>{name}</dt><dd>{_text(fact)}</dd></div>" for name, fact in facts.items() if fact
    )
    return (
        f'<section class="run" aria-label="{_text(run.name)}">\n<h1>{_text(run.name)}</h1>\n'
        f'<p class="verdict {verdict.level.value}"><span class="level" aria-hidden="true"></span>'
        f'<span>{_text(verdict.sentence)}</span></p>\n<dl class="facts">{rows}</dl>\n{_cards(run)}\n</section>'
    )


def _remarks(run: RunHistory) -> str:
    remarks = []
    if run.torn_lines:
        remarks.append(
            f"{run.torn_lines:,} line{'s were' if run.torn_lines > 1 else ' was'} cut off by a kill"
        )
    if run.former_runs:
        remarks.append(
            f"{run.former_runs:,} earlier run{'s' if run.former_runs > 1 else ''} in the same file left out"
        )
    return "; ".join(remarks)


def _time(timestamp: str | None) -> str:
    return timestamp[:19].replace("T", " ") + " UTC" if timestamp else ""


def _cards(run: RunHistory) -> str:
    known = run.latest
    cards = []
    for name in CARDS:
        if name in known:
            metric = _METRICS.get(name)
            unit = (
                ""
                if metric is None or metric.unit in ("1", "steps")
                else f" <small>{_text(metric.unit)}</small>"
            )
            value = f"{known[name]:.2%}" if name == "underflow_fraction" else _text(formatted(known[name]))
            cards.append(f"<div><dt>{name.replace('_', ' ')}</dt><dd>{value}{unit}</dd></div>")
    return f'<dl class="cards">{"".join(cards)}</dl>' if cards else ""


def _picture_sections(runs: Sequence[RunHistory]) -> list[str]:
    groups = list(pictures_for_page(runs))
    if not groups:
        return []
    return [
        '<section aria-labelledby="pictures">\n<h2 id="pictures">Over the run</h2>',
        '<div class="pictures">',
        *("\n".join(_figure(drawn, svg, runs) for drawn, svg in group) for group in groups),
        "</div>\n</section>",
    ]


def _figure(drawn: Drawn, svg: str, runs: Sequence[RunHistory]) -> str:
    whose = f" <small>{_text(runs[drawn.run].name)}</small>" if len(runs) > 1 else ""
    column = f' style="--column: {drawn.run + 1}"' if len(runs) > 1 else ""
    return (
        f"<figure{column}>\n<h3>{_text(drawn.picture.title)}{whose}</h3>\n{svg}\n"
        f"<figcaption>{_text(drawn.description)}</figcaption>\n</figure>"
    )


def _incident_section(runs: Sequence[RunHistory]) -> str:
    heading = '<section aria-labelledby="incidents">\n<h2 id="incidents">Incidents, and what to do</h2>\n'
    columns = ("Step", "What", "Cause", "Modules", "Change", "What to do")
    tables = []
    for run in runs:
        caption = f"<h3>{_text(run.name)}</h3>" if len(runs) > 1 else ""
        incidents = run.incidents
        if not incidents:
            tables.append(f"{caption}<p>Nothing that needs attention is in the log.</p>")
            continue
        rows = [_row(columns, _incident_cells(incident)) for incident in incidents[:INCIDENTS_SHOWN]]
        rest = len(incidents) - INCIDENTS_SHOWN
        more = f"<p>{rest:,} more kinds of incidents are in the log.</p>" if rest > 0 else ""
        tables.append(caption + _table(columns, rows, "incidents") + more)
    return heading + "\n".join(tables) + "\n</section>"


def _incident_cells(incident: Incident) -> list[str]:
    steps = f"{incident.first_step:,}"
    if incident.count > 1:
        steps += f" to {incident.last_step:,}, {incident.count:,} times"
    modules = "<br>".join(f"<code>{_text(name or 'the model')}</code>" for name in incident.modules[:12])
    if len(incident.modules) > 12:
        modules += f"<br>and {len(incident.modules) - 12} more"
    cause = f'<span class="cause {_text(incident.cause.lower())}">{_text(incident.cause)}</span>'
    change = "" if incident.before is None else f"{_value(incident.before)} → {_value(incident.after)}"
    return [
        steps, _text(incident.event.replace("_", " ")), cause if incident.cause else "", modules, change,
        _text(incident.message),
    ]  # fmt: skip


def _value(value: object) -> str:
    return _text(formatted(value) if isinstance(value, (int, float)) else value)


def _figure_section(runs: Sequence[RunHistory]) -> str:
    names = sorted({name for run in runs for name in run.latest}, key=_catalogue_order)
    if not names:
        return ""
    columns = ("Figure", *(run.name for run in runs), "Unit", "Meaning", "When it is bad")
    rows = []
    for name in names:
        metric = _METRICS.get(name)
        values = [_text(formatted(run.latest[name])) if name in run.latest else "" for run in runs]
        explained = (
            (metric.unit, metric.meaning, metric.remedy) if metric else ("", "as the run logged it", "")
        )
        rows.append(_row(columns, [f"<code>{_text(name)}</code>", *values, *map(_text, explained)]))
    return (
        '<section aria-labelledby="figures">\n<h2 id="figures">Newest figures</h2>\n'
        + _table(columns, rows, "figures")
        + "\n</section>"
    )


def _catalogue_order(name: str) -> tuple[int, str]:
    names = list(_METRICS)
    return (names.index(name) if name in _METRICS else len(names), name)


def _row(columns: Sequence[str], cells: Sequence[str]) -> str:
    """One row; on a narrow screen every cell stands under the other, with its column's name before it."""
    return '<tr role="row">' + "".join(
        f'<td role="cell" data-label="{_text(column)}">{cell}</td>'
        for column, cell in zip(columns, cells, strict=True)
    ) + "</tr>"  # fmt: skip


def _table(columns: Sequence[str], rows: Sequence[str], kind: str) -> str:
    head = "".join(f'<th role="columnheader" scope="col">{_text(column)}</th>' for column in columns)
    return (
        f'<table role="table" class="{kind}"><thead role="rowgroup"><tr role="row">{head}</tr></thead>\n'
        f'<tbody role="rowgroup">\n{chr(10).join(rows)}\n</tbody></table>'
    )
