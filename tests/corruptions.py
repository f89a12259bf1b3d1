"""Pairs of models for `hf_amp.compare`: with one module corrupted, or of the same function in other code."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from hf_amp.comparison import Comparison, compare

Batch = dict[str, Tensor]
Built = tuple[nn.Module, Batch]


# ---- six architectures -------------------------------------------------------------------------------------------


def _text(rows: int = 2, length: int = 12, vocabulary: int = 97) -> Batch:
    ids = torch.randint(3, vocabulary, (rows, length))
    return {"input_ids": ids, "labels": ids.clone()}


def gpt2() -> Built:
    """Learned positions, Conv1D, pre-norm."""
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=97, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config), _text()


def llama() -> Built:
    """Rotary embeddings (a buffer), grouped queries, RMSNorm, a gated MLP."""
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), _text()


def bert() -> Built:
    """Post-norm, token types, a pooler."""
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=97, num_labels=3
    )
    return transformers.BertForSequenceClassification(config), {**_text(), "labels": torch.tensor([0, 2])}


def t5() -> Built:
    """Encoder and decoder, relative positions, RMSNorm, a tied embedding."""
    config = transformers.T5Config(
        num_layers=2, d_model=32, d_ff=64, d_kv=8, num_heads=4, vocab_size=97, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), _text()


def vit() -> Built:
    """Patches by convolution, a class token that is no module."""
    config = transformers.ViTConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4, image_size=16, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 2])}
    return transformers.ViTForImageClassification(config), batch


def resnet() -> Built:
    """Convolutions, batch norms with running statistics."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3
    )
    batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 2, 1, 0])}
    return transformers.ResNetForImageClassification(config), batch


ARCHITECTURES: dict[str, Callable[[], Built]] = {
    "GPT-2": gpt2, "Llama": llama, "BERT": bert, "T5": t5, "ViT": vit, "ResNet": resnet,
}  # fmt: skip


def build(architecture: str, seed: int, trains: bool) -> Built:
    """Equal for equal seeds. Norms and biases are not left at 1 and 0, as in a model that was trained."""
    torch.manual_seed(seed)
    model, batch = ARCHITECTURES[architecture]()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
        for name, x in model.named_buffers():
            if name.endswith("running_mean"):
                x.normal_(std=0.1)
            elif name.endswith("running_var"):
                x.uniform_(0.5, 1.5)
    return model.train(trains), batch


# ---- corruptions of a single module ------------------------------------------------------------------------------

BLOCKS = {
    "GPT2Block", "LlamaDecoderLayer", "BertOutput", "BertSelfOutput", "T5LayerSelfAttention", "T5LayerCrossAttention",
    "T5LayerFF", "ViTLayer", "ResNetBasicLayer",
}  # fmt: skip
"""Classes whose forward adds its first argument to what it returns (in BERT its second, before the norm)."""


class _WrongGradient(torch.autograd.Function):
    """A kernel whose forward is right, and whose derivative is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 1.05


def _own(model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> list[str]:
    return [name for name, module in model.named_modules() if name and wanted(name, module)]


def _with_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """`change` is done inside of the module's forward."""
    former = module.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        output = former(*arguments, **options)
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    module.forward = forward  # type: ignore[method-assign]


def _weight(model: nn.Module, pick: random.Random) -> str:
    """One to all elements of a parameter, by a hundredth or more of their size."""
    name, p = pick.choice([(n, p) for n, p in model.named_parameters() if p.numel() > 1 and _is_used(model, n)])
    with torch.no_grad():
        count = pick.choice([1, p.numel() // 2 or 1, p.numel()])
        at = torch.randperm(p.numel())[:count]
        size = float(p.abs().mean()) * pick.choice([0.05, 0.3, 1.0])
        p.view(-1)[at] += size * torch.randn(count).sign()
    return name.rpartition(".")[0]


def _is_used(model: nn.Module, name: str) -> bool:
    """Whether the batch reaches all of the parameter: not of tables, of which it uses some rows."""
    table = model.get_submodule(name.rpartition(".")[0])
    return not isinstance(table, nn.Embedding) and "position_embeddings" not in name


def _kernel(model: nn.Module, pick: random.Random) -> str:
    """What a module without children returns: times a number, plus one, noise, swapped rows, a lost block, or a wrong gradient."""
    name = pick.choice(_own(model, lambda _, m: not list(m.children()) and bool(list(m.parameters()))))
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda y: y * 1.05,
        lambda y: y + 0.1 * y.detach().abs().mean(),
        lambda y: y * (1 + 0.1 * torch.linspace(-1, 1, y.shape[-1]).to(y)),
        lambda y: y.roll(1, -1),
        lambda y: torch.cat([y[..., :-1], torch.zeros_like(y[..., -1:])], -1),
        lambda y: _WrongGradient.apply(y) if y.requires_grad else y * 1.05,  # type: ignore[no-untyped-call]
    ]
    _with_output(model.get_submodule(name), pick.choice(changes))
    return name


def _dtype(model: nn.Module, pick: random.Random) -> str:
    """A module that computes in BF16 or FP16, and returns that or FP32."""
    name = pick.choice(_own(model, lambda _, m: not list(m.children()) and bool(list(m.parameters()))))
    module, dtype = model.get_submodule(name), pick.choice([torch.bfloat16, torch.float16])
    _with_output(module, lambda y: y.to(dtype) if pick_back else y.to(dtype).to(y.dtype))
    pick_back = pick.random() < 0.3
    return name


def _transposed(model: nn.Module, pick: random.Random) -> str:
    """A square matrix."""
    square = [
        n for n, p in model.named_parameters() if p.dim() == 2 and p.shape[0] == p.shape[1] and _is_used(model, n)
    ]
    if not square:  # convolutions: the kernel's two sides
        square = [n for n, p in model.named_parameters() if p.dim() == 4 and p.shape[-1] > 1]
    name = pick.choice(square)
    p = model.get_parameter(name)
    p.data = p.data.transpose(-1, -2).contiguous()
    return name.rpartition(".")[0]


def _residual(model: nn.Module, pick: random.Random) -> str:
    """A block that forgets to add what it was given."""
    name = pick.choice(_own(model, lambda _, m: type(m).__name__ in BLOCKS))
    module = model.get_submodule(name)
    former = module.forward
    if type(module).__name__.startswith("Bert"):

        def forward(hidden: Tensor, residual: Tensor) -> Any:
            return former(hidden, torch.zeros_like(residual))

    else:

        def forward(hidden: Tensor, *arguments: Any, **options: Any) -> Any:
            output = former(hidden, *arguments, **options)
            if isinstance(output, tuple):
                return (output[0] - hidden, *output[1:])
            return output - hidden if output.shape == hidden.shape else output * 0.5

    module.forward = forward  # type: ignore[method-assign]
    return name


def _epsilon(model: nn.Module, pick: random.Random) -> str:
    """A norm with another epsilon of those that models have."""
    attribute = {"eps", "variance_epsilon"}
    name = pick.choice(_own(model, lambda _, m: bool(attribute & vars(m).keys())))
    module = model.get_submodule(name)
    which = next(iter(attribute & vars(module).keys()))
    setattr(module, which, pick.choice([e for e in (1e-3, 1e-4, 1e-8) if e != getattr(module, which)]))
    return name


def _buffer(model: nn.Module, pick: random.Random) -> str:
    """A buffer that is used and is not what it should be: running statistics, frequencies. Without one, what a constant was."""
    held = [n for n, x in model.named_buffers() if x.is_floating_point() and "original" not in n]
    if not held:
        name = pick.choice(
            _own(model, lambda _, m: not list(m.children()) and hasattr(m, "weight") and m.weight.dim() == 1)
        )
        module = model.get_submodule(name)
        stale = module.weight.detach().clone() * 0.9
        _with_output(module, lambda y: y * (stale / module.weight.detach()).to(y))
        return name
    name = pick.choice(held)
    with torch.no_grad():
        model.get_buffer(name).mul_(1.2).add_(0.01)
    return name.rpartition(".")[0]


CORRUPTIONS: dict[str, Callable[[nn.Module, random.Random], str]] = {
    "weight": _weight,
    "kernel result": _kernel,
    "dtype": _dtype,
    "transposed": _transposed,
    "dropped residual": _residual,
    "wrong epsilon": _epsilon,
    "stale buffer": _buffer,
}


@dataclass(frozen=True)
class Case:
    """One corruption: in which model, precision and mode."""

    number: int
    corruption: str
    architecture: str
    precision: str
    trains: bool

    def models(self) -> tuple[nn.Module, nn.Module, Batch, str]:
        """The sound model, the corrupted one, the batch, and the corrupted module's name."""
        model, batch = build(self.architecture, self.number, self.trains)
        other = copy.deepcopy(model)
        torch.manual_seed(self.number)
        return model, other, batch, CORRUPTIONS[self.corruption](other, random.Random(self.number))

    def compared(self) -> tuple[Comparison, str]:
        """What is found, and which module it should be."""
        model, other, batch, truth = self.models()
        setting = {"precision": self.precision}
        return compare(model, other, batch, a=setting, b=setting), truth


def cases(count: int) -> Iterator[Case]:
    """Kinds and architectures in turn; a third of what is coarse enough to be seen in it in half precision."""
    for number in range(count):
        corruption = list(CORRUPTIONS)[number % len(CORRUPTIONS)]
        architecture = list(ARCHITECTURES)[(number // len(CORRUPTIONS)) % len(ARCHITECTURES)]
        coarse = corruption in ("kernel result", "transposed", "dropped residual")
        precision = ("FP32", "BF16", "FP16")[(number // 42) % 3] if coarse else "FP32"
        trains = corruption != "stale buffer" and number % 2 == 0
        yield Case(number, corruption, architecture, precision, trains)


# ---- the same function in other code -----------------------------------------------------------------------------


def _rows_in_another_order(model: nn.Module) -> None:
    """Every matrix product takes its rows in another order, so that sums over the batch do."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            former = module.forward

            def forward(x: Tensor, former: Any = former) -> Tensor:
                flat = x.reshape(-1, x.shape[-1])
                order = torch.arange(flat.shape[0], device=x.device).flip(0)
                return former(flat[order])[order].reshape(*x.shape[:-1], -1)

            module.forward = forward  # type: ignore[method-assign]


def _sums_in_another_order(model: nn.Module) -> None:
    """Every matrix product sums in another order, in two parts."""
    for module in model.modules():
        if isinstance(module, nn.Linear):

            def forward(x: Tensor, module: nn.Linear = module) -> Tensor:
                half = x.shape[-1] // 2
                first = functional.linear(x[..., half:].flip(-1), module.weight[:, half:].flip(-1))
                return first + functional.linear(x[..., :half], module.weight[:, :half], module.bias)

            module.forward = forward  # type: ignore[method-assign]


def _eager_attention(model: nn.Module) -> None:
    model.set_attn_implementation("eager")  # type: ignore[operator]


def _channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, PyTorch has so many."""
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)


EQUAL_CODE: dict[str, Callable[[nn.Module], None]] = {
    "threads": lambda model: None,
    "rows in another order": _rows_in_another_order,
    "sums in another order": _sums_in_another_order,
    "another attention": _eager_attention,
    "another memory layout": _channels_last,
    "compiled": lambda model: None,
    "another precision": lambda model: None,
}


@dataclass(frozen=True)
class EqualPair:
    """Two models that compute the same, in other code or another format."""

    number: int
    what: str
    architecture: str
    precision: str
    trains: bool

    def compared(self) -> Comparison:
        model, batch = build(self.architecture, self.number, self.trains)
        other: Any = copy.deepcopy(model)
        EQUAL_CODE[self.what](other)
        if self.what == "compiled":
            other = torch.compile(other)
        setting = {"precision": self.precision}
        if self.what == "another precision":
            return compare(model, other, batch, a={"precision": "FP32"}, b=setting)
        if self.what != "threads":
            return compare(model, other, batch, a=setting, b=setting)
        first = other.forward

        def forward(*arguments: Any, **options: Any) -> Any:
            with threads(3):
                return first(*arguments, **options)

        other.forward = forward
        return compare(model, other, batch, a=setting, b=setting)


def equal_pairs(count: int, compiled: bool = True) -> Iterator[EqualPair]:
    """Kinds, architectures and precisions in turn."""
    kinds = [what for what in EQUAL_CODE if compiled or what != "compiled"]
    for number in range(count):
        what = kinds[number % len(kinds)]
        architecture = list(ARCHITECTURES)[(number // len(kinds)) % len(ARCHITECTURES)]
        if what == "another attention" and architecture == "ResNet":
            what = "rows in another order"
        if what == "compiled" and architecture not in ("GPT-2", "ResNet"):
            what = "sums in another order"  # compilation takes minutes
        precision = ("FP32", "BF16", "FP16")[(number // 3) % 3]
        if what == "another precision":
            precision = "BF16" if number % 2 else "FP16"
        yield EqualPair(number, what, architecture, precision, number % 2 == 0)


def judged(found: Comparison, truth: str) -> str:
    """ "right", "wrong" or "not seen": whether the named module is `truth`."""
    if found.first is not None:
        return "right" if found.first.module == truth else "wrong"
    named = {each.module for each in found.state} or set(found.attributes)
    return "not seen" if not named else "right" if named == {truth} else "wrong"
