"""The models that come with the package: data about them, and where their folders are. No torch here."""

from dataclasses import dataclass
from pathlib import Path

from darkroom.checkpoint.folder_files import is_darkroom
from darkroom.errors import InputError, unknown

WEIGHTS = Path(__file__).parent / "weights"


# The model where a command names none.
DEFAULT_MODEL = "darkroom-mini"


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The prompts of a model's demonstration: `template` filled with every row and column of a sheet."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    template: str

    @property
    def prompts(self) -> list[str]:
        """All prompts, row by row."""
        return [self.template.format(row=row, column=column) for row in self.rows for column in self.columns]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model's files do not say of themselves."""

    year: int
    licence: str
    demo: Demo


CARDS = {
    "darkroom-mini": Card(
        year=2026,
        licence="Apache-2.0",
        demo=Demo(
            rows=("flat style", "3d style", "blob style"),
            columns=(
                "red apple",
                "rocket",
                "octopus",
                "sunflower",
                "grinning face",
                "penguin",
                "birthday cake",
                "cactus",
            ),
            template="{column}, {row}",
        ),
    ),
    "darkroom-shapes": Card(
        year=2026,
        licence="Apache-2.0",
        demo=Demo(
            rows=("circle", "triangle", "square"),
            columns=("red", "orange", "yellow", "green", "blue", "purple", "pink", "black"),
            template="a large {column} {row} in the centre",
        ),
    ),
}


def bundled() -> dict[str, Path]:
    """The folders of the models in the package that can draw, by name."""
    return {name: folder for name, folder in _weights().items() if is_darkroom(folder)}


def model_folder(name_or_folder: str | Path) -> Path:
    """The folder of a bundled model or of a path; a bare name means the bundled one where there is one.

    Raises InputError, naming the nearest bundled model, if there is neither.
    """
    models = _weights()
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


def _weights() -> dict[str, Path]:
    folders = WEIGHTS.iterdir() if WEIGHTS.is_dir() else ()
    return {folder.name: folder for folder in sorted(folders) if folder.is_dir()}
