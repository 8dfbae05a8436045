"""T5's encoder, version 1.1 (Raffel et al. 2020; gated GELU after Shazeer 2020), as in SD 3 and FLUX."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import InputError, require_positive
from darkroom.nn.attention import attention

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """The shape of a T5 encoder; the defaults are T5 1.1 XXL's (4.76 billion parameters).

    `head_width` is each head's width, which heads × head_width need not make `width`; `intermediate` is the
    width of each half of the gated feed-forward. Distances are sorted into `buckets`, half of them for either
    direction, growing logarithmically up to `max_distance`. Raises InputError where a number cannot be.
    """

    kind: Literal["t5"] = "t5"
    vocab_size: int = 32128
    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_width: int = 64
    intermediate: int = 10240
    buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        require_positive("t5", self, ("vocab_size", "width", "layers", "heads", "head_width", "intermediate"))
        if self.buckets < 4 or self.buckets % 4:
            raise InputError(f"t5: `buckets` = {self.buckets} must be a multiple of 4")
        if self.max_distance <= self.buckets // 4:
            raise InputError(f"t5: `max_distance` = {self.max_distance} must be over a quarter of `buckets`")


class SelfAttention(nn.Module):
    """Multi-head self-attention without biases and without scaling by the root of the head's width."""

    def __init__(self, config: T5Config, *, has_relative_bias: bool) -> None:
        super().__init__()
        inner = config.heads * config.head_width
        self.heads = config.heads
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)
        if has_relative_bias:  # the first layer's serves all of them
            self.relative_attention_bias = nn.Embedding(config.buckets, config.heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.o(attention(self.q(x), self.k(x), self.v(x), self.heads, bias, scale=1.0))


class AttentionLayer(nn.Module):
    """Self-attention, normalised first and added."""

    def __init__(self, config: T5Config, *, has_relative_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(config, has_relative_bias=has_relative_bias)
        self.layer_norm = nn.RMSNorm(config.width, eps=EPS)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class GatedFeedForward(nn.Module):
    """Two linear maps, one through GELU's tanh approximation, multiplied and mapped back."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.width, config.intermediate, bias=False)
        self.wi_1 = nn.Linear(config.width, config.intermediate, bias=False)
        self.wo = nn.Linear(config.intermediate, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class FeedForwardLayer(nn.Module):
    """The gated feed-forward, normalised first and added."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = GatedFeedForward(config)
        self.layer_norm = nn.RMSNorm(config.width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    """Attention, then feed-forward."""

    def __init__(self, config: T5Config, *, has_relative_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            [AttentionLayer(config, has_relative_bias=has_relative_bias), FeedForwardLayer(config)]
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, bias))


class Stack(nn.Module):
    """The blocks and the norm after them."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(config, has_relative_bias=k == 0) for k in range(config.layers))
        self.final_layer_norm = nn.RMSNorm(config.width, eps=EPS)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    """The encoder half of T5 1.1.

    Parameters carry the names of the published files, of which `encoder.embed_tokens.weight`, where it is
    there, is a second copy of `shared.weight`.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.width)
        self.encoder = Stack(config)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The last states (B, L, D) of token ids (B, L), int64, through the final norm.

        `mask` (B, L) is True at the tokens that may be seen; SD 3 and FLUX see all, padding too.
        """
        positions = torch.arange(ids.shape[1], device=ids.device)
        bias = self.relative_bias(positions[None, :] - positions[:, None])  # (1, H, L, L)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None, :], -torch.inf)
        return self.encoder(self.shared(ids), bias)

    def relative_bias(self, offset: Tensor) -> Tensor:
        """What each head adds to the scores of keys at `offset` (L, L) from the queries: (1, H, L, L)."""
        embedding = self.get_submodule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias")
        return embedding(bucket(offset, self.config)).permute(2, 0, 1)[None]


def bucket(offset: Tensor, config: T5Config) -> Tensor:
    """The bucket of each key's offset from its query (Raffel et al. 2020, section 2.1).

    Half of the buckets are for keys after the query. Of each half the first half are single distances, the
    rest grow logarithmically up to `max_distance`, and the last holds everything further away.
    """
    half = config.buckets // 2
    exact = half // 2
    distance = offset.abs()
    scale = (half - exact) / math.log(config.max_distance / exact)
    far = exact + ((distance.clamp(min=1).float() / exact).log() * scale).long()
    near_or_far = torch.where(distance < exact, distance, far.clamp(max=half - 1))
    return near_or_far + half * (offset > 0)
