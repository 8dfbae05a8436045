r"""One forward of every family in bfloat16 at real size: error, memory and time beside the references'.

    python benchmarks/bf16_families.py --out docs/assets/bf16.json

Weights and inputs are random, drawn on the device, and exact in bfloat16, so that errors are those of the
arithmetic alone. The error of an output is its distance from that of our own network in float32 (no TF32,
attention by plain matrix products), relative to the norm of that. The reference (diffusers, transformers) has
the same weights, moved through our tables, and is loaded as its `from_pretrained(torch_dtype=bfloat16)` does.
Prints a JSON line a family and a Markdown table at the end; a family that fails says so in its line, and the
others go on. `--tiny` shrinks every network so that all of it runs on a CPU in a minute.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from bf16_networks import EXACT, Call, Family, Tensors, families
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Row = dict[str, Any]

LIMIT = 1.1
SANE = (0.05, 50.0)  # standard deviation of the output in float32
WARM_UP = 3
SIDES = ("our", "reference")
GIB = 2**30


@dataclass(frozen=True)
class Run:
    """An output, the milliseconds of each timed forward, and the most memory that one took in GiB."""

    output: Tensor
    milliseconds: list[float]
    peak: float | None

    def row(self, side: str, expected: Tensor) -> Row:
        """What a row says of it; the `best` time is what a busy host disturbed least."""
        median, best = statistics.median(self.milliseconds), min(self.milliseconds)
        numbers = {"error": relative_error(self.output, expected), "ms": median, "best_ms": best}
        return {f"{side}_{name}": value for name, value in (numbers | {"peak_gib": self.peak}).items()}


def measure(family: Family, row: Row, device: torch.device, repeats: int) -> None:
    """Fill the row with what is found, as soon as it is found."""
    generator = torch.Generator(device).manual_seed(0)
    network = drawn(family, device, generator)
    inputs = drawn_inputs(family, device, generator)
    row["parameters"] = sum(parameter.numel() for parameter in network.parameters())
    with exact_float32():
        expected = family.ours(network, cast(inputs, torch.float32)).double()
    row["std"] = expected.std().item()
    network.to(torch.bfloat16)
    inputs = cast(inputs, torch.bfloat16)
    ours = timed(family.ours, network, inputs, repeats)
    row |= ours.row("our", expected)
    weights = family.table(network.state_dict())
    del network
    theirs = timed(family.theirs, loaded(family, weights, device), inputs, repeats)
    row |= theirs.row("reference", expected)
    row["ratio"] = row["our_error"] / row["reference_error"]
    row["equal"] = torch.equal(ours.output, theirs.output)
    if not SANE[0] <= row["std"] <= SANE[1]:
        raise ValueError(f"the output's standard deviation is {row['std']:.3g}: the weights are not sane")


@torch.no_grad()
def drawn(family: Family, device: torch.device, generator: torch.Generator) -> nn.Module:
    """Our network with random weights under which layers keep variances, and no gate or bias is zero."""
    with torch.device(device):
        network = family.network().to(device).eval()
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in network.named_parameters():
        parameter.normal_(generator=generator)
        if id(parameter) in embeddings:
            continue
        if parameter.ndim == 1:  # gains are about one, biases about zero
            parameter.mul_(0.1).add_(float(name.endswith(("weight", "scale"))))
            continue
        gains = [gain for ending, gain in family.gains.items() if name.endswith(ending)]
        parameter.mul_((gains or [1.0])[0] / parameter[0].numel() ** 0.5)
    for parameter in network.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    return network.requires_grad_(False)


def drawn_inputs(family: Family, device: torch.device, generator: torch.Generator) -> Tensors:
    """The inputs in float32, exact in bfloat16."""
    normal = {n: torch.randn(shape, generator=generator, device=device) for n, shape in family.normal.items()}
    return {n: t.to(torch.bfloat16).float() for n, t in normal.items()} | {
        n: t.to(device) for n, t in family.given.items()
    }


def cast(inputs: Tensors, dtype: torch.dtype) -> Tensors:
    """The inputs in this type, but for whole numbers and those that every network reads in float32."""
    return {n: t.to(dtype) if t.is_floating_point() and n not in EXACT else t for n, t in inputs.items()}


def loaded(family: Family, weights: Tensors, device: torch.device) -> nn.Module:
    """The reference with these weights; empties `weights`."""
    # `from_pretrained` too builds under the target's default type, and leaves computed buffers in float32.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = family.reference().to(device).eval()
    finally:
        torch.set_default_dtype(before)
    own = {name: weights[name] for name in model.state_dict()}
    model.load_state_dict(own, strict=True, assign=True)
    weights.clear()
    return model.requires_grad_(False)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 without TF32, and attention by plain matrix products."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


@torch.no_grad()
def timed(call: Call, network: nn.Module, inputs: Tensors, repeats: int) -> Run:
    """Run a network until warm, then `repeats` times."""
    device = next(network.parameters()).device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP):
        output = call(network, inputs)
    clock = cuda_milliseconds if device.type == "cuda" else host_milliseconds
    times = [clock(lambda: call(network, inputs)) for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
    return Run(output, times, peak)


def cuda_milliseconds(call: Callable[[], object]) -> float:
    """How long a call takes by the device's own clock, from an idle device on."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def host_milliseconds(call: Callable[[], object]) -> float:
    """How long a call takes on the host."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Distance from what is expected, in float64, relative to its norm."""
    return ((value.double() - expected).norm() / expected.norm()).item()


def attempted(family: Family, device: torch.device, repeats: int) -> Row:
    """The family's row; with an `error_message` where it went wrong."""
    row: Row = {"family": family.name, "size": family.size}
    start = time.perf_counter()
    try:
        measure(family, row, device, repeats)
    except Exception as error:  # the others go on
        row["error_message"] = f"{type(error).__name__}: {error}"[:400]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def table(rows: list[Row]) -> str:
    """The rows in Markdown; a ratio beyond the limit is in bold."""
    head = ["network", "size", "parameters, M", "error", "reference's error", "ratio"]
    head += ["peak GiB", "reference's", "ms: median (fastest)", "reference's"]
    lines = [head, ["---"] * len(head), *map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells(row: Row) -> list[str]:
    """A row's values in the table's columns."""
    ratio = number(row, "ratio", ".3f")
    line = [row["family"], row["size"], number(row, "parameters", ",.1f", 1e-6)]
    line += [number(row, f"{side}_error", ".2e") for side in SIDES]
    line.append(f"**{ratio}**" if row.get("ratio", 0) > LIMIT else ratio)
    line += [number(row, f"{side}_peak_gib", ".2f") for side in SIDES]
    return line + [
        f"{number(row, f'{side}_ms', '.1f')} ({number(row, f'{side}_best_ms', '.1f')})" for side in SIDES
    ]


def number(row: Row, name: str, form: str, factor: float = 1.0) -> str:
    """A value of the row, or a dash where there is none."""
    return "–" if row.get(name) is None else format(row[name] * factor, form)


def setting(device: torch.device) -> Row:
    """What the rows were measured on and with."""
    versions: Row = {}
    for package in ("torch", "diffusers", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"card": card, "command": "python " + " ".join(sys.argv)} | versions


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the JSON lines to this file")
    parser.add_argument("--only", nargs="*", help="families whose names hold one of these")
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds after which none starts")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure the families one after another."""
    args, start, rows, lines = arguments(), time.perf_counter(), [], []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def say(line: Row) -> None:
        lines.append(json.dumps(line))
        print(lines[-1], flush=True)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n")

    say(setting(device))
    for family in families(tiny=args.tiny):
        if args.only and not any(part in family.name for part in args.only):
            continue
        if time.perf_counter() - start > args.until:
            rows.append({"family": family.name, "size": family.size, "error_message": "no time left"})
        else:
            rows.append(attempted(family, device, args.repeats))
        say(rows[-1])
    print(table(rows))


if __name__ == "__main__":
    main()
