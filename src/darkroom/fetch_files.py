"""Which files of a repository of the Hugging Face hub to fetch: what darkroom reads, each weight once."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from darkroom.checkpoint.folders import INDEX, PART_WEIGHTS, SHARD, SHARD_INDEX, SUFFIXES, layout_of
from darkroom.errors import NAMES_SHOWN, InputError

# The folders of diffusers' layout that are read; safety checkers and depth estimators are not.
PART_FOLDERS = (
    *("unet", "transformer", "vae", "vqvae", "scheduler", "bert"),
    *("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
    *("image_encoder", "image_embedder", "feature_extractor"),
)
TEXTS = (".json", ".txt", ".model")  # configs, tokenizers
LICENCES = ("license", "licence", "notice")


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a repository: its size in bytes, and its hash, which the hub tells of large ones."""

    name: str
    size: int
    sha256: str | None = None


def choose(
    repo: str, files: Sequence[RemoteFile], wanted: Sequence[str], *, fp16: bool
) -> tuple[RemoteFile, ...]:
    """The files that match one of the patterns `wanted`, or, without any, those that darkroom reads.

    Of a model in the layout of diffusers these are the configs, tokenizers and weights of its parts, not what
    else lies beside them: in safetensors where there are any, in full or, with `fp16`, in half precision if
    that is there. Raises InputError for a pattern that matches nothing, with the nearest names, and for a
    repository of several models, listing them.
    """
    names = [file.name for file in files]
    chosen = set(_matching(repo, names, wanted) if wanted else _read(repo, files, fp16))
    return tuple(file for file in files if file.name in chosen)


def readable(nbytes: int) -> str:
    """A size as people write it, in powers of ten as on the hub: 6.94 GB."""
    for unit, size, places in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 0)):
        if nbytes >= size:
            return f"{nbytes / size:.{places}f} {unit}"
    return f"{nbytes} B"


def _matching(repo: str, names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    chosen = []
    for pattern in wanted:
        hits = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            hint = f": did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise InputError(f"{repo}: has no file {pattern!r}{hint}")
        chosen += hits
    return chosen


def _read(repo: str, files: Sequence[RemoteFile], fp16: bool) -> list[str]:
    """What darkroom reads of a repository."""
    names = [file.name for file in files]
    top = [name for name in names if "/" not in name]
    licences = [name for name in top if name.lower().startswith(LICENCES)]
    layout = layout_of(top)
    if layout == "darkroom":
        return [name for name in names if name.endswith((".safetensors", *TEXTS))] + licences
    if layout == "diffusers":
        inside = [name for name in names if name.count("/") == 1 and name.startswith(FOLDER_PREFIXES)]
        return [INDEX, *_of_parts(inside, fp16), *licences]
    if layout == "part":
        return [*_of_parts(top, fp16), *licences]
    return [*_one_model(repo, files), *licences]


FOLDER_PREFIXES = tuple(f"{folder}/" for folder in PART_FOLDERS)


def _of_parts(names: Iterable[str], fp16: bool) -> list[str]:
    """Configs, tokenizers, and one copy of the weights of each folder."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(name.rpartition("/")[0], []).append(name)
    chosen = []
    for inside in folders.values():
        weights = _copies(inside)
        texts = [n for n in inside if n.endswith(TEXTS) and not any(n in copy for copy in weights.values())]
        chosen += [*texts, *_best(weights, fp16)]
    return chosen


def _copies(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """The weights of one folder by format and variant, shards and their index together."""
    copies: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = PART_WEIGHTS.fullmatch(name.rpartition("/")[2])
        if match:
            variant = match["before"] or match["after"] or match["index"] or ""
            copies.setdefault((match["format"], variant), []).append(name)
    return copies


def _best(copies: dict[tuple[str, str], list[str]], fp16: bool) -> list[str]:
    """One copy of the weights: safetensors before pickles, then the precision asked for, then the fullest."""
    order = ("fp16", "", "bf16") if fp16 else ("", "bf16", "fp16")

    def rank(copy: tuple[str, str]) -> tuple[bool, int, str]:
        format_, variant = copy
        return (format_ != "safetensors", order.index(variant) if variant in order else len(order), variant)

    return copies[min(copies, key=rank)] if copies else []


def _one_model(repo: str, files: Sequence[RemoteFile]) -> list[str]:
    """The only model of a repository of single files, in all its shards."""
    weights = [file for file in files if file.name.lower().endswith(SUFFIXES)]
    whole = [file for file in weights if not SHARD.search(file.name)]
    indices = [file.name for file in files if file.name.endswith(SHARD_INDEX)]
    if len(whole) + len(indices) == 1:
        return [*indices, *(file.name for file in (weights if indices else whole))]
    if not weights:
        raise InputError(f"{repo}: holds no weights that darkroom reads ({', '.join(SUFFIXES)})")
    shown = sorted(weights, key=lambda file: file.name)
    lines = "".join(f"\n  {repo}/{file.name}  {readable(file.size)}" for file in shown[:NAMES_SHOWN])
    more = f"\n  and {len(shown) - NAMES_SHOWN} more" if len(shown) > NAMES_SHOWN else ""
    raise InputError(f"{repo}: holds several files of weights, say which:{lines}{more}")
