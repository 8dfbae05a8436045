"""diffusers' schedulers: the sampler of ours that each is, and the fields of its config."""

from typing import Any

# The samplers of ours that each class is, or is nearest to.
SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "EDMDPMSolverMultistepScheduler": "dpmpp_2m",
    "EDMEulerScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "HeunDiscreteScheduler": "heun",
    "IPNDMScheduler": "ipndm",
    "KDPM2AncestralDiscreteScheduler": "dpm_2_ancestral",
    "KDPM2DiscreteScheduler": "dpm_2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "plms",
    "SASolverScheduler": "sa_solver",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "uni_pc",
}
# The class that each sampler is written as where its config can hold the model; else DPM-Solver++'s, which is
# Euler's method at first order and starts from noise as ours does.
CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm_2": "KDPM2DiscreteScheduler",
    "dpm_2_ancestral": "KDPM2AncestralDiscreteScheduler",
    "dpmpp_sde": "DPMSolverSDEScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms": "LMSDiscreteScheduler",
    "plms": "PNDMScheduler",
    "sa_solver": "SASolverScheduler",
    "tcd": "TCDScheduler",
    "uni_pc": "UniPCMultistepScheduler",
}
SOLVER = "DPMSolverMultistepScheduler"
AT_FIRST_LEVEL = ("DEISMultistepScheduler", "SASolverScheduler")  # these never end without noise
STOCHASTIC_SOLVER = "sde-dpmsolver++"

TRAINED: dict[str, Any] = {
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 0,
    "timestep_spacing": "linspace",
}
LEADING = TRAINED | {"timestep_spacing": "leading"}
# Classes made for Stable Diffusion have its betas, but for some that bend them.
LATENT = TRAINED | {"beta_end": 0.012, "beta_start": 0.00085}
ZERO_SNR = {"rescale_betas_zero_snr": False}
CURVES = {"use_beta_sigmas": False, "use_exponential_sigmas": False, "use_karras_sigmas": False}
ENDING = {"final_sigmas_type": "zero"}
FLOW_SIGMAS = {"flow_shift": 1.0, "use_flow_sigmas": False}
ORDER = {"solver_order": 2}
EDM: dict[str, Any] = {
    "prediction_type": "epsilon",
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "sigma_schedule": "karras",
}
FLOW_MATCH: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 1.0}
SIZES: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "use_dynamic_shifting": False,
}
CONSISTENCY = (
    LATENT
    | ZERO_SNR
    | {"beta_schedule": "scaled_linear", "set_alpha_to_one": True, "timestep_spacing": "leading"}
)
READ: dict[str, dict[str, Any]] = {
    "DDIMScheduler": LEADING | ZERO_SNR | {"set_alpha_to_one": True},
    "DDPMScheduler": LEADING | ZERO_SNR,
    "DEISMultistepScheduler": TRAINED | CURVES | FLOW_SIGMAS | ORDER,
    "DPMSolverMultistepScheduler": TRAINED
    | ZERO_SNR
    | CURVES
    | ENDING
    | FLOW_SIGMAS
    | ORDER
    | {"algorithm_type": "dpmsolver++", "use_lu_lambdas": False},
    "DPMSolverSDEScheduler": LATENT | CURVES,
    "EDMDPMSolverMultistepScheduler": EDM,
    "EDMEulerScheduler": EDM,
    "EulerAncestralDiscreteScheduler": TRAINED | ZERO_SNR,
    "EulerDiscreteScheduler": TRAINED | ZERO_SNR | CURVES | ENDING,
    "FlowMatchEulerDiscreteScheduler": FLOW_MATCH | SIZES | CURVES,
    "FlowMatchHeunDiscreteScheduler": FLOW_MATCH,
    "HeunDiscreteScheduler": LATENT | CURVES,
    # It has levels of its own, of no latent model; files say which those of the model are all the same.
    "IPNDMScheduler": TRAINED | {"timestep_spacing": "trailing"},
    "KDPM2AncestralDiscreteScheduler": LATENT | CURVES,
    "KDPM2DiscreteScheduler": LATENT | CURVES,
    "LCMScheduler": CONSISTENCY,
    "LMSDiscreteScheduler": TRAINED | CURVES,
    "PNDMScheduler": LEADING | {"set_alpha_to_one": False},
    "SASolverScheduler": TRAINED | CURVES | FLOW_SIGMAS,
    "TCDScheduler": CONSISTENCY,
    "UniPCMultistepScheduler": TRAINED | ZERO_SNR | CURVES | ENDING | FLOW_SIGMAS | ORDER,
}

OTHER_BETAS = {"trained_betas": None}
OTHER_EDM = {"final_sigmas_type": "zero", "rho": 7.0}
DYNAMIC = {"time_shift_type": "exponential"}
UNSIZED = {"use_dynamic_shifting": False}
# Distillation fixes these: another grid, or another scale of time, is another network.
GRID = {"original_inference_steps": 50, "timestep_scaling": 10.0}
FIXED: dict[str, dict[str, Any]] = {name: OTHER_BETAS for name in READ} | {
    "DEISMultistepScheduler": OTHER_BETAS | UNSIZED,
    "DPMSolverMultistepScheduler": OTHER_BETAS | UNSIZED,
    "EDMDPMSolverMultistepScheduler": OTHER_EDM,
    "EDMEulerScheduler": OTHER_EDM,
    "EulerDiscreteScheduler": OTHER_BETAS
    | {"sigma_max": None, "sigma_min": None, "timestep_type": "discrete"},
    "FlowMatchEulerDiscreteScheduler": DYNAMIC
    | {"invert_sigmas": False, "shift_terminal": None, "stochastic_sampling": False},
    "FlowMatchHeunDiscreteScheduler": {},
    "LCMScheduler": OTHER_BETAS | GRID,
    "TCDScheduler": OTHER_BETAS | GRID,
    "UniPCMultistepScheduler": OTHER_BETAS
    | UNSIZED
    | {"shift_terminal": None, "sigma_max": None, "sigma_min": None},
}
