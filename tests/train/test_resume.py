"""A run that is killed and started again ends with the same bytes as one that was left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import equal

from darkroom.errors import DarkroomError, InputError
from darkroom.train import autoencoder
from tests.train.helpers import autoencoder_recipe

STEPS = 8
SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from darkroom.train import autoencoder, denoiser
from tests.train.helpers import autoencoder_recipe, denoiser_recipe
stage, out, first = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
if stage == "autoencoder":
    autoencoder.train(autoencoder_recipe(out, steps={steps}))
else:
    denoiser.train(denoiser_recipe(out, first, steps={steps}))
""".replace("{steps}", str(STEPS))


def start(stage: str, out: Path, first: Path) -> subprocess.Popen[bytes]:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}/src:{root}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, stage, str(out), str(first)], env=environment)


def kill_in_the_middle(process: subprocess.Popen[bytes], stage: str, out: Path) -> None:
    """Send SIGKILL once the run has saved a state but not finished."""
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "latest").exists():
        assert process.poll() is None and time.monotonic() < deadline, (
            "the run ended before it could be killed"
        )
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / f"{stage}.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_kill_and_resume_gives_the_same_weights(stage: str, tmp_path: Path) -> None:
    first = tmp_path / "first"
    autoencoder.train(autoencoder_recipe(first))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(stage, whole, first).wait() == 0
    kill_in_the_middle(start(stage, broken, first), stage, broken)
    assert start(stage, broken, first).wait() == 0
    files = sorted(p.relative_to(whole) for p in whole.rglob("*.safetensors") if "checkpoints" not in p.parts)
    assert files
    for name in files:
        expected, found = load_file(whole / name), load_file(broken / name)
        assert expected.keys() == found.keys()
        assert all(equal(expected[key], found[key]) for key in expected), name


def test_resume_after_an_interrupt_equals_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = autoencoder.train(autoencoder_recipe(tmp_path / "whole"))
    step = autoencoder.AutoencoderTask.after_step

    def interrupt(task: autoencoder.AutoencoderTask, number: int) -> None:
        step(task, number)
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(autoencoder.AutoencoderTask, "after_step", interrupt)
        with pytest.raises(DarkroomError, match="stopped at step 3 and saved"):
            autoencoder.train(autoencoder_recipe(tmp_path / "broken"))
    broken = autoencoder.train(autoencoder_recipe(tmp_path / "broken"))
    a, b = (load_file(folder / "autoencoder.safetensors") for folder in (whole, broken))
    assert all(equal(a[key], b[key]) for key in a)
    lines = (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [f'{{"step": {n}' for n in range(1, 7)]


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    autoencoder.train(autoencoder_recipe(tmp_path, steps=1))
    with pytest.raises(InputError, match="seed"):
        autoencoder.train(autoencoder_recipe(tmp_path, steps=2, seed=5))


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    autoencoder.train(autoencoder_recipe(tmp_path, steps=2))
    state = next((tmp_path / "checkpoints").glob("step-*")) / "networks.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot resume"):
        autoencoder.train(autoencoder_recipe(tmp_path, steps=4))


def test_a_full_disk_keeps_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from darkroom.train import state

    autoencoder.train(autoencoder_recipe(tmp_path, steps=2))

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", full)
        with pytest.raises(DarkroomError, match="No space left"):
            autoencoder.train(autoencoder_recipe(tmp_path, steps=4))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()] == ["step-00000002"]
    autoencoder.train(autoencoder_recipe(tmp_path, steps=4))
