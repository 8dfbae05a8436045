"""SigLIP's picture encoder (Zhai et al. 2023): a vision transformer whose states say what a picture shows."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from darkroom.errors import InputError, require_positive
from darkroom.nn.encoder_layer import EncoderLayer

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """The shape of a picture encoder; the defaults are those of SigLIP so400m at 384 pixels.

    Pictures are squares of `image_size` pixels, cut into squares of `patch_size`; what is left over at the
    right and the bottom is not seen. `intermediate` is the width inside the feed-forward. Raises InputError
    where the numbers don't fit together.
    """

    kind: Literal["siglip"] = "siglip"
    image_size: int = 384
    patch_size: int = 14
    width: int = 1152
    layers: int = 27
    heads: int = 16
    intermediate: int = 4304

    def __post_init__(self) -> None:
        counts = ("image_size", "patch_size", "width", "layers", "heads", "intermediate")
        require_positive("siglip", self, counts)
        if self.width % self.heads:
            raise InputError(f"siglip: `width` = {self.width} must divide by `heads` = {self.heads}")
        if self.patch_size > self.image_size:
            raise InputError(
                f"siglip: `patch_size` = {self.patch_size} must be at most `image_size` = {self.image_size}"
            )

    @property
    def tokens(self) -> int:
        """How many states a picture has: one a patch."""
        return (self.image_size // self.patch_size) ** 2


class Embeddings(nn.Module):
    """A vector per patch, linear in its pixels, plus one per position."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(3, config.width, patch, stride=patch)
        self.position_embedding = nn.Embedding(config.tokens, config.width)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embedding(image).flatten(2).mT  # (B, N, D), row by row
        return patches + self.position_embedding.weight


class Encoder(nn.Module):
    """The layers in their order."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(config.width, config.heads, config.intermediate, "gelu_tanh", eps=EPS, causal=False)
            for _ in range(config.layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class SiglipEncoder(nn.Module):
    """The picture half of SigLIP, without the head that pools its states into one.

    Parameters carry the names of transformers' `SiglipVisionModel` without the `vision_model.` that published
    files put in front.
    """

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.width, eps=EPS)

    def forward(self, image: Tensor) -> Tensor:
        """The states (B, N, D) of images (B, 3, S, S) in −1..1; raises InputError for another size."""
        side = self.config.image_size
        if image.ndim != 4 or image.shape[1:] != (3, side, side):
            raise InputError(f"siglip: images must be (B, 3, {side}, {side}), not {tuple(image.shape)}")
        return self.post_layernorm(self.encoder(self.embeddings(image)))
