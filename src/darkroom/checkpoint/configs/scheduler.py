"""The `scheduler_config.json` of diffusers as prediction, path, sampler and schedule, and back."""

from collections.abc import Mapping
from typing import Any, Literal, cast

from darkroom.checkpoint.configs.fields import Fields
from darkroom.checkpoint.configs.scheduler_classes import (
    AT_FIRST_LEVEL,
    CLASSES,
    FIXED,
    READ,
    SAMPLERS,
    SOLVER,
    STOCHASTIC_SOLVER,
)
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
# The flags of schedules that space sigma itself; Lu's are even in log sigma.
CURVES = {
    "use_karras_sigmas": "karras",
    "use_lu_lambdas": "exponential",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}
FLAGS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
EDM_SCHEDULES = ("karras", "exponential")


def scheduler_config_from_diffusers(config: Mapping[str, Any]) -> tuple[Prediction, NoisePath, str, str]:
    """Read what a network predicts, its path, and the sampler and schedule nearest to diffusers' scheduler.

    Prediction and path are exact. Fields that only the class of sampler has (higher orders of solvers,
    clipping, thresholds) are left out, and so are those of other classes, which files are full of. Levels
    evenly spaced in the timestep are "leading" or, without an offset of 1, "leading_0"; solvers of higher
    order count theirs by one more; those of consistency models are "lcm". Curves in sigma span the path's
    range, where some classes take that of the spacing beside them. A path of flow has "linspace" as
    SD 3's pipeline, or "flow" where the shift depends on the size: FLUX's pipelines choose these levels also
    where it does not, as for schnell, which the config can't say. Raises InputError for a scheduler that is
    not known, and naming a field that asks for a path or a schedule that we don't have.
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
    sampler = _sampler(name, fields)
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
    """Write the config of diffusers' scheduler for a path and a sampler: of the class that is that sampler.

    Where that class cannot hold the model, or there is none, it is DPM-Solver++'s: of second order, or of
    first order, which is Euler's method, where `sampler` is euler. Some classes have one end whatever the
    path's `final`. With flow_euler it is the scheduler of SD 3's and FLUX's pipelines instead, which
    start at pure noise whatever the path's `sigma_max`. Raises InputError for a path or a prediction on it
    that diffusers' schedulers don't have.
    """
    if isinstance(path, FlowPath) and prediction == "flow":
        return _flow_euler(path) if sampler == "flow_euler" else _flow_solver_to_diffusers(path, sampler)
    if isinstance(path, EDMPath) and prediction == "edm":
        return _edm_to_diffusers(path, sampler, schedule)
    names = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if not isinstance(path, DiscretePath) or prediction not in names or sampler == "flow_euler":
        where = " for flow_euler" if sampler == "flow_euler" else ""
        raise InputError(
            f"diffusers has no scheduler{where} for prediction {prediction!r} on a {path.kind!r} path"
        )
    name = _class(prediction, path, sampler, schedule)
    fields = _fields(path, schedule) | {"prediction_type": names[prediction]}
    held = {field: value for field, value in fields.items() if field in READ[name]}
    if name == SOLVER:
        return _solver(sampler) | held
    return {"_class_name": name} | held | EXTRA.get(name, {})


# Clipping is for pictures, not for latents, and PLMS has no other warm-up here.
CLIPPING = ("DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler")
EXTRA: dict[str, dict[str, Any]] = {name: {"clip_sample": False} for name in CLIPPING}
EXTRA["PNDMScheduler"] = {"skip_prk_steps": True}


def _class(prediction: Prediction, path: DiscretePath, sampler: str, schedule: str) -> str:
    """The class for a sampler, unless it cannot hold what the network predicts, its path or its schedule."""
    name = CLASSES.get(sampler, SOLVER)
    lacks = (
        path.zero_terminal_snr and "rescale_betas_zero_snr" not in READ[name],
        prediction == "x0" and name == "PNDMScheduler",
        schedule in FLAGS and FLAGS[schedule] not in READ[name],
    )
    return SOLVER if any(lacks) else name


def _fields(path: DiscretePath, schedule: str) -> dict[str, Any]:
    """What a path and a schedule are in the fields of all classes; each holds some of them."""
    betas = {ours: theirs for theirs, ours in BETA_SCHEDULES.items()}
    spacings = {"leading": "leading", "leading_0": "leading", "trailing": "trailing", "lcm": "trailing"}
    return {
        "beta_end": path.beta_end,
        "beta_schedule": betas[path.beta_schedule],
        "beta_start": path.beta_start,
        "final_sigmas_type": "zero" if path.final == "zero" else "sigma_min",
        "num_train_timesteps": path.num_timesteps,
        "rescale_betas_zero_snr": path.zero_terminal_snr,
        "set_alpha_to_one": path.final == "zero",
        "steps_offset": 0 if schedule == "leading_0" else 1,
        "timestep_spacing": spacings.get(schedule, "linspace"),
    } | {flag: schedule == curve for curve, flag in FLAGS.items()}


def _sampler(name: str, fields: Mapping[str, Any]) -> str:
    if name == SOLVER and fields["algorithm_type"] == STOCHASTIC_SOLVER:
        return "euler_ancestral" if fields["solver_order"] == 1 else "dpmpp_2m_sde"
    return "euler" if fields.get("solver_order") == 1 else SAMPLERS[name]


def _discrete(kind: Fields, fields: Mapping[str, Any]) -> tuple[Prediction, DiscretePath, str]:
    betas = fields["beta_schedule"]
    if betas not in BETA_SCHEDULES:
        raise kind.unsupported("beta_schedule", betas, " or ".join(map(repr, BETA_SCHEDULES)))
    at_zero = fields.get("set_alpha_to_one", True) and fields.get("final_sigmas_type", "zero") == "zero"
    at_zero = at_zero and not set(kind.classes) <= set(AT_FIRST_LEVEL)
    path = DiscretePath(
        beta_schedule=BETA_SCHEDULES[betas],
        beta_start=fields["beta_start"],
        beta_end=fields["beta_end"],
        num_timesteps=fields["num_train_timesteps"],
        zero_terminal_snr=bool(fields.get("rescale_betas_zero_snr", False)),
        final="zero" if at_zero else "first_level",
    )
    consistency = "original_inference_steps" in kind.fixed
    return _prediction(kind, fields, PREDICTIONS), path, "lcm" if consistency else _schedule(kind, fields)


def _schedule(kind: Fields, fields: Mapping[str, Any]) -> str:
    if curve := _curve(fields):
        return curve
    spacing, offset = fields["timestep_spacing"], fields["steps_offset"]
    if spacing not in SPACINGS:
        raise kind.unsupported("timestep_spacing", spacing, " or ".join(map(repr, SPACINGS)))
    if spacing != "leading":
        return spacing
    if offset not in (0, 1):
        raise kind.unsupported("steps_offset", offset, "0 or 1")
    return "leading" if offset else "leading_0"


def _curve(fields: Mapping[str, Any]) -> str | None:
    """The schedule in sigma that is asked for, if any."""
    return next((name for flag, name in CURVES.items() if fields.get(flag)), None)


def _edm(kind: Fields, fields: Mapping[str, Any]) -> tuple[Prediction, EDMPath, str]:
    low, high, data = (float(fields[name]) for name in ("sigma_min", "sigma_max", "sigma_data"))
    path = EDMPath(sigma_min=low, sigma_max=high, sigma_data=data)
    schedule = fields["sigma_schedule"]
    if schedule not in EDM_SCHEDULES:
        raise kind.unsupported("sigma_schedule", schedule, " or ".join(map(repr, EDM_SCHEDULES)))
    return _prediction(kind, fields, EDM_PREDICTIONS), path, schedule


def _edm_to_diffusers(path: EDMPath, sampler: str, schedule: str) -> dict[str, Any]:
    euler = {"_class_name": "EDMEulerScheduler"}
    solver = {"_class_name": "EDMDPMSolverMultistepScheduler", "solver_order": 2}
    return (euler if sampler == "euler" else solver) | {
        "prediction_type": "epsilon",
        "sigma_data": path.sigma_data,
        "sigma_max": path.sigma_max,
        "sigma_min": path.sigma_min,
        "sigma_schedule": schedule if schedule in EDM_SCHEDULES else "karras",
    }


def _flow_match(fields: Mapping[str, Any]) -> tuple[Prediction, FlowPath, str]:
    count = fields["num_train_timesteps"]
    schedule = _curve(fields) or "linspace"
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
    name = CLASSES.get(sampler, SOLVER)
    kept = "use_flow_sigmas" in READ[name] and name != SOLVER
    return ({"_class_name": name} if kept else _solver(sampler) | {"final_sigmas_type": "zero"}) | {
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


def _solver(sampler: str) -> dict[str, Any]:
    stochastic = sampler in ("dpmpp_2m_sde", "euler_ancestral")
    return {
        "_class_name": SOLVER,
        "algorithm_type": STOCHASTIC_SOLVER if stochastic else "dpmsolver++",
        "solver_order": 1 if sampler in ("euler", "ddim", "euler_ancestral") else 2,
    }
