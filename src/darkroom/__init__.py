"""Darkroom develops latent images: it trains, runs, inspects and repairs latent diffusion models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from darkroom.errors import DarkroomError, InputError

if TYPE_CHECKING:
    from darkroom.diffusion.guidance_settings import Guidance
    from darkroom.pipeline import Pipeline, Result, load

__version__ = "0.1.0"

__all__ = ["DarkroomError", "Guidance", "InputError", "Pipeline", "Result", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # What needs torch is imported when first asked for: torch alone takes over a second.
    if name == "Guidance":
        return import_module("darkroom.diffusion.guidance_settings").Guidance
    if name in ("Pipeline", "Result", "load"):
        return getattr(import_module("darkroom.pipeline"), name)
    raise AttributeError(f"module 'darkroom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
