"""The samplers by name; `cards` says what each is."""

from darkroom.diffusion.samplers.adaptive import dpm_adaptive
from darkroom.diffusion.samplers.ancestral import ddpm, dpm_2_ancestral, dpmpp_2s_ancestral
from darkroom.diffusion.samplers.cfg_pp import dpmpp_2m_cfg_pp, euler_cfg_pp
from darkroom.diffusion.samplers.edm import edm
from darkroom.diffusion.samplers.er_sde import er_sde
from darkroom.diffusion.samplers.few_step import lcm, tcd
from darkroom.diffusion.samplers.first_order import ddim, euler, euler_ancestral
from darkroom.diffusion.samplers.multistep import deis, dpmpp_2m, ipndm, lms, plms, res_multistep
from darkroom.diffusion.samplers.runge_kutta import dpm_2, heun
from darkroom.diffusion.samplers.sa_solver import sa_solver
from darkroom.diffusion.samplers.sde import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde
from darkroom.diffusion.samplers.steps import Sampler
from darkroom.diffusion.samplers.unipc import uni_pc

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpm_2": dpm_2,
    "lms": lms,
    "plms": plms,
    "ipndm": ipndm,
    "dpmpp_2m": dpmpp_2m,
    "res_multistep": res_multistep,
    "deis": deis,
    "uni_pc": uni_pc,
    "euler_cfg_pp": euler_cfg_pp,
    "dpmpp_2m_cfg_pp": dpmpp_2m_cfg_pp,
    "ddpm": ddpm,
    "euler_ancestral": euler_ancestral,
    "dpm_2_ancestral": dpm_2_ancestral,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "sa_solver": sa_solver,
    "er_sde": er_sde,
    "edm": edm,
    "dpm_adaptive": dpm_adaptive,
    "lcm": lcm,
    "tcd": tcd,
}
