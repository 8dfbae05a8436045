"""A model folder in the layout of diffusers, whose pipeline for it then draws the same pictures."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darkroom.checkpoint.build import Network
from darkroom.checkpoint.configs.autoencoders import autoencoder_config_to_diffusers
from darkroom.checkpoint.configs.scheduler import scheduler_config_to_diffusers
from darkroom.checkpoint.configs.text import clip_config_to_transformers, t5_config_to_transformers
from darkroom.checkpoint.configs.transformers import flux_config_to_diffusers, mmdit_config_to_diffusers
from darkroom.checkpoint.configs.unet import unet_config_to_diffusers
from darkroom.checkpoint.fold import conv_matrix
from darkroom.checkpoint.formats.io import save_tensors
from darkroom.checkpoint.layouts import CLIP_TEXT_TO_HUB, flux_to_diffusers, mmdit_to_diffusers
from darkroom.checkpoint.model import TEXT_ENCODER, TOKENIZER, DenoiserSpec, Model, load_model, numbered
from darkroom.errors import InputError
from darkroom.files import new_folder, require_parent
from darkroom.nn.autoencoder_kl import AutoencoderKL
from darkroom.nn.flux import Flux
from darkroom.nn.interposer import Interposed
from darkroom.nn.latent_space import LatentSpace
from darkroom.nn.mmdit import MMDiT
from darkroom.nn.unet import UNet
from darkroom.text.clip import CLIPTextEncoder
from darkroom.text.conditioning import TextPart, XLConditioning
from darkroom.text.t5 import T5Encoder
from darkroom.text.tokenizer import Tokenizer

DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"
PROJECTION = "text_projection.weight"
UNUSED = ("feature_extractor", "image_encoder")


@dataclass(frozen=True)
class Target:
    """The pipeline of diffusers for a conditioning.

    `projected` are the numbers of the text encoders whose pooled state it takes through a projection.
    """

    pipeline: str
    network: tuple[str, str]
    unused: tuple[str, ...] = UNUSED
    projected: tuple[int, ...] = ()


TARGETS = {
    "text": Target(
        "StableDiffusionPipeline", ("unet", "UNet2DConditionModel"), unused=(*UNUSED, "safety_checker")
    ),
    "xl": Target("StableDiffusionXLPipeline", ("unet", "UNet2DConditionModel"), projected=(1,)),
    "sd3": Target("StableDiffusion3Pipeline", ("transformer", "SD3Transformer2DModel"), projected=(0, 1)),
    "flux": Target("FluxPipeline", ("transformer", "FluxTransformer2DModel")),
}


def export_diffusers(model_folder: Path, out: Path, *, mkdir: bool = False) -> str:
    """Write the model of `model_folder` to the folder `out` for diffusers, and return its pipeline's name.

    Weights are written as float32. The latent space goes into the autoencoder's 1x1 convs around the latents,
    so that diffusers' `scaling_factor` is 1. With a flow model's 27 steps (or any number of steps that
    divides 999) and our starting noise as `latents`, the pictures of a U-Net are ours with sampler dpmpp_2m;
    those of SD 3 and FLUX with any number and euler. Raises InputError if `out` holds anything, or if
    diffusers' pipeline has no place for a part of the model.
    """
    out = Path(out)
    require_parent(out, mkdir=mkdir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: already there; name a folder that is empty or does not exist")
    model = load_model(model_folder)
    target, autoencoder, spec = _target(model, model_folder), model.autoencoder, model.spec
    if isinstance(autoencoder, Interposed):
        raise InputError(f"{model_folder}: has an interposer, which diffusers has no place for")
    if not isinstance(autoencoder, AutoencoderKL):
        raise InputError(
            f"{model_folder}: the latent space of a {autoencoder.config.kind} cannot be exported"
        )
    scheduler = _scheduler(spec, model.network)
    with new_folder(out) as draft:
        vae = autoencoder_config_to_diffusers(autoencoder.config, spec.defaults.height)
        _write(draft / "vae", vae, DIFFUSERS_WEIGHTS, folded(autoencoder, spec.latent_space))
        part, _ = target.network
        _write(draft / part, *_network(model.network, spec))
        for number, text in enumerate(model.texts):
            encoder = draft / numbered(TEXT_ENCODER, number)
            _write(encoder, *_text_encoder(text, projected=number in target.projected))
            assert text.tokenizer is not None
            text.tokenizer.save(draft / numbered(TOKENIZER, number))
        _write_json(draft / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(draft / "model_index.json", _index(target, model, scheduler["_class_name"]))
    return target.pipeline


def _target(model: Model, where: Path) -> Target:
    kind, network = model.spec.conditioning.kind, model.network
    target = TARGETS.get(kind)
    classes = {"unet": UNet, "transformer": MMDiT if kind == "sd3" else Flux}
    if (
        target is None
        or not isinstance(network, classes[target.network[0]])
        or model.spec.beside != "nothing"
    ):
        raise InputError(f"{where}: diffusers has no pipeline for a {network.config.kind} told by {kind!r}")
    return target


def _network(network: Network, spec: DenoiserSpec) -> tuple[dict[str, Any], str, dict[str, Tensor]]:
    """Config, name of the file, and tensors."""
    tensors = network.state_dict()
    if isinstance(network, MMDiT):
        config, table = mmdit_config_to_diffusers(network.config), mmdit_to_diffusers(network.config.depth)
        return config | {"sample_size": _sample_size(spec)[0]}, DIFFUSERS_WEIGHTS, table(tensors)
    if isinstance(network, Flux):
        table = flux_to_diffusers()
        return flux_config_to_diffusers(network.config), DIFFUSERS_WEIGHTS, table(tensors)
    assert isinstance(network, UNet)
    config = unet_config_to_diffusers(network.config) | {"sample_size": _sample_size(spec)}
    return config, DIFFUSERS_WEIGHTS, dict(tensors)


def _text_encoder(part: TextPart, *, projected: bool) -> tuple[dict[str, Any], str, dict[str, Tensor]]:
    """Config, name of the file, and tensors; an encoder without the projection that is asked for gets the
    identity.
    """
    encoder, tokenizer = part.encoder, part.tokenizer
    tensors = dict(encoder.state_dict())
    if isinstance(encoder, T5Encoder):
        copy = {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}
        return t5_config_to_transformers(encoder.config), TRANSFORMERS_WEIGHTS, tensors | copy
    assert isinstance(encoder, CLIPTextEncoder) and isinstance(tokenizer, Tokenizer)
    if not projected:
        tensors.pop(PROJECTION, None)
    elif PROJECTION not in tensors:
        tensors[PROJECTION] = torch.eye(encoder.config.width)
    config = clip_config_to_transformers(encoder.config, tokenizer, projected=projected)
    return config, TRANSFORMERS_WEIGHTS, CLIP_TEXT_TO_HUB(tensors)


def _scheduler(spec: DenoiserSpec, network: Network) -> dict[str, Any]:
    if spec.prediction == "edm":
        raise InputError(
            "models that predict as EDM are not exported: no pipeline here was held against theirs"
        )
    sampler = spec.defaults.sampler if isinstance(network, UNet) else "flow_euler"
    return scheduler_config_to_diffusers(spec.prediction, spec.path, sampler, spec.defaults.schedule)


def _index(target: Target, model: Model, scheduler: str) -> dict[str, Any]:
    part, network = target.network
    index: dict[str, Any] = {
        "_class_name": target.pipeline,
        "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", scheduler],
        "vae": ["diffusers", "AutoencoderKL"],
        part: ["diffusers", network],
    }
    index |= {name: [None, None] for name in target.unused}
    if "safety_checker" in target.unused:
        index["requires_safety_checker"] = False
    if isinstance(model.spec.conditioning, XLConditioning):
        index["force_zeros_for_empty_prompt"] = model.spec.conditioning.zero_blank
    if target.pipeline == "StableDiffusion3Pipeline":  # which may lack the third
        index |= {numbered(name, 2): [None, None] for name in (TEXT_ENCODER, TOKENIZER)}
    for number, text in enumerate(model.texts):
        t5 = isinstance(text.encoder, T5Encoder)
        clip = "CLIPTextModelWithProjection" if number in target.projected else "CLIPTextModel"
        index[numbered(TEXT_ENCODER, number)] = ["transformers", "T5EncoderModel" if t5 else clip]
        index[numbered(TOKENIZER, number)] = ["transformers", "T5TokenizerFast" if t5 else "CLIPTokenizer"]
    return dict(sorted(index.items()))


def folded(autoencoder: AutoencoderKL, space: LatentSpace) -> dict[str, Tensor]:
    """The autoencoder's tensors with raw latents normalised inside `quant_conv` and `post_quant_conv`.

    Convs that are absent are made as identities first. The log-variance of (z - mean) / std is that of z less
    2 log std, apart from its clamp, which then acts on the shifted value.
    """
    tensors = dict(autoencoder.state_dict())
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (space.mean, space.std))
    quant, bias = conv_matrix(autoencoder.quant_conv, 2 * space.channels)
    quant[: space.channels] /= std[:, None]
    bias[: space.channels] = (bias[: space.channels] - mean) / std
    bias[space.channels :] -= 2 * std.log()
    post, post_bias = conv_matrix(autoencoder.post_quant_conv, space.channels)
    convs = {"quant_conv": (quant, bias), "post_quant_conv": (post * std, post @ mean + post_bias)}
    for name, (matrix, shift) in convs.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = matrix[:, :, None, None].float(), shift.float()
    return tensors


def _sample_size(spec: DenoiserSpec) -> list[int]:
    _, rows, columns = spec.latent_space.shape(spec.defaults.height, spec.defaults.width)
    return [rows, columns]


def _write(folder: Path, config: Mapping[str, Any], weights: str, tensors: Mapping[str, Tensor]) -> None:
    _write_json(folder / "config.json", config)
    save_tensors(folder / weights, tensors, {"format": "pt"})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
