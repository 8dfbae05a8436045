"""The models that come with the package: data about them, and where their folders are. No torch here."""

from dataclasses import dataclass
from pathlib import Path

from darkroom.errors import InputError, unknown

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model's files do not say of themselves."""

    year: int
    licence: str


CARDS = {
    "darkroom-mini": Card(year=2026, licence="Apache-2.0"),
}


def bundled() -> dict[str, Path]:
    """The folders of the models in the package, by name."""
    folders = WEIGHTS.iterdir() if WEIGHTS.is_dir() else ()
    return {folder.name: folder for folder in sorted(folders) if folder.is_dir()}


def model_folder(name_or_folder: str | Path) -> Path:
    """The folder of a bundled model or of a path; a bare name means the bundled one where there is one.

    Raises InputError, naming the nearest bundled model, if there is neither.
    """
    models = bundled()
    if str(name_or_folder) in models:
        return models[str(name_or_folder)]
    path = Path(name_or_folder)
    if path.is_dir():
        return path
    if path.is_file():
        raise InputError(f"{path}: a model is a folder, and this is a file")
    if path.name != str(name_or_folder):
        raise InputError(f"{path}: no such model folder")
    raise unknown("model", str(name_or_folder), models)
