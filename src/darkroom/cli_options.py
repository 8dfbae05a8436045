"""Options that several commands share: which model draws and where, and from which pictures.

As in `cli.py`, what needs torch is imported when it is used.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from darkroom.checkpoint.find import model_path, part_path, search_folders
from darkroom.errors import InputError
from darkroom.files import require_parent
from darkroom.presets import DEFAULT_MODEL

if TYPE_CHECKING:
    from darkroom.pipeline import Pipeline

MaybeInt = Annotated[int | None, arg(metavar="INT")]
MaybeFloat = Annotated[float | None, arg(metavar="FLOAT")]
MaybeText = Annotated[str | None, arg(metavar="STR")]
MaybePath = Annotated[Path | None, arg(metavar="PATH")]
ModelDirs = Annotated[tuple[Path, ...], arg(metavar="PATH"), UseAppendAction]  # may be given several times


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model draws, and where."""

    model: str = DEFAULT_MODEL
    """A bundled model, a model folder (darkroom's or diffusers'), an original file, or the name of one."""
    model_dir: ModelDirs = ()
    """Folders to search by name, such as ComfyUI's or A1111's; those of DARKROOM_MODELS are searched too."""
    parts: tuple[str, ...] = ()
    """Further files with what the model lacks, such as an autoencoder or text encoders, or their names."""
    tokenizers: MaybePath = None
    """Where to look first for tokenizers that no file holds."""
    family: MaybeText = None
    """What an original file is where names and shapes leave it open; see darkroom models."""
    refiner: MaybeText = None
    """A second model that draws the last steps, such as SDXL's refiner."""
    device: MaybeText = None
    """Where to compute, such as cpu or cuda:1; an accelerator if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights."""

    def check(self) -> None:
        """Raise InputError for what is not there, before anything is loaded."""
        folders = search_folders(self.model_dir)
        for name in (self.model, self.refiner):
            if name is not None:
                model_path(name, folders)
        for part in self.parts:
            part_path(part, folders)

    def load(self) -> tuple["Pipeline", "Pipeline | None"]:
        """The model, and its refiner if there is one."""
        import torch

        from darkroom.pipeline import load

        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        both = {"tokenizers": self.tokenizers, "device": self.device, "dtype": dtype}
        both["model_dirs"] = self.model_dir
        pipe = load(self.model, parts=self.parts, family=self.family, **both)
        return pipe, None if self.refiner is None else load(self.refiner, **both)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Pictures that a drawing starts from or follows."""

    image: MaybePath = None
    """A picture to start from, to paint in, to enlarge or to edit, as the model is for."""
    mask: MaybePath = None
    """White where to paint."""
    control: MaybePath = None
    """A depth map or a picture of edges, for models that follow one."""
    image_prompt: MaybePath = None
    """A picture as a prompt, for FLUX, with --redux."""
    redux: MaybePath = None
    """FLUX.1 Redux: diffusers' folder, or its file beside SigLIP's folder image_encoder."""
    strength: MaybeFloat = None
    """How far to go from the picture, 0 to 1."""
    noise_level: MaybeInt = None
    """How much noise the x4 upscaler adds to its picture first, 0 to 350."""

    def check(self) -> None:
        """Raise InputError for what is not there, before anything is loaded."""
        given = (self.image, self.mask, self.control, self.image_prompt, self.redux)
        check_files(path for path in given if path is not None)
        if (self.image_prompt is None) != (self.redux is None):
            raise InputError("--image-prompt and --redux go together: the picture, and what reads it")

    def options(self) -> dict[str, Any]:
        """What they are called in a call of the library."""
        from PIL.Image import fromarray

        from darkroom.data.folder import load_mask, load_picture

        given = {"image": self.image, "mask": self.mask, "control": self.control}
        pictures = {
            n: load_mask(path) if n == "mask" else fromarray(load_picture(path))
            for n, path in given.items()
            if path is not None
        }
        tokens = None
        if self.image_prompt is not None and self.redux is not None:
            from darkroom.adapters.redux import load_redux

            tokens = load_redux(self.redux).tokens([fromarray(load_picture(self.image_prompt))])
        options = {"image_prompt": tokens, "strength": self.strength, "noise_level": self.noise_level}
        return {**pictures, **options}


def check_files(paths: Iterable[Path]) -> None:
    """Raise InputError for the first path that is not there."""
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file")


def print_table(rows: Iterable[Sequence[str]]) -> None:
    """Rows of text in columns, the first row their names."""
    table = list(rows)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def check_output(path: Path, suffix: str, *, mkdir: bool) -> None:
    """Raise InputError, before any work, for an output that could not be written in the end."""
    if path.suffix.lower() != suffix:
        raise InputError(f"{path}: the output must be a {suffix} file")
    if path.is_dir():
        raise InputError(f"{path}: is a folder")
    require_parent(path, mkdir=mkdir)


BUNDLED, NOTHING_SEEN = ModelOptions(), Seen()
