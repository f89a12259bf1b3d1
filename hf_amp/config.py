"""`MixedPrecisionConfig`: every option, checked when it is made, and described by `help(MixedPrecisionConfig)`."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, TypeGuard, TypeVar, cast

import torch

from hf_amp.errors import ConfigError, UnknownOptionError
from hf_amp.precision import FP32_FORMAT, LARGEST_SCALE, SMALLEST_SCALE, PrecisionMode, ScalingStrategy
from hf_amp.schedule import WORDS, PrecisionSchedule

LARGEST_COUNT = torch.iinfo(torch.int32).max
"""Steps are counted in int32 on the device."""


class Allowed(str):
    """The values that an option takes: in words for people, which the text is, and as a check."""

    accepts: Callable[[Any], bool]

    def __new__(cls, words: str, accepts: Callable[[Any], bool]) -> Allowed:
        allowed = super().__new__(cls, words)
        allowed.accepts = accepts
        return allowed


def safe_repr(value: Any) -> str:
    """`repr(value)`, also of what has none, such as an int of more than 4300 digits."""
    try:
        return repr(value)
    except Exception:  # whatever a class of the user's raises
        return f"<{type(value).__name__} that cannot be shown>"


def is_real(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number of Python's; a switch is none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and -sys.float_info.max <= value <= sys.float_info.max


def one_of(*values: str) -> Allowed:
    """One of these texts."""
    return Allowed(f"one of {', '.join(map(repr, values))}", lambda v: isinstance(v, str) and v in values)


def or_none(allowed: Allowed) -> Allowed:
    """The same, or None."""
    return Allowed(f"None or {allowed}", lambda v: v is None or allowed.accepts(v))


def member_of(enumeration: type[enum.Enum]) -> Allowed:
    """A member of `enumeration`."""
    return Allowed(f"one of {', '.join(enumeration.__members__)}", lambda v: isinstance(v, enumeration))


NAMES = Allowed(
    "a list of names, globs or classes of modules",
    lambda v: isinstance(v, tuple) and all(isinstance(name, str) and name for name in v),
)
PLAN = Allowed(
    "None or a plan of hf_amp.choose_precision, a dict of one, or the path of its JSON file", lambda v: v is None
)
SWITCH = Allowed("True or False", lambda v: isinstance(v, bool))
POSITIVE = Allowed("a positive finite number", lambda v: is_real(v) and v > 0)
AT_LEAST_ONE = Allowed("a finite number of at least 1", lambda v: is_real(v) and v >= 1)
ABOVE_ONE = Allowed("a finite number above 1", lambda v: is_real(v) and v > 1)
FRACTION = Allowed("a number above 0 and below 1", lambda v: is_real(v) and 0 < v < 1)
COUNT = Allowed(
    f"a whole number from 1 to {LARGEST_COUNT}",
    lambda v: isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= LARGEST_COUNT,
)
STEPS = Allowed(f"a whole number of steps from 1 to {LARGEST_COUNT}", COUNT.accepts)
_SCHEDULE = Allowed(WORDS, lambda v: isinstance(v, PrecisionSchedule))
_COMMUNICATION = Allowed("FP16 or BF16", lambda v: v is PrecisionMode.FP16 or v is PrecisionMode.BF16)


def check_keywords(config: type[Any], names: Iterable[Any]) -> None:
    """Raises `UnknownOptionError`, which names the nearest option, where one of `names` is no field of `config`."""
    known = [field.name for field in dataclasses.fields(config)]
    for name in names:
        if name in known:
            continue
        if name in REMOVED_OPTIONS:
            raise UnknownOptionError(f"{config.__name__} has no option {name!r} any more: {REMOVED_OPTIONS[name][1]}.")
        near = difflib.get_close_matches(safe_repr(name).strip("'").lower(), known, n=1, cutoff=0.0)[0]
        raise UnknownOptionError(
            f"{config.__name__} has no option {safe_repr(name)}; the nearest is {near!r}. Allowed: {', '.join(known)}."
        )


_Config = TypeVar("_Config")


@functools.cache
def allowed_values(config: type[Any]) -> dict[str, Allowed]:
    """Name of an option → the values that it takes, which its annotation holds."""
    hints = typing.get_type_hints(config, include_extras=True)
    return {field.name: hints[field.name].__metadata__[0] for field in dataclasses.fields(config)}


def described_and_checked(config: type[_Config]) -> type[_Config]:
    """A dataclass whose options are described as `OPTIONS.md` does, and that answers an unknown keyword as `check_keywords`.

    The docstring lists them, and `transformers.HfArgumentParser` finds them in the fields' metadata.
    """
    init = config.__init__

    @functools.wraps(init)
    def checked_init(self: _Config, *arguments: Any, **options: Any) -> None:
        options = renamed(options)
        check_keywords(config, options)
        init(self, *arguments, **options)

    config.__init__ = checked_init  # type: ignore[assignment, method-assign]
    table = files("hf_amp").joinpath("OPTIONS.md").read_text(encoding="utf-8")
    descriptions = dict(re.findall(r"^\| `(\w+)` \|.*?\|.*?\| (.*) \|$", table, re.MULTILINE))
    listed, record = [], cast(Any, config)
    for field in dataclasses.fields(record):
        text = descriptions[field.name]
        field.metadata = types.MappingProxyType({"help": text})
        text = f"{field.name}: {text} Allowed: {allowed_values(record)[field.name]}. Default: {shown_default(field)}."
        listed.append(textwrap.fill(text, width=110, initial_indent=" " * 8, subsequent_indent=" " * 12))
    config.__doc__ = f"{(config.__doc__ or '').rstrip()}\n\n    Args:\n" + "\n".join(listed) + "\n    "
    return config


def shown_default(field: dataclasses.Field[Any]) -> str:
    """The default of an option as people write it."""
    return str(getattr(field.default, "value", field.default))


KEEPS_UPDATES = ("master_weights", "stochastic_rounding", "kahan")
"""Values of `half_parameters` with which parameters stay in half precision and lose no update."""
LOOP_OPTIONS = ("memory_efficient", "gradient_accumulation_friendly")
"""Options that only loops which are ours can follow."""
STOP_SWITCHES = ("stop_when_hopeless", "stop_when_stalled")
"""What `on_stalled="stop"` was called before. Saved configs may hold them."""
REMOVED_OPTIONS: Mapping[str, tuple[Any, str]] = {
    "consecutive_hysteresis": (False, "only a growth refills hysteresis"),
    "overflow_tolerance": (0.0, "use hysteresis, or scaling_strategy=ADAPTIVE"),
    "recheck_gradients": (False, "call unscale_ after what changes gradients"),
    "fallback_window": (128, "fallback_threshold is judged over 128 steps"),
    "on_overflow": ("skip", "pass on_overflow= to the trainer or manager"),
    "accumulation_steps": (1, "pass accumulation_steps= to the trainer or manager"),
    "clip_norm": (None, "pass clip_norm= to the trainer or manager"),
}
"""Option of hf_amp 0.1 → its default, at which a saved config may hold it, and what to do instead."""


def renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with those that have another name now under that one; `ConfigError` where the value of such a one is wrong."""
    current = dict(options)
    for name in filter(current.__contains__, STOP_SWITCHES):
        stops = current.pop(name)
        if not SWITCH.accepts(stops):
            raise ConfigError(f"{name}={safe_repr(stops)}: it must be {SWITCH}; its name is on_stalled='stop' now.")
        if stops:
            current.setdefault("on_stalled", "stop")
    return current


@described_and_checked
@dataclass(frozen=True, kw_only=True)
class MixedPrecisionConfig:
    """Every option of hf_amp. Frozen; wrong names, values and combinations raise `ConfigError` here, not in step 1.

    All options are keyword arguments, and the defaults are what we would run in production. Names of members of an
    enumeration are accepted as strings, in any case. `OPTIONS.md` says what each is for.
    """

    enabled: Annotated[bool, SWITCH] = True
    precision_mode: Annotated[PrecisionMode | None, or_none(member_of(PrecisionMode))] = None
    half_parameters: Annotated[str | None, or_none(one_of("error", "upcast", *KEEPS_UPDATES))] = None
    scaling_strategy: Annotated[ScalingStrategy, member_of(ScalingStrategy)] = ScalingStrategy.DYNAMIC
    init_scale: Annotated[float, POSITIVE] = 2.0**16
    growth_factor: Annotated[float, ABOVE_ONE] = 2.0
    backoff_factor: Annotated[float, FRACTION] = 0.5
    growth_interval: Annotated[int, STEPS] = 2000
    hysteresis: Annotated[int, COUNT] = 1
    overflow_budget: Annotated[float, FRACTION] = 1e-3
    outlier_headroom: Annotated[float, AT_LEAST_ONE] = 64.0
    min_scale: Annotated[float, POSITIVE] = SMALLEST_SCALE
    max_scale: Annotated[float, POSITIVE] = LARGEST_SCALE
    fold_clipping: Annotated[bool | None, or_none(SWITCH)] = None
    enable_monitoring: Annotated[bool, SWITCH] = True
    monitoring_interval: Annotated[int, STEPS] = 10
    monitor_modules: Annotated[bool, SWITCH] = False
    log_all_metrics: Annotated[bool, SWITCH] = False
    emulate: Annotated[bool, SWITCH] = True
    fp32_modules: Annotated[tuple[str, ...], NAMES] = ()
    plan: Annotated[str | None, PLAN] = None
    precision_schedule: Annotated[PrecisionSchedule | None, or_none(_SCHEDULE)] = None
    total_steps: Annotated[int | None, or_none(STEPS)] = None
    automatic_fallback: Annotated[bool, SWITCH] = True
    fallback_threshold: Annotated[float, FRACTION] = 1e-6
    recovery_steps: Annotated[int, STEPS] = 1000
    patience: Annotated[int, STEPS] = 50
    on_stalled: Annotated[str, one_of("report", "stop", "rewind")] = "report"
    loss_spikes: Annotated[bool, SWITCH] = False
    max_rewinds: Annotated[int, COUNT] = 3
    good_after: Annotated[int, STEPS] = 100
    memory_efficient: Annotated[bool, SWITCH] = False
    gradient_accumulation_friendly: Annotated[bool, SWITCH] = False
    distributed_amp: Annotated[bool, SWITCH] = False
    communication_precision: Annotated[PrecisionMode | None, or_none(_COMMUNICATION)] = None
    sync_grad_scaler: Annotated[bool, SWITCH] = False

    def __post_init__(self) -> None:
        self._take_plan()
        for name, enumeration in (
            ("precision_mode", PrecisionMode),
            ("scaling_strategy", ScalingStrategy),
            ("communication_precision", PrecisionMode),
        ):
            value = getattr(self, name)
            if isinstance(value, str) and value.upper() in enumeration.__members__:
                object.__setattr__(self, name, enumeration[value.upper()])
        if self.precision_schedule is not None and not isinstance(self.precision_schedule, PrecisionSchedule):
            object.__setattr__(self, "precision_schedule", PrecisionSchedule(self.precision_schedule))
        if isinstance(self.fp32_modules, (list, tuple)):
            names = tuple(each.__name__ if isinstance(each, type) else each for each in self.fp32_modules)
            if NAMES.accepts(names):
                object.__setattr__(self, "fp32_modules", names)
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), allowed_values(MixedPrecisionConfig)[field.name]
            if not allowed.accepts(value):
                raise ConfigError(
                    f"MixedPrecisionConfig({field.name}={safe_repr(value)}): {field.name} must be {allowed}; "
                    f"leave it out for the default ({shown_default(field)}).{_hint(value, field.default)}"
                )
        _check_formats(self)
        _check_scale(self)

    def _take_plan(self) -> None:
        """Turns `plan` into the options that it stands for; what is none stays, and is refused as any wrong value."""
        given: Any = self.plan
        found = given.to_plain() if hasattr(given, "to_plain") else given
        if isinstance(found, (str, Path)):
            try:
                found = json.loads(Path(found).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"MixedPrecisionConfig(plan={safe_repr(given)}): cannot be read ({safe_repr(error)[:200]}); it must be the "
                    "path of a JSON file that hf-amp choose --out wrote."
                ) from error
        found = found.get("plan", found) if isinstance(found, Mapping) else None
        modules = found.get("modules") if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping) or set(found) != {"default", "modules"} or not isinstance(modules, Mapping):
            return
        mode = PrecisionMode.__members__.get(str(found["default"]))
        if mode is None or set(modules.values()) - {PrecisionMode.FP32.value} or not NAMES.accepts(tuple(modules)):
            return
        asked = self.precision_mode
        if asked is not None and str(getattr(asked, "value", asked)).upper() != mode.value:
            of = "FP16 autocast (MIXED)" if mode is PrecisionMode.MIXED else mode.value
            raise ConfigError(
                f"MixedPrecisionConfig(precision_mode={safe_repr(asked)}) with a plan: the plan is for {of}; leave "
                "precision_mode out, which the plan sets."
            )
        object.__setattr__(self, "precision_mode", mode)
        if isinstance(self.fp32_modules, (list, tuple)):
            named = [name for name in modules if name not in self.fp32_modules]
            object.__setattr__(self, "fp32_modules", (*self.fp32_modules, *named))
        object.__setattr__(self, "plan", None)

    @classmethod
    def or_default(cls, config: Any, whose: str, besides: str = "") -> MixedPrecisionConfig:
        """`config` as a caller has passed it to `whose`; the defaults where it is None.

        Args:
            besides: what `whose` takes too, or what is to be known, for the error.

        Raises:
            ConfigError: it is something else.
        """
        if config is None or isinstance(config, cls):
            return config or cls()
        raise ConfigError(
            f"{whose}(config={safe_repr(config)}): pass a MixedPrecisionConfig{besides}; leave it out for the defaults."
        )

    @classmethod
    def from_any(cls, config: Any, options: Mapping[str, Any], whose: str) -> MixedPrecisionConfig:
        """A config from a config, a mapping, or the path of a file, or from options as keywords, as `whose` takes them.

        Raises:
            ConfigError: it is something else, or both were given.
        """
        if options and config is not None:
            raise ConfigError(
                f"{whose} got a config and options as keywords ({', '.join(map(str, options))}): pass one or the other."
            )
        if options or isinstance(config, Mapping):
            return cls.from_dict(options or config)
        if isinstance(config, (str, Path)):
            return cls.from_file(config)
        besides = ", a dict of its options, the path of a YAML or JSON file, or options as keywords"
        return cls.or_default(config, whose, besides)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> MixedPrecisionConfig:
        """A config from plain data, such as parsed YAML or JSON, or what `to_dict` of hf_amp 0.1 has given.

        Raises:
            UnknownOptionError: a key is no option; the nearest option is named.
            ConfigError: a value is wrong.
        """
        if not isinstance(options, Mapping):
            raise ConfigError(
                f"MixedPrecisionConfig.from_dict got {type(options).__name__}: pass a mapping of option names to "
                "values."
            )
        kept = {
            name: value
            for name, value in renamed(options).items()
            if name not in REMOVED_OPTIONS or value != REMOVED_OPTIONS[name][0]
        }
        check_keywords(cls, kept)
        return cls(**kept)

    @classmethod
    def from_file(cls, path: str | Path) -> MixedPrecisionConfig:
        """A config from a `.json`, `.yaml` or `.yml` file that holds one mapping.

        Raises:
            ConfigError: the file cannot be read, is neither format, or holds a wrong option.
        """
        path = Path(path)
        if path.suffix not in (".json", ".yaml", ".yml"):
            raise ConfigError(f"{path}: a config file must end in .json, .yaml or .yml.")
        import yaml  # a dependency of accelerate and transformers; not needed to import hf_amp

        try:
            text = path.read_text(encoding="utf-8")
            options = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); pass the path of a readable config file.") from error
        except Exception as error:  # json and yaml raise unrelated trees
            raise ConfigError(f"{path}: not valid {path.suffix[1:].upper()} ({error}); correct the file.") from error
        try:
            return cls.from_dict(options)
        except ConfigError as error:
            raise type(error)(f"{path}: {error}") from error

    def refuse(self, names: Collection[str], why: str) -> None:
        """For integrations that cannot follow every option.

        Raises:
            ConfigError: one of the options `names` is not at its default.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in names and value != field.default:
                raise ConfigError(f"MixedPrecisionConfig({field.name}={value!r}): {why}; leave {field.name} out.")

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` turns back into an equal config; fit for JSON and YAML."""
        plain = dataclasses.asdict(self)
        plain["fp32_modules"] = list(self.fp32_modules)
        plain["precision_schedule"] = self.precision_schedule and self.precision_schedule.to_plain()
        return {name: value.value if isinstance(value, enum.Enum) else value for name, value in plain.items()}


def _hint(value: Any, default: Any) -> str:
    """What to do about text in the place of a number or a switch, as configuration files give it."""
    if not isinstance(value, str):
        return ""
    if isinstance(default, bool):
        return " It is text: write true or false without quotes."
    if isinstance(default, (int, float)) or value.replace(".", "", 1).isdigit():
        return " It is text: write numbers without quotes; YAML wants a point in 1.0e-6."
    return ""


def _check_formats(config: MixedPrecisionConfig) -> None:
    if config.precision_mode is PrecisionMode.FP16 and config.half_parameters not in (None, "master_weights"):
        raise ConfigError(
            f"MixedPrecisionConfig(precision_mode=FP16, half_parameters={config.half_parameters!r}): FP16 trains "
            "half-precision parameters with FP32 master weights; leave half_parameters out, or train FP32 parameters "
            "under FP16 autocast with precision_mode=MIXED."
        )
    if config.precision_mode is PrecisionMode.DYNAMIC and config.half_parameters in KEEPS_UPDATES:
        raise ConfigError(
            f"MixedPrecisionConfig(precision_mode=DYNAMIC, half_parameters={config.half_parameters!r}): DYNAMIC moves between "
            "precisions, which needs FP32 parameters; leave half_parameters out, or choose another precision_mode."
        )
    if config.precision_schedule is not None:
        config.precision_schedule.check_options(config.precision_mode, config.total_steps)
    if config.communication_precision is not None and not config.distributed_amp:
        raise ConfigError(
            f"MixedPrecisionConfig(communication_precision={config.communication_precision.value}): nothing is sent "
            "unless several processes train together; set distributed_amp=True too, or leave it out."
        )


def _check_scale(config: MixedPrecisionConfig) -> None:
    if config.min_scale < FP32_FORMAT.smallest_normal:
        raise ConfigError(
            f"MixedPrecisionConfig(min_scale={config.min_scale!r}): the floor must be at least "
            f"{FP32_FORMAT.smallest_normal!r} (2^-126), below which gradients cannot be divided by the scale in FP32; "
            f"leave min_scale out for the default ({SMALLEST_SCALE!r})."
        )
    if not config.min_scale <= config.max_scale <= LARGEST_SCALE:
        raise ConfigError(
            f"MixedPrecisionConfig(min_scale={config.min_scale!r}, max_scale={config.max_scale!r}): the floor must "
            f"not be above the ceiling, nor the ceiling above {LARGEST_SCALE!r} (2^127, so that the scale and "
            "its reciprocal stay finite in FP32); lower min_scale or set max_scale in between."
        )
    if not config.min_scale <= config.init_scale <= config.max_scale:
        raise ConfigError(
            f"MixedPrecisionConfig(min_scale={config.min_scale!r}, init_scale={config.init_scale!r}, max_scale={config.max_scale!r}): "
            "init_scale must lie between the others; move it or widen the bounds."
        )
