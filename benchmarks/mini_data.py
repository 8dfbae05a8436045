"""The data of darkroom-mini: captions, styles and what is set aside before any training.

Emoji in three drawing styles and photos of groceries. 5 % of the emoji concepts are never trained on, and 5
% of the (concept, style) pairs of the rest, each of whose concepts is trained on in another style. Hashes
decide, so the split is the same everywhere. Skin-tone variants follow their concept.

    python benchmarks/mini_data.py --data ../shared/data --out runs/mini-data
"""

import argparse
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from darkroom.data.folder import in_split

STYLES = {"noto": "flat style", "fluent3d": "3d style", "blob": "blob style"}
HELD_CONCEPTS, HELD_PAIRS = 0.05, 0.05
TEXT_PROMPTS, GALLERY = 300, 1000


@dataclass(frozen=True)
class Row:
    """One picture: `split` is "train", "concept" (never seen), "pair" (seen in other styles) or "val"
    (photos).
    """

    path: str
    caption: str
    style: str
    concept: str
    kind: str
    split: str
    skin_tone: bool


def rows(data: Path) -> list[Row]:
    """Every picture of both data sets, in the order of their metadata; paths are relative to `data`."""
    return [*_emoji(data), *_photos(data)]


def _emoji(data: Path) -> Iterator[Row]:
    table = _read(data / "emoji128" / "metadata.jsonl")
    styles = defaultdict(set)
    for row in table:
        styles[row["concept"]].add(row["style"])
    pairs = {pair for concept, found in styles.items() for pair in _held_pairs(concept, found)}
    for row in table:
        concept, style, text = row["concept"], row["style"], row["text"]
        held = in_split(concept, HELD_CONCEPTS, "concept")
        split = "concept" if held else "pair" if (concept, style) in pairs else "train"
        yield Row(
            path=f"emoji128/{row['file_name']}",
            caption=f"{text}, {STYLES[style]}",
            style=style,
            concept=concept,
            kind="emoji",
            split=split,
            skin_tone="skin tone" in text,
        )


def _held_pairs(concept: str, styles: set[str]) -> list[tuple[str, str]]:
    """The held-out styles of a concept: those that the hash picks, never all of them."""
    picked = [style for style in sorted(styles) if in_split(f"{concept}/{style}", HELD_PAIRS, "pair")]
    return [(concept, style) for style in picked[: len(styles) - 1]]


def _photos(data: Path) -> Iterator[Row]:
    for row in _read(data / "grocery256" / "metadata.jsonl"):
        path, concept = f"grocery256/{row['file_name']}", row["fine"]
        yield Row(path, row["text"], "photo", concept, "photo", row["split"], False)


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_hash(table: Iterable[Row], salt: str) -> list[Row]:
    """Rows in an order that only their paths and the salt decide."""
    return sorted(table, key=lambda row: hashlib.sha256(f"{salt}\0{row.path}".encode()).digest())


def text_rows(table: Iterable[Row]) -> list[Row]:
    """The 300 training pictures, none with a skin tone, whose captions test how the model follows text."""
    plain = (r for r in table if r.kind == "emoji" and r.split == "train" and not r.skin_tone)
    return by_hash(plain, "text")[:TEXT_PROMPTS]


def pair_rows(table: Iterable[Row]) -> list[Row]:
    """The set-aside (concept, style) pairs without skin tones, 300 at most."""
    return by_hash((r for r in table if r.split == "pair" and not r.skin_tone), "pair")[:TEXT_PROMPTS]


def gallery(table: Iterable[Row], held: Sequence[Row], *, same_concepts: bool) -> list[Row]:
    """1,000 emoji to look for neighbours in: `held`, then training pictures without skin tones.

    Without `same_concepts` no other picture of a concept of `held` is among them.
    """
    taken, concepts = set(held), {row.concept for row in held}
    fill = [
        row
        for row in table
        if row.kind == "emoji" and row.split == "train" and not row.skin_tone and row not in taken
        if same_concepts or row.concept not in concepts
    ]
    return [*held, *by_hash(fill, "gallery")[: GALLERY - len(held)]]


def write_folder(data: Path, out: Path, split: str) -> int:
    """Write `out/metadata.jsonl`, which names the pictures of a split where they lie; returns their
    number.
    """
    out.mkdir(parents=True, exist_ok=True)
    chosen = [row for row in rows(data) if row.split == split]
    lines = [
        json.dumps({"file_name": str((data / row.path).resolve()), "text": row.caption, **asdict(row)})
        for row in chosen
    ]
    (out / "metadata.jsonl").write_text("".join(line + "\n" for line in lines))
    return len(chosen)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/mini-data"))
    parser.add_argument("--split", default="train")
    options = parser.parse_args()
    print(write_folder(options.data, options.out, options.split), "pictures")
