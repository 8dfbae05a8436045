"""Any number of autoencoders on the same pictures: a table, and a sheet of the places where they fail."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from darkroom.checkpoint.build import Autoencoder
from darkroom.checkpoint.load import load_any_autoencoder
from darkroom.data.folder import load_picture
from darkroom.errors import InputError
from darkroom.evaluate.ceiling import STEPS, Ceiling, ceiling
from darkroom.evaluate.handful import SIZE, SMALLEST, handful
from darkroom.evaluate.paths import names, picture_files
from darkroom.evaluate.reconstruction import Distance, Reconstructed, measure
from darkroom.evaluate.vae_sheet import CROPS, Column, sheet
from darkroom.nn.perceptual import LPIPS, load_perceptual
from darkroom.runtime.device import checked_device, default_device

# In dB: better latents would take away more than half of the squared error.
HALF = 10 * math.log10(2)
SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One autoencoder: what it keeps of the pictures, D(E(x)), and what its decoder could show, D(z*)."""

    name: str
    reconstructed: Reconstructed
    ceiling: Ceiling

    @property
    def gain(self) -> float:
        """PSNR of D(z*) less that of D(E(x)), in dB."""
        before, after = self.reconstructed.quality.psnr, self.ceiling.psnr
        return 0.0 if before == after else after - before

    @property
    def verdict(self) -> str:
        """Which half loses more of the squared error: the encoder if better latents undo more than half."""
        if not self.reconstructed.finite["float32"]:
            return "gives numbers that are not finite"
        if self.gain > HALF:
            return f"encoder is the limit ({self.gain:+.1f} dB by better latents)"
        return f"decoder is the limit ({self.gain:+.1f} dB)"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row for each autoencoder, in the order given, and the sheet of crops.

    `distance` is what the perceptual distance is called, None without one.
    """

    rows: tuple[Row, ...]
    sheet: Image.Image
    distance: str | None = None

    def table(self) -> list[tuple[str, ...]]:
        """The figures as text, the first row their names; PSNR and gain in dB."""
        return [_head(self.distance), *(_cells(row) for row in self.rows)]

    def markdown(self) -> str:
        """The table in Markdown."""
        head, *rows = self.table()
        lines = [head, ("---",) * len(head), *rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def compare(
    images: Sequence[Path],
    vaes: Sequence[str | Path],
    *,
    size: int | None = None,
    steps: int = STEPS,
    crops: int = CROPS,
    perceptual: Path | None = None,
    heads: Path | None = None,
    device: str | torch.device | None = None,
) -> Comparison:
    """Compare autoencoders, anything that `load_any_autoencoder` reads, on pictures.

    `images` are files and folders; the drawn `handful` without any. Pictures keep their size, or become
    squares of `size`, and lose at the edges what does not divide by every stride. `steps` are those of the
    search for z*, `crops` the rows of the sheet. `perceptual` is a file of SqueezeNet in its Caffe training;
    with `heads`, LPIPS' v0.1 heads, a file of the backbone that they are for. The device is the accelerator
    if there is one. Raises InputError for what cannot be read or is too small, before anything is measured.
    """
    _check_counts(vaes, size=size, steps=steps, crops=crops)
    place = checked_device(device) if device else default_device()
    name, distance = _perceptual(perceptual, heads, place)
    autoencoders = [_load(vae) for vae in vaes]
    pictures = read_pictures(images, stride=common_stride(autoencoders), size=size)
    with tqdm(total=len(vaes) * len(pictures) * steps, unit=" steps", delay=1, disable=None) as bar:
        rows = []
        for label, autoencoder in zip(names(vaes), autoencoders, strict=True):
            bar.set_description(label)
            autoencoder.to(place)
            found = measure(autoencoder, list(pictures.values()), perceptual=distance)
            best = ceiling(autoencoder, list(pictures.values()), steps=steps, on_step=bar.update)
            autoencoder.to("cpu")
            rows.append(Row(name=label, reconstructed=found, ceiling=best))
    return Comparison(rows=tuple(rows), sheet=comparison_sheet(pictures, rows, crops), distance=name)


def comparison_sheet(pictures: Mapping[str, Tensor], rows: Sequence[Row], crops: int = CROPS) -> Image.Image:
    """Where pictures, uint8 (3, H, W) by name, are kept worst: the original, D(E(x)) and D(z*) of each."""
    columns = []
    for row in rows:
        columns.append(Column(f"{row.name} D(E(x))", row.reconstructed.images))
        columns.append(Column(f"{row.name} D(z*)", row.ceiling.images))
    return sheet(pictures, columns, judged=columns[::2], crops=crops)


def read_pictures(images: Sequence[Path], *, stride: int, size: int | None = None) -> dict[str, Tensor]:
    """Pictures by name, uint8 (3, H, W), their sides cut to multiples of `stride`; as in `compare`.

    Raises InputError for a picture that cannot be read or has less than 32 pixels a side.
    """
    if not images:
        side = (size or SIZE) // stride * stride
        return handful(side)
    pictures: dict[str, Tensor] = {}
    for path in picture_files(images):
        label = path.name if path.name not in pictures else str(path)
        pictures[label] = _read(path, stride, size)
    return pictures


def common_stride(autoencoders: Iterable[Autoencoder]) -> int:
    """The smallest number of pixels that every stride divides."""
    return math.lcm(*(autoencoder.latent_space.stride for autoencoder in autoencoders))


def _read(path: Path, stride: int, size: int | None) -> Tensor:
    picture = torch.from_numpy(load_picture(path, size).copy()).permute(2, 0, 1)
    height, width = (side // stride * stride for side in picture.shape[1:])
    if min(height, width) < SMALLEST:
        found, needed = f"{picture.shape[2]}x{picture.shape[1]}", -(-SMALLEST // stride) * stride
        raise InputError(f"{path}: {found} is too small: {needed} pixels a side are needed")
    top, left = (picture.shape[1] - height) // 2, (picture.shape[2] - width) // 2
    return picture[:, top : top + height, left : left + width].contiguous()


def _check_counts(vaes: Sequence[str | Path], *, size: int | None, steps: int, crops: int) -> None:
    if not vaes:
        raise InputError("name at least one autoencoder")
    for name, value in {"size": size, "steps": steps, "crops": crops}.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")


def _load(vae: str | Path) -> Autoencoder:
    try:
        autoencoder = load_any_autoencoder(vae)
    except InputError as error:
        raise InputError(f"cannot compare {error}") from error  # it starts with the path
    if autoencoder.config.in_channels != 3:
        raise InputError(
            f"cannot compare {vae}: it is for {autoencoder.config.in_channels} channels, not for RGB"
        )
    return autoencoder


def _perceptual(
    weights: Path | None, heads: Path | None, device: torch.device
) -> tuple[str | None, Distance | None]:
    """What the distance is called, and the distance, of images anywhere."""
    if weights is None:
        if heads is not None:
            raise InputError(
                f"{heads}: heads need the file of their backbone too, as the perceptual distance"
            )
        return None, None
    network = load_perceptual("squeeze" if heads is None else "lpips", weights, heads).to(device)
    name = f"LPIPS ({network.backbone})" if isinstance(network, LPIPS) else "SqueezeNet"
    return name, lambda a, b: network(a.to(device), b.to(device))


def _head(distance: str | None) -> tuple[str, ...]:
    perceptual = () if distance is None else (distance,)
    quality = ("PSNR D(E(x))", "SSIM", "GMSD", *perceptual, "PSNR D(z*)", "gain")
    return (
        "autoencoder",
        "latents",
        "parameters",
        *quality,
        "finite in",
        "mean",
        "std",
        "largest",
        "verdict",
    )


def _cells(row: Row) -> tuple[str, ...]:
    found, quality, latents = row.reconstructed, row.reconstructed.quality, row.reconstructed.latents
    perceptual = () if quality.perceptual is None else (f"{quality.perceptual:.4f}",)
    return (
        row.name,
        f"{found.channels} ch, f{found.stride}",
        f"{found.parameters / 1e6:.2f} M",
        *(f"{quality.psnr:.2f}", f"{quality.ssim:.4f}", f"{quality.gmsd:.4f}", *perceptual),
        *(f"{row.ceiling.psnr:.2f}", f"{row.gain:+.2f}"),
        " ".join(short for dtype, short in SHORT.items() if found.finite[dtype]) or "none",
        *(f"{latents.mean:.2f}", f"{latents.std:.2f}", f"{latents.largest:.1f}"),
        row.verdict,
    )
