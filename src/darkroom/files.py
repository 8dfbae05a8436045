"""Writing files so that a crash or a full disk never leaves a half one under the final name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
