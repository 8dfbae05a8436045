"""The VQ autoencoder of latent diffusion: image -> nearest codes -> image (van den Oord 2017, Esser 2021)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from darkroom.nn.autoencoder_kl import AutoencoderShape, Decoder, Encoder
from darkroom.nn.latent_space import LatentSpace

# Vectors compared with the codebook at a time: 16,384 of them against 8,192 codes take 512 MiB.
SLAB = 16_384


@dataclass(frozen=True, kw_only=True)
class AutoencoderVQConfig(AutoencoderShape):
    """The shape of a VQ autoencoder; a code is as wide as the latent has channels."""

    kind: Literal["autoencoder_vq"] = "autoencoder_vq"
    latent_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 512)
    codes: int = 8192
    commitment: float = 0.25


@dataclass(frozen=True)
class Quantised:
    """Latents moved to their nearest codes (B, C, h, w), the indices (B, h, w), and the codebook loss."""

    latents: Tensor
    indices: Tensor
    loss: Tensor


@dataclass(frozen=True)
class VQReconstruction:
    """One pass of stage 1: image (B, 3, H, W), loss, indices (B, h, w), raw latents before quantisation."""

    image: Tensor
    codebook_loss: Tensor
    indices: Tensor
    latents: Tensor


class Codebook(nn.Module):
    """A table of codes and the nearest of them to each position of a latent."""

    def __init__(self, codes: int, channels: int, commitment: float) -> None:
        super().__init__()
        self.codes, self.commitment = codes, commitment
        self.embedding = nn.Embedding(codes, channels)
        nn.init.uniform_(self.embedding.weight, -1.0 / codes, 1.0 / codes)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Indices (B, h, w) of the codes closest to latents (B, C, h, w), found in float32."""
        vectors, table = rearrange(z.float(), "b c h w -> (b h w) c"), self.embedding.weight.float()
        # The form with a matrix product cancels badly when codes are close; it gains little for few channels.
        parts = [
            torch.cdist(part, table, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
            for part in vectors.split(SLAB)
        ]
        return torch.cat(parts).reshape(z.shape[0], *z.shape[2:])

    def forward(self, z: Tensor) -> Quantised:
        """Quantise raw latents (B, C, h, w); gradients pass straight through to `z`.

        The loss is van den Oord 2017, equation 3, averaged over elements: codes move to the latents with
        weight 1, latents to the codes with the commitment weight. (The first release of VQGAN, and diffusers
        by default, put that weight on the other term.)
        """
        indices = self.nearest(z)
        codes = rearrange(self.embedding(indices), "b h w c -> b c h w").float()
        latents = z.float()
        loss = (codes - latents.detach()).square().mean()
        loss = loss + self.commitment * (codes.detach() - latents).square().mean()
        straight_through = latents + (codes - latents).detach()
        return Quantised(straight_through.to(z.dtype), indices, loss)

    def counts(self, indices: Tensor) -> Tensor:
        """How often each code occurs among indices of any shape, (codes,) float32."""
        counts = torch.zeros(self.codes, device=indices.device)
        return counts.scatter_add_(
            0, indices.flatten(), torch.ones_like(indices.flatten(), dtype=counts.dtype)
        )

    def usage(self, indices: Tensor) -> dict[str, Tensor]:
        """Perplexity of a batch of indices (1 to the number of codes) and the fraction of codes in it."""
        counts = self.counts(indices)
        share = counts / counts.sum()
        return {
            "codebook_perplexity": torch.special.entr(share).sum().exp(),
            "codebook_used": (counts > 0).float().mean(),
        }


class CodeRevival(nn.Module):
    """Counts for how many steps each code has been idle, and moves dead ones onto latents of the batch.

    It is kept beside the model, not in it, so that the model's file holds weights only; its count is part of
    the state of a run. Dead codes are replaced at random as by Dhariwal et al. 2020 (Jukebox, section 3).
    """

    idle: Tensor

    def __init__(self, codes: int, patience: int = 100) -> None:
        super().__init__()
        self.patience = patience
        self.register_buffer("idle", torch.zeros(codes, dtype=torch.int64))

    @torch.no_grad()
    def forward(self, codebook: Codebook, output: VQReconstruction, generator: torch.Generator) -> Tensor:
        """Note the codes of a batch, replace those idle for `patience` batches; return which, (codes,) bool.

        With several processes a code used in any of them is alive, and all take the first one's replacements.
        """
        parallel = dist.is_available() and dist.is_initialized()
        counts, table = codebook.counts(output.indices), codebook.embedding.weight
        if parallel:
            dist.all_reduce(counts)
        self.idle.add_(1).masked_fill_(counts > 0, 0)
        dead = self.idle >= self.patience
        vectors = rearrange(output.latents, "b c h w -> (b h w) c")
        # One draw per code, dead or not: no wait for the device to learn how many are dead.
        rows = torch.randint(len(vectors), (codebook.codes,), generator=generator, device=generator.device)
        table.copy_(torch.where(dead[:, None], vectors[rows.to(vectors.device)].to(table.dtype), table))
        self.idle.masked_fill_(dead, 0)
        if parallel:
            dist.broadcast(table, 0)
        return dead


class AutoencoderVQ(nn.Module):
    """The VQ autoencoder of latent diffusion, its latents normalised by its own `latent_space`.

    Parameters carry diffusers' `VQModel` names. The denoiser sees latents before quantisation: `encode` stops
    there, and `decode` quantises (Rombach et al. 2022, section 3.1).
    """

    def __init__(self, config: AutoencoderVQConfig, latent_space: LatentSpace | None = None) -> None:
        super().__init__()
        self.config = config
        self.latent_space = latent_space or LatentSpace.identity(config.latent_channels, config.stride)
        channels = config.latent_channels
        self.encoder = Encoder(config, out_channels=channels)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codes, channels, config.commitment)
        self.quant_conv = nn.Conv2d(channels, channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode_raw(self, image: Tensor) -> Tensor:
        """Image in −1..1 to raw latents, before quantisation."""
        return self.quant_conv(self.encoder(image))

    def decode_raw(self, z: Tensor) -> Tensor:
        """Raw latents to an image, through their nearest codes."""
        return self.decoder(self.post_quant_conv(self.quantize(z).latents))

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in −1..1 to latents (B, C, H/f, W/f) before quantisation, normalised."""
        return self.latent_space.normalise(self.encode_raw(image))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as the denoiser knows them to an image in about −1..1."""
        return self.decode_raw(self.latent_space.denormalise(latents))

    def quantised_reconstruction(self, image: Tensor) -> VQReconstruction:
        """Encode, quantise and decode an image in −1..1, for training."""
        z = self.encode_raw(image)
        codes = self.quantize(z)
        decoded = self.decoder(self.post_quant_conv(codes.latents))
        return VQReconstruction(decoded, codes.loss, codes.indices, z.detach())

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients balance the adversarial loss (Esser et al. 2021, equation 7)."""
        return self.decoder.conv_out.weight
