"""Which files in a model's folder hold its weights. No torch here."""

from collections.abc import Iterator
from pathlib import Path

from darkroom.checkpoint.formats.header import INDEX_SUFFIX
from darkroom.errors import InputError

INDEX, CONFIG = "model_index.json", "config.json"
# Both of diffusers and of transformers, in the order in which they are looked for.
WEIGHTS = ("diffusion_pytorch_model", "model")
PICKLED_WEIGHTS = ("diffusion_pytorch_model", "pytorch_model")
VARIANTS = ("", ".non_ema", ".bf16", ".fp16")
SHARD_INDEX = f".safetensors{INDEX_SUFFIX}"
EXTRA = "darkroom_extra.safetensors"


def weight_file(folder: Path) -> Path:
    """The file of a part's weights in diffusers' layout, or what its shards are named after.

    Safetensors come before pickles, the fullest of several precisions first. Raises InputError naming the
    folder where there is none.
    """
    for stem in WEIGHTS:
        for variant in VARIANTS:
            file = folder / f"{stem}{variant}.safetensors"
            if file.exists() or any(folder.glob(f"{stem}{variant}.safetensors.index*.json")):
                return file
    for stem in PICKLED_WEIGHTS:
        for file in (folder / f"{stem}.bin", folder / f"{stem}.bin.index.json"):
            if file.exists():
                return file
    raise InputError(
        f"{folder}: no weights here: expected {WEIGHTS[0]}.safetensors or {WEIGHTS[1]}.safetensors"
    )


def is_darkroom(folder: Path) -> bool:
    """Whether a folder is darkroom's own, by its denoiser, in one file or in shards."""
    return any(folder.glob("denoiser.safetensors*"))


def is_diffusers(folder: Path) -> bool:
    """Whether a folder, or one of its parts, says what it is as diffusers does."""
    return (folder / CONFIG).is_file() or (folder / INDEX).is_file() or any(folder.glob(f"*/{CONFIG}"))


def weight_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The weights of each part of a folder, with what stands before its names there.

    That is the part's folder in diffusers' layout, nothing in the folder of one part, and the file's name
    where each part is a file. Sharded ones come as the name that the shards are named after.
    """
    if (folder / CONFIG).is_file():
        yield "", weight_file(folder)
    elif is_diffusers(folder):
        for config in sorted(folder.glob(f"*/{CONFIG}")):
            yield f"{config.parent.name}/", weight_file(config.parent)
    else:
        for file in sorted(_files(folder)):
            yield f"{file.name}/", file


def _files(folder: Path) -> Iterator[Path]:
    sharded = {path.name.removesuffix(SHARD_INDEX) for path in folder.glob(f"*{SHARD_INDEX}")}
    for stem in sharded:
        yield folder / f"{stem}.safetensors"
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.gguf")):
        shard = any(file.name.startswith(f"{stem}-0") or file.stem == stem for stem in sharded)
        if not shard and not file.name.endswith(EXTRA):
            yield file
