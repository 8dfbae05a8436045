"""The command `darkroom refine`. As in `cli.py`, what needs torch is imported when it is used."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from darkroom.cli_options import MaybeFloat, MaybeInt, MaybePath, MaybeText, check_files, check_output
from darkroom.errors import InputError
from darkroom.presets import DEFAULT_MODEL


def refine(
    images: Positional[tuple[Path, ...]],
    *,
    output: Annotated[MaybePath, arg(aliases=["-o"])] = None,
    model: str = DEFAULT_MODEL,
    autoencoder: MaybeText = None,
    mode: Literal["diffusion", "regression"] = "diffusion",
    seed: int = 0,
    steps: MaybeInt = None,
    strength: MaybeFloat = None,
    device: MaybeText = None,
    mkdir: bool = False,
) -> None:
    """Put detail back into pictures that a model drew, which its autoencoder lost.

    Args:
        images: Pictures as they were decoded.
        output: The PNG to write; name-refined.png beside each picture if not given.
        model: The model whose autoencoder decoded them, or a file of refine networks.
        autoencoder: With a file of networks, the autoencoder that they were trained for.
        mode: diffusion draws detail that could be; regression gives what is nearest, which is smooth.
        seed: Decides the detail of the diffusion mode; picture k gets seed + k.
        steps: Sampling steps of the diffusion mode.
        strength: How much of the detail is drawn, 0 to 1.
        device: Where to compute, such as cpu or cuda:1; an accelerator if there is one.
        mkdir: Make the output's folder if it does not exist.
    """
    if not images:
        raise InputError("name at least one picture")
    if output is not None and len(images) > 1:
        raise InputError(
            f"{output}: one output for {len(images)} pictures: leave it out, or name one picture"
        )
    check_files(images)
    names = [output or path.with_name(f"{path.stem}-refined.png") for path in images]
    for name in names:
        check_output(name, ".png", mkdir=mkdir)
    from PIL.Image import fromarray

    from darkroom.checkpoint.load import load_any_autoencoder
    from darkroom.data.folder import load_picture
    from darkroom.images import save_png, to_pil, to_tensor
    from darkroom.refine import load_refine
    from darkroom.rng import image_seeds
    from darkroom.runtime.device import checked_device, default_device

    place = checked_device(device) if device else default_device()
    given = load_any_autoencoder(autoencoder, device=place) if autoencoder else None
    networks = load_refine(model, autoencoder=given, device=place)
    for path, name, seed_ in zip(images, names, image_seeds(seed, len(images)), strict=True):
        image = to_tensor(fromarray(load_picture(path)))[None].to(place)
        made = networks.refine(image, [seed_], mode=mode, steps=steps, strength=strength)
        save_png(name, to_pil(made)[0])
        print(f"{name}: {mode}, seed {seed_}" if mode == "diffusion" else f"{name}: {mode}")
