"""What `import hf_amp` promises to others."""

import inspect
import re

import pytest

import hf_amp
from hf_amp import errors
from tests.each import for_each

PUBLIC = [
    "AdvancedGradScaler",
    "AdvancedMixedPrecisionManager",
    "AmpEvent",
    "AmpSession",
    "AttachError",
    "BatchError",
    "Cause",
    "ConfigError",
    "DynamicMixedPrecisionTrainer",
    "EventKind",
    "HfAmpError",
    "MixedPrecisionCallback",
    "MixedPrecisionConfig",
    "NumberFormat",
    "PerformanceOptimizedMixedPrecisionTrainer",
    "PerformanceTracker",
    "PrecisionMode",
    "PrecisionMonitor",
    "ScalerError",
    "ScalingStrategy",
    "StandardMixedPrecisionTrainer",
    "StateError",
    "UnknownOptionError",
    "attach",
    "check_inference",
    "choose_precision",
    "compare",
    "emulate",
    "rescale_for_fp16",
]
ERRORS = {
    name: value for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)
}


def documented_tree() -> dict[str, str | None]:
    """Error name → name of the error above it, as drawn in the docstring of `hf_amp.errors`."""
    parents: dict[str, str | None] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        drawn = re.match(r"^(?P<margin> {4}[ │├└─]*)(?P<name>\w+Error)\b", line)
        if drawn:
            depth = len(drawn["margin"])
            path = [(d, name) for d, name in path if d < depth]
            parents[drawn["name"]] = path[-1][1] if path else None
            path.append((depth, drawn["name"]))
    return parents


def test_the_public_names_are_these():
    """A name is added or taken away on purpose, here and in the changelog."""
    assert hf_amp.__all__ == PUBLIC


def test_the_public_names_are_sorted():
    """A reader finds a name where the alphabet puts it."""
    assert hf_amp.__all__ == sorted(set(hf_amp.__all__))


@for_each("name", hf_amp.__all__)
def test_a_public_name_is_importable_and_documented(name):
    """Lazy or not, it is there, says what it is, and comes from this package."""
    value = getattr(hf_amp, name)
    assert inspect.getdoc(value)
    assert value.__module__.startswith("hf_amp.")


def test_lazy_names_are_shown_like_others():
    """Completion and `dir` know every public name."""
    assert set(hf_amp.__all__) <= set(dir(hf_amp))


def test_a_name_that_is_not_there_is_an_attribute_error():
    """Laziness does not turn typos into something else."""
    with pytest.raises(AttributeError, match="no attribute 'MixedPrecisionCalback'"):
        _ = hf_amp.MixedPrecisionCalback


@for_each("name", ERRORS)
def test_every_error_is_public(name):
    """Whatever hf_amp raises on purpose can be caught by a name from `hf_amp`."""
    assert name in hf_amp.__all__
    assert getattr(hf_amp, name) is ERRORS[name]
    assert issubclass(ERRORS[name], hf_amp.HfAmpError)


def test_the_documented_error_tree_is_the_real_one():
    """The docstring of `hf_amp.errors` draws every class, below the class that it derives from, and no other."""
    real = {name: error.__bases__[0].__name__ for name, error in ERRORS.items()}
    assert documented_tree() == {**real, "HfAmpError": None}


@for_each("name", ERRORS)
def test_the_documented_builtin_base_is_the_real_one(name):
    """Where the tree says `(ValueError)`, an `except ValueError` catches it."""
    stated = re.search(rf"\b{name} \((\w+)\)", errors.__doc__ or "")
    builtin_bases = [base.__name__ for base in ERRORS[name].__bases__ if base.__module__ == "builtins"]
    expected = [] if name == "HfAmpError" else builtin_bases
    assert ([stated[1]] if stated else []) == expected
