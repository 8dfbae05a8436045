"""The normalisation between an autoencoder's raw latents and the ones a denoiser is trained on."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """Channels, stride and per-channel statistics of a latent space; it travels with the model's files."""

    channels: int
    stride: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def identity(cls, channels: int, stride: int) -> "LatentSpace":
        """The space of raw latents."""
        return cls(channels=channels, stride=stride, mean=(0.0,) * channels, std=(1.0,) * channels)

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a picture of this size."""
        return self.channels, height // self.stride, width // self.stride

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) to zero mean and unit variance per channel."""
        mean, std = self._stats(raw)
        return (raw - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = self._stats(latents)
        return latents * std + mean

    def _stats(self, like: Tensor) -> Tensor:
        values = torch.tensor([self.mean, self.std], device=like.device, dtype=like.dtype)
        return values[:, None, :, None, None]
