"""Any model on a disk as a `Model`: a bundled one, darkroom's folders, diffusers' folders, original files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from darkroom.checkpoint.anatomy import EDM_V, V_PRED, ZERO_SNR
from darkroom.checkpoint.build import (
    Autoencoder,
    build_autoencoder,
    build_network,
    build_text_encoder,
    filled,
    speak,
)
from darkroom.checkpoint.diffusers_folder import (
    AUTOENCODERS,
    folder_parts,
    load_diffusers,
    load_diffusers_autoencoder,
    role_of,
)
from darkroom.checkpoint.few_step import few_step, names_of
from darkroom.checkpoint.folder_files import CONFIG, INDEX, is_darkroom
from darkroom.checkpoint.formats.io import Device, read_metadata
from darkroom.checkpoint.model import (
    AUTOENCODER,
    DENOISER,
    DenoiserSpec,
    Model,
    check_fit,
    load_autoencoder,
    load_model,
    load_model_autoencoder,
)
from darkroom.checkpoint.prediction import V_SPREAD, V_TELLTALES
from darkroom.checkpoint.single_file import Part, Parts, read_checkpoint
from darkroom.diffusion.denoiser import Denoiser
from darkroom.errors import InputError, some, unknown
from darkroom.families import FAMILIES, Family, scaled
from darkroom.nn.latent_space import LatentSpace
from darkroom.presets import bundled, model_folder
from darkroom.text.conditioning import TextEncoder, TextPart
from darkroom.text.find import Kind, find_tokenizer

# The kind of tokenizer in front of each text encoder; a class embedder has none.
TOKENIZERS: dict[str, Kind] = {
    "clip_l": "clip",
    "clip_g": "clip_g",
    "openclip_h": "openclip_h",
    "t5": "t5",
    "ldm_text": "bert",
}

# The roles of the text encoders of a conditioning, in their order.
ROLES: dict[str, tuple[str, ...]] = {
    "text": ("clip_l", "ldm_text"),
    "xl": ("clip_l", "clip_g"),
    "sd3": ("clip_l", "clip_g", "t5"),
    "flux": ("clip_l", "t5"),
}


def load_any(
    name_or_path: str | Path,
    *,
    parts: Sequence[str | Path] = (),
    tokenizers: str | Path | None = None,
    family: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
) -> Model:
    """Read a model straight to `device` in `dtype`, whatever layout it is in; `parts` as in `darkroom.load`.

    `family` says what an original file is where its names and shapes leave several. Raises InputError if
    there is nothing of that name, or if it is no model, lacks a part, or mixes parts that do not fit.
    """
    path, others = Path(name_or_path).expanduser(), [Path(part).expanduser() for part in parts]
    places = [Path(tokenizers).expanduser()] if tokenizers is not None else []
    if family is not None and family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    if str(name_or_path) not in bundled() and path.is_file():
        return _load_file(path, others, places, family, dtype, device)
    folder = model_folder(path)
    if (folder / INDEX).is_file():
        model = load_diffusers(folder, places, dtype, family, device)
    elif not is_darkroom(folder):
        raise InputError(f"{folder}: no model here: expected {DENOISER}, or diffusers' {INDEX}")
    elif family is not None:
        raise InputError(f"{folder}: says itself what it is: leave family out")
    else:
        model = load_model(folder, dtype=dtype, device=device)
    for part in others:
        model = _with_parts(model, part, places, dtype, device)
    check_fit(model, folder)
    return model


def load_any_autoencoder(
    name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, device: Device = "cpu"
) -> Autoencoder:
    """The autoencoder of anything that `load_any` reads, or of a file or folder of one alone.

    It speaks the latent space of the model that it is found in, where that is known. Raises InputError if
    there is none.
    """
    path = Path(name_or_path).expanduser()
    own = path.is_dir() and any(path.glob(f"{AUTOENCODER}*"))
    if str(name_or_path) in bundled() or own or not path.exists():
        return load_model_autoencoder(model_folder(path), dtype=dtype, device=device)
    for part in AUTOENCODERS:
        if (path / part / CONFIG).is_file():
            return load_diffusers_autoencoder(path / part, dtype, device)
    return _read_autoencoder(path, dtype, device)


def _with_parts(
    model: Model, path: Path, places: Sequence[Path], dtype: torch.dtype, device: Device
) -> Model:
    """A model with what a file or folder holds in the places of its own parts."""
    if path.is_dir() and not (path / CONFIG).is_file():
        return _with_autoencoder(model, load_autoencoder(path, dtype=dtype, device=device))
    parts = _read_parts(path, dtype, device)
    if parts.autoencoder is not None:
        model = _with_autoencoder(model, _autoencoder(parts.autoencoder, model.spec.latent_space, path))
    _check_known(path, parts)
    roles = ROLES.get(model.spec.conditioning.kind, ())
    if len(model.texts) == 1:  # SD 1's is the first, that of SDXL's refiner the last
        roles = tuple(role for role in roles if role == role_of(model.texts[0].encoder.config))
    taken = [role for role in parts.texts if role in roles[: len(model.texts) + 1]]
    if parts.autoencoder is None and not taken:
        raise InputError(f"{path}: holds {_contents(parts)}, which this model has no place for")
    texts = list(model.texts)
    for role in taken:
        place = roles.index(role)
        has = place < len(texts)
        tokenizer = (
            texts[place].tokenizer if has else find_tokenizer(TOKENIZERS[role], [*places, path.parent])
        )
        texts[place : place + 1] = [TextPart(_encoder(role, parts.texts[role], path), tokenizer)]
    return replace(model, texts=tuple(texts))


def _with_autoencoder(model: Model, autoencoder: Autoencoder) -> Model:
    speak(autoencoder, model.spec.latent_space)
    return replace(model, autoencoder=autoencoder)


def _encoder(role: str, part: Part, where: Path) -> TextEncoder:
    used = _used(role, part)
    return filled(lambda: used.blank or build_text_encoder(used.config), used.tensors, where)


def _read_autoencoder(path: Path, dtype: torch.dtype, device: Device) -> Autoencoder:
    if path.is_dir() and (path / CONFIG).is_file():
        return load_diffusers_autoencoder(path, dtype, device)
    if path.is_dir() or "latent_space" in read_metadata(path):
        return load_autoencoder(path, dtype=dtype, device=device)
    parts = read_checkpoint(path, dtype, device)
    part = parts.autoencoder
    if part is None:
        raise InputError(f"{path}: holds no autoencoder, but {_contents(parts)}")
    space = FAMILIES[parts.family].spec.latent_space if parts.family in FAMILIES else None
    return filled(lambda: build_autoencoder(part.config, space), part.tensors, path)


def _load_file(
    path: Path,
    others: Sequence[Path],
    places: Sequence[Path],
    family: str | None,
    dtype: torch.dtype,
    device: Device,
) -> Model:
    """The model of an original file, with what it lacks out of the other files."""
    files = {path: read_checkpoint(path, dtype, device)} | {
        other: _read_parts(other, dtype, device) for other in others
    }
    name = family or files[path].family
    if name not in FAMILIES or files[path].network is None:
        raise InputError(
            f"{path}: holds {_contents(files[path])} but no denoising network: no model of itself"
        )
    entry = FAMILIES[name]
    for where, parts in files.items():
        _check_taken(where, parts, entry, first=where == path)
    network_part = files[path].network
    assert network_part is not None
    spec = _spec(entry, name, files[path], given=family is not None)
    told = getattr(network_part.config, "guidance_dim", None) is not None
    if few := few_step(name, names_of(path, read_metadata(path)), embeds_guidance=told):
        spec = few.spec(spec)
    network = filled(
        lambda: network_part.blank or build_network(network_part.config), network_part.tensors, path
    )
    found = [where for where, parts in files.items() if parts.autoencoder is not None]
    if not found:
        raise InputError(f"{path}: holds no autoencoder: give its file or folder as a part")
    model = Model(
        autoencoder=_autoencoder(files[found[-1]].autoencoder, spec.latent_space, found[-1]),
        denoiser=Denoiser(network, spec.path, spec.prediction),
        texts=_texts(entry, files, [*places, path.parent, *(file.parent for file in others)]),
        spec=spec,
    )
    check_fit(model, path)
    speak(model.autoencoder, spec.latent_space)
    return model


def _check_taken(where: Path, parts: Parts, family: Family, *, first: bool) -> None:
    """Raise InputError for a file with tensors that no network here has, or with nothing that is wanted."""
    _check_known(where, parts)
    if not first and parts.autoencoder is None and not parts.texts.keys() & family.texts.keys():
        raise InputError(f"{where}: holds {_contents(parts)}, which {family.title} has no place for")


def _check_known(where: Path, parts: Parts) -> None:
    if parts.unknown:
        raise InputError(f"{where}: holds tensors that no part of it has: {some(parts.unknown)}")


def _autoencoder(part: Part | None, space: LatentSpace, where: Path) -> Autoencoder:
    assert part is not None
    return filled(lambda: build_autoencoder(part.config, space), part.tensors, where)


def _texts(family: Family, files: Mapping[Path, Parts], places: Sequence[Path]) -> tuple[TextPart, ...]:
    """The text encoders that a family wants, each of the last file that has it, with their tokenizers."""
    texts = []
    for role in family.texts:
        holders = [where for where, parts in files.items() if role in parts.texts]
        if not holders and role in family.optional:
            continue
        if not holders:
            wanted = ", ".join(family.texts)
            first = next(iter(files))
            raise InputError(
                f"{first}: no text encoder {role!r} in it: give its file as a part (needed: {wanted})"
            )
        encoder = _encoder(role, files[holders[-1]].texts[role], holders[-1])
        kind = TOKENIZERS.get(role)
        texts.append(TextPart(encoder, None if kind is None else find_tokenizer(kind, places)))
    return tuple(texts)


def _read_parts(path: Path, dtype: torch.dtype, device: Device) -> Parts:
    """What a file holds, or the folder of one part in diffusers' layout."""
    return folder_parts(path, dtype, device) if path.is_dir() else read_checkpoint(path, dtype, device)


def _used(role: str, part: Part) -> Part:
    """A text encoder as the families use it: CLIP L's pooled state never goes through its projection."""
    if role != "clip_l" or "text_projection.weight" not in part.tensors:
        return part
    tensors = {name: t for name, t in part.tensors.items() if name != "text_projection.weight"}
    return Part(config=replace(part.config, projection_dim=None), tensors=tensors)


def _spec(family: Family, name: str, parts: Parts, *, given: bool) -> DenoiserSpec:
    """How a family's network is used, with what this file itself says of it."""
    spec = family.spec
    if name == "sd2" and not given and not _predicts_v(parts):
        spec = FAMILIES["sd2-base"].spec
    if parts.latent_stats is not None:
        mean, std = parts.latent_stats
        spec = replace(
            spec, latent_space=replace(spec.latent_space, mean=mean, std=tuple(2 * s for s in std))
        )
    if parts.scale_factor is not None:
        space = spec.latent_space
        spec = replace(spec, latent_space=scaled(space.channels, space.stride, parts.scale_factor))
    if any(marker.startswith(EDM_V) for marker in parts.markers):
        raise InputError("edm_vpred checkpoints are not supported: give one that predicts eps, v or edm")
    if V_PRED in parts.markers:
        path = replace(spec.path, zero_terminal_snr=ZERO_SNR in parts.markers)
        spec = replace(spec, prediction="v", path=path)
    return spec


def _predicts_v(parts: Parts) -> bool:
    assert parts.network is not None
    telltale = parts.network.tensors.get(V_TELLTALES["diffusers"])
    return telltale is None or telltale.is_meta or float(telltale.float().std()) > V_SPREAD


def _contents(parts: Parts) -> str:
    found = [*parts.texts, *(["an autoencoder"] if parts.autoencoder is not None else [])]
    found += ["a denoising network"] if parts.network is not None else []
    return some(found) or "nothing known"
