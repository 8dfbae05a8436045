"""The commands `darkroom preview ...`, and the options of previews of other commands.

As in `cli.py`, what needs torch is imported when it is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from darkroom.checkpoint.find import autoencoder_path, model_path, search_folders
from darkroom.cli_options import MaybeInt, MaybePath, MaybeText, ModelDirs, check_files, check_output
from darkroom.errors import InputError

if TYPE_CHECKING:
    from darkroom.pipeline import Pipeline
    from darkroom.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Previews:
    """A picture of how a drawing stands, while it is drawn."""

    preview: MaybePath = None
    """A PNG to write on the way: how the drawing stands."""
    preview_with: MaybeText = None
    """What shows latents: a tiny autoencoder, or a file that darkroom preview fit wrote."""
    preview_every: int = 1
    """Write it on every so many steps."""

    def check(self, *, mkdir: bool) -> None:
        """Raise InputError for what cannot be, before anything is loaded."""
        if self.preview is None and self.preview_with is not None:
            raise InputError("--preview-with is for --preview: name its PNG")
        if self.preview_every < 1:
            raise InputError(f"--preview-every must be 1 or more, not {self.preview_every}")
        if self.preview is not None:
            check_output(self.preview, ".png", mkdir=mkdir)

    def on_step(self, pipe: "Pipeline", model: str, model_dirs: ModelDirs) -> Callable[["Progress"], None]:
        """What to call on each step of a pipeline of the model so called: nothing unless asked for."""
        if self.preview is None:
            return lambda progress: None
        from darkroom.preview import PreviewFile, TinyPreview, find_preview, load_preview

        folders = search_folders(model_dirs)
        if self.preview_with is None:
            previewer = find_preview(model_path(model, folders), pipe.model.spec.latent_space)
        elif self.preview_with.endswith(".json"):
            previewer = load_preview(Path(self.preview_with))
        else:
            from darkroom.checkpoint.load import load_any_autoencoder

            path = autoencoder_path(self.preview_with, folders)
            previewer = TinyPreview(load_any_autoencoder(path, device=pipe.device))
        return PreviewFile(self.preview, previewer, self.preview_every)


NO_PREVIEWS = Previews()


def fit(
    model: Positional[str],
    images: Positional[tuple[Path, ...]] = (),
    *,
    output: Annotated[MaybePath, arg(aliases=["-o"])] = None,
    model_dir: ModelDirs = (),
    size: MaybeInt = None,
    mkdir: bool = False,
) -> None:
    """Fit how a model's latents look, for previews, and keep it with the model.

    Args:
        model: A bundled model, a model folder or file, or one with an autoencoder alone, or its name.
        images: Pictures and folders of them; a dozen are drawn if there are none.
        output: The file to write, in place of preview.json in the model's folder or beside its file.
        model_dir: Folders to search by name, such as ComfyUI's or A1111's.
        size: Resize and crop each picture to a square of this size.
        mkdir: Make the output's folder if it does not exist.
    """
    if output is not None:
        check_output(output, ".json", mkdir=mkdir)
    check_files(images)
    if size is not None and size < 1:
        raise InputError(f"size must be 1 or more, not {size}")
    path = autoencoder_path(model, search_folders(model_dir))
    from darkroom.checkpoint.load import load_any_autoencoder
    from darkroom.evaluate.vae_compare import read_pictures
    from darkroom.preview import fit_preview, save_preview, sidecar

    autoencoder = load_any_autoencoder(path)
    pictures = read_pictures(images, stride=autoencoder.latent_space.stride, size=size)
    found = fit_preview(autoencoder, [picture.float() / 127.5 - 1 for picture in pictures.values()])
    save_preview(output or sidecar(path), found.colours)
    print(f"{output or sidecar(path)}: {found.psnr:.1f} dB of {len(pictures)} pictures")


COMMANDS = {"fit": fit}
