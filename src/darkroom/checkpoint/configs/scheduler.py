"""The `scheduler_config.json` of diffusers as prediction, path, sampler and schedule, and back."""

from collections.abc import Mapping
from typing import Any, Literal, cast

from darkroom.checkpoint.configs.fields import Fields
from darkroom.checkpoint.prediction import EDM_PREDICTIONS, SCHEDULER_PREDICTIONS
from darkroom.diffusion.denoiser import Prediction
from darkroom.diffusion.path import DiscretePath, EDMPath, FlowPath, NoisePath, SizeShift
from darkroom.errors import InputError, unknown

# diffusers cuts sigma * 1000 to a whole timestep, and 924.9999 to 924: this much more shift keeps it 925.
WHOLE_TIMESTEPS = 1 + 1e-6
FLOW = "flow_prediction"
PREDICTIONS = {theirs: ours for theirs, ours in SCHEDULER_PREDICTIONS.items() if theirs != FLOW}
BETA_SCHEDULES: dict[str, Literal["linear", "scaled_linear", "cosine"]] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
}
SPACINGS = ("leading", "linspace", "trailing")
# The samplers of ours that are nearest to each class.
SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EDMDPMSolverMultistepScheduler": "dpmpp_2m",
    "EDMEulerScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "euler",
    "LMSDiscreteScheduler": "euler",
    "PNDMScheduler": "ddim",
    "UniPCMultistepScheduler": "dpmpp_2m",
}

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
ZERO_SNR = {"rescale_betas_zero_snr": False}
KARRAS = {"use_karras_sigmas": False}
ENDING = {"final_sigmas_type": "zero"}
FLOW_SIGMAS = {"flow_shift": 1.0, "use_flow_sigmas": False}
EDM: dict[str, Any] = {
    "prediction_type": "epsilon",
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
}
FLOW_MATCH: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 1.0}
SIZES: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "use_dynamic_shifting": False,
}
READ: dict[str, dict[str, Any]] = {
    "DDIMScheduler": LEADING | ZERO_SNR | {"set_alpha_to_one": True},
    "DDPMScheduler": LEADING | ZERO_SNR,
    "DPMSolverMultistepScheduler": TRAINED | ZERO_SNR | KARRAS | ENDING | FLOW_SIGMAS | {"solver_order": 2},
    "EDMDPMSolverMultistepScheduler": EDM,
    "EDMEulerScheduler": EDM,
    "EulerAncestralDiscreteScheduler": TRAINED | ZERO_SNR,
    "EulerDiscreteScheduler": TRAINED | ZERO_SNR | KARRAS | ENDING,
    "FlowMatchEulerDiscreteScheduler": FLOW_MATCH | SIZES | KARRAS,
    "FlowMatchHeunDiscreteScheduler": FLOW_MATCH,
    "LMSDiscreteScheduler": TRAINED | KARRAS,
    "PNDMScheduler": LEADING | {"set_alpha_to_one": False},
    "UniPCMultistepScheduler": TRAINED | ZERO_SNR | KARRAS | ENDING | FLOW_SIGMAS,
}

OTHER_BETAS = {"trained_betas": None}
OTHER_SIGMAS = {"use_beta_sigmas": False, "use_exponential_sigmas": False}
OTHER_EDM = {"final_sigmas_type": "zero", "rho": 7.0, "sigma_schedule": "karras"}
DYNAMIC = {"time_shift_type": "exponential"}
FIXED: dict[str, dict[str, Any]] = {
    "DDIMScheduler": OTHER_BETAS,
    "DDPMScheduler": OTHER_BETAS,
    "DPMSolverMultistepScheduler": OTHER_BETAS
    | OTHER_SIGMAS
    | {"use_dynamic_shifting": False, "use_lu_lambdas": False},
    "EDMDPMSolverMultistepScheduler": OTHER_EDM,
    "EDMEulerScheduler": OTHER_EDM,
    "EulerAncestralDiscreteScheduler": OTHER_BETAS,
    "EulerDiscreteScheduler": OTHER_BETAS
    | OTHER_SIGMAS
    | {"sigma_max": None, "sigma_min": None, "timestep_type": "discrete"},
    "FlowMatchEulerDiscreteScheduler": OTHER_SIGMAS
    | DYNAMIC
    | {"invert_sigmas": False, "shift_terminal": None, "stochastic_sampling": False},
    "FlowMatchHeunDiscreteScheduler": {},
    "LMSDiscreteScheduler": OTHER_BETAS | OTHER_SIGMAS,
    "PNDMScheduler": OTHER_BETAS,
    "UniPCMultistepScheduler": OTHER_BETAS
    | OTHER_SIGMAS
    | {"shift_terminal": None, "sigma_max": None, "sigma_min": None, "use_dynamic_shifting": False},
}


def scheduler_config_from_diffusers(config: Mapping[str, Any]) -> tuple[Prediction, NoisePath, str, str]:
    """Read what a network predicts, its path, and the sampler and schedule nearest to diffusers' scheduler.

    Prediction and path are exact. Fields that only the class of sampler has (orders of solvers, clipping,
    thresholds) are left out, and so are those of other classes, which files are full of. Levels evenly spaced
    in the timestep are "leading" or, without an offset of 1, "leading_0"; solvers of higher order count
    theirs by one more. A path of flow has "linspace" as SD 3's pipeline, or "flow" where the shift depends
    on the size: FLUX's pipelines choose these levels also where it does not, as for schnell, which the config
    can't say. Raises InputError for a scheduler that is not known, and naming a field that asks for a path or
    a schedule that we don't have.
    """
    name = config.get("_class_name")
    if name not in READ:
        raise unknown("scheduler `_class_name`", str(name), READ)
    kind = Fields(
        owner=f"diffusers {name}",
        classes=(name,),
        read=READ[name],
        fixed=FIXED[name],
        open=True,
    )
    fields = kind.of(config)
    sampler = "euler" if fields.get("solver_order") == 1 else SAMPLERS[name]
    if "sigma_data" in fields:
        prediction, path, schedule = _edm(kind, fields)
    elif "shift" in fields:
        prediction, path, schedule = _flow_match(fields)
    elif fields.get("use_flow_sigmas"):
        prediction, path, schedule = _flow_solver(kind, fields)
    else:
        prediction, path, schedule = _discrete(kind, fields)
    return prediction, path, sampler, schedule


def scheduler_config_to_diffusers(
    prediction: Prediction, path: NoisePath, sampler: str, schedule: str
) -> dict[str, Any]:
    """Write the config of diffusers' scheduler for a path: DDIM where `sampler` is ddim, else DPM-Solver++.

    The solver is of second order, or of first order, which is Euler's method, where `sampler` is euler. With
    flow_euler it is the scheduler of SD 3's and FLUX's pipelines instead, which start at pure noise whatever
    the path's `sigma_max`. Raises InputError for a path or a prediction on it that diffusers' schedulers
    don't have.
    """
    if isinstance(path, FlowPath) and prediction == "flow":
        return _flow_euler(path) if sampler == "flow_euler" else _flow_solver_to_diffusers(path, sampler)
    if isinstance(path, EDMPath) and prediction == "edm":
        return _edm_to_diffusers(path)
    names = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if not isinstance(path, DiscretePath) or prediction not in names or sampler == "flow_euler":
        where = " for flow_euler" if sampler == "flow_euler" else ""
        raise InputError(
            f"diffusers has no scheduler{where} for prediction {prediction!r} on a {path.kind!r} path"
        )
    betas = {ours: theirs for theirs, ours in BETA_SCHEDULES.items()}
    trained = {
        "beta_end": path.beta_end,
        "beta_schedule": betas[path.beta_schedule],
        "beta_start": path.beta_start,
        "num_train_timesteps": path.num_timesteps,
        "prediction_type": names[prediction],
        "rescale_betas_zero_snr": path.zero_terminal_snr,
        "steps_offset": 0 if schedule == "leading_0" else 1,
        "timestep_spacing": {"leading": "leading", "leading_0": "leading", "trailing": "trailing"}.get(
            schedule, "linspace"
        ),
    }
    if sampler != "ddim":
        ending = {"final_sigmas_type": "zero" if path.final == "zero" else "sigma_min"}
        return _dpm_solver(sampler) | trained | ending | {"use_karras_sigmas": schedule == "karras"}
    ddim = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": path.final == "zero"}
    return ddim | trained


def _discrete(kind: Fields, fields: Mapping[str, Any]) -> tuple[Prediction, DiscretePath, str]:
    betas = fields["beta_schedule"]
    if betas not in BETA_SCHEDULES:
        raise kind.unsupported("beta_schedule", betas, " or ".join(map(repr, BETA_SCHEDULES)))
    at_zero = fields.get("set_alpha_to_one", True) and fields.get("final_sigmas_type", "zero") == "zero"
    path = DiscretePath(
        beta_schedule=BETA_SCHEDULES[betas],
        beta_start=fields["beta_start"],
        beta_end=fields["beta_end"],
        num_timesteps=fields["num_train_timesteps"],
        zero_terminal_snr=bool(fields.get("rescale_betas_zero_snr", False)),
        final="zero" if at_zero else "first_level",
    )
    return _prediction(kind, fields, PREDICTIONS), path, _schedule(kind, fields)


def _schedule(kind: Fields, fields: Mapping[str, Any]) -> str:
    if fields.get("use_karras_sigmas"):
        return "karras"
    spacing, offset = fields["timestep_spacing"], fields["steps_offset"]
    if spacing not in SPACINGS:
        raise kind.unsupported("timestep_spacing", spacing, " or ".join(map(repr, SPACINGS)))
    if spacing != "leading":
        return spacing
    if offset not in (0, 1):
        raise kind.unsupported("steps_offset", offset, "0 or 1")
    return "leading" if offset else "leading_0"


def _edm(kind: Fields, fields: Mapping[str, Any]) -> tuple[Prediction, EDMPath, str]:
    low, high, data = (float(fields[name]) for name in ("sigma_min", "sigma_max", "sigma_data"))
    path = EDMPath(sigma_min=low, sigma_max=high, sigma_data=data)
    return _prediction(kind, fields, EDM_PREDICTIONS), path, "karras"


def _edm_to_diffusers(path: EDMPath) -> dict[str, Any]:
    return {
        "_class_name": "EDMDPMSolverMultistepScheduler",
        "prediction_type": "epsilon",
        "sigma_data": path.sigma_data,
        "sigma_max": path.sigma_max,
        "sigma_min": path.sigma_min,
        "solver_order": 2,
    }


def _flow_match(fields: Mapping[str, Any]) -> tuple[Prediction, FlowPath, str]:
    count = fields["num_train_timesteps"]
    schedule = "karras" if fields.get("use_karras_sigmas") else "linspace"
    if not fields.get("use_dynamic_shifting"):
        return "flow", FlowPath(num_timesteps=count, shift=float(fields["shift"])), schedule
    sizes = SizeShift(
        base_tokens=fields["base_image_seq_len"],
        max_tokens=fields["max_image_seq_len"],
        base_log=float(fields["base_shift"]),
        max_log=float(fields["max_shift"]),
    )
    path = FlowPath(num_timesteps=count, size_shift=sizes)
    return "flow", path, "flow" if schedule == "linspace" else schedule


def _flow_solver(kind: Fields, fields: Mapping[str, Any]) -> tuple[Prediction, FlowPath, str]:
    """Solvers that were made for the other paths start one timestep below pure noise."""
    prediction = _prediction(kind, fields, {FLOW: "flow"})
    count = fields["num_train_timesteps"]
    # Without the millionth that we write to it.
    shift = float(f"{fields['flow_shift']:.6g}")
    return prediction, FlowPath(num_timesteps=count, shift=shift, sigma_max=1 - 1 / count), "flow"


def _flow_solver_to_diffusers(path: FlowPath, sampler: str) -> dict[str, Any]:
    return _dpm_solver(sampler) | {
        "flow_shift": path.shift * WHOLE_TIMESTEPS,
        "num_train_timesteps": path.num_timesteps,
        "prediction_type": "flow_prediction",
        "steps_offset": 1,
        "use_flow_sigmas": True,
    }


def _flow_euler(path: FlowPath) -> dict[str, Any]:
    sizes = path.size_shift or SizeShift()
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": sizes.base_tokens,
        "base_shift": sizes.base_log,
        "max_image_seq_len": sizes.max_tokens,
        "max_shift": sizes.max_log,
        "num_train_timesteps": path.num_timesteps,
        "shift": path.shift,
        "use_dynamic_shifting": path.size_shift is not None,
    }


def _prediction(kind: Fields, fields: Mapping[str, Any], names: Mapping[str, str]) -> Prediction:
    name = fields["prediction_type"]
    if name not in names:
        raise kind.unsupported("prediction_type", name, " or ".join(map(repr, names)))
    return cast(Prediction, names[name])


def _dpm_solver(sampler: str) -> dict[str, Any]:
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
        "solver_order": 1 if sampler in ("euler", "ddim") else 2,
    }
