"""Features of pictures, what lies nearest among them, and a linear classifier on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from darkroom.nn.perceptual import LPIPS, SqueezeDistance

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


def layer_statistics(network: LPIPS | SqueezeDistance, image: Tensor) -> Tensor:
    """Mean and standard deviation over positions of every tapped layer's channels, (B, D), shallow to deep.

    What a picture is drawn with shows in these, the low layers above all (Gatys et al. 2016).
    """
    layers = [layer.float().flatten(2) for layer in network.layers(image)]
    return torch.cat([part for x in layers for part in (x.mean(2), x.std(2))], dim=1)


@dataclass(frozen=True)
class Neighbours:
    """For each query the number of the nearest gallery row, and their cosine similarity; both (Q,)."""

    index: Tensor
    similarity: Tensor


def nearest(queries: Tensor, gallery: Tensor) -> Neighbours:
    """The gallery row (G, D) of the largest cosine similarity to each query (Q, D); the first among equals."""
    gallery = F.normalize(gallery, dim=1)
    found = [(F.normalize(part, dim=1) @ gallery.T).max(1) for part in queries.split(CHUNK)]
    return Neighbours(torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]))


class LinearClassifier:
    """Multinomial logistic regression on standardised features (N, D).

    Fitted on all rows at once by L-BFGS, from zero, so that the same rows give the same classifier. `penalty`
    weighs the mean of the squared weights against the mean cross-entropy.
    """

    def __init__(
        self, features: Tensor, labels: Sequence[str], *, penalty: float = 1.0, iterations: int = 60
    ) -> None:
        self.classes = sorted(set(labels))
        if len(self.classes) < 2:
            raise ValueError(f"a classifier needs at least two classes, not {self.classes}")
        self.mean, self.std = features.mean(0), features.std(0).clamp_min(1e-6)
        target = torch.tensor([self.classes.index(label) for label in labels])
        x = (features - self.mean) / self.std
        self.weight = torch.zeros(x.shape[1], len(self.classes), requires_grad=True)
        self.bias = torch.zeros(len(self.classes), requires_grad=True)
        search = torch.optim.LBFGS(
            [self.weight, self.bias], max_iter=iterations, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            search.zero_grad()
            loss = F.cross_entropy(x @ self.weight + self.bias, target) + penalty * self.weight.square().mean()
            loss.backward()
            return loss

        search.step(closure)

    def __call__(self, features: Tensor) -> list[str]:
        """The class of each row."""
        with torch.no_grad():
            scores = (features - self.mean) / self.std @ self.weight + self.bias
        return [self.classes[index] for index in scores.argmax(1).tolist()]
