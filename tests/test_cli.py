"""The command line: what it writes and prints, how fast it answers, and what its mistakes look like."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from darkroom import cli
from darkroom.checkpoint import summary
from darkroom.images import parse_parameters, read_parameters
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]  # a relative PYTHONPATH counts from here


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*args: object) -> int:
    """The exit code, also where the parser exits by itself."""
    try:
        return cli.main([str(arg) for arg in args])
    except SystemExit as exit_:
        return int(exit_.code or 0)


def picture(path: str, width: int = 64, height: int = 32) -> str:
    y, x = np.mgrid[:height, :width]
    Image.fromarray(np.stack([x * 3, y * 7, x + y], -1).astype(np.uint8)).save(path)
    return path


def test_generate_writes_a_picture_with_its_parameters(model: str, capsys: pytest.CaptureFixture) -> None:
    assert (
        run("generate", "red apple", "--model", model, "--seed", 1, "--negative", "blue", "-o", "a.png") == 0
    )
    assert capsys.readouterr().out == "a.png: seed 1\n"
    assert Image.open("a.png").size == (32, 32)
    found = parse_parameters(read_parameters(Path("a.png")))
    assert (found.prompt, found.negative, found.values["Seed"]) == ("red apple", "blue", "1")


def test_the_same_command_twice_gives_the_same_bytes(model: str) -> None:
    for name in ("a.png", "b.png"):
        assert run("generate", "red apple", "--model", model, "--seed", 1, "-o", name) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_options_reach_the_pipeline(model: str) -> None:
    options = [
        "--steps",
        "3",
        "--guidance",
        "2.5",
        "--size",
        "48x24",
        "--sampler",
        "euler",
        "--schedule",
        "karras",
        "--seed",
        "9",
    ]
    assert run("generate", "red apple", "--model", model, *options, "-o", "a.png") == 0
    assert Image.open("a.png").size == (48, 24)
    assert parse_parameters(read_parameters(Path("a.png"))).values.items() >= {
        "Steps": "3", "Sampler": "euler", "Schedule type": "karras", "CFG scale": "2.5", "Seed": "9",
        "Size": "48x24", "Model": Path(model).name,
    }.items()  # fmt: skip


def test_several_pictures_are_numbered(model: str, capsys: pytest.CaptureFixture) -> None:
    options = ("--model", model, "--seed", 3, "--steps", 2, "--exact", "--size", 24)
    assert run("generate", "red apple", *options, "--count", 3, "-o", "a.png") == 0
    assert capsys.readouterr().out == "a-0.png: seed 3\na-1.png: seed 4\na-2.png: seed 5\n"
    assert not Path("a.png").exists()
    options = ("--model", model, "--seed", 4, "--steps", 2, "--exact", "--size", 24)
    assert run("generate", "red apple", *options, "-o", "one.png") == 0
    assert Path("one.png").read_bytes() == Path("a-1.png").read_bytes()


def test_no_metadata_leaves_it_out(model: str) -> None:
    assert run("generate", "red apple", "--model", model, "--steps", 1, "--no-metadata", "-o", "a.png") == 0
    assert read_parameters(Path("a.png")) is None


def test_mkdir_makes_the_folder(model: str) -> None:
    command = ("generate", "red apple", "--model", model, "--steps", 1, "-o", "new/a.png")
    assert run(*command) == 2
    assert not Path("new").exists()
    assert run(*command, "--mkdir") == 0
    assert Path("new/a.png").exists()


def test_demo_draws_a_labelled_grid(model: str) -> None:
    assert run("demo", "--model", model) == 0
    width, height = Image.open("demo.png").size
    assert width > 8 * 32 and height > 3 * 32


def test_encode_writes_one_tensor_a_picture(model: str, capsys: pytest.CaptureFixture) -> None:
    images = [picture("a.png"), picture("b.png", 32, 16)]
    assert run("encode", *images, "-o", "latents.safetensors", "--model", model) == 0
    assert capsys.readouterr().out == "a.png: 4x8x16\nb.png: 4x4x8\n"
    tensors = load_file("latents.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"a.png": (4, 8, 16), "b.png": (4, 4, 8)}
    with safe_open("latents.safetensors", "pt") as file:
        assert json.loads(file.metadata()["latent_space"])["stride"] == 4


def test_encode_refuses_sizes_that_do_not_divide_unless_cropped(
    model: str, capsys: pytest.CaptureFixture
) -> None:
    picture("odd.png", 30, 30)
    assert run("encode", "odd.png", "--model", model) == 2
    assert "odd.png: 30x30 does not divide by the stride 4" in capsys.readouterr().err
    assert not Path("latents.safetensors").exists()
    assert run("encode", "odd.png", "--model", model, "--size", 16) == 0


def test_reconstruct_shows_picture_reconstruction_and_error(
    model: str, capsys: pytest.CaptureFixture
) -> None:
    images = [picture("a.png"), picture("b.png")]
    assert run("reconstruct", *images, "-o", "out.png", "--model", model) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["a.png", "b.png"]
    assert all(line.endswith(" dB") and 0 < float(line.split()[1]) < 40 for line in lines)
    width, height = Image.open("out.png").size
    assert width > 3 * 64 and height > 2 * 32


def test_models_lists_what_is_bundled(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(summary, "bundled", lambda: {"darkroom-mini": Path(model)})
    assert run("models") == 0
    _, _, header, row, *rest = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["name", "year", "picture"]
    assert row.split()[:4] == ["darkroom-mini", "2026", "32x32", "4x8x8"]
    table = "\n".join(rest)
    assert "859.52 M" in table and "11.90 B" in table and "no commercial use" in table
    assert "FLUX.1 [pro] is closed" in table


def test_train_takes_overrides_as_dotted_names(tmp_path: Path) -> None:
    args = ["train", "denoiser", "r.toml", "--optim.lr", "-1", "--out=x", "--train.batch-size", "4"]
    rest, overrides = cli.split_overrides(args)
    assert rest == ["train", "denoiser", "r.toml"]
    assert overrides == {"optim.lr": "-1", "out": "x", "train.batch_size": "4"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generat", "x"), "unknown command 'generat': did you mean 'generate'"),
        (("generate", "x", "--model", "darkroom-mni"), "unknown model 'darkroom-mni'"),
        (("generate", "x", "--model", "./nothing"), "no such file or folder"),
        (("generate", "x", "-o", "no/where.png"), "does not exist (--mkdir makes it)"),
        (("generate", "x", "-o", "x.jpg"), "must be a .png file"),
        (("generate", "x", "--size", "12y"), "--size must be N or WIDTHxHEIGHT"),
        (("generate", "x", "--stesp", "3"), "--steps"),
        (("generate", "x", "--steps", "many"), "--steps"),
        (("generate",), "required"),
        (("encode",), "name at least one picture"),
        (("encode", "gone.png"), "gone.png: no such file"),
        (("train", "autoencoder", "gone.toml"), "gone.toml: cannot be read"),
        (("train", "autoencodr", "gone.toml"), "autoencodr"),
        (("train", "autoencoder", "gone.toml", "--out"), "--out: no value given"),
    ],
)
def test_mistakes_exit_with_2_and_say_what_is_right(
    args: tuple, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert run(*args) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sampler", "eulr"), "did you mean 'euler'"),
        (("--steps", 0), "steps must be 1 or more"),
        (("--size", 30), "width must divide by 4"),
    ],
)
def test_the_pipelines_errors_are_printed(
    options: tuple, message: str, model: str, capsys: pytest.CaptureFixture
) -> None:
    assert run("generate", "red apple", "--model", model, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("darkroom: error: ") and message in error
    assert os.listdir() == []


def test_a_long_prompt_warns(model: str, capsys: pytest.CaptureFixture) -> None:
    long = "red apple " * 30
    assert run("generate", long, "--model", model, "--steps", 1, "--compat", "diffusers") == 0
    assert capsys.readouterr().err.startswith("darkroom: warning: the prompt ")


def test_a_bracket_without_its_other_half_warns(model: str, capsys: pytest.CaptureFixture) -> None:
    assert run("generate", "a (red apple", "--model", model, "--steps", 1) == 0
    assert "darkroom: warning" in (err := capsys.readouterr().err) and "(" in err


def test_an_unknown_recipe_field_names_the_nearest(capsys: pytest.CaptureFixture) -> None:
    Path("r.toml").write_text('out = "x"\n')
    assert run("train", "autoencoder", "r.toml", "--optim.lrr", "1e-4") == 2
    assert "unknown field 'optim.lrr': did you mean 'lr'?" in capsys.readouterr().err


def test_stopping_exits_with_130(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("darkroom.pipeline.Pipeline.__call__", stop)
    assert run("generate", "red apple", "--model", model) == 130
    assert os.listdir() == []


def test_export_writes_the_layout_of_diffusers(model: str, tmp_path: Path) -> None:
    assert run("export", model, "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae",
    }  # fmt: skip
    assert run("export", model, "out") == 2


def best_of(command: list[str], tries: int = 3) -> tuple[float, str]:
    """The CPU seconds of the fastest of a few runs: other processes on the machine must not fail a test."""
    times, output = [], ""
    for _ in range(tries):
        before = os.times()
        output = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=60, cwd=ROOT
        ).stdout
        after = os.times()
        times.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
        time.sleep(0.01)
    return min(times), output


def test_help_is_answered_in_half_a_second_without_torch() -> None:
    seconds, output = best_of([sys.executable, "-m", "darkroom", "--help"])
    assert "generate" in output
    assert seconds <= 0.5


def test_importing_the_package_takes_half_a_second_and_no_torch() -> None:
    code = "import sys, darkroom; print('torch' in sys.modules)"
    seconds, output = best_of([sys.executable, "-c", code])
    assert output.strip() == "False"
    assert seconds <= 0.5
