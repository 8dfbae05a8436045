from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from darkroom.evaluate.metrics import to_uint8
from darkroom.images import (
    Parameters,
    error_picture,
    format_parameters,
    grid,
    parse_parameters,
    read_parameters,
    save_png,
    side_by_side,
    to_pil,
    to_tensor,
)

VALUES = {"Steps": 20, "Sampler": "Euler a", "CFG scale": 7.0, "Seed": 0, "Size": "512x768"}


def noise(seed: int, size: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def test_tensors_and_back() -> None:
    image = noise(0)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 32, 32) and tensor.min() == -1 and tensor.max() == 1
    assert to_pil(tensor)[0].tobytes() == image.tobytes()
    clear = to_tensor(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    assert (clear == 1).all()


def test_rounding_is_that_of_the_metrics() -> None:
    image = torch.linspace(-1.2, 1.2, 3 * 64).reshape(1, 3, 8, 8)
    (pil,) = to_pil(image)
    assert np.array_equal(np.asarray(pil), to_uint8(image)[0].permute(1, 2, 0).numpy())
    assert len(to_pil(image.expand(3, -1, -1, -1))) == 3


def test_error_picture() -> None:
    a, b = Image.new("RGB", (4, 4), (10, 100, 200)), Image.new("RGB", (4, 4), (20, 100, 100))
    assert error_picture(a, b).getpixel((0, 0)) == (40, 0, 255)
    assert error_picture(a, a).getextrema() == ((0, 0),) * 3


def test_grid_places_every_picture() -> None:
    images = [Image.new("RGB", (64, 48), (0, 0, 40 * i)) for i in range(6)]
    plain = grid(images, columns=3, gap=4)
    assert plain.size == (4 + 3 * 68, 4 + 2 * 52)
    for i in range(6):
        assert plain.getpixel((4 + (i % 3) * 68 + 30, 4 + (i // 3) * 52 + 20)) == (0, 0, 40 * i)
    assert plain.getpixel((1, 1)) == (236, 236, 236)


def test_grid_writes_labels() -> None:
    images = [Image.new("RGB", (96, 96), "white") for _ in range(4)]
    bare = grid(images, columns=2)
    named = {
        "labels": ["one", "two", "a label that is far too long for two lines of this width here", ""],
        "row_labels": ["first row", "second"],
        "column_labels": ["left", "right"],
    }
    sheets = [grid(images, columns=2, **{name: texts}) for name, texts in named.items()]
    for sheet in [*sheets, grid(images, columns=2, **named)]:
        assert sheet.size[0] * sheet.size[1] > bare.size[0] * bare.size[1]
        assert (np.asarray(sheet) < 100).sum() > 30  # dark ink
    assert grid(images, columns=2, **named).tobytes() == grid(images, columns=2, **named).tobytes()
    with pytest.raises(ValueError, match=r"3 labels \(row\) do not fit a grid that needs 2"):
        grid(images, columns=2, row_labels=["a", "b", "c"])


def test_side_by_side() -> None:
    assert side_by_side([noise(0), noise(1), noise(2)], ["a", "b", "c"]).size[0] == 4 + 3 * 36


def test_png_bytes_and_parameters(tmp_path: Path) -> None:
    text = format_parameters("a red apple", "blurry", VALUES)
    for name in ("a.png", "b.png"):
        save_png(tmp_path / name, noise(0), text)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (
        b"tEXtparameters\0a red apple\nNegative prompt: blurry\nSteps: 20"
        in (tmp_path / "a.png").read_bytes()
    )
    assert read_parameters(tmp_path / "a.png") == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]
    save_png(tmp_path / "none.png", noise(0))
    assert read_parameters(tmp_path / "none.png") is None
    assert Image.open(tmp_path / "none.png").tobytes() == noise(0).tobytes()


def test_the_format_is_the_known_one() -> None:
    assert format_parameters("cat", "dog", VALUES | {"Lora": "a: 1, b", "Model": "x"}) == (
        "cat\nNegative prompt: dog\n"
        'Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 0, Size: 512x768, Lora: "a: 1, b", Model: x'
    )


PROMPTS = [
    "",
    "red apple, 3d style",
    "two\nlines: with, commas",
    "Ünïcödé 日本 🍎",
    'quotes " and \\ slashes',
    " spaces around \n",
    "x\nNegative prompt: y",
    "Negative prompt: y",
    "Steps: 1, Size: 2, Seed: 3",
]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("negative", PROMPTS)
def test_round_trip(tmp_path: Path, prompt: str, negative: str) -> None:
    values = VALUES | {"Note": 'a, "b": c\nd é 日', "Empty": "", "Space": " x ", "Eta": 0.1, "Quote": '"'}
    save_png(tmp_path / "a.png", noise(0, 4), format_parameters(prompt, negative, values))
    expected = {name: str(value) for name, value in values.items()} | {"CFG scale": "7"}
    text = read_parameters(tmp_path / "a.png")
    assert text is not None and parse_parameters(text) == Parameters(prompt, negative, expected)


def test_texts_of_other_tools() -> None:
    assert parse_parameters("only a prompt\nSteps: 3") == Parameters("only a prompt\nSteps: 3")
    text = "a\nNegative prompt: b\nc\nSteps: 20, Seed: 1, Size: 1x1, Hashes: {\"model\": \"x\"}"  # fmt: skip
    parsed = parse_parameters(text)
    assert (parsed.prompt, parsed.negative, parsed.values["Seed"]) == ("a", "b\nc", "1")


def test_values_that_no_reader_would_find() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        format_parameters("a", "", {"Steps": 1})
    with pytest.raises(ValueError, match="cannot be the name"):
        format_parameters("a", "", VALUES | {"a, b": 1})
