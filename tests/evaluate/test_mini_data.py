"""What darkroom-mini is trained on and what is set aside: disjoint, the same everywhere, and fair."""

import json
from collections import Counter
from pathlib import Path

import pytest
from benchmarks.mini_data import Row, gallery, in_split, pair_rows, rows, text_rows, write_folder

from darkroom.data.folder import Source, list_examples

SPLITS = {"train", "concept", "pair", "val"}


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """Metadata of 400 concepts, some in one style only, each with a skin-tone variant, and of eight
    photos.
    """
    emoji = [
        {"file_name": f"{style}/{concept}{tone}.png", "text": f"thing {concept}{tone}", "style": style}
        | {"concept": str(concept)}
        for concept in range(400)
        for style in ("noto", "fluent3d", "blob")[: 1 + concept % 3]
        for tone in ("", ": dark skin tone")
    ]
    photos = [
        {
            "file_name": f"{k}.jpg",
            "text": f"a photo of {k}",
            "fine": f"{k}",
            "split": "val" if k % 4 == 0 else "train",
        }
        for k in range(8)
    ]
    for name, table in (("emoji128", emoji), ("grocery256", photos)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return tmp_path


@pytest.fixture(scope="session")
def real(shared: Path) -> list[Row]:
    if not (shared / "data" / "emoji128").is_dir():
        pytest.skip("the data of darkroom-mini is not there")
    return rows(shared / "data")


def check_splits(table: list[Row]) -> None:
    assert {row.split for row in table} == SPLITS
    trained = {row.concept for row in table if row.split == "train" and row.kind == "emoji"}
    pairs = {(row.concept, row.style) for row in table if row.split == "train"}
    for row in table:
        if row.split == "concept":
            assert row.concept not in trained
        if row.split == "pair":
            assert row.concept in trained
            assert (row.concept, row.style) not in pairs


def test_what_is_set_aside_is_not_trained_on(made_up: Path) -> None:
    check_splits(rows(made_up))


def test_skin_tones_follow_their_concept(made_up: Path) -> None:
    table = rows(made_up)
    splits: dict[tuple[str, str], set[str]] = {}
    for row in table:
        splits.setdefault((row.concept, row.style), set()).add(row.split)
    assert all(len(found) == 1 for found in splits.values())
    assert sum(row.skin_tone for row in table) == sum(row.kind == "emoji" for row in table) / 2


def test_captions_name_the_style(made_up: Path) -> None:
    captions = {row.path: row.caption for row in rows(made_up)}
    assert captions["emoji128/noto/5.png"] == "thing 5, flat style"
    assert captions["emoji128/fluent3d/5.png"] == "thing 5, 3d style"
    assert captions["emoji128/blob/5.png"] == "thing 5, blob style"
    assert captions["grocery256/3.jpg"] == "a photo of 3"


def test_galleries_hold_what_they_should(made_up: Path) -> None:
    table = rows(made_up)
    asked, held = text_rows(table), pair_rows(table)
    assert asked and held
    easy, strict = gallery(table, asked, same_concepts=True), gallery(table, held, same_concepts=False)
    assert easy[: len(asked)] == asked and strict[: len(held)] == held
    assert len(set(easy)) == len(easy) and len(set(strict)) == len(strict)
    assert not any(row.skin_tone for row in [*easy, *strict])
    concepts = {row.concept for row in held}
    assert not any(row.concept in concepts for row in strict[len(held) :])


def test_the_folder_written_can_be_read_for_training(made_up: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    count = write_folder(made_up, out, "train")
    examples = list_examples([Source(path=out, where={"kind": "emoji"}, down_weight={"skin tone": 0.5})])
    assert count == len([row for row in rows(made_up) if row.split == "train"])
    assert {example.weight for example in examples} == {1.0, 0.5}
    assert all(example.path.is_absolute() and example.caption.startswith("thing") for example in examples)


def test_hashes_do_not_change() -> None:
    assert [k for k in range(100) if in_split(str(k), 0.05, "concept")] == [26, 31, 40, 55, 56, 83]


def test_real_splits(real: list[Row]) -> None:
    check_splits(real)
    counts = Counter((row.kind, row.split, row.skin_tone) for row in real)
    assert counts == {
        ("emoji", "train", False): 3855,
        ("emoji", "train", True): 3846,
        ("emoji", "concept", False): 204,
        ("emoji", "concept", True): 140,
        ("emoji", "pair", False): 208,
        ("emoji", "pair", True): 220,
        ("photo", "train", False): 1320,
        ("photo", "val", False): 296,
    }
    emoji = {row.concept for row in real if row.kind == "emoji"}
    held = {row.concept for row in real if row.split == "concept"}
    assert 0.04 < len(held) / len(emoji) < 0.06


def test_real_prompts(real: list[Row]) -> None:
    asked = text_rows(real)
    assert len(asked) == len({row.caption for row in asked}) == 300
    assert not any(row.skin_tone or row.split != "train" for row in asked)
    assert len(gallery(real, asked, same_concepts=True)) == 1000
    captions = {row.caption for row in real if row.split == "train"}
    assert not any(row.caption in captions for row in pair_rows(real))
