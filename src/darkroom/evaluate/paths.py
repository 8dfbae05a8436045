"""Which of a command's paths are pictures and which are autoencoders. No torch here."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from darkroom.errors import InputError
from darkroom.presets import bundled

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
WEIGHTS = frozenset({".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".pkl"})
CONFIGS = ("config.json", "model_index.json")
PARTS = ("vae", "vqvae")  # folders of autoencoders in diffusers' layout


def split_arguments(paths: Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """Pictures and folders of pictures, and autoencoders: names of bundled models, files and folders.

    A folder with weights or a config in it, or in its folder `vae`, is a model, whatever else lies there.
    Raises InputError for a path that is not there or is neither, and where no autoencoder is named.
    """
    images, vaes = [], []
    for given in paths:
        if is_autoencoder(given):
            vaes.append(str(given))
        else:
            images.append(Path(given).expanduser())
    if not vaes:
        known = _listed(bundled())
        raise InputError(f"name at least one autoencoder: a file, a folder, or a bundled model ({known})")
    return images, vaes


def is_autoencoder(given: str | Path) -> bool:
    """Whether a path or name is for weights, not for pictures; errors as in `split_arguments`."""
    path = Path(given).expanduser()
    if str(given) in bundled():
        return True
    if path.is_dir():
        return _is_model_folder(path)
    if not path.exists():
        raise InputError(f"{path}: no such picture, folder or model. Bundled: {_listed(bundled())}")
    suffix = path.suffix.lower()
    if suffix not in PICTURES | WEIGHTS:
        wanted = f"neither a picture ({_listed(PICTURES)}) nor a file of weights ({_listed(WEIGHTS)})"
        raise InputError(f"{path}: {wanted}")
    return suffix in WEIGHTS


def picture_files(paths: Iterable[Path]) -> list[Path]:
    """The picture files of files and folders, those of a folder and its subfolders sorted by name."""
    files: list[Path] = []
    for path in paths:
        files += sorted(_pictures(path)) if path.is_dir() else [path]
    return files


def names(vaes: Sequence[str | Path]) -> list[str]:
    """What to call autoencoders: a file's or folder's name; the whole path where names are equal.

    A folder `vae` is called after the model that it is part of, half of a tiny autoencoder after the whole.
    """
    short = [_name(Path(vae)) for vae in vaes]
    return [str(vae) if short.count(name) > 1 else name for name, vae in zip(short, vaes, strict=True)]


def _name(path: Path) -> str:
    if path.suffix.lower() not in WEIGHTS:
        return path.parent.name if path.name in PARTS and path.parent.name else path.name
    stem = path.stem
    for half in ("encoder", "decoder"):
        stem = stem.removesuffix(half).rstrip("_-.") or stem
    return stem


def _is_model_folder(folder: Path) -> bool:
    inside = [entry for part in ("", *PARTS) for entry in (folder / part).glob("*") if entry.is_file()]
    if any(entry.name in CONFIGS or entry.suffix.lower() in WEIGHTS for entry in inside):
        return True
    if not any(_pictures(folder)):
        raise InputError(f"{folder}: holds no pictures and no weights")
    return False


def _pictures(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in PICTURES and not hidden and path.is_file():
            yield path


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
