"""A model in another layout: a single file, the folders of diffusers, one file a part; and back, exactly."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from darkroom.checkpoint.anatomy import CLIP_TOKENS, NETWORK
from darkroom.checkpoint.documents import config_of, write_documents
from darkroom.checkpoint.export import DIFFUSERS_WEIGHTS, PROJECTION, TRANSFORMERS_WEIGHTS
from darkroom.checkpoint.formats.gguf_file import FILE_TYPES, Quant, save_gguf
from darkroom.checkpoint.formats.header import INDEX_SUFFIX
from darkroom.checkpoint.formats.io import cast, save_tensors
from darkroom.checkpoint.formats.quantised import encode_fp8
from darkroom.checkpoint.layouts import layout_table
from darkroom.checkpoint.loose import CONTROLNET, ORIGIN, Form, Loose, Origin, Piece, extra_file, take_apart
from darkroom.checkpoint.places import Place, diffusers_place, part_place, single_place
from darkroom.checkpoint.single_file import HALVES, other_half
from darkroom.checkpoint.tables import Tensors
from darkroom.config import to_json
from darkroom.errors import InputError, unknown
from darkroom.families import FAMILIES, Family
from darkroom.files import new_folder, require_new
from darkroom.text.conditioning import TextConditioning

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
GGUF = ".gguf"
FP8 = ("fp8", "fp8_scaled")
PLAIN: dict[str | None, Quant] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", None: "F16"}
QUANTS: dict[str, Quant] = {name.lower(): name for name in FILE_TYPES if name not in PLAIN.values()}
PRECISIONS = (*DTYPES, *FP8, *QUANTS)
ARCHITECTURES = {"mmdit": "sd3", "flux": "flux", "t5": "t5encoder", "dit": "dit"}
WEIGHTS = {"clip": TRANSFORMERS_WEIGHTS, "t5": TRANSFORMERS_WEIGHTS}
# The text encoders whose pooled state goes through a projection, by conditioning.
PROJECTED = {"xl": ("clip_g",), "sd3": ("clip_l", "clip_g")}


@dataclass(frozen=True, kw_only=True)
class Arranged:
    """A model in its new layout.

    `beside` are tensors of no network that have their place there, `extra` those that have none, with what
    `origin` says of the way back. `absent` are names that the layout must not have; `half` as in `Loose`.
    """

    family: str | None
    pieces: dict[str, Piece]
    beside: Tensors
    extra: Tensors
    origin: Origin | None
    absent: frozenset[str]
    metadata: dict[str, str]
    half: str


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: Form,
    dtype: str | None = None,
    family: str | None = None,
    tokenizers: Sequence[Path] = (),
    max_bytes: int | None = None,
) -> list[Path]:
    """Write a model in another layout, and return the files and folders that were written.

    `to` is single (one file), diffusers (its folders) or parts (a folder of one file for each network).
    `dtype` is one of `PRECISIONS`, None leaves weights as they are; fp8 and GGUF's hold for the denoising
    network and T5, the rest becomes float16. Tensors that the layout has no room for go to
    `darkroom_extra.safetensors`, and come back when the result is converted back. `tokenizers` are where to
    look for those that diffusers' folder wants. `max_bytes` is as in `save_tensors`. Raises InputError for
    what is no model, and where `out` is there already.
    """
    source, out = Path(source), Path(out)
    check(out, dtype)
    places = [*tokenizers, source if source.is_dir() else source.parent]
    return write(take_apart(source, family), out, to=to, dtype=dtype, tokenizers=places, max_bytes=max_bytes)


def check(out: Path, dtype: str | None) -> None:
    """Raise InputError, before any work, for an output that is there already or an unknown dtype."""
    if dtype is not None and dtype not in PRECISIONS:
        raise unknown("dtype", dtype, PRECISIONS)
    require_new(out)


def write(
    loose: Loose,
    out: Path,
    *,
    to: Form,
    dtype: str | None = None,
    tokenizers: Sequence[Path] = (),
    max_bytes: int | None = None,
) -> list[Path]:
    """Write a model that was taken apart; arguments and result are those of `convert`."""
    if dtype in QUANTS and to != "parts" and out.suffix != GGUF:
        raise InputError(f"{out}: {dtype} is for GGUF: convert to parts, or name a .gguf file")
    if dtype == "fp8_scaled" and to == "diffusers":
        raise InputError(
            f"{out}: diffusers would leave the scales of fp8_scaled out: convert to single or parts"
        )
    stays = to == loose.form and out.suffix != GGUF
    made = _as_it_lies(loose) if stays else arrange(loose, to)
    if to == "single":
        return _write_single(out, made, dtype, max_bytes)
    with new_folder(out) as draft:
        _write_folder(draft, made, to, dtype, max_bytes)
        if to == "diffusers":
            write_documents(draft, made.pieces, loose.family, tokenizers)
    return [out]


def arrange(loose: Loose, to: Form) -> Arranged:
    """The networks of a model under the names of another layout, and what must travel beside them.

    Of every network the way back is walked with tensors that hold no values: what it would not give again is
    kept. A model that comes back to where an earlier conversion took it from gets its old names.
    """
    origin = loose.origin if loose.origin is not None and loose.origin.form == to else None
    alone = len(loose.pieces) == 1
    pieces: dict[str, Piece] = {}
    lost: Tensors = {}
    made: list[str] = []
    for role, piece in loose.pieces.items():
        place = _place(piece, to, loose.family, origin, alone=alone)
        if place is None:
            lost |= {piece.prefix + name: tensor for name, tensor in piece.tensors.items()}
            continue
        pieces[role] = _moved(piece, place, loose.family, to)
        gone, new = _way_back(piece, pieces[role])
        lost |= gone
        made += new
    beside = loose.carried if origin is not None else {}
    extra = loose.extra | lost | ({} if origin is not None else loose.carried)
    return Arranged(
        family=loose.family,
        pieces=pieces,
        beside=beside,
        extra=extra,
        origin=_origin(loose, tuple(made), extra, alone=alone) if origin is None or extra else None,
        absent=frozenset(origin.absent) if origin is not None else frozenset(),
        metadata=origin.metadata if origin is not None else {},
        half=origin.half if origin is not None else "",
    )


def _as_it_lies(loose: Loose) -> Arranged:
    """A model whose layout stays: every tensor has its place."""
    return Arranged(
        family=loose.family,
        pieces=loose.pieces,
        beside=loose.extra,
        extra=loose.carried,
        origin=loose.origin,
        absent=frozenset(),
        metadata=loose.metadata,
        half=loose.half,
    )


def _place(piece: Piece, to: Form, family: str | None, origin: Origin | None, *, alone: bool) -> Place | None:
    """Where a network goes: to where it came from, or to where such models have it."""
    if origin is not None and piece.role in origin.pieces:
        return Place(*origin.pieces[piece.role])
    return _usual(piece, to, family, alone=alone)


def _usual(piece: Piece, form: Form, family: str | None, *, alone: bool) -> Place | None:
    if piece.role == CONTROLNET:
        prefixes = {"single": "control_model.", "diffusers": "", "parts": "controlnet.safetensors/"}
        return Place("diffusers" if form == "diffusers" else "original", prefixes[form])
    if form == "single":
        return single_place(piece.role, piece.kind, family, alone=alone)
    if form == "parts":
        return part_place(piece.role, piece.kind)
    place = diffusers_place(piece.role, piece.kind, family) if _has_config(piece, family) else None
    return Place(place.layout, "") if place is not None and alone else place


def _has_config(piece: Piece, family: str | None) -> bool:
    """Whether diffusers or transformers can express a network; if not, a warning says why."""
    try:
        return config_of(piece, FAMILIES.get(family or "")) is not None
    except InputError as error:
        warnings.warn(f"the {piece.kind} goes to the file of extra tensors: {error}", stacklevel=2)
        return False


def _moved(piece: Piece, place: Place, family: str | None, to: Form) -> Piece:
    if to == "diffusers" and piece.kind == "clip" and family is not None:
        piece = _fitted(piece, FAMILIES[family])
    if piece.layout == place.layout:
        return replace(piece, prefix=place.prefix)
    tensors = layout_table(piece.kind, place.layout, piece.config)(piece.ours())
    return replace(piece, layout=place.layout, prefix=place.prefix, tensors=tensors)


def _fitted(piece: Piece, family: Family) -> Piece:
    """A CLIP text encoder as diffusers' pipelines have it.

    It has a projection just where its pooled state goes through one, an identity if it has none of its own,
    and where the last layer but one is used, as in SD 2, it ends there.
    """
    config, ours = piece.config, piece.ours()
    conditioning = family.spec.conditioning
    projected = piece.role in PROJECTED.get(conditioning.kind, ())
    if not projected and config.projection_dim is not None:
        config = replace(config, projection_dim=None)
        ours = {name: tensor for name, tensor in ours.items() if name != PROJECTION}
    elif projected and config.projection_dim is None:
        config = replace(config, projection_dim=config.width)
        embedding = ours[CLIP_TOKENS]
        ours[PROJECTION] = torch.eye(config.width, dtype=embedding.dtype)
    whole = family.texts.get(piece.role)
    if isinstance(conditioning, TextConditioning) and conditioning.layer == -2 and whole is not None:
        last = f"encoder.layers.{whole.layers - 1}."  # pyright: ignore[reportAttributeAccessIssue]
        kept = {name: tensor for name, tensor in ours.items() if not name.startswith(last)}
        config = replace(config, layers=config.layers - (len(kept) < len(ours)))
        ours = kept
    if config == piece.config:
        return piece
    return replace(piece, config=config, tensors=layout_table(piece.kind, piece.layout, config)(ours))


def _way_back(before: Piece, after: Piece) -> tuple[Tensors, list[str]]:
    """What the old layout would lack after the way back, by its names there, and what it would have more."""
    meta = replace(after, tensors={name: tensor.to("meta") for name, tensor in after.tensors.items()})
    back = meta.tensors
    if before.layout != after.layout:
        back = layout_table(after.kind, before.layout, after.config)(meta.ours())
    lost = {
        before.prefix + name: tensor
        for name, tensor in before.tensors.items()
        if name not in back or (back[name].shape, back[name].dtype) != (tensor.shape, tensor.dtype)
    }
    return lost, [before.prefix + name for name in back if name not in before.tensors]


def _origin(loose: Loose, made: Sequence[str], extra: Mapping[str, Tensor], *, alone: bool) -> Origin | None:
    """What the way back must know, or None where it would find by itself all that was there."""
    if loose.origin is not None:
        return loose.origin
    pieces = {role: (piece.layout, piece.prefix) for role, piece in loose.pieces.items()}
    usual = {r: _usual(p, loose.form, loose.family, alone=alone) for r, p in loose.pieces.items()}
    as_ever = all(place == Place(*pieces[role]) for role, place in usual.items())
    metadata = {key: value for key, value in loose.metadata.items() if key != "format"}
    if as_ever and not (extra or made or metadata or loose.half):
        return None
    return Origin(
        form=loose.form, pieces=pieces, absent=tuple(made), metadata=loose.metadata, half=loose.half
    )


def _write_single(out: Path, made: Arranged, dtype: str | None, max_bytes: int | None) -> list[Path]:
    if out.suffix == GGUF:
        _write_gguf(out, made, dtype)
    else:
        tensors = {
            piece.prefix + name: tensor
            for piece in made.pieces.values()
            for name, tensor in _stored(piece, dtype).items()
        }
        kept = {name: tensor for name, tensor in (tensors | made.beside).items() if name not in made.absent}
        for file, part in _halves(out, kept, made.half).items():
            save_tensors(file, part, made.metadata or {"format": "pt"}, max_bytes)
    written = out if out.exists() else out.with_name(out.name + INDEX_SUFFIX)
    return [written, *_write_extra(out, "single", made)]


def _halves(out: Path, tensors: Tensors, half: str) -> dict[Path, Tensors]:
    """The files of a tiny autoencoder that came as two, or the one file of anything else."""
    if not half:
        return {out: tensors}
    other = HALVES[half]
    beside = other_half(out, half) if half in out.name else out.with_stem(f"{out.stem}_{other}")
    files = {half: out, other: beside}
    return {
        file: {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}
        for part, file in files.items()
    }


def _write_gguf(out: Path, made: Arranged, dtype: str | None) -> None:
    if list(made.pieces) not in ([NETWORK], ["t5"]):
        holds = ", ".join(made.pieces) or "no network"
        raise InputError(f"{out}: a GGUF file holds one network, and there is {holds}: convert to parts")
    (piece,) = made.pieces.values()
    _save_gguf(out, piece, dtype, made.family)


def _write_folder(folder: Path, made: Arranged, to: Form, dtype: str | None, max_bytes: int | None) -> None:
    files: dict[Path, Tensors] = {}
    for piece in made.pieces.values():
        if to == "parts" and dtype in QUANTS and _takes_blocks(piece):
            file = folder / piece.prefix.removesuffix("/")
            _save_gguf(file.with_suffix(GGUF), piece, dtype, made.family)
            continue
        place, _, prefix = piece.prefix.rpartition("/")
        file = _file(folder, place, to, WEIGHTS.get(piece.kind, DIFFUSERS_WEIGHTS))
        stored = {prefix + name: tensor for name, tensor in _stored(piece, dtype).items()}
        files.setdefault(file, {}).update(stored)
    for name, tensor in made.beside.items():
        place, _, rest = name.rpartition("/")
        files.setdefault(_file(folder, place, to, DIFFUSERS_WEIGHTS), {})[rest] = tensor
    for file, tensors in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, tensors, made.metadata or {"format": "pt"}, max_bytes)
    _write_extra(folder, to, made)


def _file(folder: Path, place: str, to: Form, weights: str) -> Path:
    """The file of a part; what names it may come from a file's header, and must not lead elsewhere."""
    if Path(place).is_absolute() or ".." in Path(place).parts:
        raise InputError(f"{folder}: a part must lie in its folder, not in {place}")
    return folder / place / weights if to == "diffusers" else folder / place


def _write_extra(out: Path, form: Form, made: Arranged) -> list[Path]:
    if made.origin is None:
        return []
    file = extra_file(out, form)
    save_tensors(file, made.extra, {ORIGIN: to_json(made.origin)})
    return [file]


def _takes_blocks(piece: Piece) -> bool:
    """Whether a network is stored in quantised form, if one is asked for: the large ones."""
    return piece.role in (NETWORK, "t5")


def _stored(piece: Piece, dtype: str | None) -> Tensors:
    """A network's tensors in a precision that safetensors files have."""
    if dtype is None:
        return piece.tensors
    if dtype in FP8 and _takes_blocks(piece):
        return encode_fp8(piece.tensors, scaled=dtype == "fp8_scaled")
    wanted = DTYPES.get(dtype, torch.float16)
    return {name: cast(tensor, wanted) for name, tensor in piece.tensors.items()}


def _save_gguf(file: Path, piece: Piece, dtype: str | None, family: str | None) -> None:
    """Under the names that other programs read: the original ones without a prefix."""
    if dtype in FP8:
        raise InputError(f"{file}: GGUF files have no {dtype}: name another dtype, such as q8_0")
    architecture = ARCHITECTURES.get(piece.kind) or (family or piece.kind).partition("-")[0]
    quant = QUANTS.get(dtype or "") or PLAIN[dtype]
    save_gguf(file, piece.tensors, architecture=architecture, quant=quant, metadata={})
