"""What `AdvancedGradScaler` promises beyond the stock class."""

from __future__ import annotations

import io
import math
import pickle

import pytest
import torch
from torch import nn

from hf_amp import AdvancedGradScaler, ConfigError, MixedPrecisionConfig, ScalerError, StateError
from hf_amp.scaling.step import SeenLosses, StatisticsRequest, Unscale, check, observe
from tests.each import for_each
from tests.host_reads import count_host_reads
from tests.reference import OverflowInBackward, adamw, assert_bitwise_equal, losses, snapshot, tiny_mlp


def scaler_with(**options: object) -> AdvancedGradScaler:
    return AdvancedGradScaler(MixedPrecisionConfig(**options), "cpu")


def one_step(scaler: AdvancedGradScaler, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_step_moves_nothing_and_never_calls_the_optimizer(fused: bool) -> None:
    """On an overflow parameters and optimizer state stay to the last bit, and `optimizer.step` is not called."""
    model, scaler = tiny_mlp(), scaler_with()
    optimizer = adamw(model, fused)
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    for step, loss in enumerate(losses(model, 4, lambda step: step == 2)):
        before = snapshot(model, optimizer)
        one_step(scaler, loss, optimizer)
        if step == 2:
            assert_bitwise_equal(before, snapshot(model, optimizer))
            assert not scaler.last_outcome.applied
    assert len(calls) == 3
    assert (scaler.applied_steps, scaler.skipped_steps) == (3, 1)


@for_each("strategy", ["CONSTANT", "DYNAMIC", "ADAPTIVE"])
@for_each("fused", [False, True])
@for_each("clip", [False, True])
def test_one_host_read_a_step(strategy: str, fused: bool, clip: bool) -> None:
    """A clean step in exact mode, monitoring on, reads the host once; sampling underflow adds none."""
    model, scaler = tiny_mlp(), scaler_with(monitoring_interval=2, scaling_strategy=strategy)
    optimizer = adamw(model, fused)
    stream = losses(model, 4, lambda step: False)
    one_step(scaler, next(stream), optimizer)
    for loss in stream:
        optimizer.zero_grad()
        with count_host_reads() as reads:
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        optimizer_reads = 0 if fused else _host_reads_of_plain_step(model)
        assert reads.count == 1 + optimizer_reads


def _host_reads_of_plain_step(model: nn.Module) -> int:
    """What the optimizer itself reads: step counters live on the CPU and are read there."""
    twin = tiny_mlp()
    optimizer = adamw(twin, fused=False)
    for _ in range(2):
        twin(torch.ones(2, 4)).sum().backward()
        with count_host_reads() as reads:
            optimizer.step()
    return reads.count


def test_floor_holds_and_the_next_clean_step_is_exact(full_size: bool) -> None:
    """After hundreds of overflows in a row, or 10,000, the scale is at its floor, and a clean step equals an FP32 step."""
    parameter, twin = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    scaler = scaler_with()
    optimizer, plain = torch.optim.SGD([parameter], lr=0.5), torch.optim.SGD([twin], lr=0.5)
    overflows = 10_000 if full_size else 500
    for _ in range(overflows):
        one_step(scaler, OverflowInBackward.apply(parameter.sum()), optimizer)
    assert scaler.get_scale() == MixedPrecisionConfig().min_scale > 0
    one_step(scaler, parameter.square().sum(), optimizer)
    twin.square().sum().backward()
    plain.step()
    assert torch.equal(parameter, twin)
    assert (scaler.applied_steps, scaler.skipped_steps) == (1, overflows)


def test_stock_scaler_corrupts_after_as_many_overflows() -> None:
    """The stock class, which has no floor, writes non-finite weights in that case: the reason for ours."""
    parameter = nn.Parameter(torch.tensor([1.0]))
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD([parameter], lr=0.5)
    for _ in range(144):
        optimizer.zero_grad()
        scaler.scale(OverflowInBackward.apply(parameter.sum())).backward()
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    assert not parameter.isfinite().all()


def test_gradients_are_divided_by_the_scale_of_their_own_backward() -> None:
    """A overflows and its update halves the scale; B, whose backward came before, is still divided by the old one."""
    scaler = scaler_with(init_scale=1024.0)
    a, b = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    optimizer_a, optimizer_b = (torch.optim.SGD([p], lr=1.0) for p in (a, b))
    scaler.scale(OverflowInBackward.apply(a.sum())).backward()
    scaler.scale(3 * b.sum()).backward()
    for optimizer in (optimizer_a, optimizer_b):
        scaler.step(optimizer)
        scaler.update()
    assert a.tolist() == [1.0]
    assert b.tolist() == [-2.0]
    assert scaler.get_scale() == 512.0


def test_one_clip_for_two_optimizers_unscales_each_once() -> None:
    """`unscale_` on both, then step and update for each in turn: neither is divided twice."""
    scaler = scaler_with(init_scale=1024.0)
    a, b = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    optimizers = [torch.optim.SGD([p], lr=1.0) for p in (a, b)]
    scaler.scale(2 * a.sum() + 3 * b.sum()).backward()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        scaler.unscale_(optimizer)
    for optimizer in optimizers:
        scaler.step(optimizer)
        scaler.update()
    assert (a.item(), b.item()) == (-1.0, -2.0)


def test_unscaled_but_never_stepped_gradients_do_not_poison_the_next_step() -> None:
    """An optimizer that was unscaled and not stepped is unscaled again for its next backward, as in the stock class."""
    scaler = scaler_with(init_scale=1024.0)
    a, b = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    optimizer_a, optimizer_b = (torch.optim.SGD([p], lr=1.0) for p in (a, b))
    scaler.scale(a.sum() + b.sum()).backward()
    scaler.unscale_(optimizer_a)
    scaler.unscale_(optimizer_b)
    scaler.step(optimizer_a)
    scaler.update()
    optimizer_b.zero_grad()
    scaler.scale(3 * b.sum()).backward()
    scaler.step(optimizer_b)
    scaler.update()
    assert b.item() == -2.0


def test_optimizer_without_gradients_is_a_no_op() -> None:
    """No gradient this step: nothing moves, nothing is counted as skipped, nothing is raised."""
    scaler, parameter = scaler_with(), nn.Parameter(torch.tensor([1.0]))
    idle = torch.optim.SGD([nn.Parameter(torch.tensor([5.0]))], lr=1.0)
    scaler.scale(parameter.sum()).backward()
    scaler.step(idle)
    scaler.update()
    assert scaler.skipped_steps == 0
    assert idle.param_groups[0]["params"][0].tolist() == [5.0]


def test_sparse_duplicates_that_overflow_only_in_sum_are_seen() -> None:
    """64000 + 64000 in FP16 is inf once coalesced, and the step is skipped."""
    parameter = nn.Parameter(torch.zeros(3))
    indices = torch.tensor([[1, 1]])
    optimizer, scaler = torch.optim.SGD([parameter], lr=1.0), scaler_with(init_scale=1.0)
    scaler.scale(parameter.sum()).backward()
    huge = torch.finfo(torch.float32).max
    parameter.grad = torch.sparse_coo_tensor(indices, torch.tensor([huge, huge]), (3,))
    scaler.step(optimizer)
    assert not scaler.last_outcome.applied
    assert parameter.tolist() == [0.0, 0.0, 0.0]


@for_each("sync", [True, False])
@for_each("mode", ["MIXED", "BF16"])
def test_complex_parameters_are_those_of_the_plain_loop(mode: str, sync: bool) -> None:
    """The stock class cannot unscale them; ours can, conjugate views too, and skips what is not finite."""
    scaler = scaler_with(precision_mode=mode, sync_grad_scaler=sync, init_scale=256.0)
    weights = [nn.Parameter(torch.tensor([1 + 2j, 3 - 1j])) for _ in range(2)]
    optimizer, plain = (torch.optim.SGD([weight], lr=0.1) for weight in weights)
    for factor in (1.0, 2.0, math.nan):
        ours, theirs = (factor * (weight.conj() * torch.tensor([1j, 2 + 1j])).real.sum() for weight in weights)
        plain.zero_grad()
        one_step(scaler, ours, optimizer)
        theirs.backward()
        _ = plain.step() if math.isfinite(factor) else None
    assert torch.equal(*weights)
    assert (scaler.applied_steps, scaler.skipped_steps, scaler.last_outcome.nan_elements) == (2, 1, 4)


def test_outcome_tells_norm_and_amax_before_clipping() -> None:
    """The outcome's norm and amax are those of the unscaled gradients, whether or not they were clipped after."""
    model, scaler = tiny_mlp(), scaler_with()
    optimizer = adamw(model, fused=False)
    model(torch.ones(2, 4)).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.zero_grad()
    scaler.scale(model(torch.ones(2, 4)).sum()).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    scaler.step(optimizer)
    assert math.isclose(scaler.last_outcome.grad_norm, gradients.norm().item(), rel_tol=1e-6)
    assert math.isclose(scaler.last_outcome.grad_amax, gradients.abs().max().item(), rel_tol=1e-6)


def test_non_finite_loss_is_told_from_a_scale_that_was_too_large() -> None:
    """Both skip; `loss_finite` tells them apart, without another host read."""
    scaler, parameter = scaler_with(), nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    one_step(scaler, OverflowInBackward.apply(parameter.sum()), optimizer)
    assert (scaler.last_outcome.applied, scaler.last_outcome.loss_finite) == (False, True)
    one_step(scaler, (parameter * torch.nan).sum(), optimizer)
    assert (scaler.last_outcome.applied, scaler.last_outcome.loss_finite) == (False, False)
    one_step(scaler, parameter.sum(), optimizer)
    assert (scaler.last_outcome.applied, scaler.last_outcome.loss_finite) == (True, True)


@for_each(
    ("misuse", "advice"),
    [
        (lambda s, o, p: s.step(o), "scale(loss).backward()"),
        (lambda s, o, p: s.update(), "step(optimizer)"),
        (lambda s, o, p: s.scale("loss"), "pass a tensor"),
        (lambda s, o, p: s.step(o, closure=lambda: None), "without a closure"),
        (lambda s, o, p: (s.scale(p.sum()).backward(), s.step(o), s.step(o)), "call update()"),
        (lambda s, o, p: (s.scale(p.sum()).backward(), s.step(o), s.unscale_(o)), "call update()"),
        (
            lambda s, o, p: [(s.scale(p.sum()).backward(), s.unscale_(o)) for _ in range(2)],
            "only after the last backward",
        ),
        (lambda s, o, p: (s.scale(p.sum()), s.update(math.inf)), "positive finite number"),
        (lambda s, o, p: (s.scale(p.sum()), s.update(torch.ones(2))), "one element"),
        (lambda s, o, p: s._per_optimizer_states[id(o)].__setitem__("stage", 0), "delete its entry"),
        (lambda s, o, p: s._per_optimizer_states.update({id(o): {}}), "delete its entry"),
    ],
)
def test_misuse_says_what_to_do(misuse: object, advice: str) -> None:
    """Calls in an order that has no meaning raise ScalerError, a RuntimeError as in the stock class."""
    parameter = nn.Parameter(torch.tensor([1.0]))
    with pytest.raises(ScalerError) as raised:
        misuse(scaler_with(), torch.optim.SGD([parameter], lr=1.0), parameter)
    assert advice in str(raised.value)
    assert isinstance(raised.value, RuntimeError)


@for_each("config", ["cuda", {"init_scale": 8.0}, False])
def test_what_the_stock_class_takes_first_is_a_clear_error(config: object) -> None:
    """Its first argument is the device, ours the options: the error shows what was passed, and where each belongs."""
    with pytest.raises(ConfigError) as raised:
        AdvancedGradScaler(config)
    assert f"AdvancedGradScaler(config={config!r}): pass a MixedPrecisionConfig" in str(raised.value)
    assert "the device is the second argument" in str(raised.value)


def test_a_scale_may_be_set_before_the_first_step() -> None:
    """The first backward uses it; without hf_amp's scaling there is none to set."""
    for options, expected in (({}, 8.0), ({"precision_mode": "BF16"}, 1.0), ({"enabled": False}, 1.0)):
        scaler = scaler_with(**options)
        scaler.set_scale(8.0)
        assert (scaler.get_scale(), scaler.scale(torch.ones(())).item()) == (expected, expected)


def test_a_scale_that_is_not_a_number_is_not_taken() -> None:
    """`update(tensor)` reads no host, so NaN raises nothing: the scale stays. A guard keeps its 1 whatever it is given."""
    scaler, guard = scaler_with(init_scale=64.0), scaler_with(precision_mode="BF16")
    for each in (scaler, guard):
        each.scale(torch.ones(()))
    for given, taken in ((torch.nan, 64.0), (torch.inf, scaler.config.max_scale), (8.0, 8.0)):
        scaler.update(torch.tensor(given))
        guard.update(torch.tensor(given))
        assert scaler.get_scale() == taken
    assert guard.state_dict()["scale"] == 1.0


@pytest.mark.parametrize("strategy", ["DYNAMIC", "PERFORMANCE_OPTIMIZED"])
def test_a_wrapped_fused_optimizer_gets_unscaled_gradients(strategy: str) -> None:
    """A wrapper whose `__getattr__` shows the fused optimizer's flag would keep `grad_scale` to itself: it is not given it."""

    class Wrapper:
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    wrapped, plain = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = Wrapper(torch.optim.SGD([wrapped], lr=0.25, fused=True))
    twin, scaler = torch.optim.SGD([plain], lr=0.25), scaler_with(scaling_strategy=strategy)
    for overflows in (False, True, False):
        loss = wrapped.square().sum()
        one_step(scaler, OverflowInBackward.apply(loss) if overflows else loss, optimizer)
        if not overflows:
            twin.zero_grad()
            plain.square().sum().backward()
            twin.step()
        assert torch.equal(wrapped, plain)


def test_fp16_parameters_are_a_clear_error() -> None:
    """FP16 gradients raise an error that says to keep parameters in FP32, not a kernel's message."""
    parameter, scaler = nn.Parameter(torch.ones(2, dtype=torch.float16)), scaler_with(init_scale=1.0)
    scaler.scale(parameter.float().sum()).backward()
    with pytest.raises(ScalerError, match="keep trainable parameters in FP32"):
        scaler.unscale_(torch.optim.SGD([parameter], lr=1.0))


def test_state_resumes_exactly() -> None:
    """Saved with torch.save, loaded with weights_only=True: the rest of the run is the same, counters included."""
    model = tiny_mlp()
    optimizer = adamw(model, fused=False)
    scaler = scaler_with(hysteresis=2, growth_interval=5)
    pattern = [False, True, False, False, False, True, True, False, False, False, False]
    stream = losses(model, len(pattern), pattern.__getitem__)
    trajectory, resumed = [], None
    for step, loss in enumerate(stream):
        if step == 4:
            file = io.BytesIO()
            torch.save(scaler.state_dict(), file)
            file.seek(0)
            resumed = scaler_with(hysteresis=2, growth_interval=5)
            resumed.load_state_dict(torch.load(file, weights_only=True))
        one_step(scaler, loss, optimizer)
        trajectory.append(scaler.get_scale())
    twin = tiny_mlp()
    twin_optimizer = adamw(twin, fused=False)
    for step, loss in enumerate(losses(twin, len(pattern), pattern.__getitem__)):
        if step >= 4:
            one_step(resumed, loss, twin_optimizer)
            assert resumed.get_scale() == trajectory[step]
    assert resumed.state_dict() == scaler.state_dict()


def test_pickle_round_trip() -> None:
    """A scaler pickles between steps with all its state, and refuses in between."""
    scaler, parameter = scaler_with(init_scale=8.0), nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    one_step(scaler, parameter.sum(), optimizer)
    assert pickle.loads(pickle.dumps(scaler)).state_dict() == scaler.state_dict()
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(ScalerError, match="between update"):
        pickle.dumps(scaler)


@for_each("saved", [{}, {"scale": math.nan}, {"scale": "big"}, [1.0], None])
def test_foreign_state_is_refused(saved: object) -> None:
    """What is not a scaler's state raises StateError, and the scaler stays usable."""
    scaler = scaler_with()
    with pytest.raises(StateError):
        scaler.load_state_dict(saved)
    assert scaler.get_scale() == 65536.0


@pytest.mark.parametrize("dead_scale", [0.0, math.inf])
@pytest.mark.parametrize("stepped", [False, True])
def test_dead_stock_scale_is_brought_back_into_bounds(dead_scale: float, stepped: bool) -> None:
    """A stock checkpoint whose scale went to 0 or inf continues at the nearest bound, loaded before the first step or after."""
    saved = {**torch.amp.GradScaler("cpu").state_dict(), "scale": dead_scale}
    scaler, parameter = scaler_with(max_scale=2.0**24), nn.Parameter(torch.tensor([1.0]))
    if stepped:
        one_step(scaler, parameter.sum(), torch.optim.SGD([parameter], lr=0.1))
    scaler.load_state_dict(saved)
    assert scaler.get_scale() == (scaler.config.min_scale if dead_scale == 0 else 2.0**24)


@pytest.mark.parametrize("saved_scale", [512.0, 8.0])
def test_constant_says_that_a_loaded_scale_is_not_its_own(caplog: pytest.LogCaptureFixture, saved_scale: float) -> None:
    """Who resumes with CONSTANT and another init_scale is told which of the two it goes on with."""
    scaler = scaler_with(scaling_strategy="CONSTANT", init_scale=8.0)
    scaler.load_state_dict(torch.amp.GradScaler("cpu", init_scale=saved_scale).state_dict())
    assert scaler.get_scale() == saved_scale
    reported = [record.getMessage() for record in caplog.records if record.name == "hf_amp"]
    expected = "CONSTANT goes on with the loaded scale 512, not with init_scale=8"
    assert reported == ([] if saved_scale == 8.0 else [expected])


def test_disabled_scaler_passes_through() -> None:
    """enabled=False: losses and steps pass, the state is empty, as in the stock class."""
    scaler, parameter = scaler_with(enabled=False), nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    one_step(scaler, parameter.sum(), optimizer)
    assert parameter.item() == 0.0
    assert scaler.state_dict() == {}
    assert scaler.get_scale() == 1.0


def test_seed_example_scales_outputs() -> None:
    """`scaler.scale` takes any tensor, and nested lists and tuples of tensors."""
    scaler = scaler_with(init_scale=2.0)
    assert scaler.scale(torch.tensor([1.0, 2.0, 3.0])).tolist() == [2.0, 4.0, 6.0]
    nested = scaler.scale([torch.ones(1), (torch.ones(2),)])
    assert isinstance(nested[1], tuple)
    assert nested[1][0].tolist() == [2.0, 2.0]


@for_each("fused", [False, True])
@for_each("monitoring", [False, True])
def test_gradients_that_overflow_only_when_divided_are_skipped(fused: bool, monitoring: bool) -> None:
    """At a scale below 1 a finite scaled gradient can be inf unscaled: it does not reach the parameters."""
    parameter = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([parameter], lr=1.0, fused=fused)
    scaler = scaler_with(init_scale=2.0**-20, enable_monitoring=monitoring)
    scaler.scale(parameter.sum()).backward()
    parameter.grad.fill_(3e38)
    scaler.step(optimizer)
    assert parameter.item() == 1.0
    assert scaler.skipped_steps == 1


def test_gradients_made_finite_after_unscale_are_skipped_all_the_same() -> None:
    """As in the stock class: what unscale_ found stands, though user code has replaced the inf since."""
    parameter = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = scaler_with(monitoring_interval=2)
    one_step(scaler, parameter.sum(), optimizer)  # the second step takes no amax
    optimizer.zero_grad()
    scaler.scale(OverflowInBackward.apply(parameter.sum())).backward()
    scaler.unscale_(optimizer)
    parameter.grad.nan_to_num_(posinf=1.0)
    scaler.step(optimizer)
    assert parameter.tolist() == [0.0, 0.0]
    assert scaler.skipped_steps == 1


@pytest.mark.parametrize("strategy", ["DYNAMIC", "ADAPTIVE"])
def test_a_fused_clip_after_the_step_is_an_error(strategy: str) -> None:
    """What is to be clipped is applied already; the next backward goes on."""
    parameter, scaler = nn.Parameter(torch.tensor([1.0])), scaler_with(scaling_strategy=strategy)
    optimizer = torch.optim.SGD([parameter], lr=0.25, fused=True)
    one_step(scaler, parameter.sum(), optimizer)
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    with pytest.raises(ScalerError, match="after step"):
        scaler.clip_grad_norm_(optimizer, 1.0)
    scaler.update()
    one_step(scaler, parameter.sum(), optimizer)
    assert scaler.applied_steps == 3


@pytest.mark.parametrize("change", ["options", "scale"])
def test_what_is_set_between_step_and_update_counts(change: str) -> None:
    """As in the stock class: the update goes by options, and from a scale, that were set after the step."""
    parameter = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([parameter], lr=0.25)
    scales = []
    for scaler in (scaler_with(), torch.amp.GradScaler("cpu")):
        scaler.scale(parameter.sum()).backward()
        scaler.step(optimizer)
        if change == "options":
            scaler.set_growth_interval(1)
            scaler.set_growth_factor(4.0)
        else:
            scaler._scale = torch.tensor(512.0)
        scaler.update()
        scales.append(scaler.get_scale())
        optimizer.zero_grad()
    assert scales == [scales[0]] * 2 == ([2.0**18] * 2 if change == "options" else [512.0] * 2)


def test_guard_takes_counters_from_a_scaled_run_and_keeps_its_scale() -> None:
    """FP16 state, with other options, loaded into a BF16 guard: the scale stays 1, steps go on, counters continue."""
    scaled, parameter = scaler_with(growth_interval=7), nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([parameter], lr=0.25)
    one_step(scaled, parameter.sum(), optimizer)
    guard = scaler_with(precision_mode="BF16")
    guard.load_state_dict(scaled.state_dict())
    one_step(guard, parameter.sum(), optimizer)
    assert parameter.item() == 0.5
    assert (guard.last_outcome.scale, guard.get_scale(), guard.applied_steps) == (1.0, 1.0, 2)


@pytest.mark.parametrize("strategy", ["DYNAMIC", "PERFORMANCE_OPTIMIZED"])
def test_guard_is_exact_where_a_sum_of_squares_is_not(strategy: str) -> None:
    """Finite gradients of 1e25, whose squares overflow FP32, are applied, also where the verdict stays on the device."""
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([parameter], lr=1.0, fused=True)
    guard = scaler_with(precision_mode="FP32", scaling_strategy=strategy)
    (parameter * 1e25).sum().backward()
    guard.step(optimizer)
    guard.update()
    guard.flush()
    assert parameter.tolist() == pytest.approx([-1e25] * 4)
    assert guard.applied_steps == 1


@pytest.mark.parametrize("mode", ["MIXED", "FP32"])
def test_losses_of_a_window_are_counted(mode: str) -> None:
    """An outcome says how many losses it stands on and how many were not finite, in a guard too; the next starts at 0."""
    scaler = AdvancedGradScaler(MixedPrecisionConfig(precision_mode=mode), "cpu")
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    counts = []
    for factors in ((1.0, torch.nan, torch.inf, 1.0), (1.0, 1.0)):
        for factor in factors:
            scaler.scale(weight.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        counts.append((scaler.last_outcome.losses, scaler.last_outcome.non_finite_losses))
    assert counts == [(4, 2), (2, 0)]


@for_each("updates", ["after each", "after both"])
@for_each("mode", ["MIXED", "FP32"])
def test_optimizers_of_one_backward_know_its_loss(mode: str, updates: str) -> None:
    """As Muon beside AdamW: both outcomes stand on it, one of them counts it, and what is scaled by hand stands on none."""
    scaler = scaler_with(precision_mode=mode, init_scale=4.0)
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=0.0) for weight in weights]
    reported: list[tuple[object, ...]] = []
    scaler.observers.append(lambda o, _: reported.append((o.loss_finite, o.losses, o.non_finite_losses)))
    for factor in (1.0, math.nan, None):
        loss = (weights[0] + weights[1]).sum() * (factor or 1.0)
        (loss * scaler.get_scale() if factor is None else scaler.scale(loss)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
            if updates == "after each" or optimizer is optimizers[1]:
                scaler.update()
            optimizer.zero_grad()
    assert reported == [(True, 1, 0), (True, 0, 0), (False, 1, 1), (False, 0, 0), (None, 0, 0), (None, 0, 0)]


@for_each("bad", [math.inf, -math.inf, math.nan])
@for_each("shape", [(), (3,)])
def test_every_kind_of_non_finite_loss_counts(bad: float, shape: tuple[int, ...]) -> None:
    """One bad element makes a loss non-finite, as the largest finite numbers do not."""
    largest = torch.finfo(torch.float32).max
    for value, non_finite in {bad: 1.0, largest: 0.0, -largest: 0.0}.items():
        losses = SeenLosses()
        losses.note(torch.tensor(value).expand(shape))
        flag = losses.flags_on(torch.device("cpu"))
        assert flag is not None
        assert (losses.number, flag.isnan().float().item()) == (1, non_finite)


def test_what_was_not_seen_is_zero_in_an_observation() -> None:
    """An overflow without a loss seen is not taken for a non-finite loss, nor for a gradient of that size."""
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.full((3,), math.inf)
    record = check(
        torch.optim.SGD([weight], lr=0.1), backward=1, scale=torch.tensor(8.0), device=torch.device("cpu"),
        unscale=Unscale.FUSED, losses=0, loss_flags=None, request=StatisticsRequest(norm=True, amax=False, sample_seed=None, agree=False),
    )  # fmt: skip
    observation = observe([record])
    assert observation.found_inf.item() == 1
    assert (observation.loss_non_finite.item(), observation.grad_amax.item()) == (0, 0)


@for_each("mode", ["MIXED", "FP32"])
@for_each("factor", [0.0, 1e-3])
def test_gradients_of_zero_are_noticed(mode: str, factor: float) -> None:
    """Only where every element is exactly zero, and there are any; without another host read."""
    scaler = AdvancedGradScaler(MixedPrecisionConfig(precision_mode=mode), "cpu")
    weight = nn.Parameter(torch.ones(2))
    optimizer, idle = (torch.optim.SGD([p], lr=0.0) for p in (weight, nn.Parameter(torch.ones(1))))
    scaler.scale(weight.sum() * factor).backward()
    with count_host_reads() as reads:
        scaler.step(optimizer)
    assert reads.count == 1
    assert scaler.last_outcome.zero_gradients is (factor == 0.0)
    scaler.step(idle)
    assert scaler.last_outcome.zero_gradients is False


@for_each("again", [True, False])
@for_each("clipped", [True, False])
@for_each("strategy", ["DYNAMIC", "PERFORMANCE_OPTIMIZED"])
@for_each("fused", [True, False])
def test_an_optimizer_that_raises_has_had_no_step(fused, strategy, clipped, again) -> None:
    """As without memory for its state: the same gradients can be applied after all, or the next ones, each divided once."""
    models, scaler = [tiny_mlp(), tiny_mlp()], scaler_with(init_scale=256.0, scaling_strategy=strategy)
    optimizer, expected = (adamw(model, fused) for model in models)
    x = torch.ones(2, 4)

    def backward(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale(factor * models[0](x).sum()).backward()
        if clipped:
            scaler.clip_grad_norm_(optimizer, 0.5)

    def raise_once(*_: object) -> None:
        failing.remove()
        raise torch.OutOfMemoryError

    failing = optimizer.register_step_pre_hook(raise_once)
    backward(1.0)
    with pytest.raises(torch.OutOfMemoryError):
        scaler.step(optimizer)
    if not again:
        backward(2.0)
    scaler.step(optimizer)
    scaler.update()
    scaler.flush()
    assert (scaler.decided_steps, scaler.applied_steps, scaler.skipped_steps) == (1, 1, 0)
    ((1.0 if again else 2.0) * models[1](x).sum()).backward()
    if clipped:
        nn.utils.clip_grad_norm_(models[1].parameters(), 0.5)
    expected.step()
    for found, wanted in zip(snapshot(models[0], optimizer), snapshot(models[1], expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


def test_an_abandoned_step_leaves_nothing_behind() -> None:
    """Losses noted and gradients unscaled before an exception do not count for the next step."""
    scaler = AdvancedGradScaler(MixedPrecisionConfig(init_scale=4.0), "cpu")
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale(weight.sum() * torch.nan).backward()
    scaler.unscale_(optimizer)
    optimizer.zero_grad()
    scaler.abandon_step()
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [0.0, 0.0]
    assert (scaler.last_outcome.losses, scaler.last_outcome.loss_finite) == (1, True)
