"""The U-Net of latent diffusion (Rombach et al. 2022): the paper's models, and SD 1, 2 and XL."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from darkroom.errors import InputError
from darkroom.nn.extra import Extra, check_context
from darkroom.nn.layers import (
    Downsample,
    MLPEmbedding,
    ResBlock,
    SpatialAttention,
    Upsample,
    halve,
    timestep_embedding,
)
from darkroom.nn.transformer import SpatialTransformer, TransformerBlock

EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The shape of a U-Net; every tuple holds one value per level, each level but the last halves the size.

    `attention_depth` counts the transformer blocks after each residual block of a level (0: none),
    `mid_depth` those of the middle, which has the last level's width and heads; with 0 the middle is a single
    residual block. `self_attention` (None: at every level) may be switched off where positions are many.
    `context_dim` None leaves self-attention alone. `pooled_dim` is the width of `Extra.pooled`, `num_classes`
    the number of class labels, `guidance_dim` how wide a network that is told the guidance scale embeds it.

    The paper's models without a context have, with `plain_attention`, one self-attention where others have
    transformers (their depths are then 0 or 1). `scale_shift_norm` lets the time scale and shift what norms
    give, `resblock_updown` has residual blocks between the levels instead of single convs. Raises InputError
    where the numbers don't fit together.
    """

    kind: Literal["unet"] = "unet"
    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    res_blocks: int = 2
    attention_depth: tuple[int, ...] = (1, 1, 1, 0)
    mid_depth: int = 1
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    self_attention: tuple[bool, ...] | None = None
    context_dim: int | None = 768
    linear_projection: bool = False
    groups: int = 32
    pooled_dim: int | None = None
    num_classes: int | None = None
    guidance_dim: int | None = None
    plain_attention: bool = False
    scale_shift_norm: bool = False
    resblock_updown: bool = False

    def __post_init__(self) -> None:
        levels = len(self.channels)
        if not levels or self.res_blocks < 1:
            raise InputError("unet: `channels` needs at least one level and `res_blocks` must be at least 1")
        for name in ("attention_depth", "num_heads", "self_attention"):
            value = getattr(self, name)
            if value is not None and len(value) != levels:
                raise InputError(
                    f"unet: `{name}` has {len(value)} values, `channels` {levels}: give one per level"
                )
        for level, (width, heads) in enumerate(zip(self.channels, self.num_heads, strict=True)):
            if heads < 1 or width % self.groups or width % heads:
                raise InputError(
                    f"unet: `channels`[{level}] = {width} must divide by groups = {self.groups} and "
                    f"`num_heads`[{level}] = {heads}"
                )
        if self.context_dim is None and not all(self.self_attentions):
            raise InputError(
                "unet: levels without self-attention attend to the context, so set `context_dim`"
            )
        deep = max(*self.attention_depth, self.mid_depth) > 1
        if self.plain_attention and (deep or self.context_dim is not None or self.linear_projection):
            raise InputError(
                "unet: `plain_attention` is no transformer: leave out `context_dim` and `linear_projection`, "
                "and set `attention_depth` and `mid_depth` to 0 or 1"
            )

    @property
    def self_attentions(self) -> tuple[bool, ...]:
        """`self_attention` with its default written out."""
        return self.self_attention or (True,) * len(self.channels)

    @property
    def time_dim(self) -> int:
        """Width of the vector that timestep, pooled text and class label are added up in."""
        return 4 * self.channels[0]

    def res_block(self, in_channels: int, out_channels: int) -> ResBlock:
        """A residual block that is told the time."""
        return ResBlock(
            in_channels,
            out_channels,
            groups=self.groups,
            eps=EPS,
            time_dim=self.time_dim,
            scale_shift=self.scale_shift_norm,
        )

    def downsample(self, width: int) -> ResBlock | Downsample:
        """What ends a level on the way down."""
        return self.res_block(width, width) if self.resblock_updown else Downsample(width, asymmetric=False)

    def upsample(self, width: int) -> ResBlock | Upsample:
        """What ends a level on the way up."""
        return self.res_block(width, width) if self.resblock_updown else Upsample(width)

    def attention(
        self, level: int, depth: int, *, self_attention: bool
    ) -> SpatialTransformer | SpatialAttention:
        """What follows a residual block of this level."""
        width, heads = self.channels[level], self.num_heads[level]
        if self.plain_attention:
            return SpatialAttention(width, groups=self.groups, eps=EPS, num_heads=heads)
        return SpatialTransformer(
            width,
            heads,
            depth=depth,
            context_dim=self.context_dim,
            linear_projection=self.linear_projection,
            groups=self.groups,
            self_attention=self_attention,
        )


@dataclass(frozen=True)
class Conditioning:
    """What every block is told: `time` (B, time_dim), `context` (B, L, D), `mask` (B, 1, 1, L).

    In the attentions of `alone`, places of the picture see no other one.
    """

    time: Tensor
    context: Tensor | None
    mask: Tensor | None
    alone: tuple[nn.Module, ...] = ()


def attend(attention: nn.Module, x: Tensor, cond: Conditioning) -> Tensor:
    """Through a transformer, which may read the context, or a plain attention, which has none."""
    if any(attention is module for module in cond.alone):
        return attend_alone(attention, x, cond)
    plain = isinstance(attention, SpatialAttention)
    return attention(x) if plain else attention(x, cond.context, cond.mask)


def attend_alone(attention: nn.Module, x: Tensor, cond: Conditioning) -> Tensor:
    """The same where each place finds its own value in place of all others' (Ahn et al. 2024)."""
    if isinstance(attention, SpatialAttention):
        h = rearrange(attention.group_norm(x), "b c h w -> b (h w) c")
        h = attention.to_out[0](attention.to_v(h))
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])
    assert isinstance(attention, SpatialTransformer)
    h = attention._to_sequence(attention.norm(x))  # (B, h·w, C)
    for block in attention.transformer_blocks:
        assert isinstance(block, TransformerBlock)
        h = transform_alone(block, h, cond)
    return x + attention._to_picture(h, x.shape[2])


def transform_alone(block: TransformerBlock, h: Tensor, cond: Conditioning) -> Tensor:
    """A transformer block on (B, h·w, C) whose self-attention sees each place itself only."""
    h = h + block.attn1.to_out[0](block.attn1.to_v(block.norm1(h)))
    if block.cross_attention:
        h = h + block.attn2(block.norm2(h), cond.context, cond.mask)
    return h + block.ff(block.norm3(h))


def attends_to_itself(attention: nn.Module) -> bool:
    """Whether an attention has a self-attention, and not the context's in its place."""
    if not isinstance(attention, SpatialTransformer):
        return True
    first = attention.transformer_blocks[0]
    return isinstance(first, TransformerBlock) and first.self_attention


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level has it."""

    def __init__(self, config: UNetConfig, level: int, in_channels: list[int]) -> None:
        super().__init__()
        width, depth = config.channels[level], config.attention_depth[level]
        self.resnets = nn.ModuleList(config.res_block(channels, width) for channels in in_channels)
        self.attentions = nn.ModuleList(
            config.attention(level, depth, self_attention=config.self_attentions[level])
            for _ in (in_channels if depth else [])
        )

    def block(self, index: int, x: Tensor, cond: Conditioning) -> Tensor:
        """Residual block and attention number `index`."""
        x = self.resnets[index](x, cond.time)
        return attend(self.attentions[index], x, cond) if self.attentions else x


class DownLevel(Level):
    """A level on the way down; what each of its blocks gives is kept for the way up."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        width, before = config.channels[level], config.channels[max(level - 1, 0)]
        super().__init__(config, level, [before] + [width] * (config.res_blocks - 1))
        last = level == len(config.channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [config.downsample(width)])

    def forward(self, x: Tensor, cond: Conditioning) -> list[Tensor]:
        outputs = []
        for index in range(len(self.resnets)):
            x = self.block(index, x, cond)
            outputs.append(x)
        for downsample in self.downsamplers:
            resized = isinstance(downsample, ResBlock)
            outputs.append(downsample(x, cond.time, resize=halve) if resized else downsample(x))
        return outputs


class MidBlock(nn.Module):
    """A residual block, then attention and another residual block if the middle has attention."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width, last = config.channels[-1], len(config.channels) - 1
        self.resnets = nn.ModuleList(
            config.res_block(width, width) for _ in range(2 if config.mid_depth else 1)
        )
        # The middle has few positions: it keeps its self-attention even where the last level has none.
        self.attentions = nn.ModuleList(
            [config.attention(last, config.mid_depth, self_attention=True)] if config.mid_depth else []
        )

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        x = self.resnets[0](x, cond.time)
        if self.attentions:
            x = attend(self.attentions[0], x, cond)
            x = self.resnets[1](x, cond.time)
        return x


class UpLevel(Level):
    """A level on the way up: each block joins its input with what the way down kept, the latest first."""

    def __init__(self, config: UNetConfig, level: int, in_channels: int, skips: list[int]) -> None:
        width = config.channels[level]
        inputs = [in_channels] + [width] * config.res_blocks
        super().__init__(config, level, [a + b for a, b in zip(inputs, skips, strict=True)])
        self.upsamplers = nn.ModuleList([config.upsample(width)] if level else [])

    def forward(self, x: Tensor, skips: list[Tensor], cond: Conditioning) -> Tensor:
        for index in range(len(self.resnets)):
            x = self.block(index, torch.cat([x, skips.pop()], dim=1), cond)
        for upsample in self.upsamplers:
            # Not twice this size but that of what is joined next: the way down rounds odd sizes up.
            size = skips[-1].shape[2:]
            if isinstance(upsample, ResBlock):
                x = upsample(x, cond.time, resize=partial(F.interpolate, size=size, mode="nearest"))
            else:
                x = upsample(x, size)
        return x


class UNet(nn.Module):
    """The denoising U-Net of latent diffusion, for any number of levels.

    Parameters carry the names of diffusers' `UNet2DConditionModel`, or with plain attention those of its
    `UNet2DModel`. A new network starts with its output at zero and its blocks adding nothing; loading a
    checkpoint overwrites that.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, time_dim = config.channels, config.time_dim
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = MLPEmbedding(channels[0], time_dim, cond_dim=config.guidance_dim)
        if config.num_classes is not None:
            self.class_embedding = nn.Embedding(config.num_classes, time_dim)
        if config.pooled_dim is not None:
            self.add_embedding = MLPEmbedding(config.pooled_dim, time_dim)
        self.down_blocks = nn.ModuleList(DownLevel(config, level) for level in range(len(channels)))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(_up_levels(config))
        self.conv_norm_out = nn.GroupNorm(config.groups, channels[0], eps=EPS)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)
        zero_output_layers(self)

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor | None, *, extra: Extra | None = None
    ) -> Tensor:
        """Predict from noisy latents what the denoiser asks for.

        Shapes: `x` (B, in_channels, h, w) of any size, `timestep` (B,) on the 0..999 scale, `context`
        (B, L, context_dim) or None, result (B, out_channels, h, w). Raises InputError where a condition that
        the network was built for is missing, or one is given that it was not built for.
        """
        cond = self.conditioning(x, timestep, context, extra or Extra())
        h = self.conv_in(x)  # (B, C0, h, w)
        skips = [h]
        for level in self.down_blocks:
            skips += level(skips[-1], cond)  # (B, Ci, h/2^i, w/2^i) each
        h = self.mid_block(skips[-1], cond)  # (B, Cn, h/2^n, w/2^n)
        for level in self.up_blocks:
            h = level(h, skips, cond)  # (B, Ci, h/2^(i-1), w/2^(i-1))
        return self.conv_out(F.silu(self.conv_norm_out(h)))  # (B, out_channels, h, w)

    def conditioning(self, x: Tensor, timestep: Tensor, context: Tensor | None, extra: Extra) -> Conditioning:
        """What the blocks are told beside the noisy latents `x`; raises InputError as `forward` does."""
        config = self.config
        wanted = {
            "pooled": config.pooled_dim,
            "class_labels": config.num_classes,
            "guidance": config.guidance_dim,
        }
        needed = {name for name, built_for in wanted.items() if built_for is not None}
        extra.check("U-Net", needed, {"context_mask", "perturbed"})
        if extra.perturbed:
            extra.check_layers("U-Net", self.layers)
        check_context("U-Net", context, extra.context_mask, config.context_dim)
        # Float32 until here: bfloat16 can't tell neighbouring timesteps apart.
        time = self.time_embedding(
            timestep_embedding(timestep, config.channels[0]).to(x.dtype), self._guidance(x, extra.guidance)
        )  # (B, time_dim)
        if extra.class_labels is not None:
            time = time + self.class_embedding(extra.class_labels)
        if extra.pooled is not None:
            time = time + self.add_embedding(extra.pooled.to(x.dtype))
        mask = None if extra.context_mask is None else extra.context_mask[:, None, None, :]
        alone = [a for name in extra.perturbed for a in self.self_attentions()[str(name)]]
        return Conditioning(time, context, mask, tuple(alone))

    def _guidance(self, x: Tensor, scale: Tensor | None) -> Tensor | None:
        """The embedded guidance scale (B, guidance_dim), where the network is told it."""
        dim = self.config.guidance_dim
        return None if scale is None or dim is None else guidance_embedding(scale, dim).to(x.dtype)

    @property
    def layers(self) -> tuple[str, ...]:
        """What `Extra.perturbed` may name."""
        return tuple(self.self_attentions())

    def self_attentions(self) -> dict[str, list[nn.Module]]:
        """The self-attentions by their names: those of each block of the U-Net together, and one by one."""
        blocks: dict[str, nn.Module] = {"mid": self.mid_block}
        blocks |= {f"down.{number}": level for number, level in enumerate(self.down_blocks)}
        blocks |= {f"up.{number}": level for number, level in enumerate(self.up_blocks)}
        named: dict[str, list[nn.Module]] = {}
        for name, block in blocks.items():
            attentions: nn.ModuleList = block.attentions  # pyright: ignore[reportAssignmentType]
            found = {n: a for n, a in enumerate(attentions) if attends_to_itself(a)}
            if found:
                named[name] = list(found.values())
                named |= {f"{name}.{number}": [attention] for number, attention in found.items()}
        return named


def zero_output_layers(unet: UNet) -> None:
    """Zero the output conv and the last layer of each residual block and attention, in place.

    Blocks then add nothing to their input at first, which keeps early training stable (Ho et al. 2020,
    Dhariwal and Nichol 2021).
    """
    layers: list[nn.Module] = [unet.conv_out]
    for module in unet.modules():
        if isinstance(module, ResBlock):
            layers.append(module.conv2)
        elif isinstance(module, SpatialTransformer):
            layers.append(module.proj_out)
        elif isinstance(module, SpatialAttention):
            layers.append(module.to_out[0])
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def size_embedding(ids: Tensor, dim: int = 256) -> Tensor:
    """Embed (B, N) sizes in pixels as (B, N·dim), each like a timestep, in float32.

    SDXL's six are original height and width, crop top and left, target height and width (Podell et al. 2023,
    section 2.2); its refiner's five end with an aesthetic score instead of the target. `Extra.pooled` is the
    pooled text followed by this.
    """
    return rearrange(timestep_embedding(ids.flatten(), dim), "(b n) d -> b (n d)", b=ids.shape[0])


def guidance_embedding(scale: Tensor, dim: int = 256) -> Tensor:
    """Embed guidance scales (B,), 1 for none, as (B, dim): sines, then cosines, in float32.

    What latent consistency models are told (Luo et al. 2023, section 4.2): w = scale - 1 a thousandfold, as
    the transformers' positions of Vaswani et al. 2017, whose frequencies end at 1/10000.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=scale.device) / (half - 1)
    angles = (scale.float()[:, None] - 1) * 1000 * torch.exp(-math.log(10_000) * exponent)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, dim % 2))


def _up_levels(config: UNetConfig) -> list[UpLevel]:
    """The levels from the last to the first, each given the widths that the way down keeps for it."""
    skips = [config.channels[0]]
    for level, width in enumerate(config.channels):
        last = level == len(config.channels) - 1
        skips += [width] * (config.res_blocks + (0 if last else 1))
    levels, width = [], config.channels[-1]
    for level in reversed(range(len(config.channels))):
        taken = [skips.pop() for _ in range(config.res_blocks + 1)]
        levels.append(UpLevel(config, level, width, taken))
        width = config.channels[level]
    return levels
