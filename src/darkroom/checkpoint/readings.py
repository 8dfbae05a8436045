"""Networks out of named tensors: which config they have, and the table between our names and a file's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from darkroom.checkpoint.anatomy import Component
from darkroom.checkpoint.detect import (
    Shapes,
    autoencoder_config,
    clip_config,
    count_blocks,
    dit_config,
    flux_config,
    ldm_text_config,
    mmdit_config,
    t5_config,
    tiny_config,
    unet_config,
)
from darkroom.checkpoint.family_rows import find_row
from darkroom.checkpoint.known import nearest
from darkroom.checkpoint.layouts import (
    AUTOENCODER_TO_LEGACY,
    CLIP_TEXT_TO_HUB,
    CLIP_TEXT_TO_OPENCLIP,
    LDM_TEXT_TO_DIFFUSERS,
    autoencoder_to_original,
    dit_to_diffusers,
    flux_to_diffusers,
    ldm_text_to_original,
    mmdit_to_diffusers,
    t5_from_published,
    tiny_from_original,
    unet_to_original,
)
from darkroom.checkpoint.tables import Table, Tensors
from darkroom.errors import InputError, some
from darkroom.families import FAMILIES
from darkroom.nn.class_embedder import ClassEmbedderConfig
from darkroom.nn.unet import UNetConfig
from darkroom.text.ldm import LDMTextConfig


@dataclass(frozen=True)
class Reading:
    """A network's config, what tensors have become under our names, and the table from ours to theirs."""

    config: Any
    tensors: Tensors
    table: Table


Reader = Callable[[Tensors, str], Reading]


def read_component(component: Component, tensors: Mapping[str, Tensor]) -> Reading:
    """One network of a file, whose tensors may be on `meta`; nothing is checked to be whole.

    Raises InputError where names and shapes do not say what config it has.
    """
    group = {name.removeprefix(component.prefix): tensors[name] for name in component.names}
    return READERS[component.kind, component.layout](group, component.role)


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """The shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _by(table: Table, config: Callable[[Shapes], Any]) -> Reader:
    """Reading by the table from our names, and a config from shapes under ours."""

    def read(tensors: Tensors, _: str) -> Reading:
        ours = table.inverse()(tensors)
        return Reading(config(shapes_of(ours)), ours, table)

    return read


def _unet(tensors: Tensors, _: str) -> Reading:
    shapes = shapes_of(tensors)
    config = unet_config(shapes, **find_row("unet", shapes).heads)
    table = unet_to_original(config)
    return Reading(config, table.inverse()(tensors), table)


def _diffusers_unet(tensors: Tensors, _: str) -> Reading:
    """Our names are diffusers'; the config is read from the original's, by a known one of the same blocks."""
    usual = {name: tensor for name, tensor in tensors.items() if name != "time_embedding.cond_proj.weight"}
    known = FAMILIES[_nearest_family("unet", usual)].network
    assert isinstance(known, UNetConfig)
    shapes = shapes_of(unet_to_original(known)(tensors))
    return Reading(unet_config(shapes, **find_row("unet", shapes).heads), tensors, SAME)


def _diffusers_mmdit(tensors: Tensors, role: str) -> Reading:
    table = mmdit_to_diffusers(count_blocks(tensors, "transformer_blocks"))
    return _by(table, mmdit_config)(tensors, role)


def _diffusers_dit(tensors: Tensors, _: str) -> Reading:
    """diffusers' files lack the fixed positions, which alone tell sizes apart: the family's is taken."""
    known = FAMILIES[_nearest_family("dit", tensors)].network
    table = dit_to_diffusers(known)  # pyright: ignore[reportArgumentType]
    ours = table.inverse()(tensors)
    return Reading(dit_config(shapes_of(ours)), ours, table)


def _nearest_family(kind: str, tensors: Tensors) -> str:
    """The first family whose network has exactly these names under diffusers'."""
    found = nearest(kind, "diffusers", shapes_of(tensors))
    if found is None or not found.same_names:
        sides = {"missing": found.missing, "unexpected": found.unexpected} if found else {}
        lists = "; ".join(f"{what}: {some(names)}" for what, names in sides.items() if names)
        raise InputError(
            f"its {kind} under diffusers' names is no known one: give the folder with its config.json"
            + (f" (nearest: {found.of[0]}; {lists})" if found else "")
        )
    return found.of[0]


def _autoencoder(tensors: Tensors, role: str) -> Reading:
    table = autoencoder_to_original(count_blocks(tensors, "encoder.down"))
    return _by(table, autoencoder_config)(tensors, role)


def _clip(tensors: Tensors, role: str) -> Reading:
    return _by(CLIP_TEXT_TO_HUB, partial(clip_config, openclip=role != "clip_l"))(tensors, role)


def _t5(tensors: Tensors, role: str) -> Reading:
    return _by(SAME, t5_config)(t5_from_published(tensors), role)


def _ldm_text(tensors: Tensors, role: str) -> Reading:
    # The original counts attention and feed-forward as two layers; the table wants nothing else of a config.
    layers = count_blocks(tensors, "attn_layers.layers") // 2
    return _by(ldm_text_to_original(LDMTextConfig(layers=layers)), ldm_text_config)(tensors, role)


def _class_embedder(tensors: Tensors, _: str) -> Reading:
    num_classes, width = tensors["embedding.weight"].shape
    return Reading(ClassEmbedderConfig(num_classes=num_classes, width=width), tensors, SAME)


SAME = Table(())  # our names are the file's
READERS: dict[tuple[str, str], Reader] = {
    ("unet", "original"): _unet,
    ("unet", "diffusers"): _diffusers_unet,
    ("mmdit", "original"): _by(SAME, mmdit_config),
    ("mmdit", "diffusers"): _diffusers_mmdit,
    ("flux", "original"): _by(SAME, flux_config),
    ("flux", "diffusers"): _by(flux_to_diffusers(), flux_config),
    ("dit", "original"): _by(SAME, dit_config),
    ("dit", "diffusers"): _diffusers_dit,
    ("autoencoder", "original"): _autoencoder,
    ("autoencoder", "legacy"): _by(AUTOENCODER_TO_LEGACY, autoencoder_config),
    ("autoencoder", "diffusers"): _by(SAME, autoencoder_config),
    ("tiny autoencoder", "original"): _by(tiny_from_original().inverse(), tiny_config),
    ("tiny autoencoder", "diffusers"): _by(SAME, tiny_config),
    ("clip", "hub"): _clip,
    ("clip", "bare"): _clip,
    ("clip", "openclip"): _by(CLIP_TEXT_TO_OPENCLIP, partial(clip_config, openclip=True)),
    ("t5", "hub"): _t5,
    ("ldm_text", "original"): _ldm_text,
    ("ldm_text", "diffusers"): _by(LDM_TEXT_TO_DIFFUSERS, ldm_text_config),
    ("class embedder", "original"): _class_embedder,
}
