"""What the Hugging Face hub refuses, in words that a user can act on."""

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import cast

from darkroom.errors import DarkroomError, InputError

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}
ANONYMOUS, REFUSED = 401, 403


@contextmanager
def explained(
    repo: str, revision: str | None, *, licence: str | None = None, known: Iterable[str] = ()
) -> Iterator[None]:
    """Turn the errors of huggingface_hub within into InputError and DarkroomError.

    `licence` is that of the repository where it is known, `known` are repositories whose names may have been
    meant.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Its bases are the errors of the library that it goes online with, another one in other versions; what
    # fetches large files raises RuntimeError.
    failures = cast(tuple[type[Exception], ...], (OSError, RuntimeError, *HfHubHTTPError.__bases__))
    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{repo!r}: not a name of the Hugging Face hub: expected org/name") from error
    except failures as error:
        # What the hub answered may be wrapped in the error for a file that is not on the disk either.
        answer = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        raise _meaning(answer, repo, revision, licence, known) from error


def _meaning(
    error: Exception, repo: str, revision: str | None, licence: str | None, known: Iterable[str]
) -> DarkroomError:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError):  # older versions count it among the hub's answers
        return _failed(repo, error)
    if isinstance(error, GatedRepoError):
        return _gated(repo, licence)
    if isinstance(error, RepositoryNotFoundError):
        hint = _hint(repo, known)
        return InputError(f"{repo}: no such repository on the Hugging Face hub, or a private one{hint}")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{repo}: has no revision {revision!r}{_hint(str(revision), _revisions(repo))}")
    if isinstance(error, HfHubHTTPError) and isinstance(error, EntryNotFoundError):
        return InputError(f"{repo}: a file is not there any more at {revision}: {_first_line(error)}")
    if isinstance(error, HfHubHTTPError):
        return _refused(error.response.status_code, repo, licence, error)
    if isinstance(error, OSError) and error.errno in DISK:
        where = f"{error.filename}: " if error.filename else ""
        return DarkroomError(f"{repo}: {where}could not be written: {error.strerror}")
    return _failed(repo, error)


def _gated(repo: str, licence: str | None) -> InputError:
    from huggingface_hub import constants

    terms = f"its licence ({licence})" if licence else "its licence"
    return InputError(
        f"{repo}: is gated: its files go to accounts that have accepted {terms}.\n"
        f"  1. Log in on {constants.ENDPOINT}/{repo}, read the licence and accept it there;\n"
        "     some owners grant access by hand, which takes a while.\n"
        "  2. Log in here with `hf auth login`, or set HF_TOKEN, with a token of that account that may read\n"
        "     gated repositories.\n"
        "  3. Run the same command again."
    )


def _refused(status: int, repo: str, licence: str | None, error: Exception) -> DarkroomError:
    if status == REFUSED and licence:
        return _gated(repo, licence)
    if status in (ANONYMOUS, REFUSED):
        return InputError(
            f"{repo}: the Hugging Face hub refuses this account ({status}): log in by `hf auth login` or set "
            "HF_TOKEN, with a token that is valid and may read this repository"
        )
    return DarkroomError(
        f"{repo}: the Hugging Face hub answers {status}, try again later: {_first_line(error)}"
    )


def _failed(repo: str, error: Exception) -> DarkroomError:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return DarkroomError(
            f"{repo}: not fetched, since HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids to go online"
        )
    cause = error.__cause__ or error
    what = "failed" if isinstance(error, RuntimeError) else "failed, is there a network?"
    return DarkroomError(
        f"{repo}: the download {what} ({type(cause).__name__}: {_first_line(cause)}) What has arrived is "
        "kept: the same command goes on from there"
    )


def _revisions(repo: str) -> list[str]:
    """The branches and tags of a repository, none if the hub does not tell."""
    import huggingface_hub

    with suppress(Exception):
        refs = huggingface_hub.list_repo_refs(repo)
        return [ref.name for ref in (*refs.branches, *refs.tags)]
    return []


def _hint(name: str, known: Iterable[str]) -> str:
    lower = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.casefold(), list(lower), n=1, cutoff=0.5)
    return f": did you mean {lower[near[0]]!r}?" if near else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
