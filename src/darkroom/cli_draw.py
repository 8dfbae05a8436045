"""The commands that draw: `darkroom generate` and `darkroom edit`, and their options.

As in `cli.py`, what needs torch is imported when it is used.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from darkroom.cli_options import (
    BUNDLED,
    NOTHING_SEEN,
    MaybeFloat,
    MaybeInt,
    MaybePath,
    MaybeText,
    ModelOptions,
    Seen,
    check_files,
    check_output,
)
from darkroom.cli_preview import NO_PREVIEWS, Previews
from darkroom.cli_progress import progress_bar
from darkroom.errors import InputError

if TYPE_CHECKING:
    from darkroom.pipeline import Result
    from darkroom.progress import Progress

Output = Annotated[Path, arg(aliases=["-o"])]
Words = Annotated[tuple[str, ...], UseAppendAction]  # may be given several times


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How it is drawn; what is not given comes from the model."""

    negative: str = ""
    """What not to draw."""
    steps: MaybeInt = None
    """Number of sampling steps."""
    guidance: MaybeFloat = None
    """How strongly the prompt guides; 1 turns guidance off."""
    true_guidance: float = 1.0
    """Guidance by a second call, for models that are told the other one (FLUX.1 dev)."""
    guide: Words = ()
    """More of guidance: rescale=0.7, interval=[0.1,0.8], apg, zero_star, perturbed.scale=3, skip_layers."""
    seed: MaybeInt = None
    """Decides the noise; picture k gets seed + k. Random if not given."""
    variation_seed: MaybeInt = None
    """Vary the picture of the seed: towards the noise of this one, picture k's + k."""
    variation: float = 0.0
    """How far to vary, 0 to 1."""
    count: int = 1
    """Number of pictures."""
    sampler: MaybeText = None
    """One of darkroom samplers."""
    sampler_option: Words = ()
    """An option of the sampler, as eta=0.5; may be given several times."""
    schedule: MaybeText = None
    """How the noise levels are spaced: one of darkroom samplers --schedules."""
    schedule_option: Words = ()
    """An option of the schedule, as rho=5 or shift=2."""
    sigmas: MaybeText = None
    """Noise levels of your own in place of a schedule, falling, as 14.6,3,0.8,0."""
    clip_skip: MaybeInt = None
    """Read CLIP to this layer from its last, which is 1."""
    tile: MaybeInt = None
    """Draw in tiles of so many pixels, for pictures larger than the model's."""
    tile_overlap: MaybeInt = None
    """Pixels that tiles share; a quarter of a tile."""
    seamless: Literal["no", "x", "y", "xy"] = "no"
    """Opposite edges meet: left and right (x), top and bottom (y), or both."""
    compat: str = "darkroom"
    """Draw as another program does: diffusers, reference, comfy or a1111."""
    exact: bool = False
    """Make a picture's bytes independent of the others of the call, at some cost in time."""

    def options(self) -> dict[str, Any]:
        """As options of a call of the library."""
        from darkroom.diffusion.guidance_settings import read_guidance

        return {
            "negative_prompt": self.negative,
            "steps": self.steps,
            "guidance_scale": self.guidance,
            "true_guidance_scale": self.true_guidance,
            "guidance": read_guidance(self.guide) if self.guide else None,
            "seed": self.seed,
            "variation_seed": self.variation_seed,
            "variation_strength": self.variation or None,
            "count": self.count,
            "sampler": self.sampler,
            "sampler_options": _named(self.sampler_option, "--sampler-option"),
            "schedule": self.schedule,
            "schedule_options": _named(self.schedule_option, "--schedule-option"),
            "sigmas": None if self.sigmas is None else _numbers(self.sigmas, "--sigmas"),
            "clip_skip": self.clip_skip,
            "tile": self.tile,
            "tile_overlap": self.tile_overlap,
            "seamless": None if self.seamless == "no" else self.seamless,
            "compat": self.compat,
            "exact": self.exact,
        }


@dataclass(frozen=True, kw_only=True)
class SecondPass:
    """A second, larger pass over what was drawn."""

    hires: float = 1.0
    """Draw again this many times larger, from what came out."""
    hires_with: str = "pixel"
    """What enlarges between the passes: pixel, latent, or the file of an upscaler (ESRGAN and its kin)."""
    hires_strength: float = 0.5
    """How far the second pass goes, 0 to 1."""
    hires_steps: MaybeInt = None
    """Its steps; the first pass's if not given."""

    def options(self) -> dict[str, Any]:
        """As options of a call of the library."""
        if self.hires == 1:
            if self != ONE_PASS:
                raise InputError(
                    "--hires-with, --hires-strength and --hires-steps are for --hires, such as 2"
                )
            return {}
        from darkroom.edit.hires import Hires

        how = {"upscaler": self.hires_with, "strength": self.hires_strength, "steps": self.hires_steps}
        return {"hires": Hires(scale=self.hires, **how)}


PLAIN, ONE_PASS = Drawing(), SecondPass()


def generate(
    prompt: Positional[str],
    *,
    output: Output = Path("out.png"),
    size: MaybeText = None,
    chosen: Annotated[ModelOptions, arg(name="")] = BUNDLED,
    drawing: Annotated[Drawing, arg(name="")] = PLAIN,
    seen: Annotated[Seen, arg(name="")] = NOTHING_SEEN,
    second: Annotated[SecondPass, arg(name="")] = ONE_PASS,
    previews: Annotated[Previews, arg(name="")] = NO_PREVIEWS,
    region: Words = (),
    wildcards: Annotated[tuple[Path, ...], UseAppendAction] = (),
    grid: tuple[str, ...] = (),
    refiner_start: MaybeFloat = None,
    refine: Literal["no", "regression", "diffusion"] = "no",
    report: bool = False,
    no_metadata: bool = False,
    mkdir: bool = False,
) -> None:
    """Draw pictures of a prompt.

    Args:
        prompt: What to draw; the number of a class for models of classes, "" for models without prompts.
        output: The PNG to write; of several, name-0.png, name-1.png and so on.
        size: N or WIDTHxHEIGHT, in pixels.
        region: A prompt for a part of the picture, LEFT,TOP,RIGHT,BOTTOM:PROMPT, in 0 to 1; repeatable.
        wildcards: Folders of lists for __name__ in the prompt; {a|b} needs none.
        grid: A contact sheet instead: x=NAME=VALUES and y=NAME=VALUES, as x=steps=10,20.
        refiner_start: The share of the way after which the refiner goes on (0.8).
        refine: Put detail back that the autoencoder lost, by the model's own refine networks.
        report: Say what the text encoders read of the prompt.
        no_metadata: Leave the parameters out of the PNG.
        mkdir: Make the output's folder if it does not exist.
    """
    check_output(output, ".png", mkdir=mkdir)
    width, height = parse_size(size)
    chosen.check()
    seen.check()
    previews.check(mkdir=mkdir)
    check_files(wildcards)
    if drawing.count < 1:
        raise InputError(f"--count must be 1 or more, not {drawing.count}")
    if grid and (report or previews.preview is not None):
        raise InputError("--grid draws many pictures: --preview and --report are for one")
    from darkroom.text.wildcards import expand

    pictures = seen.options()  # before the model, which may take minutes
    options: dict[str, Any] = (
        drawing.options() | second.options() | {"width": width, "height": height} | pictures
    )
    options |= {
        "regions": [_region(text) for text in region] or None,
        "refine": None if refine == "no" else refine,
    }
    seed = secrets.randbelow(2**32) if drawing.seed is None else drawing.seed
    # Each picture draws lines of its own; the cells of a sheet are of one prompt.
    count = 1 if grid else drawing.count
    expands = drawing.compat == "darkroom" or wildcards
    prompts = expand(prompt, folders=wildcards, seed=seed, count=count) if expands else [prompt] * count
    options |= {"seed": seed, "count": drawing.count // count}
    pipe, refiner = chosen.load()
    options |= {"refiner": refiner, "refiner_start": refiner_start}
    preview = previews.on_step(pipe, chosen.model, chosen.model_dir)
    if grid:
        _draw_sheet(pipe, prompts, options, grid, output, metadata=not no_metadata)
        return
    with progress_bar("drawing") as bar:

        def on_step(progress: "Progress") -> None:
            bar(progress)
            preview(progress)

        result = pipe(prompts, on_step=on_step, **options)
    if report:
        print("\n".join(str(read) for read in result.prompts))
    save(result, output, metadata=not no_metadata)


def edit(
    image: Positional[Path],
    prompt: Positional[str] = "",
    *,
    output: Output = Path("edited.png"),
    chosen: Annotated[ModelOptions, arg(name="")] = BUNDLED,
    drawing: Annotated[Drawing, arg(name="")] = PLAIN,
    mask: MaybePath = None,
    feather: MaybeInt = None,
    strength: MaybeFloat = None,
    outpaint: MaybeText = None,
    upscale: MaybeText = None,
    source: MaybeText = None,
    no_metadata: bool = False,
    mkdir: bool = False,
) -> None:
    """Change a picture by a prompt: all of it, where a mask says, around it, larger, or through its noise.

    Args:
        image: The picture.
        prompt: What it shall show.
        output: The PNG to write; of several, name-0.png, name-1.png and so on.
        mask: A picture as large, white where to paint; every pixel elsewhere stays as it is.
        feather: Pixels over which the seam is blended, inside the mask.
        strength: How far to go from the picture, 0 to 1.
        outpaint: Paint around it: N pixels, or LEFT,TOP,RIGHT,BOTTOM.
        upscale: Enlarge it first: a factor, or an upscaler's file; with that and no prompt, only enlarge.
        source: What it shows: find the noise that this prompt gives it from, and draw the other from there.
        no_metadata: Leave the parameters out of the PNG.
        mkdir: Make the output's folder if it does not exist.
    """
    check_output(output, ".png", mkdir=mkdir)
    factor = _factor(upscale)
    check_files(path for path in (image, mask, factor) if isinstance(path, Path))
    from PIL.Image import fromarray

    from darkroom.data.folder import load_mask, load_picture
    from darkroom.edit.outpaint import Margins
    from darkroom.edit.picture import Edit, edit_picture, enlarge
    from darkroom.images import save_png

    picture = fromarray(load_picture(image))
    margins = None if outpaint is None else Margins.parse(outpaint)
    how = Edit(
        mask=None if mask is None else load_mask(mask),
        outpaint=margins,
        upscale=factor,
        source=source,
    )
    if isinstance(factor, Path) and not prompt and strength is None and margins is source is None:
        save_png(output, enlarge(picture, factor))
        print(output)
        return
    chosen.check()
    options = drawing.options() | {"strength": strength, "feather": feather}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    pipe, _ = chosen.load()
    with progress_bar("drawing") as bar:
        result = edit_picture(pipe, picture, prompt, how, on_step=bar, **given)
    save(result, output, metadata=not no_metadata)


def save(result: "Result", output: Path, *, metadata: bool) -> None:
    """Write a call's pictures, and say their names and seeds."""
    from darkroom.images import format_parameters, save_png

    count = len(result.images)
    names = [output] if count == 1 else [output.with_stem(f"{output.stem}-{k}") for k in range(count)]
    for path, drawn, seed, made in zip(names, result.images, result.seeds, result.parameters, strict=True):
        save_png(
            path, drawn, format_parameters(made.prompt, made.negative, made.values) if metadata else None
        )
        print(f"{path}: seed {seed}")


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """N or WxH as (width, height)."""
    if text is None:
        return None, None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise InputError(f"--size must be N or WIDTHxHEIGHT, such as 128 or 128x96, not {text!r}")
    return int(parts[0]), int(parts[-1])


def _draw_sheet(
    pipe: Any,
    prompts: list[str],
    options: dict[str, Any],
    grid: Sequence[str],
    output: Path,
    *,
    metadata: bool,
) -> None:
    from darkroom.sheet import parse_grid, sheet

    if len(prompts) > 1:
        raise InputError(
            f"--grid draws one prompt, and this one stands for {len(prompts)}: use an axis prompt="
        )
    x, y = parse_grid(grid)
    given = {name: value for name, value in options.items() if value is not None}
    with progress_bar("drawing") as on_step:
        made = sheet(pipe, prompts[0], given, x=x, y=y, on_step=on_step)  # pyright: ignore[reportArgumentType]
    made.save(output, metadata=metadata)
    print(f"{output}: {len(made.results)} cells")


def _named(words: Sequence[str], option: str) -> dict[str, Any] | None:
    """Words such as eta=0.5 as options by name, their values as in TOML."""
    from darkroom.config import read_value

    named: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise InputError(f"{option} is NAME=VALUE, such as eta=0.5, not {word!r}")
        named[name.strip().replace("-", "_")] = read_value(text)
    return named or None


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} must be numbers with commas between them, not {text!r}") from error


def _region(text: str) -> Any:
    from darkroom.edit.regions import Region

    box, colon, prompt = text.partition(":")
    if not colon:
        raise InputError(f"--region must be LEFT,TOP,RIGHT,BOTTOM:PROMPT, not {text!r}")
    return Region(prompt=prompt.strip(), box=tuple(_numbers(box, "--region")))  # pyright: ignore[reportArgumentType]


def _factor(text: str | None) -> float | Path | None:
    """A factor to enlarge by, or the file that enlarges."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return Path(text)
