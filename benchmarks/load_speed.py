"""Time and peak memory of opening a single file of SDXL's size, ours beside diffusers' in one run.

    python benchmarks/load_speed.py --tokenizers FOLDER [--repeats 3] [--device cuda]

The file has SDXL's names and shapes and random half-precision weights, 6.9 GB; it is written once to
--folder. Each side opens it in a process of its own, in turns, and then reads every byte of its weights, so
that nothing is left for later; imports are done before the clock starts. The medians are compared. FOLDER
holds CLIP's vocab.json and merges.txt, or bpe_simple_vocab_16e6.txt.gz.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from darkroom.checkpoint.build import Unfilled, build_autoencoder, build_network, build_text_encoder
from darkroom.checkpoint.documents import write_documents
from darkroom.checkpoint.formats.io import save_tensors
from darkroom.checkpoint.layouts import layout_table
from darkroom.checkpoint.loose import Piece
from darkroom.checkpoint.places import Place, diffusers_place, single_place
from darkroom.families import FAMILIES

FAMILY = FAMILIES["sdxl"]
KINDS = {"network": "unet", "autoencoder": "autoencoder", "clip_l": "clip", "clip_g": "clip"}
STD = 0.02


def pieces(place: Callable[[str, str], Place]) -> dict[str, Piece]:
    """SDXL's networks on `meta`, in the places of a layout."""
    configs = {"network": FAMILY.network, "autoencoder": FAMILY.autoencoder, **FAMILY.texts}
    made = {}
    for role, kind in KINDS.items():
        builders = {"network": build_network, "autoencoder": build_autoencoder}
        with torch.device("meta"), Unfilled():
            ours = builders.get(role, build_text_encoder)(configs[role]).state_dict()
        where = place(role, kind)
        tensors = layout_table(kind, where.layout, configs[role])(ours)
        made[role] = Piece(
            role=role,
            kind=kind,
            layout=where.layout,
            prefix=where.prefix,
            config=configs[role],
            tensors=tensors,
        )
    return made


def write_file(path: Path) -> None:
    """A single file with SDXL's names and shapes; all tensors begin with the same random values."""
    whole = pieces(lambda role, kind: single_place(role, kind, "sdxl", alone=False))
    shapes = {piece.prefix + n: t.shape for piece in whole.values() for n, t in piece.tensors.items()}
    most = max(shape.numel() for shape in shapes.values())
    values = (torch.randn(most, generator=torch.Generator().manual_seed(0)) * STD).half()
    tensors = {name: values[: shape.numel()].reshape(shape) for name, shape in shapes.items()}
    save_tensors(path, tensors, {"format": "pt"})


def write_configs(folder: Path, tokenizers: Path) -> None:
    """The configs that diffusers opens a single file with, so that it need not go online."""
    places = pieces(lambda role, kind: diffusers_place(role, kind, "sdxl") or Place("diffusers", ""))
    write_documents(folder, places, "sdxl", [tokenizers])


def touch(networks: list[nn.Module]) -> float:
    """Read every byte of the weights."""
    total = 0.0
    for network in networks:
        for parameter in network.parameters():
            total += float(parameter.detach().sum(dtype=torch.float32))
    return total


def open_ours(args: argparse.Namespace) -> list[nn.Module]:
    """With `load_any`, as `darkroom.load` does."""
    from darkroom.checkpoint.load import load_any

    model = load_any(
        args.file, tokenizers=args.tokenizers, dtype=torch.float16, device=torch.device(args.device)
    )
    return [model.network, model.autoencoder, *(part.encoder for part in model.texts)]


def open_theirs(args: argparse.Namespace) -> list[nn.Module]:
    """With `from_single_file`, offline."""
    import diffusers

    pipe = diffusers.StableDiffusionXLPipeline.from_single_file(
        str(args.file), config=str(args.configs), local_files_only=True, torch_dtype=torch.float16
    ).to(args.device)
    return [pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2]


def child(args: argparse.Namespace) -> None:
    """Open the file once, and print seconds to open, to read all, and the peak of memory in bytes."""
    if args.side == "diffusers":
        import diffusers

        assert diffusers.StableDiffusionXLPipeline  # imported before the clock starts
    else:
        import darkroom.checkpoint.load

        assert darkroom.checkpoint.load
    if args.device != "cpu":
        torch.zeros(1, device=args.device)
    before = peak_memory()
    start = time.perf_counter()
    networks = {"ours": open_ours, "diffusers": open_theirs}[args.side](args)
    opened = time.perf_counter() - start
    touch(networks)
    whole = time.perf_counter() - start
    print(json.dumps({"opened": opened, "whole": whole, "peak": peak_memory(), "before": before}))


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def measure(side: str, args: argparse.Namespace, configs: Path) -> dict[str, float]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--file", str(args.file), "--device", args.device]
    command += ["--tokenizers", str(args.tokenizers), "--configs", str(configs)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def main(args: argparse.Namespace) -> None:
    """Write the file, run both sides in turns, and print medians and ratios."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        args.file, configs = Path(folder) / "sdxl.safetensors", Path(folder) / "configs"
        write_file(args.file)
        write_configs(configs, args.tokenizers)
        size = args.file.stat().st_size
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "diffusers": []}
        for number in range(args.repeats + 1):  # the first is the warm-up
            for side, found in runs.items():
                made = measure(side, args, configs)
                if number:
                    found.append(made)
                print(f"{side}: {made}", file=sys.stderr)
    medians = {
        side: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for side, found in runs.items()
    }
    print(f"file {size / 1e9:.2f} GB, {args.device}, {args.repeats} runs each, medians")
    print("| | opened s | every byte read s | peak memory GB | of the file |")
    print("| --- | --- | --- | --- | --- |")
    for side, m in medians.items():
        cells = (
            f"{m['opened']:.2f}",
            f"{m['whole']:.2f}",
            f"{m['peak'] / 1e9:.2f}",
            f"{m['peak'] / size:.2f}",
        )
        print(f"| {side} | {' | '.join(cells)} |")
    ratios = [medians["diffusers"][key] / medians["ours"][key] for key in ("opened", "whole")]
    print(
        f"diffusers takes {ratios[0]:.1f} times as long to open, {ratios[1]:.1f} times with every byte read"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=None, help="where to write the file for a while")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--configs", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    child(given) if given.side else main(given)
