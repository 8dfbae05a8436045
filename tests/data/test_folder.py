import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from darkroom.data.folder import (
    Example,
    HoldOut,
    PictureSet,
    Source,
    in_split,
    list_examples,
    load_picture,
)
from darkroom.errors import InputError


def picture(path: Path, color: object = "red", mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (40, 30), color).save(path)
    return path


def metadata(folder: Path, rows: list[dict]) -> None:
    folder.joinpath("metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def captions(**source: object) -> dict[str, str]:
    return {e.path.name: e.caption for e in list_examples([Source(**source)])}


def test_text_files_beside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b.png", "a.jpg", "deep/c.webp", ".hidden/d.png"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("\ufeffein  rotes\nBild ü", encoding="utf-8")
    (tmp_path / "deep/c.txt").write_text("deep")
    with caplog.at_level(logging.WARNING):
        assert captions(path=tmp_path) == {"a.jpg": "ein rotes Bild ü", "b.png": "", "c.webp": "deep"}
    assert "1 of 3 pictures have no caption" in caplog.text


def test_class_folders(tmp_path: Path) -> None:
    for name in ("cat/1.png", "golden_retriever/2.png"):
        picture(tmp_path / name)
    found = captions(path=tmp_path, caption="a photo of a {text}")
    assert found == {"1.png": "a photo of a cat", "2.png": "a photo of a golden retriever"}


def test_metadata_wins_over_text_files_over_folders(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/2.png", "cat/3.png"):
        picture(tmp_path / name)
    (tmp_path / "cat/1.txt").write_text("from text")
    assert captions(path=tmp_path) == {"1.png": "from text", "2.png": "", "3.png": ""}
    metadata(tmp_path, [{"file_name": "cat/2.png", "text": "row"}, {"file_name": "cat/1.png"}])
    assert captions(path=tmp_path) == {"1.png": "from text", "2.png": "row"}


def test_templates_filters_and_weights(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a.png", "title": "hand: dark Skin Tone", "style": "noto", "tags": ["x", "y"]},
        {"file_name": "b.png", "title": "apple {style}", "style": "noto", "tags": []},
        {"file_name": "c.png", "title": "apple", "style": "blob", "tags": []},
    ]
    metadata(tmp_path, rows)
    source = Source(
        path=tmp_path,
        caption="{text}, {style} style ({tags})",
        caption_field="title",
        where={"style": "noto"},
        weight=2.0,
        down_weight={"skin tone": 0.25},
        flip=True,
    )
    a, b = list_examples([source])
    assert (a.caption, a.weight) == ("hand: dark Skin Tone, noto style (x, y)", 0.5)
    assert (b.caption, b.weight, b.flip) == ("apple {style}, noto style ()", 2.0, True)


def test_views_are_the_whole_picture_and_fixed_crops(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    examples = list_examples([Source(path=tmp_path, views=3, zoom=1.5)])
    assert [e.caption for e in examples] == ["a"] * 3 + ["b"] * 3
    whole, *crops = examples[:3]
    assert (whole.zoom, whole.at) == (1.0, (0.5, 0.5)) and len({e.at for e in examples}) == 5
    assert all(1 < e.zoom < 1.5 and min(e.at) >= 0 and max(e.at) < 1 for e in crops)
    assert examples == list_examples([Source(path=tmp_path, views=3, zoom=1.5)])


def test_hold_out_splits_exactly(tmp_path: Path) -> None:
    rows = [
        {"file_name": f"{i}-{s}.png", "text": "x", "concept": i, "style": s} for i in range(50) for s in "ab"
    ]
    metadata(tmp_path, rows)
    parts = (
        HoldOut(fields=("concept",), fraction=0.2, salt="s"),
        HoldOut(fields=("concept", "style"), fraction=0.1),
    )
    source = Source(path=tmp_path, hold_out=parts)
    train, held = (list_examples([source], held_out=flag) for flag in (False, True))
    assert len(train) + len(held) == 100 and 10 < len(held) < 50
    expected = {
        r["file_name"]
        for r in rows
        if in_split(str(r["concept"]), 0.2, "s") or in_split(f"{r['concept']}/{r['style']}", 0.1)
    }
    assert {e.path.name for e in held} == expected


def test_in_split_is_stable_and_nested() -> None:
    keys = [str(i) for i in range(4000)]
    five = {k for k in keys if in_split(k, 0.05, "salt")}
    assert 150 < len(five) < 250
    assert five < {k for k in keys if in_split(k, 0.1, "salt")}
    assert five != {k for k in keys if in_split(k, 0.05, "pepper")}
    assert sorted(five, key=int)[:3] == ["16", "33", "78"]
    assert all(in_split(k, 1.0) for k in keys) and not any(in_split(k, 0.0) for k in keys)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"file_name": "a.png"', {}, "line 1: not JSON"),
        ('\n{"text": "a.png"}', {}, "line 2: expected an object"),
        ('{"file_name": "a.png", "style": "x"}', {"where": {"stile": "x"}}, "did you mean 'style'"),
        ('{"file_name": "a.png", "style": "x"}', {"where": {"style": "y"}}, "no row matches"),
        ('{"file_name": "a.png", "style": "x"}', {"caption": "{stile}"}, "did you mean 'style'"),
        ('{"file_name": "a.png"}', {"weight": -1.0}, "must be finite"),
    ],
)
def test_bad_sources(tmp_path: Path, content: str, options: dict, message: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        list_examples([Source(path=tmp_path, **options)])


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no pictures"):
        list_examples([Source(path=tmp_path)])
    with pytest.raises(InputError, match=r"nowhere is not a folder"):
        list_examples([Source(path=tmp_path / "nowhere")])


def test_exif_rotation(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    pixels = load_picture(tmp_path / "a.png")
    assert pixels.shape == (40, 20, 3)
    assert pixels[5, 10].tolist() == [255, 0, 0] and pixels[35, 10].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("mode", "color", "name", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), "a.png", (255, 255, 255)),
        ("RGBA", (255, 0, 0, 128), "a.png", (255, 127, 127)),
        ("LA", (0, 128), "a.png", (127, 127, 127)),
        ("L", 77, "a.png", (77, 77, 77)),
        ("1", 1, "a.png", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "a.jpg", (255, 0, 0)),
        ("I;16", 32768, "a.png", (128, 128, 128)),
        ("I", 65535, "a.tif", (255, 255, 255)),
        ("I", 200, "a.tif", (200, 200, 200)),
        ("F", 0.5, "a.tif", (128, 128, 128)),
    ],
)
def test_modes(tmp_path: Path, mode: str, color: object, name: str, expected: tuple) -> None:
    pixels = load_picture(picture(tmp_path / name, color, mode=mode))
    assert pixels.dtype == np.uint8 and pixels.shape == (30, 40, 3)
    assert np.abs(pixels[10, 10].astype(int) - expected).max() <= 2


def test_palettes_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 0, 200, 0])
    image.save(tmp_path / "solid.png")
    image.save(tmp_path / "clear.png", transparency=1)
    assert load_picture(tmp_path / "solid.png")[0, 0].tolist() == [0, 200, 0]
    assert load_picture(tmp_path / "clear.png")[0, 0].tolist() == [255, 255, 255]


def test_crops(tmp_path: Path) -> None:
    image = Image.new("RGB", (90, 30), "red")
    image.paste("lime", (30, 0, 60, 30))
    image.paste("blue", (60, 0, 90, 30))
    path = tmp_path / "wide.png"
    image.save(path)
    assert (load_picture(path, 30) == (0, 255, 0)).all()
    assert (load_picture(path, 30, at=(0.0, 0.5)) == (255, 0, 0)).all()
    assert (load_picture(path, 30, at=(1.0, 0.5)) == (0, 0, 255)).all()
    assert load_picture(path, 12, zoom=1.3, at=(0.9, 0.1)).shape == (12, 12, 3)
    assert (load_picture(path, 12, zoom=2.0)[4:8, 4:8] == (0, 255, 0)).all()


def test_resizing_averages(tmp_path: Path) -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert np.abs(load_picture(tmp_path / "stripes.png", 32).astype(int)[4:-4, 4:-4] - 127).max() <= 4


def test_broken_files_are_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = picture(tmp_path / "good.png", "red")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    (tmp_path / "text.jpg").write_text("no picture")
    paths = [tmp_path / "cut.png", good, tmp_path / "text.jpg", tmp_path / "gone.png"]
    with caplog.at_level(logging.WARNING):
        pictures = PictureSet([Example(path=p, caption=p.stem) for p in paths], 16)
    assert pictures.captions == ["good"] and len(pictures) == 1
    assert [p.name for p, _ in pictures.failures] == ["cut.png", "text.jpg", "gone.png"]
    assert all(p.name in caplog.text for p, _ in pictures.failures) and "3 of 4 pictures" in caplog.text
    with pytest.raises(InputError, match="none of 1 pictures"):
        PictureSet([Example(path=tmp_path / "text.jpg", caption="")], 16)


def test_picture_set_batches(tmp_path: Path) -> None:
    ramp = np.zeros((20, 20, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(20), np.arange(20)[:, None]
    Image.fromarray(ramp).save(tmp_path / "a.png")
    examples = [Example(path=tmp_path / "a.png", caption=str(f), flip=f) for f in (False, True)]
    pictures = PictureSet(examples, 16, margin=4)
    assert pictures.images.shape == (2, 3, 20, 20) and pictures.images.dtype == torch.uint8
    assert torch.equal(pictures.images[0].permute(1, 2, 0), torch.from_numpy(ramp))
    assert pictures.batch([1])[0, :2, 0, 0].tolist() == [2, 2]
    coin, place = torch.tensor([0.2, 0.2]), torch.tensor([[0.0, 0.99], [0.99, 0.0]])
    corner = pictures.batch([0, 1], coin, place)
    assert corner[0, :2, 0, 0].tolist() == [0, 4]  # a flip is not allowed here
    assert corner[1, :2, 0, 0].tolist() == [19, 0] and corner[1, 0, 0, -1] == 4
    assert pictures.batch(np.array([1]), torch.tensor([0.7]), place[1:])[0, 0, 0, 0] == 4
    assert torch.equal(pictures.batch([1], torch.tensor([0.2])), pictures.batch([1]).flip(-1))


def test_real_emoji(shared: Path) -> None:
    folder = shared / "data/emoji128"
    source = Source(path=folder, caption="{text}, 3d style", where={"style": "fluent3d"})
    examples = list_examples([source])
    assert len(examples) > 1000 and examples == list_examples([source])
    pictures = PictureSet(examples[:20], 128)
    assert len(pictures) == 20 and pictures.images.float().std() > 20
