"""`MixedPrecisionConfig`: every option, checked."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch

from hf_amp.errors import ConfigError, UnknownOptionError
from hf_amp.precision import FP32_FORMAT, LARGEST_SCALE, SMALLEST_SCALE, PrecisionMode, ScalingStrategy

LARGEST_COUNT = torch.iinfo(torch.int32).max
"""Steps are counted in int32 on the device."""


class Allowed(str):
    """The values that an option takes: in words for people, which the text is, and as a check.

    A text, because `transformers.HfArgumentParser` hands a field's metadata to argparse, which knows `help` alone.
    """

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


def is_count(value: Any) -> bool:
    """Whether `value` is a whole number from 1 on that int32 holds; a switch is none."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_COUNT


SWITCH = Allowed("True or False", lambda v: isinstance(v, bool))
SWITCH_OR_NONE = Allowed("None, True or False", lambda v: v is None or isinstance(v, bool))
POSITIVE = Allowed("a positive finite number", lambda v: is_real(v) and v > 0)
POSITIVE_OR_NONE = Allowed("None or a positive finite number", lambda v: v is None or POSITIVE.accepts(v))
AT_LEAST_ONE = Allowed("a finite number of at least 1", lambda v: is_real(v) and v >= 1)
ABOVE_ONE = Allowed("a finite number above 1", lambda v: is_real(v) and v > 1)
FRACTION = Allowed("a number above 0 and below 1", lambda v: is_real(v) and 0 < v < 1)
SHARE = Allowed("a number from 0 up to, but not, 1", lambda v: is_real(v) and 0 <= v < 1)
ONE_OF_SKIP_RETRY = Allowed("'skip' or 'retry'", lambda v: isinstance(v, str) and v in ("skip", "retry"))
STEPS = Allowed(f"a whole number of steps from 1 to {LARGEST_COUNT}", is_count)
COUNT = Allowed(f"a whole number from 1 to {LARGEST_COUNT}", is_count)


def option_field(default: Any, allowed: Allowed) -> Any:
    """A dataclass field that `allowed` checks."""
    return dataclasses.field(default=default, metadata={"help": allowed})


def check_names(config: type[Any], names: Iterable[Any]) -> None:
    """Raises `UnknownOptionError`, which names the nearest option, where one of `names` is no field of `config`."""
    known = [option.name for option in dataclasses.fields(config)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(safe_repr(name).strip("'").lower(), known, n=1, cutoff=0.0)[0]
            raise UnknownOptionError(
                f"{config.__name__} has no option {safe_repr(name)}; the nearest is {near!r}. Allowed: {', '.join(known)}."
            )


_Config = TypeVar("_Config")


def check_keywords(config: type[_Config]) -> type[_Config]:
    """A dataclass that answers an unknown keyword as `check_names` does, not with Python's TypeError."""
    init = config.__init__

    @functools.wraps(init)
    def checked_init(self: _Config, *arguments: Any, **options: Any) -> None:
        check_names(config, options)
        init(self, *arguments, **options)

    config.__init__ = checked_init  # type: ignore[assignment, method-assign]
    return config


def hint(value: Any, default: Any) -> str:
    """What to do about text in the place of a number or a switch, as configuration files give it."""
    if not isinstance(value, str):
        return ""
    if isinstance(default, bool):
        return " It is text: write true or false without quotes."
    if isinstance(default, (int, float)) or value.replace(".", "", 1).isdigit():
        return " It is text: write numbers without quotes; YAML wants a point in 1.0e-6."
    return ""


def check_together(config: MixedPrecisionConfig) -> None:
    """Looks at options whose values, each allowed, contradict each other.

    Raises:
        ConfigError: two of them do; both are named, with what to do.
    """
    _check_formats(config)
    _check_scale(config)
    if config.on_overflow == "retry" and config.scaling_strategy is ScalingStrategy.PERFORMANCE_OPTIMIZED:
        raise ConfigError(
            "MixedPrecisionConfig(on_overflow='retry', scaling_strategy=PERFORMANCE_OPTIMIZED): its verdicts come one "
            "step late, when the batch is gone; use ADAPTIVE, or leave on_overflow out for the default (skip)."
        )


def _check_formats(config: MixedPrecisionConfig) -> None:
    if config.precision_mode is PrecisionMode.FP16 and config.half_parameters in ("error", "upcast"):
        raise ConfigError(
            f"MixedPrecisionConfig(precision_mode=FP16, half_parameters={config.half_parameters!r}): FP16 trains "
            "half-precision parameters with FP32 master weights; leave half_parameters out, or train FP32 parameters "
            "under FP16 autocast with precision_mode=MIXED."
        )
    if config.precision_mode is PrecisionMode.DYNAMIC and config.half_parameters == "master_weights":
        raise ConfigError(
            "MixedPrecisionConfig(precision_mode=DYNAMIC, half_parameters='master_weights'): DYNAMIC moves between "
            "precisions, which needs FP32 parameters; leave half_parameters out, or choose another precision_mode."
        )
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
            f"MixedPrecisionConfig(init_scale={config.init_scale!r}): init_scale must lie in [min_scale, "
            f"max_scale] = [{config.min_scale!r}, {config.max_scale!r}]; move it or widen the bounds."
        )


_MODE = Allowed(
    "None or one of " + ", ".join(PrecisionMode.__members__),
    lambda v: v is None or isinstance(v, PrecisionMode),
)
_HALF_PARAMETERS = Allowed(
    "None or one of 'error', 'upcast', 'master_weights'",
    lambda v: v is None or (isinstance(v, str) and v in ("error", "upcast", "master_weights")),
)
_COMMUNICATION = Allowed(
    "None, FP16 or BF16", lambda v: v is None or v is PrecisionMode.FP16 or v is PrecisionMode.BF16
)
_STRATEGY = Allowed(
    "one of " + ", ".join(ScalingStrategy.__members__), lambda v: isinstance(v, ScalingStrategy)
)

LOOP_OPTIONS = (
    "on_overflow", "accumulation_steps", "clip_norm", "memory_efficient", "gradient_accumulation_friendly",
)  # fmt: skip
"""Options that only loops which are ours can follow."""


@check_keywords
@dataclass(frozen=True, kw_only=True)
class MixedPrecisionConfig:
    """Every option of hf_amp. Frozen; wrong names, values and combinations raise `ConfigError` here, not in step 1.

    All options are keyword arguments, and the defaults are what we would run in production.
    """

    enabled: bool = option_field(True, SWITCH)
    """Off: hf_amp attaches to nothing and changes nothing; a scaler passes losses and steps through."""

    precision_mode: PrecisionMode | None = option_field(None, _MODE)
    """None follows the Trainer or Accelerator (`fp16`, `bf16` or neither), and is MIXED where there is none.
    DYNAMIC takes theirs as the narrowest of the precisions that it tries in the first steps (11 each, with BF16 where
    there are units for it and FP16 is not emulated, and FP32); it then runs the fastest. Anything that contradicts them
    is an error at attach. Names are accepted as strings, in any case."""

    half_parameters: str | None = option_field(None, _HALF_PARAMETERS)
    """What becomes of trainable FP16 and BF16 parameters, which `from_pretrained` makes by default (dtype="auto"), before
    the first step. Frozen ones are always fine. "error": refused, and named. "upcast": made FP32 in place, which loses
    nothing and doubles their memory; they stay FP32 after detach, because rounding trained weights back would lose
    what they learned. "master_weights": they stay as they are, and the optimizer moves FP32 copies of them.
    None: "upcast" in FP16 and DYNAMIC runs, which could not train otherwise and ask for FP32 parameters under autocast; a
    warning and the metric `lost_update_fraction` in BF16 and FP32 runs, which train, but lose updates; "master_weights"
    in precision_mode FP16, which allows nothing else. On a CPU's half kernels nothing falls back to FP32 then."""

    scaling_strategy: ScalingStrategy = option_field(ScalingStrategy.DYNAMIC, _STRATEGY)
    """How the loss scale is chosen; used in FP16 only. Names are accepted as strings, in any case."""

    init_scale: float = option_field(2.0**16, POSITIVE)
    """Scale of the first step; powers of two scale without rounding. Default 65536. Source: `torch.amp.GradScaler`."""

    growth_factor: float = option_field(2.0, ABOVE_ONE)
    """What a growth multiplies the scale by. Default 2, which is exact. Source: `torch.amp.GradScaler`."""

    backoff_factor: float = option_field(0.5, FRACTION)
    """What a backoff multiplies the scale by. Default 0.5, which is exact. Source: `torch.amp.GradScaler`."""

    growth_interval: int = option_field(2000, STEPS)
    """Clean optimizer steps in a row before a growth. Default 2000. Source: `torch.amp.GradScaler`."""

    hysteresis: int = option_field(1, COUNT)
    """Overflowing steps before a backoff. Default 1, as stock; DeepSpeed and Megatron use 2."""

    consecutive_hysteresis: bool = option_field(False, SWITCH)
    """Whether every clean step refills `hysteresis`, or only a growth does (default). Source: DeepSpeed, by this name."""

    overflow_tolerance: float = option_field(0.0, SHARE)
    """DYNAMIC: share of overflowing steps since the last change of scale up to which an overflow only skips.
    Default 0: every one counts. Source: fairseq's `fp16_scale_tolerance`."""

    overflow_budget: float = option_field(1e-3, FRACTION)
    """ADAPTIVE and PERFORMANCE_OPTIMIZED: probability of an overflow in a step that the scale is chosen for.
    Default 1e-3: at most one skipped step in a thousand."""

    outlier_headroom: float = option_field(64.0, AT_LEAST_ONE)
    """ADAPTIVE and PERFORMANCE_OPTIMIZED: multiple of the typical gradient amax that must stay in range, as far as underflow
    allows. Default 64: a first outlier skips no step. Where an overflow loses no batch (`on_overflow="retry"`), 1 and a
    larger `overflow_budget` let less underflow."""

    min_scale: float = option_field(SMALLEST_SCALE, POSITIVE)
    """Floor of the scale. Default 2^-24, the smallest positive FP16 value: below it the gradient that backward
    starts from is itself 0 in FP16, so no smaller scale can help."""

    max_scale: float = option_field(LARGEST_SCALE, POSITIVE)
    """Ceiling of the scale. Default 2^127, the largest power of two in FP32, where the stock scaler stops too."""

    recheck_gradients: bool = option_field(False, SWITCH)
    """Whether gradients that were unscaled before the step are looked at again in it, for what user code has made of them;
    one more read of the gradients. Default off."""

    fold_clipping: bool | None = option_field(None, SWITCH_OR_NONE)
    """Whether clipping by norm through Trainer or Accelerator folds into the optimizer step, which saves passes over the
    gradients; until the step they are then still scaled and unclipped. None: where hf_amp can see that nobody looks
    at them in between, which is a Trainer without a callback on `on_pre_optimizer_step`. True: your loop does not."""

    enable_monitoring: bool = option_field(True, SWITCH)
    """Whether gradient statistics are taken. Off: counters, scale and events remain."""

    monitoring_interval: int = option_field(10, STEPS)
    """Optimizer steps between two looks at what costs extra: the underflow fraction, and, where the strategy does not need
    it at every step, the gradient amax. Default 10."""

    monitor_modules: bool = option_field(False, SWITCH)
    """Whether headroom, underflow and the largest activation are also taken by module, every monitoring_interval steps:
    one more pass over the gradients and a forward hook on every module in those steps, and a longer log. Default off."""

    emulate: bool = option_field(True, SWITCH)
    """FP16 on a CPU: emulate it (default: FP32 arithmetic rounded to FP16 around every matrix product, close to
    FP32's speed) or run the CPU's half kernels (False: many times slower where it has no units for FP16). Other
    devices run real FP16."""

    automatic_fallback: bool = option_field(True, SWITCH)
    """Whether modules, then the whole model, leave FP16 where no scale can cure an overflow, and come back. Default on."""

    fallback_threshold: float = option_field(1e-6, FRACTION)
    """Share of non-finite gradient elements over `fallback_window`, among the overflows that the scale does not cure, up to
    which they only skip. Default 1e-6: one such step is enough, because a single one of 128 is 0.008."""

    fallback_window: int = option_field(128, STEPS)
    """Optimizer steps over which `fallback_threshold` is judged. Default 128."""

    recovery_steps: int = option_field(1000, STEPS)
    """Quiet optimizer steps before what has left FP16 is tried there again; doubled by every relapse. Default 1000, at
    which a relapse costs a thousandth of the steps at first, and ever less."""

    patience: int = option_field(50, STEPS)
    """Optimizer steps in a row that are skipped, or have no gradient but zeros, after which the run is told to be
    hopeless. Default 50, more than the 40 halvings from the default scale to the floor. Non-finite weights are hopeless
    at once."""

    stop_when_stalled: bool = option_field(False, SWITCH)
    """Whether a hopeless run is stopped, in a Trainer, at the end of the step. Default off: it is told only."""

    on_overflow: str = option_field("skip", ONE_OF_SKIP_RETRY)
    """Loops of `hf_amp.training`: "skip" (default) loses the batches of a skipped step; "retry" runs them again under the
    scale or plan that the skip has led to, from the same random numbers and running statistics, as long as a smaller
    scale or another plan may cure it. Copies the model's buffers in every step."""

    accumulation_steps: int = option_field(1, COUNT)
    """Loops of `hf_amp.training`: batches whose gradients are averaged into one optimizer step. Default 1. Trainer and
    Accelerator have their own."""

    clip_norm: float | None = option_field(None, POSITIVE_OR_NONE)
    """Loops of `hf_amp.training`: what the 2-norm of the unscaled gradients is clipped to. Default None: not clipped.
    Trainer and Accelerator have their own."""

    memory_efficient: bool = option_field(False, SWITCH)
    """Loops of `hf_amp.training`: memory before speed. Gradients are freed right after the step, and no cast of a parameter
    is kept for its next use: without it evaluation and gradient checkpointing hold up to 2 bytes a parameter more."""

    gradient_accumulation_friendly: bool = option_field(False, SWITCH)
    """Loops of `hf_amp.training`: work moves from the micro-batch to the step. Under DistributedDataParallel gradients
    are reduced with the last micro-batch only, and in the manager and in `train_window` parameters are cast once for
    all micro-batches, which holds up to 2 bytes a parameter in between."""

    distributed_amp: bool = option_field(False, SWITCH)
    """Whether several processes train together. Their verdicts are then agreed on as with `sync_grad_scaler`, and
    `communication_precision` can be chosen. `DataParallel` is one process and needs neither."""

    communication_precision: PrecisionMode | None = option_field(None, _COMMUNICATION)
    """What DistributedDataParallel reduces gradients in: None for as they are (FP32), FP16 or BF16 for half the bytes.
    Needs `distributed_amp`. Gradients are averaged scaled, so that FP16 has the range for them which the loss scale
    keeps; one that leaves it is an overflow like any other. Names are accepted as strings, in any case."""

    sync_grad_scaler: bool = option_field(False, SWITCH)
    """Whether the processes agree on every verdict and scale, by one small all-reduce a step. `attach` turns it on
    where there are several; needed by hand with DistributedDataParallel or FSDP1 outside of accelerate, unless
    `distributed_amp` is set."""

    def __post_init__(self) -> None:
        for name, enumeration in (
            ("precision_mode", PrecisionMode),
            ("scaling_strategy", ScalingStrategy),
            ("communication_precision", PrecisionMode),
        ):
            value = getattr(self, name)
            if isinstance(value, str) and value.upper() in enumeration.__members__:
                object.__setattr__(self, name, enumeration[value.upper()])
        for option in dataclasses.fields(self):
            self._check_value(option)
        check_together(self)

    def _check_value(self, option: dataclasses.Field[Any]) -> None:
        value = getattr(self, option.name)
        allowed: Allowed = option.metadata["help"]
        if not allowed.accepts(value):
            default = getattr(option.default, "value", option.default)
            raise ConfigError(
                f"MixedPrecisionConfig({option.name}={safe_repr(value)}): {option.name} must be {allowed}; "
                f"leave it out for the default ({default}).{hint(value, option.default)}"
            )

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
    def from_dict(cls, options: Mapping[str, Any]) -> MixedPrecisionConfig:
        """A config from plain data, such as parsed YAML or JSON.

        Raises:
            UnknownOptionError: a key is no option; the nearest option is named.
            ConfigError: a value is wrong.
        """
        if not isinstance(options, Mapping):
            raise ConfigError(
                f"MixedPrecisionConfig.from_dict got {type(options).__name__}: pass a mapping of option names to "
                "values."
            )
        check_names(cls, options)
        return cls(**options)

    @classmethod
    def from_file(cls, path: str | Path) -> MixedPrecisionConfig:
        """A config from a `.json`, `.yaml` or `.yml` file that holds one mapping.

        Raises:
            ConfigError: the file cannot be read, is neither format, or holds a wrong option.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                options = json.loads(text)
            elif path.suffix in (".yaml", ".yml"):
                import yaml  # a dependency of accelerate and transformers; not needed to import hf_amp

                options = yaml.safe_load(text)
            else:
                raise ConfigError(f"{path}: a config file must end in .json, .yaml or .yml.")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path}: cannot be read ({error}); pass the path of a readable config file."
            ) from error
        except ConfigError:
            raise
        except Exception as error:  # json and yaml raise unrelated trees
            raise ConfigError(
                f"{path}: not valid {path.suffix[1:].upper()} ({error}); mend the file."
            ) from error
        try:
            return cls.from_dict(options)
        except ConfigError as error:
            raise type(error)(f"{path}: {error}") from error

    def refuse(self, names: Collection[str], why: str) -> None:
        """For integrations that cannot follow every option.

        Raises:
            ConfigError: one of the options `names` is not at its default.
        """
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if option.name in names and value != option.default:
                raise ConfigError(
                    f"MixedPrecisionConfig({option.name}={value!r}): {why}; leave {option.name} out."
                )

    def without_loop_options(self) -> MixedPrecisionConfig:
        """The same, with the options that only the loops of `hf_amp.training` follow at their defaults."""
        others = {name: value for name, value in self.to_dict().items() if name not in LOOP_OPTIONS}
        return self.from_dict(others)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` turns back into an equal config; fit for JSON and YAML."""
        plain = dataclasses.asdict(self)
        return {name: value.value if isinstance(value, enum.Enum) else value for name, value in plain.items()}
