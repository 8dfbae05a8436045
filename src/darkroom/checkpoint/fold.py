"""An affine map of latents inside a KL autoencoder's 1x1 convs, so that nothing else has to know of it."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from darkroom.checkpoint.build import filled
from darkroom.evaluate.latent_fit import Affine
from darkroom.nn.autoencoder_kl import AutoencoderKL
from darkroom.nn.latent_space import LatentSpace

SMALLEST = 1e-30  # a weight below is none, and its logarithm finite


def folded(
    autoencoder: AutoencoderKL, to_denoiser: Affine, to_decoder: Affine, logvar: Tensor
) -> AutoencoderKL:
    """A new autoencoder that encodes through `to_denoiser` and decodes through `to_decoder`.

    Both are maps of latents as `autoencoder` normalises them; it and the new one share that normalisation.
    Convs that are absent are made. The means are mapped exactly. The variance of a sum is that of its parts,
    Σ w² exp(logvar), whose logarithm a conv can only follow to first order: about `logvar` (C,), the mean of
    raw log-variances over pictures. Where a row has one weight only that is exact.
    """
    encode, decode = (_raw(affine, autoencoder.latent_space) for affine in (to_denoiser, to_decoder))
    channels = autoencoder.config.latent_channels
    mean_rows, logvar_rows = slice(channels), slice(channels, None)
    quant, bias = conv_matrix(autoencoder.quant_conv, 2 * channels)
    post, post_bias = conv_matrix(autoencoder.post_quant_conv, channels)
    parts = _parts_of_variance(encode.matrix, logvar)
    shares = parts.softmax(1)
    offset = parts.logsumexp(1) - shares @ logvar.cpu().double()
    convs = {
        "quant_conv": (
            torch.cat([encode.matrix @ quant[mean_rows], shares @ quant[logvar_rows]]),
            torch.cat([encode.matrix @ bias[mean_rows] + encode.bias, shares @ bias[logvar_rows] + offset]),
        ),
        "post_quant_conv": (post @ decode.matrix, post @ decode.bias + post_bias),
    }
    return _with_convs(autoencoder, convs)


def _with_convs(autoencoder: AutoencoderKL, convs: dict[str, tuple[Tensor, Tensor]]) -> AutoencoderKL:
    tensors = dict(autoencoder.state_dict())
    like = autoencoder.decoder.conv_in.weight
    for name, (matrix, bias) in convs.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = matrix[:, :, None, None].to(like), bias.to(like)
    config = replace(autoencoder.config, quant_conv=True)
    return filled(lambda: AutoencoderKL(config, autoencoder.latent_space), tensors, "folded autoencoder")


def _raw(affine: Affine, space: LatentSpace) -> Affine:
    """The map of raw latents that is `affine` on normalised ones."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (space.mean, space.std))
    matrix = std[:, None] * affine.matrix / std
    return Affine(matrix, std * affine.bias + mean - matrix @ mean)


def _parts_of_variance(matrix: Tensor, logvar: Tensor) -> Tensor:
    """Logarithms (C, C) of what each channel adds to each channel's variance."""
    return 2 * matrix.abs().clamp_min(SMALLEST).log() + logvar.cpu().double()


def conv_matrix(conv: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """Matrix and bias of a 1x1 conv in float64 on the host, or of the identity in its place."""
    if not isinstance(conv, nn.Conv2d):
        return torch.eye(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    weight, bias = (parameter.detach().cpu().double().clone() for parameter in conv.parameters())
    return weight[:, :, 0, 0], bias
