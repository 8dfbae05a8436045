"""Features of pictures, what lies nearest among them, and a linear classifier on them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from darkroom.nn.perceptual import SqueezeDistance, tapped

CHUNK = 4096  # rows of a similarity matrix computed at once


def extract(
    images: Tensor, feature: Callable[[Tensor], Tensor], *, batch_size: int = 64, label: str = "features"
) -> Tensor:
    """Apply `feature` to uint8 images (N, 3, H, W), batch by batch, and return its rows (N, D) on the host.

    `feature` takes images in −1..1 on the device of `images`, such as `SqueezeDistance.fire9`.
    """
    starts = range(0, len(images), batch_size)
    with torch.no_grad():
        rows = [
            feature(images[start : start + batch_size].float() / 127.5 - 1.0).float().cpu()
            for start in tqdm(starts, desc=label, unit=" batches", delay=1)
        ]
    return torch.cat(rows)


def texture(network: SqueezeDistance, image: Tensor) -> Tensor:
    """How SqueezeNet's first channels occur together, (B, D): what a picture is drawn with, not what it
    shows.

    The square roots of the Gram matrices of relu1 and fire3, averaged over positions, above the diagonal and
    on it (Gatys et al. 2016). Images in −1..1.
    """
    taps = network.taps[:2]
    first = nn.Sequential(*list(network.features)[: taps[-1].index + 1])
    maps = [x.float().flatten(2) for x in tapped(first, taps, network.caffe(image))]
    return torch.cat([_upper(x @ x.mT / x.shape[2]).sqrt() for x in maps], dim=1)


def palette(image: Tensor, levels: int = 8) -> Tensor:
    """The square roots of a picture's colour histogram, (B, levels³), of images (B, 3, H, W) in −1..1."""
    steps = ((image + 1.0) * (levels / 2)).long().clamp(0, levels - 1)
    colour = (steps[:, 0] * levels + steps[:, 1]) * levels + steps[:, 2]
    share = torch.full(colour.flatten(1).shape, 1.0 / colour[0].numel(), device=image.device)
    return (
        torch.zeros(len(image), levels**3, device=image.device)
        .scatter_add_(1, colour.flatten(1), share)
        .sqrt()
    )


def _upper(matrix: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(*matrix.shape[-2:], device=matrix.device)
    return matrix[:, rows, columns]


@dataclass(frozen=True)
class Neighbours:
    """For each query the number of the nearest gallery row, and their cosine similarity; both (Q,)."""

    index: Tensor
    similarity: Tensor


def nearest(queries: Tensor, gallery: Tensor) -> Neighbours:
    """The gallery row (G, D) of the largest cosine similarity to each query (Q, D); the first among
    equals.
    """
    gallery = F.normalize(gallery, dim=1)
    found = [(F.normalize(part, dim=1) @ gallery.T).max(1) for part in queries.split(CHUNK)]
    return Neighbours(torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]))


class RidgeClassifier:
    """Least squares to ±1 for each class on standardised features, solved exactly.

    The features come as blocks (N, D1), (N, D2), ..., which count the same whatever their widths. `penalty`
    weighs the squared weights against the sum of squared errors.
    """

    def __init__(self, blocks: Sequence[Tensor], labels: Sequence[str], *, penalty: float = 0.1) -> None:
        self.classes = sorted(set(labels))
        if len(self.classes) < 2:
            raise ValueError(f"a classifier needs at least two classes, not {self.classes}")
        self.means = [block.mean(0) for block in blocks]
        # Columns that hardly vary would be noise blown up.
        self.stds = [block.std(0) + 1e-4 * block.abs().mean() + 1e-8 for block in blocks]
        x = self._standardised(blocks)
        target = torch.tensor([[1.0 if label == name else -1.0 for name in self.classes] for label in labels])
        kernel = x @ x.T + penalty * torch.eye(len(x))
        self.weight = x.T @ torch.linalg.solve(kernel, target)

    def __call__(self, blocks: Sequence[Tensor]) -> list[str]:
        """The class of each row."""
        return [
            self.classes[index] for index in (self._standardised(blocks) @ self.weight).argmax(1).tolist()
        ]

    def _standardised(self, blocks: Sequence[Tensor]) -> Tensor:
        parts = zip(blocks, self.means, self.stds, strict=True)
        return torch.cat([(x - mean) / std / math.sqrt(x.shape[1]) for x, mean, std in parts], dim=1)
