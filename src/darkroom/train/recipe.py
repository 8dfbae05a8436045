"""What both stages' recipes share: their data, their folder, and whether a run there may go on."""

import json
from dataclasses import dataclass
from pathlib import Path

from darkroom.config import to_json
from darkroom.data.folder import Pictures, PictureSet, Source, list_examples
from darkroom.data.shapes import ShapesSource
from darkroom.errors import InputError
from darkroom.files import atomic_write

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


def claim_run_folder(out: Path, recipe: object) -> None:
    """Make the run's folder and keep the resolved recipe in it.

    Raises InputError, naming the fields, if a run of another recipe is there already.
    """
    path = out / "recipe.json"
    new = json.loads(to_json(recipe))
    if path.exists():
        old = json.loads(path.read_text())
        changed = [name for name in _differences(old, new) if not name.startswith(MAY_CHANGE)]
        if changed:
            raise InputError(
                f"{out} holds a run of another recipe (different: {', '.join(changed)}): give the old values "
                "to go on with it, or another 'out' to start anew"
            )
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(new, indent=1))


def _differences(old: object, new: object, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [d for n in names for d in _differences(old.get(n), new.get(n), f"{prefix}.{n}".lstrip("."))]
    return [] if old == new else [prefix]
