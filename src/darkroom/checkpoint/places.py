"""Where each network of a model lies in a single file and in the folders of diffusers, and named how."""

from dataclasses import dataclass

from darkroom.checkpoint.anatomy import AUTOENCODER, NETWORK
from darkroom.families import FAMILIES


@dataclass(frozen=True)
class Place:
    """A layout of names, and what stands before them: a prefix in a file, or a folder's name."""

    layout: str
    prefix: str


# Text encoders of single files, by the conditioning of their family.
SINGLE_TEXTS: dict[str, dict[str, Place]] = {
    "text": {
        "clip_l": Place("hub", "cond_stage_model.transformer."),
        "openclip_h": Place("openclip", "cond_stage_model.model."),
        "ldm_text": Place("original", "cond_stage_model.transformer."),
        "class_embedder": Place("original", "cond_stage_model."),
    },
    "xl": {
        "clip_l": Place("hub", "conditioner.embedders.0.transformer."),
        "clip_g": Place("openclip", "conditioner.embedders.1.model."),
    },
}
LATER_TEXTS = {
    "clip_l": Place("hub", "text_encoders.clip_l.transformer."),
    "clip_g": Place("hub", "text_encoders.clip_g.transformer."),
    "t5": Place("hub", "text_encoders.t5xxl.transformer."),
}
REFINER_TEXT = Place("openclip", "conditioner.embedders.0.model.")
# How text encoders, and everything else, are named where they are alone in a file.
ALONE = {"clip_l": "hub", "clip_g": "hub", "openclip_h": "openclip", "t5": "hub"}
UNPREFIXED = ("flux", "dit")  # whose releases hold nothing but the network

DIFFUSERS_LAYOUTS = {"clip": "hub", "t5": "hub", "class embedder": ""}


def single_place(role: str, kind: str, family: str | None, *, alone: bool) -> Place:
    """Where the releases of a family have a network in their single file; `alone` if it holds no other."""
    original = ALONE.get(role, "original")
    if alone:
        prefixed = role == NETWORK and kind not in UNPREFIXED
        return Place(original, "model.diffusion_model." if prefixed else "")
    if role == NETWORK:
        return Place("original", "model.diffusion_model.")
    if role == AUTOENCODER:
        return Place("original", "vae." if family and family.startswith("flux") else "first_stage_model.")
    if family == "sdxl-refiner":
        return REFINER_TEXT
    conditioning = FAMILIES[family].spec.conditioning.kind if family else "text"
    places = SINGLE_TEXTS.get(conditioning, {}) | (LATER_TEXTS if conditioning in ("sd3", "flux") else {})
    return places.get(role) or Place(original, f"text_encoders.{role}.transformer.")


def diffusers_place(role: str, kind: str, family: str | None) -> Place | None:
    """The folder of a network beside others, or None where diffusers' pipelines have no such part."""
    layout = DIFFUSERS_LAYOUTS.get(kind, "diffusers")
    if not layout:
        return None
    if role == NETWORK:
        return Place(layout, "unet/" if kind == "unet" else "transformer/")
    if role == AUTOENCODER:
        latent = family is not None and family.startswith("ldm-") and kind == "autoencoder"
        return Place(layout, "vqvae/" if latent else "vae/")
    if kind == "ldm_text":
        return Place(layout, "bert/")
    return Place(layout, f"text_encoder{_suffix(role, family)}/")


def text_number(role: str, family: str | None) -> int:
    """Which of a family's text encoders one is, counted from 1; the refiner's is its pipeline's second."""
    if family == "sdxl-refiner":
        return 2
    roles = list(FAMILIES[family].texts) if family else []
    return roles.index(role) + 1 if role in roles else 1


def text_role(part: str, family: str | None) -> str | None:
    """Which text encoder lies in a folder of this name beside the other parts of a family."""
    roles = list(FAMILIES[family].texts) if family else []
    return next((role for role in roles if f"text_encoder{_suffix(role, family)}" == part), None)


def _suffix(role: str, family: str | None) -> str:
    number = text_number(role, family)
    return f"_{number}" if number > 1 else ""


def part_place(role: str, kind: str) -> Place:
    """The file of a network in a folder of one file a part."""
    name = kind if role == NETWORK else "vae" if role == AUTOENCODER else role
    return Place(ALONE.get(role, "original"), f"{name.replace(' ', '_')}.safetensors/")
