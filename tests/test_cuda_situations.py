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
from tests.test_cuda_rules import largest_exponent, units_apart


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
    beyond = m.biased(h * 0 + 300) / 4  # 72,000, of which a bias would take 10,000
    return [
        beyond,
        m.group(h) + F.avg_pool2d(h, 3, 1, 1),
        F.adaptive_avg_pool2d(h, 1),
        F.unfold(h, 2),
        F.pixel_shuffle(h, 2),
    ]


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


def opened(m: Any, h: Tensor) -> Any:
    """Composite functions, which autocast casts as a whole: what they are made of runs without it."""
    return [
        torch.einsum("bij->b", h * 3e3),
        torch.einsum("bij,bij->b", h * 300, h * 300),
        torch.linalg.vecdot(h * 300, h * 300),
        torch.tensordot(m.weight, m.weight, 1),
        m.weight[:1] @ h.mT * 1e-3,
        m.pairs(h, h.flip(0)),
        m.outer(h.mT.contiguous().mT),
    ]


def half_alone(m: Any, h: Tensor) -> Any:
    """What is promoted where there is FP32, and is not here: the derivative is in half precision too, where squares are inf."""
    return [torch.atan2(h * 3e3, h.flip(0) * 3e3)]


def many_rows(m: Any, h: Tensor) -> Any:
    """The mean of a loss whose sum is beyond 65504."""
    rows = h.flatten(0, 1).repeat(800, 1) * 30
    return [F.cross_entropy(rows, torch.arange(9600, device=h.device) % 16)]


def gates(m: Any, h: Tensor) -> Any:
    """Where a gate is 1 to half precision its derivative is not 0."""
    return [
        F.glu(h * 8) * 1e3,
        F.multilabel_margin_loss(h[0, :, :4], torch.tensor([[1, -1, 0, 0]] * 6, device=h.device)),
    ]


def behind_a_transpose(m: Any, h: Tensor) -> Any:
    """Statistics of a batch far from zero, of channels that come last."""
    return [m.norm((h * 30 + 100).mT).mT, m.instance(h.mT * 3 + 50).mT]


def scan(m: Any, h: Tensor) -> Any:
    """A state-space model's recurrence, one step at a time."""
    step, decay = F.softplus(h), -torch.exp(m.weight[:, :4].float())
    kept = torch.exp(torch.einsum("bld,dn->bldn", step, decay))
    entered = torch.einsum("bld,bln,bld->bldn", step, h[..., :4], h)
    state, seen = torch.zeros(2, 16, 4, device=h.device, dtype=kept.dtype), []
    for n in range(6):
        state = kept[:, n] * state + entered[:, n]
        seen.append(torch.einsum("bdn,bn->bd", state.to(h.dtype), h[:, n, 4:8]))
    return [m.outer(torch.stack(seen, 1) * F.silu(h))]


def experts(m: Any, h: Tensor) -> Any:
    """Each token through two of three experts, gathered by `index_add_`."""
    tokens, shares = h.flatten(0, 1), m.router(h.flatten(0, 1)).softmax(-1)
    best, chosen = shares.topk(2, -1)
    result = torch.zeros_like(tokens)
    for n, expert in enumerate(m.experts):
        rows, slots = torch.where(chosen == n)
        result.index_add_(0, rows, (expert(tokens[rows]) * best[rows, slots, None]).to(result.dtype))
    return [result]


def denoiser(m: Any, h: Tensor) -> Any:
    """A diffusion model's block: time embedding, residual convolutions, attention over pixels, resizing."""
    x = m.enter(h.view(2, 1, 8, 12))
    x = x + m.time(F.silu(torch.linspace(0, 700, 16, device=h.device).sin().to(h.dtype)))[:, None, None]
    x = x + m.convolution(F.silu(m.group(x)))
    pixels = F.avg_pool2d(x, 2).flatten(2).mT
    scores = torch.baddbmm(pixels.new_zeros(1, 1, 1), pixels, pixels.mT, beta=0, alpha=8**-0.5)
    return [x + F.interpolate((scores.softmax(-1).to(pixels.dtype) @ pixels).mT.reshape(2, 8, 4, 6), scale_factor=2.0)]


def codebook(m: Any, h: Tensor) -> Any:
    """The nearest of a codebook, straight through."""
    rows = h.flatten(0, 1) * 30
    away = rows.pow(2).sum(1, keepdim=True) - 2 * rows @ m.weight.T + m.weight.pow(2).sum(1)
    nearest = F.embedding(away.argmin(1), m.weight)
    return [rows + (nearest - rows).detach(), F.mse_loss(nearest, rows.detach())]


def contrast(m: Any, h: Tensor) -> Any:
    """A contrastive loss with a temperature that is learned, and itself left out."""
    rows = F.normalize(h.flatten(0, 1), dim=-1)
    scores = (rows @ rows.T * m.temperature.exp()).masked_fill(
        torch.eye(12, dtype=torch.bool, device=h.device), -torch.inf
    )
    return [
        F.cross_entropy(scores, torch.arange(12, device=h.device).roll(1)),
        scores[~scores.isinf()],
        torch.logsumexp(scores, 1),
    ]


def graph(m: Any, h: Tensor) -> Any:
    """Messages along edges, added up in three ways."""
    rows, to = h.flatten(0, 1) * 10, torch.tensor([1, 1, 1, 0, 2, 2, 3, 5, 4, 4, 0, 1], device=h.device)
    wide, empty = to[:, None].expand(-1, 16), rows.new_zeros(12, 16)
    return [
        m.outer(empty.scatter_add(0, wide, rows) + empty.index_add(0, to, rows)),
        empty.scatter_reduce(0, wide, rows, "amax"),
    ]


def in_place(m: Any, h: Tensor) -> Any:
    """What is written into half precision stays it."""
    h = F.relu(h * 1e3, inplace=True).clone()
    h.add_(m.weight[:6]).mul_(300).clamp_(max=6e4)
    h[:, 0] = 0
    h[..., :2] += m.weight[0, :2]
    return [h.clone().masked_fill_(h > 100, 7.0).div_(2), (h * 1e3).nan_to_num()]


def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(16, 16))


def biased() -> nn.Conv2d:
    layer = nn.Conv2d(8, 1, 1)
    nn.init.constant_(layer.weight, 30.0)
    nn.init.constant_(layer.bias, -1e4)
    return layer


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))


SITUATIONS: dict[str, Callable[[], Written]] = {
    "masked attention": lambda: Written(masked),
    "island": lambda: Written(island, outer=nn.Linear(6, 6)),
    "losses": lambda: Written(losses),
    "products": lambda: Written(products, weight=weight()),
    "promoted": lambda: Written(promoted, weight=weight()),
    "images": lambda: Written(images, convolution=nn.Conv2d(3, 8, 3, padding=1, bias=False), norm=nn.BatchNorm2d(8), group=nn.GroupNorm(2, 8), biased=biased()),
    "spectra": lambda: Written(spectra),
    "attention of torch": lambda: Written(
        attention_of_torch,
        attention=nn.MultiheadAttention(16, 2, batch_first=True),
        block=nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
        decoder=nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True),
    ),
    "recurrent": lambda: Written(lambda m, h: [m.network(h)[0]], network=nn.RNN(16, 8, 2, bidirectional=True)),
    "own function": lambda: Written(own_function, weight=weight()),
    "opened": lambda: Written(opened, weight=weight(), pairs=nn.Bilinear(16, 16, 4), outer=nn.Linear(16, 4)),
    "half alone": lambda: Written(half_alone),
    "many rows": lambda: Written(many_rows),
    "gates": lambda: Written(gates),
    "behind a transpose": lambda: Written(behind_a_transpose, norm=nn.BatchNorm1d(16), instance=nn.InstanceNorm1d(16, affine=True)),
    "scan": lambda: Written(scan, weight=weight(), outer=nn.Linear(16, 4)),
    "experts": lambda: Written(experts, router=nn.Linear(16, 3), experts=nn.ModuleList(expert() for _ in range(3))),
    "denoiser": lambda: Written(
        denoiser, enter=nn.Conv2d(1, 8, 3, padding=1), time=nn.Linear(16, 8), group=nn.GroupNorm(2, 8), convolution=nn.Conv2d(8, 8, 3, padding=1)
    ),
    "codebook": lambda: Written(codebook, weight=weight()),
    "contrast": lambda: Written(contrast, temperature=nn.Parameter(torch.tensor(2.66))),
    "graph": lambda: Written(graph, outer=nn.Linear(16, 4)),
    "in place": lambda: Written(in_place, weight=weight()),
}  # fmt: skip
ONLY_AUTOCAST = {"island", "losses", "products", "promoted"}


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("name", SITUATIONS)
def test_what_users_write(name: str) -> None:
    """Same dtypes, same finite elements, values within 2 units of the last place; gradients within 8, where products sum otherwise."""
    for half in (False,) if name in ONLY_AUTOCAST else (False, True):
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


@pytest.mark.parametrize("name", ["behind a transpose", "scan", "denoiser", "experts", "contrast"])
def test_the_scale_that_fits_what_users_write(name: str) -> None:
    """The largest loss scale without an overflow is within 2 bits of the reference's; running statistics are equal."""
    for half in (False, True):
        torch.manual_seed(0)
        model, x = SITUATIONS[name](), torch.randn(2, 6, 16)
        if half:
            model, x = model.half(), x.half()
        parameters, on_cuda = list(model.parameters()), on_device(model)
        with hf_amp.emulate(torch.float16, autocast=not half):
            ours = largest_exponent(model(x)[0].float().square().mean(), parameters)
        with cuda_rules(None if half else torch.float16):
            theirs = largest_exponent(on_cuda(OnDevice(x))[0].held.float().square().mean(), parameters)
        assert abs(ours - theirs) <= 2, (half, ours, theirs)
        for (at, statistic), expected in zip(model.named_buffers(), on_cuda.buffers(), strict=True):
            assert torch.equal(statistic, expected.held), at
