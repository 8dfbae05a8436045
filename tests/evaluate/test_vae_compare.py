"""Autoencoders side by side: arguments told apart, pictures cut to fit, figures, verdicts, and the sheet."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.tiny import tiny_model
from torch import Tensor

from darkroom.codec import reconstruct_files
from darkroom.data.folder import SUFFIXES
from darkroom.errors import InputError
from darkroom.evaluate.ceiling import Ceiling
from darkroom.evaluate.paths import PICTURES, names, picture_files, split_arguments
from darkroom.evaluate.reconstruction import LatentStatistics, Quality, Reconstructed
from darkroom.evaluate.vae_compare import Comparison, Row, compare, comparison_sheet, read_pictures
from darkroom.evaluate.vae_sheet import SIDE, Column, Crop, sheet, worst_crops

FAST = {"steps": 2, "device": "cpu"}


def draw(path: Path, width: int = 48, height: int = 40, seed: int = 0) -> Path:
    """A picture of coarse noise."""
    coarse = np.random.default_rng(seed).integers(
        0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((width, height)).save(path)
    return path


def row(psnr: float, best: float, *, finite: bool = True) -> Row:
    quality = Quality(psnr=psnr, ssim=0.5, gmsd=0.1)
    latents = LatentStatistics(channel_mean=(0.5,), channel_std=(1.0,), largest=3.0)
    found = Reconstructed(
        channels=1,
        stride=8,
        parameters=1_234_567,
        each=(quality,),
        images=(),
        latents=latents,
        finite={"float32": finite, "bfloat16": True, "float16": False},
    )
    return Row(name="one", reconstructed=found, ceiling=Ceiling(images=(), each=(best,)))


# Arguments


def test_pictures_and_autoencoders_are_told_apart(tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.PNG")
    album = draw(tmp_path / "album" / "deep" / "b.jpg").parents[1]
    weights = tmp_path / "vae.safetensors"
    weights.touch()
    model = draw(tmp_path / "model" / "preview.png").parent
    (model / "vae").mkdir()
    (model / "vae" / "config.json").touch()
    given = [picture, "darkroom-mini", album, weights, str(model)]
    images, vaes = split_arguments(given)
    assert images == [picture, album]
    assert vaes == ["darkroom-mini", str(weights), str(model)]


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".gguf", ".bin", ".sft"])
def test_files_of_weights(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x{suffix}").touch()
    assert split_arguments([tmp_path / f"x{suffix}"]) == ([], [str(tmp_path / f"x{suffix}")])


def test_arguments_that_are_neither(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "notes.txt", "notes.txt: neither a picture .*png.* nor a file of weights"),
        (tmp_path / "empty", "empty: holds no pictures and no weights"),
        (tmp_path / "gone.png", "gone.png: no such picture, folder or model. Bundled: darkroom-mini"),
    ):
        with pytest.raises(InputError, match=message):
            split_arguments(["darkroom-mini", path])
    with pytest.raises(InputError, match=r"at least one autoencoder.*darkroom-mini"):
        split_arguments([draw(tmp_path / "a.png")])


def test_files_of_a_folder_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.png", ".hidden/c.png", "a/.d.png"):
        draw(tmp_path / name)
    (tmp_path / "a" / "z.txt").touch()
    last = draw(tmp_path / "b.png")
    found = picture_files([tmp_path, last])
    assert found == [tmp_path / "a" / "z.png", tmp_path / "b.png", last]


def test_names() -> None:
    given = [
        "darkroom-mini",
        "x/taef2_encoder.safetensors",
        "sd/vae",
        "a/vae.pt",
        "b/vae.pt",
        "c/decoder.pth",
    ]
    assert names(given) == ["darkroom-mini", "taef2", "sd", "a/vae.pt", "b/vae.pt", "decoder"]


def test_a_config_among_pictures_is_no_model(tmp_path: Path) -> None:
    album = draw(tmp_path / "album" / "a.png").parent
    (album / "raw").mkdir()
    (album / "raw" / "config.json").touch()
    assert split_arguments([album, "darkroom-mini"]) == ([album], ["darkroom-mini"])


def test_suffixes_are_those_of_the_reader() -> None:
    assert PICTURES == SUFFIXES


def test_arguments_need_no_torch() -> None:
    code = "import sys, darkroom.evaluate.paths; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"torch", "numpy", "PIL"} & set(shown.stdout.split())


# Pictures


def test_pictures_are_cut_at_the_edges(tmp_path: Path) -> None:
    path = draw(tmp_path / "a.png", 71, 45)
    (found,) = read_pictures([path], stride=8).values()
    whole = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    assert torch.equal(found, whole[:, 2:42, 3:67])
    (square,) = read_pictures([path], stride=8, size=36).values()
    assert square.shape == (3, 32, 32)


def test_pictures_of_one_name_stay_apart(tmp_path: Path) -> None:
    paths = [draw(tmp_path / name / "a.png", seed=seed) for seed, name in enumerate("xy")]
    found = read_pictures(paths, stride=8)
    assert list(found) == ["a.png", str(paths[1])]


def test_small_pictures(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a.png: 60x31 is too small: 32 pixels"):
        read_pictures([draw(tmp_path / "a.png", 60, 31)], stride=8)
    with pytest.raises(InputError, match=r"48 pixels"):
        read_pictures([draw(tmp_path / "a.png", 60, 47)], stride=24)


def test_the_handful_without_pictures() -> None:
    assert {tuple(p.shape) for p in read_pictures([], stride=24, size=64).values()} == {(3, 48, 48)}
    assert {tuple(p.shape) for p in read_pictures([], stride=8).values()} == {(3, 128, 128)}


# Rows and table


def test_the_verdict() -> None:
    assert row(20.0, 23.1).verdict == "encoder is the limit (+3.1 dB by better latents)"
    assert row(20.0, 20.2).verdict == "decoder is the limit (+0.2 dB)"
    assert row(20.0, 23.0).verdict.startswith("decoder")  # a little less than half of the error
    assert row(20.0, 20.0, finite=False).verdict == "gives numbers that are not finite"
    assert row(math.inf, math.inf).gain == 0.0


def test_the_table() -> None:
    head, cells = Comparison(rows=(row(20.0, 23.1),), sheet=Image.new("RGB", (1, 1))).table()
    found = dict(zip(head, cells, strict=True))
    assert found["autoencoder"] == "one"
    assert found["latents"] == "1 ch, f8"
    assert found["parameters"] == "1.23 M"
    assert (found["PSNR D(E(x))"], found["PSNR D(z*)"], found["gain"]) == ("20.00", "23.10", "+3.10")
    assert found["finite in"] == "f32 bf16"
    assert (found["mean"], found["std"], found["largest"]) == ("0.50", "1.00", "3.0")


def test_compare(tmp_path: Path) -> None:
    picture, model = draw(tmp_path / "a.png", 48, 48), tiny_model(tmp_path / "tiny")
    found = compare([picture], [model, "darkroom-shapes"], **FAST)
    assert [r.name for r in found.rows] == ["tiny", "darkroom-shapes"]
    for vae, made in zip((model, "darkroom-shapes"), found.rows, strict=True):
        (expected,) = reconstruct_files(vae, [picture])
        assert made.reconstructed.quality.psnr == pytest.approx(expected.psnr, abs=0.02)
        assert made.gain > 0
    assert found.markdown().count("\n") == 3
    assert found.distance is None
    again = compare([picture], [model, "darkroom-shapes"], **FAST)
    assert [r.name for r in compare([picture], [model, model], **FAST).rows] == [str(model)] * 2
    assert again.table() == found.table()
    assert again.sheet.tobytes() == found.sheet.tobytes()


def test_compare_on_the_handful_with_a_perceptual_distance(shared: Path) -> None:
    weights = shared / "data/weights/squeezenet1_1_caffe_features.safetensors"
    found = compare([], ["darkroom-shapes"], size=32, perceptual=weights, **FAST)
    assert found.distance == "SqueezeNet"
    head, cells = found.table()
    assert 0.0 < float(cells[head.index("SqueezeNet")]) < 2.0
    with pytest.raises(InputError, match=r"SqueezeNet 1\.1|no VGG16"):
        compare([], ["darkroom-shapes"], perceptual=shared / "data/weights/lpips_v0.1/alex.pth", **FAST)


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    for options, message in (
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"size": 0}, "size must be at least 1"),
        ({"crops": -1}, "crops must be at least 1"),
        ({"heads": tmp_path / "h.pth"}, "heads need the file of their backbone"),
        ({"size": 20}, "at least 32 pixels"),
    ):
        with pytest.raises(InputError, match=message):
            compare([], ["darkroom-shapes"], **{"device": "cpu", "steps": 1, **options})
    with pytest.raises(InputError, match="at least one autoencoder"):
        compare([], [], **FAST)
    with pytest.raises(InputError, match=r"cannot compare .*no-such"):
        compare([], ["no-such"], **FAST)


def test_half_of_a_tiny_autoencoder(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from darkroom.nn.autoencoder_tiny import AutoencoderTinyConfig, Encoder

    encoder = Encoder(AutoencoderTinyConfig(channels=8)).layers.state_dict()
    path = tmp_path / "sana_encoder.safetensors"
    save_file(dict(encoder), path)
    with pytest.raises(InputError, match=r"cannot compare .*sana_encoder.*decoder"):
        compare([], [path], **FAST)


# The sheet


def flat(value: int, height: int = 96, width: int = 96) -> Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8)


def spoilt(picture: Tensor, top: int, left: int, by: int) -> Tensor:
    picture = picture.clone()
    picture[:, top : top + SIDE, left : left + SIDE] += by
    return picture


def test_the_worst_crops_are_found() -> None:
    originals = [flat(100), flat(100), flat(100)]
    made = [spoilt(spoilt(flat(100), 0, 0, 40), 60, 52, 50), spoilt(flat(100), 20, 8, 30), flat(100)]
    found = worst_crops(originals, [made], 3)
    # The worst of every picture before the second of any.
    assert found[:2] == [Crop(0, 60, 52), Crop(1, 20, 8)]
    assert found[2].picture == 2
    assert worst_crops([originals[0]], [[made[0]]], 2) == [Crop(0, 60, 52), Crop(0, 0, 0)]


def test_crops_share_no_pixels() -> None:
    torch.manual_seed(0)
    noisy = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8)
    found = worst_crops([flat(100)], [[noisy]], 9)
    assert 4 <= len(found) <= 9
    assert not any(a.overlaps(b) for k, a in enumerate(found) for b in found[:k])


def test_one_bad_autoencoder_does_not_decide_alone() -> None:
    original = [flat(100)]
    awful = [spoilt(flat(150), 0, 0, 3)]  # bad everywhere, a little more so in a corner
    good = [spoilt(flat(100), 40, 40, 10)]
    assert worst_crops(original, [awful, good], 1) == [Crop(0, 40, 40)]


def test_crops_are_judged_by_what_the_encoder_gives() -> None:
    found = replace(row(20.0, 30.0).reconstructed, images=(spoilt(flat(100), 0, 0, 40),))
    best = Ceiling(images=(spoilt(flat(100), 60, 60, 90),), each=(30.0,))
    image = comparison_sheet({"a": flat(100)}, [Row(name="one", reconstructed=found, ceiling=best)], 1)
    pixels = np.asarray(image).reshape(-1, 3)
    cell = (4 * SIDE) ** 2  # letters have every grey in a few pixels
    assert (pixels == 140).all(1).sum() >= cell
    assert (pixels == 190).all(1).sum() < cell // 4


def test_the_sheet() -> None:
    pictures = {"a": flat(100), "b": flat(50, 40, 64)}
    made = Column("D(E(x))", [spoilt(flat(100), 0, 0, 20), flat(50, 40, 64)])
    image = sheet(pictures, [made], judged=[made], crops=2)
    cell = 4 * SIDE
    assert image.width == pytest.approx(3 * cell, abs=30)
    assert image.height > 2 * cell
    pixels = np.asarray(image).reshape(-1, 3)
    for colour in ((100,) * 3, (120,) * 3, (255, 0, 60)):  # original, spoilt crop, frame
        assert (pixels == colour).all(1).sum() > 100
