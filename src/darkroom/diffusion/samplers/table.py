"""The samplers by name."""

from darkroom.diffusion.samplers.first_order import ddim, euler, euler_ancestral
from darkroom.diffusion.samplers.multistep import dpmpp_2m
from darkroom.diffusion.samplers.steps import Sampler

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
}
