"""What a folder in the layout of diffusers says beside its weights: configs, the index, tokenizers."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from darkroom.checkpoint.anatomy import AUTOENCODER, NETWORK
from darkroom.checkpoint.configs.autoencoders import autoencoder_to_diffusers
from darkroom.checkpoint.configs.scheduler import scheduler_config_to_diffusers
from darkroom.checkpoint.configs.text import (
    clip_config_to_transformers,
    ldm_text_config_to_diffusers,
    t5_config_to_transformers,
)
from darkroom.checkpoint.configs.transformers import (
    dit_config_to_diffusers,
    flux_config_to_diffusers,
    mmdit_config_to_diffusers,
)
from darkroom.checkpoint.configs.unet import unet_config_to_diffusers
from darkroom.checkpoint.export import UNUSED
from darkroom.checkpoint.folder_files import CONFIG, INDEX
from darkroom.checkpoint.load import TOKENIZERS
from darkroom.checkpoint.loose import CONTROLNET, Piece
from darkroom.checkpoint.places import text_number
from darkroom.errors import InputError
from darkroom.families import FAMILIES, Family
from darkroom.inputs import Beside
from darkroom.nn.latent_space import LatentSpace
from darkroom.text.find import find_tokenizer
from darkroom.text.tokenizer import Tokenizer

# The pipelines of families that share a conditioning with others, and those of each conditioning.
PIPELINES = {
    "sd2-depth": "StableDiffusionDepth2ImgPipeline",
    "sd-x4-upscaler": "StableDiffusionUpscalePipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "flux-fill": "FluxFillPipeline",
    "flux-control": "FluxControlPipeline",
    "flux-kontext": "FluxKontextPipeline",
    "ldm-super-resolution": "LDMSuperResolutionPipeline",
    "ldm-text2img256": "LDMTextToImagePipeline",
    "ldm-text2img-large": "LDMTextToImagePipeline",
    "ldm-unconditional": "LDMPipeline",
    "dit-xl-2-256": "DiTPipeline",
    "dit-xl-2-512": "DiTPipeline",
}
INPAINTING: dict[str, str] = {"text": "StableDiffusionInpaintPipeline"}
BY_CONDITIONING = {
    "text": "StableDiffusionPipeline",
    "xl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
}
INPAINTED: tuple[Beside, ...] = ("inpaint",)


def write_documents(
    folder: Path, pieces: Mapping[str, Piece], family: str | None, places: Sequence[Path]
) -> None:
    """Write configs for the networks that lie in `folder`, and for a whole model its index and scheduler.

    Tokenizers are copied from where they are found in `places` or on this machine; a missing one is a
    warning. Raises InputError naming what diffusers can't express.
    """
    known = FAMILIES.get(family or "")
    for role, piece in pieces.items():
        fields = config_of(piece, known)
        part = folder / piece.prefix.partition("/")[0]
        if fields is not None:
            _write_json(part / CONFIG, fields)
        if role in TOKENIZERS and part != folder:
            _write_tokenizer(folder, role, family, places)
    if known is not None and family is not None and {NETWORK, AUTOENCODER} <= pieces.keys():
        _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(known))
        if index := index_of(folder, pieces, family, known):
            _write_json(folder / INDEX, index)


def config_of(piece: Piece, family: Family | None) -> dict[str, Any] | None:
    """A network's config as diffusers or transformers has it; None where neither has such a network."""
    config = piece.config
    if piece.kind == "unet":
        return unet_config_to_diffusers(config) | _sample_size(family)
    if piece.kind == "mmdit":
        return mmdit_config_to_diffusers(config) | {"sample_size": 128}
    if piece.kind in CONFIGS:
        return CONFIGS[piece.kind](config)
    if piece.kind == "clip":
        return clip_config_to_transformers(config, None, projected=config.projection_dim is not None)
    if piece.kind in ("autoencoder", "tiny autoencoder"):
        return _autoencoder(piece, family)
    return None


CONFIGS = {
    "flux": flux_config_to_diffusers,
    # diffusers spaces frequencies of timesteps by one less than the release, and yet has its weights.
    "dit": lambda config: dit_config_to_diffusers(replace(config, frequency_shift=1)),
    "t5": t5_config_to_transformers,
    "ldm_text": ldm_text_config_to_diffusers,
    CONTROLNET: lambda config: _controlnet(unet_config_to_diffusers(config)),
}


def _controlnet(fields: dict[str, Any]) -> dict[str, Any]:
    """A U-Net's config as that of the ControlNet beside it."""
    shared = ("out_channels", "up_block_types", "mid_block_type")
    kept = {name: value for name, value in fields.items() if name not in shared}
    own = {"controlnet_conditioning_channel_order": "rgb"}
    own |= {"conditioning_embedding_out_channels": [16, 32, 96, 256]}
    return kept | own | {"_class_name": "ControlNetModel"}


def _sample_size(family: Family | None) -> dict[str, Any]:
    """The default size of pictures, in latents."""
    if family is None:
        return {}
    defaults, space = family.spec.defaults, family.spec.latent_space
    return {"sample_size": space.shape(defaults.height, defaults.width)[1]}


def _autoencoder(piece: Piece, family: Family | None) -> dict[str, Any]:
    config = piece.config
    if family is not None:
        return autoencoder_to_diffusers(config, family.spec.latent_space, family.spec.defaults.height)
    space = LatentSpace.identity(config.latent_channels, config.stride)
    fields = autoencoder_to_diffusers(config, space, 512)
    if piece.kind == "autoencoder":
        warnings.warn(
            "nothing says at which scale a denoiser was trained on these latents: the config leaves "
            "scaling_factor out; name the family to have it written",
            stacklevel=4,
        )
        fields = {name: value for name, value in fields.items() if name != "scaling_factor"}
    return fields


def _scheduler(family: Family) -> dict[str, Any]:
    spec = family.spec
    sampler = "flow_euler" if spec.prediction == "flow" else spec.defaults.sampler
    return scheduler_config_to_diffusers(spec.prediction, spec.path, sampler, spec.defaults.schedule)


def index_of(folder: Path, pieces: Mapping[str, Piece], name: str, family: Family) -> dict[str, Any] | None:
    """`model_index.json`: which pipeline, and the class of each part; None where diffusers has none."""
    kind = family.spec.conditioning.kind
    usual = INPAINTING if family.spec.beside in INPAINTED else BY_CONDITIONING
    pipeline = PIPELINES.get(name) or usual.get(kind)
    if pipeline is None:
        return None
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    index: dict[str, Any] = {
        "_class_name": pipeline,
        "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    for piece in pieces.values():
        part = piece.prefix.partition("/")[0]
        fields = json.loads((folder / part / CONFIG).read_text())
        library = "transformers" if piece.kind in ("clip", "t5") else "diffusers"
        index[part] = [library, fields.get("_class_name") or fields["architectures"][0]]
    for number, role in enumerate(family.texts, start=1):
        part = "tokenizer" + (f"_{number}" if number > 1 else "")
        t5 = role == "t5"
        if (folder / part).is_dir():
            index[part] = ["transformers", "T5TokenizerFast" if t5 else "CLIPTokenizer"]
    return index | _left_open(kind, family, index)


def _left_open(kind: str, family: Family, index: Mapping[str, Any]) -> dict[str, Any]:
    """Parts that the pipeline may do without, and what it must be told."""
    none: dict[str, Any] = {part: [None, None] for part in UNUSED}
    if kind == "text":
        none |= {"safety_checker": [None, None], "requires_safety_checker": False}
    if kind == "xl":
        none["force_zeros_for_empty_prompt"] = getattr(family.spec.conditioning, "zero_blank", True)
    if kind == "xl" and getattr(family.spec.conditioning, "aesthetic", False):
        none |= {"requires_aesthetics_score": True}
        none |= {part: [None, None] for part in ("text_encoder", "tokenizer")}
    if kind == "sd3":
        none |= {part: [None, None] for part in ("text_encoder_3", "tokenizer_3")}
    return {name: value for name, value in none.items() if name not in index}


def _write_tokenizer(folder: Path, role: str, family: str | None, places: Sequence[Path]) -> None:
    number = text_number(role, family)
    part = folder / ("tokenizer" + (f"_{number}" if number > 1 else ""))
    try:
        tokenizer = find_tokenizer(TOKENIZERS[role], list(places))
    except InputError as error:
        reason = str(error).partition("Looked in")[0].strip()
        warnings.warn(f"the folder lacks {part.name}, which diffusers wants: {reason}", stacklevel=4)
        return
    if isinstance(tokenizer, Tokenizer) or role == "t5":
        tokenizer.save(part)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
