"""What a checkpoint is, told from its header: family, parts, precision, what is missing. No torch here."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from darkroom.checkpoint.anatomy import AUTOENCODER, MEAN, NETWORK, Anatomy, Component, dissect
from darkroom.checkpoint.formats.fp8_names import fp8_companions
from darkroom.checkpoint.formats.header import Entry, Header
from darkroom.checkpoint.formats.read import read_header
from darkroom.checkpoint.known import Nearest, families, nearest, network_family
from darkroom.checkpoint.other_files import other_file
from darkroom.checkpoint.prediction import Told, told_prediction
from darkroom.errors import NAMES_SHOWN, some

VARIANTS = {
    "sd1": "base",
    "sd1-inpainting": "inpainting",
    "sd2": "base",
    "sd2-inpainting": "inpainting",
    "sd2-depth": "depth",
    "sdxl": "base",
    "sdxl-refiner": "refiner",
}


LAYOUTS = {
    "original": "the original release's names",
    "diffusers": "diffusers' names",
    "legacy": "the names that diffusers had before 2023",
    "hub": "the names of the hub's files",
    "bare": "the names of transformers 5",
    "openclip": "OpenCLIP's names",
}


@dataclass(frozen=True, kw_only=True)
class ComponentReport:
    """One network of a checkpoint: counts, and its names beside those of the nearest known network.

    `dtype` is what most of its values are stored as, `dtypes` how many tensors there are of each. `reshaped`
    are tensors of other shapes than the known ones.
    """

    kind: str
    layout: str
    parameters: int
    dtype: str
    dtypes: dict[str, int]
    bytes: int
    nearest: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a file or folder is.

    `kind` says model, network, autoencoder, text encoder, or what else it is (LoRA, ControlNet, ...).
    `family` is one of `darkroom models`, or the nearest. `left_out` counts tensors beside the networks by
    what they are, `stubs` are what a pickle holds beside tensors. `evidence` says why.
    """

    path: str
    format: str
    kind: str
    family: str | None
    variant: str | None
    prediction: str | None
    schedule: str | None
    bytes: int
    components: dict[str, ComponentReport]
    unknown: tuple[str, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    stubs: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    evidence: tuple[str, ...] = ()

    def to_json(self, beside: Mapping[str, object] | None = None) -> str:
        """The report as JSON, its fields by name, with what else was found out."""
        return json.dumps(asdict(self) | dict(beside or {}), indent=2, ensure_ascii=False)


def inspect(path: str | Path) -> Report:
    """Say what a file of tensors, or the folder of a model, is; only headers are read.

    Raises InputError, which names the file and what is wrong, where it is damaged or of no known format.
    """
    path = Path(path)
    if path.is_dir():
        from darkroom.checkpoint.inspect_folder import inspect_folder

        return inspect_folder(path)
    return report(path, read_header(path))


def report(path: Path, header: Header) -> Report:
    """What the tensors of a header are; see `inspect`."""
    if "config" in header.metadata and header.metadata.get("modelspec.implementation") == "darkroom":
        return _report_own(path, header)
    other = other_file(header.shapes)
    if other is not None:
        whole = _count("", other.form, header.entries, tuple(header.entries), None)
        return Report(
            path=str(path),
            format=header.format,
            kind=other.kind,
            family=other.family,
            variant=other.form,
            prediction=None,
            schedule=None,
            bytes=whole.bytes,
            components={other.kind: whole},
            unknown=other.unknown,
            stubs=header.stubs,
            metadata=header.metadata,
            evidence=(f"names of tensors are those of a {other.kind} ({other.form})",),
        )
    return _report_model(path, header)


def _report_own(path: Path, header: Header) -> Report:
    """A file that says itself what it is: darkroom's own."""
    kind = str(json.loads(header.metadata["config"]).get("kind"))
    spec = json.loads(header.metadata.get("denoiser", "{}"))
    role = NETWORK if spec else AUTOENCODER if kind.startswith(AUTOENCODER) else kind
    what = {NETWORK: "network", AUTOENCODER: "autoencoder", "interposer": "interposer"}
    part = _count(kind, "darkroom", header.entries, tuple(header.entries), None)
    noise = spec.get("path", {})
    snr = ", zero terminal SNR" if noise.get("zero_terminal_snr") else ""
    return Report(
        path=str(path),
        format=header.format,
        kind=what.get(role, "text encoder"),
        family=f"darkroom/{kind}",
        variant=None,
        prediction=spec.get("prediction"),
        schedule=f"{noise['kind']}{snr}" if noise else None,
        bytes=part.bytes,
        components={role: part},
        metadata=header.metadata,
        evidence=("the file says itself what it is: darkroom wrote it",),
    )


def _report_model(path: Path, header: Header) -> Report:
    scales = fp8_companions(header.entries)
    shapes = {name: shape for name, shape in header.shapes.items() if name not in scales}
    anatomy = dissect(shapes)
    family, evidence = _family(anatomy, shapes)
    found = {role: _nearest(part, shapes, family) for role, part in anatomy.components.items()}
    told = told_prediction(family, header, anatomy) if NETWORK in found else Told(None, None, ())
    parts = {
        role: _count(part.kind, part.layout, header.entries, part.names, found[role], part.prefix)
        for role, part in anatomy.components.items()
    }
    return Report(
        path=str(path),
        format=header.format,
        kind=_kind(anatomy),
        family=family or _part_family(anatomy),
        variant=_variant(family, found),
        prediction=told.prediction,
        schedule=told.schedule,
        bytes=sum(entry.nbytes for entry in header.entries.values()),
        components=parts,
        unknown=anatomy.unknown,
        left_out=_left_out(anatomy, scales),
        stubs=header.stubs,
        metadata=header.metadata,
        evidence=(*_seen(anatomy), *evidence, *_names(found), *told.evidence),
    )


def _family(anatomy: Anatomy, shapes: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """The family of the network, if there is one, and why."""
    network = anatomy.components.get(NETWORK)
    if network is None:
        return None, ()
    edm = MEAN in anatomy.markers
    family, why = network_family(network.kind, network.layout, network.bare(shapes), edm=edm)
    return family, (why,)


def _nearest(part: Component, shapes: Mapping[str, Any], family: str | None) -> Nearest | None:
    return nearest(part.kind, part.layout, part.bare(shapes), family if part.role == NETWORK else None)


def _count(
    kind: str,
    layout: str,
    entries: Mapping[str, Entry],
    names: Sequence[str],
    near: Nearest | None,
    prefix: str = "",
) -> ComponentReport:
    own = [entries[name] for name in names]
    values = Counter[str]()
    for entry in own:
        values[entry.dtype] += entry.numel

    def in_file(bare: Iterable[str]) -> tuple[str, ...]:
        return tuple(prefix + name for name in bare)

    return ComponentReport(
        kind=kind,
        layout=layout,
        parameters=sum(entry.numel for entry in own),
        dtype=values.most_common(1)[0][0] if values else "",
        dtypes=dict(Counter(entry.dtype for entry in own)),
        bytes=sum(entry.nbytes for entry in own),
        nearest=near.of if near else (),
        missing=in_file(near.missing) if near else (),
        unexpected=in_file(near.unexpected) if near else (),
        reshaped=in_file(near.reshaped) if near else (),
    )


def _kind(anatomy: Anatomy) -> str:
    roles = set(anatomy.components)
    if not roles:
        return "averaged copy" if anatomy.ignored else "unknown"
    if NETWORK in roles:
        return "network" if roles == {NETWORK} else "model"
    return "autoencoder" if AUTOENCODER in roles else "text encoder"


def _part_family(anatomy: Anatomy) -> str | None:
    """What an autoencoder or text encoder alone is; a network of no known family is of none."""
    kinds = [part.kind for part in anatomy.components.values()]
    return kinds[0].replace(" ", "-") if kinds and NETWORK not in anatomy.components else None


def _variant(family: str | None, found: Mapping[str, Nearest | None]) -> str | None:
    """What a family calls this one of its models; of a part alone, the known one that it is like."""
    if family is not None:
        return VARIANTS.get(family) or family.rpartition("-")[2]
    near = next(iter(found.values()), None)
    return near.of[0] if near else None


def _left_out(anatomy: Anatomy, scales: Iterable[str]) -> dict[str, int]:
    counts = {f"{prefix}*": len(names) for prefix, names in anatomy.ignored.items()}
    rest = {
        "buffers": len(anatomy.buffers),
        "markers": len(anatomy.markers),
        "scales of fp8": len(tuple(scales)),
    }
    return counts | {name: count for name, count in rest.items() if count}


def _seen(anatomy: Anatomy) -> Iterable[str]:
    for role, part in anatomy.components.items():
        under = f", under {part.prefix}*" if part.prefix else ""
        yield f"{role}: {len(part.names)} tensors by {LAYOUTS[part.layout]}{under}"


def _names(found: Mapping[str, Nearest | None]) -> Iterable[str]:
    for role, near in found.items():
        if near is None:
            continue
        like = " or ".join(near.of)
        if near.exact:
            yield f"{role}: names and shapes are exactly those of {like}"
        elif near.same_names:
            yield f"{role}: names are those of {like}, {len(near.reshaped)} shapes are not"
        else:
            differ = f"{len(near.missing)} names missing, {len(near.unexpected)} unexpected"
            yield f"{role}: nearest is {like}: {differ}"


def summary(found: Report) -> str:
    """What it is in a line."""
    title = families()[found.family]["title"] if found.family in families() else found.family
    said = (title or "unknown", found.kind, found.format, f"{found.bytes / 1e6:,.1f} MB")
    predicts = f"predicts {found.prediction}" if found.prediction else ""
    return f"{found.path}: " + ", ".join(filter(None, (*said, predicts, found.schedule)))


def rows(found: Report) -> list[tuple[str, ...]]:
    """The parts as a table, its columns' names first."""
    head = ("part", "kind", "names", "parameters", "stored as", "size", "nearest", "missing", "unexpected")
    return [head, *(_row(name, part) for name, part in found.components.items())]


def _row(name: str, part: ComponentReport) -> tuple[str, ...]:
    dtypes = " + ".join(sorted(part.dtypes, key=lambda dtype: dtype != part.dtype))
    return (
        name,
        part.kind,
        part.layout,
        f"{part.parameters:,}",
        dtypes,
        f"{part.bytes / 1e6:,.1f} MB",
        ", ".join(part.nearest) + (" (other shapes)" if part.reshaped else ""),
        str(len(part.missing)),
        str(len(part.unexpected)),
    )


def notes(found: Report) -> Iterable[str]:
    """What else there is to say of a checkpoint, a line each: at most ten names on each side."""
    for name, part in found.components.items():
        for what in ("missing", "unexpected"):
            if names := getattr(part, what):
                yield f"{name}: {what}: {some(names)}"
    if found.unknown:
        yield f"unknown: {some(found.unknown)}"
    if found.left_out:
        yield "left out: " + ", ".join(f"{count} of {what}" for what, count in found.left_out.items())
    if told := {key: value for key, value in found.metadata.items() if key != "format"}:
        shown = [f"{key} = {value[:60]}{'...' if len(value) > 60 else ''}" for key, value in told.items()]
        more = len(shown) - NAMES_SHOWN
        yield "metadata: " + "; ".join(shown[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
    if found.stubs:
        yield f"in the pickle, not run: {some(found.stubs)}"
