"""Any file of tensors, told by its first bytes and not by its name, and shards. No torch here."""

from pathlib import Path

from darkroom.checkpoint.formats.gguf_types import MAGIC as GGUF
from darkroom.checkpoint.formats.header import Header
from darkroom.checkpoint.formats.safetensors_header import LENGTH_BYTES, parse_object, read_safetensors
from darkroom.errors import InputError, some

ZIP = b"PK\x03\x04"
PICKLE = b"\x80"  # every protocol since 2
# What people find in place of a model, by how it begins.
IMPOSTORS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file that it stands for (`git lfs pull`)",
    b"<": "a web page, saved in place of a model: download the file again",
}
MAX_INDEX_BYTES = 100_000_000


def read_header(path: Path) -> Header:
    """Read what `path` says of its tensors, and none of them: safetensors, GGUF, or a file of `torch.save`.

    `path` is a file, an index of shards (`X.safetensors.index.json`, `X.safetensors.index.fp16.json`,
    `pytorch_model.bin.index.json`), or a missing file with its index beside it. Entries keep the order of the
    file. Raises InputError naming the file, and what is wrong with it.
    """
    headers = []
    for file, expected in files_of(Path(path)).items():
        header = _read_file(file)
        if expected is not None:
            _check_shard(file, expected, set(header.entries))
        headers.append(header)
    return headers[0] if len(headers) == 1 else _joined(headers)


def is_gguf(path: Path) -> bool:
    """Whether a file, or the first of its shards, begins as GGUF's do; InputError where there is none."""
    with next(iter(files_of(Path(path)))).open("rb") as file:
        return file.read(len(GGUF)) == GGUF


def files_of(path: Path) -> dict[Path, set[str] | None]:
    """Each file of `path` in order, with the names that its index gives it (None without an index)."""
    index = _index_of(path)
    if index is None:
        return {path: None}
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"is longer than {MAX_INDEX_BYTES} bytes")
        weight_map = parse_object(index.read_bytes()).get("weight_map")
    except (OSError, ValueError) as error:
        raise InputError(f"{index}: not an index of tensors: it {_reason(error)}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: not an index of tensors: it names no file under `weight_map`")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(_checked(index, file), set()).add(name)
    return {index.parent / file: files[file] for file in sorted(files)}


def _index_of(path: Path) -> Path | None:
    """The index that `path` is, or that stands for it where there is no such file."""
    given = path.suffix == ".json" and ".index." in path.name
    if path.exists():
        return path if given else None
    beside = [] if given else [path.with_name(name) for name in _index_names(path)]
    if found := next((index for index in beside if index.exists()), None):
        return found
    nor = f", nor an index {beside[0].name} beside it" if beside else ""
    raise InputError(f"{path}: no such file{nor}")


def _index_names(path: Path) -> list[str]:
    """What the index of a missing file may be called; a precision stands in either name."""
    stem, _, kind = path.name.rpartition(".")
    plain, _, variant = stem.rpartition(".")
    names = [f"{path.name}.index.json"] + ([f"{plain}.{kind}.index.{variant}.json"] if plain else [])
    if path.parent.is_dir():
        start = f"{path.name}.index."
        names += sorted(
            p.name for p in path.parent.iterdir() if p.name.startswith(start) and p.suffix == ".json"
        )
    return names


def _checked(index: Path, file: object) -> str:
    """The name of a shard, which lies beside its index and nowhere else."""
    if not isinstance(file, str) or file in ("", "..") or Path(file).name != file or set(file) & set("\\:\0"):
        raise InputError(f"{index}: names {file!r:.200}, which is not a file beside it")
    return file


def _check_shard(file: Path, expected: set[str], found: set[str]) -> None:
    if found == expected:
        return
    lacks = f"; it lacks {some(expected - found)}" if expected - found else ""
    beside = f"; the index does not know {some(found - expected)}" if found - expected else ""
    raise InputError(f"{file}: does not hold the tensors that its index says it does{lacks}{beside}")


def _joined(headers: list[Header]) -> Header:
    whole = Header(headers[0].format, {}, {}, tuple(name for header in headers for name in header.stubs))
    for header in headers:
        whole.entries.update(header.entries)
        whole.metadata.update(header.metadata)
    return whole


def _read_file(path: Path) -> Header:
    try:
        return _read_known(path, _first_bytes(path))
    except (OSError, UnicodeEncodeError) as error:
        raise InputError(f"{path}: cannot be read: {_reason(error)}") from error


def _read_known(path: Path, first: bytes) -> Header:
    """Dispatch; safetensors comes before pickles, since the length of a header may begin as a pickle does."""
    if first.startswith(GGUF):
        from darkroom.checkpoint.formats.gguf_header import read_gguf

        return read_gguf(path)
    if first[LENGTH_BYTES:].startswith(b"{"):
        return read_safetensors(path)
    if first.startswith((ZIP, PICKLE)):
        from darkroom.checkpoint.formats.pickle_header import read_legacy_pickle, read_zip_pickle

        return read_zip_pickle(path) if first.startswith(ZIP) else read_legacy_pickle(path)
    for start, what in IMPOSTORS.items():
        if first.lstrip().startswith(start):
            raise InputError(f"{path}: {what}")
    others = "GGUF, or .ckpt, .pt, .pth or .bin of PyTorch"
    raise InputError(f"{path}: truncated, or not a safetensors file, nor another that is read ({others})")


def _first_bytes(path: Path) -> bytes:
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_file():
        raise InputError(
            f"{path}: {'a folder' if path.is_dir() else 'not a file'}, where a file of tensors should be"
        )
    with path.open("rb") as file:
        return file.read(32)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
