"""Every private or semi-private name of an upstream library that hf_amp relies on: fails by name when one goes."""

from __future__ import annotations

import copy
import inspect
import itertools
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.ao import filter_linear_layers, find_first_last_linear_layers
from torch.overrides import BaseTorchFunctionMode, _get_current_function_mode
from transformers import Trainer, TrainerCallback
from transformers.integrations import tensor_parallel

import hf_amp
from hf_amp.choose import RoundedOperands, has_foreign_hooks, is_float8, torchao_formats
from hf_amp.device import runs_backward
from hf_amp.emulation import _COMPOSITE, _PROMOTED, _REDUCED, _WITHOUT_HALF
from hf_amp.fallback.module_precision import has_compiled
from hf_amp.integrations._compat import (
    forget_skip,
    forward_before_autocast,
    prepared_models,
    prepared_optimizers,
    replace_scaler,
)
from hf_amp.patch_log import is_one_graph
from hf_amp.scaling.desync import collectives_begun, default_store, newest_collectives
from tests.each import for_each


def test_torch_has_the_unscale_kernel() -> None:
    """`torch._amp_foreach_non_finite_check_and_unscale_` multiplies in place and flags what is not finite."""
    gradients, found = [torch.tensor([2.0, 4.0]), torch.tensor([torch.inf])], torch.zeros(())
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, torch.tensor(0.5))
    assert gradients[0].tolist() == [1.0, 2.0]
    assert found.item() == 1.0


def test_torch_flattens_dense_tensors() -> None:
    """`torch._utils._flatten_dense_tensors` is `cat` of what `reshape(-1)` gives, of any layout and size."""
    tensors = [
        torch.randn(3, 4).t(),
        torch.randn(()),
        torch.randn(0, 2),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ]
    for some in (tensors, tensors[:1]):
        flat = torch._utils._flatten_dense_tensors(some)
        assert torch.equal(flat, torch.cat([x.reshape(-1) for x in some]))


def test_torch_has_a_dispatch_key_for_emulation() -> None:
    """A key that no tensor has can be switched on in a thread, kernels be registered for it, and autocast's operators be listed."""
    with hf_amp.emulate():
        assert torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.AutocastIPU)
    assert not torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.AutocastIPU)
    for device in ("CPU", "CUDA"):
        known = torch._C._dispatch_get_registrations_for_dispatch_key(f"Autocast{device}")
        assert {"aten::linear", "aten::mm", "aten::binary_cross_entropy"} <= set(known)
    for operator in (*_REDUCED, *_COMPOSITE, *_PROMOTED, *itertools.chain(*_WITHOUT_HALF.values())):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "AutocastIPU"), operator
    assert torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.AutocastCPU)
    for operator in torch._ops._higher_order_ops.values():
        assert not operator.non_fallthrough_keys.has(torch._C.DispatchKey.AutocastIPU), operator
    with torch._C._DisableAutocast():
        assert not torch.is_autocast_enabled("cpu")


def test_torch_tells_whether_anything_was_compiled() -> None:
    """`torch._dynamo.utils.counters["frames"]` is empty until something is compiled, and keeps its count through a reset."""
    import torch._dynamo

    torch._dynamo.utils.counters.clear()
    torch.compiler.reset()
    torch.compiler.disable(lambda x: x + 1)(torch.ones(1))
    assert not has_compiled()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    assert has_compiled()
    torch.compiler.reset()
    assert has_compiled()


@pytest.mark.parametrize("number_format", ["fp16", "bf16"])
def test_torch_tells_whether_onednn_has_half_kernels(number_format: str) -> None:
    """`torch.ops.mkldnn._is_mkldnn_fp16_supported` and its BF16 twin answer, where PyTorch has oneDNN."""
    if torch.backends.mkldnn.is_available():
        supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{number_format}_supported")
        assert isinstance(supported(), bool)


@for_each(
    "name", [
        "_scale", "_growth_tracker", "_enabled", "_device", "_init_scale", "_lazy_init_scale_growth_tracker",
        "_growth_factor", "_backoff_factor", "_growth_interval", "_per_optimizer_states", "_check_inf_per_device",
        "_found_inf_per_device",
    ]
)  # fmt: skip
def test_torch_grad_scaler_has(name: str) -> None:
    """The attributes that AdvancedGradScaler keeps in step with its parent class are still the parent's."""
    assert hasattr(torch.amp.GradScaler("cpu"), name)


def test_torch_names_the_stages_of_a_step() -> None:
    """`torch.amp.grad_scaler.OptState` has READY, UNSCALED and STEPPED, which `_per_optimizer_states` tells."""
    assert {stage.name for stage in torch.amp.grad_scaler.OptState} >= {"READY", "UNSCALED", "STEPPED"}


def test_torch_fused_optimizers_announce_themselves() -> None:
    """A fused optimizer carries `_step_supports_amp_scaling`, and one that is not fused does not."""
    parameters = [torch.nn.Parameter(torch.ones(2))]
    assert torch.optim.AdamW(parameters, fused=True)._step_supports_amp_scaling
    assert not getattr(torch.optim.AdamW(parameters), "_step_supports_amp_scaling", False)


def test_accelerate_lists_what_it_prepared() -> None:
    """`Accelerator._models` and `_optimizers` hold the prepared objects."""
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert prepared_models(accelerator) == [model]
    assert prepared_optimizers(accelerator) == [optimizer]


@pytest.mark.usefixtures("fresh_accelerator_state")
def test_accelerate_keeps_the_forward_that_it_wraps() -> None:
    """`_original_forward` is the model's own, which does not enter autocast."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    plain = forward_before_autocast(model)
    assert "_original_forward" in vars(model)
    assert plain is torch.nn.Linear.forward
    assert model(torch.full((1, 2), 1 / 3)).equal(plain(model, torch.full((1, 2), 1 / 3))) is False


def test_accelerate_optimizer_takes_another_scaler_by_its_pickling_protocol() -> None:
    """`__setstate__` sets up all that `step` needs with a scaler, and undoing it leaves the attributes of before."""
    accelerator = Accelerator(cpu=True)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer: AcceleratedOptimizer = accelerator.prepare(torch.optim.SGD([parameter], lr=1.0))
    before = dict(vars(optimizer))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    replace_scaler(optimizer, scaler)
    scaler.scale(parameter.sum()).backward()
    optimizer.step()
    assert parameter.tolist() == [0.0, 0.0]
    replace_scaler(optimizer, None)
    assert vars(optimizer) == before


@for_each("name", ["native_amp", "scaler", "scaler_handler", "autocast_handler"])
def test_accelerator_has(name: str) -> None:
    """The attributes that attach changes are there."""
    assert name in vars(Accelerator(cpu=True))


@pytest.mark.parametrize("name", ["prepare_model", "prepare_optimizer"])
def test_accelerator_prepares_through(name: str) -> None:
    """`Accelerator.prepare` calls its own public method, so that an instance can watch it."""
    accelerator = Accelerator(cpu=True)
    calls = []
    original = getattr(accelerator, name)
    setattr(accelerator, name, lambda *a, **k: calls.append(name) or original(*a, **k))
    model = torch.nn.Linear(2, 2)
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert calls == [name]


def test_accelerator_prepares_what_evaluates_by_an_argument() -> None:
    """`Accelerator.prepare_model(model, device_placement, evaluation_mode)`, no more and no less."""
    names = list(inspect.signature(Accelerator.prepare_model).parameters)
    assert names == ["self", "model", "device_placement", "evaluation_mode"]


def test_accelerate_optimizer_keeps_its_skip() -> None:
    """`AcceleratedOptimizer._is_overflow` is what `step_was_skipped` tells."""
    optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0))
    optimizer._is_overflow = True
    assert optimizer.step_was_skipped
    forget_skip(optimizer)
    assert not optimizer.step_was_skipped


def test_torch_has_what_a_replay_of_shards_needs() -> None:
    """`fully_shard`: how a unit is known, its casts, read anew in each pass, and what recovers from a pass that has failed."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    for name in ("set_requires_gradient_sync", "reset_iter_state", "_get_fsdp_state"):
        assert hasattr(FSDPModule, name), name
    for method in (FSDPState._cast_forward_inputs, FSDPState._cast_output_dtype):
        assert "self._mp_policy" in inspect.getsource(method)
    policy = MixedPrecisionPolicy(param_dtype=torch.float16, output_dtype=torch.float16)
    assert policy.cast_forward_inputs
    # FSDP gathers before our hooks, which are appended, and lets go after those that are prepended.
    source = inspect.getsource(FSDPState.init)
    assert "self._pre_forward, prepend=True" in source
    assert "self._post_forward, prepend=False" in source


def test_accelerate_makes_the_policy_that_is_taken_for_its_default() -> None:
    """`set_mixed_precision` of a plugin for FSDP2, which attach replaces where the user gives none."""
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("fp16")
    half = torch.float16
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half, output_dtype=half)


@for_each(
    ("caller", "name"),
    [
        ("_prepare_for_training", "self._load_scaler(resume_from_checkpoint)"),
        ("_prepare_for_training", "self._load_optimizer_and_scheduler(resume_from_checkpoint)"),
        ("_save_checkpoint", "self._save_optimizer_and_scheduler(output_dir)"),
        ("_inner_training_loop", "self._tr_loss = torch.tensor(0.0"),
        ("_maybe_log_save_evaluate", "tr_loss -= tr_loss"),
        ("evaluation_loop", "self.prediction_step(model, inputs"),
        ("_run_epoch", "self.training_step(model, inputs"),
        ("evaluate", "self.evaluation_loop("),
        ("predict", "self.evaluation_loop("),
        ("_save_checkpoint", "self.state.save_to_json("),
        ("_save_checkpoint", "self._get_output_dir(trial=trial)"),
        ("_maybe_log_save_evaluate", "self._save_checkpoint(model, trial)"),
        ("train", "self._load_from_checkpoint(resume_from_checkpoint)"),
        ("_prepare_for_training", "self._load_optimizer_and_scheduler(resume_from_checkpoint)"),
        ("_run_epoch", "self._load_rng_state(resume_from_checkpoint)"),
        ("_init_training_state", "stateful_callbacks=["),
        ("train", "self.is_in_train = True"),
    ],
)
def test_trainer_goes_through(caller: str, name: str) -> None:
    """What is changed on a Trainer's instance is what it calls; where it says `tr_loss -= tr_loss` NaN stays NaN."""
    assert name in inspect.getsource(getattr(Trainer, caller))


def test_trainer_calls_its_callbacks_with_itself_on_the_stack() -> None:
    """`Trainer.callback_handler.callbacks` holds the callbacks, and the Trainer is a caller's `self`."""
    assert "callback_handler" in inspect.getsource(Trainer.__init__)
    assert "on_init_end" in vars(TrainerCallback)


def test_torch_counts_writes_to_a_tensor() -> None:
    """`Tensor._version` grows with every write that autograd sees, and a copy through `foreach` is one."""
    parameter = torch.nn.Parameter(torch.ones(2))
    seen = [parameter._version]
    with torch.no_grad():
        parameter.clamp_(max=0.5)
        seen.append(parameter._version)
        torch._foreach_copy_([parameter], [torch.zeros(2)])
        seen.append(parameter._version)
    assert seen == sorted(set(seen))


def test_torch_lets_a_gradient_be_wider_than_its_parameter() -> None:
    """`p.grad.data` takes FP32 for an FP16 parameter; the next backward after `p.grad = None` makes FP16 again."""
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    parameter.sum().backward()
    parameter.grad.data = parameter.grad.float()
    assert parameter.grad.dtype == torch.float32
    parameter.grad = None
    parameter.sum().backward()
    assert parameter.grad.dtype == torch.float16


def test_torch_keys_dictionaries_by_tensor_weakly() -> None:
    """`torch.utils.weak.WeakTensorKeyDictionary` finds a tensor by identity and lets it go."""
    from torch.utils.weak import WeakTensorKeyDictionary

    held = WeakTensorKeyDictionary()
    tensor = torch.ones(2)
    held[tensor] = 1
    assert held.get(tensor) == 1
    assert held.get(torch.ones(2)) is None
    del tensor
    assert len(held) == 0


def test_torch_storages_have_lasting_names() -> None:
    """`StorageWeakRef.cdata` is equal for views of one storage, and is not given away while a reference lives."""
    from torch.multiprocessing.reductions import StorageWeakRef

    x = torch.ones(4)
    references = [StorageWeakRef(view.untyped_storage()) for view in (x, x[1:])]
    assert references[0].cdata == references[1].cdata
    del x
    others = [StorageWeakRef(torch.ones(4).untyped_storage()) for _ in range(100)]
    assert references[0].cdata not in {other.cdata for other in others}


def test_torch_casts_by_one_operator() -> None:
    """Autocast and `.to` both cast by `aten._to_copy`, and a dispatch mode sees them."""
    from hf_amp.monitoring.memory import StoredForBackward

    layer = torch.nn.Linear(2, 2)
    for cast in (lambda: layer(torch.ones(1, 2)), lambda: layer.weight.to(torch.bfloat16)):
        with StoredForBackward([]) as watch, torch.autocast("cpu", torch.bfloat16):
            cast()
        assert watch._original


@pytest.mark.parametrize("compiled", [torch.compile, lambda module: module.compile() or module])
def test_torch_compiled_modules_are_recognised(compiled: object) -> None:
    """By `_orig_mod`, or `_compiled_call_impl`, whichever way they were compiled; others are not."""
    from hf_amp.training.trainers import _can_be_watched

    assert not _can_be_watched(compiled(torch.nn.Linear(1, 1)))  # type: ignore[operator]
    assert _can_be_watched(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_torch_says_which_code_is_compiled_to_one_graph(fullgraph: bool) -> None:
    """By `InstructionTranslator.current_tx().one_graph`, asked once a compilation because of `_dynamo_marked_constant`."""

    def compiled(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if is_one_graph() else x + 2

    torch.compiler.reset()
    assert torch.compile(compiled, fullgraph=fullgraph, backend="eager")(torch.zeros(1)) == (1 if fullgraph else 2)


def test_torch_says_which_function_mode_is_innermost() -> None:
    """`torch.overrides._get_current_function_mode` gives the one that was entered last."""
    with BaseTorchFunctionMode(), BaseTorchFunctionMode() as inner:
        assert _get_current_function_mode() is inner


def test_torch_says_whether_torch_func_transforms() -> None:
    """`torch._C._are_functorch_transforms_active()`."""
    assert not torch._C._are_functorch_transforms_active()
    assert torch.func.vmap(lambda x: x * torch._C._are_functorch_transforms_active())(torch.ones(1)) == 1


def test_nodes_of_the_graph_say_the_dtype_of_what_they_made() -> None:
    """By `_input_metadata`, also after backward."""
    y = torch.ones(2, requires_grad=True).half()
    y.sum().backward()
    assert [held.dtype for held in y.grad_fn._input_metadata] == [torch.float16]


def test_accelerated_optimizers_are_recognised_without_accelerate() -> None:
    """They have `step_was_skipped`, and PyTorch's own have not."""
    assert hasattr(AcceleratedOptimizer, "step_was_skipped")
    assert not hasattr(torch.optim.Optimizer, "step_was_skipped")


def test_torch_numbers_operations_in_order() -> None:
    """`torch.autograd._get_sequence_nr()` and `grad_fn._sequence_nr()` count a thread's operations alike."""
    x = torch.ones(1, requires_grad=True)
    before = torch.autograd._get_sequence_nr()
    y = x * 2
    assert before <= y.grad_fn._sequence_nr() < torch.autograd._get_sequence_nr()


def test_torch_names_its_products() -> None:
    """The operators whose operands the audit rounds, below autograd, and modules by class and name in FlopCounterMode."""
    from torch.utils.flop_counter import FlopCounterMode

    for name in RoundedOperands._OPERANDS:
        assert hasattr(torch.ops.aten, name.removeprefix("aten::")), name
    with FlopCounterMode(display=False) as counter:
        torch.nn.Sequential(torch.nn.Linear(2, 3))(torch.ones(5, 2))
    assert {name: sum(of.values()) for name, of in counter.get_flop_counts().items()} == dict.fromkeys(
        ["Global", "Sequential", "Sequential.0"], 2 * 5 * 2 * 3
    )


def test_torchao_casts_to_its_formats() -> None:
    """What the audit takes from `torchao.prototype` and `torchao.float8`, and what accelerate asks before it converts a layer."""
    pytest.importorskip("torchao", reason="the extra hf_amp[peers] brings it")
    from accelerate.utils import AORecipeKwargs

    assert [each.rounded(torch.ones(2, 32)).tolist() for each in torchao_formats()] == [torch.ones(2, 32).tolist()] * 3
    assert AORecipeKwargs().module_filter_func is None
    assert find_first_last_linear_layers(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())) == ("0", "0")
    assert filter_linear_layers(torch.nn.Linear(16, 16), "0", [])
    assert not filter_linear_layers(torch.nn.Linear(15, 16), "0", [])


def test_torchao_calls_its_layers_float8_linear() -> None:
    """They are known by that name, and compute in the wide precision where `nn.Linear.forward` is called on them; no public class says so."""
    float8 = pytest.importorskip("torchao.float8", reason="the extra hf_amp[peers] brings it")
    wide, x = torch.nn.Sequential(torch.nn.Linear(16, 16)), torch.randn(4, 16)
    narrow = float8.convert_to_float8_training(copy.deepcopy(wide), config=float8.Float8LinearConfig(emulate=True))
    assert [is_float8(each[0]) for each in (wide, narrow)] == [False, True]
    assert torch.equal(torch.nn.Linear.forward(narrow[0], x), wide(x))
    assert not torch.equal(narrow(x), wide(x))


def test_modules_keep_their_hooks_in_dicts() -> None:
    """The four kinds that a replay would call, each by its own registration."""
    for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        module = torch.nn.Linear(1, 1)
        assert not has_foreign_hooks(module)
        getattr(module, f"register_{kind}")(lambda *_: None)
        assert has_foreign_hooks(module), kind


def test_torch_says_which_thread_runs_a_backward() -> None:
    """A hook of a node is in it, in whatever thread that is; the thread that only waits for it is not."""
    seen = {"here": runs_backward()}
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.grad_fn.register_hook(lambda *_: seen.update(backward=runs_backward()))  # type: ignore[union-attr]
    thread = threading.Thread(target=y.sum().backward)
    thread.start()
    thread.join()
    assert seen == {"here": False, "backward": True}


def test_torch_says_which_collectives_a_rank_has_begun() -> None:
    """`_get_default_store().clone()`, `_get_sequence_number_for_group` and `_dump_fr_trace_json`, which has gloo's collectives in order."""
    patience = timedelta(seconds=77)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert default_store().timeout == patience
        default_store().set("a", "1")
        assert (default_store().check(["a"]), default_store().check(["b"]), default_store().get("a")) == (
            True,
            False,
            b"1",
        )
        before = collectives_begun()
        dist.all_reduce(torch.ones(2, 3))
        dist.barrier()
        assert collectives_begun() == before + 2
        begun = list(newest_collectives()["gloo"].items())[-2:]
        assert begun == [(str(before + 1), "all_reduce of 6 Float"), (str(before + 2), "barrier")]
    finally:
        dist.destroy_process_group()
    assert collectives_begun() == 0


def test_transformers_lacks_what_accelerates_fsdp2_imports_for_tensor_parallel() -> None:
    """accelerate_configs/README.md says so: once it is there, `parallelism_config` with `tp_size` is to be tried under FSDP2."""
    assert "ReplicateParallel" in inspect.getsource(Accelerator._prepare_tp)
    assert not hasattr(tensor_parallel, "ReplicateParallel")
