"""Every edit with darkroom-mini, on one sheet: docs/assets/editing.png.

    python benchmarks/editing_sheet.py [--out docs/assets/editing.png]

Takes some minutes on a CPU."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

import darkroom
from darkroom.edit.hires import Hires
from darkroom.edit.outpaint import Margins, canvas
from darkroom.edit.picture import Edit, edit_picture
from darkroom.edit.regions import Region
from darkroom.images import grid, magnified, save_png
from darkroom.pipeline import Pipeline

OUT = Path("docs/assets/editing.png")
APPLE, STYLE = "red apple, 3d style", "3d style"
SIDE = 160  # of a cell


def disc(size: int, centre: tuple[int, int], radius: int) -> Image.Image:
    """A mask, white in a disc."""
    mask = Image.new("L", (size, size))
    x, y = centre
    ImageDraw.Draw(mask).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return mask


def marked(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with its mask in magenta."""
    return Image.composite(Image.new("RGB", image.size, "magenta"), image, mask)


def cells(pipe: Pipeline, seed: int) -> Iterator[tuple[str, Image.Image]]:
    """Each edit's name and picture."""
    draw: dict[str, Any] = {"seed": seed}
    (apple,) = pipe(APPLE, **draw).images
    yield "drawn: " + APPLE, apple
    for strength in (0.4, 0.7):
        result = pipe(f"green apple, {STYLE}", image=apple, strength=strength, **draw)
        yield f"image to image, green apple, strength {strength}", result.images[0]
    mask = disc(128, (64, 90), 44)
    yield "a mask", marked(apple, mask)
    painted = edit_picture(pipe, apple, f"green apple, {STYLE}", Edit(mask=mask), **draw).images[0]
    yield "painted in: green apple", painted
    again = painted
    for k in range(10):
        again = edit_picture(pipe, again, f"green apple, {STYLE}", Edit(mask=mask), seed=seed + k).images[0]
    yield "painted in ten times", again
    wide = edit_picture(pipe, apple, APPLE, Edit(outpaint=Margins(left=32, right=32)), **draw).images[0]
    yield "outpainted, 32 pixels left and right", wide
    yield "its canvas before", canvas(apple, Margins(left=32, right=32))[0]
    for strength in (0.15, 0.3):
        vary = pipe(APPLE, variation_seed=9, variation_strength=strength, **draw)
        yield f"variation {strength}", vary.images[0]
    for how in ("latent", "pixel"):
        hires = Hires(scale=2, upscaler=how, strength=0.6 if how == "latent" else 0.4)
        yield f"second pass at 256, {how}", pipe(APPLE, hires=hires, **draw).images[0]
    large = edit_picture(pipe, apple, APPLE, Edit(upscale=2.0), **draw).images[0]
    yield "enlarged to 256 in tiles", large
    panorama = pipe(f"mountain, {STYLE}", width=320, height=128, tile=128, **draw).images[0]
    yield "panorama, 320 wide, in tiles", panorama
    tile = pipe(f"leaves, {STYLE}", seamless="xy", **draw).images[0]
    twice = Image.new("RGB", (256, 256))
    for place in ((0, 0), (128, 0), (0, 128), (128, 128)):
        twice.paste(tile, place)
    yield "seamless, twice each way", twice
    regions = [
        Region(prompt=f"red apple, {STYLE}", box=(0, 0, 0.5, 1)),
        Region(prompt=f"green apple, {STYLE}", box=(0.5, 0, 1, 1)),
    ]
    both = pipe(f"two apples, {STYLE}", regions=regions, width=192, height=128, **draw).images[0]
    yield "regions: red left, green right", both
    source = Edit(source=APPLE)
    same = edit_picture(pipe, apple, APPLE, source, guidance_scale=1.0, sampler="euler", **draw)
    yield "inverted and drawn back", same.images[0]
    other = edit_picture(pipe, apple, f"green apple, {STYLE}", source, sampler="euler", strength=0.7, **draw)
    yield "inverted, then: green apple", other.images[0]
    yield (
        "two prompts: apple AND cat",
        pipe("red apple, 3d style AND grinning cat, 3d style:0.7", **draw).images[0],
    )
    yield "[red apple:grinning cat:0.4]", pipe(f"[red apple:grinning cat:0.4], {STYLE}", **draw).images[0]


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    pipe = darkroom.load("darkroom-mini")
    labels, pictures = [], []
    for label, image in cells(pipe, options.seed):
        print(label, image.size, flush=True)
        labels.append(label)
        pictures.append(fitted(magnified(image, SIDE)))
    save_png(options.out, grid(pictures, 5, labels=labels))


def fitted(image: Image.Image) -> Image.Image:
    """A picture in a cell, as large as fits."""
    shown = image.copy()
    shown.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (SIDE, SIDE), (236, 236, 236))
    cell.paste(shown, ((SIDE - shown.width) // 2, (SIDE - shown.height) // 2))
    return cell


if __name__ == "__main__":
    main()
