"""What users write outside of transformers' models computes under `emulate` as by CUDA's rules, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hf_amp
from tests.reference import OnDevice, cuda_rules, on_device
from tests.test_cuda_rules import units_apart


class Written(nn.Module):
    """A function of a layer's half-precision result, with other layers beside it."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(16, 16)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.layer(x))


def heads(h: Tensor) -> Tensor:
    return h.view(2, 6, 2, 8).transpose(1, 2)


def masked(m: Any, h: Tensor) -> Any:
    """-inf in a mask, a boolean one, and values and scores beyond 65504."""
    later = torch.ones(6, 6, device=h.device).triu(1)
    mask, large = later.masked_fill(later.bool(), -torch.inf), heads(h * 300)
    q = heads(h)
    return [
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask),
        F.scaled_dot_product_attention(q, q, q, attn_mask=~later.bool()),
        F.scaled_dot_product_attention(large, large, large * 300, is_causal=True),
    ]


def island(m: Any, h: Tensor) -> Any:
    """A region without autocast, in FP32 and in half precision."""
    with torch.autocast("cuda", enabled=False):
        wide, half = h.float() * 1e3, h * 300
        return [m.outer(wide @ wide.mT), (half @ half.mT).softmax(-1).sum(-1), half.pow(2)]


def losses(m: Any, h: Tensor) -> Any:
    """On half-precision scores, of which some are large."""
    h, labels = h.flatten(0, 1) * 30, torch.arange(12, device=h.device)
    return [
        F.cross_entropy(h, labels),
        F.cross_entropy(h, labels, label_smoothing=0.1),
        F.binary_cross_entropy_with_logits(h, h.sigmoid().detach()),
        F.mse_loss(h, h.detach() + 300),
        F.smooth_l1_loss(h, h.detach() + 1),
        F.kl_div(h.log_softmax(-1), h.detach().softmax(-1), reduction="batchmean"),
        F.nll_loss(h.log_softmax(-1), labels),
    ]


def products(m: Any, h: Tensor) -> Any:
    """In other words than a layer's."""
    a = torch.einsum("bik,kj->bij", h, m.weight)
    return [
        torch.einsum("bij,bkj->bik", a, a),
        torch.baddbmm(m.weight[:6, :6], h, h.mT, beta=0.5, alpha=2.0),
        torch.addbmm(m.weight[:6, :6], h, h.mT),
        torch.linalg.multi_dot([h[0], m.weight, m.weight[0]]),
        torch.cdist(h, a),
    ]


def promoted(m: Any, h: Tensor) -> Any:
    """Half precision beside FP32, and numbers of FP32 beside half precision."""
    wide = m.weight[:6]
    return [
        h + wide, torch.cat([h, wide.expand_as(h)]), torch.addcmul(wide, h, h), torch.where(wide > 0, h, wide),
        h + wide.sum(), h * 1e-4, h.masked_fill(h > 0, -6e4), h.index_add(1, torch.zeros(6, dtype=torch.long, device=h.device), h),
    ]  # fmt: skip


def images(m: Any, h: Tensor) -> Any:
    """Convolution, batch norm, pooling, resizing."""
    h = m.norm(m.convolution(h.reshape(2, 3, 4, 8)))
    h = F.interpolate(F.max_pool2d(h.relu(), 2), scale_factor=2, mode="bilinear")
    return [m.group(h) + F.avg_pool2d(h, 3, 1, 1), F.adaptive_avg_pool2d(h, 1), F.unfold(h, 2), F.pixel_shuffle(h, 2)]


def spectra(m: Any, h: Tensor) -> Any:
    """Complex numbers of half precision, which overflow as such."""
    z = torch.fft.rfft(h)
    return [
        torch.fft.irfft(z * 2.0),
        torch.view_as_real(torch.fft.fft(h * 1e4)),
        z.abs(),
        torch.fft.fft2(h[:, :4]).real,
    ]


def attention_of_torch(m: Any, h: Tensor) -> Any:
    return [*m.attention(h, h, h), m.attention(h, h, h, need_weights=False)[0], m.block(h), m.decoder(h, h)]


class Fold(torch.autograd.Function):
    """A product with a derivative of its own, in what arrives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight.mT.to(gradient.dtype), (x.mT.to(gradient.dtype) @ gradient).sum(0)


def own_function(m: Any, h: Tensor) -> Any:
    return [Fold.apply(h, m.weight)]


def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(16, 16))


SITUATIONS: dict[str, Callable[[], Written]] = {
    "masked attention": lambda: Written(masked),
    "island": lambda: Written(island, outer=nn.Linear(6, 6)),
    "losses": lambda: Written(losses),
    "products": lambda: Written(products, weight=weight()),
    "promoted": lambda: Written(promoted, weight=weight()),
    "images": lambda: Written(images, convolution=nn.Conv2d(3, 8, 3, padding=1, bias=False), norm=nn.BatchNorm2d(8), group=nn.GroupNorm(2, 8)),
    "spectra": lambda: Written(spectra),
    "attention of torch": lambda: Written(
        attention_of_torch,
        attention=nn.MultiheadAttention(16, 2, batch_first=True),
        block=nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
        decoder=nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True),
    ),
    "recurrent": lambda: Written(lambda m, h: [m.network(h)[0]], network=nn.RNN(16, 8, 2, bidirectional=True)),
    "own function": lambda: Written(own_function, weight=weight()),
}  # fmt: skip
HALF_MODELS = {"masked attention", "images", "spectra", "attention of torch", "recurrent", "own function"}


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("name", SITUATIONS)
def test_what_users_write(name: str) -> None:
    """Same dtypes, same finite elements, values within 2 units of the last place; gradients within 8, where products sum otherwise."""
    for half in (False, True) if name in HALF_MODELS else (False,):
        torch.manual_seed(0)
        model, x = SITUATIONS[name](), torch.randn(2, 6, 16)
        if half:
            model, x = model.half(), x.half()
        found = []
        for emulated in (True, False):
            if emulated:
                with hf_amp.emulate(torch.float16, autocast=not half):
                    results = model(x)
            else:
                with cuda_rules(None if half else torch.float16):
                    results = [each.held for each in on_device(model)(OnDevice(x))]
            finite = [each.float() for each in results if each.isfinite().all()]
            sum((each * torch.linspace(-1, 1, each.numel()).view_as(each)).sum() for each in finite).backward()
            found.append((results, {at: p.grad for at, p in model.named_parameters() if p.grad is not None}))
            model.zero_grad()
        (ours, our_gradients), (theirs, their_gradients) = found
        for n, (result, expected) in enumerate(zip(ours, theirs, strict=True)):
            assert result.dtype == expected.dtype, n
            assert torch.equal(result.isfinite(), expected.isfinite()), n
            assert units_apart(result, expected) <= 2, n
        assert our_gradients.keys() == their_gradients.keys()
        for parameter, gradient in their_gradients.items():
            assert torch.equal(our_gradients[parameter].isfinite(), gradient.isfinite()), parameter
            assert units_apart(our_gradients[parameter], gradient) <= 8, parameter
