"""How often the cause of a skipped step is told right: 200 random faults in random models.

`OMP_NUM_THREADS=1 python -m tests.benchmarks.test_causes --out tests/benchmarks/results`
"""

from __future__ import annotations

from tests.benchmarks.measuring import Row, parser, write
from tests.fallback.random_faults import FAULTS, TRIALS, told_of


def causes(trials: int) -> list[Row]:
    """A row a fault, and one for all: told with its own cause, as UNKNOWN, or wrong."""
    reported = told_of(trials)
    rows: list[Row] = []
    for fault, truth in FAULTS.items():
        verdicts = {verdict: n for (name, verdict), n in reported.pairs.items() if name == fault.__name__}
        right, unknown = verdicts.get(truth.value, 0), verdicts.get("UNKNOWN", 0)
        faults = sum(verdicts.values())
        unknown = 0 if truth.value == "UNKNOWN" else unknown
        rows.append(_row(fault.__name__.replace("_", " "), faults, right, unknown))
    return [*rows, _row("all", trials, reported.right, reported.unknown)]


def _row(fault: str, faults: int, right: int, unknown: int) -> Row:
    return {
        "fault": fault,
        "faults": faults,
        "right": right,
        "UNKNOWN_instead": unknown,
        "wrong": faults - right - unknown,
    }


def main() -> None:
    options = parser().parse_args()
    write("causes", {"rows": causes(TRIALS)}, options.out)


def test_the_rows_add_up() -> None:
    """Twelve faults: the row for all is the sum of the others."""
    *rows, everything = causes(12)
    assert everything["faults"] == 12
    for column in ("faults", "right", "UNKNOWN_instead", "wrong"):
        assert sum(row[column] for row in rows) == everything[column]


if __name__ == "__main__":
    main()
