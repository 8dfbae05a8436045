"""The multimodal diffusion transformer of Stable Diffusion 3 (Esser et al. 2024), with 3.5's additions."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from darkroom.errors import InputError, require_positive
from darkroom.nn.attention import alone_mask, attention
from darkroom.nn.dit_layers import (
    FREQUENCIES,
    MLP,
    FinalLayer,
    HeadNorm,
    PatchEmbedder,
    VectorEmbedder,
    initialise,
    modulate,
    patch_grid,
    plain_norm,
    stored_positions,
)
from darkroom.nn.extra import PER_CALL, Extra, check_context
from darkroom.nn.layers import timestep_embedding

HEAD_WIDTH = 64  # of every published model
MLP_RATIO = 4
# The side in latent cells that the released models count their positions by, whatever the table's size.
BASE_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """The shape of SD 3's network; the defaults are SD 3 medium's.

    The width is `num_heads` · `head_width`. `positions` is the side, in patches, of the stored table of
    positions, from whose centre a picture takes its own. `qk_norm` normalises queries and keys per head, and
    the first `dual_layers` blocks let the picture attend to itself once more: both are SD 3.5's. Raises
    InputError where a number cannot be.
    """

    kind: Literal["mmdit"] = "mmdit"
    in_channels: int = 16
    out_channels: int = 16
    patch_size: int = 2
    depth: int = 24
    num_heads: int = 24
    head_width: int = HEAD_WIDTH
    context_dim: int = 4096
    pooled_dim: int = 2048
    positions: int = 192
    qk_norm: bool = False
    dual_layers: int = 0

    def __post_init__(self) -> None:
        names = (
            "in_channels",
            "out_channels",
            "patch_size",
            "depth",
            "num_heads",
            "head_width",
            "context_dim",
            "pooled_dim",
            "positions",
        )
        require_positive("mmdit", self, names)
        if not 0 <= self.dual_layers <= self.depth:
            raise InputError(
                f"mmdit: `dual_layers` = {self.dual_layers} must be 0 ... {self.depth}, the depth"
            )
        if self.width % 4:
            raise InputError(f"mmdit: `num_heads` · `head_width` = {self.width} must divide by 4")

    @property
    def width(self) -> int:
        """Width of both streams."""
        return self.num_heads * self.head_width


class Heads(nn.Module):
    """Queries, keys and values of a stream from one matrix; `last` leaves out the way back."""

    def __init__(self, config: MMDiTConfig, *, last: bool = False) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        if not last:
            self.proj = nn.Linear(config.width, config.width)
        norm = HeadNorm if config.qk_norm else nn.Identity
        self.ln_q, self.ln_k = norm(config.head_width), norm(config.head_width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) each, queries and keys normalised."""
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b l h d", three=3, h=self.num_heads)
        q, k, v = (rearrange(t, "b l h d -> b l (h d)") for t in (self.ln_q(q), self.ln_k(k), v))
        return q, k, v


class StreamBlock(nn.Module):
    """One stream's half of a joint block: its modulation, attention heads and feed-forward.

    `dual` adds a second attention in which the stream sees itself only; after the `last` one nothing more is
    done with the text, so that its half ends with its keys and values.
    """

    def __init__(self, config: MMDiTConfig, *, dual: bool = False, last: bool = False) -> None:
        super().__init__()
        width = config.width
        self.norm1 = plain_norm(width)
        self.attn = Heads(config, last=last)
        if dual:
            self.attn2 = Heads(config)
        if not last:
            self.norm2 = plain_norm(width)
            self.mlp = MLP(width, MLP_RATIO * width)
        self.chunks = 2 if last else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.chunks * width))

    def modulation(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate (B, 1, D) of the attention, the feed-forward and the second attention."""
        return self.adaLN_modulation(vector)[:, None].chunk(self.chunks, dim=-1)

    def finished(
        self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...], *, alone: bool = False
    ) -> Tensor:
        """The stream after attention, whose result (B, L, D) is `attended`, and feed-forward."""
        gate, shift_mlp, scale_mlp, gate_mlp = modulation[2:6]
        h = x + gate * self.attn.proj(attended)
        if self.chunks == 9:
            h = h + modulation[8] * self.self_attended(x, *modulation[6:8], alone=alone)
        return h + gate_mlp * self.mlp(modulate(self.norm2(h), shift_mlp, scale_mlp))

    def self_attended(self, x: Tensor, shift: Tensor, scale: Tensor, *, alone: bool) -> Tensor:
        """What the second attention finds (B, L, D); `alone` lets each token see itself only."""
        q, k, v = self.attn2(modulate(self.norm1(x), shift, scale))
        return self.attn2.proj(v if alone else attention(q, k, v, self.attn2.num_heads))


class JointBlock(nn.Module):
    """Text and picture attend to both together, then each goes through its own feed-forward."""

    def __init__(self, config: MMDiTConfig, *, dual: bool, last: bool) -> None:
        super().__init__()
        self.num_heads, self.last = config.num_heads, last
        self.context_block = StreamBlock(config, last=last)
        self.x_block = StreamBlock(config, dual=dual)

    def forward(
        self, context: Tensor, x: Tensor, vector: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`mask` is given where the picture's tokens are not to see each other."""
        streams = ((self.context_block, context), (self.x_block, x))
        modulations = [block.modulation(vector) for block, _ in streams]
        parts = [
            block.attn(modulate(block.norm1(h), m[0], m[1]))
            for (block, h), m in zip(streams, modulations, strict=True)
        ]
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))  # (B, L + N, D)
        attended = attention(q, k, v, self.num_heads, mask)
        length = context.shape[1]
        x = self.x_block.finished(x, attended[:, length:], modulations[1], alone=mask is not None)
        if not self.last:
            context = self.context_block.finished(context, attended[:, :length], modulations[0])
        return context, x


class MMDiT(nn.Module):
    """The network of Stable Diffusion 3 and 3.5.

    Parameters carry the names of the original release. A new network starts with its output at zero and its
    blocks adding nothing; loading a checkpoint overwrites that.
    """

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbedder(config.in_channels, config.width, config.patch_size)
        self.t_embedder = VectorEmbedder(FREQUENCIES, config.width)
        self.y_embedder = VectorEmbedder(config.pooled_dim, config.width)
        self.context_embedder = nn.Linear(config.context_dim, config.width)
        span, side = BASE_SIZE // config.patch_size, config.positions
        self.register_buffer("pos_embed", stored_positions(config.width, span, side, side))
        self.joint_blocks = nn.ModuleList(
            JointBlock(config, dual=index < config.dual_layers, last=index == config.depth - 1)
            for index in range(config.depth)
        )
        self.final_layer = FinalLayer(config.width, config.out_channels, config.patch_size)
        zeros = ("adaLN_modulation.1.weight", "final_layer.linear.weight")
        initialise(self, zeros=zeros, embedders=("t_embedder", "y_embedder", "context_embedder"))

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor | None, *, extra: Extra | None = None
    ) -> Tensor:
        """Predict from noisy latents the velocity, noise less latents.

        Shapes: `x` (B, in_channels, h, w) whose sides divide by the patch size, `timestep` (B,), 0..1000,
        `context` (B, L, context_dim), `extra.pooled` (B, pooled_dim), result (B, out_channels, h, w). Raises
        InputError where the sides don't divide or are larger than the table of positions, a condition is
        missing, or one or a layer is given that the network does not have.
        """
        extra, patch = extra or Extra(), self.config.patch_size
        check_context("MM-DiT", context, None, self.config.context_dim)
        extra.check("MM-DiT", {"pooled"}, PER_CALL)
        extra.check_layers("MM-DiT", self.layers)
        assert context is not None and extra.pooled is not None
        rows, columns = patch_grid(x, patch)
        # Float32 until here: bfloat16 can't tell neighbouring timesteps apart.
        vector = self.t_embedder(timestep_embedding(timestep, FREQUENCIES).to(x.dtype))
        vector = vector + self.y_embedder(extra.pooled.to(x.dtype))  # (B, D)
        h = self.x_embedder(x) + self.cropped_positions(rows, columns).to(x.dtype)  # (B, N, D)
        text = self.context_embedder(context)  # (B, L, D)
        mask = alone_mask(text.shape[1], h.shape[1], h.device) if extra.perturbed else None
        for number, block in enumerate(self.joint_blocks):
            if number not in extra.skip:
                text, h = block(text, h, vector, mask if number in extra.perturbed else None)
        h = self.final_layer(h, vector)  # (B, N, p·p·C)
        return rearrange(h, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=patch, q=patch)

    @property
    def layers(self) -> range:
        """What `Extra.skip` and `Extra.perturbed` may name."""
        return range(self.config.depth)

    def cropped_positions(self, rows: int, columns: int) -> Tensor:
        """The middle of the stored table, (1, rows · columns, D); InputError if it is not large enough."""
        side = math.isqrt(self.pos_embed.shape[1])
        if max(rows, columns) > side:
            patch = self.config.patch_size
            raise InputError(
                f"latents of {columns * patch}x{rows * patch} are too large: this network's positions end "
                f"at {side * patch}x{side * patch}"
            )
        top, left = (side - rows) // 2, (side - columns) // 2
        table = rearrange(self.pos_embed, "one (h w) d -> one h w d", h=side)
        crop = table[:, top : top + rows, left : left + columns]
        return rearrange(crop, "one h w d -> one (h w) d")
