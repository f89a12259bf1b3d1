"""Random small models for faults to set in: stacks of blocks, and tiny members of families of transformers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

WIDTH, CLASSES, WORDS = 8, 5, 32
Batch = dict[str, Any]
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.Softplus)


class Attention(nn.Module):
    """One head, with its products in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out((q @ k.mT / WIDTH**0.5).softmax(-1) @ v)


class Residual(nn.Module):
    """A block around which values flow, normalised before it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.block = nn.LayerNorm(WIDTH), block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(self.norm(x))


class Stack(nn.Module):
    """Random blocks between two layers."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for _ in range(chance.randint(1, 3)):
            kind = chance.choice(["mlp", "plain", "attention"])
            mlp = [nn.Linear(WIDTH, WIDTH), chance.choice(ACTIVATIONS)(), nn.Linear(WIDTH, WIDTH)]
            if kind == "plain":
                blocks += mlp[:2]
            else:
                blocks.append(Residual(Attention() if kind == "attention" else nn.Sequential(*mlp)))
        blocks.insert(chance.randint(0, len(blocks)), nn.Dropout(chance.choice([0.0, 0.1])))
        self.first, self.blocks, self.head = (nn.Linear(WIDTH, WIDTH), nn.ModuleList(blocks), nn.Linear(WIDTH, CLASSES))
        self._checkpoint: dict[str, Any] | None = None

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        self._checkpoint = gradient_checkpointing_kwargs

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        for block in self.blocks:
            x = block(x) if self._checkpoint is None else checkpoint(block, x, **self._checkpoint)
        return SimpleNamespace(logits=self.head(x))


class Scores(nn.Module):
    """Causal attention scores, which hold -inf by design."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        return (q @ k.mT).masked_fill(later, -torch.inf)


class Site(nn.Module):
    """A layer of a model after which a fault can be switched on. Every forward writes its buffer `running`, and draws from
    NumPy and Python, as augmentations do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scores = inner, Scores()
        self.fault: Callable[[Tensor], Tensor] | None = None
        self.register_buffer("offset", torch.zeros(1))
        self.register_buffer("running", torch.zeros(1))

    def __getattr__(self, name: str) -> Any:
        """Models look at the weights of their layers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.drawn = {"numpy": np.random.random(), "python": random.random()}
        if self.fault is not None:
            y = self.fault(y).to(y.dtype)
        self.running.lerp_(y.detach().float().mean(), 0.1)
        return (y + self.offset).to(y.dtype)


def token_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over the labels that are not ignored, each with its weight."""
    kept = labels >= 0
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, -2), labels.clamp(min=0).flatten(), reduction="none"
    ).view_as(labels)
    if weights is not None:
        losses = losses * weights
    return (losses * kept).sum() / kept.sum()


class Task(nn.Module):
    """A model with a loss in its forward, and a batch that may be an object."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.loss_fault: Callable[[Tensor], Tensor] | None = None

    def forward(
        self, labels: Tensor | None = None, weights: Tensor | None = None, data: Any = None, **inputs: Any
    ) -> Any:
        if data is not None:  # calling itself again would leave autocast entered: accelerate enters one object twice
            inputs = dict(vars(data))
            labels, weights = inputs.pop("labels"), inputs.pop("weights")
        logits = self.body(**inputs).logits
        if labels is None:
            return (logits,)
        loss = token_loss(logits, labels, weights)
        return (loss if self.loss_fault is None else self.loss_fault(loss)), logits


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        build: a tiny one, given its implementation of attention.
        kind: of batch: "stack", "text", "two texts", "image" or "speech".
    """

    build: Callable[[str], nn.Module]
    kind: str = "text"


def _of(model: type[Any], config: type[Any], **options: Any) -> Callable[[str], nn.Module]:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    # Eager and SDPA differ in what overflows: eager keeps its scores in half precision.
    return lambda attention: model(config(**{**sizes, **tokens, "attn_implementation": attention, **options}))


_BOTH_SIDES = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_start_token_id": 1,
}
_T = transformers
FAMILIES: dict[str, Family] = {
    "gpt2": Family(_of(_T.GPT2LMHeadModel, _T.GPT2Config, n_positions=32)),
    "llama": Family(_of(_T.LlamaForCausalLM, _T.LlamaConfig, num_key_value_heads=1)),
    "qwen3": Family(_of(_T.Qwen3ForCausalLM, _T.Qwen3Config, num_key_value_heads=1, head_dim=8)),
    "gemma2": Family(
        _of(_T.Gemma2ForCausalLM, _T.Gemma2Config, num_key_value_heads=1, head_dim=8, attn_implementation="eager")
    ),
    "mixtral": Family(
        _of(_T.MixtralForCausalLM, _T.MixtralConfig, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1)
    ),
    "opt": Family(_of(_T.OPTForCausalLM, _T.OPTConfig, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=32)),
    "phi": Family(_of(_T.PhiForCausalLM, _T.PhiConfig)),
    "gpt_neox": Family(_of(_T.GPTNeoXForCausalLM, _T.GPTNeoXConfig)),
    "bert": Family(_of(_T.BertForMaskedLM, _T.BertConfig, max_position_embeddings=32)),
    "t5": Family(
        _of(
            _T.T5ForConditionalGeneration,
            _T.T5Config,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        "two texts",
    ),
    "bart": Family(
        _of(_T.BartForConditionalGeneration, _T.BartConfig, max_position_embeddings=32, **_BOTH_SIDES), "two texts"
    ),
    "whisper": Family(
        _of(
            _T.WhisperForConditionalGeneration,
            _T.WhisperConfig,
            num_mel_bins=4,
            max_source_positions=8,
            max_target_positions=16,
            **_BOTH_SIDES,
        ),
        "speech",
    ),
    "vit": Family(
        _of(_T.ViTForImageClassification, _T.ViTConfig, image_size=8, patch_size=4, num_channels=1, num_labels=CLASSES),
        "image",
    ),
}


def random_batch(kind: str, embedded: bool) -> Batch:
    """What a model of a family of that `kind` takes, its labels, and a weight for each; words as vectors where `embedded`."""
    if kind == "stack":
        batch, of = {"x": torch.randn(2, 4, WIDTH)}, torch.randint(CLASSES, (2, 4))
    elif kind == "image":
        batch, of = {"pixel_values": torch.randn(2, 1, 8, 8)}, torch.randint(CLASSES, (2,))
    else:
        words = torch.randint(3, WORDS, (2, 6))
        batch, of = {"input_ids": words}, words.clone()
        if embedded:
            batch = {"inputs_embeds": torch.randn(2, 6, 16)}
        if kind == "speech":
            batch = {"input_features": torch.randn(2, 4, 16)}
        if kind != "text":
            batch["decoder_input_ids"] = torch.randint(3, WORDS, (2, 6))
    return {**batch, "labels": of, "weights": torch.ones(of.shape)}


def is_layer(module: nn.Module) -> bool:
    """Whether it multiplies by a matrix of its own."""
    return isinstance(module, (nn.Linear, Conv1D))


def insert_site(body: nn.Module, chance: random.Random) -> Site:
    """Puts a `Site` around a random layer or normalisation inside of a block."""
    found = {
        name: module
        for name, module in body.named_modules()
        if any(part.isdigit() for part in name.split("."))
        and (is_layer(module) or "norm" in type(module).__name__.lower())
    }
    name = chance.choice(list(found))
    site, (parent, _, child) = Site(found[name]), name.rpartition(".")
    setattr(body.get_submodule(parent), child, site)
    return site


def random_body(chance: random.Random, family: str, checkpointing: str, eager: bool) -> tuple[nn.Module, Site]:
    """A model of that family with a site in it; `checkpointing` is "none", "reentrant" or "non-reentrant"."""
    transformers.logging.set_verbosity_error()
    body = Stack(chance) if family == "stack" else FAMILIES[family].build("eager" if eager else "sdpa")
    site = insert_site(body, chance)
    if checkpointing != "none":
        body.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"}
        )
    return body, site
