"""The patch discriminator of stage 1 and its losses (Isola et al. 2017; Esser et al. 2021)."""

from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

AdversarialKind = Literal["hinge", "vanilla"]


class PatchGAN(nn.Module):
    """Says of every patch of a picture how real it looks; with three layers a patch is 70×70 pixels.

    `layers` strided convs, then one of stride 1 and one to a single channel, BatchNorm between; weights are
    drawn as in pix2pix and named as in VQGAN's release (`main.N`).
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        blocks: list[nn.Module] = [
            nn.Conv2d(in_channels, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        for index, (before, after) in enumerate(pairwise(widths), start=1):
            conv = nn.Conv2d(before, after, 4, stride=2 if index < layers else 1, padding=1, bias=False)
            blocks += [conv, nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        blocks.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*blocks)
        self.apply(draw_weights)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in −1..1 to one logit per patch, (B, 1, h, w), positive for real."""
        return self.main(image)


def draw_weights(module: nn.Module) -> None:
    """Initialise one layer as pix2pix does: N(0, 0.02) for convs, N(1, 0.02) for the gains of norms."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def discriminator_loss(real: Tensor, fake: Tensor, kind: AdversarialKind = "hinge") -> Tensor:
    """Mean loss of the discriminator on logits of real and of reconstructed pictures.

    "hinge": ½ (max(0, 1 − real) + max(0, 1 + fake)) (Lim and Ye 2017); "vanilla": the logistic loss of
    Goodfellow et al. 2014, halved.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor, kind: AdversarialKind = "hinge") -> Tensor:
    """Mean loss of the autoencoder on logits of its reconstructions.

    "hinge": −fake; "vanilla": −log sigmoid(fake), the form that doesn't saturate (Goodfellow et al. 2014,
    section 3).
    """
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def adaptive_weight(nll_grad: Tensor, g_grad: Tensor) -> Tensor:
    """The weight of the adversarial loss, a scalar without gradient: |nll| / (|g| + 1e-4) within 0..1e4.

    Both are gradients by the last decoder layer's weight, of the reconstruction and of the adversarial loss
    (Esser et al. 2021, equation 7; its release adds 1e-4 and clamps).
    """
    ratio = nll_grad.detach().float().norm() / (g_grad.detach().float().norm() + 1e-4)
    return ratio.clamp(0.0, 1e4)
