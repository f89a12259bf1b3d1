"""How often the cause of a skipped step is told right, and what is done about it: 420 random faults in random models.

`OMP_NUM_THREADS=1 python -m tests.benchmarks.test_causes --out tests/benchmarks/results`
"""

from __future__ import annotations

from tests.benchmarks.measuring import Row, parser, write
from tests.fallback.random_faults import FAULTS, TRIALS, Outcome, outcomes, told_of


def causes(trials: int) -> list[Row]:
    """A row a fault, and one for all: told with its own cause and place, as UNKNOWN, or wrong; and runs that were harmed."""
    ran = outcomes(trials)
    rows = [_row(name.replace("_", " "), [it for it in ran if it.fault == name]) for name in FAULTS]
    return [*rows, _row("all", ran)]


def _row(fault: str, ran: list[Outcome]) -> Row:
    told = told_of(ran)
    return {
        "fault": fault,
        "faults": len(ran),
        "right": told.right,
        "UNKNOWN_instead": told.unknown,
        "wrong": told.wrong,
        "harmed": sum(bool(it.harm) for it in ran),
    }


def main() -> None:
    options = parser().parse_args()
    write("causes", {"rows": causes(TRIALS)}, options.out)


def test_the_rows_add_up() -> None:
    """Twelve faults: the row for all is the sum of the others."""
    *rows, everything = causes(12)
    assert everything["faults"] == 12
    for column in ("faults", "right", "UNKNOWN_instead", "wrong", "harmed"):
        assert sum(row[column] for row in rows) == everything[column]


if __name__ == "__main__":
    main()
