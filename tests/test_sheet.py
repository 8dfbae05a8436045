"""Contact sheets over options: how axes are written, what is drawn in which cell, what is refused first."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from darkroom.diffusion.guidance_settings import Guidance
from darkroom.edit.hires import Hires
from darkroom.errors import Cancelled, InputError
from darkroom.images import parse_parameters, read_parameters
from darkroom.parameters import options_of
from darkroom.pipeline import Pipeline
from darkroom.progress import Progress
from darkroom.sheet import BLANK, CELLS, Axis, parse_axis, parse_grid, sheet
from tests.tiny import tiny_parts


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(tiny_parts(), name="tiny")


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("sampler=euler,dpmpp_2m", "sampler", ["euler", "dpmpp_2m"]),
        ("steps=10, 20", "steps", [10, 20]),
        ("steps=1..4", "steps", [1, 2, 3, 4]),
        ("seed=5..3", "seed", [5, 4, 3]),
        ("steps=10..30/5,40", "steps", [10, 15, 20, 25, 30, 40]),
        ("guidance=1..8/4", "guidance_scale", [1.0, 1 + 7 / 3, 1 + 14 / 3, 8.0]),
        ("strength=0.1..0.9/5", "strength", [0.1, 0.3, 0.5, 0.7, 0.9]),
        ("guidance_scale=3,7.5", "guidance_scale", [3.0, 7.5]),
        ("true-guidance=1,2", "true_guidance_scale", [1.0, 2.0]),
        ("seed=18446744073709551615", "seed", [2**64 - 1]),
        ("prompt=red|blue, dark", "prompt", ["red", "blue, dark"]),
        ("prompt=red|", "prompt", ["red", ""]),
        ("negative=blurry, dark|", "negative_prompt", ["blurry, dark", ""]),
        ("size=32,48x24", "size", [(32, 32), (48, 24)]),
        ("compat=darkroom,a1111", "compat", ["darkroom", "a1111"]),
    ],
)
def test_an_axis(text: str, name: str, values: list[Any]) -> None:
    axis = parse_axis(text)
    assert (axis.name, axis.field) == (name, None)
    assert list(axis.values) == pytest.approx(values) if isinstance(values[0], float) else values
    assert [type(value) for value in axis.values] == [type(value) for value in values]


def test_a_field_of_an_option() -> None:
    axis = parse_axis("sampler_options.eta=0..1/3,false,word")
    assert (axis.name, axis.field, axis.values) == ("sampler_options", "eta", (0.0, 0.5, 1.0, False, "word"))
    assert axis.set("a", {"sampler_options": {"churn": 2}}, 0.5)[1] == {
        "sampler_options": {"churn": 2, "eta": 0.5}
    }
    scaled = parse_axis("hires.scale=1.5,2")
    assert scaled.set("a", {"hires": Hires(steps=3)}, 1.5)[1] == {"hires": Hires(scale=1.5, steps=3)}
    assert scaled.set("a", {}, 1.5)[1] == {"hires": Hires(scale=1.5)}
    assert scaled.labels == ["scale: 1.5", "scale: 2"]
    rescaled = parse_axis("guidance.rescale=0..0.7/2")
    by = Guidance(interval=(0.0, 0.5), scales=lambda done: 3.0)
    assert rescaled.set("a", {"guidance": by}, 0.7)[1] == {"guidance": replace(by, rescale=0.7)}
    with pytest.raises(InputError, match="scal"):
        parse_axis("hires.scal=1").set("a", {}, 1.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stesp=1,2", "unknown axis 'stesp': did you mean 'steps'"),
        ("image=a.png", "unknown axis 'image'"),
        ("latents=1", "unknown axis 'latents'"),
        ("count=1,2", "unknown axis 'count'"),
        ("steps.x=1", "unknown axis 'steps.x'"),
        ("steps", "an axis is NAME=VALUES"),
        ("steps=", "an axis is NAME=VALUES"),
        ("steps=1,,2", "a value is missing in '1,,2'"),
        ("steps=1,two", "steps: a whole number is needed, not 'two'"),
        ("steps=1.5", "steps: a whole number is needed, not '1.5'"),
        ("guidance=x", "guidance_scale: a number is needed, not 'x'"),
        ("guidance=1..8", "say how many numbers, as 1..8/5"),
        ("steps=10..20/4", "these are no whole numbers"),
        ("steps=1..2/1", "a range has 2 to 1000"),
        ("seed=0..99999999999", "say how many"),
        ("seed=1..600,1001..1600", "at most 1000"),
        ("steps=1,2,1", "a value is there twice"),
        ("size=32x", None),
        ("size=big", "size: N or WIDTHxHEIGHT is needed, not 'big'"),
    ],
)
def test_an_axis_that_cannot_be(text: str, message: str | None) -> None:
    if message is None:
        assert parse_axis(text).values == ((32, 32),)
        return
    with pytest.raises(InputError, match=message):
        parse_axis(text)


def test_a_grid() -> None:
    x, y = parse_grid(["y=steps=1,2", "x=prompt=a=1|b"])
    assert (x and x.values, y and y.name) == (("a=1", "b"), "steps")
    assert parse_grid(["y=steps=1"])[0] is None
    for texts, message in (
        (["steps=1"], "an axis is x=NAME=VALUES"),
        (["x"], "an axis is x=NAME=VALUES"),
        (["x=steps=1", "x=seed=1"], "x is given twice"),
        (["x=guidance=1", "y=guidance_scale=2"], "both axes change guidance_scale"),
    ):
        with pytest.raises(InputError, match=message):
            parse_grid(texts)
    assert parse_grid(["x=hires.scale=2", "y=hires.steps=2"])


def test_cells_are_the_pictures_of_their_options(pipe: Pipeline) -> None:
    x, y = parse_grid(["x=steps=2,3,4", "y=sampler=euler,euler_ancestral"])
    made = sheet(pipe, "red apple", {"seed": 3}, x=x, y=y)
    assert len(made.results) == 6 and not made.stopped
    options: list[tuple[str, int]] = [(s, n) for s in ("euler", "euler_ancestral") for n in (2, 3, 4)]
    for result, (sampler, steps) in zip(made.results, options, strict=True):
        alone = pipe("red apple", seed=3, sampler=sampler, steps=steps)
        assert result.images[0].tobytes() == alone.images[0].tobytes()
    # Four times as large, so that labels can be read.
    pixels = np.asarray(made.image)
    for number, right in ((5, 4), (4, 4 + 132)):
        cell = pixels[-4 - 128 : -4, pixels.shape[1] - right - 128 : pixels.shape[1] - right]
        assert (cell[::4, ::4] == np.asarray(made.results[number].images[0])).all()


def test_the_prompt_by_search_and_replace(pipe: Pipeline) -> None:
    made = sheet(pipe, "red apple, red", {"seed": 3, "steps": 2}, x=parse_axis("prompt=red|blue"))
    assert [r.parameters[0].prompt for r in made.results] == ["red apple, red", "blue apple, blue"]
    with pytest.raises(InputError, match="'green', the first value, is not in the prompt 'red apple'"):
        sheet(pipe, "red apple", {}, x=parse_axis("prompt=green|blue"))


def test_one_seed_for_all_cells(pipe: Pipeline) -> None:
    made = sheet(pipe, "red apple", {"steps": 1}, x=parse_axis("guidance=1,2,3"))
    assert len({result.seeds[0] for result in made.results}) == 1
    other = sheet(pipe, "red apple", {"steps": 1}, x=parse_axis("guidance=1,2,3"))
    assert made.results[0].seeds != other.results[0].seeds
    seeds = sheet(pipe, "red apple", {"steps": 1}, y=parse_axis("seed=7..9"))
    assert [result.seeds for result in seeds.results] == [[7], [8], [9]]
    assert seeds.image.height > 3 * 32 and seeds.image.width < 200


def test_all_pictures_of_a_cell_are_shown(pipe: Pipeline) -> None:
    made = sheet(pipe, "red apple", {"steps": 1, "count": 3}, x=parse_axis("guidance=1,2"))
    assert [len(result.images) for result in made.results] == [3, 3]
    assert made.image.width == 4 + 2 * (4 + 2 * 36 + 4)


def test_nothing_is_drawn_where_a_cell_is_impossible(pipe: Pipeline) -> None:
    seen: list[Progress] = []
    for axes, message in (
        (["x=steps=2,3", "y=sampler=euler,eular"], "the cell sampler: eular, steps: 2: unknown sampler"),
        (["x=size=32,33"], "the cell size: 33x33: width must divide by 4"),
        (["x=guidance=1,2", "y=steps=1,0"], "the cell steps: 0, guidance scale: 1: steps must be"),
    ):
        x, y = parse_grid(axes)
        with pytest.raises(InputError, match=message):
            sheet(pipe, "red apple", {}, x=x, y=y, on_step=seen.append)
    with pytest.raises(InputError, match="at most 1000 cells, not 1600"):
        sheet(pipe, "a", {}, x=parse_axis("seed=1..40"), y=parse_axis("steps=1..40"))
    with pytest.raises(InputError, match="needs an axis"):
        sheet(pipe, "a", {})
    assert seen == []


def test_progress_is_of_the_whole_sheet(pipe: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    x, y = parse_grid(["x=steps=2,3", "y=guidance=1,2"])
    options: Any = {"count": 3, "batch_size": 2}
    sheet(pipe, "red apple", options, x=x, y=y, on_step=lambda p: seen.append((p.done, p.total)))
    assert seen == [(n, 20) for n in range(1, 21)]


def test_stopping_keeps_the_cells_before(pipe: Pipeline) -> None:
    def stop(at: int) -> Any:
        def on_step(progress: Progress) -> None:
            if progress.done == at:
                raise Cancelled("stopped")

        return on_step

    axis = parse_axis("seed=1..3")
    made = sheet(pipe, "red apple", {"steps": 2}, x=axis, on_step=stop(5))
    assert made.stopped and len(made.results) == 2
    whole = sheet(pipe, "red apple", {"steps": 2}, x=axis)
    assert made.image.size == whole.image.size
    assert made.image.getpixel((made.image.width - 10, made.image.height - 10)) == BLANK
    with pytest.raises(Cancelled):
        sheet(pipe, "red apple", {"steps": 2}, x=axis, on_step=stop(1))


def test_warnings_are_given_once(pipe: Pipeline) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sheet(pipe, "red apple", {"steps": 1, "negative_prompt": "blue"}, x=parse_axis("guidance=1,1.5,2"))
    assert [str(w.message) for w in caught] == ["without guidance the negative prompt changes nothing"]


def test_the_file_says_what_all_have_in_common_and_each_cell_its_own(pipe: Pipeline, tmp_path: Path) -> None:
    x, y = parse_grid(["x=sampler=euler,dpmpp_2m", "y=size=32,48x24"])
    made = sheet(pipe, "red apple", {"seed": 3, "steps": 2, "negative_prompt": "blue"}, x=x, y=y)
    made.save(tmp_path / "sheet.png")
    found = parse_parameters(read_parameters(tmp_path / "sheet.png") or "")
    assert (found.prompt, found.negative) == ("red apple", "blue")
    assert not {"Sampler", "Size"} & found.values.keys() and found.values["Seed"] == "3"
    assert json.loads(found.values["X Values"]) == ["euler", "dpmpp_2m"]
    assert (found.values["Y Type"], json.loads(found.values["Y Values"])) == ("size", ["32x32", "48x24"])
    cells = json.loads(Image.open(tmp_path / "sheet.png").info[CELLS])
    assert len(cells) == 4
    for (text,), result in zip(cells, made.results, strict=True):
        call = options_of(parse_parameters(text))
        assert pipe(call.prompt, **call.options).images[0].tobytes() == result.images[0].tobytes()
    made.save(tmp_path / "bare.png", metadata=False)
    assert not Image.open(tmp_path / "bare.png").info


def test_labels() -> None:
    assert Axis(name="guidance_scale", values=(1.0, 2.5, 1 / 3)).labels == [
        "guidance scale: 1", "guidance scale: 2.5", "guidance scale: 0.3333333333",
    ]  # fmt: skip
