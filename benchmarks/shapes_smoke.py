"""Train both stages on generated shapes, draw 64 prompts, and let the checker count what came out right.

    python benchmarks/shapes_smoke.py --out runs/smoke

Prints the seconds of each stage, and the share of prompts right in colour, in colour and shape, and
altogether; writes a sheet of all pictures to OUT/shapes.png.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import darkroom
from darkroom.config import load_recipe
from darkroom.data.shapes import ShapesSource, Verdict, check
from darkroom.images import grid, save_png
from darkroom.train import autoencoder, denoiser

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PROMPTS = 64
OTHER_SEED = 1  # the recipes train on the scenes of seed 0; captions recur, pictures do not


@dataclass(frozen=True)
class Smoke:
    """What came out: seconds of the two stages, and a verdict for each prompt."""

    seconds: tuple[float, float]
    verdicts: list[Verdict]

    @property
    def colour(self) -> float:
        """The share of prompts right in colour."""
        return sum(v.colour for v in self.verdicts) / len(self.verdicts)

    @property
    def colour_and_shape(self) -> float:
        """The share right in colour and shape."""
        return sum(v.colour and v.shape for v in self.verdicts) / len(self.verdicts)

    @property
    def right(self) -> float:
        """The share right in everything: colour, shape, size, place and count."""
        return sum(v.right for v in self.verdicts) / len(self.verdicts)


def train(out: Path) -> tuple[Path, tuple[float, float]]:
    """Both stages of the shapes recipes into `out`; the model folder and the seconds of each stage."""
    started = time.perf_counter()
    first = load_recipe(RECIPES / "shapes-autoencoder.toml", autoencoder.AutoencoderRecipe)
    autoencoder.train(replace(first, out=out / "autoencoder"))
    middle = time.perf_counter()
    second = load_recipe(RECIPES / "shapes-denoiser.toml", denoiser.DenoiserRecipe)
    model = denoiser.train(replace(second, out=out / "model", autoencoder=out / "autoencoder"))
    return model, (middle - started, time.perf_counter() - middle)


def judge(model: Path | str, sheet: Path) -> list[Verdict]:
    """Draw the captions of scenes from another seed, one picture each, and check them."""
    recipe = load_recipe(RECIPES / "shapes-denoiser.toml", denoiser.DenoiserRecipe)
    assert recipe.data.shapes is not None
    source: ShapesSource = replace(recipe.data.shapes, count=PROMPTS, seed=OTHER_SEED)
    scenes = [source.scene(k) for k in range(PROMPTS)]
    images = darkroom.load(model)([scene.caption for scene in scenes], seed=0).images
    verdicts = [check(image, scene) for image, scene in zip(images, scenes, strict=True)]
    labels = [f"{'+' if v.right else '-'} {s.caption}" for v, s in zip(verdicts, scenes, strict=True)]
    save_png(sheet, grid([image.resize((96, 96)) for image in images], 8, labels=labels))
    return verdicts


def run(out: Path) -> Smoke:
    """Train, draw and judge."""
    model, seconds = train(out)
    return Smoke(seconds, judge(model, out / "shapes.png"))


def main() -> None:
    """Run it and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/smoke"))
    smoke = run(parser.parse_args().out)
    print(f"autoencoder {smoke.seconds[0]:.0f} s, denoiser {smoke.seconds[1]:.0f} s")
    print(f"colour {smoke.colour:.0%}, colour and shape {smoke.colour_and_shape:.0%}, all {smoke.right:.0%}")


if __name__ == "__main__":
    main()
