"""The command `darkroom replay`. As in `cli.py`, what needs torch is imported when it is used."""

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from darkroom.checkpoint.find import search_folders
from darkroom.cli_options import MaybePath, MaybeText, ModelDirs, check_files, check_output
from darkroom.errors import DarkroomError, InputError

Pictures = Annotated[tuple[Path, ...], arg(metavar="PATH"), UseAppendAction]


def replay(
    picture: Positional[Path],
    *,
    output: Annotated[MaybePath, arg(aliases=["-o"])] = None,
    model: MaybeText = None,
    model_dir: ModelDirs = (),
    tokenizers: MaybePath = None,
    device: MaybeText = None,
    image: Pictures = (),
    sampler: MaybeText = None,
    schedule: MaybeText = None,
    mkdir: bool = False,
) -> None:
    """Draw a picture again from its file, and say whether it is the same and why if not.

    Args:
        picture: A PNG that darkroom wrote, or A1111's web UI.
        output: The PNG to write.
        model: The model, where the one that the file names is not to be found.
        model_dir: Folders to search by name, such as ComfyUI's or A1111's.
        tokenizers: Where to look first for tokenizers that no file holds.
        device: Where to compute; the kind of device that the file names if there is one.
        image: Where to look for pictures that it was made from: files or folders.
        sampler: A sampler in place of the file's.
        schedule: A schedule in place of the file's.
        mkdir: Make the output's folder if it does not exist.
    """
    check_files([picture, *image])
    search_folders(model_dir)
    if output is not None:
        check_output(output, ".png", mkdir=mkdir)
        if output.exists() and output.samefile(picture):
            raise InputError(f"{output}: is the picture to draw again: name another")
    from darkroom.cli_progress import progress_bar
    from darkroom.images import format_parameters, save_png
    from darkroom.replay import replay

    chosen: dict[str, Any] = {"sampler": sampler, "schedule": schedule}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    with progress_bar("drawing") as on_step:
        found = replay(
            picture,
            model=model,
            model_dirs=model_dir,
            tokenizers=tokenizers,
            device=device,
            pictures=image,
            on_step=on_step,
            **chosen,
        )
    made = found.parameters
    if output is not None:
        save_png(output, found.image, format_parameters(made.prompt, made.negative, made.values))
    head, *rest = found.lines()
    if not found.same:
        raise DarkroomError("\n".join([f"{picture}: {head}", *rest]))
    print("\n".join([f"{picture}: {head}", *rest]))
