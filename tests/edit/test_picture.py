"""Edits of one picture, in the library and on the command line."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.tiny import tiny_model

import darkroom
from darkroom.cli import main
from darkroom.edit.outpaint import Margins
from darkroom.edit.picture import Edit, edit_picture
from darkroom.errors import InputError
from darkroom.pipeline import Pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return darkroom.load(folder, device="cpu")


def picture(width: int = 30, height: int = 33) -> Image.Image:
    """Of sides that the model, which draws multiples of 4, cannot draw."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def spot(width: int = 30, height: int = 33) -> Image.Image:
    mask = np.zeros((height, width), np.uint8)
    mask[20:, 10:25] = 255
    return Image.fromarray(mask)


def test_any_size_comes_out_as_it_went_in(pipe: Pipeline) -> None:
    result = edit_picture(pipe, picture(), "red apple", steps=2, strength=0.5)
    assert result.images[0].size == (30, 33)
    masked = edit_picture(pipe, picture(), "red apple", Edit(mask=spot()), steps=2, seed=1)
    same = (np.asarray(masked.images[0]) == np.asarray(picture())).all(axis=2)
    outside = np.asarray(spot()) == 0
    assert same[outside].all() and not same[~outside].all()


def test_a_larger_canvas_keeps_the_picture(pipe: Pipeline) -> None:
    edit = Edit(outpaint=Margins(left=3, bottom=9))
    (made,) = edit_picture(pipe, picture(), "red apple", edit, steps=2, seed=1).images
    assert made.size == (33, 42)
    assert (np.asarray(made)[:33, 3:] == np.asarray(picture())).all()


def test_enlarging_is_drawn_in_tiles(pipe: Pipeline) -> None:
    result = edit_picture(pipe, picture(32, 32), "red apple", Edit(upscale=2.0), steps=4, seed=1)
    assert result.images[0].size == (64, 64)
    assert result.parameters[0].values["Denoising strength"] == "0.3"


def test_a_source_leads_back_to_the_picture(pipe: Pipeline) -> None:
    """With the same prompt and no guidance, the picture comes back as the autoencoder keeps it."""
    how = {"steps": 12, "sampler": "euler", "guidance_scale": 1.0, "strength": 0.5}
    edit = Edit(source="red apple")
    result = edit_picture(pipe, picture(32, 32), "red apple", edit, output="latents", **how)
    image = torch.from_numpy(np.array(picture(32, 32))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        clean = pipe.model.autoencoder.encode(image)
    assert (result.latents - clean).norm() < 0.1 * clean.norm()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask": spot(), "outpaint": Margins(left=4)}, "outpaint makes a mask of its own"),
        ({"mask": spot(), "source": "a"}, "mask is for painting in the picture as it is"),
        ({"upscale": 1.0}, "upscale must be above 1"),
    ],
)
def test_edits_that_exclude_each_other_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Edit(**fields)


def test_a_mask_of_another_size_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="`mask` is 8x8, and must be 30x33, as the picture"):
        edit_picture(pipe, picture(), "red apple", Edit(mask=spot(8, 8)))


def test_the_command_edits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    picture().save("in.png")
    spot().save("mask.png")
    model = ["--model", str(folder), "--steps", "2", "--seed", "3"]
    assert main(["edit", "in.png", "red apple", "--mask", "mask.png", "-o", "a.png", *model]) == 0
    outside = np.asarray(spot()) == 0
    assert (np.asarray(Image.open("a.png"))[outside] == np.asarray(picture())[outside]).all()
    assert main(["edit", "in.png", "red apple", "--outpaint", "4", "-o", "b.png", *model]) == 0
    assert Image.open("b.png").size == (38, 41)
    assert main(["edit", "in.png", "red apple", "--mask", "nothing.png", *model]) == 2
    assert "nothing.png: no such file" in capsys.readouterr().err
    assert main(["edit", "in.png", "red apple", "--strength", "1.5", *model]) == 2
    assert "strength must be in 0 ... 1" in capsys.readouterr().err
    assert not os.path.exists("edited.png")


def test_a_transparent_mask_paints_nothing_where_it_is_transparent(pipe: Pipeline) -> None:
    clear = Image.new("RGBA", (30, 33), (0, 0, 0, 0))
    clear.paste((255, 255, 255, 255), (10, 20, 25, 33))
    (made,) = edit_picture(pipe, picture(), "red apple", Edit(mask=clear), steps=2, seed=1).images
    kept = np.asarray(clear)[..., 3] == 0
    assert (np.asarray(made)[kept] == np.asarray(picture())[kept]).all()


def test_a_file_says_what_was_done_and_is_not_replayed_as_something_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    picture().save("in.png")
    model = ["--model", str(folder), "--steps", "2", "--seed", "3"]
    assert main(["edit", "in.png", "red apple", "--outpaint", "4", "-o", "b.png", *model]) == 0
    capsys.readouterr()
    assert main(["replay", "b.png", "--model", str(folder)]) == 2
    assert "made by darkroom edit (outpaint 4,4,4,4, cut to 38x41)" in capsys.readouterr().err


def test_a_source_refuses_samplers_that_draw_noise(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="draws noise of its own"):
        edit_picture(pipe, picture(), "red apple", Edit(source="a"), sampler="dpmpp_sde")
