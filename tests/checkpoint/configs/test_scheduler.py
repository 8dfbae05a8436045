"""diffusers' schedulers as paths and schedules: their levels are ours, and configs survive both ways."""

from typing import Any

import numpy as np
import pytest
from tests.checkpoint.configs.helpers import in_file

from darkroom.checkpoint.configs.scheduler import (
    WHOLE_TIMESTEPS,
    scheduler_config_from_diffusers,
    scheduler_config_to_diffusers,
)
from darkroom.diffusion.denoiser import Prediction
from darkroom.diffusion.path import DiscretePath, EDMPath, FlowPath, NoisePath, SizeShift
from darkroom.diffusion.schedules import SCHEDULES
from darkroom.errors import InputError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# As published: files are full of the fields of other classes.
SD15 = {"_class_name": "PNDMScheduler", "clip_sample": False, "set_alpha_to_one": False, **SD} | {
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD21 = SD15 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
SDXL = SD15 | {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
UPSCALER = SD21 | {"beta_start": 0.0001, "beta_end": 0.02}
PLAYGROUND = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "final_sigmas_type": "zero",
    "prediction_type": "epsilon",
    "rho": 7.0,
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "solver_order": 2,
}
DIT = {"_class_name": "DDIMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"} | {
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
}
SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
DEV = (
    SD3
    | {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15}
    | {"use_dynamic_shifting": True}
)
SCHNELL = DEV | {"shift": 1.0, "use_dynamic_shifting": False}
SOLVER = {"_class_name": "DPMSolverMultistepScheduler", **SD}
FLOW_SOLVER = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 2.5} | {
    "prediction_type": "flow_prediction"
}

SD_PATH = DiscretePath(final="first_level")
PUBLISHED = {
    "sd15": (SD15, ("eps", SD_PATH, "ddim", "leading")),
    "sd21": (SD21, ("v", SD_PATH, "ddim", "leading")),
    "sdxl": (SDXL, ("eps", DiscretePath(), "euler", "leading")),
    "upscaler": (
        UPSCALER,
        ("v", DiscretePath(beta_start=0.0001, beta_end=0.02, final="first_level"), "ddim", "leading"),
    ),
    "playground": (PLAYGROUND, ("edm", EDMPath(), "dpmpp_2m", "karras")),
    "cosxl": (
        {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_data": 1.0},
        ("v", EDMPath(sigma_data=1.0), "euler", "karras"),
    ),
    "dit": (
        DIT,
        ("eps", DiscretePath(beta_schedule="linear", beta_start=0.0001, beta_end=0.02), "ddim", "leading_0"),
    ),
    "sd3": (SD3, ("flow", FlowPath(shift=3.0), "euler", "linspace")),
    "dev": (DEV, ("flow", FlowPath(size_shift=SizeShift()), "euler", "flow")),
    "schnell": (SCHNELL, ("flow", FlowPath(), "euler", "linspace")),
    "heun": (
        SD3 | {"_class_name": "FlowMatchHeunDiscreteScheduler"},
        ("flow", FlowPath(shift=3.0), "euler", "linspace"),
    ),
    "lms": (SD15 | {"_class_name": "LMSDiscreteScheduler"}, ("eps", DiscretePath(), "euler", "linspace")),
    "ddpm": (SD15 | {"_class_name": "DDPMScheduler"}, ("eps", DiscretePath(), "ddim", "leading")),
    "ancestral": (
        SD15
        | {"_class_name": "EulerAncestralDiscreteScheduler", "rescale_betas_zero_snr": True}
        | {"prediction_type": "sample", "timestep_spacing": "trailing"},
        ("x0", DiscretePath(zero_terminal_snr=True), "euler_ancestral", "trailing"),
    ),
    "solver": (SOLVER | {"final_sigmas_type": "sigma_min"}, ("eps", SD_PATH, "dpmpp_2m", "linspace")),
    "first order": (
        SOLVER | {"solver_order": 1, "use_karras_sigmas": True},
        ("eps", DiscretePath(), "euler", "karras"),
    ),
    "flow solver": (FLOW_SOLVER, ("flow", FlowPath(shift=2.5, sigma_max=0.999), "dpmpp_2m", "flow")),
    "cosine": (
        {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
        (
            "eps",
            DiscretePath(beta_schedule="cosine", beta_start=0.0001, beta_end=0.02, num_timesteps=500),
            "ddim",
            "leading_0",
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_reads(name: str) -> None:
    config, expected = PUBLISHED[name]
    assert scheduler_config_from_diffusers(config) == expected


def levels(config: dict[str, Any], steps: int) -> list[float]:
    """Ours for a config."""
    _, path, _, schedule = scheduler_config_from_diffusers(config)
    return SCHEDULES[schedule](path, steps)


def reference(config: dict[str, Any]) -> Any:
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, config["_class_name"]).from_config(config)


SAME_LEVELS = {
    "sdxl": SDXL,
    "sdxl, trailing": SDXL | {"timestep_spacing": "trailing"},
    "sdxl, no offset": SDXL | {"steps_offset": 0},
    "zero terminal snr": SDXL | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "ancestral": SDXL | {"_class_name": "EulerAncestralDiscreteScheduler"},
    "sd3": SD3,
    "schnell by itself": SCHNELL,
    "playground": PLAYGROUND,
    "edm": PLAYGROUND | {"_class_name": "EDMEulerScheduler", "sigma_max": 120.0},
    "solver, trailing": SOLVER | {"timestep_spacing": "trailing"},
    "solver, first level": SOLVER | {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"},
    "solver, karras": SOLVER | {"use_karras_sigmas": True},
    "flow solver": FLOW_SOLVER | {"_class_name": "DPMSolverMultistepScheduler"},
}


@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize("name", SAME_LEVELS)
def test_the_levels_are_those_of_diffusers(name: str, steps: int) -> None:
    scheduler = reference(SAME_LEVELS[name])
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(
        levels(SAME_LEVELS[name], steps), scheduler.sigmas.numpy(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("config", [DIT, SD21, SD21 | {"timestep_spacing": "trailing"}])
def test_the_timesteps_of_ddim_are_those_of_diffusers(config: dict[str, Any]) -> None:
    scheduler = reference(config)
    scheduler.set_timesteps(20)
    _, path, _, _ = scheduler_config_from_diffusers(config)
    ours = [path.timestep_from_sigma(sigma) for sigma in levels(config, 20)[:-1]]
    assert ours == pytest.approx(scheduler.timesteps.tolist())
    assert (levels(config, 20)[-1] == 0) == (float(scheduler.final_alpha_cumprod) == 1)


@pytest.mark.parametrize("tokens", [256, 1000, 4096])
def test_levels_for_a_size_are_those_of_the_pipelines(tokens: int) -> None:
    scheduler = reference(DEV)
    shift = (1.15 - 0.5) / (4096 - 256) * (tokens - 256) + 0.5
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8), mu=shift)
    _, path, _, schedule = scheduler_config_from_diffusers(DEV)
    assert isinstance(path, FlowPath)
    ours = SCHEDULES[schedule](path.sized(tokens), 8)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=1e-5)


SPECS = [
    ("eps", DiscretePath(), "ddim", "leading"),
    ("v", DiscretePath(zero_terminal_snr=True, final="first_level"), "ddim", "trailing"),
    ("x0", DiscretePath(beta_schedule="cosine", num_timesteps=500), "dpmpp_2m", "karras"),
    ("eps", DiscretePath(beta_schedule="linear", final="first_level"), "euler", "leading_0"),
    ("eps", DiscretePath(), "dpmpp_2m", "linspace"),
    ("flow", FlowPath(sigma_max=0.999), "dpmpp_2m", "flow"),
    ("flow", FlowPath(sigma_max=0.99, shift=3.1582, num_timesteps=100), "euler", "flow"),
]


@pytest.mark.parametrize("spec", SPECS)
def test_there_and_back(spec: tuple[Prediction, NoisePath, str, str]) -> None:
    assert scheduler_config_from_diffusers(in_file(scheduler_config_to_diffusers(*spec))) == spec


@pytest.mark.parametrize(
    ("path", "schedule"),
    [
        (FlowPath(shift=3.0), "linspace"),
        (FlowPath(), "linspace"),
        (FlowPath(size_shift=SizeShift(max_log=1.3)), "flow"),
    ],
)
def test_flow_euler_there_and_back(path: FlowPath, schedule: str) -> None:
    written = in_file(scheduler_config_to_diffusers("flow", path, "flow_euler", schedule))
    assert written["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert scheduler_config_from_diffusers(written) == ("flow", path, "euler", schedule)


def test_the_millionth_that_keeps_timesteps_whole_is_not_read_back() -> None:
    written = scheduler_config_to_diffusers("flow", FlowPath(shift=3.0), "euler", "flow")
    assert written["flow_shift"] == 3.0 * WHOLE_TIMESTEPS
    assert scheduler_config_from_diffusers(written)[1] == FlowPath(shift=3.0, sigma_max=0.999)


def test_edm_there_and_back() -> None:
    path = EDMPath(sigma_max=120.0)
    written = in_file(scheduler_config_to_diffusers("edm", path, "dpmpp_2m", "karras"))
    assert scheduler_config_from_diffusers(written) == ("edm", path, "dpmpp_2m", "karras")


def test_what_diffusers_has_no_scheduler_for() -> None:
    with pytest.raises(InputError, match="prediction 'eps' on a 'edm' path"):
        scheduler_config_to_diffusers("eps", EDMPath(), "euler", "karras")
    with pytest.raises(InputError, match="flow_euler for prediction 'eps'"):
        scheduler_config_to_diffusers("eps", DiscretePath(), "flow_euler", "linspace")


UNSUPPORTED = [
    (SD15, "trained_betas", [0.1, 0.2]),
    (SD15, "beta_schedule", "sigmoid"),
    (SD15, "prediction_type", "flow_prediction"),
    (SD15, "steps_offset", 3),
    (SD15, "timestep_spacing", "quadratic"),
    (SD15, "beta_start", "small"),
    (SDXL, "use_exponential_sigmas", True),
    (SDXL, "timestep_type", "continuous"),
    (SDXL, "sigma_max", 700.0),
    (SOLVER, "use_lu_lambdas", True),
    (FLOW_SOLVER, "prediction_type", "epsilon"),
    (FLOW_SOLVER, "use_dynamic_shifting", True),
    (PLAYGROUND, "sigma_schedule", "exponential"),
    (PLAYGROUND, "rho", 3.0),
    (PLAYGROUND, "prediction_type", "sample"),
    (DEV, "time_shift_type", "linear"),
    (DEV, "shift_terminal", 0.02),
    (DEV, "base_shift", None),
    (SD3, "invert_sigmas", True),
]


@pytest.mark.parametrize(("config", "field", "value"), UNSUPPORTED)
def test_unsupported_fields_are_named(config: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{config['_class_name']} config has `{field}` = "):
        scheduler_config_from_diffusers(config | {field: value})


def test_fields_of_other_classes_are_ignored() -> None:
    others = {"use_beta_sigmas": True, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
    assert scheduler_config_from_diffusers(SD15 | others) == PUBLISHED["sd15"][1]


def test_other_schedulers_are_refused() -> None:
    with pytest.raises(InputError, match="'DDIMSchedule': did you mean 'DDIMScheduler'"):
        scheduler_config_from_diffusers({"_class_name": "DDIMSchedule"})
