"""What a CPU computes under `emulate` is what CUDA's rules give: PyTorch's own for autocast, FP32 rounded once for kernels."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import hf_amp
from hf_amp.emulation import EmulatedPrecision, _set_active
from hf_amp.errors import in_one_line
from hf_amp.tree import tensors_of
from tests.fallback.random_models import _BOTH_SIDES, FAMILIES, Family, _of, is_layer, random_batch
from tests.reference import OnDevice, cuda_rules, on_device

_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_PIXELS = {"image_size": 8, "num_channels": 1, "num_labels": 3}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_channels": 1, "num_labels": 3}
MODELS: dict[str, Family] = FAMILIES | {
    "mixtral": Family(_of(hf.MixtralForCausalLM, hf.MixtralConfig, num_key_value_heads=1, num_local_experts=2, experts_implementation="eager")),
    "gemma3": Family(_of(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, num_key_value_heads=1, head_dim=8)),
    "mistral": Family(_of(hf.MistralForCausalLM, hf.MistralConfig, num_key_value_heads=1)),
    "olmo2": Family(_of(hf.Olmo2ForCausalLM, hf.Olmo2Config)),
    "bloom": Family(_of(hf.BloomForCausalLM, hf.BloomConfig)),
    "mamba2": Family(_of(hf.Mamba2ForCausalLM, hf.Mamba2Config, num_heads=4, head_dim=8, state_size=8, n_groups=1, chunk_size=4)),
    "roberta": Family(_of(hf.RobertaForMaskedLM, hf.RobertaConfig, max_position_embeddings=32)),
    "electra": Family(_of(hf.ElectraForMaskedLM, hf.ElectraConfig, max_position_embeddings=32, embedding_size=16)),
    "albert": Family(_of(hf.AlbertForMaskedLM, hf.AlbertConfig, max_position_embeddings=32, embedding_size=8)),
    "deberta": Family(_of(hf.DebertaV2ForMaskedLM, hf.DebertaV2Config, max_position_embeddings=32, relative_attention=True)),
    "falcon": Family(_of(hf.FalconForCausalLM, hf.FalconConfig)),
    "gptj": Family(_of(hf.GPTJForCausalLM, hf.GPTJConfig, n_positions=32, rotary_dim=4)),
    "gpt_oss": Family(_of(hf.GptOssForCausalLM, hf.GptOssConfig, num_key_value_heads=1, head_dim=8, num_local_experts=2, num_experts_per_tok=1, experts_implementation="eager")),
    "lfm2": Family(_of(hf.Lfm2ForCausalLM, hf.Lfm2Config, num_key_value_heads=1)),
    "xlnet": Family(_of(hf.XLNetLMHeadModel, hf.XLNetConfig, d_model=16, n_layer=2, n_head=2, d_inner=32)),
    "fnet": Family(_of(hf.FNetForMaskedLM, hf.FNetConfig, max_position_embeddings=32)),
    "longt5": Family(_of(hf.LongT5ForConditionalGeneration, hf.LongT5Config, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, local_radius=3), "two texts"),
    "dinov2": Family(_of(hf.Dinov2ForImageClassification, hf.Dinov2Config, patch_size=4, **_PIXELS), "image"),
    "detr": Family(_of(hf.DetrForObjectDetection, hf.DetrConfig, num_queries=3, num_channels=1, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=hf.ResNetConfig(embedding_size=8, layer_type="basic", out_features=["stage2"], **_STAGES), **_BOTH_SIDES), "image"),
    "segformer": Family(_of(hf.SegformerForImageClassification, hf.SegformerConfig, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], num_channels=1, num_labels=3), "image"),
    "hubert": Family(_of(hf.HubertModel, hf.HubertConfig, conv_dim=[8], conv_stride=[2], conv_kernel=[4], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0, layerdrop=0.0, feat_extract_norm="layer"), "audio"),
    "resnet": Family(_of(hf.ResNetForImageClassification, hf.ResNetConfig, embedding_size=8, layer_type="basic", **_STAGES), "image"),
    "convnext": Family(_of(hf.ConvNextForImageClassification, hf.ConvNextConfig, num_stages=2, patch_size=4, **_STAGES), "image"),
    "swin": Family(_of(hf.SwinForImageClassification, hf.SwinConfig, patch_size=2, embed_dim=8, depths=[1, 1], num_attention_heads=[2, 2], window_size=2, **_PIXELS), "image"),
    "clip": Family(_of(hf.CLIPVisionModel, hf.CLIPVisionConfig, patch_size=4, **_PIXELS), "image"),
    "wav2vec2": Family(_of(hf.Wav2Vec2Model, hf.Wav2Vec2Config, conv_dim=[8], conv_stride=[2], conv_kernel=[4], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0, layerdrop=0.0), "audio"),
}  # fmt: skip


def product(y: Tensor) -> Tensor:
    wide = y.flatten(1, -2) if y.dim() > 2 else y
    return (wide.mT @ wide * 1e6).mean() * 1e-9


def elementwise_product(y: Tensor) -> Tensor:
    return ((y * 1e4) * (y * 1e4)).mean() * 1e-9


def residual_sum(y: Tensor) -> Tensor:
    stream = y * 0 + 4e4
    return nn.functional.layer_norm(stream + stream, y.shape[-1:]).mean()


def attention_score(y: Tensor) -> Tensor:
    q = y.reshape(1, 1, -1, y.shape[-1]) * 1e4
    return (torch.softmax(q @ q.mT * 0.25, -1) @ y.reshape(1, 1, -1, y.shape[-1])).mean()


def fused_attention(y: Tensor) -> Tensor:
    q = y.reshape(1, 1, -1, y.shape[-1])
    return nn.functional.scaled_dot_product_attention(q * 1e4, q * 1e4, q * 1e4).mean() * 1e-9


def square(y: Tensor) -> Tensor:
    wide = y * 1e4
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).mean()


def reduction(y: Tensor) -> Tensor:
    wide = y.abs() * 0 + 3e4
    return torch.stack([wide.sum(), wide.mean(), wide.norm(), wide.cumsum(0).amax()]).sum() * 1e-9


def gradient(y: Tensor) -> Tensor:
    return (y - y.detach()) * 1e7


KINDS: list[Callable[[Tensor], Tensor]] = [
    product, elementwise_product, residual_sum, attention_score, fused_attention, square, reduction, gradient,
]  # fmt: skip
ALL = [(name, kind, half) for name in MODELS for kind in (None, *KINDS) for half in (False, True)]
SOME = [(name, KINDS[(n + n // len(KINDS)) % len(KINDS)], n % 2 == 1) for n, name in enumerate(MODELS)]


class Tried:
    """Outputs of every module of one forward pass in order, and gradients of one backward at a scale of 1,024."""

    def __init__(self, model: nn.Module, called: nn.Module, batch: dict[str, Any], context: Any) -> None:
        self.outputs: list[tuple[str, Tensor]] = []
        handles = [
            module.register_forward_hook(lambda _, __, output, name=name: self._note(name, output))
            for name, module in called.named_modules()
        ]
        with context:
            output = called(**batch)
        for handle in handles:
            handle.remove()
        first = next(x for x in _held(output) if x.is_floating_point() and x.requires_grad)
        (first.float().square().mean() * 1024).backward()
        self.gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()

    def _note(self, name: str, output: Any) -> None:
        self.outputs += [(name, x.detach().clone()) for x in _held(output)]


def _held(output: Any) -> list[Tensor]:
    values = list(output.values()) if isinstance(output, dict) else output
    return [x.held if isinstance(x, OnDevice) else x for x in tensors_of(values)]


def units_apart(x: Tensor, y: Tensor) -> float:
    """The largest difference of two half-precision tensors, in units of the last place of the largest finite element."""
    x, y = x.float(), y.float()
    finite = y.isfinite()
    if not finite.any():
        return 0.0
    unit = 2.0 ** torch.log2(y[finite].abs().max().clamp_min(2.0**-14)).floor().item() * torch.finfo(torch.float16).eps
    return (x - y)[finite].abs().max().item() / unit


def case(name: str, kind: Callable[[Tensor], Tensor] | None, half: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model with an overflow of that kind in a random layer, and a batch."""
    torch.manual_seed(0)
    family = MODELS[name]
    try:
        model = family.build("eager" if kind is attention_score else "sdpa").eval()
    except ValueError:  # it knows no other
        model = family.build("eager").eval()
    batch = (
        {"input_values": torch.randn(2, 64)} if family.kind == "audio" else random_batch(family.kind, embedded=False)
    )
    batch = {key: x for key, x in batch.items() if key not in ("labels", "weights")}
    if family.kind == "text":
        model.config.use_cache = False
    if kind is not None:
        layers = [module for path, module in model.named_modules() if is_layer(module) and re.search(r"\.\d", path)]
        random.Random(name).choice(layers).register_forward_hook(lambda _, __, y: y + kind(y))
    if name == "fnet":  # a device transforms FP16 of powers of two alone
        batch = {key: x[:, :4] for key, x in batch.items()}
    if half:
        model = model.half()
        batch = {key: x.half() if x.is_floating_point() else x for key, x in batch.items()}
    return model, batch


def compare(name: str, kind: Callable[[Tensor], Tensor] | None, half: bool) -> float:
    """Asserts that both give the same; returns the largest difference of an output, in units of the last place."""
    model, batch = case(name, kind, half)
    ours = Tried(model, model, batch, hf_amp.emulate(torch.float16, autocast=not half))
    on_cuda = {key: OnDevice(x) for key, x in batch.items()}
    theirs = Tried(model, on_device(model), on_cuda, cuda_rules(None if half else torch.float16))
    worst = 0.0
    assert [module for module, _ in ours.outputs] == [module for module, _ in theirs.outputs]
    for (module, x), (_, y) in zip(ours.outputs, theirs.outputs, strict=True):
        assert x.dtype == y.dtype, module
        assert torch.equal(x.isfinite(), y.isfinite()), module
        worst = max(worst, units_apart(x, y))
    assert ours.gradients.keys() == theirs.gradients.keys()
    for parameter, g in theirs.gradients.items():
        assert torch.equal(g.isfinite(), ours.gradients[parameter].isfinite()), parameter
    return worst


class OperatorByOperator(TorchFunctionMode):
    """Computes each operator of an emulated forward pass by CUDA's rules too, on the very same operands.

    Attributes:
        apart: operator → the largest difference of an element of its half-precision results, in units of that element's last place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.apart: dict[str, float] = defaultdict(float)
        self._is_busy = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        floats = any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves((args, kwargs)))
        if self._is_busy or not floats or getattr(func, "__name__", "__get__") in ("__get__", "__set__", "size", "dim"):
            return func(*args, **kwargs)
        on_cuda = tree_map(lambda x: OnDevice(x.clone()) if isinstance(x, Tensor) else x, (args, kwargs))
        dtype = EmulatedPrecision.innermost().dtype_in_force()
        result = func(*args, **kwargs)
        self._is_busy = True
        try:
            with not_emulated(), cuda_rules(dtype):
                expected = func(*on_cuda[0], **on_cuda[1])
        finally:
            self._is_busy = False
        for x, y in zip(tree_leaves(result), tree_leaves(expected), strict=True):
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel():
                self._note(func.__name__, x, y.held)
        return result

    def _note(self, name: str, x: Tensor, y: Tensor) -> None:
        assert x.dtype == y.dtype, name
        assert torch.equal(x.isfinite(), y.isfinite()), name
        if x.dtype == torch.float16:
            self.apart[name] = max(self.apart[name], elementwise_units_apart(x, y))
        else:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)


@contextmanager
def not_emulated() -> Iterator[None]:
    """Inside of it the context that this thread has entered does nothing."""
    _set_active(False)
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        _set_active(True)


def elementwise_units_apart(x: Tensor, y: Tensor) -> float:
    """The largest difference of two half-precision tensors of the same finite elements, each in units of its own last place."""
    x, y = x[y.isfinite()].double(), y[y.isfinite()].double()
    facts = torch.finfo(torch.float16)
    units = 2.0 ** torch.log2(y.abs().clamp_min(facts.smallest_normal)).floor() * facts.eps
    return ((x - y).abs() / units).amax().item() if y.numel() else 0.0


def test_every_operator_on_the_same_operands(full_size: bool) -> None:
    """Element by element: equal to the last bit, but for kernels of another form on a CPU, within a unit of the last place.

    What differs in one operator travels to the next ones, and sums that cancel make it large beside their result. So this holds
    for each operator, and not for a whole forward pass, whose differences the test below takes beside the largest element.
    """
    cases = ALL if full_size else SOME[::3]
    apart: dict[str, float] = defaultdict(float)
    for each in cases:
        model, batch = case(*each)
        with torch.no_grad(), hf_amp.emulate(torch.float16, autocast=not each[2]), OperatorByOperator() as found:
            model(**batch)
        for name, units in found.apart.items():
            apart[name] = max(apart[name], units)
    of_another_form = {"scaled_dot_product_attention", "gelu", "layer_norm"}
    assert {name for name, units in apart.items() if units > 0} <= of_another_form
    assert max(apart.values()) <= 1
    assert len(apart) > 30


def largest_exponent(loss: Tensor, parameters: list[Tensor]) -> int:
    """Of the largest power of two as a loss scale, up to 2^40, with which gradients are finite."""
    for exponent in range(40, -24, -1):
        found = torch.autograd.grad(loss, parameters, torch.tensor(2.0**exponent), retain_graph=True, allow_unused=True)
        if all(g.isfinite().all() for g in found if g is not None):
            return exponent
    raise AssertionError("gradients overflow at every scale")


def test_the_scale_that_fits_is_the_references() -> None:
    """The largest loss scale without an overflow is within 2 bits: 3 of text, 2 of images, one of speech."""
    for name in ("gpt2", "llama", "t5", "swin", "vit", "whisper"):
        torch.manual_seed(0)
        family = MODELS[name]
        model, batch = family.build("sdpa").eval(), random_batch(family.kind, embedded=False)
        batch = {key: x for key, x in batch.items() if key not in ("labels", "weights")}
        parameters = [p for p in model.parameters() if p.requires_grad]
        with hf_amp.emulate():
            ours = largest_exponent(model(**batch).logits.float().square().mean(), parameters)
        with cuda_rules(torch.float16):
            logits = on_device(model)(**{key: OnDevice(x) for key, x in batch.items()}).logits
        assert abs(largest_exponent(logits.held.float().square().mean(), parameters) - ours) <= 2, name


def test_every_output_of_every_architecture(full_size: bool) -> None:
    """Same dtype, same finite elements, values within 2 units of the last place; the same gradients overflow."""
    cases = ALL if full_size else SOME
    apart = {}
    failed = []
    for name, kind, half in cases:
        try:
            apart[name, kind, half] = compare(name, kind, half)
        except Exception as error:
            failed.append(f"{name} {kind and kind.__name__} {'half' if half else 'autocast'}: {in_one_line(error)}")
    assert not failed, "\n".join(failed)
    worst = max(apart, key=lambda case: apart[case])
    assert apart[worst] <= 2, worst
