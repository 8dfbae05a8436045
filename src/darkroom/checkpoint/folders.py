"""What lies in folders of models, told by names alone: no file is opened. No torch here.

Every program's tree is read by one rule: the nearest folder above a file whose name is known says what the
file is for. ComfyUI's, A1111's, Forge's and SD.Next's folders differ in these names only.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from darkroom.checkpoint.folder_files import SHARD_INDEX
from darkroom.errors import InputError

Kind = Literal[
    "model",
    "network",
    "autoencoder",
    "text_encoder",
    "lora",
    "controlnet",
    "embedding",
    "upscaler",
    "other",
]
Layout = Literal["file", "diffusers", "darkroom", "part"]

# What the folders of ComfyUI, A1111, Forge and SD.Next are for, by their names in lower case.
PURPOSES: dict[Kind, tuple[str, ...]] = {
    "model": ("checkpoints", "stable-diffusion", "diffusers", "ldsr"),
    "network": ("diffusion_models", "unet"),
    "autoencoder": ("vae", "vae_approx", "vae-approx"),
    "text_encoder": ("text_encoders", "text_encoder", "text-encoder", "clip"),
    "lora": ("loras", "lora", "lycoris"),
    "controlnet": ("controlnet", "control"),
    "embedding": ("embeddings",),
    "upscaler": ("upscale_models", "esrgan", "realesrgan", "bsrgan", "swinir", "scunet", "dat"),
    "other": (
        "clip_vision",
        "style_models",
        "hypernetworks",
        "gligen",
        "photomaker",
        "t2i_adapter",
        "codeformer",
        "gfpgan",
        "blip",
        "deepbooru",
        "insightface",
    ),
}
FOLDERS: dict[str, Kind] = {name: kind for kind, names in PURPOSES.items() for name in names}

SAFETENSORS, PICKLES = (".safetensors", ".sft"), (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (*SAFETENSORS, ".gguf", *PICKLES)
SHARD = re.compile(r"-\d+-of-\d+\.")
INDEX, CONFIG = "model_index.json", "config.json"
# Weights as diffusers and transformers name them in the folder of one part: PART, variant, shard.
PART_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<before>\w+))?(?:-\d+-of-\d+)?(?:\.(?P<after>\w+))??"
    r"\.(?P<format>safetensors|bin)(?:\.index(?:\.(?P<index>\w+))?\.json)?"
)
HUB_REPO, HUB_OTHERS = "models--", ("datasets--", "spaces--", "kernels--")
SKIPPED = ("node_modules", "__pycache__", "site-packages", "venv")

# A folder to search: where it is, what its name begins with, what it is for, how deep it lies.
Step = tuple[Path, str, Kind | None, int]
MAX_DEPTH, MAX_ENTRIES = 8, 100_000


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file of weights, or a folder of one model or of one part.

    Its `name` is the way to it from the folder that was searched, or org/name for a download of the Hugging
    Face hub; `kind` is what the folders around it are for, None where they do not say.
    """

    name: str
    path: Path
    kind: Kind | None
    layout: Layout

    @property
    def bare(self) -> tuple[str, ...]:
        """Its name without a suffix of weights; shards also go by the name of the whole file."""
        suffix = next((s for s in (SHARD_INDEX, *SUFFIXES) if self.name.lower().endswith(s)), "")
        if self.layout != "file" or not suffix:
            return (self.name,)
        bare = self.name[: -len(suffix)]
        return (bare, f"{bare}.safetensors") if suffix == SHARD_INDEX else (bare,)


def found_in(root: Path) -> Iterator[Found]:
    """Everything in a folder and its subfolders that may be a model or belong to one, in no certain order.

    Of an installed program only its folders of models are searched, of a hub cache each repository's main
    revision, or the newest where that is not there. Links are followed, each folder is read once, folders
    more than 8 deep, hidden or unreadable are left out. Raises InputError for more than 100,000 entries.
    """
    waiting: list[Step] = [
        (folder, name, _kind(folder.name, None), 0) for name, folder in starts(root).items()
    ]
    seen: set[tuple[int, int]] = set()
    entries = 0
    while waiting:
        folder, name, kind, depth = waiting.pop()
        if not _first_time(folder, seen):
            continue
        files, folders = _listing(folder)
        entries += len(files) + len(folders)
        if entries > MAX_ENTRIES:
            raise InputError(f"{root}: has more than {MAX_ENTRIES:,} files: give the folder of models in it")
        layout = layout_of(files)
        yield from _of_folder(Found(name=name, path=folder, kind=kind, layout=layout or "file"), files)
        if layout in ("diffusers", "darkroom") or depth == MAX_DEPTH:
            continue
        for child in folders:
            waiting += _step(folder / child, name, kind, depth + 1)


def starts(root: Path) -> dict[str, Path]:
    """Where to search: a folder itself, or the folders of models of a program that is installed there."""
    models = root / "models"
    if not any(name.lower() in FOLDERS for name in _listing(models)[1]):
        return {"": root}
    beside = root / "embeddings"  # A1111's are not among its models
    return {"": models} | ({"embeddings": beside} if beside.is_dir() else {})


def layout_of(files: Iterable[str]) -> Layout | None:
    """What a folder with these files is, if it is one model or one part of a model."""
    names = set(files)
    if INDEX in names:
        return "diffusers"
    if any(name.startswith(("denoiser.safetensors", "autoencoder.safetensors")) for name in names):
        return "darkroom"
    return "part" if CONFIG in names and any(map(PART_WEIGHTS.fullmatch, names)) else None


def folder_layout(folder: Path) -> Layout | None:
    """As `layout_of`, of a folder on the disk."""
    return layout_of(_listing(folder)[0])


def hub_cache() -> Path:
    """Where downloads of the Hugging Face hub lie: HF_HUB_CACHE, HF_HOME or their defaults."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def hub_repo(cache: Path, repo: str) -> Path:
    """The folder of a repository in a hub cache."""
    return cache / (HUB_REPO + repo.replace("/", "--"))


def snapshot(repo: Path, revision: str | None = None) -> Path | None:
    """The files of one revision of a repository in a hub cache, or None.

    `revision` is a branch, a tag, or the beginning of a commit's hash; without one, main is meant, or the
    newest where main is not there.
    """
    _, commits = _listing(repo / "snapshots")
    ref = repo / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision
    exact = [name for name in commits if commit is not None and name.startswith(commit)]
    if revision is None and not exact:
        exact = sorted(commits, key=lambda name: (repo / "snapshots" / name).stat().st_mtime)[-1:]
    return repo / "snapshots" / exact[0] if len(exact) == 1 else None


def _of_folder(here: Found, files: Iterable[str]) -> Iterator[Found]:
    """The model that a folder is, and the files in it that are not the model's parts."""
    if here.layout != "file":
        own: Kind | None = "model" if here.layout == "diffusers" else here.kind
        if here.layout == "darkroom":
            own = "model" if any(name.startswith("denoiser.") for name in files) else "autoencoder"
        yield Found(name=here.name or here.path.name, path=here.path, kind=own, layout=here.layout)
    for file in files:
        loose = here.layout == "file" or (here.layout != "darkroom" and not PART_WEIGHTS.fullmatch(file))
        if loose and file.lower().endswith((SHARD_INDEX, *SUFFIXES)) and not SHARD.search(file):
            name = f"{here.name}/{file}" if here.name else file
            yield Found(name=name, path=here.path / file, kind=here.kind, layout="file")


def _step(folder: Path, above: str, kind: Kind | None, depth: int) -> list[Step]:
    """A subfolder to search, under which name; of a repository of the hub, its snapshot."""
    name = folder.name
    if name in SKIPPED or name.startswith(HUB_OTHERS):
        return []
    if name.startswith(HUB_REPO):
        files = snapshot(folder)
        return [(files, name.removeprefix(HUB_REPO).replace("--", "/"), kind, depth)] if files else []
    return [(folder, f"{above}/{name}" if above else name, _kind(name, kind), depth)]


def _kind(folder: str, above: Kind | None) -> Kind | None:
    return FOLDERS.get(folder.lower()) or above


def _first_time(folder: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether a folder was not met before, under whatever name: links may lead in circles."""
    try:
        info = folder.stat()
    except OSError:
        return False
    known = (info.st_dev, info.st_ino) in seen
    seen.add((info.st_dev, info.st_ino))
    return not known


def _listing(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders in a folder that are not hidden; none if it cannot be read."""
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.is_file():
                    files.append(entry.name)
    except OSError:
        return [], []
    return sorted(files), sorted(folders)
