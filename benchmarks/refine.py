r"""What `refine` puts back, on pictures never trained on: a table in Markdown, a sheet of crops, and figures.

    python benchmarks/refine.py darkroom-mini --data ../shared/data --out docs/assets/refine
    python benchmarks/refine.py runs/refine-taef2/refine.safetensors --autoencoder taef2_encoder.pth \
        --data ../shared/data --photo-size 256 --out docs/assets/refine-taef2
    python benchmarks/refine.py --plot docs/assets/refine.json docs/assets/refine-taef2.json \
        --out docs/assets/refine-spectrum

The first two write OUT.png, crops of chosen pictures where the autoencoder does worst, and OUT.json. Pictures
are the "test" part of `refine_data.py`; `--split dev --sweep` tries strengths and steps on the other part.
Every figure is of 8-bit pictures. Training with L1-like and denoising losses sees none of these figures.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from mini_data import Row
from mini_pictures import load, squeezenet
from refine_data import KINDS, chosen
from torch import Tensor
from tqdm import tqdm

from darkroom.checkpoint.load import load_any_autoencoder
from darkroom.data.latents import as_image
from darkroom.evaluate.handful import handful
from darkroom.evaluate.metrics import psnr, ssim, to_uint8
from darkroom.evaluate.spectrum import (
    fine_share,
    high_frequency_error,
    high_frequency_gain,
    radial_power,
)
from darkroom.evaluate.vae_sheet import Column, sheet
from darkroom.images import save_png
from darkroom.refine import Refine, load_refine, round_trip
from darkroom.runtime.device import default_device

EMOJI_SIZE, DETAIL = 128, 1 / 16  # pixels; cycles a pixel: half a cell of latents at stride 8
SEEDS = (0, 10_000)
FIGURES = ("PSNR, dB", "SSIM", "distance", "fine power off by, dB", "fine power, dB", "the set's, dB")
NAMES = ("decoded", "regression", "diffusion", "diffusion, other seeds")
STRENGTHS, STEPS = (0.0, 0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0), (3, 4, 6, 10, 20)
SHOWN = ("can/00", "wolf_plushie/01", "backpack_dog/02", "Milk", "1f4b5", "u1f3e3", "cat2/00")


@dataclass(frozen=True)
class Set:
    """Pictures of one kind and what becomes of them, uint8 (N, 3, S, S) by the names of NAMES."""

    kind: str
    rows: list[Row]
    original: Tensor
    made: dict[str, Tensor]


def variants(refine: Refine, decoded: Tensor, start: int) -> dict[str, Tensor]:
    """A batch of decoded pictures and what the modes make of it; the seeds go by the numbers of pictures."""
    image = as_image(decoded.to(next(refine.networks.parameters()).device))
    numbers = range(start, start + len(decoded))
    found = [decoded, refine.refine(image, numbers, mode="regression")]
    found += [refine.refine(image, [seed + k for k in numbers]) for seed in SEEDS]
    return dict(zip(NAMES, [f if f is decoded else to_uint8(f).cpu() for f in found], strict=True))


def decode(refine: Refine, pictures: Tensor) -> Tensor:
    """What the autoencoder makes of uint8 pictures."""
    device = next(refine.networks.parameters()).device
    return to_uint8(round_trip(refine.autoencoder, as_image(pictures.to(device)))).cpu()


def make(refine: Refine, original: Tensor, batch: int = 8) -> dict[str, Tensor]:
    """Every variant of uint8 pictures (N, 3, S, S)."""
    parts = []
    for start in tqdm(range(0, len(original), batch), desc="refining", unit=" batches", delay=1):
        parts.append(variants(refine, decode(refine, original[start : start + batch]), start))
    return {name: torch.cat([part[name] for part in parts]) for name in NAMES}


def sets(refine: Refine, data: Path, split: str, photo_size: int, limit: int | None) -> Iterator[Set]:
    """The sets of a split, each at its size."""
    picked = chosen(data, split, limit)
    for kind in KINDS:
        rows = [row for row in picked if row.kind == kind]
        if rows:
            original = load(data, rows, EMOJI_SIZE if kind == "emoji" else photo_size)
            yield Set(kind, rows, original, make(refine, original))


def set_spectrum(original: Tensor, made: Tensor) -> Tensor:
    """The mean power of all pictures together over that of the originals, in dB, (K,)."""
    return 10 * (radial_power(made)[1].mean(0) / radial_power(original)[1].mean(0)).log10()


def figures(found: Set, name: str, distances: Tensor | None) -> list[float]:
    """FIGURES of one variant, means over pictures."""
    a, b = found.original, found.made[name]
    whole = set_spectrum(a, b)
    fine = whole[len(whole) // 2 :].abs().mean()
    values = (psnr(a, b), ssim(a, b), distances, high_frequency_error(a, b), high_frequency_gain(a, b), fine)
    return [float("nan") if v is None else v.mean().item() for v in values]


def seeds_apart(found: Set) -> dict[str, float]:
    """How two seeds differ: in dB as they are and as means of 8x8 pixels, and the share that is detail."""
    a, b = (found.made[name] for name in NAMES[2:])
    coarse = [F.avg_pool2d(x.double(), 8) for x in (a, b)]
    square = (coarse[0] - coarse[1]).square().flatten(1).mean(1)
    return {
        "apart, dB": psnr(a, b).mean().item(),
        "8x8 means apart, dB": (10 * (255**2 / square).log10()).mean().item(),
        "share finer than 16 pixels": fine_share(a, b, DETAIL).mean().item(),
    }


def distances(network: torch.nn.Module | None, a: Tensor, b: Tensor) -> Tensor | None:
    """SqueezeNet's distance of uint8 pictures, one each, or None without the network."""
    if network is None:
        return None
    device = next(network.parameters()).device
    with torch.no_grad():
        pairs = zip(a.split(8), b.split(8), strict=True)
        return torch.cat([network(as_image(x.to(device)), as_image(y.to(device))).cpu() for x, y in pairs])


def report(found: Set, network: torch.nn.Module | None) -> dict[str, object]:
    """All figures of a set, printed as lines of a table in Markdown."""
    rows = {}
    for name in NAMES:
        rows[name] = figures(found, name, distances(network, found.original, found.made[name]))
        cells = [f"{v:.{digits}f}" for v, digits in zip(rows[name], (2, 4, 4, 2, 2, 2), strict=True)]
        print(f"| {len(found.rows)} {found.kind} | {name} | {' | '.join(cells)} |", flush=True)
    apart = seeds_apart(found)
    print("|".join(f" {key}: {value:.3f} " for key, value in apart.items()), flush=True)
    curves = {name: set_spectrum(found.original, made).tolist() for name, made in found.made.items()}
    return {"pictures": len(found.rows), "figures": rows, "seeds": apart, "spectrum": curves}


def crops(refine: Refine, found: list[Set], photo_size: int) -> tuple[dict[str, Tensor], list[Column]]:
    """The pictures of the sheet by name, and its columns."""
    drawn = handful(photo_size)
    pictures, columns = {}, {name: [] for name in NAMES}
    for name in ("text", "hairs"):
        made = make(refine, drawn[name][None])
        pictures[f"drawn {name}"] = drawn[name]
        for key in NAMES:
            columns[key].append(made[key][0])
    for part in found:
        for number, row in enumerate(part.rows):
            wanted = next((text for text in SHOWN if text in row.path), None)
            if wanted is not None and row.concept not in pictures:
                pictures[row.concept] = part.original[number]
                for key in NAMES:
                    columns[key].append(part.made[key][number])
    return pictures, [Column(name, images) for name, images in columns.items()]


def sweep(refine: Refine, data: Path, photo_size: int, limit: int | None) -> None:
    """PSNR and the error of fine power by strength and steps, on the part to choose settings by."""
    picked = chosen(data, "dev", limit)
    for kind in KINDS[:2]:
        original = load(data, [row for row in picked if row.kind == kind], photo_size)
        decoded = torch.cat([decode(refine, part) for part in original.split(8)])
        image = as_image(decoded.to(next(refine.networks.parameters()).device))
        plans = [(s, refine.networks.spec.steps) for s in STRENGTHS] + [(0.75, n) for n in STEPS]
        for strength, steps in plans:
            parts = enumerate(image.split(8))
            options = {"steps": steps, "strength": strength}
            made = [
                to_uint8(refine.refine(p, range(8 * i, 8 * i + len(p)), **options)).cpu() for i, p in parts
            ]
            values = [f(original, torch.cat(made)).mean().item() for f in (psnr, high_frequency_error)]
            print(f"| {kind} | {strength} | {steps} | {values[0]:.2f} | {values[1]:.2f} |", flush=True)


def plot(files: list[Path], out: Path) -> None:
    """The power of each variant over that of the originals, by frequency, a panel for each set."""
    from matplotlib.figure import Figure

    reports = {file.stem: json.loads(file.read_text()) for file in files}
    panels = [(stem, kind) for stem, report in reports.items() for kind in report["sets"]]
    figure = Figure(figsize=(4 * len(panels) / len(files), 3.2 * len(files)), layout="constrained")
    axes = figure.subplots(len(files), len(panels) // len(files), sharey=True).flatten()
    for axis, (stem, kind) in zip(axes, panels, strict=True):
        for name, curve in list(reports[stem]["sets"][kind]["spectrum"].items())[:3]:
            axis.plot([0.5 * k / (len(curve) - 1) for k in range(len(curve))], curve, label=name)
        axis.axhline(0, color="grey", linewidth=0.7)
        axis.axvspan(0.25, 0.5, color="grey", alpha=0.1)
        axis.set_title(f"{reports[stem]['autoencoder']}: {kind}", fontsize=9)
        axis.set_xlabel("cycles a pixel")
    axes[0].set_ylabel("power over the original's, dB")
    axes[0].legend(fontsize=8)
    figure.savefig(out.with_suffix(".png"), dpi=100)


def main() -> None:
    """Score, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="darkroom-mini", help="a model, or a file of networks")
    parser.add_argument("--autoencoder", help="with a file of networks, the autoencoder")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--photo-size", type=int, default=128)
    parser.add_argument("--limit", type=int, help="so many pictures of each kind")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--plot", type=Path, nargs="+", help="figures written before")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.plot:
        plot(args.plot, args.out)
        return
    device = default_device()
    given = load_any_autoencoder(args.autoencoder, device=device) if args.autoencoder else None
    refine = load_refine(args.model, autoencoder=given, device=device)
    if args.sweep:
        sweep(refine, args.data, args.photo_size, args.limit)
        return
    has_network = (args.data / "weights" / "squeezenet1_1_caffe_features.safetensors").is_file()
    network = squeezenet(args.data, device) if has_network else None
    print("| pictures | | " + " | ".join(FIGURES) + " |")
    found = list(sets(refine, args.data, args.split, args.photo_size, args.limit))
    reports = {part.kind: report(part, network) for part in found}
    name = Path(args.autoencoder or args.model).stem
    text = json.dumps({"autoencoder": name, "photo_size": args.photo_size, "sets": reports}, indent=1)
    args.out.with_suffix(".json").write_text(text + "\n")
    pictures, columns = crops(refine, found, args.photo_size)
    image = sheet(pictures, columns, judged=columns[:1], crops=len(pictures))
    save_png(args.out.with_suffix(".png"), image)


if __name__ == "__main__":
    main()
