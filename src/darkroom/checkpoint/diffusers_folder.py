"""A model folder in the layout of diffusers as a `Model`."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from darkroom.checkpoint.anatomy import CLIP_ROLES
from darkroom.checkpoint.build import (
    Autoencoder,
    Network,
    NetworkConfig,
    TextConfig,
    build_autoencoder,
    build_network,
    build_text_encoder,
    filled,
)
from darkroom.checkpoint.configs.autoencoders import autoencoder_from_diffusers, latent_space_from_diffusers
from darkroom.checkpoint.configs.scheduler import scheduler_config_from_diffusers
from darkroom.checkpoint.configs.text import text_config_from_transformers
from darkroom.checkpoint.configs.transformers import transformer_config_from_diffusers
from darkroom.checkpoint.configs.unet import unet_config_from_diffusers
from darkroom.checkpoint.few_step import SCHEDULERS, few_step, names_of
from darkroom.checkpoint.folder_files import CONFIG, INDEX, weight_file
from darkroom.checkpoint.formats.io import Device, load_tensors
from darkroom.checkpoint.layouts import (
    AUTOENCODER_TO_LEGACY,
    CLIP_TEXT_TO_HUB,
    LDM_TEXT_TO_DIFFUSERS,
    dit_to_diffusers,
    flux_to_diffusers,
    mmdit_to_diffusers,
    t5_from_published,
)
from darkroom.checkpoint.model import Defaults, DenoiserSpec, Model, check_fit
from darkroom.checkpoint.single_file import Part, Parts
from darkroom.diffusion.denoiser import Denoiser
from darkroom.errors import InputError, unknown
from darkroom.families import FAMILIES
from darkroom.files import read_json
from darkroom.inputs import Beside
from darkroom.nn.dit import DiTConfig
from darkroom.nn.flux import FluxConfig
from darkroom.nn.latent_space import LatentSpace
from darkroom.nn.mmdit import MMDiTConfig
from darkroom.text.clip import CLIPTextConfig
from darkroom.text.conditioning import (
    ClassConditioning,
    Conditioning,
    FluxConditioning,
    SD3Conditioning,
    TextConditioning,
    TextPart,
    XLConditioning,
)
from darkroom.text.find import Kind, find_tokenizer, read_tokenizer
from darkroom.text.ldm import LDMTextConfig
from darkroom.text.t5 import T5Config

T = TypeVar("T")

AUTOENCODERS = ("vae", "vqvae")


# The family whose defaults a pipeline's class has: variants of one model have classes of their own there.
PIPELINES = {
    "StableDiffusionPipeline": "sd1",
    "StableDiffusionImg2ImgPipeline": "sd1",
    "StableDiffusionInpaintPipeline": "sd1",
    "StableDiffusionDepth2ImgPipeline": "sd2-depth",
    "StableDiffusionUpscalePipeline": "sd-x4-upscaler",
    "LatentConsistencyModelPipeline": "sd1",
    "LatentConsistencyModelImg2ImgPipeline": "sd1",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl-refiner",
    "StableDiffusionXLInpaintPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3-medium",
    "StableDiffusion3Img2ImgPipeline": "sd3-medium",
    "FluxPipeline": "flux-dev",
    "FluxImg2ImgPipeline": "flux-dev",
    "FluxFillPipeline": "flux-fill",
    "FluxControlPipeline": "flux-control",
    "FluxKontextPipeline": "flux-kontext",
    "DiTPipeline": "dit-xl-2-256",
    "LDMPipeline": "ldm-unconditional",
    "LDMTextToImagePipeline": "ldm-text2img-large",
    "LDMSuperResolutionPipeline": "ldm-super-resolution",
}
# These also take networks of plain text to image.
INPAINTING = ("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline")
TEXTS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"), ("text_encoder_3", "tokenizer_3"))


def load_diffusers(
    folder: Path,
    places: Sequence[Path] = (),
    dtype: torch.dtype = torch.float32,
    family: str | None = None,
    device: Device = "cpu",
) -> Model:
    """Read such a folder straight to `device` in `dtype`; `places` are where else to look for tokenizers.

    `family` says which it is where several share a pipeline's class, networks and scheduler.
    What generation does not need, such as `safety_checker` and `feature_extractor`, is not looked at. Raises
    InputError for a pipeline that is not known, and as `load_model` does.
    """
    index = read_json(folder / INDEX)
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        raise unknown(f"pipeline in {folder / INDEX}", pipeline, PIPELINES)
    there = {part for part, value in index.items() if _present(value)}
    denoiser = _needed(folder, there, "transformer", "unet")
    network = _load_network(denoiser, dtype, device)
    autoencoder = load_diffusers_autoencoder(_needed(folder, there, *AUTOENCODERS), dtype, device)
    prediction, path, sampler, schedule = read_config(
        _needed(folder, there, "scheduler") / "scheduler_config.json", scheduler_config_from_diffusers
    )
    name = family or family_of(pipeline, network.config, prediction)
    spec = FAMILIES[name].spec
    _warn_of_another_space(folder, FAMILIES[name].title, spec.latent_space, autoencoder.latent_space)
    spec = replace(
        spec,
        prediction=prediction,
        path=path,
        latent_space=autoencoder.latent_space,
        defaults=_defaults(spec.defaults, denoiser, network, autoencoder, sampler, schedule),
        conditioning=_conditioning(spec.conditioning, index, network),
        beside=_beside(pipeline, spec.beside, network, autoencoder),
    )
    spec = _few_step(spec, name, folder, index, denoiser)
    texts = tuple(_load_texts(folder, there, places, dtype, device))
    model = Model(
        autoencoder=autoencoder, denoiser=Denoiser(network, path, spec.prediction), texts=texts, spec=spec
    )
    check_fit(model, folder)
    return model


def load_diffusers_autoencoder(
    folder: Path, dtype: torch.dtype = torch.float32, device: Device = "cpu"
) -> Autoencoder:
    """The autoencoder of one part's folder, its latent space as its config says."""
    config = read_config(folder / CONFIG, autoencoder_from_diffusers)
    tensors = AUTOENCODER_TO_LEGACY.inverse()(part_tensors(folder, dtype, device))
    space = read_config(folder / CONFIG, latent_space_from_diffusers)
    return filled(lambda: build_autoencoder(config, space), tensors, folder)


def folder_parts(folder: Path, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Parts:
    """One part's folder, an autoencoder's or a text encoder's, as what an original file would hold.

    Raises InputError for a folder of anything else.
    """
    fields, tensors = read_json(folder / CONFIG), part_tensors(folder, dtype, device)
    if "_class_name" in fields:
        tensors = AUTOENCODER_TO_LEGACY.inverse()(tensors)
        part = Part(config=read_config(folder / CONFIG, autoencoder_from_diffusers), tensors=tensors)
        return Parts(family="autoencoder", autoencoder=part)
    config = read_config(folder / CONFIG, text_config_from_transformers)
    part = Part(config=config, tensors=_text_tensors(config, tensors))
    return Parts(family="text-encoder", texts={role_of(config): part})


def read_config(file: Path, read: Callable[[Mapping[str, Any]], T]) -> T:
    """What `read` makes of a JSON file, whose name goes before its errors."""
    fields = read_json(file)
    try:
        return read(fields)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _present(value: object) -> bool:
    """Whether an entry of the index names a part: one left out is [null, null]."""
    return isinstance(value, list) and len(value) == 2 and value[1] is not None


def _needed(folder: Path, there: set[str], *names: str) -> Path:
    """The folder of the first of these parts that is there."""
    for name in names:
        if name in there and (folder / name).is_dir():
            return folder / name
    raise InputError(f"{folder}: lacks the folder {' or '.join(names)}, a part of the model")


def part_tensors(folder: Path, dtype: torch.dtype, device: Device = "cpu") -> dict[str, Tensor]:
    """The weights of a part; see `weight_file`."""
    return load_tensors(weight_file(folder), dtype=dtype, device=device)[0]


def _load_network(folder: Path, dtype: torch.dtype, device: Device) -> Network:
    unet = folder.name == "unet"
    config = read_config(
        folder / CONFIG, unet_config_from_diffusers if unet else transformer_config_from_diffusers
    )
    tensors = part_tensors(folder, dtype, device)
    if isinstance(config, MMDiTConfig):
        tensors = mmdit_to_diffusers(config.depth).inverse()(tensors)
    elif isinstance(config, FluxConfig):
        tensors = flux_to_diffusers().inverse()(tensors)
    elif isinstance(config, DiTConfig):
        tensors = dit_to_diffusers(config).inverse()(tensors)
    return filled(lambda: build_network(config), tensors, folder)


def _load_texts(
    folder: Path, there: set[str], places: Sequence[Path], dtype: torch.dtype, device: Device
) -> list[TextPart]:
    parts = []
    for encoder, tokenizer in (*TEXTS, ("bert", "tokenizer")):
        if encoder not in there:
            continue
        config = read_config(_needed(folder, there, encoder) / CONFIG, text_config_from_transformers)
        tensors = _text_tensors(config, part_tensors(folder / encoder, dtype, device))
        # Projections of encoders that are used without them.
        if isinstance(config, CLIPTextConfig) and config.projection_dim is None:
            tensors.pop("text_projection.weight", None)
        network = filled(lambda config=config: build_text_encoder(config), tensors, folder / encoder)
        own = folder / tokenizer
        found = read_tokenizer(own) if own.is_dir() else find_tokenizer(_tokenizer_kind(config), places)
        parts.append(TextPart(network, found))
    return parts


def role_of(config: TextConfig) -> str:
    """Which of the families' text encoders one is: CLIP's differ in width."""
    if isinstance(config, CLIPTextConfig):
        return CLIP_ROLES.get(config.width, "clip_l")
    return "t5" if isinstance(config, T5Config) else "ldm_text"


def _tokenizer_kind(config: CLIPTextConfig | T5Config | LDMTextConfig) -> Kind:
    """What tokenizer an encoder reads with; OpenCLIP's, which are with the exact GELU, pad as bigG's."""
    if isinstance(config, CLIPTextConfig):
        return "clip" if config.activation == "quick_gelu" else "clip_g"
    return "t5" if isinstance(config, T5Config) else "bert"


def _text_tensors(
    config: CLIPTextConfig | T5Config | LDMTextConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a text encoder's folder under our names."""
    if isinstance(config, T5Config):
        return t5_from_published(tensors)
    table = CLIP_TEXT_TO_HUB if isinstance(config, CLIPTextConfig) else LDM_TEXT_TO_DIFFUSERS
    return table.inverse()(tensors)


def family_of(pipeline: str, config: NetworkConfig, prediction: str) -> str:
    """Whose defaults a folder has, where several families share a pipeline's class."""
    family = PIPELINES[pipeline]
    if family == "sd1" and getattr(config, "context_dim", None) == FAMILIES["sd2"].network.context_dim:
        return "sd2" if prediction == "v" else "sd2-base"
    if family == "sdxl" and prediction == "edm":
        return "playground-v2.5"
    if family == "flux-dev" and isinstance(config, FluxConfig) and not config.guidance:
        return "flux-schnell"
    if family == "sd3-medium" and isinstance(config, MMDiTConfig) and config.qk_norm:
        return "sd3.5-medium" if config.dual_layers else "sd3.5-large"
    return family


def _conditioning(ours: Conditioning, index: Mapping[str, Any], network: Network) -> Conditioning:
    """A family's conditioning with what the index and the network's config say of it."""
    config = network.config
    if isinstance(ours, XLConditioning):
        return replace(
            ours,
            aesthetic=bool(index.get("requires_aesthetics_score", False)),
            zero_blank=bool(index.get("force_zeros_for_empty_prompt", True)),
        )
    if isinstance(ours, SD3Conditioning) and isinstance(config, MMDiTConfig):
        return replace(ours, context_dim=config.context_dim)
    if isinstance(ours, FluxConditioning) and isinstance(config, FluxConfig):
        return replace(ours, distilled=config.guidance)
    if isinstance(ours, ClassConditioning) and isinstance(config, DiTConfig):
        return replace(ours, classes=config.null_class)
    # Folders of SD 2 store one layer of the text encoder less, so that what is used is the last.
    return TextConditioning() if isinstance(ours, TextConditioning) else ours


def _beside(pipeline: str, beside: Beside, network: Network, autoencoder: Autoencoder) -> Beside:
    """What a network is shown: as its family says, or else its pipeline, if it has channels for it."""
    if beside == "nothing":
        beside = "inpaint" if pipeline in INPAINTING else FAMILIES[PIPELINES[pipeline]].spec.beside
    extra = network.config.in_channels - autoencoder.config.latent_channels
    return beside if extra or beside == "reference" else "nothing"


def _warn_of_another_space(folder: Path, title: str, usual: LatentSpace, found: LatentSpace) -> None:
    """Nothing else in a folder says what latents the denoiser was trained on, so a mixture can't be an
    error.
    """
    same = (usual.channels, usual.stride) == (found.channels, found.stride)
    numbers = zip((*usual.mean, *usual.std), (*found.mean, *found.std), strict=False)
    if not same or not all(math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-2) for a, b in numbers):
        warnings.warn(
            f"{folder}: the autoencoder's latents are not those of {title}: right if it came with this "
            "network, wrong pictures if it was put in from another model",
            stacklevel=5,
        )


def _few_step(
    spec: DenoiserSpec, family: str, folder: Path, index: Mapping[str, Any], denoiser: Path
) -> DenoiserSpec:
    """The spec as it is, or where the folder is of a model of few steps, with its defaults."""
    config = read_json(denoiser / CONFIG)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    trailing = spec.defaults.schedule == "trailing"
    few = few_step(
        family,
        [*names_of(folder, index), *names_of(folder, config)],
        scheduler=scheduler.get("_class_name"),
        embeds_guidance=config.get("time_cond_proj_dim") is not None,
        # Networks that predict v are drawn so at any number of steps, as their noise ends pure.
        trailing_at=spec.defaults.width if trailing and spec.prediction == "eps" else None,
    )
    if few is None:
        return spec
    return few.spec(spec, keep_schedule=trailing or scheduler.get("_class_name") in SCHEDULERS)


def _defaults(
    ours: Defaults, denoiser: Path, network: Network, autoencoder: Autoencoder, sampler: str, schedule: str
) -> Defaults:
    side = read_json(denoiser / CONFIG).get("sample_size")
    if isinstance(network.config, FluxConfig):  # whose pipeline brings levels of its own to the scheduler
        return replace(ours, sampler=sampler, schedule="flow")
    if side is None:
        return replace(ours, sampler=sampler, schedule=schedule)
    height, width = side if isinstance(side, list | tuple) else (side, side)
    stride = autoencoder.config.stride
    return replace(ours, width=width * stride, height=height * stride, sampler=sampler, schedule=schedule)
