"""The convolutional blocks that the autoencoders and the U-Net share, under diffusers' parameter names."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from darkroom.nn.attention import attention


class ResBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice, plus the input; the time embedding is added in between (He 2015, Ho
    2020), or with `scale_shift` scales and shifts what the second norm gives (Dhariwal and Nichol 2021).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        time_dim: int | None = None,
        scale_shift: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_dim is not None:
            self.time_emb_proj = nn.Linear(time_dim, (2 if scale_shift else 1) * out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.in_channels, self.out_channels, self.scale_shift = in_channels, out_channels, scale_shift

    def forward(
        self, x: Tensor, time: Tensor | None = None, *, resize: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """`resize` takes both ways through the block to another size, before any conv."""
        h = F.silu(self.norm1(x))
        if resize is not None:
            h, x = resize(h), resize(x)
        h = self.conv1(h)
        h = self.norm2(h) if time is None else self._norm_with_time(h, time)
        h = F.silu(h)  # by itself, so that what the norm gave is not held during the conv
        h = self.conv2(h)
        shortcut = x if self.in_channels == self.out_channels else self.conv_shortcut(x)
        return shortcut + h

    def _norm_with_time(self, h: Tensor, time: Tensor) -> Tensor:
        time = self.time_emb_proj(F.silu(time))[:, :, None, None]
        if not self.scale_shift:
            return self.norm2(h + time)
        scale, shift = time.chunk(2, dim=1)
        return self.norm2(h) * (1 + scale) + shift


class Downsample(nn.Module):
    """Halve height and width by a strided conv; `asymmetric` pads right and bottom only, as autoencoders
    do.
    """

    def __init__(self, channels: int, *, asymmetric: bool) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Double height and width (or reach `size`) by nearest neighbour, then a conv."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        up = F.interpolate(x, size=size, mode="nearest") if size else F.interpolate(x, scale_factor=2.0)
        return self.conv(up)


def halve(x: Tensor) -> Tensor:
    """Halve height and width by averaging; odd sizes are rounded up, as by a strided conv."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


class SpatialAttention(nn.Module):
    """Self-attention over all positions of a picture, plus the input (Ho et al. 2020)."""

    def __init__(self, channels: int, *, groups: int, eps: float, num_heads: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        h = attention(self.to_q(h), self.to_k(h), self.to_v(h), self.num_heads)
        h = rearrange(self.to_out[0](h), "b (h w) c -> b c h w", h=x.shape[2])
        return x + h


class MLPEmbedding(nn.Module):
    """Linear, SiLU, Linear: what turns a sinusoidal or given vector into a conditioning vector.

    With `cond_dim` another vector of that width is projected and added to the first one before.
    """

    def __init__(self, in_dim: int, dim: int, *, cond_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        if cond_dim is not None:
            self.cond_proj = nn.Linear(cond_dim, in_dim, bias=False)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        if cond is not None:
            x = x + self.cond_proj(cond)
        return self.linear_2(F.silu(self.linear_1(x)))


def timestep_embedding(timestep: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Embed (B,) timesteps as (B, dim): cosines, then sines, of geometrically spaced frequencies
    (float32).
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * torch.exp(-math.log(max_period) * exponent)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))
