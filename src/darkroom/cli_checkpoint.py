"""The commands `darkroom checkpoint ...`: what files of weights are, and files made of others.

As in `cli.py`, what needs torch is imported when it is used; `inspect` never needs it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from darkroom.checkpoint.find import autoencoder_path, model_path, search_folders
from darkroom.checkpoint.folders import PICKLES
from darkroom.checkpoint.formats.header import INDEX_SUFFIX
from darkroom.cli_options import (
    MaybeFloat,
    MaybePath,
    MaybeText,
    ModelDirs,
    check_files,
    check_output,
    print_table,
)
from darkroom.errors import DarkroomError, InputError
from darkroom.files import require_new, require_parent

if TYPE_CHECKING:
    from darkroom.checkpoint.measure import Measurement

Output = Annotated[Path, arg(aliases=["-o"])]
To = Literal["single", "diffusers", "parts", "auto"]
GIGABYTE = 10**9
MOST_GIGABYTES = 10**6


def inspect(
    file: Positional[Path],
    *,
    json: bool = False,
    fingerprint: bool = False,
    measure: bool = False,
    images: str = "",
) -> None:
    """Say what a checkpoint is: family, parts, precision, what it predicts, and what in it is unknown.

    Args:
        file: A file of weights, or the folder of a model.
        json: Print one JSON object.
        fingerprint: Compare a few numbers with those of known autoencoders and text encoders.
        measure: Denoise pictures one step under each hypothesis of what the network predicts.
        images: A picture or a folder of them to measure with; some are drawn if none is given.
    """
    # A plain type: for any other one the parser imports a library that takes as long as all the rest.
    pictures = [Path(images)] if images else []
    check_files(pictures)
    file = found(file)
    from darkroom.checkpoint.inspect import inspect, notes, rows, summary

    report = inspect(file)
    known = _recognised(file) if fingerprint else {}
    measured = _measured(file, pictures) if measure else None
    if json:
        beside: dict[str, object] = {"fingerprints": known} if fingerprint else {}
        beside |= {"measured": _fields(measured)} if measured else {}
        print(report.to_json(beside))
        return
    print(summary(report))
    print_table(rows(report))
    for line in (*notes(report), *report.evidence):
        print(line)
    for part, names in known.items():
        print(f"{part}: {' or '.join(names) or 'not among those known'}")
    if measured:
        from darkroom.checkpoint.measure import table, verdict

        print_table(table(measured))
        print(verdict(measured))


def found(path: Path) -> Path:
    """A file or folder that is there, shards by what they are named after, or one of that name."""
    if path.with_name(f"{path.name}{INDEX_SUFFIX}").is_file():
        return path
    return autoencoder_path(path, search_folders())


def _recognised(file: Path) -> dict[str, tuple[str, ...]]:
    from darkroom.checkpoint.fingerprint import recognise

    return {part.what: part.names for part in recognise(file)}


def _measured(file: Path, images: list[Path]) -> "Measurement":
    from darkroom.checkpoint.measure import measure_file

    return measure_file(file, images)


def _fields(measured: "Measurement") -> dict[str, object]:
    from darkroom.checkpoint.measure import verdict

    errors = {row.hypothesis.name: row.error for row in measured.rows}
    return {"found": measured.found and measured.found.name, "errors": errors, "verdict": verdict(measured)}


def learn(file: Positional[Path], name: Positional[str]) -> None:
    """Remember an autoencoder or text encoders under a name, for `inspect --fingerprint`.

    Args:
        file: A file of weights, or the folder of a model.
        name: What to call it.
    """
    file = found(file)
    if not name.strip():
        raise InputError("a name is needed to remember it by")
    from darkroom.checkpoint.fingerprint import learn, user_table

    print(f"{user_table()}: {name}: {', '.join(learn(file, name))}")


def convert(
    source: Positional[Path],
    out: Positional[Path],
    *,
    to: To = "auto",
    dtype: MaybeText = None,
    family: MaybeText = None,
    tokenizers: MaybePath = None,
    max_shard: MaybeFloat = None,
    mkdir: bool = False,
) -> None:
    """Write a model in another layout or precision; the way back gives the same names and data.

    Args:
        source: A file of weights, the folder of a model in diffusers' layout, or one of its parts as files.
        out: What to write: a .safetensors or .gguf file, or a folder.
        to: One file, the folders of diffusers, or one file a part; by the name of OUT if not given.
        dtype: float32, float16, bfloat16, fp8, fp8_scaled or GGUF's, such as q8_0; as it is if not given.
        family: What the model is where names and shapes leave it open; see darkroom models.
        tokenizers: Where to look first for tokenizers, which diffusers' folder wants.
        max_shard: The largest file in GB; larger ones are split, with an index.
        mkdir: Make the output's folder if it does not exist.
    """
    source = found(source)
    require_parent(out, mkdir=mkdir)
    form = _form(out, to)
    if max_shard is not None and not 0 < max_shard < MOST_GIGABYTES:
        raise InputError(f"--max-shard must be a size in GB above 0, not {max_shard:g}")
    from darkroom.checkpoint.convert import convert

    written = convert(
        source,
        out,
        to=form,
        dtype=dtype,
        family=family,
        tokenizers=[tokenizers] if tokenizers else [],
        max_bytes=None if max_shard is None else round(max_shard * GIGABYTE),
    )
    for path in written:
        print(path)


def _form(out: Path, to: To = "auto") -> Literal["single", "diffusers", "parts"]:
    """What to write, by the output's name where it is not said; InputError where the two do not fit."""
    if out.suffix in PICKLES:
        raise InputError(f"{out}: pickles are not written: name it .safetensors")
    file = out.suffix in (".safetensors", ".sft", ".gguf")
    form = ("single" if file else "diffusers") if to == "auto" else to
    if (form == "single") != file:
        wanted = "a .safetensors or .gguf file" if form == "single" else "a folder"
        raise InputError(f"{out}: the result of --to {form} is {wanted}")
    return form


def diff(first: Positional[Path], second: Positional[Path], *, base: MaybePath = None) -> None:
    """Say how two models differ, part by part: equal, merged, low-rank (a LoRA), or retrained.

    Args:
        first: A file of weights, or the folder of a model.
        second: The other one, in whatever layout and precision.
        base: A third model, of which and the first the second may be a mixture.
    """
    first, second, base = found(first), found(second), base and found(base)
    from darkroom.checkpoint.diff import diff, notes, rows

    differences = diff(first, second, base=base)
    print_table(rows(differences))
    for line in notes(differences):
        print(line)


def merge(
    first: Positional[Path],
    others: Positional[tuple[Path, ...]],
    *,
    output: Output,
    weight: tuple[float, ...] = (),
    base: MaybePath = None,
    rule: tuple[str, ...] = (),
    blocks: MaybeText = None,
    dtype: MaybeText = None,
    mkdir: bool = False,
) -> None:
    """Mix models: first + weight * (other - base), the base being the first if none is given.

    Args:
        first: The model that the others are mixed into, and whose layout the result has.
        others: Models to mix in.
        output: The file or folder to write.
        weight: A weight for each of the others; even shares if none is given, or 1 each with a base.
        base: What the others were made from, to add only what they differ by.
        rule: Weights for a part, a block or tensors: clip_l=0, IN0*=0.3, network.OUT11=1; the last holds.
        blocks: The U-Net's weights block by block, 25 or 26 numbers with commas between, or 19 or 20 of SDXL.
        dtype: Precision of the result; the first model's if not given.
        mkdir: Make the output's folder if it does not exist.
    """
    first, others, base = found(first), tuple(map(found, others)), base and found(base)
    if not others:
        raise InputError("name at least one model to mix into the first")
    require_parent(output, mkdir=mkdir)
    form = _form(output)
    from darkroom.checkpoint.convert import check, write
    from darkroom.checkpoint.loose import take_apart
    from darkroom.checkpoint.merge import Rule, block_rules, merge

    check(output, dtype)
    by_block = block_rules(blocks, len(others)) if blocks else ()
    rules = [*by_block, *(Rule.parse(text, len(others)) for text in rule)]
    share = 1.0 if base is not None else 1 / (len(others) + 1)
    merged = merge(take_apart(first), others, weight or (share,) * len(others), base=base, rules=rules)
    for path in write(
        merged, output, to=form, dtype=dtype, tokenizers=[first if first.is_dir() else first.parent]
    ):
        print(path)


def extract(
    tuned: Positional[Path],
    base: Positional[Path],
    *,
    output: Output,
    rank: int = 32,
    share: float = 1.0,
    mkdir: bool = False,
) -> None:
    """Make a LoRA of what a fine-tuned model differs by from the one that it was made from.

    Args:
        tuned: A file of weights, or the folder of a model.
        base: What it was made from.
        output: The .safetensors file to write.
        rank: The largest rank of a layer.
        share: The part of each layer's difference to hold, 0 to 1, if that needs less than the rank.
        mkdir: Make the output's folder if it does not exist.
    """
    tuned, base = found(tuned), found(base)
    check_output(output, ".safetensors", mkdir=mkdir)
    require_new(output)
    from darkroom.checkpoint.extract import extract, lines
    from darkroom.checkpoint.formats.io import save_tensors

    made = extract(tuned, base, rank=rank, share=share)
    save_tensors(output, made.tensors, made.metadata)
    for line in lines(made):
        print(line)
    print(output)


def prune(
    file: Positional[Path],
    *,
    output: Output,
    ema: Literal["drop", "use", "keep"] = "drop",
    dtype: Literal["keep", "float32", "float16", "bfloat16"] = "keep",
    full_autoencoder: bool = False,
    mkdir: bool = False,
) -> None:
    """Leave out of a file what only training needs, and store the rest in less precision.

    Args:
        file: A file of weights.
        output: The .safetensors file to write.
        ema: Drop the averaged copies of weights, use them in the place of the others, or keep both.
        dtype: Precision of the result.
        full_autoencoder: Leave the autoencoder's as it is: SDXL's overflows in float16.
        mkdir: Make the output's folder if it does not exist.
    """
    file = found(file)
    check_output(output, ".safetensors", mkdir=mkdir)
    require_new(output)
    import torch

    from darkroom.checkpoint.formats.io import load_tensors, save_tensors
    from darkroom.checkpoint.prune import prune

    tensors, metadata = load_tensors(file)
    wanted = None if dtype == "keep" else getattr(torch, dtype)
    pruned = prune(tensors, ema=ema, dtype=wanted, full_autoencoder=full_autoencoder)
    save_tensors(output, pruned.tensors, metadata)
    for why, names in pruned.dropped.items():
        print(f"left out: {len(names)} {why}")
    print(f"{output}: {pruned.after / 1e6:,.1f} MB of {pruned.before / 1e6:,.1f}")


def swap_vae(
    model: Positional[str],
    vae: Positional[str],
    *,
    output: Output,
    image: tuple[Path, ...] = (),
    interposer: bool = False,
    model_dir: ModelDirs = (),
    tokenizers: MaybePath = None,
    mkdir: bool = False,
) -> None:
    """Put another autoencoder into a model, if it fits: measured on pictures, and refused if it does not.

    Args:
        model: A bundled model, a model folder or file, or the name of one.
        vae: The other autoencoder: a file or folder, or the name of one.
        output: The folder of the new model; a comparison picture is written beside it.
        image: Pictures or folders of them to measure on; some are drawn if none is given.
        interposer: Train a small network between the latent spaces, if nothing simpler fits.
        model_dir: Folders to search by name.
        tokenizers: Where to look first for tokenizers that no file holds.
        mkdir: Make the output's folder if it does not exist.
    """
    folders = search_folders(model_dir)
    paths = model_path(model, folders), autoencoder_path(vae, folders)
    check_files(image)
    require_parent(output, mkdir=mkdir)
    from darkroom.checkpoint.swap import swap_vae
    from darkroom.runtime.device import default_device
    from darkroom.train.interposer import InterposerTraining

    training = InterposerTraining() if interposer else None
    verdict = swap_vae(
        *paths,
        image,
        out=output,
        tokenizers=tokenizers,
        interposer=training,
        device=default_device(),
        mkdir=mkdir,
    )
    for rows in (verdict.quality_rows(), verdict.fit_rows()):
        if rows:
            print_table(rows)
    for line in (*verdict.warnings, f"{verdict.decision}: {'; '.join(verdict.reasons)}"):
        print(line)
    if not verdict.accepted:
        raise DarkroomError(f"{vae}: was not put into {model}: {verdict.decision}")
    print(output)


COMMANDS = {
    "inspect": inspect,
    "convert": convert,
    "diff": diff,
    "merge": merge,
    "extract": extract,
    "prune": prune,
    "swap-vae": swap_vae,
    "learn": learn,
}
