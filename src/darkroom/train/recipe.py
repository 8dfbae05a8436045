"""What both stages' recipes share: their data, their folder, and whether a run there may go on."""

import json
from dataclasses import dataclass
from pathlib import Path

from darkroom.config import to_json
from darkroom.data.folder import Pictures, PictureSet, Source, list_examples
from darkroom.data.shapes import ShapesSource
from darkroom.errors import InputError
from darkroom.files import atomic_write, require_parent

RECIPE = "recipe.json"

# A run may go on with these changed: they set how long it runs and what it shows, not what it computes.
MAY_CHANGE = ("train.steps", "train.log_every", "train.sample_every", "train.save_every", "device")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The pictures of a run: folders, or generated shapes, at one size."""

    size: int
    sources: tuple[Source, ...] = ()
    shapes: ShapesSource | None = None


def load_pictures(config: DataConfig) -> Pictures:
    """Decode all pictures of a recipe into memory.

    Raises InputError if the recipe names none, or none can be read.
    """
    if (config.shapes is None) == (not config.sources):
        raise InputError(
            "field 'data': give either 'sources' (folders of pictures) or 'shapes', one of the two"
        )
    if config.shapes is not None:
        return config.shapes.pictures(config.size)
    return PictureSet(list_examples(config.sources), config.size)


def check_size(config: DataConfig, stride: int) -> None:
    """Raise InputError if pictures of the recipe's size cannot be encoded whole."""
    if config.size < stride or config.size % stride:
        raise InputError(f"field 'data.size': {config.size} does not divide by the stride {stride}")


def check_run_folder(out: Path, recipe: object) -> None:
    """Raise InputError, naming the fields, if a run of another recipe is in `out` already."""
    path = out / RECIPE
    if not path.exists():
        return
    try:
        old = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it to go on with the run") from error
    changed = [n for n in _differences(old, json.loads(to_json(recipe))) if not n.startswith(MAY_CHANGE)]
    if changed:
        raise InputError(
            f"{out} holds a run of another recipe (different: {', '.join(changed)}): give the old values "
            "to go on with it, or another 'out' to start anew"
        )


def claim_run_folder(out: Path, recipe: object) -> None:
    """Make the run's folder and keep the resolved recipe in it, once everything else has been found good.

    Raises InputError naming the folder if it cannot be made.
    """
    path = out / RECIPE
    require_parent(path, mkdir=True)
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(json.loads(to_json(recipe)), indent=1))


def _differences(old: object, new: object, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [d for n in names for d in _differences(old.get(n), new.get(n), f"{prefix}.{n}".lstrip("."))]
    return [] if old == new else [prefix]
