"""Where a tokenizer is: in a folder of any kind, or, for published models, somewhere on this machine."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, overload

from darkroom.errors import InputError
from darkroom.text.bert_tokenizer import WORDS, BertTokenizer
from darkroom.text.t5_tokenizer import SENTENCEPIECE, T5Tokenizer
from darkroom.text.tokenizer import EOS, MERGES, RELEASED_MERGES, VOCAB, Tokenizer
from darkroom.text.tokenizer_files import WHOLE, read_whole

AnyTokenizer = Tokenizer | T5Tokenizer | BertTokenizer
ClipKind = Literal["clip", "clip_g", "openclip_h"]
Kind = Literal["clip", "clip_g", "openclip_h", "t5", "bert"]

VARIABLE = "DARKROOM_TOKENIZERS"

# SD 2 and the second tokenizers of SDXL and SD 3 fill rows with id 0, the first token of CLIP's vocabulary.
READERS: dict[Kind, Callable[[Path], AnyTokenizer]] = {
    "clip": partial(Tokenizer.from_folder, pad=EOS),
    "clip_g": partial(Tokenizer.from_folder, pad="!"),
    "openclip_h": partial(Tokenizer.from_folder, pad="!"),
    "t5": T5Tokenizer.from_folder,
    "bert": BertTokenizer.from_folder,
}
# In the order in which models of the kind have them; all kinds of CLIP share a vocabulary.
SUBFOLDERS: dict[Kind, tuple[str, ...]] = {
    "clip": ("tokenizer", "tokenizer_2", "clip", "tokenizers/clip"),
    "clip_g": ("tokenizer_2", "tokenizer", "clip_g", "clip", "tokenizers/clip_g", "tokenizers/clip"),
    "openclip_h": (
        "tokenizer",
        "tokenizer_2",
        "openclip_h",
        "clip",
        "tokenizers/openclip_h",
        "tokenizers/clip",
    ),
    "t5": ("tokenizer_3", "tokenizer_2", "tokenizer", "t5", "tokenizers/t5"),
    "bert": ("tokenizer", "bert", "tokenizers/bert"),
}
FILES: dict[Kind, tuple[str, ...]] = {
    **dict.fromkeys(("clip", "clip_g", "openclip_h"), (VOCAB, RELEASED_MERGES, WHOLE)),
    "t5": (WHOLE, SENTENCEPIECE),
    "bert": (WHOLE, WORDS),
}
CLIP_REPOS = (
    "openai/clip-vit-large-patch14",
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
)
MODEL_REPOS = (
    "stabilityai/stable-diffusion-*",
    "stabilityai/sd*-turbo",
    "stable-diffusion-v1-5/*",
    "runwayml/stable-diffusion-*",
    "CompVis/stable-diffusion-*",
    "black-forest-labs/FLUX.1-*",
)
REPOS: dict[Kind, tuple[str, ...]] = {
    **dict.fromkeys(("clip", "clip_g", "openclip_h"), (*CLIP_REPOS, *MODEL_REPOS)),
    "t5": ("google/t5-v1_1-*", *MODEL_REPOS),
    "bert": ("google-bert/bert-base-uncased", "bert-base-uncased"),
}
ADVICE: dict[Kind, str] = {
    **dict.fromkeys(
        ("clip", "clip_g", "openclip_h"),
        f"a folder with {VOCAB} and {MERGES} (openai/clip-vit-large-patch14 on the hub has them)",
    ),
    "t5": f"a folder with {WHOLE} or {SENTENCEPIECE} (google/t5-v1_1-xxl on the hub has the latter)",
    "bert": f"a folder with {WHOLE} or {WORDS} (google-bert/bert-base-uncased on the hub has both)",
}


def read_tokenizer(folder: Path) -> AnyTokenizer:
    """Read a folder's tokenizer, CLIP's, T5's or BERT's, whichever its files are of.

    Raises InputError naming the folder if it holds none, or the file that cannot be used.
    """
    folder = Path(folder)
    if (folder / VOCAB).is_file():
        return Tokenizer.from_folder(folder)
    if (folder / WHOLE).is_file():
        kind = read_whole(folder / WHOLE)["model"]["type"]
        readers = {
            "BPE": Tokenizer.from_folder,
            "Unigram": T5Tokenizer.from_folder,
            "WordPiece": BertTokenizer.from_folder,
        }
        if kind not in readers:
            raise InputError(f"{folder / WHOLE}: a tokenizer of kind {kind!r}, not {', '.join(readers)}")
        return readers[kind](folder)
    if (folder / SENTENCEPIECE).is_file():
        return T5Tokenizer.from_folder(folder)
    if (folder / WORDS).is_file():
        return BertTokenizer.from_folder(folder)
    if (folder / RELEASED_MERGES).is_file():
        return Tokenizer.from_folder(folder)
    wanted = f"{VOCAB} and {MERGES} (CLIP), {WHOLE}, {SENTENCEPIECE} (T5) or {WORDS} (BERT)"
    raise InputError(f"{folder}: no tokenizer here: expected {wanted}")


@overload
def find_tokenizer(kind: ClipKind, places: Sequence[Path]) -> Tokenizer: ...
@overload
def find_tokenizer(kind: Literal["t5"], places: Sequence[Path]) -> T5Tokenizer: ...
@overload
def find_tokenizer(kind: Literal["bert"], places: Sequence[Path]) -> BertTokenizer: ...
@overload
def find_tokenizer(kind: Kind, places: Sequence[Path]) -> AnyTokenizer: ...


def find_tokenizer(kind: Kind, places: Sequence[Path]) -> AnyTokenizer:
    """Find the tokenizer of a published text encoder, in `places` first, and never on the network.

    Looked at are the places (folders, their usual subfolders, or files), the folder that the environment
    variable DARKROOM_TOKENIZERS names, and what huggingface_hub has downloaded before. Any vocabulary of CLIP
    serves its three kinds, which differ in the padding: "clip" pads with the end mark, "clip_g" (SDXL, SD 3)
    and "openclip_h" (SD 2) with "!". Raises InputError that lists where it looked and how to get one.
    """
    variable = os.environ.get(VARIABLE)
    given = [*map(Path, places), *([Path(variable)] if variable else [])]
    cache, snapshots = _snapshots(REPOS[kind])
    failures: list[str] = []
    for folder in (place for start in [*given, *snapshots] for place in _inside(start, kind)):
        try:
            return READERS[kind](folder)
        except InputError as error:
            failures.append(str(error))
    looked = [f"{place} and its subfolders" if place.is_dir() else f"{place} (not there)" for place in given]
    looked += [] if variable else [f"${VARIABLE} (not set)"]
    looked += [f"{cache} (for {', '.join(REPOS[kind])})", *failures]
    where = "".join(f"\n  {line}" for line in looked)
    raise InputError(
        f"no tokenizer of kind {kind!r} on this machine. Give {ADVICE[kind]} as `tokenizers=`, "
        f"or in the environment variable {VARIABLE}. Looked in:{where}"
    )


def _inside(place: Path, kind: Kind) -> Iterator[Path]:
    """The place itself and its subfolders, those that hold a file of a tokenizer that may be of the kind."""
    if place.is_file():
        yield place
    for folder in (place, *(place / name for name in SUBFOLDERS[kind])):
        if any((folder / name).is_file() for name in FILES[kind]):
            yield folder


def _snapshots(repos: Sequence[str]) -> tuple[Path, list[Path]]:
    """The hub's cache and the folders in it of the repos: of each the main revision, then the others."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    folders = []
    for pattern in repos:
        for repo in sorted(cache.glob(f"models--{pattern.replace('/', '--')}")):
            main = repo / "refs" / "main"
            name = main.read_text().strip() if main.is_file() else ""
            revisions = sorted(
                (repo / "snapshots").glob("*"), key=lambda path: (path.name != name, path.name)
            )
            folders += revisions
    return cache, folders
