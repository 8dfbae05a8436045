"""The commands `darkroom vae ...`. As in `cli.py`, what needs torch is imported when it is used."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from darkroom.cli_options import MaybeInt, MaybePath, MaybeText, check_files, check_output, print_table


def compare(
    paths: Positional[tuple[str, ...]],
    *,
    output: Annotated[Path, arg(aliases=["-o"])] = Path("vae_compare.png"),
    size: MaybeInt = None,
    steps: int = 100,
    crops: int = 6,
    perceptual: MaybePath = None,
    heads: MaybePath = None,
    device: MaybeText = None,
    mkdir: bool = False,
) -> None:
    """Show what autoencoders keep of pictures, where they lose it, and which half is the limit.

    Args:
        paths: Autoencoders (bundled, files, folders), and pictures or folders of them; drawn ones if there
            are none.
        output: The PNG to write: magnified crops of the places that are kept worst.
        size: Resize and crop each picture to a square of this size.
        steps: Steps of the search for the best latents.
        crops: How many places to show.
        perceptual: Weights of a perceptual distance to measure too, SqueezeNet's or a backbone of LPIPS.
        heads: The heads of LPIPS for that backbone.
        device: Where to compute, such as cpu or cuda:1; an accelerator if there is one.
        mkdir: Make the output's folder if it does not exist.
    """
    check_output(output, ".png", mkdir=mkdir)
    check_files(path for path in (perceptual, heads) if path is not None)
    from darkroom.evaluate.paths import split_arguments

    images, vaes = split_arguments(paths)
    from darkroom.evaluate.vae_compare import compare
    from darkroom.images import save_png
    from darkroom.runtime.device import checked_device, default_device

    found = compare(
        images,
        vaes,
        size=size,
        steps=steps,
        crops=crops,
        perceptual=perceptual,
        heads=heads,
        device=checked_device(device) if device else default_device(),
    )
    print_table(found.table())
    save_png(output, found.sheet)
    print(output)


COMMANDS = {"compare": compare}
