"""Two settings of one step are compared by module, and a capture holds what another machine needs for that."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import hf_amp
from hf_amp import AmpSession, AttachError, ConfigError, StateError, compare
from hf_amp.capture import MOST_BYTES, Digest, captured, load_capture, save_capture
from hf_amp.cli import app
from hf_amp.comparison import FACTOR, Setting, kind_of
from hf_amp.fallback.recorder import RecordedForward
from tests.corruptions import CORRUPTIONS, build, cases, equal_pairs, judged
from tests.each import for_each, forget_accelerators
from tests.fallback.rescaled import ZOO, RescaledModel
from tests.reference import assert_bitwise_equal, tiny_mlp

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FP16 = {"precision": "FP16"}


def test_the_corrupted_module_is_named(full_size: bool) -> None:
    """A weight, a kernel, a dtype, a transposition, a residual, an epsilon, a buffer, in six architectures: by name, and no other."""
    some = list(cases(200))[:: 1 if full_size else 19]
    assert {case.corruption for case in some} == set(CORRUPTIONS)
    verdicts = [judged(*case.compared()) for case in some]
    assert verdicts.count("wrong") == 0
    assert verdicts.count("right") >= 0.95 * len(some)


def test_equal_code_is_equal(full_size: bool) -> None:
    """Other threads, orders of sums, attention, memory layouts and formats: no alarm."""
    for pair in list(equal_pairs(100, compiled=full_size))[:: 1 if full_size else 25]:
        found = pair.compared()
        assert found.agrees, (pair, found.sentence())
        assert not found.state


def test_compiled_code_is_compared_as_a_whole() -> None:
    """Where it agrees that is said; where the model itself differs, its module is named all the same."""
    model, batch = tiny_mlp(), [torch.randn(6, 4)]
    compiled: Any = torch.compile(copy.deepcopy(model), backend="eager")
    assert compare(model, compiled, batch).agrees
    other = copy.deepcopy(model)
    other[2].weight.data.mul_(1.01)
    found = compare(model, torch.compile(other, backend="eager"), batch)  # type: ignore[arg-type]
    assert found.modules == ["2"]
    assert "Without torch.compile they differ as well, module by module." in found.notes


def test_a_wrong_compiler_is_told_from_a_wrong_model() -> None:
    """A backend that changes a result: without it the two agree, which is said."""

    def wrong(graph: Any, _inputs: Any) -> Any:
        return lambda *inputs: tuple(y * 1.01 for y in graph(*inputs))

    model = tiny_mlp()
    found = compare(model, torch.compile(copy.deepcopy(model), backend=wrong), [torch.randn(6, 4)])  # type: ignore[arg-type]
    assert not found.agrees
    assert "Without torch.compile they agree, module by module." in found.notes


def test_nothing_of_the_models_changes() -> None:
    """Parameters, buffers, gradients, hooks and random numbers are what they were; dropout draws the same in both."""
    model, batch = build("ResNet", 0, trains=True)
    model.append = nn.Dropout()  # type: ignore[assignment]
    before = [x.clone() for x in (*model.parameters(), *model.buffers())]
    state = torch.get_rng_state()
    assert compare(model, copy.deepcopy(model), batch).closest == 0.0
    assert_bitwise_equal(before, [*model.parameters(), *model.buffers()])
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_in_a_run_is_in_the_precision_that_was_asked_for() -> None:
    """In a session, or prepared by stock accelerate: what is found is that of the model alone, and its `forward` is what it was."""
    batch, settings = {"input": torch.randn(6, 4)}, {"a": {"precision": "FP32"}, "b": {"precision": "BF16"}}
    alone = tiny_mlp()
    expected = compare(alone, alone, batch, **settings)
    assert expected.closest
    prepared, held = copy.deepcopy(alone), copy.deepcopy(alone)
    forget_accelerators()
    Accelerator(mixed_precision="bf16", cpu=True).prepare(prepared)
    forward = prepared.forward
    session = AmpSession.for_model(held, torch.optim.SGD(held.parameters(), lr=0.1))
    for model in (prepared, held):
        found = compare(model, model, batch, **settings)
        assert (found.agrees, found.closest) == (expected.agrees, expected.closest)
    assert prepared.forward is forward
    session.detach()


def test_modules_in_fp32_by_choice_are_no_difference() -> None:
    """FP16 against FP16 with a module in FP32: what it returns has another dtype, as asked for."""
    model = tiny_mlp()
    found = compare(model, model, [torch.randn(6, 4)], a=FP16, b={**FP16, "fp32_modules": ["2"]})
    assert found.agrees, found.sentence()
    assert found.facts[1]["fp32_modules"] == ["2"]


def test_other_names_are_matched_in_order() -> None:
    """Another implementation, of which one layer's weight differs: named as A names it, and said."""

    class Other(nn.Module):
        def __init__(self, model: nn.Sequential) -> None:
            super().__init__()
            self.first, self.last = copy.deepcopy(model[0]), copy.deepcopy(model[2])

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).tanh())

    model: Any = tiny_mlp()
    other = Other(model)
    same = compare(model, other, [torch.randn(6, 4)])
    assert same.agrees
    assert "Module names differ: 3 of 3 calls were matched in order" in same.notes[0]
    with torch.no_grad():
        other.last.weight[0, 0] += 0.1
    assert compare(model, other, [torch.randn(6, 4)]).modules == ["2"]


def test_a_step_that_raises_is_named() -> None:
    """In B it is a difference; in A an error that says what to do."""
    model: Any = tiny_mlp()
    other = copy.deepcopy(model)
    other[2] = nn.Linear(9, 3)
    found = compare(model, other, [torch.randn(6, 4)])
    assert found.first is not None
    assert (found.first.module, found.first.kind) == ("2", "raises")
    with pytest.raises(AttachError, match="pass a batch that it takes"):
        compare(other, model, [torch.randn(6, 4)])


def test_weights_that_a_parent_uses_are_named() -> None:
    """`nn.MultiheadAttention` uses its output projection without calling it."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    other = copy.deepcopy(model)
    other.self_attn.out_proj.weight.data.mul_(1.01)
    assert compare(model, other, [torch.randn(2, 5, 8)]).modules == ["self_attn.out_proj"]


X = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) + 0.5


@for_each(
    ("changed", "kind"),
    [
        (X * 1.01, "scale (1.01 times)"),
        (X * 0, "scale (0 times)"),
        (X + 0.02, "shift (by 0.02)"),
        (X.flip(0), "swapped order"),
        (X.where(X < 2, torch.nan), "NaN"),
        (X.where(X < 2, torch.inf), "NaN"),
        (X.where(X > -1, -torch.inf), "NaN"),
        (X.T, "wrong shape ((40, 30) in A, (30, 40) in B)"),
        (X.half(), "wrong dtype"),
        (X.bfloat16().float(), "wrong dtype (rounded to BF16)"),
        (X * (1 + 0.01 * torch.randn(40, 30, generator=torch.Generator().manual_seed(1))), "noise"),
        (X * (1 + 1e-7), None),
        (X.index_fill(0, torch.tensor([39]), 0.0), "noise"),
    ],
)
def test_kinds_are_told_apart(changed: Tensor, kind: str | None) -> None:
    """By digests alone, and so from capture files as well."""
    a, b = Digest.of(X).to_host(), Digest.of(changed).to_host()
    found = kind_of(a, b, 1e-6 * a.norm)
    assert (found and found[0]) == kind


def test_the_sketch_estimates_the_distance() -> None:
    """Within 4 standard deviations of a slow exact one, for noise and for rows that changed places."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(130, 1024, generator=generator)
    for y in (x + 0.1 * torch.randn(130, 1024, generator=generator), x.roll(64, 0)):
        exact = float((x.double() - y.double()).norm())
        assert abs(Digest.of(x).distance(Digest.of(y)) / exact - 1) < 4 * (1 / 128) ** 0.5 / 2


@pytest.mark.usefixtures("fresh_accelerator_state")
def test_a_capture_in_fp16_names_what_the_fallback_chose(tmp_path: Path, full_size: bool) -> None:
    """Compared with one in FP32, made without a session; both models at hand name the same."""
    for entry in ZOO if full_size else ZOO[:1]:
        forget_accelerators()
        names_what_the_fallback_chose(entry, tmp_path)


def names_what_the_fallback_chose(entry: RescaledModel, tmp_path: Path) -> None:
    """In a run of four steps, the first of which is captured."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    with hf_amp.attach(accelerator) as session:
        plain, batches, make_optimizer = entry.build(0)
        twin, batch = copy.deepcopy(plain), next(batches)
        model, optimizer = accelerator.prepare(plain, make_optimizer(plain))
        in_fp16 = session.capture(1, tmp_path / "fp16.safetensors")
        for _ in range(4):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        chosen = set(session.plan.modules)
    forward = RecordedForward(twin, (), dict(batch))
    with Setting("FP32").entered(twin) as current:
        in_fp32 = save_capture(captured(forward, current), forward, tmp_path / "fp32.safetensors")
    assert chosen
    assert set(compare(in_fp16, in_fp32).modules) == chosen
    assert set(compare(twin, twin, batch, a={"precision": "FP32"}, b=FP16).modules) == chosen
    if entry.name == "GPT-2":  # others lose gradients at the one scale that they leave room for
        assert compare(twin, twin, batch, a={"precision": "FP32"}, b={**FP16, "fp32_modules": sorted(chosen)}).agrees


def trained(folder: Path, capture_step: int | None, precision: str = "MIXED") -> tuple[list[Tensor], AmpSession]:
    """Parameters after four steps with a loss outside of the model, and dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    session = AmpSession.for_model(model, optimizer, precision_mode=precision)
    if capture_step:
        session.capture(capture_step, folder / f"{precision}.safetensors")
    for seed in range(4):
        torch.manual_seed(seed)
        loss = model(torch.randn(5, 4)).float().square().mean()
        session.scaler.scale(loss).backward()
        session.scaler.step(optimizer)
        session.scaler.update()
        optimizer.zero_grad()
    session.detach()
    return [p.detach().clone() for p in model.parameters()], session


def test_a_capture_changes_nothing_and_holds_its_step(tmp_path: Path) -> None:
    """The run is the same to the last bit. The file has the parameters of before the step, its dropout, and what the loss gave."""
    without, _ = trained(tmp_path, None)
    captured_at_3, session = trained(tmp_path, 3)
    assert_bitwise_equal(without, captured_at_3)
    assert any("step 3 was captured" in event.message for event in session.events)
    trace, forward_of = load_capture(tmp_path / "MIXED.safetensors")
    assert trace.facts["step"] == 3
    assert forward_of(nn.Linear(4, 4)).output_gradients.keys() == {""}
    trained(tmp_path, 3, "FP32")
    found = compare(tmp_path / "FP32.safetensors", tmp_path / "MIXED.safetensors")
    assert found.agrees  # FP16's rounding, of gradients too, whose scale is taken out
    assert found.closest > 0


def test_a_captured_step_is_repeated_on_a_model(tmp_path: Path) -> None:
    """Equal weights: to the last bit, dropout too. A corrupted copy: its module is named from the file alone."""
    model, batch = build("BERT", 1, trains=True)
    forward = RecordedForward(model, (), dict(batch), hf_amp.device.RandomState.now(()))
    with Setting().entered(model) as current:
        path = save_capture(captured(forward, current), forward, tmp_path / "a.safetensors")
    assert path.stat().st_size < MOST_BYTES
    assert compare(path, copy.deepcopy(model)).closest == 0.0
    other = copy.deepcopy(model)
    name = CORRUPTIONS["dropped residual"](other, random.Random(0))
    found = compare(path, other)
    assert found.first is not None
    assert found.first.module == name
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert json.loads(header["__metadata__"]["hf_amp capture"])["facts"]["versions"]["torch"] == torch.__version__


@for_each("content", [b"", b"{}", b"\x80\x04.", "safetensors", "header"])
def test_what_is_no_capture_is_an_error(content: bytes | str, tmp_path: Path) -> None:
    """Whatever the file holds: nothing in it is run."""
    path = tmp_path / "x.safetensors"
    if isinstance(content, str):
        broken = json.dumps({"version": 1, "facts": {}, "raised": None, "tensors": [["a", 0]], "arguments": {}})
        save_file(
            {"samples": torch.zeros(2), "figures": torch.zeros(1, 3)},
            path,
            {"hf_amp capture": broken} if content == "header" else None,
        )
    else:
        path.write_bytes(content)
    words = "it holds other tensors" if content == "safetensors" else ""
    with pytest.raises(StateError, match=rf"is no capture, or damaged \(.*{words}"):
        compare(path, path)


@for_each(
    ("options", "words"),
    [
        ({"a": {"precision": "INT8"}}, "precision 'INT8' of a: use FP16, BF16 or FP32"),
        ({"b": {"precision": "FP16", "fp32_modules": "0"}}, "fp32_modules is a list"),
        ({"b": {"precison": "FP16"}}, "options are precision"),
        ({"b": {"fp32_modules": ["0"]}}, "add precision"),
        ({"b": {"precision": "FP16", "fp32_modules": ["nine"]}}, "no module is called nine"),
        ({"batch": None}, "pass the batch"),
    ],
)
def test_a_wrong_option_is_an_error_before_anything_runs(options: dict[str, Any], words: str) -> None:
    """It says what was passed and what is allowed."""
    model = tiny_mlp()
    with pytest.raises(ConfigError, match=words):
        compare(model, model, **{"batch": [torch.randn(2, 4)], **options})


def test_a_step_that_is_over_cannot_be_captured(tmp_path: Path) -> None:
    """Nor one without a place for its file."""
    _, session = trained(tmp_path, None)
    for step, path in ((2, tmp_path / "x"), (9, None)):
        with pytest.raises(StateError, match="pass a step to come, from 5 on"):
            session.capture(step, path)


MODELS = """
import torch
from tests.reference import tiny_mlp

def model():
    return tiny_mlp()

def other():
    changed = tiny_mlp()
    changed[0].bias.data += 0.1
    return changed
"""


def test_the_commands(tmp_path: Path) -> None:
    """Models from functions of a file: equal ones end with 0, others with 1 and the module; a capture stands for a model."""
    (tmp_path / "m.py").write_text(MODELS, encoding="utf-8")
    save_file({"input": torch.randn(6, 4)}, tmp_path / "batch.safetensors")
    own, other = f"{tmp_path}/m.py:model", f"{tmp_path}/m.py:other"

    def run(*arguments: object) -> Any:
        batch = ["--batch", str(tmp_path / "batch.safetensors")]
        return CliRunner().invoke(app, [*map(str, arguments), *batch], env={"COLUMNS": "200"})

    same = run("diff", own, own)
    assert same.exit_code == 0, same.output
    assert "They agree" in same.output
    found = run("diff", own, other, "--json")
    assert found.exit_code == 1
    assert json.loads(found.stdout)["first"]["module"] == "0"
    assert json.loads(found.stdout)["first"]["kind"] == "shift (by 0.1)"
    assert run("diff", own, other, "--precision-b", "INT8").exit_code == 2
    made = run("capture", own, "--out", tmp_path / "c.safetensors", "--precision", "FP16")
    assert made.exit_code == 0, made.output
    told = run("diff", tmp_path / "c.safetensors", other)
    assert told.exit_code == 1
    assert "They part in 0, forward" in told.output
    assert run("diff", f"{tmp_path}/m.py:nothing", own).exit_code == 2


def test_the_bound_is_measured_and_not_a_constant() -> None:
    """The same relative change of an output is rounding in BF16 and a difference in FP32, by the same factor."""
    model: Any = tiny_mlp()
    other = copy.deepcopy(model)
    other[2].register_forward_hook(lambda m, i, y: y * (1 + 1e-3))
    batch = [torch.randn(6, 4)]
    assert compare(model, other, batch).modules == ["2"]
    half = {"precision": "BF16"}
    assert compare(model, other, batch, a=half, b=half).agrees
    first = compare(model, other, batch).first
    assert first is not None
    assert 0 < first.bound < FACTOR * 10 * torch.finfo(torch.float32).eps
