"""Guidance: how the estimates with and without the prompt become the one that a sampler follows."""

from darkroom.diffusion.guidance.classifier_free import AdaptiveProjection, ClassifierFreeGuidance, ZeroStar
from darkroom.diffusion.guidance.contract import Denoised, Guide, Predict, Worse
from darkroom.diffusion.guidance.corrections import AwayFrom, Rescaled, ZeroInit
from darkroom.diffusion.guidance.guided import GuidedDenoiser
from darkroom.diffusion.guidance.make import make_guide
from darkroom.diffusion.guidance.progress import Scale, progress
from darkroom.diffusion.guidance.shares import Share, Told
from darkroom.diffusion.guidance.weaker import weaker_denoiser

__all__ = [
    "AdaptiveProjection",
    "AwayFrom",
    "ClassifierFreeGuidance",
    "Denoised",
    "Guide",
    "GuidedDenoiser",
    "Predict",
    "Rescaled",
    "Scale",
    "Share",
    "Told",
    "Worse",
    "ZeroInit",
    "ZeroStar",
    "make_guide",
    "progress",
    "weaker_denoiser",
]
