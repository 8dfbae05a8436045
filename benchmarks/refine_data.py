r"""The pictures of `refine`: what is trained on, and what is set aside before any training.

Emoji and photos of groceries as darkroom-mini's autoencoder had them (`mini_data.py`), and photos of 30
subjects. Set aside are the emoji concepts and grocery photos that darkroom-mini never saw, and three in ten
subjects: a fifth of the concepts to choose settings by ("dev": none of the subjects, as it happens), the
rest to score on ("test"). Emoji concepts that are trained on in another style are in neither part.

    python benchmarks/refine_data.py --data ../shared/data --out runs/refine-data --split train
    python benchmarks/refine_data.py --data ../shared/data --out pack --split train --copy --limit 500

`--copy` puts the pictures themselves into the folder, to take them to another machine: photos as they are,
emoji as lossless WebP; `--limit` takes so many of each kind, chosen by hash.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from mini_data import Row, by_hash, rows
from PIL import Image

from darkroom.data.folder import in_split
from darkroom.images import to_rgb

KINDS = ("emoji", "photo", "subject")
HELD_SUBJECTS, DEV = 0.3, 0.2


def refine_rows(data: Path) -> list[Row]:
    """Every picture that is used, `split` being "train", "dev" or "test"; skin-tone variants are left out."""
    seen = [row for row in rows(data) if row.split != "pair" and not row.skin_tone]
    return [_divided(row) for row in (*seen, *_subjects(data))]


def _subjects(data: Path) -> Iterator[Row]:
    for path in sorted((data / "dreambooth512").glob("*/*.jpg")):
        name = path.parent.name
        held = in_split(name, HELD_SUBJECTS, "subject")
        caption = f"a photo of {name.rstrip('0123456789').replace('_', ' ')}"
        split = "held" if held else "train"
        yield Row(f"dreambooth512/{name}/{path.name}", caption, "photo", name, "subject", split, False)


def _divided(row: Row) -> Row:
    """What is set aside, in two parts that share no concept."""
    if row.split == "train":
        return row
    return replace(row, split="dev" if in_split(row.concept, DEV, "dev") else "test")


def chosen(data: Path, split: str, limit: int | None = None) -> list[Row]:
    """The rows of a split, `limit` of each kind chosen by hash."""
    found = [row for row in refine_rows(data) if row.split == split]
    return [row for kind in KINDS for row in by_hash((r for r in found if r.kind == kind), "refine")[:limit]]


def copy_picture(source: Path, out: Path, name: str) -> str:
    """Write a picture under this name without losing anything; returns the file's name."""
    if source.suffix == ".jpg":
        shutil.copyfile(source, out / f"{name}.jpg")
        return f"{name}.jpg"
    with Image.open(source) as image:
        to_rgb(image).save(out / f"{name}.webp", "WEBP", lossless=True, method=6)
    return f"{name}.webp"


def main() -> None:
    """Write one split's folder and print its number of pictures and size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/refine-data"))
    parser.add_argument("--split", choices=("train", "dev", "test"), default="train")
    parser.add_argument("--copy", action="store_true")
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(chosen(options.data, options.split, options.limit)):
        source = (options.data / row.path).resolve()
        name = copy_picture(source, options.out, f"{number:05d}") if options.copy else str(source)
        lines.append(json.dumps({"file_name": name, "text": row.caption, **asdict(row)}) + "\n")
    (options.out / "metadata.jsonl").write_text("".join(lines))
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"{options.out}: {len(lines)} pictures, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
