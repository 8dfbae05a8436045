"""Pack darkroom-mini's training pictures small, to take them to another machine: WebP at the training size.

    python benchmarks/mini_pack.py --data ../shared/data --out runs/mini-data

Emoji keep every pixel, but for the skin-tone variants (quality 93); photos have a shorter side of
`--photo-side` px: 192 leaves room for stage 1's crops, stage 2 needs 128 (quality 90). The recipes read it as
they read what `mini_data.py` writes.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mini_data import Row, rows
from PIL import Image, ImageOps

from darkroom.images import to_rgb


def options_of(row: Row) -> dict[str, int | bool]:
    """How a row's picture is compressed."""
    if row.kind == "photo":
        return {"quality": 90}
    return {"quality": 93} if row.skin_tone else {"lossless": True}


def pack(data: Path, row: Row, out: Path, number: int, photo_side: int) -> dict[str, str]:
    """Write one picture; returns its line of metadata."""
    with Image.open(data / row.path) as file:
        image = to_rgb(ImageOps.exif_transpose(file))
    if row.kind == "photo":
        scale = photo_side / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    name = f"{number:05d}.webp"
    image.save(out / name, "WEBP", method=4, **options_of(row))
    return {"file_name": name, "text": row.caption, "kind": row.kind, "concept": row.concept}


def main() -> None:
    """Pack one split and print its size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/mini-data"))
    parser.add_argument("--split", default="train")
    parser.add_argument("--photo-side", type=int, default=192)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [row for row in rows(options.data) if row.split == options.split]
    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(pack, options.data, row, options.out, k, options.photo_side)
            for k, row in enumerate(chosen)
        ]
        lines = [json.dumps(job.result()) + "\n" for job in jobs]
    (options.out / "metadata.jsonl").write_text("".join(lines))
    total = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"{len(lines)} pictures, {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
