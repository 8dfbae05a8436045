"""The transformer inside a U-Net: the positions of a picture attend to each other and to a text."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from darkroom.nn.attention import attention

# The original releases leave LayerNorm at torch's default and give only this GroupNorm its own epsilon.
NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head attention from (B, L, channels) to itself or to a context (B, M, context_dim)."""

    def __init__(self, channels: int, num_heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        h = attention(self.to_q(x), self.to_k(source), self.to_v(source), self.num_heads, mask)
        return self.to_out[0](h)


class GEGLU(nn.Module):
    """One half of a linear map, times the GELU of the other half (Shazeer 2020, equation 5)."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The identity stands where published weights count a dropout, so that the last layer is number 2.
        self.net = nn.ModuleList(
            [GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context and a feed-forward, each normalised first and added.

    Without `context_dim` there is no cross-attention; without `self_attention` the first attention goes to
    the context too, which spares the cost of attending over many positions.
    """

    def __init__(
        self, channels: int, num_heads: int, *, context_dim: int | None, self_attention: bool = True
    ) -> None:
        super().__init__()
        self.self_attention, self.cross_attention = self_attention, context_dim is not None
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, num_heads, None if self_attention else context_dim)
        if self.cross_attention:
            self.norm2 = nn.LayerNorm(channels)
            self.attn2 = Attention(channels, num_heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        h = self.norm1(x)
        x = x + (self.attn1(h) if self.self_attention else self.attn1(h, context, mask))
        if self.cross_attention:
            x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a picture, plus the picture (Rombach et al. 2022, 3.3).

    `linear_projection` (SD 2 and later) projects the sequence where SD 1 projects the picture by 1×1 convs:
    the same function under other weight shapes.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        depth: int,
        context_dim: int | None,
        linear_projection: bool,
        groups: int,
        self_attention: bool = True,
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.proj_in = (
            nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        )
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, num_heads, context_dim=context_dim, self_attention=self_attention)
            for _ in range(depth)
        )
        self.proj_out = (
            nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        )

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        h = self._to_sequence(self.norm(x))  # (B, h·w, C)
        for block in self.transformer_blocks:
            h = block(h, context, mask)
        return x + self._to_picture(h, x.shape[2])  # (B, C, h, w)

    def _to_sequence(self, x: Tensor) -> Tensor:
        if self.linear_projection:
            return self.proj_in(rearrange(x, "b c h w -> b (h w) c"))
        return rearrange(self.proj_in(x), "b c h w -> b (h w) c")

    def _to_picture(self, x: Tensor, height: int) -> Tensor:
        if self.linear_projection:
            return rearrange(self.proj_out(x), "b (h w) c -> b c h w", h=height)
        return self.proj_out(rearrange(x, "b (h w) c -> b c h w", h=height))
