"""`MixedPrecisionConfig` refuses what is wrong, in words that help, and keeps what is right."""

import ast
import dataclasses
import enum
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import hf_amp
from hf_amp import ConfigError, MixedPrecisionConfig, PrecisionMode, ScalingStrategy, UnknownOptionError
from hf_amp.precision import BF16_FORMAT, FP16_FORMAT, FP32_FORMAT, LARGEST_SCALE, SMALLEST_SCALE
from hf_amp.schedule import WORDS
from tests.each import for_each

OPTIONS = {option.name: option for option in dataclasses.fields(MixedPrecisionConfig)}


def refusal(error_class=ConfigError, **options):
    """The message with which the options are refused."""
    with pytest.raises(error_class) as caught:
        MixedPrecisionConfig(**options)
    return str(caught.value)


# ---- wrong values -------------------------------------------------------------------------------------------

NOT_NUMBERS = ["big", None, True, 1j, [2.0], torch.tensor(2.0), math.nan, math.inf, -math.inf]
# kind → (the words that say what is allowed, wrong values, options)
KINDS = {
    "switch": (
        "True or False",
        [None, 0, 1, 1.0, "True", "yes", [], torch.tensor(True)],
        [
            "enabled", "enable_monitoring", "log_all_metrics", "monitor_modules", "emulate", "automatic_fallback",
            "memory_efficient", "gradient_accumulation_friendly", "distributed_amp", "sync_grad_scaler",
            "loss_spikes",
        ],
    ),
    "positive": (
        "a positive finite number", [0, 0.0, -1, -0.5, *NOT_NUMBERS], ["init_scale", "min_scale", "max_scale"],
    ),
    "above one": ("a finite number above 1", [1, 1.0, 0.5, 0, -2, *NOT_NUMBERS], ["growth_factor"]),
    "at least one": ("a finite number of at least 1", [0.99, 0, -2, *NOT_NUMBERS], ["outlier_headroom"]),
    "fraction": (
        "a number above 0 and below 1", [0, 1, 1.0, -0.5, 2, *NOT_NUMBERS], ["backoff_factor", "fallback_threshold", "overflow_budget"],
    ),
    "switch or none": ("None or True or False", [0, 1, 0.0, "yes", [True]], ["fold_clipping"]),
    "steps": (
        "a whole number of steps from 1 to 2147483647", [0, -1, 2.0, 0.5, *NOT_NUMBERS],
        ["growth_interval", "monitoring_interval", "recovery_steps", "patience", "good_after"],
    ),
    "names": (
        "a list of names, globs or classes of modules", ["lm_head", [1], [""], {"lm_head": 1}, True, 2], ["fp32_modules"],
    ),
    "schedule": (
        f"None or {WORDS}",
        [{}, [], "FP32", {1.0: "FP32"}, {1.5: "FP32"}, {-1: "FP32"}, {True: "FP32"}, {"a": "FP32"}, {0: "FP8"}, {0: {}}, {0: {1: "FP32"}}],
        ["precision_schedule"],
    ),
    "steps or none": ("None or a whole number of steps from 1 to 2147483647", [0, -1, 2.0, "9"], ["total_steps"]),
    "plan": (
        "None or a plan of hf_amp.choose_precision, a dict of one, or the path of its JSON file",
        [1, True, ["lm_head"], {}, {"plan": {}}, {"default": "FP8", "modules": {}}, {"default": "BF16", "modules": {"a": "BF16"}}],
        ["plan"],
    ),
    "count": ("a whole number from 1 to 2147483647", [0, -1, 2.0, 0.5, *NOT_NUMBERS], ["hysteresis", "max_rewinds"]),
    "mode": (
        "None or one of FP32, FP16, MIXED, BF16, DYNAMIC", ["FP8", "", "FP 16", 16, True, ["FP32"]], ["precision_mode"],
    ),
    "half parameters": (
        "None or one of 'error', 'upcast', 'master_weights', 'stochastic_rounding', 'kahan'",
        ["", "UPCAST", "warn", 16, True, ["error"]], ["half_parameters"],
    ),
    "fate": ("one of 'report', 'stop', 'rewind'", ["", "STOP", True, None, 3], ["on_stalled"]),
    "half": ("None or FP16 or BF16", ["FP8", "", 16, True, ["FP16"], PrecisionMode.FP32], ["communication_precision"]),
    "strategy": (
        "one of CONSTANT, DYNAMIC, ADAPTIVE, PERFORMANCE_OPTIMIZED",
        [None, "NOPE", "", 2, False, b"DYNAMIC", PrecisionMode.FP32], ["scaling_strategy"],
    ),
}  # fmt: skip
WRONG = [(name, value, words) for words, values, names in KINDS.values() for name in names for value in values]


def test_every_option_has_wrong_values_here():
    """No option goes untested."""
    assert sorted(name for _, _, names in KINDS.values() for name in names) == sorted(OPTIONS)


@for_each(("name", "value", "words"), WRONG)
def test_a_wrong_value_is_refused_in_words_that_help(name, value, words):
    """The message has what was passed, what is allowed and what to do: the option's name, words, and its default."""
    message = refusal(**{name: value})
    default = getattr(OPTIONS[name].default, "value", OPTIONS[name].default)
    assert f"{name}={value!r}" in message
    assert f"{name} must be {words};" in message
    assert f"leave it out for the default ({default})" in message


@pytest.mark.parametrize(("name", "value"), [("init_scale", 0), ("scaling_strategy", "NOPE")])
def test_a_refusal_is_a_value_error(name, value):
    """Callers who know only Python's errors catch it."""
    with pytest.raises(ValueError, match=name):
        MixedPrecisionConfig(**{name: value})


@for_each("name", ["init_scale", "growth_factor", "backoff_factor"])
def test_an_integer_beyond_every_float_is_refused(name):
    """Even a number that no float can hold is a ConfigError."""
    assert name in refusal(**{name: 10**400})


def test_a_floor_above_the_ceiling_is_refused():
    """The message names both bounds and both values."""
    message = refusal(min_scale=8.0, max_scale=4.0, init_scale=4.0)
    assert "min_scale=8.0, max_scale=4.0" in message
    assert "lower min_scale" in message


def test_a_ceiling_above_2_to_the_127_is_refused():
    """Above it the scale or its next growth is not finite in FP32."""
    assert "2^127" in refusal(max_scale=2.0**128)
    assert MixedPrecisionConfig(max_scale=2.0**127).max_scale == 2.0**127


@pytest.mark.parametrize("choice", ["error", "upcast"])
def test_fp16_mode_has_no_choice_about_half_parameters(choice):
    """FP16 means master weights: another remedy contradicts it, and the message names both options."""
    message = refusal(precision_mode="FP16", half_parameters=choice)
    assert f"precision_mode=FP16, half_parameters='{choice}'" in message
    assert "precision_mode=MIXED" in message
    assert MixedPrecisionConfig(precision_mode="FP16", half_parameters="master_weights").enabled


def test_dynamic_precision_needs_fp32_parameters():
    """DYNAMIC leaves half precision at times, which half parameters cannot."""
    message = refusal(precision_mode="DYNAMIC", half_parameters="master_weights")
    assert "precision_mode=DYNAMIC, half_parameters='master_weights'" in message
    assert MixedPrecisionConfig(precision_mode="DYNAMIC", half_parameters="upcast").enabled


@for_each("floor", [2.0**-128, 1e-40, 1e-300])
def test_a_floor_whose_reciprocal_overflows_is_refused(floor):
    """A scale so small that dividing by it overflows in FP32 would write inf or NaN into the parameters."""
    assert "min_scale" in refusal(min_scale=floor)


def test_a_precision_for_what_is_not_sent_is_refused():
    """One process sends no gradients: the message names the option that is missing."""
    assert "distributed_amp=True" in refusal(communication_precision="FP16")
    config = MixedPrecisionConfig(distributed_amp=True, communication_precision="bf16")
    assert config.communication_precision is PrecisionMode.BF16


@pytest.mark.parametrize("name", ["growth_interval", "hysteresis"])
def test_a_count_beyond_int32_is_refused(name):
    """Clean steps are counted in int32, where a larger interval wraps round and grows the scale in every step."""
    assert name in refusal(**{name: 2**31})


@pytest.mark.parametrize("init_scale", [1.0, 1024.0])
def test_an_initial_scale_out_of_bounds_is_refused(init_scale):
    """The message names the value and the bounds that it is out of."""
    message = refusal(init_scale=init_scale, min_scale=2.0, max_scale=512.0)
    assert f"init_scale={init_scale}" in message
    assert "min_scale=2.0" in message
    assert "max_scale=512.0" in message


@pytest.mark.parametrize("init_scale", [2.0, 512.0])
def test_the_bounds_belong_to_the_allowed_range(init_scale):
    """The scale may start at its floor or at its ceiling."""
    config = MixedPrecisionConfig(init_scale=init_scale, min_scale=2.0, max_scale=512.0)
    assert config.init_scale == init_scale


# ---- enumerations -------------------------------------------------------------------------------------------

NAMES = [
    (option, member, spell)
    for option, enumeration in (("precision_mode", PrecisionMode), ("scaling_strategy", ScalingStrategy))
    for member in enumeration
    for spell in (str.lower, str.upper, str.title)
]


@for_each(("option", "member", "spell"), NAMES)
def test_names_are_accepted_in_any_case(option, member, spell):
    """A string in any case is the enumeration's member."""
    assert getattr(MixedPrecisionConfig(**{option: spell(member.value)}), option) is member


# ---- all options --------------------------------------------------------------------------------------------


def test_no_option_is_silently_ignored():
    """Every option is used by name somewhere else than where it is defined and checked."""
    files = Path(hf_amp.__file__).parent.rglob("*.py")
    own = ("config.py", "contradictions.py")
    sources = [path.read_text(encoding="utf-8") for path in files if path.name not in own]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    assert set(OPTIONS) - used == set()


def test_the_defaults_are_available():
    """Leaving everything out is never an error, nor is saying the defaults."""
    defaults = {name: option.default for name, option in OPTIONS.items()}
    assert MixedPrecisionConfig(**defaults) == MixedPrecisionConfig()


def test_the_scaling_defaults_are_those_of_the_stock_scaler():
    """Nobody's run changes by taking hf_amp's defaults."""
    stock = torch.amp.GradScaler("cpu")
    config = MixedPrecisionConfig()
    assert config.init_scale == stock._init_scale
    assert config.growth_factor == stock.get_growth_factor()
    assert config.backoff_factor == stock.get_backoff_factor()
    assert config.growth_interval == stock.get_growth_interval()


# ---- frozen, plain data -------------------------------------------------------------------------------------


@for_each("name", OPTIONS)
def test_a_config_is_frozen(name):
    """An option cannot be changed after it was checked."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(MixedPrecisionConfig(), name, OPTIONS[name].default)


def test_options_are_keywords_only():
    """Positions mean nothing."""
    with pytest.raises(TypeError):
        MixedPrecisionConfig(True)


POSITIVE = st.floats(SMALLEST_SCALE, LARGEST_SCALE)
COUNTS = st.integers(1, 10**6)


@st.composite
def valid_options(draw):
    """Options that together make a config."""
    low, start, high = sorted(draw(st.tuples(POSITIVE, POSITIVE, POSITIVE)))
    optional = {
        "precision_mode": st.sampled_from([None, *PrecisionMode]),
        "scaling_strategy": st.sampled_from(list(ScalingStrategy)),
        "half_parameters": st.just(None),
        "growth_factor": st.floats(1, 1e6, exclude_min=True),
        "backoff_factor": st.floats(0, 1, exclude_min=True, exclude_max=True),
        "growth_interval": COUNTS,
        "hysteresis": COUNTS,
        "monitoring_interval": COUNTS,
        **{name: st.booleans() for name, option in OPTIONS.items() if isinstance(option.default, bool)},
    }
    bounds = {"min_scale": low, "init_scale": start, "max_scale": high}
    return {**bounds, **draw(st.fixed_dictionaries({}, optional=optional))}


@given(valid_options())
def test_plain_data_gives_an_equal_config(options):
    """`to_dict` and `from_dict` are inverse, also through JSON and YAML text."""
    config = MixedPrecisionConfig(**options)
    plain = config.to_dict()
    assert MixedPrecisionConfig.from_dict(plain) == config
    assert MixedPrecisionConfig.from_dict(json.loads(json.dumps(plain))) == config
    assert MixedPrecisionConfig.from_dict(yaml.safe_load(yaml.safe_dump(plain))) == config


@given(valid_options())
def test_a_config_keeps_what_it_was_given(options):
    """Every option passed is read back, every other one is at its default."""
    config = MixedPrecisionConfig(**options)
    expected = {name: options.get(name, option.default) for name, option in OPTIONS.items()}
    assert {name: getattr(config, name) for name in OPTIONS} == expected


def test_plain_data_holds_every_option_and_no_objects():
    """Every field is there, and only types that JSON and YAML have."""
    plain = MixedPrecisionConfig(precision_mode="mixed").to_dict()
    assert list(plain) == list(OPTIONS)
    assert {type(value) for value in plain.values()} <= {bool, int, float, str, list, type(None)}
    assert not any(isinstance(value, enum.Enum) for value in plain.values())


@for_each(
    ("typo", "nearest"),
    [
        ("init_scal", "init_scale"),
        ("growthfactor", "growth_factor"),
        ("Backoff_Factor", "backoff_factor"),
        ("precision", "precision_mode"),
        ("monitor_interval", "monitoring_interval"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_option(typo, nearest):
    """An unknown option is an error that names it, the nearest one, and all there are."""
    with pytest.raises(UnknownOptionError) as caught:
        MixedPrecisionConfig.from_dict({typo: 1})
    message = str(caught.value)
    assert f"no option {typo!r}; the nearest is {nearest!r}" in message
    assert [name for name in OPTIONS if name not in message] == []


@for_each("key", ["", "zzz", 7, None, ("init_scale",)])
def test_a_key_like_no_option_is_still_a_clear_error(key):
    """Whatever the key, the answer is an UnknownOptionError, which is a ConfigError."""
    with pytest.raises(UnknownOptionError, match="Allowed: enabled"):
        MixedPrecisionConfig.from_dict({key: 1})


@for_each("old", ["stop_when_stalled", "stop_when_hopeless"])
def test_former_names_of_stop_work(old):
    """As keywords, in plain data and in files of earlier versions; a wrong value is refused by that name."""
    for made in (MixedPrecisionConfig(**{old: True}), MixedPrecisionConfig.from_dict({old: True})):
        assert made == MixedPrecisionConfig(on_stalled="stop")
    assert MixedPrecisionConfig.from_dict({old: False}).on_stalled == "report"
    assert MixedPrecisionConfig.from_dict({old: True, "on_stalled": "rewind"}).on_stalled == "rewind"
    assert "its name is on_stalled='stop' now" in refusal(**{old: "yes"})


@for_each("options", [[("init_scale", 2.0)], "init_scale", None, 3])
def test_plain_data_must_be_a_mapping(options):
    """Anything but a mapping is named by its type."""
    with pytest.raises(ConfigError, match=f"{type(options).__name__}: pass a mapping"):
        MixedPrecisionConfig.from_dict(options)


# ---- files --------------------------------------------------------------------------------------------------

CONTENT = {
    ".json": '{"init_scale": 1024, "scaling_strategy": "constant"}',
    ".yaml": "init_scale: 1024\nscaling_strategy: constant\n",
    ".yml": "{init_scale: 1024, scaling_strategy: CONSTANT}",
}


@for_each("as_path", [Path, str])
@for_each("suffix", CONTENT)
def test_a_file_gives_the_config_that_it_holds(tmp_path, suffix, as_path):
    """JSON and YAML, by a Path or a string."""
    path = tmp_path / f"amp{suffix}"
    path.write_text(CONTENT[suffix], encoding="utf-8")
    expected = MixedPrecisionConfig(init_scale=1024, scaling_strategy="CONSTANT")
    assert MixedPrecisionConfig.from_file(as_path(path)) == expected


@for_each(
    ("name", "content", "words"),
    [
        ("amp.json", b'{"init_scale": ', "not valid JSON"),
        ("amp.yaml", b"init_scale: [1", "not valid YAML"),
        ("amp.yml", b"a: b: c", "not valid YML"),
        ("amp.yaml", b"!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("amp.json", b"\xff\xfe", "cannot be read"),
        ("amp.toml", b"init_scale = 1", "must end in .json, .yaml or .yml"),
        ("amp", b"init_scale: 1", "must end in .json, .yaml or .yml"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(tmp_path, name, content, words):
    """Broken, undecodable and other files: a ConfigError with the path and what is wrong."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        MixedPrecisionConfig.from_file(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


@for_each("suffix", CONTENT)
def test_a_missing_file_is_refused_by_name(tmp_path, suffix):
    """A path that leads nowhere is a ConfigError with that path."""
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        MixedPrecisionConfig.from_file(tmp_path / f"gone{suffix}")
    assert f"gone{suffix}" in str(caught.value)


def test_a_folder_is_no_config_file(tmp_path):
    """A path that cannot be opened as a file is a ConfigError."""
    (tmp_path / "amp.yaml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        MixedPrecisionConfig.from_file(tmp_path / "amp.yaml")


@for_each(
    ("name", "content", "words"),
    [
        ("amp.json", "[1, 2]", "list: pass a mapping"),
        ("amp.yaml", "- init_scale", "list: pass a mapping"),
        ("amp.yaml", "", "NoneType: pass a mapping"),
        ("amp.json", '{"init_scal": 2}', "the nearest is 'init_scale'"),
        ("amp.json", '{"init_scale": NaN}', "init_scale must be a positive finite number"),
        ("amp.yaml", "growth_interval: 0", "growth_interval must be"),
        ("amp.yaml", "init_scale: .inf", "init_scale must be a positive finite number"),
    ],
)
def test_a_file_with_wrong_options_is_refused(tmp_path, name, content, words):
    """A readable file goes through the same checks as plain data."""
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        MixedPrecisionConfig.from_file(path)
    assert words in str(caught.value)


# ---- number formats -----------------------------------------------------------------------------------------

# Source: IEEE 754-2019, table 3.5, and bfloat16: largest exponent, explicit bits of the significand.
FORMATS = [(FP16_FORMAT, 15, 10), (BF16_FORMAT, 127, 7), (FP32_FORMAT, 127, 23)]


@for_each(("number_format", "exponent", "bits"), FORMATS)
def test_ranges_are_those_of_the_standard(number_format, exponent, bits):
    """Largest, smallest normal and smallest subnormal follow from the bits of the format."""
    assert number_format.largest == (2 - 2.0**-bits) * 2.0**exponent
    assert number_format.smallest_normal == 2.0 ** (1 - exponent)
    assert number_format.smallest_subnormal == 2.0 ** (1 - exponent - bits)


@for_each("number_format", [FP16_FORMAT, BF16_FORMAT, FP32_FORMAT])
def test_ranges_are_those_of_torch(number_format):
    """What a tensor of the format holds, and what `torch.finfo` says, agree with the record."""
    facts = torch.finfo(number_format.dtype)
    smallest = torch.tensor(number_format.smallest_subnormal, dtype=number_format.dtype)
    assert (number_format.largest, number_format.smallest_normal) == (facts.max, facts.smallest_normal)
    assert smallest.item() == number_format.smallest_subnormal
    assert torch.tensor(number_format.smallest_subnormal / 2, dtype=number_format.dtype).item() == 0
    assert torch.tensor(2 * number_format.largest, dtype=number_format.dtype).isinf()


def test_fp16_ends_at_65504_and_at_2_to_the_minus_24():
    """The two numbers that every FP16 story is about."""
    assert (FP16_FORMAT.largest, FP16_FORMAT.smallest_subnormal) == (65504.0, 2.0**-24)


def test_the_scale_bounds_follow_from_the_formats():
    """The default floor is FP16's smallest value; the ceiling is FP32's largest power of two."""
    config = MixedPrecisionConfig()
    assert config.min_scale == SMALLEST_SCALE == 2.0**-24
    assert config.max_scale == LARGEST_SCALE == 2.0**127


@for_each(
    ("mode", "number_format"),
    [
        (PrecisionMode.FP16, FP16_FORMAT),
        (PrecisionMode.MIXED, FP16_FORMAT),
        (PrecisionMode.BF16, BF16_FORMAT),
        (PrecisionMode.FP32, FP32_FORMAT),
    ],
)
def test_a_mode_computes_in_its_format(mode, number_format):
    """MIXED is FP16 in its matrix products."""
    assert mode.number_format is number_format


@for_each(
    ("options", "hint"),
    [
        ({"enabled": "false"}, "write true or false without quotes"),
        ({"init_scale": "1e3"}, "YAML wants a point in 1.0e-6"),
        ({"max_scale": "1.0"}, "write numbers without quotes"),
    ],
)
def test_text_in_the_place_of_a_value_says_how_to_write_it(options: dict[str, object], hint: str) -> None:
    """As configuration files give it: the error ends with what to change there."""
    with pytest.raises(ConfigError, match=f"It is text: .*{hint}"):
        MixedPrecisionConfig.from_dict(options)
