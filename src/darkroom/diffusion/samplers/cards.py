"""What each sampler is, without importing it: its order, its cost, its options and its paper."""

import math
from dataclasses import replace

from darkroom.diffusion.option import LARGEST, Option
from darkroom.diffusion.samplers.card import SamplerCard

# Schedules whose timesteps are evenly spaced.
EVEN = ("leading", "leading_0", "trailing", "linspace", "sgm_uniform", "simple", "ddim_uniform", "flow")


def _whole(default: int, low: int, high: int, about: str) -> Option:
    return Option(default=default, low=low, high=high, whole=True, about=about)


def _order(default: int, high: int) -> Option:
    return _whole(default, 1, high, "how many estimates a step goes by")


_SHARE = Option(default=1.0, low=0, high=1, about="the share of DDPM's noise that it draws")
_NOISE = replace(_SHARE, high=LARGEST, about="how strong the noise is, 1 is DDPM's")
_S_NOISE = Option(default=1.0, low=0, about="a factor on the noise")
_FROM_RATIO = Option(default=0.0, low=0, about="no noise below this sigma / alpha")
_TO_RATIO = Option(default=math.inf, low=0, high=math.inf, about="no noise above this sigma / alpha")
_LOWER_FINAL = Option(default=True, about="end in steps of lower order")
_KARRAS = "Karras et al. 2022, arXiv:2206.00364"
_CFG_PP = "Chung et al. 2024, arXiv:2406.08070"
_DEIS = "Zhang and Chen 2023, arXiv:2204.13902"

CARDS: dict[str, SamplerCard] = {
    "ddim": SamplerCard(
        order=1,
        variable="log_snr",
        calls=1,
        stochastic=False,
        to_first_level=True,
        options={"eta": replace(_SHARE, default=0.0)},
        good_for="what Stable Diffusion 1 was published with; inversion",
        paper="Song et al. 2021, arXiv:2010.02502",
    ),
    "euler": SamplerCard(
        order=1,
        variable="sigma",
        calls=1,
        stochastic=False,
        good_for="the plain choice: flow models, few-step models, and a check on others",
        paper=_KARRAS,
    ),
    "heun": SamplerCard(
        order=2,
        variable="sigma",
        calls=2,
        stochastic=False,
        good_for="accuracy at many steps, EDM models",
        paper=_KARRAS,
    ),
    "dpm_2": SamplerCard(
        order=2,
        variable="log_sigma",
        calls=2,
        stochastic=False,
        good_for="as heun, for levels that are spread in log sigma",
        paper="Lu et al. 2022, arXiv:2206.00927",
    ),
    "lms": SamplerCard(
        order=4,
        variable="sigma",
        calls=1,
        stochastic=False,
        options={"order": _order(4, 4)},
        good_for="50 steps and more without guidance; unsteady at few",
        paper="Hairer et al. 1993, Solving Ordinary Differential Equations I, III.1",
    ),
    "plms": SamplerCard(
        order=2,
        variable="timestep",
        calls=1,
        stochastic=False,
        to_first_level=True,
        schedules=EVEN,
        good_for="pictures of early Stable Diffusion drawn again, 50 steps",
        paper="Liu et al. 2022, arXiv:2202.09778",
    ),
    "ipndm": SamplerCard(
        order=4,
        variable="sigma",
        calls=1,
        stochastic=False,
        options={"order": _order(4, 4)},
        good_for="about 10 steps, where it is steadier than lms",
        paper=_DEIS,
    ),
    "dpmpp_2m": SamplerCard(
        order=2,
        variable="log_snr",
        calls=1,
        stochastic=False,
        good_for="the usual choice at 15 to 30 steps with guidance, with the schedule karras",
        paper="Lu et al. 2022, arXiv:2211.01095",
    ),
    "res_multistep": SamplerCard(
        order=2,
        variable="log_snr",
        calls=1,
        stochastic=False,
        good_for="as dpmpp_2m, where other programs have it as the default of a model",
        paper="Zhang et al. 2023, arXiv:2308.02157",
    ),
    "deis": SamplerCard(
        order=2,
        variable="log_snr",
        calls=1,
        stochastic=False,
        to_first_level=True,
        options={"order": _order(2, 3), "lower_order_final": _LOWER_FINAL},
        good_for="about 10 steps at low guidance scales",
        paper=_DEIS,
    ),
    "uni_pc": SamplerCard(
        order=3,
        variable="log_snr",
        calls=1,
        stochastic=False,
        options={
            "order": _whole(2, 1, 3, "the predictor's; the whole has one more"),
            "solver": Option(
                default="bh2", choices=("bh1", "bh2"), about="bh1 without guidance, bh2 with it"
            ),
            "lower_order_final": _LOWER_FINAL,
        },
        good_for="10 steps and more: the highest order at one call a step",
        paper="Zhao et al. 2023, arXiv:2302.04867",
    ),
    "euler_cfg_pp": SamplerCard(
        order=1,
        variable="log_snr",
        calls=1,
        stochastic=False,
        guided=True,
        good_for="guidance that keeps colours natural, at scales of 0.4 to 1.5; inversion under guidance",
        paper=_CFG_PP,
    ),
    "dpmpp_2m_cfg_pp": SamplerCard(
        order=2,
        variable="log_snr",
        calls=1,
        stochastic=False,
        guided=True,
        good_for="as euler_cfg_pp in fewer steps",
        paper=_CFG_PP,
    ),
    "ddpm": SamplerCard(
        order=1,
        variable="log_snr",
        calls=1,
        stochastic=True,
        good_for="many steps (100 and more), as the first diffusion models were sampled",
        paper="Ho et al. 2020, arXiv:2006.11239",
    ),
    "euler_ancestral": SamplerCard(
        order=1,
        variable="log_snr",
        calls=1,
        stochastic=True,
        options={"eta": _SHARE, "s_noise": _S_NOISE},
        good_for="lively detail at 20 to 40 steps; it never settles on one picture",
        paper="Ho et al. 2020, arXiv:2006.11239",
    ),
    "dpm_2_ancestral": SamplerCard(
        order=2,
        variable="log_sigma",
        calls=2,
        stochastic=True,
        options={"eta": _SHARE, "s_noise": _S_NOISE},
        good_for="as euler_ancestral, at two calls a step",
        paper="Lu et al. 2022, arXiv:2206.00927",
    ),
    "dpmpp_2s_ancestral": SamplerCard(
        order=2,
        variable="log_snr",
        calls=2,
        stochastic=True,
        options={"eta": _SHARE, "s_noise": _S_NOISE},
        good_for="as euler_ancestral, steadier under guidance",
        paper="Lu et al. 2022, arXiv:2211.01095",
    ),
    "dpmpp_sde": SamplerCard(
        order=2,
        variable="log_snr",
        calls=2,
        stochastic=True,
        options={
            "eta": _SHARE,
            "s_noise": _S_NOISE,
            "midpoint": Option(default=0.5, low=0.01, high=1, about="where the inner level lies in the step"),
        },
        good_for="rich detail in few steps, at two calls each",
        paper="Lu et al. 2022, arXiv:2211.01095",
    ),
    "dpmpp_2m_sde": SamplerCard(
        order=2,
        variable="log_snr",
        calls=1,
        stochastic=True,
        options={
            "eta": _NOISE,
            "s_noise": _S_NOISE,
            "solver": Option(
                default="midpoint", choices=("midpoint", "heun"), about="how earlier estimates are weighed"
            ),
        },
        good_for="rich detail at 20 to 40 steps; the usual stochastic choice",
        paper="Lu et al. 2022, arXiv:2211.01095",
    ),
    "dpmpp_3m_sde": SamplerCard(
        order=2,
        variable="log_snr",
        calls=1,
        stochastic=True,
        options={"eta": _NOISE, "s_noise": _S_NOISE},
        good_for="as dpmpp_2m_sde from 30 steps on",
        paper="Lu et al. 2022, arXiv:2211.01095",
    ),
    "sa_solver": SamplerCard(
        order=2,
        variable="log_snr",
        calls=1,
        stochastic=True,
        to_first_level=True,
        options={
            "tau": Option(default=1.0, low=0, about="how strong the noise is, 1 is DDPM's"),
            "s_tmin": _FROM_RATIO,
            "s_tmax": _TO_RATIO,
            "predictor_order": _whole(2, 1, 4, "how many estimates it predicts by"),
            "corrector_order": _whole(2, 0, 4, "how many it corrects by, 0 for none"),
        },
        good_for="20 to 60 steps, with as much noise as `tau` says",
        paper="Xue et al. 2023, arXiv:2309.05019",
    ),
    "er_sde": SamplerCard(
        order=2,
        variable="log_snr",
        calls=1,
        stochastic=True,
        options={"order": _order(3, 3), "s_noise": _S_NOISE},
        good_for="detail with less noise towards the end",
        paper="Cui et al. 2023, arXiv:2309.06169",
    ),
    "edm": SamplerCard(
        order=2,
        variable="sigma",
        calls=2,
        stochastic=True,
        options={
            "s_churn": Option(default=40.0, low=0, about="how much noise is added in all"),
            "s_tmin": replace(_FROM_RATIO, default=0.05),
            "s_tmax": replace(_TO_RATIO, default=50.0),
            "s_noise": replace(_S_NOISE, default=1.003),
        },
        good_for="EDM models, many steps",
        paper=_KARRAS,
    ),
    "dpm_adaptive": SamplerCard(
        order="adaptive",
        variable="log_snr",
        calls="adaptive",
        stochastic=False,
        options={
            "order": _whole(3, 2, 3, "of the better of its two solutions"),
            "rtol": Option(default=0.05, low=0, high=1, about="the error allowed, relative"),
            "atol": Option(default=0.0078, low=0, about="the error allowed, absolute"),
            "eta": replace(_SHARE, default=0.0),
            "s_noise": _S_NOISE,
            "pcoeff": Option(default=0.0, low=0, high=1, about="the proportional part of the step control"),
            "icoeff": Option(default=1.0, low=0.01, high=1, about="the integral part of the step control"),
        },
        good_for="a picture to a tolerance, however many calls it takes",
        paper="Lu et al. 2022, arXiv:2206.00927",
    ),
    "lcm": SamplerCard(
        order="few-step",
        variable="timestep",
        calls=1,
        stochastic=True,
        to_first_level=True,
        options={
            "boundary": Option(default=True, about="mix the estimate with x as these models are trained")
        },
        good_for="latent consistency models, 1 to 8 steps",
        paper="Luo et al. 2023, arXiv:2310.04378",
    ),
    "tcd": SamplerCard(
        order="few-step",
        variable="timestep",
        calls=1,
        stochastic=True,
        to_first_level=True,
        options={"gamma": Option(default=0.3, low=0, high=1, about="how much noise is drawn, 0 none")},
        good_for="trajectory consistency models, 2 to 20 steps",
        paper="Zheng et al. 2024, arXiv:2402.19159",
    ),
}
