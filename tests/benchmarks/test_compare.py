"""Whether `hf_amp.compare` names the module that was corrupted, and none where the code is equal: 200 and 100 pairs of models.

`OMP_NUM_THREADS=1 python -m tests.benchmarks.test_compare --out tests/benchmarks/results`
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers.utils import logging

from hf_amp.capture import captured, save_capture
from hf_amp.comparison import Setting, compare
from hf_amp.fallback.recorder import RecordedForward
from tests.benchmarks.measuring import Row, parser, write
from tests.corruptions import CORRUPTIONS, EQUAL_CODE, Case, cases, equal_pairs, judged

CORRUPTED, EQUAL = 200, 100


def from_captures(case: Case, folder: Path) -> str:
    """The verdict on one corruption where only two capture files are compared."""
    model, other, batch, truth = case.models()
    setting = Setting(case.precision)
    random_state = torch.get_rng_state()
    files = []
    for name, its in (("a", model), ("b", other)):
        torch.set_rng_state(random_state)
        forward = RecordedForward(its, (), dict(batch))
        with setting.entered(its) as current:
            files.append(save_capture(captured(forward, current, 1024.0), forward, folder / f"{name}.safetensors"))
    return judged(compare(*files), truth)


def corruptions(count: int, captures: bool = True) -> list[Row]:
    """A row a kind of corruption, one for all, and one for all from capture files alone."""
    verdicts: Counter[tuple[str, str]] = Counter()
    with TemporaryDirectory() as folder:
        for case in cases(count):
            verdicts[case.corruption, verdict := judged(*case.compared())] += 1
            alone = from_captures(case, Path(folder)) if captures else ""
            verdicts["all, from captures alone", alone] += captures
            if {verdict, alone} - {"right", ""}:
                print(f"{case}: {verdict}; from captures alone {alone}", flush=True)
    for (kind, verdict), number in list(verdicts.items()):
        if kind in CORRUPTIONS:
            verdicts["all", verdict] += number
    names = [*CORRUPTIONS, "all", *["all, from captures alone"] * captures]
    return [_row("corrupted", name, {v: verdicts[name, v] for v in ("right", "not seen", "wrong")}) for name in names]


def equal_code(count: int, compiled: bool = True) -> list[Row]:
    """A row a kind of equal code, and one for all: how many of them were said to differ."""
    alarms: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    for pair in equal_pairs(count, compiled):
        found = pair.compared()
        if not found.agrees:
            print(f"{pair}: {found.sentence()}", flush=True)
        for kind in (pair.what, "all"):
            pairs[kind] += 1
            alarms[kind] += not found.agrees or bool(found.state)
    kinds = [kind for kind in (*EQUAL_CODE, "all") if pairs[kind]]
    return [_row("equal code", kind, {"right": pairs[kind] - alarms[kind], "wrong": alarms[kind]}) for kind in kinds]


def _row(pairs: str, what: str, counts: dict[str, int]) -> Row:
    seen = {"right": 0, "not seen": 0, "wrong": 0} | counts
    return {
        "pairs": pairs,
        "what": what,
        "tried": sum(seen.values()),
        **{k.replace(" ", "_"): v for k, v in seen.items()},
    }


def main() -> None:
    options = parser().parse_args()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    rows = corruptions(CORRUPTED) + equal_code(EQUAL)
    write("compare", {"rows": rows}, options.out)


def test_the_rows_add_up() -> None:
    """Seven corruptions, one of each kind, and six pairs of equal code: the row for all is the sum of the others."""
    *rows, everything = corruptions(7, captures=False)
    assert everything["tried"] == 7
    assert sum(row["right"] for row in rows) == everything["right"] == 7
    *rows, everything = equal_code(6, compiled=False)
    assert sum(row["tried"] for row in rows) == everything["tried"] == everything["right"] == 6


if __name__ == "__main__":
    main()
