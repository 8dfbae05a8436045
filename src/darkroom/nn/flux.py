"""The network of FLUX.1 (Black Forest Labs 2024): double-stream blocks, single-stream ones, rotations."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from darkroom.errors import InputError, require_positive
from darkroom.nn.attention import alone_mask, attention
from darkroom.nn.dit_layers import (
    FREQUENCIES,
    MAX_PERIOD,
    FinalLayer,
    head_norm,
    initialise,
    modulate,
    patch_grid,
    plain_norm,
)
from darkroom.nn.extra import PER_CALL, Extra, check_context
from darkroom.nn.layers import timestep_embedding

PATCH = 2
MLP_RATIO = 4
# Timesteps come on the 0..1000 scale; the network wants guidance on the same.
GUIDANCE_FACTOR = 1000.0

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """The shape of FLUX.1's network; the defaults are dev's.

    Channels are those of latents, of which 2 x 2 cells make a token: 16 in and out; 32 in with a picture of
    edges or depth beside the noisy latents, 96 for filling (16 of the masked picture and 64 of the mask).
    `axes` says how many of a head's numbers each axis of the positions (picture, row, column) rotates.
    `guidance` is what distilled models are told the guidance scale by; schnell has none. Raises InputError
    where the numbers don't fit together.
    """

    kind: Literal["flux"] = "flux"
    in_channels: int = 16
    out_channels: int = 16
    double_blocks: int = 19
    single_blocks: int = 38
    num_heads: int = 24
    axes: tuple[int, int, int] = (16, 56, 56)
    context_dim: int = 4096
    pooled_dim: int = 768
    guidance: bool = True

    def __post_init__(self) -> None:
        names = (
            "in_channels",
            "out_channels",
            "double_blocks",
            "single_blocks",
            "num_heads",
            "context_dim",
            "pooled_dim",
        )
        require_positive("flux", self, names)
        if any(axis < 2 or axis % 2 for axis in self.axes):
            raise InputError(f"flux: `axes` = {list(self.axes)} must be even numbers from 2 on")

    @property
    def head_width(self) -> int:
        """Width of a head, every number of which some axis rotates."""
        return sum(self.axes)

    @property
    def width(self) -> int:
        """Width of both streams."""
        return self.num_heads * self.head_width


class Embedder(nn.Module):
    """A vector through two linear layers."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, dim)
        self.out_layer = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """`count` vectors (B, 1, D) that the conditioning (B, D) shifts, scales and gates by."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(width, count * width)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vector))[:, None].chunk(self.count, dim=-1)


class Gain(nn.Module):
    """Heads divided by their root mean square, times learned gains."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return head_norm(x, self.scale)


class QKNorm(nn.Module):
    """Queries and keys normalised per head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = Gain(dim)
        self.key_norm = Gain(dim)

    def forward(self, qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, L, H, d) each out of (B, L, 3·H·d)."""
        q, k, v = rearrange(qkv, "b l (three h d) -> three b l h d", three=3, h=num_heads)
        return self.query_norm(q), self.key_norm(k), v


class Heads(nn.Module):
    """The attention weights of one stream of a double block."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.norm = QKNorm(config.head_width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.norm(self.qkv(x), self.num_heads)


class DoubleBlock(nn.Module):
    """Text and picture attend to both together; all else each does with its own weights."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        width = config.width
        self.img_mod, self.txt_mod = Modulation(width, 6), Modulation(width, 6)
        self.norm = plain_norm(width)
        self.img_attn, self.txt_attn = Heads(config), Heads(config)
        self.img_mlp, self.txt_mlp = _mlp(width), _mlp(width)

    def forward(
        self, img: Tensor, txt: Tensor, vector: Tensor, rotation: Rotation, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.img_mod(vector), self.txt_mod(vector)
        parts = (
            self.txt_attn(modulate(self.norm(txt), *txt_mod[:2])),
            self.img_attn(modulate(self.norm(img), *img_mod[:2])),
        )
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))  # (B, L + N, H, d)
        attended = rotated_attention(q, k, v, rotation, mask)  # (B, L + N, D)
        length = txt.shape[1]
        img = self._finished(img, self.img_attn.proj(attended[:, length:]), img_mod[2:], self.img_mlp)
        txt = self._finished(txt, self.txt_attn.proj(attended[:, :length]), txt_mod[2:], self.txt_mlp)
        return img, txt

    def _finished(self, x: Tensor, attended: Tensor, mod: tuple[Tensor, ...], mlp: nn.Module) -> Tensor:
        gate, shift_mlp, scale_mlp, gate_mlp = mod
        x = x + gate * attended
        return x + gate_mlp * mlp(modulate(self.norm(x), shift_mlp, scale_mlp))


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side over text and picture in one row (Dehghani et al. 2023)."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads, self.sizes = config.num_heads, (3 * width, MLP_RATIO * width)
        self.modulation = Modulation(width, 3)
        self.pre_norm = plain_norm(width)
        self.linear1 = nn.Linear(width, sum(self.sizes))
        self.norm = QKNorm(config.head_width)
        self.linear2 = nn.Linear(width + MLP_RATIO * width, width)

    def forward(self, x: Tensor, vector: Tensor, rotation: Rotation, mask: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulation(vector)
        qkv, h = self.linear1(modulate(self.pre_norm(x), shift, scale)).split(self.sizes, dim=-1)
        q, k, v = self.norm(qkv, self.num_heads)
        attended = rotated_attention(q, k, v, rotation, mask)
        return x + gate * self.linear2(torch.cat([attended, F.gelu(h, approximate="tanh")], dim=-1))


class Flux(nn.Module):
    """The network of FLUX.1 dev and schnell, and of Fill, Canny, Depth and Kontext by their inputs.

    Parameters carry the names of the original release. A new network starts with its output at zero and its
    blocks adding nothing; loading a checkpoint overwrites that.
    """

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.img_in = nn.Linear(PATCH**2 * config.in_channels, width)
        self.time_in = Embedder(FREQUENCIES, width)
        self.vector_in = Embedder(config.pooled_dim, width)
        if config.guidance:
            self.guidance_in = Embedder(FREQUENCIES, width)
        self.txt_in = nn.Linear(config.context_dim, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_blocks))
        self.final_layer = FinalLayer(width, config.out_channels, PATCH)
        zeros = (
            "_mod.lin.weight",
            "modulation.lin.weight",
            "adaLN_modulation.1.weight",
            "final_layer.linear.weight",
        )
        initialise(self, zeros=zeros, embedders=("time_in", "vector_in", "guidance_in"))

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor | None, *, extra: Extra | None = None
    ) -> Tensor:
        """Predict from noisy latents the velocity, noise less latents.

        Shapes: `x` (B, in_channels, h, w) with even sides, `timestep` (B,) on the 0..1000 scale, `context`
        (B, L, context_dim), `extra.pooled` (B, pooled_dim), `extra.guidance` (B,), `extra.reference`
        (B, in_channels, h', w'), result (B, out_channels, h, w). Raises InputError where a side is odd, a
        condition is missing, or one or a layer is given that the network does not have.
        """
        extra = extra or Extra()
        check_context("FLUX network", context, None, self.config.context_dim)
        assert context is not None
        rows, columns = patch_grid(x, PATCH)
        pictures = [x] if extra.reference is None else [x, extra.reference.to(x.dtype)]
        vector = self.vector(x, timestep, extra)  # (B, D)
        rotation = rotations(
            self.config, context.shape[1], [patch_grid(p, PATCH) for p in pictures], x.device
        )
        img = self.img_in(torch.cat([pack(picture) for picture in pictures], dim=1))  # (B, N, D)
        txt = self.txt_in(context)  # (B, L, D)
        mask = alone_mask(txt.shape[1], img.shape[1], img.device) if extra.perturbed else None
        masks = {number: mask for number in extra.perturbed}
        for number, block in enumerate(self.double_blocks):
            if number not in extra.skip:
                img, txt = block(img, txt, vector, rotation, masks.get(number))
        h = torch.cat([txt, img], dim=1)  # (B, L + N, D)
        for number, block in enumerate(self.single_blocks, start=len(self.double_blocks)):
            if number not in extra.skip:
                h = block(h, vector, rotation, masks.get(number))
        start = txt.shape[1]
        h = self.final_layer(h[:, start : start + rows * columns], vector)  # (B, h·w / 4, 4·C)
        return unpack(h, rows)

    @property
    def layers(self) -> range:
        """What `Extra.skip` and `Extra.perturbed` may name: double-stream blocks, then single-stream ones."""
        return range(self.config.double_blocks + self.config.single_blocks)

    def vector(self, x: Tensor, timestep: Tensor, extra: Extra) -> Tensor:
        """What every block is told, (B, D); raises InputError as `forward` does."""
        needed = {"pooled", "guidance"} if self.config.guidance else {"pooled"}
        extra.check("FLUX network", needed, {"reference", *PER_CALL})
        extra.check_layers("FLUX network", self.layers)
        assert extra.pooled is not None
        # Float32 until here: bfloat16 can't tell neighbouring timesteps apart.
        vector = self.time_in(timestep_embedding(timestep, FREQUENCIES).to(x.dtype))
        if extra.guidance is not None:
            guidance = timestep_embedding(extra.guidance * GUIDANCE_FACTOR, FREQUENCIES)
            vector = vector + self.guidance_in(guidance.to(x.dtype))
        return vector + self.vector_in(extra.pooled.to(x.dtype))


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, h, w) as tokens of 2 x 2 cells, (B, h·w / 4, 4·C)."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)


def unpack(tokens: Tensor, rows: int) -> Tensor:
    """The inverse of `pack` for so many rows of tokens."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=PATCH, q=PATCH)


def positions(text_length: int, grids: list[tuple[int, int]]) -> Tensor:
    """The place (picture, row, column) of every token, int64 (L + N, 3): zeros for the text."""
    places = [torch.zeros(text_length, 3, dtype=torch.int64)]
    for picture, (rows, columns) in enumerate(grids):
        axes = (torch.tensor([picture]), torch.arange(rows), torch.arange(columns))
        places.append(torch.cartesian_prod(*axes))
    return torch.cat(places)


def rotations(
    config: FluxConfig, text_length: int, grids: list[tuple[int, int]], device: torch.device
) -> Rotation:
    """Cosines and sines (L + N, 1, d / 2) of the angles that each token's heads are rotated by, float32.

    Computed in float64 on the host, since some devices have no float64, and once for each place: a picture's
    tokens are thousands, but its places along an axis few.
    """
    places, cosines, sines = positions(text_length, grids), [], []
    sizes = (places.amax(dim=0) + 1).tolist()
    for place, size, width in zip(places.to(device).unbind(1), sizes, config.axes, strict=True):
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        angles = torch.arange(size, dtype=torch.float64)[:, None] * MAX_PERIOD**-exponents  # (size, width/2)
        cosines.append(angles.cos().float().to(device)[place])
        sines.append(angles.sin().float().to(device)[place])
    return torch.cat(cosines, dim=1)[:, None], torch.cat(sines, dim=1)[:, None]


def rotate_pairs(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate neighbouring numbers of heads (B, L, H, d) as pairs, in float32 (Su et al. 2021)."""
    cos, sin = rotation
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    # The products are float32, since the cosines are: no copy of x in float32 is read and written for them.
    turned = (first * cos - second * sin, first * sin + second * cos)
    return torch.stack([half.to(x.dtype) for half in turned], dim=-1).flatten(-2)


def rotated_attention(
    q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, mask: Tensor | None = None
) -> Tensor:
    """Attention of q, k, v (B, L, H, d), q and k rotated by their places: (B, L, H·d)."""
    num_heads = q.shape[2]
    q, k, v = (
        rearrange(t, "b l h d -> b l (h d)")
        for t in (rotate_pairs(q, rotation), rotate_pairs(k, rotation), v)
    )
    return attention(q, k, v, num_heads, mask)


def _mlp(width: int) -> nn.Sequential:
    inner = MLP_RATIO * width
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width))
