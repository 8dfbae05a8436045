"""A tiny random model folder, in seconds: every part of a real one, a few thousand parameters."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from darkroom.checkpoint.model import Defaults, DenoiserSpec, Model, save_model
from darkroom.diffusion.denoiser import Denoiser
from darkroom.diffusion.path import FlowPath
from darkroom.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from darkroom.nn.latent_space import LatentSpace
from darkroom.nn.unet import UNet, UNetConfig
from darkroom.text.clip import CLIPTextConfig, CLIPTextEncoder
from darkroom.text.conditioning import TextPart
from darkroom.text.tokenizer import train_bpe

CAPTIONS = ["red apple, 3d style", "a rocket, flat style", "an octopus, blob style", "a photo of a banana"]
DEFAULTS = Defaults(width=32, height=32, steps=27, guidance_scale=4.0, sampler="dpmpp_2m", schedule="flow")
SPACE = LatentSpace(channels=4, stride=4, mean=(0.3, -0.2, 0.1, 0.5), std=(1.5, 0.7, 2.0, 0.9))


def tiny_model(
    folder: Path, *, context_dim: int = 16, quant_conv: bool = False, max_bytes: int | None = None
) -> Path:
    """Write a KL autoencoder, a U-Net, a CLIP text encoder and a trained BPE to `folder`."""
    save_model(folder, tiny_parts(context_dim=context_dim, quant_conv=quant_conv), max_bytes=max_bytes)
    return folder


def tiny_parts(*, context_dim: int = 16, quant_conv: bool = False) -> Model:
    """The same in memory, its weights random at a scale that makes every input count."""
    tokenizer = train_bpe(CAPTIONS * 2, 540, 16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        space = AutoencoderKLConfig(
            latent_channels=4,
            channels=(8, 16, 16),
            res_blocks=1,
            groups=4,
            quant_conv=quant_conv,
            mid_attention=False,
        )
        autoencoder = randomised(AutoencoderKL(space, SPACE))
        network = randomised(
            UNet(
                UNetConfig(
                    in_channels=4,
                    out_channels=4,
                    channels=(16, 16),
                    res_blocks=1,
                    attention_depth=(1, 1),
                    num_heads=(2, 2),
                    context_dim=context_dim,
                    linear_projection=True,
                    groups=4,
                )
            )
        )
        text = CLIPTextConfig(vocab_size=tokenizer.vocab_size, context_length=16, width=16, layers=2, heads=2)
        text_encoder = randomised(CLIPTextEncoder(replace(text, eos_token_id=tokenizer.eos_token_id)))
    path = FlowPath(sigma_max=0.999)
    spec = DenoiserSpec(prediction="flow", path=path, latent_space=SPACE, defaults=DEFAULTS)
    return Model(
        autoencoder=autoencoder,
        denoiser=Denoiser(network, path, "flow"),
        texts=(TextPart(text_encoder, tokenizer),),
        spec=spec,
    )


def randomised(network: nn.Module) -> nn.Module:
    """The network with random weights everywhere, also where a new one starts at zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn_like(parameter) * scale)
            if parameter.ndim == 1:
                parameter.add_(1.0 if parameter.numel() and _is_norm_weight(network, parameter) else 0.0)
    return network.eval()


def _is_norm_weight(network: nn.Module, parameter: nn.Parameter) -> bool:
    norms = (nn.GroupNorm, nn.LayerNorm)
    return any(m.weight is parameter for m in network.modules() if isinstance(m, norms))
