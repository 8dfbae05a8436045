r"""Autoencoders side by side: the bundled ones and any others, as a table in Markdown and a sheet of crops.

    python benchmarks/vae_compare.py taef2_encoder.safetensors --out docs/assets/vae_compare.png
    python benchmarks/vae_compare.py taef2_encoder.safetensors photos --size 256 --search

Named are autoencoders, pictures and folders of pictures, in any order; without pictures the drawn handful is
used. `--search` also says how the search for z* goes on with more steps, on the first pictures.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from darkroom.checkpoint.load import load_any_autoencoder
from darkroom.evaluate.ceiling import LEARNING_RATE, STEPS, ceiling
from darkroom.evaluate.paths import names, split_arguments
from darkroom.evaluate.reconstruction import measure
from darkroom.evaluate.vae_compare import common_stride, compare, read_pictures
from darkroom.images import save_png
from darkroom.runtime.device import checked_device, default_device

BUNDLED = ("darkroom-mini", "darkroom-shapes")
SEARCHED = 4  # pictures
SEARCHES = (0, 25, 50, 100, 200, 400, 800)


def search(images: Sequence[Path], vaes: Sequence[str], size: int | None, device: str | None) -> str:
    """The PSNR of D(z*) by the number of steps, as a table in Markdown."""
    place = checked_device(device) if device else default_device()
    autoencoders = [load_any_autoencoder(vae).to(place) for vae in vaes]
    pictures = list(read_pictures(images, stride=common_stride(autoencoders), size=size).values())[:SEARCHED]
    rows = [("steps", *map(str, SEARCHES)), ("---",) * (len(SEARCHES) + 1)]
    for name, autoencoder in zip(names(vaes), autoencoders, strict=True):
        found = [measure(autoencoder, pictures).quality.psnr]
        for steps in tqdm(SEARCHES[1:], desc=name, disable=None):
            found.append(ceiling(autoencoder, pictures, steps=steps, learning_rate=LEARNING_RATE).psnr)
        rows.append((name, *(f"{value:.2f}" for value in found)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("paths", nargs="*", help="autoencoders, pictures, folders of pictures")
    parser.add_argument("--out", type=Path, help="where to write the sheet, a PNG")
    parser.add_argument("--size", type=int, help="squares of this size instead of whole pictures")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the search for z*")
    parser.add_argument("--perceptual", type=Path, help="weights of a perceptual distance")
    parser.add_argument("--heads", type=Path, help="LPIPS' heads")
    parser.add_argument("--device")
    parser.add_argument("--search", action="store_true", help="also the search at other numbers of steps")
    args = parser.parse_args()
    images, vaes = split_arguments([*BUNDLED, *args.paths])
    options = {"perceptual": args.perceptual, "heads": args.heads, "device": args.device}
    found = compare(images, vaes, size=args.size, steps=args.steps, **options)
    print(found.markdown())
    if args.out is not None:
        save_png(args.out, found.sheet)
    if args.search:
        print("\n" + search(images, vaes, args.size, args.device))


if __name__ == "__main__":
    main()
