"""The layers that the diffusion transformers share: DiT, SD 3's and FLUX's, under the original names."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from darkroom.errors import InputError

EPS = 1e-6
FREQUENCIES = 256  # sines and cosines that a timestep is embedded as
MAX_PERIOD = 10_000.0


class PatchEmbedder(nn.Module):
    """A picture (B, C, h, w) to one vector per patch, (B, N, D), row by row."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class VectorEmbedder(nn.Module):
    """A vector through two linear layers."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class HeadNorm(nn.Module):
    """Divide queries or keys (B, L, H, d) by their root mean square over a head, times learned gains."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return head_norm(x, self.weight)


class MLP(nn.Module):
    """Linear, GELU by tanh, linear."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """The patches (B, N, D), shifted and scaled by the conditioning, to their pixels (B, N, p·p·C)."""

    def __init__(self, width: int, out_channels: int, patch_size: int) -> None:
        super().__init__()
        self.norm_final = plain_norm(width)
        self.linear = nn.Linear(width, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vector)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        return self.linear(modulate(self.norm_final(x), shift, scale))


def plain_norm(width: int) -> nn.LayerNorm:
    """A layer norm without weights, since what follows it shifts and scales."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=EPS)


def head_norm(x: Tensor, gain: Tensor) -> Tensor:
    """Divide heads (..., d) by their root mean square, times gains (d,) (Dehghani et al. 2023)."""
    # Gains in x's type: under autocast they stay float32, which would leave the fused kernel unused.
    return F.rms_norm(x, (x.shape[-1],), gain.to(x.dtype), EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift, where a scale of zero keeps x."""
    return x * (1 + scale) + shift


def patch_grid(x: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches in latents (B, C, h, w); raises InputError if they don't divide."""
    height, width = x.shape[2:]
    if height % patch or width % patch:
        raise InputError(f"latents of {width}x{height} do not divide into patches of {patch}x{patch}")
    return height // patch, width // patch


def sincos_positions(width: int, span: int, rows: int, columns: int) -> Tensor:
    """Fixed positions (1, rows · columns, width): sines and cosines of the column, then those of the row.

    Computed in float64 on the host. Rows and columns are spread over 0 ... `span`, whatever their number.
    """
    column, row = (_sines(count, width, span) for count in (columns, rows))
    return torch.cat([column.repeat(rows, 1), row.repeat_interleave(columns, dim=0)], dim=1)[None]


def stored_positions(width: int, span: int, rows: int, columns: int) -> Tensor:
    """Such positions as a table that files hold: on `meta`, where loading builds networks, it has no numbers.

    Those of SD 3.5 medium take seconds.
    """
    if torch.get_default_device().type == "meta":
        return torch.empty(1, rows * columns, width)
    return sincos_positions(width, span, rows, columns)


def _sines(count: int, width: int, span: int) -> Tensor:
    """Sines, then cosines, of `count` positions spread over the span: (count, width / 2)."""
    frequencies = width // 4
    steps, exponents = (torch.arange(n, dtype=torch.float64, device="cpu") for n in (count, frequencies))
    angles = (steps * span / count)[:, None] * MAX_PERIOD ** -(exponents / frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


@torch.no_grad()
def initialise(network: nn.Module, *, zeros: Sequence[str], embedders: Sequence[str] = ()) -> None:
    """Draw the initial weights of adaLN-zero, in place: Xavier in every linear layer, biases at zero.

    Parameters whose names end with one of `zeros` become zero, so that blocks add nothing at first; weights
    whose names start with one of `embedders` become small (Peebles and Xie 2023, section 3.2).
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in network.named_parameters():
        if name == "x_embedder.proj.weight":
            nn.init.xavier_uniform_(parameter.flatten(1))
        if name.startswith(tuple(embedders)) and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.02)
        if name.endswith((*zeros, "x_embedder.proj.bias")):
            nn.init.zeros_(parameter)
