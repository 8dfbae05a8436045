"""Files whole or not at all: written so that a crash leaves no half one, read with errors that name them."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from darkroom.errors import DarkroomError, InputError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`: at the end synced and renamed to `path`, on an error removed.

    Raises DarkroomError naming `path` when the file system refuses (disk full, no permission).
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield draft
        _sync(draft)
        os.replace(draft, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors has a class of its own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise DarkroomError(f"{path}: could not be written: {reason}") from error
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` when everything in it is written."""
    draft = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        draft.mkdir()
        yield draft
        os.replace(draft, out)
    except OSError as error:
        raise DarkroomError(f"{out}: could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_text(path: Path) -> str:
    """A text file; raises InputError naming it if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises InputError naming the file if it cannot be read or holds something else."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def require_parent(path: Path, *, mkdir: bool) -> None:
    """Make sure that the folder of an output exists before any work; `mkdir` makes it.

    Raises InputError naming the folder if it does not exist or cannot be made.
    """
    folder = path.parent
    if mkdir:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path}: the folder {folder} cannot be made: {error.strerror}") from error
    elif not folder.is_dir():
        raise InputError(f"{path}: the folder {folder} does not exist (--mkdir makes it)")


def require_new(path: Path) -> None:
    """Raise InputError, before any work, for an output that is there already: a model may be lost with it."""
    if path.exists():
        raise InputError(f"{path}: is there already: name one that is not")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
