"""The `darkroom` command: each subcommand parses, calls one function of the library, and prints.

Whatever needs torch is imported inside the subcommands, after their arguments are checked, so that help and
mistakes are answered at once.
"""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from darkroom.checkpoint.find import autoencoder_path, list_models, search_folders
from darkroom.cli_draw import Output, edit, generate
from darkroom.cli_options import (
    MaybeInt,
    MaybePath,
    MaybeText,
    ModelDirs,
    check_files,
    check_output,
    print_table,
)
from darkroom.cli_progress import progress_bar
from darkroom.cli_refine import refine
from darkroom.cli_replay import replay
from darkroom.errors import DarkroomError, InputError, unknown
from darkroom.files import require_parent
from darkroom.presets import CARDS, DEFAULT_MODEL, model_folder

Stage = Literal["autoencoder", "denoiser", "refine"]


def demo(
    *, output: Output = Path("demo.png"), model: str = DEFAULT_MODEL, seed: int = 0, mkdir: bool = False
) -> None:
    """Draw a labelled sheet of 24 pictures.

    Args:
        output: The PNG to write.
        model: A bundled model, or a model folder trained on the same prompts as the default one.
        seed: Picture k gets seed + k.
        mkdir: Make the output's folder if it does not exist.
    """
    check_output(output, ".png", mkdir=mkdir)
    model_folder(model)
    from darkroom.images import grid, magnified, save_png
    from darkroom.pipeline import load

    pipe = load(model)
    shown = CARDS.get(model, CARDS[DEFAULT_MODEL]).demo
    with progress_bar("drawing") as on_step:
        result = pipe(shown.prompts, seed=seed, on_step=on_step)
    images = [magnified(image, 96) for image in result.images]
    sheet = grid(images, len(shown.columns), row_labels=shown.rows, column_labels=shown.columns)
    save_png(output, sheet)
    print(f"{output}: {len(shown.prompts)} pictures")


def train(stage: Stage, recipe: Path, overrides: dict[str, str]) -> None:
    """Run or go on with a training; `overrides` are laid over the recipe's fields."""
    from darkroom.config import load_recipe

    if stage == "autoencoder":
        from darkroom.train.autoencoder import AutoencoderRecipe
        from darkroom.train.autoencoder import train as train_autoencoder

        folder = train_autoencoder(load_recipe(recipe, AutoencoderRecipe, overrides))
    elif stage == "refine":
        from darkroom.train.refine import RefineRecipe
        from darkroom.train.refine import train as train_refine

        folder = train_refine(load_recipe(recipe, RefineRecipe, overrides))
    else:
        from darkroom.train.denoiser import DenoiserRecipe
        from darkroom.train.denoiser import train as train_denoiser

        folder = train_denoiser(load_recipe(recipe, DenoiserRecipe, overrides))
    print(f"{folder}: done")


def encode(
    images: Positional[tuple[Path, ...]],
    *,
    output: Output = Path("latents.safetensors"),
    model: str = DEFAULT_MODEL,
    model_dir: ModelDirs = (),
    size: MaybeInt = None,
    mkdir: bool = False,
) -> None:
    """Write the latents of pictures to a safetensors file.

    Args:
        images: Picture files.
        output: The file to write; it holds one tensor (channels, height / f, width / f) for each name.
        model: A bundled model, a model folder or file, or one with an autoencoder alone, or its name.
        model_dir: Folders to search by name, such as ComfyUI's or A1111's.
        size: Resize and crop each picture to a square of this size.
        mkdir: Make the output's folder if it does not exist.
    """
    check_output(output, ".safetensors", mkdir=mkdir)
    _check_images(images, size)
    path = autoencoder_path(model, search_folders(model_dir))
    from darkroom.codec import encode_files

    for name, latents in encode_files(path, images, output, size).items():
        print(f"{name}: {'x'.join(map(str, latents.shape))}")


def reconstruct(
    images: Positional[tuple[Path, ...]],
    *,
    output: Output = Path("reconstruction.png"),
    model: str = DEFAULT_MODEL,
    model_dir: ModelDirs = (),
    size: MaybeInt = None,
    mkdir: bool = False,
) -> None:
    """Show what an autoencoder keeps of pictures: original, reconstruction, error, and the PSNR.

    Args:
        images: Picture files.
        output: The PNG to write, one picture a row.
        model: A bundled model, a model folder or file, or one with an autoencoder alone, or its name.
        model_dir: Folders to search by name, such as ComfyUI's or A1111's.
        size: Resize and crop each picture to a square of this size.
        mkdir: Make the output's folder if it does not exist.
    """
    check_output(output, ".png", mkdir=mkdir)
    _check_images(images, size)
    path = autoencoder_path(model, search_folders(model_dir))
    from darkroom.codec import comparison, reconstruct_files
    from darkroom.images import save_png

    reconstructions = reconstruct_files(path, images, size)
    save_png(output, comparison(reconstructions))
    for path, made in zip(images, reconstructions, strict=True):
        print(f"{path}: {made.psnr:.2f} dB")


def models(*, model_dir: ModelDirs = ()) -> None:
    """List the models that come with the package, the families that can be loaded, and those found.

    Args:
        model_dir: Folders to list the models of, such as ComfyUI's or A1111's, beside DARKROOM_MODELS.
    """
    folders = search_folders(model_dir)
    from darkroom.checkpoint.summary import bundled_rows, family_rows, tiny_rows

    print("With the package:\n")
    print_table(bundled_rows())
    print("\nFamilies that are read from your files:\n")
    print_table(family_rows())
    print("\nTiny autoencoders, as a part:\n")
    print_table(tiny_rows())
    print("\nFLUX.1 [pro] is closed: its weights were never published. flux-dev is what comes nearest.")
    if found := list_models(folders):
        print("\nFound by name:\n")
        head = ("name", "kind", "layout", "path")
        print_table([head, *((f.name, f.kind or "", f.layout or "", str(f.path)) for f in found)])


def fetch(
    repo: Positional[str],
    *,
    revision: MaybeText = None,
    file: tuple[str, ...] = (),
    output: Annotated[MaybePath, arg(aliases=["-o"])] = None,
    fp16: bool = False,
) -> None:
    """Download a model from the Hugging Face hub: the only command that goes online.

    Args:
        repo: A family such as sdxl, or org/name, org/name@revision, org/name/file.
        revision: A branch, tag or commit; the commit is written down and printed.
        file: Patterns of the files to fetch, such as "vae/*"; what darkroom reads if none is given.
        output: A folder of your own instead of the hub's cache.
        fp16: The weights in half precision, where there are several.
    """
    from darkroom.fetch import Plan, fetch
    from darkroom.fetch_files import readable

    def show(plan: Plan, missing: int) -> None:
        print("\n".join(plan.lines()))
        print(f"{readable(missing)} to download" if missing else "already here")

    print(fetch(repo, revision=revision, files=file, fp16=fp16, out=output, on_plan=show))


def export(model: Positional[str], output: Positional[Path], *, mkdir: bool = False) -> None:
    """Write a model in the layout of diffusers.

    Args:
        model: A bundled model or a model folder.
        output: The folder to write, empty or not there yet.
        mkdir: Make the folder's parent if it does not exist.
    """
    require_parent(output, mkdir=mkdir)
    folder = model_folder(model)
    if (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: is in the layout of diffusers already")
    from darkroom.checkpoint.export import export_diffusers

    pipeline = export_diffusers(folder, output)
    print(f"{output}: open it with diffusers' {pipeline}.from_pretrained")


def samplers(*, schedules: bool = False) -> None:
    """List the samplers: order, calls of the network a step, noise, paths, options, paper.

    Args:
        schedules: List the schedules of noise levels instead.
    """
    from darkroom.cli_samplers import sampler_rows, schedule_rows

    print_table(schedule_rows() if schedules else sampler_rows())


def preview() -> None:
    """Fit how a model's latents look, for previews; see `darkroom preview --help`."""


def checkpoint() -> None:
    """Inspect, convert, compare, merge and prune files of weights; see `darkroom checkpoint --help`."""


def vae() -> None:
    """Compare autoencoders; see `darkroom vae --help`."""


def commands(overrides: dict[str, str]) -> dict[str, Callable[..., None]]:
    """The subcommands by name; `train` is given the overrides, which stand outside the parser's options."""

    def train_(stage: Positional[Stage], recipe: Positional[Path]) -> None:
        """Train a stage as a recipe says; the same command goes on with a run that was stopped.

        Any field of the recipe can be given as an option: --train.steps 100, --out runs/second.

        Args:
            stage: What to train.
            recipe: A TOML file.
        """
        train(stage, recipe, overrides)

    return {
        "demo": demo,
        "generate": generate,
        "edit": edit,
        "refine": refine,
        "replay": replay,
        "samplers": samplers,
        "preview": preview,
        "train": train_,
        "encode": encode,
        "reconstruct": reconstruct,
        "models": models,
        "export": export,
        "fetch": fetch,
        "checkpoint": checkpoint,
        "vae": vae,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; the parser exits by itself (help: 0, mistakes: 2)."""
    args = list(sys.argv[1:] if argv is None else argv)
    # Threads that wait by spinning for long take the cores from the ones they wait for as soon as anything
    # else runs; not to spin at all costs a single picture a tenth of its time.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            group, rest = _group(args)
            if group is not None:
                _run(group, rest, f"darkroom {args[0]}", GROUPS[args[0]])
                return 0
            args, overrides = split_overrides(args) if args[:1] == ["train"] else (args, {})
            _run(commands(overrides), args, "darkroom", "Train, run and inspect latent diffusion models.")
    except DarkroomError as error:
        print(f"darkroom: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("darkroom: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough; nor must the interpreter's exit write
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


GROUPS = {
    "checkpoint": "Say what files of weights are; make others.",
    "preview": "Show drawings before they are done.",
    "vae": "Compare autoencoders.",
}


def _group(args: list[str]) -> tuple[dict[str, Callable[..., None]] | None, list[str]]:
    """The commands of a group and their arguments, where the first word names one."""
    if not args or args[0] not in GROUPS:
        return None, args
    return import_module(f"darkroom.cli_{args[0]}").COMMANDS, args[1:]


def _run(known: dict[str, Callable[..., None]], args: list[str], prog: str, description: str) -> None:
    """Call the command that the first argument names; a mistake there names the nearest one.

    Only that command's options are looked at, which takes a moment for each.
    """
    if not args or args[0] in ("-h", "--help"):
        print(_overview(known, prog, description))
        if not args:
            raise InputError(f"name a command, as {prog} {next(iter(known))}")
        return
    if args[0] not in known:
        raise unknown("command", args[0], known)
    config = (tyro.conf.FlagCreatePairsOff,)
    tyro.cli(known[args[0]], prog=f"{prog} {args[0]}", args=args[1:], config=config)


def _overview(known: dict[str, Callable[..., None]], prog: str, description: str) -> str:
    """What there is, one command a line."""
    width = max(map(len, known))
    lines = [
        f"  {name.ljust(width)}  {(command.__doc__ or '').splitlines()[0]}" for name, command in known.items()
    ]
    return "\n".join(
        [f"usage: {prog} COMMAND ...", "", description, "", *lines, "", f"{prog} COMMAND --help says more."]
    )


def split_overrides(args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--dotted.field value` and `--dotted.field=value` out of a command line; the parser gets the rest.

    Raises InputError for a field without a value.
    """
    rest: list[str] = []
    overrides: dict[str, str] = {}
    remaining = iter(args)
    for token in remaining:
        if not token.startswith("--") or token == "--help":
            rest.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        given = value if equals else next(remaining, None)
        if given is None:
            raise InputError(f"--{name}: no value given")
        overrides[name.replace("-", "_")] = given
    return rest, overrides


def _check_images(images: Sequence[Path], size: int | None) -> None:
    if not images:
        raise InputError("name at least one picture")
    if size is not None and size < 1:
        raise InputError(f"size must be 1 or more, not {size}")
    check_files(images)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"darkroom: warning: {message}", file=sys.stderr)
