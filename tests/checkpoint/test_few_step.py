"""Models of few steps are told by names, headers, schedulers and networks, and drawn as published."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoint.test_load import SMALL, build, original, tokenizers  # noqa: F401
from tests.networks import with_unit_gain

from darkroom.checkpoint.build import build_network
from darkroom.checkpoint.few_step import RECIPES, few_step, names_of
from darkroom.checkpoint.formats.io import save_tensors
from darkroom.checkpoint.load import load_any
from darkroom.diffusion.denoiser import Denoiser
from darkroom.diffusion.samplers.cards import CARDS as SAMPLERS
from darkroom.diffusion.schedule_cards import CARDS as SCHEDULES
from darkroom.families import FAMILIES
from darkroom.nn.unet import UNetConfig

NAMED = [
    ("sdxl", "sd_xl_turbo_1.0_fp16", "SDXL-Turbo", 1, 1.0),
    ("sdxl", "models--stabilityai--sdxl-turbo", "SDXL-Turbo", 1, 1.0),
    ("sd2-base", "sd_turbo", "SD-Turbo", 1, 1.0),
    ("sdxl", "sdxl_lightning_4step", "SDXL-Lightning", 4, 1.0),
    ("sdxl", "sdxl_lightning_8step", "SDXL-Lightning", 8, 1.0),
    ("sdxl", "sdxl_lightning_1step_x0", "SDXL-Lightning, 1 step", 1, 1.0),
    ("sdxl", "realvisxlV50_v50LightningBakedvae", "SDXL-Lightning", 4, 1.0),
    ("sdxl", "dreamshaperXL_v21TurboDPMSDE", "SDXL merged with Turbo", 6, 2.0),
    ("sdxl", "DreamShaperXL_Turbo_v2_1", "SDXL merged with Turbo", 6, 2.0),
    ("sdxl", "Hyper-SDXL-8steps-CFG", "Hyper-SD with guidance", 8, 5.0),
    ("sdxl", "Hyper-SDXL-12steps-CFG", "Hyper-SD with guidance", 12, 5.0),
    ("sdxl", "Hyper-SDXL-1step-Unet-Comfyui.fp16", "Hyper-SD, 1 step", 1, 1.0),
    ("sd1", "Realistic_Vision_V6.0_NV_B1_fp16_hyper_4steps", "Hyper-SD", 4, 1.0),
    ("sd1", "LCM_Dreamshaper_v7_4k", "LCM", 4, 1.0),
    ("sd1", "dreamshaper_8LCM", "LCM", 4, 1.0),
    ("sdxl", "my-tcd-merge 6 steps", "TCD", 6, 1.0),
    ("sdxl", "dmd2_sdxl_4step_unet_fp16", "DMD2", 4, 1.0),
    ("sd3.5-large", "sd3.5_large_turbo", "Stable Diffusion 3.5 large turbo", 4, 1.0),
    ("flux-dev", "flux1-dev-schnell-merge", "FLUX.1 [dev] merged with schnell", 4, None),
    ("flux-dev", "Hyper-FLUX.1-dev-16steps", "FLUX.1 [dev] with Hyper-SD or Turbo", 16, None),
]
ORDINARY = [
    ("sd1", "v1-5-pruned-emaonly"),
    ("sdxl", "sd_xl_base_1.0"),
    ("sdxl", "hyperrealism_v3"),
    ("sdxl", "hyper_realism_XL"),
    ("sd1", "lightning_art_v2"),
    ("sd1", "turbo_art"),
    ("sd3.5-large", "sd3.5_large_TurboX"),
    ("sd3.5-large", "sd3.5_large"),
    ("flux-dev", "flux1-dev"),
    ("playground-v2.5", "playground-lightning"),
    ("sdxl", "calcme"),
]


@pytest.mark.parametrize(("family", "name", "title", "steps", "scale"), NAMED)
def test_told_by_a_name(family: str, name: str, title: str, steps: int, scale: float | None) -> None:
    found = few_step(family, [name])
    assert found is not None and name in found.why
    assert (found.recipe.title, found.steps, found.guidance_scale) == (title, steps, scale)


@pytest.mark.parametrize(("family", "name"), ORDINARY)
def test_ordinary_names_tell_nothing(family: str, name: str) -> None:
    assert few_step(family, [name]) is None


def test_the_title_in_a_header_counts_where_the_name_says_nothing() -> None:
    found = few_step("sdxl", ["model", "Juggernaut XL Lightning"])
    assert found is not None and found.recipe.title == "SDXL-Lightning" and "Juggernaut" in found.why
    assert few_step("sdxl", ["lightning-merge", "8 steps"]).steps == 8  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("said", ["0step", "99steps", "step", "4stepping", "v4 stepwise"])
def test_steps_that_cannot_be_are_not_believed(said: str) -> None:
    found = few_step("sdxl", [f"lightning {said}"])
    assert found is not None and found.steps == 4


@pytest.mark.parametrize(("scheduler", "title"), [("LCMScheduler", "LCM"), ("TCDScheduler", "TCD")])
def test_told_by_the_scheduler(scheduler: str, title: str) -> None:
    found = few_step("sd1", ["model"], scheduler=scheduler)
    assert found is not None and found.recipe.title == title and found.guidance_scale == 1
    assert few_step("sd1", ["model"], scheduler="DDIMScheduler") is None


def test_told_by_a_network_that_is_told_the_guidance() -> None:
    found = few_step("sd1", ["model"], embeds_guidance=True)
    assert found is not None
    assert (found.recipe.title, found.steps, found.guidance_scale) == ("LCM", 4, 8.0)


def test_told_by_trailing_timesteps_at_a_smaller_size() -> None:
    assert few_step("sdxl", [], trailing_at=512).recipe.title == "SDXL-Turbo"  # pyright: ignore[reportOptionalMemberAccess]
    assert few_step("sd2-base", [], trailing_at=512).recipe.title == "SD-Turbo"  # pyright: ignore[reportOptionalMemberAccess]
    for family, size in (("sdxl", 1024), ("sdxl", None), ("sd1", 512)):
        assert few_step(family, [], trailing_at=size) is None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.title)
def test_recipes_name_what_there_is(recipe: Any) -> None:
    assert set(recipe.families) <= FAMILIES.keys()
    assert recipe.sampler is None or recipe.sampler in SAMPLERS
    assert recipe.schedule is None or recipe.schedule in SCHEDULES
    for family in recipe.families:
        path = FAMILIES[family].spec.path
        assert recipe.schedule is None or path.kind in SCHEDULES[recipe.schedule].paths


def test_defaults_change_where_the_recipe_says() -> None:
    spec = FAMILIES["sdxl"].spec
    turbo = few_step("sdxl", ["sdxl-turbo"])
    assert turbo is not None
    drawn = turbo.spec(spec).defaults
    assert (drawn.width, drawn.height, drawn.steps, drawn.guidance_scale) == (512, 512, 1, 1.0)
    assert (drawn.sampler, drawn.schedule, drawn.strength) == ("euler_ancestral", "trailing", 0.3)
    kept = turbo.spec(spec, keep_schedule=True).defaults
    assert (kept.sampler, kept.schedule, kept.steps) == ("euler", "leading", 1)
    one = few_step("sdxl", ["lightning_1step"])
    assert one is not None
    assert (one.spec(spec).prediction, one.spec(spec, keep_schedule=True).prediction) == ("x0", "eps")
    merge = few_step("flux-dev", ["flux-dev-schnell"])
    assert merge is not None
    flux = FAMILIES["flux-dev"].spec
    assert merge.spec(flux) == replace(flux, defaults=replace(flux.defaults, steps=4))


def test_names_of_files_and_folders(tmp_path: Path) -> None:
    file = tmp_path / "sd.v1.safetensors"
    header = {"modelspec.title": "Nice", "ss_output_name": "out", "other": "x"}
    assert names_of(file, header) == ["sd.v1", "Nice", "out"]
    snapshot = tmp_path / "models--stabilityai--sdxl-turbo" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    assert names_of(snapshot, {"_name_or_path": "base"}) == ["models--stabilityai--sdxl-turbo", "base"]
    assert names_of(snapshot.parent, {})[0] == "snapshots"


@pytest.mark.parametrize(
    ("file", "metadata", "expected"),
    [
        ("model", {}, (50, 5.0, "euler", "leading")),
        ("sdxl_lightning_4step", {}, (4, 1.0, "euler", "trailing")),
        ("model", {"modelspec.title": "Hyper XL 8 steps"}, (8, 1.0, "ddim", "trailing")),
        ("model_lcm", {}, (4, 1.0, "lcm", "lcm")),
    ],
)
def test_a_single_file(
    file: str,
    metadata: dict[str, str],
    expected: tuple[int, float, str, str],
    tokenizers: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    save_tensors(tmp_path / f"{file}.safetensors", original("sdxl", build("sdxl", tokenizers)), metadata)
    model = load_any(tmp_path / f"{file}.safetensors", tokenizers=tokenizers)
    d = model.spec.defaults
    assert (d.steps, d.guidance_scale, d.sampler, d.schedule) == expected


def test_a_file_of_one_step_predicts_the_picture(tokenizers: Path, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "sdxl_lightning_1step_x0.safetensors"
    save_tensors(path, original("sdxl", build("sdxl", tokenizers)), {})
    model = load_any(path, tokenizers=tokenizers)
    assert model.spec.prediction == model.denoiser.prediction == "x0"


def test_a_file_whose_network_is_told_the_guidance(tokenizers: Path, tmp_path: Path) -> None:  # noqa: F811
    plain = build("sd1", tokenizers)
    config = replace(SMALL["sd1"]["network"], guidance_dim=256)
    network = with_unit_gain(build_network(config), 9)
    spec = plain.spec
    model = replace(plain, denoiser=Denoiser(network, spec.path, spec.prediction))
    save_tensors(tmp_path / "model.safetensors", original("sd1", model), {})
    loaded = load_any(tmp_path / "model.safetensors", tokenizers=tokenizers)
    assert loaded.network.config == config
    d = loaded.spec.defaults
    assert (d.steps, d.guidance_scale, d.sampler, d.schedule) == (4, 8.0, "lcm", "lcm")


@pytest.fixture(scope="module")
def saved_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    from tests.parity.pipelines import sdxl

    folder = tmp_path_factory.mktemp("xl")
    sdxl(folder).save_pretrained(folder / "model")
    return folder / "model"


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


TRAILING = {"timestep_spacing": "trailing"}
V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
FOLDERS = [
    ("model", {}, {}, (50, 5.0, "euler", "leading")),
    ("sdxl-lightning-4step", {}, {}, (4, 1.0, "euler", "trailing")),
    ("sdxl-turbo", {}, {}, (1, 1.0, "euler_ancestral", "trailing")),
    ("sdxl-turbo", TRAILING, {}, (1, 1.0, "euler", "trailing")),
    ("model", {"_class_name": "LCMScheduler"}, {}, (4, 1.0, "lcm", "lcm")),
    ("model", {"_class_name": "TCDScheduler"}, {}, (4, 1.0, "tcd", "lcm")),
    ("model", TRAILING, {"sample_size": 64}, (1, 1.0, "euler", "trailing")),
    ("model", TRAILING | V, {"sample_size": 64}, (50, 5.0, "euler", "trailing")),
    ("model", TRAILING, {"sample_size": 128}, (50, 5.0, "euler", "trailing")),
    ("model", {}, {"_name_or_path": "ByteDance/SDXL-Lightning"}, (4, 1.0, "euler", "trailing")),
]


@pytest.mark.parametrize(("name", "scheduler", "unet", "expected"), FOLDERS)
def test_a_folder_of_diffusers(
    name: str,
    scheduler: dict[str, Any],
    unet: dict[str, Any],
    expected: tuple[Any, ...],
    saved_xl: Path,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(saved_xl, tmp_path / name)
    _edit(folder / "scheduler" / "scheduler_config.json", **scheduler)
    _edit(folder / "unet" / "config.json", **unet)
    d = load_any(folder).spec.defaults
    assert (d.steps, d.guidance_scale, d.sampler, d.schedule) == expected


def test_a_folder_of_lcms_pipeline(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from tests.parity.pipelines import WIDTH, sd15, unet

    pipe = sd15(tmp_path, network=unet(WIDTH, time_cond_proj_dim=256))
    pipe.save_pretrained(tmp_path / "model")
    _edit(tmp_path / "model" / "model_index.json", _class_name="LatentConsistencyModelPipeline")
    model = load_any(tmp_path / "model")
    assert isinstance(model.network.config, UNetConfig) and model.network.config.guidance_dim == 256
    d = model.spec.defaults
    assert (d.steps, d.guidance_scale, d.sampler, d.schedule) == (4, 8.0, "lcm", "lcm")


def row(recipe: Any) -> str:
    """A recipe as the documentation has it."""
    kept = "as the family"
    guidance = kept if recipe.guidance_scale is None else f"{recipe.guidance_scale:g}"
    families = ", ".join(recipe.families)
    title = recipe.title + (f", {recipe.size} px" if recipe.size else "")
    title += ", predicts x0" if recipe.prediction == "x0" else ""
    cells = (
        title,
        families,
        recipe.steps,
        guidance,
        recipe.sampler or kept,
        recipe.schedule or kept,
        recipe.source,
    )
    return f"| {' | '.join(map(str, cells))} |"


def test_the_documentation_has_every_recipe() -> None:
    page = (Path(__file__).parents[2] / "docs" / "few-step.md").read_text(encoding="utf-8")
    assert [line for line in page.splitlines() if line.startswith("|")][2:] == [row(r) for r in RECIPES]


def test_no_torch() -> None:
    code = "import sys, darkroom.checkpoint.few_step; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "False"
