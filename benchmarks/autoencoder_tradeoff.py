r"""What latent size buys: trained autoencoders side by side, as a table in Markdown and a plot.

    python benchmarks/autoencoder_tradeoff.py runs/f8c16 runs/f8c4 --data ../shared/data \
        --out docs/assets/mini

Each folder holds an `autoencoder.safetensors`. Judged on what none of them was trained on: set-aside emoji
concepts without skin tones, and the validation photos, at 128 px; PSNR is the mean of each picture's dB on 8
bits, the distance is SqueezeNet's, unweighted.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch
from mini_data import Row, by_hash, rows
from mini_pictures import SIZE, load, reconstruct, squeezenet
from torch import Tensor

from darkroom.checkpoint.model import load_autoencoder
from darkroom.nn.perceptual import SqueezeDistance
from darkroom.runtime.device import default_device

matplotlib.use("Agg")
from matplotlib import pyplot as plt

KINDS = ("emoji", "photo")


@dataclass(frozen=True)
class Point:
    """One autoencoder: what its latents cost and what they keep, by kind of picture."""

    name: str
    stride: int
    channels: int
    parameters: int
    numbers: int
    psnr: dict[str, float]
    distance: dict[str, float]

    @property
    def label(self) -> str:
        """Stride and channels, as autoencoders are called."""
        return f"f{self.stride}, {self.channels} ch"


def measure(folder: Path, images: dict[str, Tensor], network: SqueezeDistance) -> Point:
    """Judge one autoencoder on pictures of each kind, uint8 (N, 3, 128, 128)."""
    autoencoder = load_autoencoder(folder).to(network.mean.device).eval()
    space = autoencoder.latent_space
    kept = {kind: reconstruct(autoencoder, found, network) for kind, found in images.items()}
    return Point(
        name=folder.name,
        stride=space.stride,
        channels=space.channels,
        parameters=sum(parameter.numel() for parameter in autoencoder.parameters()),
        numbers=space.channels * (SIZE // space.stride) ** 2,
        psnr={kind: k.psnr.mean().item() for kind, k in kept.items()},
        distance={kind: k.distance.mean().item() for kind, k in kept.items()},
    )


def table(points: Sequence[Point]) -> str:
    """The points as a table in Markdown."""
    lines = [
        "| autoencoder | parameters | numbers a picture | smaller by | emoji, dB | photos, dB "
        "| emoji, distance | photos, distance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in points:
        psnr = " | ".join(f"{p.psnr[kind]:.2f}" for kind in KINDS)
        distance = " | ".join(f"{p.distance[kind]:.4f}" for kind in KINDS)
        ratio = 3 * SIZE**2 / p.numbers
        lines.append(
            f"| {p.label} | {p.parameters / 1e6:.1f} M | {p.numbers:,} | {ratio:.0f} | {psnr} | {distance} |"
        )
    return "\n".join(lines)


def plot(points: Sequence[Point], path: Path) -> None:
    """PSNR and perceptual distance over the numbers in a picture's latents."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), constrained_layout=True)
    values: tuple[tuple[str, Callable[[Point], dict[str, float]]], ...] = (
        ("PSNR, dB (higher is better)", lambda p: p.psnr),
        ("perceptual distance (lower is better)", lambda p: p.distance),
    )
    for panel, (title, value) in zip(panels, values, strict=True):
        for kind, mark in zip(KINDS, "os", strict=True):
            heights = [value(p)[kind] for p in points]
            panel.scatter(
                [p.numbers for p in points],
                heights,
                marker=mark,
                s=50,
                label={"emoji": "unseen emoji", "photo": "unseen photos"}[kind],
            )
            for p, height in zip(points, heights, strict=True):
                panel.annotate(p.label, (p.numbers, height), (5, 5), textcoords="offset points", fontsize=8)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.set_xlabel(f"numbers in the latents of a {SIZE} px picture")
        panel.set_ylabel(title)
        panel.margins(x=0.25, y=0.15)
        panel.grid(alpha=0.3)
    panels[0].legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def unseen(table: Sequence[Row], limit: int | None) -> dict[str, list[Row]]:
    """The pictures to judge on, by kind."""
    emoji = [row for row in table if row.split == "concept" and not row.skin_tone]
    photos = [row for row in table if row.split == "val"]
    return {kind: by_hash(chosen, kind)[:limit] for kind, chosen in (("emoji", emoji), ("photo", photos))}


def main() -> None:
    """Measure, write `tradeoff.json` and `tradeoff.png`, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+", help="run folders with an autoencoder.safetensors")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("docs/assets/mini"))
    parser.add_argument("--device")
    parser.add_argument("--limit", type=int, help="at most so many pictures of a kind, for a quick look")
    options = parser.parse_args()
    device = torch.device(options.device) if options.device else default_device()
    network = squeezenet(options.data, device)
    images = {
        k: load(options.data, chosen) for k, chosen in unseen(rows(options.data), options.limit).items()
    }
    points = [measure(folder, images, network) for folder in options.folders]
    points.sort(key=lambda p: (p.numbers, -p.stride))
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(p) for p in points], indent=1)
    (options.out / "tradeoff.json").write_text(text + "\n")
    plot(points, options.out / "tradeoff.png")
    print(table(points))


if __name__ == "__main__":
    main()
