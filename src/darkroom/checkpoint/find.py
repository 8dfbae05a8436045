"""Finding models and their parts by name, in folders that people have. No torch here, nothing goes online."""

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from darkroom.checkpoint.folders import (
    PICKLES,
    SAFETENSORS,
    Found,
    Kind,
    folder_layout,
    found_in,
    hub_cache,
    hub_repo,
    snapshot,
    starts,
)
from darkroom.errors import NAMES_SHOWN, InputError
from darkroom.presets import bundled

VARIABLE = "DARKROOM_MODELS"
MODELS: tuple[Kind, ...] = ("model", "network")
PARTS: tuple[Kind, ...] = ("autoencoder", "text_encoder")
NEAR = 3


def search_folders(given: Sequence[Path] = ()) -> list[Path]:
    """The folders to search: those given, then those of the environment variable DARKROOM_MODELS.

    Raises InputError for one that is not there, saying where it was named.
    """
    named = [("--model-dir", Path(path).expanduser()) for path in given]
    variable = os.environ.get(VARIABLE, "").split(os.pathsep)
    named += [(VARIABLE, Path(path).expanduser()) for path in variable if path]
    for source, path in named:
        if not path.is_dir():
            raise InputError(f"{path}: no such folder (named by {source})")
    return list(dict.fromkeys(path for _, path in named))


def model_path(name_or_path: str | Path, folders: Sequence[Path] = ()) -> Path:
    """A model's file or folder: a bundled model, a path that exists, or else as `find_model` finds it."""
    if str(name_or_path) in bundled():
        return bundled()[str(name_or_path)]
    return _existing(name_or_path) or find_model(str(name_or_path), folders)


def autoencoder_path(name_or_path: str | Path, folders: Sequence[Path] = ()) -> Path:
    """A file or folder with an autoencoder: as `model_path`, but one alone is found by name too."""
    if str(name_or_path) in bundled():
        return bundled()[str(name_or_path)]
    return _existing(name_or_path) or find_part(str(name_or_path), folders, "autoencoder", *MODELS)


def part_path(name_or_path: str | Path, folders: Sequence[Path] = ()) -> Path:
    """A file or folder of a part: a path that exists, or else as `find_part` finds it."""
    return _existing(name_or_path) or find_part(str(name_or_path), folders)


def find_model(name: str, folders: Sequence[Path] = ()) -> Path:
    """Find a model by name in `folders`, and, if it is in none, in the hub's cache on this machine.

    A name is that of a file, with its suffix or without, or of a folder in the layout of diffusers or
    darkroom, alone or with folders before it (checkpoints/xl/base); of a download, also org/name,
    org/name@revision or org/name/file. The whole way from a folder goes before its end, exact letters before
    others in size, safetensors before the same model pickled beside it. Files in folders for anything but
    models (LoRAs, autoencoders) are passed over. Raises InputError that lists the candidates if there are
    several, and the nearest names and the folders if there is none.
    """
    return _find("model", name, folders, MODELS, bundled())


def find_part(name: str, folders: Sequence[Path] = (), *kinds: Kind) -> Path:
    """As `find_model`, in the folders for parts of these kinds, or for autoencoders and text encoders."""
    return _find(" or ".join(kinds or PARTS).replace("_", " "), name, folders, kinds or PARTS)


def list_models(folders: Sequence[Path] = ()) -> list[Found]:
    """Everything that can be found by name in `folders` and in the hub's cache, by kind and name."""
    found = [item for place in (*folders, hub_cache()) for item in found_in(place)]
    unique = {os.path.realpath(item.path): item for item in reversed(found)}
    return sorted(unique.values(), key=lambda item: (item.kind or "", item.name.casefold(), item.name))


def _existing(name_or_path: str | Path) -> Path | None:
    """A path that is there; InputError for what can only be a path and is not."""
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or str(name_or_path).startswith((f".{os.sep}", f"..{os.sep}")):
        raise InputError(f"{path}: no such file or folder")
    return None


def _find(
    what: str, name: str, folders: Sequence[Path], kinds: Sequence[Kind], known: Iterable[str] = ()
) -> Path:
    name = name.replace(os.sep, "/").strip("/")
    met: list[Found] = []
    for places in (folders, [hub_cache()]):  # what people name goes before what a cache happens to hold
        paths = _direct(name, places)
        found = [] if paths else [item for place in places for item in found_in(place)]
        fitting = [item for item in found if item.kind is None or item.kind in kinds]
        paths += [item.path for item in _matches(name, fitting)]
        if paths:
            return _only(what, name, paths)
        met += found
    raise _nothing(what, name, folders, kinds, met, known)


def _direct(name: str, places: Sequence[Path]) -> list[Path]:
    """What lies at this way itself from a place, and in a hub cache from a repository's snapshot."""
    paths = []
    for place in places:
        inside = (start / name for start in starts(place).values())
        paths += [path for path in inside if path.is_file() or folder_layout(path)]
        paths += _in_hub(place, name)
    return paths


def _in_hub(cache: Path, name: str) -> list[Path]:
    """What org/name, org/name@revision or org/name/file, with a revision too, means in a hub cache."""
    where, _, revision = name.partition("@")
    org, repo, *rest = [*where.split("/"), ""]
    files = snapshot(hub_repo(cache, f"{org}/{repo}"), revision or None) if repo else None
    if files is None:
        return []
    path = files.joinpath(*rest)
    if path.is_file() or folder_layout(path):
        return [path]
    return [item.path for item in found_in(path)]


def _matches(name: str, found: Sequence[Found]) -> list[Found]:
    """Those with this name: exact before other capitals, a whole way before its end, suffixes before none."""
    for fold in (str, str.casefold):
        wanted = fold(name)
        for end in (False, True):
            for bare in (False, True):
                ways = [(item, fold(way)) for item in found for way in (item.bare if bare else (item.name,))]
                hits = [item for item, way in ways if way == wanted or (end and way.endswith(f"/{wanted}"))]
                if hits:
                    return hits
    return []


def _only(what: str, name: str, paths: Iterable[Path]) -> Path:
    """The one path among several ways to it; raises InputError listing them if they are several models."""
    different = list({os.path.realpath(path): path for path in paths}.values())
    whole = {path.with_suffix("") for path in different if path.suffix.lower() in SAFETENSORS}
    different = [p for p in different if p.suffix.lower() not in PICKLES or p.with_suffix("") not in whole]
    if len(different) > 1:
        shown = "".join(f"\n  {path}" for path in sorted(different)[:NAMES_SHOWN])
        more = len(different) - NAMES_SHOWN
        rest = f"\n  and {more} more" if more > 0 else ""
        raise InputError(f"{what} {name!r}: several have this name, give the path of one:{shown}{rest}")
    return different[0]


def _nothing(
    what: str,
    name: str,
    folders: Sequence[Path],
    kinds: Sequence[Kind],
    met: Sequence[Found],
    known: Iterable[str],
) -> InputError:
    others = _matches(name, met)
    if others:
        path, kind = others[0].path, others[0].kind
        return InputError(
            f"{what} {name!r}: only {path} has this name, in a folder for others ({kind}): give its path"
        )
    fitting = [item for item in met if item.kind is None or item.kind in kinds]
    near = _near(name, fitting, known)
    hint = f": did you mean {' or '.join(map(repr, near))}?" if near else "."
    looked = "".join(f"\n  {place}" for place in (*folders, hub_cache()))
    return InputError(
        f"unknown {what} {name!r}{hint} Looked in (--model-dir and {VARIABLE} add folders):{looked}"
    )


def _near(name: str, found: Iterable[Found], known: Iterable[str]) -> list[str]:
    """The names most like this one: whole, or what follows the last slash, without suffix and capitals."""
    labels = {other.casefold(): other for other in known}
    for item in found:
        labels |= {label.casefold(): item.name for n in item.bare for label in (n, n.rpartition("/")[2])}
    close = difflib.get_close_matches(name.casefold(), list(labels), n=4 * NEAR, cutoff=0.7)
    return list(dict.fromkeys(labels[label] for label in close))[:NEAR]
