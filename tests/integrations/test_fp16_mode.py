"""PrecisionMode.FP16 through Accelerate and the Trainer: FP16 parameters and gradients, FP32 master weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import hf_amp
from hf_amp import AttachError, Cause, EventKind, MixedPrecisionCallback, MixedPrecisionConfig, PrecisionMode
from hf_amp.emulation import EmulatedPrecision
from hf_amp.scaling.master_weights import STATE_KEY
from tests.conftest import forget_accelerators
from tests.each import for_each
from tests.fallback.rescaled import ZOO, RescaledModel
from tests.forking import told_by_ranks
from tests.integrations.half_models import dtypes
from tests.integrations.trainers import OverflowAt, trainer_with
from tests.reference import TIMINGS, OverflowInBackward, assert_bitwise_equal, tiny_mlp

STEPS, OVERFLOW, ACCUMULATION, MAX_NORM = 8, 3, 2, 0.05


pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")


def batch(step: int, micro: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + micro)
    return torch.randn(5, 4, generator=generator)


def loss_of(model: nn.Module, step: int, micro: int) -> torch.Tensor:
    loss = model(batch(step, micro)).float().square().mean()
    last = micro == ACCUMULATION - 1
    return OverflowInBackward.apply(loss) if last and step == OVERFLOW else loss


class Loop:
    """An Accelerate loop in FP16 mode with accumulation, clipping and a schedule."""

    def __init__(self, folder: Path | None = None, fused: bool = True, late: bool = False, **options: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(mixed_precision="fp16", cpu=True, gradient_accumulation_steps=ACCUMULATION)
        config = MixedPrecisionConfig(precision_mode="FP16", init_scale=1024.0, **options)
        if not late:
            self.session = hf_amp.attach(self.accelerator, config)
        plain = torch.optim.AdamW((model := tiny_mlp()).parameters(), lr=1e-3, fused=fused)
        schedule = torch.optim.lr_scheduler.ExponentialLR(plain, 0.9)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, plain, schedule)
        if late:
            self.session = hf_amp.attach(self.accelerator, config)
        self.norms: list[float] = []
        self.skipped: list[bool] = []

    def run(self, steps: range) -> Loop:
        for step in steps:
            for micro in range(ACCUMULATION):
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(loss_of(self.model, step, micro))
                    if self.accelerator.sync_gradients:
                        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), MAX_NORM)
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
            self.norms.append(norm.item())
            self.skipped.append(self.accelerator.optimizer_step_was_skipped)
        return self

    def state(self) -> list[torch.Tensor]:
        saved = self.optimizer.state_dict()
        moments = [t for entry in saved["state"].values() for t in entry.values()]
        return [*(p.detach().clone() for p in self.model.parameters()), *saved[STATE_KEY].values(), *moments]


def reference(fused: bool) -> tuple[list[torch.Tensor], list[float]]:
    """The same with explicit copies, the plain rules and the emulation entered by hand."""
    wide = tiny_mlp()
    model = copy.deepcopy(wide).half()
    masters = list(wide.parameters())
    optimizer = torch.optim.AdamW(masters, lr=1e-3, fused=fused)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    scale, norms = 1024.0, []
    for step in range(STEPS):
        model.zero_grad()
        for micro in range(ACCUMULATION):
            with EmulatedPrecision():
                loss = loss_of(model, step, micro) / ACCUMULATION
            (loss * scale).backward()
        for p, master in zip(model.parameters(), masters, strict=True):
            master.grad = p.grad.float() / scale
        norms.append(nn.utils.clip_grad_norm_(masters, MAX_NORM).item())
        if step == OVERFLOW:
            scale /= 2
            continue
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters, strict=True):
                p.copy_(master)
    moments = [t for master in masters for t in optimizer.state[master].values()]
    tensors = [*model.parameters(), *masters, *moments]
    return [t.detach().clone() for t in tensors], norms


@for_each("late", [False, True])
@for_each("fused", [False, True])
def test_accelerate_loop_is_the_reference_bit_for_bit(fused: bool, late: bool) -> None:
    """Accumulation, clipping, an overflow, a schedule: parameters, masters, optimizer state, norms and skips."""
    loop = Loop(fused=fused, late=late).run(range(STEPS))
    expected, norms = reference(fused)
    assert_bitwise_equal(loop.state(), expected)
    clean = [step for step in range(STEPS) if step != OVERFLOW]
    assert [loop.norms[step] for step in clean] == [norms[step] for step in clean]
    assert loop.skipped == [step == OVERFLOW for step in range(STEPS)]
    assert dtypes(loop.model) == {torch.float16}


def test_gradients_are_half() -> None:
    """Between backward and clipping gradients are FP16, as is what they are accumulated in."""
    loop = Loop()
    loop.accelerator.backward(loss_of(loop.model, 0, 0))
    assert {p.grad.dtype for p in loop.model.parameters()} == {torch.float16}


def test_real_half_kernels() -> None:
    """emulate=False computes the same with the CPU's half kernels, to FP16's precision."""
    expected, _ = reference(True)
    loop = Loop(emulate=False).run(range(STEPS))
    assert loop.skipped == [step == OVERFLOW for step in range(STEPS)]
    for ours, theirs in zip(loop.model.parameters(), expected, strict=False):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-2, atol=2e-3)


def untimed(session: hf_amp.AmpSession) -> dict[str, float]:
    """The metrics that no clock is behind."""
    return {name: value for name, value in session.metrics().items() if name not in TIMINGS}


def test_accelerate_resume_is_exact(tmp_path: Path) -> None:
    """save_state after four steps, load_state into a new loop, four more: equal to eight, masters included."""
    whole = Loop().run(range(STEPS))
    first = Loop().run(range(4))
    first.accelerator.save_state(str(tmp_path))
    resumed = Loop()
    resumed.accelerator.load_state(str(tmp_path))
    resumed.run(range(4, STEPS))
    assert_bitwise_equal(resumed.state(), whole.state())
    assert untimed(resumed.session) == untimed(whole.session)


def test_detach_gives_parameters_their_dtype_and_the_masters_values() -> None:
    """Right after attach detach restores every bit; after training, FP32 parameters hold the masters. No hook stays."""
    loop = Loop()
    loop.session.detach()
    assert_bitwise_equal([p.detach() for p in loop.model.parameters()], [*tiny_mlp().parameters()])
    loop = Loop().run(range(4))
    masters = list(loop.optimizer.state_dict()[STATE_KEY].values())
    inner = loop.optimizer.optimizer
    loop.session.detach()
    assert not any(hooks for name, hooks in vars(inner).items() if name.endswith("_hooks"))
    assert dtypes(loop.model) == {torch.float32}
    assert_bitwise_equal([p.detach() for p in loop.model.parameters()], masters)
    assert STATE_KEY not in loop.optimizer.state_dict()
    assert loop.accelerator.scaler is None
    loop.model(batch(0, 0)).sum().backward()
    loop.optimizer.step()
    assert all(p.isfinite().all() for p in loop.model.parameters())


@for_each(("frozen", "emulate"), [(False, True), (True, True), (True, False)])
def test_overflowing_module_of_fp16_parameters_runs_in_fp32(frozen: bool, emulate: bool) -> None:
    """A layer that leaves FP16's range is named and computes in FP32 from its FP16 weights; the next steps are applied."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    options = {} if frozen else {"precision_mode": "FP16"}
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(init_scale=8.0, emulate=emulate, **options))
    model, optimizer = accelerator.prepare(*overflowing(frozen))
    for _ in range(4):
        accelerator.backward(model(torch.ones(4, 8)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    assert dict(session.plan.modules) == {"1": PrecisionMode.FP32}
    assert session.metrics()["applied_steps"] == 3
    assert model[1].weight.dtype == torch.float16


def test_nothing_falls_back_on_the_cpus_half_kernels() -> None:
    """FP16 mode with emulate=False on a CPU: steps are skipped and told, and the plan stays."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    config = MixedPrecisionConfig(precision_mode="FP16", init_scale=8.0, emulate=False)
    session = hf_amp.attach(accelerator, config)
    model, optimizer = accelerator.prepare(*overflowing(frozen=False))
    for _ in range(4):
        accelerator.backward(model(torch.ones(4, 8)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    assert session.metrics()["skipped_steps"] == 4
    assert dict(session.plan.modules) == {}


def overflowing(frozen: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Four layers of which the second's output is 8e4, beyond FP16; the norm after it makes it ordinary again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    nn.init.constant_(model[0].weight, 12.5)
    nn.init.constant_(model[1].weight, 100.0)
    if frozen:
        model[1].half().requires_grad_(False)
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def test_weights_beyond_fp16_are_a_clear_error() -> None:
    """A weight of 1e5 cannot become FP16: named before step 1, and nothing is converted."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    hf_amp.attach(accelerator, MixedPrecisionConfig(precision_mode="FP16"))
    model = tiny_mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = 1e5
    with pytest.raises(AttachError, match=r"1 FP32 parameter \(2.weight\).*precision_mode=MIXED"):
        accelerator.prepare(model)
    assert dtypes(model) == {torch.float32}


def test_batch_norm_stays_fp32() -> None:
    """Batch normalisation keeps FP32 parameters beside its FP32 statistics, and trains."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    hf_amp.attach(accelerator, MixedPrecisionConfig(precision_mode="FP16", init_scale=1024.0))
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 2))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = [p.detach().clone() for p in model.parameters()]
    accelerator.backward(model(torch.randn(4, 1, 8, 8)).square().mean())
    optimizer.step()
    assert [p.dtype for p in model[1].parameters()] == [torch.float32] * 2
    assert [p.dtype for p in model[0].parameters()] == [torch.float16] * 2
    assert not torch.equal(before[-1], model[3].bias)


# ---- Trainer ----------------------------------------------------------------------------------------------------


def fp16_callback() -> MixedPrecisionCallback:
    return MixedPrecisionCallback({"precision_mode": "FP16"})


def test_trainer_in_fp16_mode(tmp_path: Path) -> None:
    """precision_mode FP16 with fp16=True is no contradiction: FP16 parameters, truthful skips, losses near MIXED's."""
    losses = []
    for callback in (fp16_callback(), MixedPrecisionCallback()):
        trainer, witness = trainer_with(tmp_path, callback, OverflowAt(3), learning_rate=1e-2)
        trainer.train()
        assert witness.skipped == [False, False, True, False, False, False]
        assert witness.moved == [True, True, False, True, True, True]
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        norms = [entry.get("grad_norm") for entry in trainer.state.log_history[:6]]
        assert [norm is None for norm in norms] == witness.skipped
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert losses[0] != losses[1]


def test_trainer_tells_of_the_conversion(tmp_path: Path) -> None:
    """One event before step 1 says what became FP16; parameters are FP16 throughout, and evaluation works."""
    callback = fp16_callback()
    trainer, _ = trainer_with(tmp_path, callback, max_steps=2)
    trainer.train()
    assert callback.session.plan.default is PrecisionMode.FP16
    (event,) = [e for e in callback.session.events if e.kind is EventKind.PARAMETERS_CONVERTED]
    assert (event.before, event.after, event.step) == ("FP32", "FP16", 0)
    assert dtypes(trainer.model) == {torch.float16}
    assert trainer.evaluate(trainer.train_dataset[:4])["eval_loss"] < 8
    assert trainer.model(torch.zeros(1, 4, dtype=torch.long)).logits.dtype == torch.float32


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
def test_trainer_resume_is_exact(tmp_path: Path, optim: str) -> None:
    """A checkpoint after three of six steps resumes to the same bits: the masters ride in optimizer.pt."""
    options = {"optim": optim, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3}
    whole, again = fp16_callback(), fp16_callback()
    trainer, _ = trainer_with(tmp_path, whole, OverflowAt(2, 5), **options)
    trainer.train()
    resumed, _ = trainer_with(tmp_path / "again", again, OverflowAt(2, 5), seed=1, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    masters = [t.optimizer.state_dict()[STATE_KEY] for t in (trainer, resumed)]
    assert_bitwise_equal(*(list(m.values()) for m in masters))
    for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert untimed(again.session) == untimed(whole.session)


def test_checkpoint_resumes_in_mixed_and_back(tmp_path: Path) -> None:
    """A run saved in FP16 mode goes on in MIXED without masters, and one saved in MIXED goes on in FP16 mode."""
    options = {"save_strategy": "steps", "save_steps": 3}
    for name, first, second in (
        ("from", fp16_callback(), MixedPrecisionCallback()),
        ("to", MixedPrecisionCallback(), fp16_callback()),
    ):
        trainer, _ = trainer_with(tmp_path / name, first, **options)
        trainer.train()
        resumed, _ = trainer_with(tmp_path / name / "again", second, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-3"))
        for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=3e-3)
        assert second.session.metrics()["applied_steps"] == 6


@pytest.mark.parametrize("arguments", [{"fp16": False}, {"fp16": False, "bf16": True}])
def test_fp16_mode_without_fp16_is_a_contradiction(tmp_path: Path, arguments: dict[str, bool]) -> None:
    """precision_mode FP16 asks for fp16=True; anything else is an error that names both."""
    with pytest.raises(hf_amp.ConfigError, match=r"precision_mode=FP16\) contradicts"):
        trainer_with(tmp_path, fp16_callback(), **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_fp16_mode_on_cuda(fused: bool) -> None:
    """The same on a GPU in real FP16: steps move masters, the overflow is skipped, the loss falls."""
    accelerator = Accelerator(mixed_precision="fp16")
    session = hf_amp.attach(accelerator, MixedPrecisionConfig(precision_mode="FP16"))
    model = tiny_mlp()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused))
    losses = []
    for step in range(STEPS):
        loss = model(batch(0, 0).cuda()).float().square().mean()
        losses.append(loss.item())
        accelerator.backward(OverflowInBackward.apply(loss) if step == OVERFLOW else loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert dtypes(model) == {torch.float16}
    assert session.metrics()["skipped_steps"] == 1
    assert losses[-1] < losses[0]
    assert losses[OVERFLOW] == losses[OVERFLOW + 1]


def test_two_processes() -> None:
    """DDP over gloo: masters and parameters of both ranks stay equal, one rank's overflow skips on both.

    So it is for each way of clearing gradients, and where they are views into DDP's buckets.
    After detach parameters stay FP16, because DDP counts on it; a conversion after DDP is refused.
    """
    first, second = told_by_ranks("tests.integrations.fp16_worker", ACCELERATE_USE_CPU="true")
    assert first == second
    assert list(first) == ["none copies", "none views", "zeros views"]
    for zeroing, seen in first.items():
        assert seen["applied"] == [True, True, False, True, True, True], zeroing
        assert seen["dtypes"] == ["torch.float16"], zeroing
        assert "inside DistributedDataParallel already" in seen["late"], zeroing


ARCHITECTURES = [
    pytest.param(kind, emulate, id=f"{kind.name}-{'emulated' if emulate else 'real half'}")
    for kind in ZOO
    for emulate in (True, False)
    # Whisper's frozen FP32 positions meet FP16 norms, for which the CPU has no kernel, and CUDA's autocast has FP32's.
    if emulate or kind.name != "Whisper"
]


@pytest.mark.parametrize(("kind", "emulate"), ARCHITECTURES)
def test_architectures(kind: RescaledModel, emulate: bool) -> None:
    """GPT-2, T5, Llama, BERT, ViT, Whisper with FP16 parameters on the CPU: losses of three steps are near FP32's."""
    losses: dict[str, list[float]] = {}
    for mode in ("no", "fp16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(mixed_precision=mode, cpu=True)
        options = {"precision_mode": "FP16", "emulate": emulate} if mode == "fp16" else {}
        hf_amp.attach(accelerator, MixedPrecisionConfig(init_scale=256.0, **options))
        model, batches = kind.plain(0), kind.batches(0)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=kind.learning_rate))
        losses[mode] = []
        for _ in range(3):
            loss = model(**next(batches)).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            assert not accelerator.optimizer_step_was_skipped
            losses[mode].append(loss.item())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float16}
    assert losses["fp16"] == pytest.approx(losses["no"], rel=5e-3)
    assert losses["fp16"] != losses["no"]


@pytest.mark.parametrize("strategy", ["DYNAMIC", "PERFORMANCE_OPTIMIZED"])
@pytest.mark.usefixtures("fresh_accelerator_state")
def test_writes_through_data_move_master_weights_too(strategy: str) -> None:
    """A WGAN's clamp after every step, from the first on: weights stay where it puts them, within one step."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    hf_amp.attach(accelerator, precision_mode="FP16", init_scale=256.0, scaling_strategy=strategy)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=strategy != "DYNAMIC")
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(20):
        accelerator.backward(-model(torch.randn(8, 4)).mean())
        optimizer.step()
        optimizer.zero_grad()
        largest = max(p.abs().max().item() for p in model.parameters())
        assert step == 0 or largest < 0.025, (step, largest)
        for parameter in model.parameters():
            parameter.data.clamp_(-0.01, 0.01)


def losses_of(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> list[float]:
    """Evaluation losses of a few steps, in whatever mode the optimizer evaluates in."""
    forget_accelerators()
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    with hf_amp.attach(accelerator, init_scale=256.0, **options) as session:
        model, optimizer = accelerator.prepare(model, optimizer)
        losses = []
        for _ in range(4):
            optimizer.train()
            accelerator.backward(model(torch.ones(4, 4)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            optimizer.eval()
            losses.append(model(torch.ones(4, 4)).square().mean().item())
        assert session.scaler.applied_steps == 4
    assert not {"train", "eval"} & vars(optimizer.optimizer).keys()
    return losses


COMPUTED_WEIGHTS = {
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "spectral_norm by a hook": nn.utils.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "cayley": lambda layer: nn.utils.parametrizations.orthogonal(layer, orthogonal_map="cayley"),
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "none": lambda layer: layer,
}


class ScheduleFree(torch.optim.SGD):
    """Moves its parameters in `train` and `eval`, as schedulefree does: towards FP32 state, and back."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr, momentum=0.9)
        self.evaluates = False

    @torch.no_grad()
    def move(self, evaluates: bool) -> None:
        for group in self.param_groups if evaluates is not self.evaluates else ():
            for parameter in group["params"]:
                state = self.state[parameter].get("momentum_buffer")
                if state is not None:
                    parameter.lerp_(state, 0.01) if evaluates else parameter.lerp_(state, 1 - 1 / 0.99)
        self.evaluates = evaluates

    def train(self) -> None:
        self.move(False)

    def eval(self) -> None:
        self.move(True)


@pytest.mark.parametrize("kind", COMPUTED_WEIGHTS)
@pytest.mark.usefixtures("fresh_accelerator_state")
def test_weights_that_are_computed_and_optimizers_without_a_schedule(kind: str) -> None:
    """FP16 mode trains them as FP16 autocast over FP32 parameters does."""
    runs = []
    for options in ({}, {"precision_mode": "FP16"}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), COMPUTED_WEIGHTS[kind](nn.Linear(8, 8)), nn.Linear(8, 1))
        runs.append(losses_of(model, ScheduleFree(model.parameters(), 0.05), **options))
    assert runs[1] == pytest.approx(runs[0], rel=0.05, abs=1e-4)
    assert runs[0][-1] != runs[0][0]


class ScaledEmbedding(nn.Embedding):
    """Of Gemma: what is looked up is multiplied by a constant in the dtype of the weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * torch.tensor(8.0).to(self.weight.dtype)


def test_a_scaled_embedding_that_overflows_is_cured() -> None:
    """FP16 alone is to blame where an embedding times a constant leaves its range: the module goes to FP32, and the run goes on."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    with hf_amp.attach(accelerator, precision_mode="FP16", init_scale=1.0) as session:
        model = nn.Sequential(ScaledEmbedding(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        nn.init.normal_(model[0].weight, std=2e4, generator=torch.Generator().manual_seed(0))
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(3):
            accelerator.backward(model(torch.arange(4)).float().square().mean())
            optimizer.step()
            optimizer.zero_grad()
        (skip,) = [event for event in session.events if event.kind is EventKind.STEP_SKIPPED]
        assert (skip.cause, skip.modules) == (Cause.ACTIVATION, ("0",))
        assert session.metrics()["applied_steps"] == 2
