"""diffusers' schedulers as paths and schedules: their levels are ours, and configs survive both ways."""

import inspect
from typing import Any

import numpy as np
import pytest
from tests.checkpoint.configs.helpers import in_file

from darkroom.checkpoint.configs.scheduler import (
    WHOLE_TIMESTEPS,
    scheduler_config_from_diffusers,
    scheduler_config_to_diffusers,
)
from darkroom.checkpoint.configs.scheduler_classes import AT_FIRST_LEVEL, FIXED, READ
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

LCM = (
    SD15
    | {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0}
    | {"set_alpha_to_one": True}
)
SD_PATH = DiscretePath(final="first_level")
PUBLISHED = {
    "sd15": (SD15, ("eps", SD_PATH, "plms", "leading")),
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
        ("flow", FlowPath(shift=3.0), "heun", "linspace"),
    ),
    "ddpm": (SD15 | {"_class_name": "DDPMScheduler"}, ("eps", DiscretePath(), "ddpm", "leading")),
    "solver, noisy": (
        SOLVER | {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        ("eps", DiscretePath(), "dpmpp_2m_sde", "karras"),
    ),
    "exponential": (SDXL | {"use_exponential_sigmas": True}, ("eps", DiscretePath(), "euler", "exponential")),
    "beta": (SDXL | {"use_beta_sigmas": True}, ("eps", DiscretePath(), "euler", "beta")),
    "lu": (SOLVER | {"use_lu_lambdas": True}, ("eps", DiscretePath(), "dpmpp_2m", "exponential")),
    "flow, exponential": (
        SD3 | {"use_exponential_sigmas": True},
        ("flow", FlowPath(shift=3.0), "euler", "exponential"),
    ),
    "playground, exponential": (
        PLAYGROUND | {"sigma_schedule": "exponential"},
        ("edm", EDMPath(), "dpmpp_2m", "exponential"),
    ),
    "lcm": (LCM, ("eps", DiscretePath(), "lcm", "lcm")),
    "tcd": (LCM | {"_class_name": "TCDScheduler"}, ("eps", DiscretePath(), "tcd", "lcm")),
    "lcm by its class's betas": ({"_class_name": "LCMScheduler"}, ("eps", DiscretePath(), "lcm", "lcm")),
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
    "flow solver": (FLOW_SOLVER, ("flow", FlowPath(shift=2.5, sigma_max=0.999), "uni_pc", "flow")),
    "cosine": (
        {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
        (
            "eps",
            DiscretePath(beta_schedule="cosine", beta_start=0.0001, beta_end=0.02, num_timesteps=500),
            "ddpm",
            "leading_0",
        ),
    ),
}


# Those whose config says the betas, and nothing but the class says the sampler.
CLASSES = {
    "DEISMultistepScheduler": "deis",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "HeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "dpm_2_ancestral",
    "KDPM2DiscreteScheduler": "dpm_2",
    "LMSDiscreteScheduler": "lms",
    "SASolverScheduler": "sa_solver",
    "UniPCMultistepScheduler": "uni_pc",
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("schedule", ["linspace", "trailing", "karras", "exponential", "beta"])
def test_reads_a_class_and_its_schedule(name: str, schedule: str) -> None:
    spacing = {"timestep_spacing": schedule} if schedule == "trailing" else {}
    flag = {f"use_{schedule}_sigmas": True} if schedule in ("karras", "exponential", "beta") else {}
    config = SD15 | {"_class_name": name} | spacing | flag
    path = SD_PATH if name in AT_FIRST_LEVEL else DiscretePath()
    assert scheduler_config_from_diffusers(config) == ("eps", path, CLASSES[name], schedule)


def test_a_file_of_ipndm_says_the_models_betas() -> None:
    config = SD15 | {"_class_name": "IPNDMScheduler"}
    assert scheduler_config_from_diffusers(config) == ("eps", DiscretePath(), "ipndm", "trailing")


def test_every_class_is_one_of_theirs_with_its_fields_and_defaults() -> None:
    """What a file may leave out is what the class takes it for."""
    diffusers = pytest.importorskip("diffusers")
    for name, fields in READ.items():
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        known = {key: p.default for key, p in parameters.items()}
        ours = fields | FIXED[name]
        if name == "IPNDMScheduler" or "args" in known:  # no levels of a model, or not installed
            continue
        for field, default in ours.items():
            assert (field, default) == (field, known[field]), name


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
    needs = {"LMSDiscreteScheduler": "scipy", "DPMSolverSDEScheduler": "torchsde"}
    if library := "scipy" if config.get("use_beta_sigmas") else needs.get(config["_class_name"]):
        pytest.importorskip(library)
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
    "deis": SOLVER | {"_class_name": "DEISMultistepScheduler", "timestep_spacing": "trailing"},
    "uni_pc": SOLVER | {"_class_name": "UniPCMultistepScheduler", "use_exponential_sigmas": True},
    "sa_solver": SOLVER | {"_class_name": "SASolverScheduler", "timestep_spacing": "trailing"},
    "lms": SDXL | {"_class_name": "LMSDiscreteScheduler"},
    "lms, exponential": SDXL
    | {"_class_name": "LMSDiscreteScheduler", "timestep_spacing": "linspace", "use_exponential_sigmas": True},
    "lu": SOLVER | {"use_lu_lambdas": True},
    "edm, exponential": PLAYGROUND | {"_class_name": "EDMEulerScheduler", "sigma_schedule": "exponential"},
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


def ends(sampler: str) -> DiscretePath:
    """A path that ends where diffusers' class of a sampler always does."""
    return SD_PATH if sampler in ("deis", "sa_solver") else DiscretePath()


SPECS = [
    ("eps", DiscretePath(), "ddim", "leading"),
    ("v", DiscretePath(zero_terminal_snr=True, final="first_level"), "ddim", "trailing"),
    ("x0", DiscretePath(beta_schedule="cosine", num_timesteps=500), "dpmpp_2m", "karras"),
    ("eps", DiscretePath(beta_schedule="linear", final="first_level"), "euler", "leading_0"),
    ("eps", DiscretePath(), "dpmpp_2m", "linspace"),
    ("flow", FlowPath(sigma_max=0.999), "dpmpp_2m", "flow"),
    ("flow", FlowPath(sigma_max=0.999, shift=2.0), "uni_pc", "flow"),
    ("flow", FlowPath(sigma_max=0.999), "deis", "flow"),
    ("flow", FlowPath(sigma_max=0.999), "sa_solver", "flow"),
    ("eps", DiscretePath(final="first_level"), "plms", "leading"),
    ("v", DiscretePath(zero_terminal_snr=True), "ddpm", "trailing"),
    ("v", DiscretePath(zero_terminal_snr=True), "euler_ancestral", "leading"),
    ("eps", DiscretePath(), "lcm", "lcm"),
    ("eps", DiscretePath(final="first_level"), "tcd", "lcm"),
    ("eps", DiscretePath(), "dpmpp_2m_sde", "beta"),
    ("v", DiscretePath(), "uni_pc", "exponential"),
    ("x0", DiscretePath(), "heun", "karras"),
    *(("eps", ends(sampler), sampler, "karras") for sampler in CLASSES.values()),
    *(("v", ends(sampler), sampler, "trailing") for sampler in CLASSES.values()),
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


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler"])
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_edm_there_and_back(sampler: str, schedule: str) -> None:
    path = EDMPath(sigma_max=120.0)
    written = in_file(scheduler_config_to_diffusers("edm", path, sampler, schedule))
    assert scheduler_config_from_diffusers(written) == ("edm", path, sampler, schedule)


WRITTEN_AS_SOLVER: list[tuple[Prediction, DiscretePath, str, str]] = [
    ("v", DiscretePath(zero_terminal_snr=True), "lms", "trailing"),
    ("x0", DiscretePath(), "plms", "leading"),
    ("eps", DiscretePath(), "ddim", "karras"),
    ("eps", DiscretePath(), "res_multistep", "karras"),
]


@pytest.mark.parametrize("spec", WRITTEN_AS_SOLVER)
def test_where_a_class_cannot_hold_the_model_it_is_the_solver(
    spec: tuple[Prediction, DiscretePath, str, str],
) -> None:
    written = in_file(scheduler_config_to_diffusers(*spec))
    assert written["_class_name"] == "DPMSolverMultistepScheduler"
    read = scheduler_config_from_diffusers(written)
    assert (read[0], read[1], read[3]) == (spec[0], spec[1], spec[3])


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_written_is_what_their_class_takes(spec: tuple[Prediction, NoisePath, str, str]) -> None:
    written = in_file(scheduler_config_to_diffusers(*spec))
    scheduler = reference(written)
    assert {key: scheduler.config[key] for key in written if key[0] != "_"} == {
        key: value for key, value in written.items() if key[0] != "_"
    }


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
    (LCM, "original_inference_steps", 100),
    (LCM, "timestep_scaling", 1.0),
    (SDXL, "timestep_type", "continuous"),
    (SDXL, "sigma_max", 700.0),
    (SOLVER, "use_dynamic_shifting", True),
    (FLOW_SOLVER, "prediction_type", "epsilon"),
    (FLOW_SOLVER, "use_dynamic_shifting", True),
    (PLAYGROUND, "sigma_schedule", "linear"),
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
