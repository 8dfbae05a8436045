"""The pictures of darkroom-mini's data in memory: pixels, features, and how well an autoencoder keeps
them.
"""

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from mini_data import Row
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from darkroom.checkpoint.model import Autoencoder
from darkroom.data.folder import load_picture
from darkroom.evaluate.features import extract
from darkroom.evaluate.metrics import psnr, to_uint8
from darkroom.nn.perceptual import SqueezeDistance, load_perceptual

SIZE = 128
SQUEEZENET = Path("weights/squeezenet1_1_caffe_features.safetensors")


def squeezenet(data: Path, device: torch.device) -> SqueezeDistance:
    """The network of the perceptual distance and of the features."""
    return load_perceptual("squeeze", data / SQUEEZENET).to(device)


def stack(images: Iterable[Image.Image]) -> Tensor:
    """Pictures as uint8 (N, 3, H, W)."""
    return torch.stack(
        [
            torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(i.height, i.width, 3)
            for i in images
        ]
    ).permute(0, 3, 1, 2)


def load(data: Path, chosen: Sequence[Row], size: int = SIZE) -> Tensor:
    """Pictures of the data as uint8 (N, 3, size, size), over white."""

    def read(row: Row) -> Tensor:
        return torch.from_numpy(load_picture(data / row.path, size).copy()).permute(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        bar = tqdm(
            pool.map(read, chosen), total=len(chosen), desc="reading pictures", unit=" pictures", delay=1
        )
        return torch.stack(list(bar))


class Real:
    """All pictures of the data with their fire9 features (N, 512), computed once and kept in `cache`."""

    def __init__(self, data: Path, table: Sequence[Row], network: SqueezeDistance, cache: Path) -> None:
        self.data, self.network = data, network
        self.number = {row: index for index, row in enumerate(table)}
        key = hashlib.sha256("\n".join(row.path for row in table).encode()).hexdigest()
        kept = torch.load(cache) if cache.is_file() else {}
        if kept.get("key") != key:
            kept = {"key": key, "fire9": self.of(load(data, table))}
            cache.parent.mkdir(parents=True, exist_ok=True)
            torch.save(kept, cache)
        self.fire9 = kept["fire9"]

    def __getitem__(self, chosen: Sequence[Row]) -> Tensor:
        """The features (len(chosen), 512) of some of the pictures."""
        return self.fire9[[self.number[row] for row in chosen]]

    def of(self, images: Tensor) -> Tensor:
        """The features of other pictures, uint8 (N, 3, H, W)."""
        return extract(images.to(self.network.mean.device), self.network.fire9)


@dataclass(frozen=True)
class Kept:
    """What is left of pictures after an autoencoder: PSNR in dB and perceptual distance, one each (N,)."""

    images: Tensor
    psnr: Tensor
    distance: Tensor


@torch.no_grad()
def reconstruct(
    autoencoder: Autoencoder, images: Tensor, network: SqueezeDistance, batch_size: int = 32
) -> Kept:
    """Encode and decode uint8 pictures; both distances are of the 8-bit reconstruction."""
    device = network.mean.device
    parts = []
    for batch in tqdm(images.split(batch_size), desc="reconstructing", unit=" batches", delay=1):
        image = batch.to(device).float() / 127.5 - 1.0
        made = to_uint8(autoencoder.decode(autoencoder.encode(image)))
        distance = network(image, made.float() / 127.5 - 1.0)
        parts.append((made.cpu(), psnr(batch, made.cpu()), distance.double().cpu()))
    return Kept(*(torch.cat(part) for part in zip(*parts, strict=True)))
