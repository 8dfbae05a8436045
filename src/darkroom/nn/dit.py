"""The diffusion transformer (Peebles and Xie 2023), conditioned on classes, a text or a vector."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from darkroom.errors import InputError, require_positive
from darkroom.nn.attention import attention
from darkroom.nn.dit_layers import (
    FREQUENCIES,
    MAX_PERIOD,
    MLP,
    FinalLayer,
    HeadNorm,
    PatchEmbedder,
    VectorEmbedder,
    initialise,
    modulate,
    patch_grid,
    plain_norm,
    sincos_positions,
)
from darkroom.nn.extra import PER_CALL, Extra, check_context
from darkroom.nn.layers import timestep_embedding

# What starts at zero, and what starts small.
ZEROS = ("adaLN_modulation.1.weight", "cross_attn.proj.weight", "final_layer.linear.weight")
EMBEDDERS = ("t_embedder", "pooled_embedder", "y_embedder")

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The shape of a diffusion transformer; the defaults are DiT-XL/2's for pictures of 256 pixels.

    `sample_size` is the side in latent cells that the fixed positions are made for. With `num_classes` there
    is one class more, `null_class`, for no class. `context_dim` adds cross-attention to a text in every
    block, `pooled_dim` a vector beside the timestep. Twice as many `out_channels` as `in_channels` learn a
    variance too. `qk_norm` normalises queries and keys per head (Dehghani et al. 2023). `positions` "rope"
    rotates them by row and column (Su et al. 2021) instead of adding fixed sines. `frequency_shift` 1 spaces
    the frequencies of the timestep so that the last is exactly 1 / 10,000: how diffusers runs its DiT, while
    the original has 0. Raises InputError where the numbers don't fit together.
    """

    kind: Literal["dit"] = "dit"
    in_channels: int = 4
    out_channels: int = 8
    sample_size: int = 32
    patch_size: int = 2
    width: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int | None = 1000
    context_dim: int | None = None
    pooled_dim: int | None = None
    qk_norm: bool = False
    positions: Literal["sincos", "rope"] = "sincos"
    frequency_shift: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        require_positive(
            "dit", self, ("in_channels", "out_channels", "patch_size", "width", "depth", "num_heads")
        )
        if self.sample_size < 1 or self.sample_size % self.patch_size:
            raise InputError(
                f"dit: `sample_size` = {self.sample_size} must divide by `patch_size` = {self.patch_size}"
            )
        # Rows and columns take a half each, and every half sines and cosines.
        heads, rope = self.num_heads, self.positions == "rope"
        if self.width % heads or (self.width // heads if rope else self.width) % 4:
            what = "a head" if rope else "it"
            raise InputError(
                f"dit: `width` = {self.width} must divide by `num_heads` = {heads}, "
                f"and {what} by 4 for positions {self.positions!r}"
            )

    @property
    def grid_size(self) -> int:
        """Patches along a side of `sample_size`."""
        return self.sample_size // self.patch_size

    @property
    def null_class(self) -> int:
        """The class label that stands for no class; raises InputError if the network has no classes."""
        if self.num_classes is None:
            raise InputError("this DiT has no classes, so it has no null class")
        return self.num_classes


@dataclass(frozen=True)
class Conditioning:
    """What every block is told.

    `vector` (B, D), `context` (B, L, context_dim), `mask` (B, 1, 1, L), `rotation` two of (h·w, 1, head / 2).
    """

    vector: Tensor
    context: Tensor | None
    mask: Tensor | None
    rotation: Rotation | None


class LabelEmbedder(nn.Module):
    """A vector per class and one more for no class."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class SelfAttention(nn.Module):
    """Multi-head attention among the patches, q, k and v from one matrix."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.q_norm, self.k_norm = _head_norms(config)

    def forward(self, x: Tensor, rotation: Rotation | None, *, alone: bool = False) -> Tensor:
        """`alone` lets each patch see itself only, so that it finds its own value."""
        if alone:
            return self.proj(self.qkv(x).chunk(3, dim=-1)[2])
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b l h d", three=3, h=self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k, v = (rearrange(t, "b l h d -> b l (h d)") for t in (q, k, v))
        return self.proj(attention(q, k, v, self.num_heads))


class CrossAttention(nn.Module):
    """Multi-head attention from the patches to a context (B, L, context_dim)."""

    def __init__(self, config: DiTConfig, context_dim: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_linear = nn.Linear(config.width, config.width)
        self.kv_linear = nn.Linear(context_dim, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.q_norm, self.k_norm = _head_norms(config)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        k, v = self.kv_linear(context).chunk(2, dim=-1)
        q, k = (rearrange(t, "b l (h d) -> b l h d", h=self.num_heads) for t in (self.q_linear(x), k))
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rearrange(t, "b l h d -> b l (h d)") for t in (q, k))
        return self.proj(attention(q, k, v, self.num_heads, mask))


class DiTBlock(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the conditioning (adaLN-zero).

    The text, if there is one, is read in between, without normalisation or gate (Chen et al. 2023, PixArt-α).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = plain_norm(config.width)
        self.attn = SelfAttention(config)
        if config.context_dim is not None:
            self.cross_attn = CrossAttention(config, config.context_dim)
        self.norm2 = plain_norm(config.width)
        self.mlp = MLP(config.width, int(config.width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(self, x: Tensor, cond: Conditioning, *, alone: bool = False) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(
            cond.vector
        )[:, None].chunk(6, dim=-1)  # (B, 1, D) each
        h = modulate(self.norm1(x), shift_attn, scale_attn)
        x = x + gate_attn * self.attn(h, cond.rotation, alone=alone)
        if cond.context is not None:
            x = x + self.cross_attn(x, cond.context, cond.mask)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class DiT(nn.Module):
    """The diffusion transformer with adaLN-zero.

    Parameters carry the names of the original release, the cross-attention those of PixArt-α. A new network
    starts with its output at zero and its blocks adding nothing; loading a checkpoint overwrites that.
    """

    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbedder(config.in_channels, config.width, config.patch_size)
        self.t_embedder = VectorEmbedder(FREQUENCIES, config.width)
        if config.num_classes is not None:
            self.y_embedder = LabelEmbedder(config.num_classes, config.width)
        if config.pooled_dim is not None:
            self.pooled_embedder = VectorEmbedder(config.pooled_dim, config.width)
        if config.positions == "sincos":
            self.register_buffer("pos_embed", square_positions(config))
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.width, config.out_channels, config.patch_size)
        initialise(self, zeros=ZEROS, embedders=EMBEDDERS)

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor | None, *, extra: Extra | None = None
    ) -> Tensor:
        """Predict from noisy latents what the denoiser asks for.

        Shapes: `x` (B, in_channels, h, w) whose sides divide by the patch size, `timestep` (B,) on the 0..999
        scale, `context` (B, L, context_dim) or None, result (B, out_channels, h, w). Raises InputError where
        the sides don't divide, a condition that the network was built for is missing, or one or a layer is
        given that it does not have.
        """
        rows, columns = patch_grid(x, self.config.patch_size)
        extra = extra or Extra()
        cond = self.conditioning(x, timestep, context, extra)
        h = self.x_embedder(x)  # (B, N, D)
        if self.config.positions == "sincos":
            h = h + self.fixed_positions(rows, columns).to(h)
        for number, block in enumerate(self.blocks):
            if number not in extra.skip:
                h = block(h, cond, alone=number in extra.perturbed)  # (B, N, D)
        h = self.final_layer(h, cond.vector)  # (B, N, p·p·C)
        return self.unpatchified(h, rows)  # (B, out_channels, h, w)

    @property
    def layers(self) -> range:
        """What `Extra.skip` and `Extra.perturbed` may name."""
        return range(self.config.depth)

    def unpatchified(self, h: Tensor, rows: int) -> Tensor:
        """The pixels of patches (B, N, p·p·C) in so many rows, as a picture (B, C, h, w)."""
        patch = self.config.patch_size
        return rearrange(h, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=patch, q=patch)

    def fixed_positions(self, rows: int, columns: int) -> Tensor:
        """The sines and cosines (1, N, D) that are added to the patches of a picture of this size."""
        if (rows, columns) == (self.config.grid_size,) * 2:
            return self.pos_embed
        return sincos_positions(self.config.width, self.config.grid_size, rows, columns)

    def conditioning(self, x: Tensor, timestep: Tensor, context: Tensor | None, extra: Extra) -> Conditioning:
        """What the blocks are told beside the noisy latents `x`; raises InputError as `forward` does."""
        config, mask = self.config, extra.context_mask
        wanted = {"pooled": config.pooled_dim, "class_labels": config.num_classes}
        needed = {name for name, built_for in wanted.items() if built_for is not None}
        extra.check("DiT", needed, {"context_mask", *PER_CALL})
        extra.check_layers("DiT", self.layers)
        check_context("DiT", context, mask, config.context_dim)
        # Float32 until here: bfloat16 can't tell neighbouring timesteps apart.
        frequencies = shifted_embedding(timestep, config.frequency_shift).to(x.dtype)
        vector = self.t_embedder(frequencies)  # (B, D)
        if extra.class_labels is not None:
            vector = vector + self.y_embedder(extra.class_labels)
        if extra.pooled is not None:
            vector = vector + self.pooled_embedder(extra.pooled.to(x.dtype))
        rotation = (
            rotations(config, *patch_grid(x, config.patch_size), x.device)
            if config.positions == "rope"
            else None
        )
        return Conditioning(vector, context, None if mask is None else mask[:, None, None, :], rotation)


def square_positions(config: DiTConfig) -> Tensor:
    """The fixed positions (1, N, D) of a picture of `sample_size`."""
    return sincos_positions(config.width, config.grid_size, config.grid_size, config.grid_size)


def shifted_embedding(timestep: Tensor, shift: int) -> Tensor:
    """Embed (B,) timesteps as (B, 256) in float32; a shift of 1 makes the last frequency 1 / MAX_PERIOD."""
    half = FREQUENCIES // 2
    # The exponent i / (half - shift) is i / half under another period.
    return timestep_embedding(timestep, FREQUENCIES, MAX_PERIOD ** (half / (half - shift)))


def rotations(config: DiTConfig, rows: int, columns: int, device: torch.device) -> Rotation:
    """Cosines and sines, two of (rows · columns, 1, head / 2), of the angles that positions rotate heads by.

    The first half of the angles grows with the row, the second with the column, a step a patch.
    """
    count = config.width // config.num_heads // 4
    exponents = torch.arange(count, dtype=torch.float32, device=device) / count
    frequencies = torch.exp(-math.log(MAX_PERIOD) * exponents)
    row = torch.arange(rows, dtype=torch.float32, device=device)[:, None] * frequencies  # (rows, head/4)
    column = torch.arange(columns, dtype=torch.float32, device=device)[:, None] * frequencies
    angles = torch.cat([row.repeat_interleave(columns, dim=0), column.repeat(rows, 1)], dim=1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate heads (B, L, H, d): element i of the first half with element i of the second, in float32."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


def _head_norms(config: DiTConfig) -> tuple[nn.Module, nn.Module]:
    """What queries and keys (B, L, H, d) go through before they meet."""
    if not config.qk_norm:
        return nn.Identity(), nn.Identity()
    dim = config.width // config.num_heads
    return HeadNorm(dim), HeadNorm(dim)
