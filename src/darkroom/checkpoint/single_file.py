"""An original release's single file as its parts, under our names.

Such a file holds tensors and no config: prefixes say which part a tensor belongs to, names and shapes which
network that is and of which family (anatomy.py, family_rows.py), tables how our names come about
(readings.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from darkroom.checkpoint.anatomy import (
    AUTOENCODER,
    CLIP_ROLES,
    MARKERS,
    MEAN,
    NETWORK,
    PREFIXES,
    SCALE,
    STD,
    Anatomy,
    Component,
    Shapes,
    dissect,
)
from darkroom.checkpoint.build import (
    AutoencoderConfig,
    NetworkConfig,
    TextConfig,
    Unfilled,
    build_autoencoder,
    build_network,
    build_text_encoder,
)
from darkroom.checkpoint.family_rows import find_row
from darkroom.checkpoint.formats.fp8_names import fp8_companions
from darkroom.checkpoint.formats.io import Device, cast, load_tensors
from darkroom.checkpoint.formats.quantised import decode_fp8
from darkroom.checkpoint.formats.read import is_gguf
from darkroom.checkpoint.known import nearest
from darkroom.checkpoint.other_files import other_file
from darkroom.checkpoint.readings import Reading, read_component, shapes_of
from darkroom.checkpoint.tables import Tensors
from darkroom.errors import InputError, some

Config = TypeVar("Config", bound=NetworkConfig | AutoencoderConfig | TextConfig, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Part(Generic[Config]):
    """One network of a file: its config, and exactly its tensors under our names.

    `blank` is the network on `meta`, where it was built already, to tell which tensors are its own.
    """

    config: Config
    tensors: Tensors
    blank: Any = None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a file holds.

    `texts` are text encoders by role: clip_l, clip_g, openclip_h, t5, ldm_text, class_embedder. `unknown` are
    names that no part takes, `ignored` prefixes of what is known but not used. `markers` are names that
    only by being there say something, `latent_stats` mean and deviation of each latent channel.
    """

    family: str
    network: Part[NetworkConfig] | None = None
    autoencoder: Part[AutoencoderConfig] | None = None
    texts: dict[str, Part[TextConfig]] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    markers: frozenset[str] = frozenset()
    scale_factor: float | None = None
    latent_stats: tuple[tuple[float, ...], tuple[float, ...]] | None = None


HALVES = {"encoder": "decoder", "decoder": "encoder"}


def read_checkpoint(path: Path, dtype: torch.dtype | None = None, device: Device = "cpu") -> Parts:
    """Read an original release's file as its parts on `device`, floating-point tensors in `dtype` if given.

    Its tensors may be quantised, scaled float8, or those of a pickle. They are mapped, not read, until they
    are moved or cast one by one. A tiny autoencoder comes as two files: either is enough where the other lies
    beside it. Raises InputError, which names the file, where it is damaged, no model (a LoRA, a ControlNet,
    ...), nothing known, or lacks tensors.
    """
    path = Path(path)
    # Blocks of whole numbers take their place in memory only once, as what they are read as.
    blocks = dtype if is_gguf(path) else None
    tensors = joined_halves(path, load_tensors(path, dtype=blocks)[0])
    if fp8_companions(tensors):
        tensors = decode_fp8(tensors, dtype or torch.bfloat16)
    parts = split_checkpoint(tensors, path)
    texts = {role: _moved(part, dtype, device) for role, part in parts.texts.items()}
    network = parts.network and _moved(parts.network, dtype, device)
    autoencoder = parts.autoencoder and _moved(parts.autoencoder, dtype, device)
    return replace(parts, network=network, autoencoder=autoencoder, texts=texts)


def split_checkpoint(tensors: Mapping[str, Tensor], where: Path) -> Parts:
    """The parts of an original release's file, whose tensors may be on `meta`.

    Raises InputError, which starts with `where`, as `read_checkpoint` does.
    """
    if other := other_file(shapes_of(tensors)):
        raise InputError(f"{where}: {other.refusal}")
    try:
        return _split(tensors)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _split(tensors: Mapping[str, Tensor]) -> Parts:
    anatomy = dissect(shapes_of(tensors))
    found: dict[str, Part[Any]] = {}
    unknown = list(anatomy.unknown)
    for role, component in anatomy.components.items():
        found[role], extra = _part(component, tensors)
        unknown += extra
    if not found:
        raise InputError(f"no part of a model that is known; it holds {some(tensors)}")
    scale, mean, std = (_numbers(tensors.get(name)) for name in (SCALE, MEAN, STD))
    network, autoencoder = found.pop(NETWORK, None), found.pop(AUTOENCODER, None)
    return Parts(
        family=_family(anatomy, shapes_of(tensors)),
        network=network,
        autoencoder=autoencoder,
        texts=found,
        unknown=tuple(unknown),
        ignored=tuple(anatomy.ignored),
        markers=anatomy.markers & set(MARKERS),
        scale_factor=scale[0] if scale else None,
        latent_stats=(mean, std) if mean and std else None,
    )


def _part(component: Component, tensors: Mapping[str, Tensor]) -> tuple[Part[Any], list[str]]:
    """A network out of its tensors, and the names of the file that it has no use for."""
    kind, role, prefix = component.kind, component.role, component.prefix
    _check_clip(component, tensors)
    reading = _reading(component, tensors)
    with torch.device("meta"), Unfilled():
        blank = BUILDERS.get(role, build_text_encoder)(reading.config)
    expected = blank.state_dict()
    if missing := {name: tensor for name, tensor in expected.items() if name not in reading.tensors}:
        names = [prefix + name for name in reading.table(missing)]
        raise InputError(f"its {TITLES.get(kind, kind)} lacks {len(names)} tensors: {some(names)}")
    own = {name: reading.tensors[name] for name in expected}
    originals = {id(tensors[name]): name for name in component.names}
    extra = [originals.get(id(t), prefix + n) for n, t in reading.tensors.items() if n not in expected]
    return Part(config=reading.config, tensors=own, blank=blank), extra


def _reading(component: Component, tensors: Mapping[str, Tensor]) -> Reading:
    """Raises InputError with names on both sides where what says the network's shape is missing."""
    try:
        return read_component(component, tensors)
    except InputError as error:
        near = nearest(component.kind, component.layout, component.bare(shapes_of(tensors)))
        if near is None or not 0 < near.differences <= DAMAGED * len(component.names):
            raise
        sides = {"missing": near.missing, "unexpected": near.unexpected}
        named = {what: [component.prefix + name for name in names] for what, names in sides.items()}
        lists = "; ".join(f"{what}: {some(names)}" for what, names in named.items() if names)
        title = TITLES.get(component.kind, component.kind)
        raise InputError(f"its {title} is nearest to {near.of[0]}, but not it; {lists}") from error


def _check_clip(component: Component, tensors: Mapping[str, Tensor]) -> None:
    """Without a prefix only its width says which CLIP text encoder it is."""
    if component.kind != "clip" or PREFIXES[component.prefix]:
        return
    tokens = (tensors[name].shape[1] for name in component.names if name.endswith(CLIP_TOKENS_END))
    width = next(tokens, None)
    if width is not None and width not in CLIP_ROLES:
        wide = some(map(str, CLIP_ROLES))
        raise InputError(f"a CLIP text encoder {width} wide: those known are {wide} wide")


DAMAGED = 0.1  # the share of names up to which a network is a known one that lacks some, not another one
CLIP_TOKENS_END = "token_embedding.weight"
BUILDERS: dict[str, Callable[[Any], nn.Module]] = {NETWORK: build_network, AUTOENCODER: build_autoencoder}
TITLES = dict.fromkeys(("clip", "t5", "ldm_text"), "text encoder") | {"tiny autoencoder": "autoencoder"}


def _family(anatomy: Anatomy, shapes: Shapes) -> str:
    if network := anatomy.components.get(NETWORK):
        return find_row(network.kind, network.bare(shapes), edm=MEAN in anatomy.markers).family
    autoencoder = anatomy.components.get(AUTOENCODER)
    return "text-encoder" if autoencoder is None else autoencoder.kind.replace(" ", "-")


def _numbers(tensor: Tensor | None) -> tuple[float, ...]:
    """The values of a tensor; on `meta` there are none."""
    return () if tensor is None or tensor.is_meta else tuple(tensor.double().flatten().tolist())


def _moved(part: Part[Config], dtype: torch.dtype | None, device: Device) -> Part[Config]:
    return replace(part, tensors={name: cast(tensor, dtype, device) for name, tensor in part.tensors.items()})


def half_of(tensors: Tensors) -> str:
    """Encoder or decoder where the tensors are that half of a tiny autoencoder, else nothing."""
    if not tensors or not all(name[:1].isdigit() for name in tensors):
        return ""
    return "encoder" if "0.weight" in tensors else "decoder"


def other_half(path: Path, half: str) -> Path:
    """The file of the other half, named the same but for encoder or decoder; the path itself if it is not."""
    return path.with_name(path.name.replace(half, HALVES[half])) if half in path.name and half else path


def joined_halves(path: Path, tensors: Tensors) -> Tensors:
    """A file's tensors; with those of the other half where it is half of a tiny autoencoder."""
    half = half_of(tensors)
    beside = other_half(path, half)
    if not half or beside == path or not beside.exists():
        return tensors
    halves = {half: tensors, HALVES[half]: load_tensors(beside)[0]}
    return {f"{half}.{name}": tensor for half, group in halves.items() for name, tensor in group.items()}
