"""Latents of a whole data set, encoded once: what stage 2 trains on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from darkroom.checkpoint.model import Autoencoder
from darkroom.data.folder import Pictures
from darkroom.errors import InputError
from darkroom.files import atomic_write


@dataclass
class LatentSet:
    """Normalised latents (N, C, h, w) of N pictures, and of their mirror images where these are allowed."""

    latents: Tensor
    mirrored: Tensor | None
    flips: Tensor

    def batch(self, indices: Sequence[int] | np.ndarray, coin: Tensor) -> Tensor:
        """Latents (B, C, h, w); where `coin` (B,) is below 0.5 and flips are allowed, of the mirror image."""
        chosen = torch.as_tensor(np.asarray(indices), device=self.latents.device)
        latents = self.latents[chosen]
        if self.mirrored is None:
            return latents
        use = (coin < 0.5) & self.flips[chosen]
        return torch.where(use[:, None, None, None], self.mirrored[chosen], latents)

    def to(self, device: torch.device) -> "LatentSet":
        """The same set on another device."""
        mirrored = None if self.mirrored is None else self.mirrored.to(device)
        return LatentSet(self.latents.to(device), mirrored, self.flips.to(device))


def cached_latents(
    autoencoder: Autoencoder, pictures: Pictures, path: Path, batch_size: int = 64
) -> LatentSet:
    """The latents of `pictures` from the cache at `path`, which is made if it is not there.

    The cache names the weights and the pictures it was made of. Raises InputError if these are not the ones
    given.
    """
    identity = {"autoencoder": weights_hash(autoencoder), "pictures": pictures_hash(pictures)}
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                found = file.metadata() or {}
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read ({error}); delete it to encode anew") from error
        for name, value in identity.items():
            if found.get(name) != value:
                raise InputError(
                    f"{path}: made from another {name} than this run's; delete it to encode anew"
                )
    else:
        tensors = {"latents": _encode_all(autoencoder, pictures, batch_size, mirror=False)}
        if pictures.flips.any():
            tensors["mirrored"] = _encode_all(autoencoder, pictures, batch_size, mirror=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as draft:
            save_file(tensors, draft, metadata=identity)
    return LatentSet(tensors["latents"], tensors.get("mirrored"), pictures.flips)


def weights_hash(network: nn.Module) -> str:
    """SHA-256 over the names and bytes of a network's weights and its latent space."""
    digest = hashlib.sha256(repr(getattr(network, "latent_space", None)).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pictures_hash(pictures: Pictures) -> str:
    """SHA-256 over the pixels and the order of the pictures."""
    digest = hashlib.sha256(json.dumps([list(pictures.images.shape), pictures.size]).encode())
    for chunk in pictures.images.split(256):
        digest.update(chunk.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _encode_all(autoencoder: Autoencoder, pictures: Pictures, batch_size: int, *, mirror: bool) -> Tensor:
    device = next(autoencoder.parameters()).device
    pieces = []
    for start in tqdm(range(0, len(pictures), batch_size), desc="encoding", unit="batch", delay=1):
        indices = np.arange(start, min(start + batch_size, len(pictures)))
        image = as_image(pictures.batch(indices).to(device))
        pieces.append(autoencoder.encode(image.flip(-1) if mirror else image).float().cpu())
    return torch.cat(pieces).contiguous()


def as_image(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float32 in −1..1, channels last."""
    return (pixels.float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)
