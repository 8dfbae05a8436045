"""`darkroom fetch`: what is chosen, written down and refused; and that nothing else goes online."""

import ast
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.hf_api import BlobLfsInfo, GitRefInfo, GitRefs, ModelInfo, RepoSibling

import darkroom
from darkroom.checkpoint.find import find_model, list_models
from darkroom.checkpoint.inspect import inspect
from darkroom.errors import DarkroomError, InputError
from darkroom.families import FAMILIES
from darkroom.family_parts import TINY_AUTOENCODERS
from darkroom.fetch import RECORD, SOURCES, Plan, fetch, parse, source_rows
from darkroom.fetch_files import RemoteFile, choose, readable
from darkroom.presets import WEIGHTS

COMMIT, OTHER = "a" * 40, "b" * 40
DOCS = Path(__file__).parents[1] / "docs" / "files.md"

XL = (
    "LICENSE.md",
    "README.md",
    "model_index.json",
    "sd_xl_base_1.0.safetensors",
    "scheduler/scheduler_config.json",
    "safety_checker/model.safetensors",
    "text_encoder/config.json",
    "text_encoder/flax_model.msgpack",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.onnx",
    "text_encoder/model.safetensors",
    "text_encoder/openvino_model.bin",
    "text_encoder/openvino_model.xml",
    "text_encoder/pytorch_model.bin",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_3/model-00002-of-00002.safetensors",
    "text_encoder_3/model.fp16-00001-of-00001.safetensors",
    "text_encoder_3/model.safetensors.index.fp16.json",
    "text_encoder_3/model.safetensors.index.json",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "tokenizer_3/spiece.model",
    "unet/config.json",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.fp16.safetensors",
)
XL_ALWAYS = (
    *("LICENSE.md", "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json"),
    *("tokenizer/merges.txt", "tokenizer/vocab.json", "tokenizer_3/spiece.model", "unet/config.json"),
    # No half precision of the first, no safetensors but in half precision of the second.
    *("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"),
    "vae/config.json",
)
XL_FULL = (
    "text_encoder/model.safetensors",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_3/model-00002-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.json",
)
XL_FP16 = (
    "text_encoder/model.fp16.safetensors",
    "text_encoder_3/model.fp16-00001-of-00001.safetensors",
    "text_encoder_3/model.safetensors.index.fp16.json",
)


def chosen(*names: str, wanted: tuple[str, ...] = (), fp16: bool = False) -> set[str]:
    files = [RemoteFile(name=name, size=10) for name in names]
    return {file.name for file in choose("org/name", files, wanted, fp16=fp16)}


@pytest.mark.parametrize("fp16, weights", [(False, XL_FULL), (True, XL_FP16)])
def test_of_a_model_what_is_read_is_chosen_once(fp16: bool, weights: tuple[str, ...]) -> None:
    assert chosen(*XL, fp16=fp16) == {*XL_ALWAYS, *weights}


def test_pickles_are_chosen_where_there_is_nothing_else() -> None:
    names = ("model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.bin")
    assert chosen(*names) == set(names)


def test_of_a_repository_of_one_part_its_folder_is_chosen() -> None:
    part = ("config.json", "diffusion_pytorch_model.safetensors")
    beside = ("README.md", "diffusion_pytorch_model.bin", "vae-ft-mse.safetensors", "vae-ft-mse.ckpt")
    assert chosen(*part, *beside) == set(part)


def test_of_darkrooms_own_folder_everything_is_chosen() -> None:
    names = ("autoencoder.safetensors", "denoiser.safetensors", "tokenizer/vocab.json")
    assert chosen(*names, "README.md", "sample.png") == set(names)


def test_a_single_file_is_chosen_if_it_is_the_only_one() -> None:
    assert chosen("README.md", "sub/dream.safetensors") == {"sub/dream.safetensors"}
    shards = ("x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors", "x.safetensors.index.json")
    assert chosen(*shards, "notes.json") == set(shards)
    with pytest.raises(InputError, match="holds no weights that darkroom reads"):
        chosen("README.md", "model.onnx")


def test_of_several_files_one_must_be_named() -> None:
    with pytest.raises(InputError) as caught:
        chosen(*(f"m-Q{n}.gguf" for n in range(12)))
    lines = str(caught.value).splitlines()
    assert lines[0] == "org/name: holds several files of weights, say which:"
    assert lines[1] == "  org/name/m-Q0.gguf  10 B"
    assert lines[11:] == ["  and 2 more"]


def test_patterns_choose_what_they_match() -> None:
    assert chosen(*XL, wanted=("vae/*.json", "README.md")) == {"vae/config.json", "README.md"}
    with pytest.raises(InputError, match=r"has no file 'vae/conf.json': did you mean 'vae/config.json'"):
        chosen(*XL, wanted=("vae/conf.json",))


def test_sizes_are_readable() -> None:
    sizes = [readable(n) for n in (0, 999, 1000, 1_500_000, 999_940_000, 6_938_040_682)]
    assert sizes == ["0 B", "999 B", "1 kB", "1.5 MB", "999.9 MB", "6.94 GB"]


@pytest.mark.parametrize(
    "name, revision, files, expected",
    [
        ("sdxl", None, (), ("stabilityai/stable-diffusion-xl-base-1.0", None, (), None)),
        ("sdxl@v1", None, (), ("stabilityai/stable-diffusion-xl-base-1.0", "v1", (), None)),
        ("org/name", "main", ("vae/*",), ("org/name", "main", ("vae/*",), None)),
        ("org/name@refs/pr/1", None, (), ("org/name", "refs/pr/1", (), None)),
        ("org/name/a/b.pt", None, (), ("org/name", None, ("a/b.pt",), "a/b.pt")),
        ("org/name/b.pt@v1", "v1", (), ("org/name", "v1", ("b.pt",), "b.pt")),
    ],
)
def test_names_are_read(name: str, revision: str | None, files: tuple[str, ...], expected: tuple) -> None:
    request = parse(name, revision=revision, files=files)
    assert (request.repo, request.revision, request.wanted, request.one) == expected


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("sdxxl", {}, r"unknown model to fetch 'sdxxl': did you mean 'sdxl'\? Known: .*; or give org/name"),
        ("org/", {}, r"unknown model to fetch 'org/'"),
        ("https://hub/org/name", {}, "give org/name or org/name/file, not an address"),
        ("org/name@v1", {"revision": "v2"}, "names a revision, and v2 is given too"),
        ("org/name/x.pt", {"files": ("y.pt",)}, r"names a file, and y\.pt are given too"),
        ("org/name/x.pt", {"fp16": True}, "leave it out where files are named"),
    ],
)
def test_names_that_are_none_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(name, **options)


def test_sources_are_families_or_parts_that_are_known() -> None:
    others = {"flux-canny", "flux-depth", "flux-redux", *TINY_AUTOENCODERS}  # the first two are flux-control
    assert SOURCES.keys() - FAMILIES.keys() <= others
    assert len({source.repo for source in SOURCES.values()}) == len(SOURCES)


def test_the_page_lists_the_sources_and_their_licences() -> None:
    text = DOCS.read_text(encoding="utf-8")
    rows = [
        tuple(cell.strip() for cell in row) for row in re.findall(r"^\|(.+)\|(.+)\|(.+)\|(.+)\|$", text, re.M)
    ]
    listed = {row[0].strip("`"): row[1:] for row in rows}
    for name, repo, gated in list(source_rows())[1:]:
        assert listed[name][:2] == (repo, gated)
        if name in FAMILIES:
            assert listed[name][2] == FAMILIES[name].licence.removesuffix(": no commercial use")


class Hub:
    """A hub with one repository, in place of the two functions of huggingface_hub that are called."""

    def __init__(self, files: dict[str, bytes], gated: str | bool = False) -> None:
        self.files, self.gated, self.sha = files, gated, COMMIT
        self.repo, self.calls, self.refusal = "org/name", [], None
        self.card: dict[str, Any] | None = {"license": "mit"}

    def model_info(self, repo: str, *, revision: str | None, files_metadata: bool) -> ModelInfo:
        assert files_metadata
        self.calls.append(("info", repo, revision))
        if self.refusal:
            raise self.refusal
        siblings = [
            {
                "rfilename": name,
                "size": len(data),
                "lfs": {"size": len(data), "sha256": "0" * 64, "pointerSize": 1} if len(data) > 9 else None,
            }
            for name, data in self.files.items()
        ]
        info = ModelInfo(
            id=repo, sha=self.sha, siblings=siblings, gated=self.gated, cardData=self.card, tags=[]
        )
        assert all(isinstance(sibling, RepoSibling) for sibling in info.siblings or ())
        assert all(isinstance(sibling.lfs, BlobLfsInfo | None) for sibling in info.siblings or ())
        return info

    def snapshot_download(
        self, repo: str, *, revision: str, local_dir: Path | None, allow_patterns: list[str]
    ) -> str:
        self.calls.append(("download", repo, revision))
        if self.refusal:
            raise self.refusal
        cached = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "snapshots", revision)
        names = huggingface_hub.utils.filter_repo_objects(self.files, allow_patterns=allow_patterns)
        for name in names:
            path = (cached if local_dir is None else Path(local_dir)) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.files[name])
        return ""


MODEL = {
    "config.json": b"{}",
    "model.safetensors": b"w" * 20,
    "model.fp16.safetensors": b"h" * 12,
    "x[1].pt": b"x",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(dict(MODEL))
    monkeypatch.setattr(huggingface_hub, "model_info", hub.model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_model_goes_into_the_cache_at_its_commit(hub: Hub, cache: Path) -> None:
    folder = fetch("org/name", revision="v1")
    assert folder == cache / "models--org--name" / "snapshots" / COMMIT
    assert files_in(folder) == {"config.json", "model.safetensors", RECORD}
    assert hub.calls == [("info", "org/name", "v1"), ("download", "org/name", COMMIT)]
    assert find_model("org/name") == folder


def test_what_was_fetched_is_written_down(hub: Hub, tmp_path: Path) -> None:
    hub.gated, hub.card = "auto", {"license": "other", "license_name": "flux-nc"}
    fetch("org/name", fp16=True, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / RECORD).read_text()) == {
        "fetched": [
            {
                "repo": "org/name",
                "revision": COMMIT,
                "wanted": [],
                "fp16": True,
                "licence": "flux-nc",
                "gated": True,
                "files": [
                    {"name": "config.json", "size": 2, "sha256": None},
                    {"name": "model.fp16.safetensors", "size": 12, "sha256": "0" * 64},
                ],
            }
        ]
    }


@pytest.mark.parametrize(
    "card, licence", [({"license": "mit"}, "mit"), ({"license": ["mit", "bsd"]}, "mit, bsd"), (None, None)]
)
def test_the_licence_is_that_of_the_card(hub: Hub, card: dict | None, licence: str | None) -> None:
    hub.card = card
    plans: list[Plan] = []
    fetch("org/name", on_plan=lambda plan, _: plans.append(plan))
    assert plans[0].licence == licence


def test_the_plan_is_told_before_the_download(hub: Hub, tmp_path: Path) -> None:
    told: list[tuple[Plan, int, int]] = []
    tell: Callable[[Plan, int], None] = lambda plan, to_come: told.append((plan, to_come, len(hub.calls)))  # noqa: E731
    fetch("org/name", out=tmp_path, on_plan=tell)
    plan, to_come, calls = told[0]
    assert (to_come, calls, plan.nbytes) == (22, 1, 22)
    assert plan.lines() == [
        f"org/name at {COMMIT}",
        "  config.json  2 B",
        "  model.safetensors  20 B",
        "2 files, 22 B; licence: mit",
    ]
    fetch("org/name", out=tmp_path, on_plan=tell)
    assert told[1][:2] == (plan, 0)


def test_a_commit_that_is_there_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    for out in (None, tmp_path / "out"):
        folder = fetch("org/name", revision=COMMIT, out=out)
        hub.calls.clear()
        hub.refusal = OSError("no network")
        assert fetch(f"org/name@{COMMIT}", out=out) == folder
        assert hub.calls == []
        hub.refusal = None
        (folder / "model.safetensors").write_bytes(b"half")
        fetch("org/name", revision=COMMIT, out=out)
        assert [call[0] for call in hub.calls] == ["info", "download"]
        assert (folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"]


def test_another_choice_of_files_is_another_download(hub: Hub, tmp_path: Path) -> None:
    fetch("org/name", revision=COMMIT, out=tmp_path)
    assert fetch("org/name/x[1].pt", revision=COMMIT, out=tmp_path) == tmp_path / "x[1].pt"
    fetch("org/name", revision=COMMIT, fp16=True, out=tmp_path)
    fetch("org/name", revision=COMMIT, files=["*.json"], out=tmp_path)
    assert files_in(tmp_path) == {*MODEL, RECORD}
    hub.calls.clear()
    fetch("org/name/x[1].pt", revision=COMMIT, out=tmp_path)
    fetch("org/name", revision=COMMIT, out=tmp_path)
    assert hub.calls == []


def test_a_branch_that_stays_where_it_was_is_asked_for_and_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    fetch("org/name", out=tmp_path)
    fetch("org/name", out=tmp_path)
    assert [call[0] for call in hub.calls] == ["info", "download", "info"]
    hub.sha, hub.files["config.json"] = OTHER, b"[]"  # of the same size
    fetch("org/name", out=tmp_path)
    assert (tmp_path / "config.json").read_bytes() == b"[]"
    record = json.loads((tmp_path / RECORD).read_text())["fetched"]
    assert [plan["revision"] for plan in record] == [OTHER]


def test_files_from_elsewhere_are_not_overwritten(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(InputError, match=r"config\.json: is there already, from elsewhere"):
        fetch("org/name", out=tmp_path)
    (tmp_path / "config.json").unlink()
    fetch("org/name", out=tmp_path)
    with pytest.raises(InputError, match=r"config\.json: is there already, from org/name"):
        fetch("org/other", out=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: is a file: give a folder"):
        fetch("org/name", out=tmp_path / "file")


def test_a_full_disk_is_told_before_the_download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=21))
    with pytest.raises(DarkroomError, match=r"new: needs 22 B, and only 21 B are free there"):
        fetch("org/name", out=tmp_path / "deep" / "new")
    assert [call[0] for call in hub.calls] == ["info"]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_bytes(MODEL["config.json"])
    fetch("org/name", out=tmp_path / "new")  # which has 2 bytes of it


def answered(kind: type[Exception], status: int, message: str = "no") -> Exception:
    """An error of the hub as huggingface_hub raises it."""
    return kind(message, response=SimpleNamespace(status_code=status, headers={}, request=None))


def test_a_gated_repository_is_explained(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated, hub.card = "auto", {"license": "other", "license_name": "flux-nc"}

    def refuse(*_: object, **__: object) -> None:
        raise answered(errors.GatedRepoError, 401)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError) as caught:
        fetch("org/name")
    message = str(caught.value)
    assert message.startswith(
        "org/name: is gated: its files go to accounts that have accepted its licence (flux-nc)"
    )
    for step in (f"{constants.ENDPOINT}/org/name", "`hf auth login`", "HF_TOKEN", "same command again"):
        assert step in message


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (answered(errors.GatedRepoError, 403), InputError, "is gated: .* accepted its licence"),
        (answered(errors.HfHubHTTPError, 401), InputError, r"refuses this account \(401\).*hf auth login"),
        (answered(errors.HfHubHTTPError, 403), InputError, r"refuses this account \(403\)"),
        (
            answered(errors.HfHubHTTPError, 503, "busy\nid"),
            DarkroomError,
            r"answers 503, try again later: busy$",
        ),
        (
            answered(errors.RepositoryNotFoundError, 404),
            InputError,
            "no such repository .*, or a private one",
        ),
        (errors.OfflineModeIsEnabled("off"), DarkroomError, r"network\? \(OfflineModeIsEnabled: off\)"),
        (ConnectionError("refused"), DarkroomError, r"is there a network\? \(ConnectionError: refused\)"),
        (errors.LocalEntryNotFoundError("not here"), DarkroomError, "is there a network"),
        (errors.HfHubHTTPError.__bases__[0]("no route"), DarkroomError, "is there a network"),
        (RuntimeError("data processing"), DarkroomError, r"failed \(RuntimeError: data processing\)"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/d/x"),
            DarkroomError,
            "/d/x: could not be written: No",
        ),
        (errors.HFValidationError("bad"), InputError, "not a name of the Hugging Face hub"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(
    hub: Hub, error: Exception, kind: type[DarkroomError], message: str
) -> None:
    hub.refusal = error
    with pytest.raises(kind, match=message) as caught:
        fetch("org/name")
    assert type(caught.value) is kind


def test_an_answer_is_found_inside_the_error_for_a_missing_file(hub: Hub) -> None:
    hub.refusal = errors.LocalEntryNotFoundError("not here")
    hub.refusal.__cause__ = answered(errors.HfHubHTTPError, 503)
    with pytest.raises(DarkroomError, match="answers 503"):
        fetch("org/name")


def test_offline_mode_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.refusal = errors.OfflineModeIsEnabled("off")
    with pytest.raises(DarkroomError, match="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids to go online"):
        fetch("org/name")


def test_the_nearest_repository_and_revision_are_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refusal = answered(errors.RepositoryNotFoundError, 404)
    with pytest.raises(InputError, match=r"did you mean 'black-forest-labs/FLUX\.1-dev'\?"):
        fetch("black-forest-lab/flux.1-dev")
    refs = GitRefs(branches=[GitRefInfo(name="fp16", ref="", target_commit="")], converts=[], tags=[])
    monkeypatch.setattr(huggingface_hub, "list_repo_refs", lambda repo: refs)
    hub.refusal = answered(errors.RevisionNotFoundError, 404)
    with pytest.raises(InputError, match=r"org/name: has no revision 'fp61': did you mean 'fp16'\?"):
        fetch("org/name@fp61")


def test_a_download_that_arrives_in_part_is_an_error(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: "")
    with pytest.raises(DarkroomError, match=r"config\.json has not arrived whole"):
        fetch("org/name")
    assert not cache.exists()


class Server(BaseHTTPRequestHandler):
    """What of the hub's protocol huggingface_hub needs to list and download a repository."""

    seen: ClassVar[list[str]] = []
    files: ClassVar = {"config.json": b'{"a": 1}', "model.safetensors": b"w" * 2000, "README.md": b"read"}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.seen.append(self.path)
        path = self.path.partition("?")[0]
        if "/gated/resolve/" in path:
            self.reply(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
        elif "/resolve/" in path:
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            self.reply(200, self.files[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"'})
        elif "/tree/" in path:
            self.reply_json(
                [{"type": "file", "path": n, "size": len(d), "oid": n} for n, d in self.files.items()]
            )
        elif path.startswith("/api/models/org/missing"):
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/org/"):
            siblings = [{"rfilename": n, "size": len(d), "blobId": n} for n, d in self.files.items()]
            self.reply_json({"id": "org/name", "sha": COMMIT, "siblings": siblings, "gated": "gated" in path})
        else:
            self.reply(404, b"", {})

    def reply_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    """The address of a small hub on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Server.seen.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


SCRIPT = """
import sys
from huggingface_hub import scan_cache_dir
from darkroom.errors import DarkroomError
from darkroom.fetch import fetch
for name in sys.argv[1:]:
    try:
        print(fetch(name, on_plan=lambda plan, to_come: print(to_come)))
    except DarkroomError as error:
        print(str(error).splitlines()[0])
print(all("org--gated" in str(warning) for warning in scan_cache_dir().warnings), "torch" in sys.modules)
"""


def test_huggingface_hub_itself_downloads_it(endpoint: str, tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path),
        "NO_PROXY": "*",
    }
    path = os.environ.get("PYTHONPATH")
    environment |= {"PYTHONPATH": path} if path else {}
    names = ["org/name", f"org/name@{COMMIT}", "org/gated", "org/missing"]
    command = [sys.executable, "-c", SCRIPT, *names]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=60)
    folder = tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT
    assert shown.stdout.splitlines() == [
        *("2008", str(folder), "0", str(folder)),
        *("2008", "org/gated: is gated: its files go to accounts that have accepted its licence."),
        "org/missing: no such repository on the Hugging Face hub, or a private one",
        "True False",  # the cache stays one that huggingface_hub can read, and no torch was needed
    ]
    assert files_in(folder) == {"config.json", "model.safetensors", RECORD}
    assert (folder / "model.safetensors").read_bytes() == Server.files["model.safetensors"]
    assert len([path for path in Server.seen if path.startswith("/api/models/org/name?")]) == 1


def test_nothing_else_goes_online(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("went online")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse, raising=False)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    with pytest.raises(AssertionError, match="went online"):
        socket.create_connection(("127.0.0.1", 1))
    assert darkroom.load("darkroom-mini", device="cpu")("red apple", seed=1, steps=2).images
    assert inspect(WEIGHTS / "darkroom-mini" / "autoencoder.safetensors")
    list_models()
    with pytest.raises(InputError, match="unknown model 'org/name'"):
        find_model("org/name")


ONLINE = {
    "huggingface_hub",
    "requests",
    "httpx",
    "urllib",
    "urllib3",
    "http",
    "socket",
    "ssl",
    "ftplib",
    "aiohttp",
}


def test_only_fetch_imports_what_goes_online() -> None:
    """Elsewhere huggingface_hub is asked for its constants, such as where its cache is."""
    found = {}
    for path in sorted(WEIGHTS.parent.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        names |= {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
        online = {name for name in names if name.partition(".")[0] in ONLINE}
        if online - {"huggingface_hub.constants"}:
            found[path.name] = online
    assert found.keys() == {"fetch.py", "fetch_errors.py"}


def test_no_torch() -> None:
    code = "import sys, darkroom.fetch; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"torch", "numpy", "huggingface_hub"} & set(shown.stdout.split())
