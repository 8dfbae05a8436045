"""A model taken apart: its networks one by one, and every other tensor, out of a file or a folder."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from darkroom.checkpoint.anatomy import MEAN, NETWORK, Component, dissect
from darkroom.checkpoint.configs.autoencoders import autoencoder_from_diffusers
from darkroom.checkpoint.configs.scheduler import scheduler_config_from_diffusers
from darkroom.checkpoint.configs.text import text_config_from_transformers
from darkroom.checkpoint.configs.transformers import transformer_config_from_diffusers
from darkroom.checkpoint.configs.unet import unet_config_from_diffusers
from darkroom.checkpoint.diffusers_folder import PIPELINES, family_of, read_config
from darkroom.checkpoint.folder_files import CONFIG, EXTRA, INDEX, is_darkroom, is_diffusers, weight_files
from darkroom.checkpoint.formats.fp8_names import fp8_companions
from darkroom.checkpoint.formats.io import load_tensors
from darkroom.checkpoint.formats.quantised import decode_fp8
from darkroom.checkpoint.known import nearest, network_family
from darkroom.checkpoint.layouts import layout_table
from darkroom.checkpoint.other_files import other_file
from darkroom.checkpoint.places import text_role
from darkroom.checkpoint.readings import read_component, shapes_of
from darkroom.checkpoint.single_file import half_of, joined_halves
from darkroom.checkpoint.tables import Tensors
from darkroom.config import from_json
from darkroom.errors import InputError, some, unknown
from darkroom.families import FAMILIES
from darkroom.family_parts import KNOWN_PARTS
from darkroom.files import read_json

Form = Literal["single", "diffusers", "parts"]

ORIGIN = "darkroom.origin"
CONTROLNET = "controlnet"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One network: its tensors under the names of `layout`, without the `prefix` that they had."""

    role: str
    kind: str
    layout: str
    prefix: str
    config: Any
    tensors: Tensors

    def ours(self) -> Tensors:
        """The tensors under our names."""
        return layout_table(self.kind, self.layout, self.config).inverse()(self.tensors)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How a model lay before it was converted, so that the way back gives the same names.

    `pieces` say layout and prefix by role, `absent` are names that the way back makes and were not there.
    `half` is encoder or decoder where a tiny autoencoder came as two files, and this was the one named.
    """

    form: Form
    pieces: dict[str, tuple[str, str]]
    absent: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    half: str = ""


@dataclass(frozen=True, kw_only=True)
class Loose:
    """A model taken apart; `extra` are tensors of no network, by their names where they were.

    `origin` says how it lay before an earlier conversion, if there was one, and `carried` are tensors that
    had no room since. `half` is encoder or decoder where a tiny autoencoder came as two files, and
    `other` says what a file is that is no model.
    """

    form: Form
    family: str | None
    pieces: dict[str, Piece]
    extra: Tensors
    metadata: dict[str, str]
    origin: Origin | None = None
    carried: Tensors = field(default_factory=dict)
    half: str = ""
    other: str = ""

    @property
    def contents(self) -> str:
        """What it holds, in words."""
        return self.other or some(self.pieces) or "nothing known"


def take_apart(path: str | Path, family: str | None = None) -> Loose:
    """Take apart a file, a folder in the layout of diffusers, or a folder of one file a part.

    Tensors stay as they are stored, but for quantised ones, which are read as floating-point numbers. Raises
    InputError, which names the file, where it holds nothing known.
    """
    path = Path(path)
    if family is not None and family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    if path.is_dir():
        return _folder(path, family)
    tensors, metadata = load_tensors(path)
    half = half_of(tensors)
    tensors = joined_halves(path, tensors)
    if fp8_companions(tensors):
        tensors = decode_fp8(tensors, torch.bfloat16)
    loose = _named(tensors, path, family)
    carried, origin = _extra(extra_file(path, "single"))
    half = half if loose.pieces else ""
    return replace(loose, metadata=metadata, origin=origin, carried=carried, half=half)


def _named(tensors: Mapping[str, Tensor], where: Path, family: str | None, config: Any = None) -> Loose:
    """The networks of a file's tensors by their names; `config` is that of the only one, if it is known."""
    shapes = shapes_of(tensors)
    other = other_file(shapes)
    if other is not None:
        return _of_other(tensors, where, other.kind, family or other.family)
    anatomy = dissect(shapes)
    network = anatomy.components.get(NETWORK)
    if network is not None:
        bare, edm = network.bare(shapes), MEAN in anatomy.markers
        found, why = network_family(network.kind, network.layout, bare, edm=edm)
        if family is not None and found is not None and not _may_be(family, found):
            raise InputError(f"{where}: is not {family}: {why}")
        family = family or found
    pieces = {
        role: _piece(part, tensors, config or _config(part, tensors, family, where))
        for role, part in anatomy.components.items()
    }
    taken = {name for part in anatomy.components.values() for name in part.names}
    extra = {name: tensor for name, tensor in tensors.items() if name not in taken}
    return Loose(form="single", family=family, pieces=pieces, extra=extra, metadata={})


def _may_be(family: str, found: str) -> bool:
    """Whether two families' networks are of one shape, so that a file cannot say which it is of."""
    return FAMILIES[family].network == FAMILIES[found].network


def _piece(part: Component, tensors: Mapping[str, Tensor], config: Any) -> Piece:
    bare = {name.removeprefix(part.prefix): tensors[name] for name in part.names}
    return Piece(
        role=part.role,
        kind=part.kind,
        layout=part.layout,
        prefix=part.prefix,
        config=config,
        tensors=bare,
    )


def _config(part: Component, tensors: Mapping[str, Tensor], family: str | None, where: Path) -> Any:
    """A network's config by its shapes, or where they are no known ones that of the nearest by its names."""
    meta = {name: tensors[name].to("meta") for name in part.names}
    try:
        return read_component(part, meta).config
    except InputError as error:
        near = nearest(part.kind, part.layout, part.bare(shapes_of(meta)), family)
        if near is None or not near.same_names:
            raise InputError(f"{where}: {error}") from error
        name = near.of[0]
        return FAMILIES[name].network if name in FAMILIES else KNOWN_PARTS[name]


def _of_other(tensors: Mapping[str, Tensor], where: Path, kind: str, family: str | None) -> Loose:
    """A file that is no model: a ControlNet has two layouts, others have one and stay as they are."""
    if kind != "ControlNet" or family not in ("sd1", "sd2"):
        return Loose(form="single", family=family, pieces={}, extra=dict(tensors), metadata={}, other=kind)
    prefix = "control_model." if any(name.startswith("control_model.") for name in tensors) else ""
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    layout = "original" if "input_hint_block.0.weight" in bare else "diffusers"
    config = FAMILIES[family].network
    piece = Piece(role=CONTROLNET, kind=CONTROLNET, layout=layout, prefix=prefix, config=config, tensors=bare)
    return Loose(form="single", family=family, pieces={CONTROLNET: piece}, extra={}, metadata={})


def extra_file(path: Path, form: Form) -> Path:
    """Where the tensors lie that a file or a folder has no room for."""
    return path.with_name(f"{path.stem}.{EXTRA}") if form == "single" else path / EXTRA


def _folder(folder: Path, family: str | None) -> Loose:
    form: Form = "diffusers" if is_diffusers(folder) else "parts"
    if is_darkroom(folder):
        raise InputError(f"{folder}: is darkroom's own: write it for diffusers first, by `darkroom export`")
    files = dict(weight_files(folder))
    if not files and not extra_file(folder, form).exists():
        raise InputError(f"{folder}: no file of weights here, nor in the folders of its parts")
    family = family or _folder_family(folder)
    pieces: dict[str, Piece] = {}
    extra: Tensors = {}
    metadata: dict[str, str] = {}
    for prefix, file in files.items():
        tensors, metadata = load_tensors(file)
        found = _named(tensors, file, family, _diffusers_config(file.parent / CONFIG))
        for piece in found.pieces.values():
            role = text_role(file.parent.name, family) or piece.role
            if role in pieces:
                raise InputError(f"{folder}: {file} holds a {role}, and so does another file")
            pieces[role] = replace(piece, role=role, prefix=prefix + piece.prefix)
        family = family or found.family
        extra |= {prefix + name: tensor for name, tensor in found.extra.items()}
    carried, origin = _extra(extra_file(folder, form))
    return Loose(
        form=form,
        family=family,
        pieces=pieces,
        extra=extra,
        metadata=metadata,
        origin=origin,
        carried=carried,
    )


def _folder_family(folder: Path) -> str | None:
    """The family that a folder names by its pipeline, network and scheduler."""
    if not (folder / INDEX).is_file():
        return None
    pipeline = str(read_json(folder / INDEX).get("_class_name"))
    networks = (_diffusers_config(folder / part / CONFIG) for part in ("unet", "transformer"))
    network = next((config for config in networks if config is not None), None)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if pipeline not in PIPELINES or network is None or not scheduler.is_file():
        return None
    return family_of(pipeline, network, read_config(scheduler, scheduler_config_from_diffusers)[0])


def _diffusers_config(file: Path) -> Any:
    """The config of a part as ours, where the folder has one that says which class it is."""
    if not file.is_file():
        return None
    fields = read_json(file)
    name = str(fields.get("_class_name", ""))
    if name.startswith("UNet2D"):
        return read_config(file, unet_config_from_diffusers)
    if "Transformer2DModel" in name:
        return read_config(file, transformer_config_from_diffusers)
    if name in ("AutoencoderKL", "VQModel", "AutoencoderTiny"):
        return read_config(file, autoencoder_from_diffusers)
    return read_config(file, text_config_from_transformers) if "model_type" in fields else None


def _extra(file: Path) -> tuple[Tensors, Origin | None]:
    """What an earlier conversion had no room for, and where it came from."""
    if not file.is_file():
        return {}, None
    tensors, metadata = load_tensors(file)
    return tensors, _read_origin(metadata, file)


def _read_origin(metadata: Mapping[str, str], file: Path) -> Origin | None:
    if ORIGIN not in metadata:
        return None
    return from_json(metadata[ORIGIN], Origin, where=f"{file}: header's '{ORIGIN}'")
