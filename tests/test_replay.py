"""Pictures drawn again from their files: byte for byte the same, or with the reason why not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import darkroom
from darkroom import cli_replay
from darkroom.diffusion.guidance_settings import Guidance
from darkroom.diffusion.samplers.table import SAMPLERS
from darkroom.edit.hires import Hires
from darkroom.edit.regions import Region
from darkroom.errors import DarkroomError, InputError
from darkroom.images import format_parameters, parse_parameters, read_parameters, save_png
from darkroom.origin import Origin
from darkroom.parameters import parameters_of
from darkroom.pipeline import Pipeline, Result
from darkroom.replay import NOTHING, replay
from darkroom.sheet import CELLS
from tests.tiny import tiny_model

STOCHASTIC = ("euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde")
SLOW = {"dpm_adaptive": pytest.mark.slow}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return darkroom.load(folder, device="cpu")


def write(path: Path, result: Result, k: int = 0, **changes: str | None) -> Path:
    """The PNG of a picture, some values of its parameters changed or (None) left out."""
    made = result.parameters[k]
    values = {name: text for name, text in (made.values | changes).items() if text is not None}
    save_png(path, result.images[k], format_parameters(made.prompt, made.negative, values))
    return path


def picture(path: Path, seed: int = 0, side: int = 32) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def again(path: Path, folder: Path, **options: Any):
    return replay(path, model_dirs=[folder.parent], **options)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("darkroom-shapes", "dpmpp_2m"),
        *(("darkroom-shapes", sampler) for sampler in STOCHASTIC),
        ("darkroom-mini", "euler_ancestral"),
        pytest.param("darkroom-mini", "dpmpp_2m", marks=pytest.mark.slow),
        *(pytest.param("darkroom-mini", sampler, marks=pytest.mark.slow) for sampler in STOCHASTIC[1:]),
    ],
)
def test_bundled_models_draw_the_same_bytes(tmp_path: Path, name: str, sampler: str) -> None:
    pipe = darkroom.load(name, device="cpu")
    for count, k in ((1, 0), (4, 1)):
        options: Any = {"seed": 2**64 - 2, "steps": 3, "count": count, "sampler": sampler}
        result = pipe("a red apple", negative_prompt="blue", **options)
        found = replay(write(tmp_path / "a.png", result, k))
        assert found.same and found.reasons == () and (found.pixels, found.most) == (0, 0)
        assert found.image.tobytes() == result.images[k].tobytes()
        assert found.parameters == result.parameters[k]
        assert found.lines() == ["the same picture, byte for byte"]


@pytest.mark.parametrize(
    "sampler",
    [pytest.param(name, marks=SLOW.get(name, ())) for name in sorted(SAMPLERS)],
)
def test_every_sampler_draws_the_same_bytes(
    pipe: Pipeline, folder: Path, tmp_path: Path, sampler: str
) -> None:
    result = pipe("red apple", seed=2**64 - 2, steps=4, count=3, sampler=sampler)
    found = again(write(tmp_path / "a.png", result, 2), folder)
    assert found.same and found.reasons == ()
    assert found.image.tobytes() == result.images[2].tobytes() != result.images[1].tobytes()


@pytest.mark.parametrize(
    "options",
    [
        {"compat": "diffusers"},
        {"compat": "a1111"},
        {"batch_size": 3},
        {"exact": True},
        {"variation_seed": 9, "variation_strength": 0.4},
        {"sigmas": [0.9, 0.5, 0.2, 0.0]},
        {"end_step": 2},
        {"width": 48, "height": 24, "guidance_scale": 1 / 3},
        {"guidance": Guidance(rescale=0.5, interval=(0.0, 0.6))},
        {"regions": [Region(prompt="a rocket", box=(0.5, 0, 1, 1))]},
        {"seamless": "xy", "clip_skip": 2},
        {"hires": Hires(scale=1.5, steps=2)},
        {"sampler": "ddim", "sampler_options": {"eta": 0.3}},
        {"schedule": "karras", "schedule_options": {"rho": 3.0}},
    ],
    ids=str,
)
def test_options_come_back(pipe: Pipeline, folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    usual = {"sampler": "euler_ancestral"} | ({} if "sigmas" in options else {"steps": 4})
    result = pipe("red apple", seed=7, count=4, **usual | options)
    found = again(write(tmp_path / "a.png", result, 3), folder)
    assert found.same and found.reasons == ()


def test_other_prompts_of_a_batch_do_not_matter(tmp_path: Path) -> None:
    pipe = darkroom.load("darkroom-shapes", device="cpu")
    prompts = ["a large red circle", "a blue square", "two small green triangles", "a large red circle"]
    result = pipe(prompts, seed=7, steps=4, sampler="euler_ancestral")
    for k in (1, 3):
        assert replay(write(tmp_path / "a.png", result, k)).same


def test_the_batch_matters(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    result = pipe("red apple", seed=7, steps=4, count=4, compat="diffusers")
    found = again(write(tmp_path / "a.png", result, 3, Batch=None), folder)
    assert not found.same and found.most > 1


def test_as_many_threads_as_then(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    path = write(tmp_path / "a.png", pipe("red apple", seed=1, steps=1), Threads=str(threads + 1))
    found = again(path, folder)
    assert found.parameters.values["Threads"] == str(threads + 1)
    assert torch.get_num_threads() == threads


def test_a_picture_that_was_changed(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    result = pipe("red apple", seed=1, steps=3)
    result.images[0].putpixel((3, 4), (0, 0, 0))
    result.images[0].putpixel((5, 4), (0, 0, 0))
    found = again(write(tmp_path / "a.png", result), folder)
    assert (found.same, found.pixels, found.reasons) == (False, 2, ())
    assert found.lines() == [
        f"another picture: 2 of 1024 pixels differ, by {found.most} of 255 at most", f"  {NOTHING}",
    ]  # fmt: skip
    difference = np.asarray(found.image, int) - np.asarray(result.images[0], int)
    assert found.most == np.abs(difference).max()


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        (
            "Version",
            "darkroom 0.0.1",
            f"Version: darkroom 0.0.1 in the file, darkroom {darkroom.__version__} here",
        ),
        ("Torch", "1.0", f"Torch: 1.0 in the file, {torch.__version__} here"),
        ("Device", "nonsense 9", "Device: nonsense 9 in the file, cpu"),
        ("Device", "cpu Z80", "Device: cpu Z80 in the file, cpu"),
        ("Sharpness", "7", "Sharpness: 7 in the file, which stands for nothing here"),
        ("Torch", None, f"Torch: {torch.__version__} here, not said in the file"),
    ],
)
def test_reasons_are_named_though_the_picture_is_the_same(
    pipe: Pipeline, folder: Path, tmp_path: Path, name: str, text: str | None, reason: str
) -> None:
    path = write(tmp_path / "a.png", pipe("red apple", seed=1, steps=2), **{name: text})
    found = again(path, folder, device="cpu")
    assert found.same and len(found.reasons) == 1 and found.reasons[0].startswith(reason)
    assert found.lines()[1].startswith("  though not so: ")


def test_other_options_of_the_caller(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", pipe("red apple", seed=1, steps=2), Sampler="unheard_of")
    with pytest.raises(InputError, match=r"a.png: unknown sampler 'unheard_of'"):
        again(path, folder)
    found = again(path, folder, sampler="euler_ancestral")
    assert not found.same
    assert found.reasons == ("Sampler: unheard_of in the file, euler_ancestral here",)


def test_another_model(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", context_dim=16)
    path = write(tmp_path / "a.png", pipe("red apple", seed=1, steps=2))
    made = darkroom.load(other, device="cpu")  # equal weights of another name are no difference
    assert replay(path, model=other).same and made.name == "other"
    found = replay(path, model=tiny_model(tmp_path / "wider", quant_conv=True))
    assert "Model: tiny in the file, wider here" in found.reasons
    with pytest.raises(InputError, match=r"a.png: its model cannot be opened: unknown model 'tiny'"):
        replay(path)


def test_other_weights_of_the_same_name(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    request, origin = pipe.request("red apple", seed=1, steps=2), Origin(path=folder)
    made = parameters_of(request, pipe.model, pipe.name, 0, origin)
    assert made.values["Weights"] == origin.weights
    path = write(tmp_path / "a.png", pipe("red apple", seed=1, steps=2), Weights="0123456789abcdef")
    reasons = again(path, folder).reasons
    assert len(reasons) == 1 and reasons[0].startswith("Weights: 0123456789abcdef in the file, ")


def test_the_picture_it_started_from(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    drawn, photos = tmp_path / "drawn", tmp_path / "photos"
    drawn.mkdir()
    photos.mkdir()
    for number in range(3):
        picture(photos / f"{number}.png", number)
    start = Image.open(photos / "1.png")
    result = pipe("red apple", seed=1, steps=4, strength=0.5, count=2, image=start)
    path = write(drawn / "a.png", result, 1)
    with pytest.raises(
        InputError, match=r"a.png: was made from a picture \(`image`, hash \w+\) that is not in"
    ):
        again(path, folder)
    with pytest.raises(InputError, match="neither beside it nor among those given"):
        again(path, folder, pictures=[photos / "0.png"])
    for place in (photos, photos / "1.png"):
        assert again(path, folder, pictures=[place]).same
    (drawn / "renamed.png").write_bytes((photos / "1.png").read_bytes())
    (drawn / "broken.jpg").write_bytes(b"no picture")
    assert again(path, folder).same
    assert again(path, folder, image=Image.open(photos / "2.png")).reasons[0].startswith("Image hash: ")


def test_a_picture_that_was_stretched_and_a_mask(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    start = Image.open(picture(tmp_path / "start.png", 1, side=40))
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    mask.save(tmp_path / "mask.png")
    result = pipe("red apple", seed=1, steps=3, width=32, height=32, image=start, mask=mask)
    assert {"Image hash", "Mask hash"} <= result.parameters[0].values.keys()
    assert again(write(tmp_path / "a.png", result), folder).same


def test_latents_of_the_caller(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    path = write(tmp_path / "a.png", pipe("red apple", seed=1, steps=2, latents=latents))
    with pytest.raises(
        InputError, match=r"a.png: was made from `latents` \(hash \w+\), which its caller gave"
    ):
        again(path, folder)
    assert again(path, folder, latents=latents).reasons == ()
    assert again(path, folder, latents=-latents).reasons[0].startswith("Latents hash: ")


def test_the_refiner_is_found_by_its_name(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    refiner = darkroom.load(folder, device="cpu")
    result = pipe("red apple", seed=1, steps=4, refiner=refiner, refiner_start=0.5)
    assert result.parameters[0].values["Refiner"] == "tiny"
    found = again(write(tmp_path / "a.png", result), folder)
    assert found.same and found.reasons == ()


def test_a_file_of_a1111(folder: Path, tmp_path: Path) -> None:
    text = (
        "red apple\nNegative prompt: blue\nSteps: 4, Sampler: Euler a, Schedule type: Karras, CFG scale: 2, "
        "Seed: 3, Size: 32x32, Model hash: 0123456789, Model: tiny, RNG: CPU, Version: v1.10.1"
    )
    save_png(tmp_path / "a.png", Image.new("RGB", (32, 32)), text)
    found = again(tmp_path / "a.png", folder)
    ours = darkroom.load(folder, device="cpu")(
        "red apple", negative_prompt="blue", steps=4, sampler="euler_ancestral", schedule="karras",
        guidance_scale=2, seed=3, compat="a1111",
    )  # fmt: skip
    assert found.image.tobytes() == ours.images[0].tobytes()
    assert f"Version: v1.10.1 in the file, darkroom {darkroom.__version__} here" in found.reasons
    assert "Model hash: 0123456789 in the file, a folder here" in found.reasons
    assert not any("Sampler" in reason or "noise" in reason for reason in found.reasons)
    save_png(tmp_path / "a.png", Image.new("RGB", (32, 32)), text.replace("RNG: CPU, ", ""))
    assert again(tmp_path / "a.png", folder).reasons[-1].startswith("its noise")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no parameters"),
        ("only a prompt", "holds parameters without values"),
        ("a\nSteps: 4, Sampler: euler, Seed: 1", "does not name its model"),
        ("a\nSteps: x, Sampler: euler, Seed: 1", "'Steps' cannot be read"),
        ("a\nSteps: 4, Sampler: euler, Seed: -1, Model: darkroom-shapes", "seed -1 is out of range"),
        ('a\nSteps: 4, Sampler: euler, Model: darkroom-shapes, Parts: "3,4"', "'Parts'"),
    ],
)
def test_files_that_cannot_be_replayed(tmp_path: Path, text: str | None, message: str) -> None:
    save_png(tmp_path / "a.png", Image.new("RGB", (8, 8)), text)
    with pytest.raises(InputError, match=message):
        replay(tmp_path / "a.png")


def test_no_picture_and_sheets(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        replay(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(InputError, match=r"text.png: not a picture"):
        replay(tmp_path / "text.png")
    save_png(
        tmp_path / "sheet.png", Image.new("RGB", (8, 8)), "a\nSteps: 1, Seed: 2, Size: 3x3", {CELLS: "[]"}
    )
    with pytest.raises(InputError, match="sheet of several pictures"):
        replay(tmp_path / "sheet.png")


def test_a_size_that_differs(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", pipe("red apple", seed=1, steps=2), Size="24x32")
    found = again(path, folder)
    assert not found.same and found.lines()[0] == "another picture: 32x32 in the file, 24x32 here"


def test_the_command(
    pipe: Pipeline,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = pipe("red apple", seed=1, steps=2)
    path = write(Path("a.png"), result)
    cli_replay.replay(path, output=Path("b.png"), model_dir=(folder.parent,))
    assert capsys.readouterr().out == "a.png: the same picture, byte for byte\n"
    assert Path("b.png").read_bytes() == path.read_bytes()
    with pytest.raises(
        DarkroomError, match=r"a.png: another picture: \d+ of 1024 pixels differ.*\n  Schedule"
    ):
        cli_replay.replay(path, output=Path("c.png"), model_dir=(folder.parent,), schedule="karras")
    assert parse_parameters(read_parameters(Path("c.png")) or "").values["Schedule type"] == "karras"
    with pytest.raises(InputError, match="is the picture to draw again"):
        cli_replay.replay(path, output=Path("a.png"))
    with pytest.raises(InputError, match=r"gone.png: no such file"):
        cli_replay.replay(Path("gone.png"))
