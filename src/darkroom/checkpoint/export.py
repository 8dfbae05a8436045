"""A model folder in the layout of diffusers, whose `StableDiffusionPipeline` then draws the same pictures."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from darkroom.checkpoint.diffusers_configs import (
    autoencoder_config_to_diffusers,
    clip_config_to_transformers,
    scheduler_config_to_diffusers,
    unet_config_to_diffusers,
)
from darkroom.checkpoint.io import save_tensors
from darkroom.checkpoint.model import DenoiserSpec, load_model
from darkroom.errors import DarkroomError, InputError
from darkroom.files import require_parent
from darkroom.nn.autoencoder_kl import AutoencoderKL
from darkroom.nn.latent_space import LatentSpace
from darkroom.nn.unet import UNet

DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"
PROJECTION = "text_projection.weight"  # no part of CLIPTextModel; the pipeline does not use it
PIPELINE_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export_diffusers(model_folder: Path, out: Path, *, mkdir: bool = False) -> None:
    """Write the model of `model_folder` to the folder `out` as diffusers' `StableDiffusionPipeline` loads it.

    Weights are written as float32. The latent space goes into the autoencoder's 1x1 convs around the latents,
    so that diffusers' `scaling_factor` is 1. With a flow model's 27 steps (or any number of steps that
    divides 999) and our starting noise as `latents`, its pictures are ours with sampler dpmpp_2m. Raises
    InputError if `out` holds anything, or if diffusers' pipeline has no place for a part of the model.
    """
    out = Path(out)
    require_parent(out, mkdir=mkdir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: already there; name a folder that is empty or does not exist")
    model = load_model(model_folder)
    network, autoencoder = model.network, model.autoencoder
    if not isinstance(network, UNet):
        raise InputError(
            f"{model_folder}: diffusers' StableDiffusionPipeline takes a unet, not a {network.config.kind}"
        )
    if not isinstance(autoencoder, AutoencoderKL):
        raise InputError(
            f"{model_folder}: the latent space of a {autoencoder.config.kind} cannot be exported"
        )
    spec, defaults = model.spec, model.spec.defaults
    scheduler = scheduler_config_to_diffusers(spec.prediction, spec.path, defaults.sampler, defaults.schedule)
    with _new_folder(out) as draft:
        vae = autoencoder_config_to_diffusers(autoencoder.config, defaults.height)
        _write(draft / "vae", vae, DIFFUSERS_WEIGHTS, folded(autoencoder, spec.latent_space))
        unet = unet_config_to_diffusers(network.config) | {"sample_size": _sample_size(spec)}
        _write(draft / "unet", unet, DIFFUSERS_WEIGHTS, network.state_dict())
        text = {
            f"text_model.{name}": t
            for name, t in model.text_encoder.state_dict().items()
            if name != PROJECTION
        }
        config = clip_config_to_transformers(model.text_encoder.config, model.tokenizer)
        _write(draft / "text_encoder", config, TRANSFORMERS_WEIGHTS, text)
        model.tokenizer.save(draft / "tokenizer")
        _write_json(draft / "scheduler" / "scheduler_config.json", scheduler)
        index = PIPELINE_INDEX | {"scheduler": ["diffusers", scheduler["_class_name"]]}
        _write_json(draft / "model_index.json", dict(sorted(index.items())))


def folded(autoencoder: AutoencoderKL, space: LatentSpace) -> dict[str, Tensor]:
    """The autoencoder's tensors with raw latents normalised inside `quant_conv` and `post_quant_conv`.

    Convs that are absent are made as identities first. The log-variance of (z - mean) / std is that of z less
    2 log std, apart from its clamp, which then acts on the shifted value.
    """
    tensors = dict(autoencoder.state_dict())
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (space.mean, space.std))
    quant, bias = _conv(autoencoder.quant_conv, 2 * space.channels)
    quant[: space.channels] /= std[:, None]
    bias[: space.channels] = (bias[: space.channels] - mean) / std
    bias[space.channels :] -= 2 * std.log()
    post, post_bias = _conv(autoencoder.post_quant_conv, space.channels)
    convs = {"quant_conv": (quant, bias), "post_quant_conv": (post * std, post @ mean + post_bias)}
    for name, (matrix, shift) in convs.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = matrix[:, :, None, None].float(), shift.float()
    return tensors


def _conv(conv: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """Matrix and bias of a 1x1 conv in float64, or of the identity in its place."""
    if isinstance(conv, nn.Conv2d) and conv.bias is not None:
        return conv.weight.detach()[:, :, 0, 0].double().clone(), conv.bias.detach().double().clone()
    return torch.eye(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)


def _sample_size(spec: DenoiserSpec) -> list[int]:
    return [spec.defaults.height // spec.latent_space.stride, spec.defaults.width // spec.latent_space.stride]


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` when everything in it is written."""
    draft = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        draft.mkdir()
        yield draft
        os.replace(draft, out)
    except OSError as error:
        raise DarkroomError(f"{out}: could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(folder: Path, config: Mapping[str, Any], weights: str, tensors: Mapping[str, Tensor]) -> None:
    _write_json(folder / "config.json", config)
    save_tensors(folder / weights, tensors, {"format": "pt"})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
