"""Any dictionary makes a config that round-trips, or is refused in words that help."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_amp import ConfigError, MixedPrecisionConfig, PrecisionMode, ScalingStrategy
from hf_amp.config import safe_repr
from tests.fuzz.anything import ANYTHING, PLAIN

OPTIONS = {option.name: option for option in dataclasses.fields(MixedPrecisionConfig)}
NAMES = [*PrecisionMode.__members__, *ScalingStrategy.__members__, "upcast", "retry"]
ENUMERATIONS = ("precision_mode", "scaling_strategy", "communication_precision")  # shown as what was understood
CASES = st.builds(lambda name, spell: spell(name), st.sampled_from(NAMES), st.sampled_from([str, str.lower, str.title]))
LIKELY = st.sampled_from([None, True, False, 1, 2, 0.5, 2.0**-20, 2.0**20])


def dictionaries(values: st.SearchStrategy[Any], keys: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(keys, LIKELY | CASES | values, max_size=3)


RIGHT_NAMES = st.sampled_from(list(OPTIONS))
ANY_NAMES = st.one_of(RIGHT_NAMES, RIGHT_NAMES.map(str.upper), st.text(max_size=8))


def outcome(make: Callable[[Any], MixedPrecisionConfig], of: Any) -> MixedPrecisionConfig | str:
    """The config, or the words in which it was refused. Any other exception is a failure."""
    try:
        return make(of)
    except ConfigError as error:
        return str(error)


def check(options: dict[str, Any], reported: MixedPrecisionConfig | str) -> None:
    """Sees whether `reported` is right about `options`."""
    if isinstance(reported, MixedPrecisionConfig):
        plain = reported.to_dict()
        assert list(plain) == list(OPTIONS)
        for again in (plain, json.loads(json.dumps(plain)), yaml.safe_load(yaml.safe_dump(plain))):
            assert MixedPrecisionConfig.from_dict(again) == reported
        return
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        same = [name for name in OPTIONS if name == unknown[0].lower()]
        assert not same or f"nearest is {same[0]!r}" in reported
        assert f"no option {unknown[0]!r}; the nearest is" in reported
        assert "Allowed: enabled, " in reported
        return
    named = re.findall(rf"\b({'|'.join(OPTIONS)})=", reported)
    assert set(named) & set(options)
    assert any(
        f"{name}={safe_repr(options[name])}" in reported or name in ENUMERATIONS for name in named if name in options
    )
    assert re.search(r"\b(must|leave|use|set|lower|move)\b", reported)


@given(dictionaries(ANYTHING, RIGHT_NAMES))
def test_any_values_as_keywords(options: dict[str, Any]) -> None:
    """`MixedPrecisionConfig(**options)`, every option named right."""
    check(options, outcome(lambda options: MixedPrecisionConfig(**options), options))


@given(dictionaries(ANYTHING, ANY_NAMES))
def test_any_names_as_keywords(options: dict[str, Any]) -> None:
    """An unknown name is refused alike, whether options come as keywords or as a mapping."""
    check(options, outcome(lambda options: MixedPrecisionConfig(**options), options))
    check(options, outcome(MixedPrecisionConfig.from_dict, options))


@given(options=dictionaries(PLAIN, ANY_NAMES), suffix=st.sampled_from([".json", ".yaml"]))
def test_any_file(tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any], suffix: str) -> None:
    """What a file holds is judged as the same dictionary is; the path stands before what is wrong."""
    path = tmp_path_factory.getbasetemp() / f"amp{suffix}"
    try:
        text = json.dumps(options) if suffix == ".json" else yaml.safe_dump(options, sort_keys=False)
        path.write_text(text, encoding="utf-8")
    except ValueError:  # neither can say it
        return
    reported, judged = (outcome(MixedPrecisionConfig.from_file, path), outcome(MixedPrecisionConfig.from_dict, options))
    assert reported == judged or reported == f"{path}: {judged}"


@given(st.one_of(st.binary(max_size=60), st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace"))))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """A file of anything is a config, or a ConfigError that names it."""
    for suffix in (".json", ".yaml", ".toml"):
        path: Path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
        path.write_bytes(content)
        reported = outcome(MixedPrecisionConfig.from_file, path)
        assert isinstance(reported, MixedPrecisionConfig) or str(path) in reported
