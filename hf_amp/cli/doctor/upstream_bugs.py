"""Known bugs of the libraries below, each seen by running it, and what becomes of it under hf_amp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from packaging.specifiers import SpecifierSet


class UpstreamBug(NamedTuple):
    """One bug.

    Attributes:
        package: whose it is.
        seen_in: versions that have it, as far as is known: it was seen in the lowest, and no release is known to mend it.
        symptom: what a user sees.
        link: where it is discussed; "" where it is not.
        with_hf_amp: what happens to it in a run with hf_amp.
    """

    package: str
    seen_in: str
    symptom: str
    link: str
    with_hf_amp: str


_PYTORCH, _ACCELERATE = (
    "https://github.com/pytorch/pytorch/issues/",
    "https://github.com/huggingface/accelerate/issues/",
)

KNOWN: tuple[UpstreamBug, ...] = (
    UpstreamBug(
        "torch", ">=2.11", "after about 144 overflows in a row the loss scale is so small that a clean step writes inf "
        "into the parameters", f"{_PYTORCH}99640", "cured: the scale has a floor",
    ),
    UpstreamBug(
        "torch", ">=2.11", "ShardedGradScaler with a fused optimizer and no unscale_: one rank skips, another steps",
        "", "cured: all ranks agree on every verdict",
    ),
    UpstreamBug(
        "accelerate", ">=1.15", "with a fused optimizer (the Trainer's default) a skipped step is not noticed: the "
        "learning-rate schedule runs on", f"{_ACCELERATE}4242", "cured: a skipped optimizer is not called",
    ),
    UpstreamBug(
        "accelerate", ">=1.15", "several optimizers: clip_grad_norm_ unscales the second one's gradients twice",
        f"{_ACCELERATE}439", "cured: gradients are divided once, by the scale of their backward",
    ),
    UpstreamBug(
        "accelerate", ">=1.15", "mixed_precision='fp16' on a CPU is FP32, and says nothing", "",
        "cured: FP16, emulated or real, and named",
    ),
    UpstreamBug(
        "transformers", ">=5.17", "one non-finite step puts a bare NaN into trainer_state.json, which is no JSON", "",
        "cured: a skipped step has no gradient norm",
    ),
    UpstreamBug(
        "transformers", ">=5.17", "logging_nan_inf_filter shows a loss of 0.0 while every weight is NaN", "",
        "cured: non-finite steps are skipped, counted and told, in BF16 and FP32 as well",
    ),
)  # fmt: skip


def bugs_in(versions: Mapping[str, str]) -> list[UpstreamBug]:
    """The known bugs of the installed versions.

    Args:
        versions: package → version.
    """
    return [
        bug
        for bug in KNOWN
        if bug.package in versions
        and SpecifierSet(bug.seen_in, prereleases=True).contains(versions[bug.package])
    ]
