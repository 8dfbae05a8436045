"""The loss of stage 1: reconstruction, perception, and an adversary (Esser 2021, Rombach 2022)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from darkroom.nn.discriminator import (
    PatchGAN,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from darkroom.nn.perceptual import LPIPS, SqueezeDistance, load_perceptual


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """A perceptual distance from local files: LPIPS (with heads), or SqueezeNet's, unweighted."""

    kind: Literal["lpips", "squeeze"] = "squeeze"
    weights: Path
    heads: Path | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """A patch discriminator that joins at `start_step`; `weight` scales the paper's adaptive one."""

    kind: Literal["hinge", "vanilla"] = "hinge"
    start_step: int = 50_001
    weight: float = 0.5
    channels: int = 64
    layers: int = 3
    lr_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class AutoencoderLossConfig:
    """Weights of stage 1; `kl_weight` is the paper's, for sums over a whole picture."""

    pixel: Literal["l1", "l2"] = "l1"
    perceptual: PerceptualConfig | None = None
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0
    learned_logvar: bool = True
    adversarial: AdversarialConfig | None = None


class ReconstructionLoss(nn.Module):
    """Negative log-likelihood of a picture under its reconstruction: error / exp(s) + s, per element.

    The error is the pixel distance plus the weighted perceptual one; s is the learned log-variance, a scalar
    that starts at 0.
    """

    def __init__(self, config: AutoencoderLossConfig) -> None:
        super().__init__()
        self.config = config
        self.logvar = nn.Parameter(torch.zeros(()), requires_grad=config.learned_logvar)
        # Held in a tuple, so that frozen weights are neither trained nor saved with the run.
        perceptual = config.perceptual
        self.frozen: tuple[LPIPS | SqueezeDistance, ...] = ()
        self.perceptual_weight = 0.0
        if perceptual is not None:
            self.frozen = (load_perceptual(perceptual.kind, perceptual.weights, perceptual.heads),)
            self.perceptual_weight = perceptual.weight

    def forward(self, reconstruction: Tensor, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch, and its parts for the log."""
        difference = reconstruction.float() - image
        pixel = difference.abs().mean() if self.config.pixel == "l1" else difference.square().mean()
        logs = {f"{self.config.pixel}_loss": pixel.detach(), "mse": difference.detach().square().mean()}
        error = pixel
        for perceptual in self.frozen:
            distance = perceptual(reconstruction, image).float().mean()
            logs["perceptual_loss"] = distance.detach()
            error = error + self.perceptual_weight * distance
        return error / self.logvar.exp() + self.logvar, logs


class Adversary(nn.Module):
    """The discriminator with both of its losses, in one backward pass.

    The generator's term sees the discriminator with its weights held constant, so that adding the two losses
    gives each side its own gradient and the loop needs no second optimizer.
    """

    def __init__(self, config: AdversarialConfig, in_channels: int = 3) -> None:
        super().__init__()
        self.config = config
        self.patches = PatchGAN(in_channels=in_channels, channels=config.channels, layers=config.layers)

    def forward(
        self, reconstruction: Tensor, image: Tensor, nll: Tensor, last_layer: nn.Parameter
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Both losses added, and their parts; `nll` and `last_layer` set the adaptive weight."""
        constant = {name: p.detach() for name, p in self.patches.named_parameters()}
        fooled = generator_loss(
            functional_call(self.patches, constant, (reconstruction,)).float(), self.config.kind
        )
        gradients = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (nll, fooled))
        weight = self.config.weight * adaptive_weight(*gradients)
        real, fake = self.patches(image).float(), self.patches(reconstruction.detach()).float()
        judged = discriminator_loss(real, fake, self.config.kind)
        logs = {"adversarial_loss": fooled, "discriminator_loss": judged, "adaptive_weight": weight}
        logs |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
        return weight * fooled + judged, {k: v.detach() for k, v in logs.items()}


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each picture in float32: (B,)."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)
