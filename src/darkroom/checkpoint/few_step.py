"""Models distilled to be drawn in few steps: told by what their files say and are called. No torch here.

Nothing in the tensors of most of them differs from those of their teachers, whose steps and guidance give
grey or burnt pictures. `RECIPES` holds what each was published with.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from darkroom.checkpoint.model import Defaults, DenoiserSpec

XL = ("sdxl",)
SD1 = ("sd1", "sd1-inpainting")
SD2 = ("sd2", "sd2-base")
FLUX_DEV = ("flux-dev", "flux-fill", "flux-control", "flux-kontext")
STEPS = re.compile(r"(?<![\w.])(\d{1,2})-steps?(?![a-z])")
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
MOST_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a kind of few-step model is drawn; what is None is as its family has it.

    `families` are those that it was made for and `named` a pattern in its name, whose words are in small
    letters and joined by hyphens. `steps` are taken where the name does not say how many. A `guidance_scale`
    of 1 is none. `size` is the side of pictures in pixels.
    """

    title: str
    families: tuple[str, ...]
    named: str
    steps: int
    guidance_scale: float | None
    sampler: str | None
    schedule: str | None
    source: str
    size: int | None = None
    prediction: Literal["eps", "x0"] | None = None


# The first that fits decides. Stability AI's own models have nothing before the name of the base model.
OFFICIAL = r"^(models-)?(stabilityai-)?"
RECIPES = (
    Recipe(
        title="SDXL-Turbo",
        families=XL,
        named=OFFICIAL + r"sd-?xl-?turbo\b",
        steps=1,
        guidance_scale=1.0,
        sampler="euler_ancestral",
        schedule="trailing",
        size=512,
        source="Sauer et al. 2023; its model card and scheduler",
    ),
    Recipe(
        title="SD-Turbo",
        families=SD2,
        named=OFFICIAL + r"sd-?turbo\b",
        steps=1,
        guidance_scale=1.0,
        sampler="euler",
        schedule="trailing",
        size=512,
        prediction="eps",
        source="Sauer et al. 2023; its model card and scheduler",
    ),
    Recipe(
        title="SDXL-Lightning, 1 step",
        families=XL,
        named=r"\blightning\b.*\b1-step",
        steps=1,
        guidance_scale=1.0,
        sampler="euler",
        schedule="trailing",
        prediction="x0",
        source="Lin et al. 2024 (SDXL-Lightning); its model card",
    ),
    Recipe(
        title="SDXL-Lightning",
        families=XL,
        named=r"\blightning\b",
        steps=4,
        guidance_scale=1.0,
        sampler="euler",
        schedule="trailing",
        source="Lin et al. 2024 (SDXL-Lightning); its model card",
    ),
    Recipe(
        title="DMD2",
        families=XL,
        named=r"\bdmd-2\b",
        steps=4,
        guidance_scale=1.0,
        sampler="lcm",
        schedule="trailing",
        source="Yin et al. 2024; its model card",
    ),
    Recipe(
        title="TCD",
        families=(*SD1, *SD2, *XL),
        named=r"\btcd\b",
        steps=4,
        guidance_scale=1.0,
        sampler="tcd",
        schedule="lcm",
        source="Zheng et al. 2024; its model card",
    ),
    Recipe(
        title="LCM",
        families=(*SD1, *SD2, *XL),
        named=r"\blcm\b",
        steps=4,
        guidance_scale=1.0,
        sampler="lcm",
        schedule="lcm",
        source="Luo et al. 2023; its model cards",
    ),
    Recipe(
        title="Hyper-SD with guidance",
        families=(*SD1, *XL),
        named=r"\bhyper\b(?=.*(\d-steps?\b|\bhyper-sd)).*\bcfg\b",
        steps=8,
        guidance_scale=5.0,
        sampler="ddim",
        schedule="trailing",
        source="Ren et al. 2024 (Hyper-SD); its model card, 5 to 8",
    ),
    Recipe(
        title="Hyper-SD, 1 step",
        families=(*SD1, *XL),
        named=r"\bhyper\b.*\b1-step",
        steps=1,
        guidance_scale=1.0,
        sampler="tcd",
        schedule="lcm",
        source="Ren et al. 2024 (Hyper-SD); its model card",
    ),
    Recipe(
        title="Hyper-SD",
        families=(*SD1, *XL),
        named=r"\bhyper\b(?=.*\d-steps?\b|-sd)",
        steps=8,
        guidance_scale=1.0,
        sampler="ddim",
        schedule="trailing",
        source="Ren et al. 2024 (Hyper-SD); its model card",
    ),
    Recipe(
        title="SDXL merged with Turbo",
        families=XL,
        named=r"\bturbo",
        steps=6,
        guidance_scale=2.0,
        sampler="dpmpp_sde",
        schedule="karras",
        source="DreamShaper XL Turbo's model card, 4 to 8 steps",
    ),
    Recipe(
        title="Stable Diffusion 3.5 large turbo",
        families=("sd3.5-large",),
        named=r"\bturbo\b(?!-x\b)",
        steps=4,
        guidance_scale=1.0,
        sampler="euler",
        schedule="linspace",
        source="its model card",
    ),
    Recipe(
        title="FLUX.1 [dev] merged with schnell",
        families=FLUX_DEV,
        named=r"\bschnell\b",
        steps=4,
        guidance_scale=None,
        sampler=None,
        schedule=None,
        source="FLUX.1 [schnell]'s model card",
    ),
    Recipe(
        title="FLUX.1 [dev] with Hyper-SD or Turbo",
        families=FLUX_DEV,
        named=r"\bturbo\b|\bhyper\b(?=.*\d-steps?\b|-sd|-flux)",
        steps=8,
        guidance_scale=None,
        sampler=None,
        schedule=None,
        source="Hyper-FLUX.1-dev-8steps' and FLUX.1-Turbo-Alpha's model cards",
    ),
)
BY_TITLE = {recipe.title: recipe for recipe in RECIPES}
# What an LCM's network was trained to be told, where it is told a scale at all (Luo et al. 2023).
EMBEDDED_GUIDANCE = 8.0
# diffusers' schedulers that nothing else is drawn with.
SCHEDULERS = {"LCMScheduler": "LCM", "TCDScheduler": "TCD"}


@dataclass(frozen=True, kw_only=True)
class FewStep:
    """A few-step model: its recipe, the steps that it was made for, and what told it."""

    recipe: Recipe
    steps: int
    guidance_scale: float | None
    why: str

    def defaults(self, ours: "Defaults", *, keep_schedule: bool = False) -> "Defaults":
        """A family's defaults changed to the recipe's; `keep_schedule` leaves sampler and schedule alone."""
        recipe = self.recipe
        changes = {
            "guidance_scale": self.guidance_scale,
            "width": recipe.size,
            "height": recipe.size,
        }
        if not keep_schedule:
            changes |= {"sampler": recipe.sampler, "schedule": recipe.schedule}
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(ours, steps=self.steps, **given)

    def spec(self, ours: "DenoiserSpec", *, keep_schedule: bool = False) -> "DenoiserSpec":
        """How the network is used: with these defaults, and predicting what the recipe says, unless
        `keep_schedule` says that a scheduler was written for it.
        """
        told = None if keep_schedule else self.recipe.prediction
        prediction = told or ours.prediction
        defaults = self.defaults(ours.defaults, keep_schedule=keep_schedule)
        return replace(ours, prediction=prediction, defaults=defaults)


# Where headers say what a model is called: modelspec, kohya's trainer, GGUF.
TITLES = ("modelspec.title", "ss_output_name", "general.name")


def names_of(path: Path, header: Mapping[str, object]) -> list[str]:
    """What a file or folder is called: by itself, by the repository in a cache of the hub, by its header."""
    cached = path.parent.parent.name if path.parent.name == "snapshots" else ""
    name = cached or (path.name if path.is_dir() else path.stem)
    return [name, *(str(header[key]) for key in (*TITLES, "_name_or_path") if header.get(key))]


def few_step(
    family: str,
    names: Sequence[str],
    *,
    scheduler: str | None = None,
    embeds_guidance: bool = False,
    trailing_at: int | None = None,
) -> FewStep | None:
    """Whether a model is one that is drawn in few steps, and how; None where nothing says so.

    `names` are what it is called: its file's or folder's name and the titles in its header, the surest first.
    `scheduler` is the class that diffusers draws it with, and `embeds_guidance` whether its U-Net is told the
    guidance scale, as only LCMs' are. `trailing_at` is the side of the pictures in pixels that a network was
    trained on where its scheduler spaces timesteps from the last one, as those of Turbo do.
    """
    words = [(name, _words(name)) for name in names if name]
    if scheduler in SCHEDULERS:
        return _made(BY_TITLE[SCHEDULERS[scheduler]], words, embeds_guidance, f"its scheduler is {scheduler}")
    if embeds_guidance:
        return _made(BY_TITLE["LCM"], words, embeds_guidance, "its network is told the guidance scale")
    for recipe in RECIPES:
        for name, text in words:
            if family in recipe.families and re.search(recipe.named, text):
                return _made(recipe, words, embeds_guidance, f"it is called {name!r}")
    turbo = next((r for r in RECIPES if r.size is not None and family in r.families), None)
    if turbo is not None and trailing_at == turbo.size:
        return _made(turbo, words, False, f"its scheduler and its {trailing_at} px are {turbo.title}'s")
    return None


def _made(recipe: Recipe, words: Sequence[tuple[str, str]], embeds_guidance: bool, why: str) -> FewStep:
    steps = next(filter(None, (_steps(text) for _, text in words)), recipe.steps)
    scale = EMBEDDED_GUIDANCE if embeds_guidance else recipe.guidance_scale
    return FewStep(recipe=recipe, steps=steps, guidance_scale=scale, why=why)


def _words(name: str) -> str:
    """The words of a name in small letters, joined by hyphens: "XL_v21TurboDPM" as xl-v-21-turbo-dpm."""
    return "-".join(word.lower() for word in WORD.findall(name))


def _steps(words: str) -> int | None:
    """How many steps a name says: "4step", "8-steps"."""
    found = STEPS.search(words)
    return int(found[1]) if found and 1 <= int(found[1]) <= MOST_STEPS else None
