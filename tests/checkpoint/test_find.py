"""Models and parts found by name in the folder trees that people have, and in the hub's cache."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from darkroom.checkpoint import folders
from darkroom.checkpoint.find import (
    find_model,
    find_part,
    list_models,
    model_path,
    part_path,
    search_folders,
)
from darkroom.checkpoint.folders import found_in
from darkroom.errors import InputError
from darkroom.presets import bundled

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub in place of this machine's, and no folders from the environment."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DARKROOM_MODELS", raising=False)
    return tmp_path / "cache"


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def put_repo(cache: Path, repo: str, *names: str, commit: str = COMMIT, main: bool = True) -> Path:
    """A repository in the layout of the hub's cache: links in snapshots to blobs."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    for name in names:
        blob = put(folder / "blobs", f"{commit[:4]}-{name.replace('/', '-')}")
        link = folder / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob / f"{commit[:4]}-{name.replace('/', '-')}")
    if main:
        put(folder, "refs/main")
        (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """A ComfyUI installation."""
    return put(
        tmp_path / "ComfyUI",
        "main.py",
        "models/checkpoints/dreamshaper_8.safetensors",
        "models/checkpoints/xl/sd_xl_base_1.0.safetensors",
        "models/checkpoints/put_checkpoints_here",
        "models/diffusion_models/flux1-dev.safetensors",
        "models/unet/flux1-dev-Q4_K_S.gguf",
        "models/vae/ae.safetensors",
        "models/text_encoders/t5xxl_fp16.safetensors",
        "models/clip/clip_l.safetensors",
        "models/loras/dreamshaper_8.safetensors",
        "models/loras/add_detail.safetensors",
        "models/controlnet/canny.pth",
        "models/embeddings/easynegative.pt",
        "models/upscale_models/4x.pth",
        "models/vae_approx/taesd_decoder.safetensors",
        "models/diffusers/my-xl/model_index.json",
        "models/diffusers/my-xl/unet/config.json",
        "models/diffusers/my-xl/unet/diffusion_pytorch_model.safetensors",
        "output/dreamshaper_8.bin",
    )


@pytest.fixture
def webui(tmp_path: Path) -> Path:
    """An installation of A1111 with the folders that Forge and SD.Next add."""
    return put(
        tmp_path / "webui",
        "models/Stable-diffusion/v1-5-pruned.ckpt",
        "models/VAE/vae-ft-mse.vae.pt",
        "models/VAE-approx/model.pt",
        "models/Lora/style.safetensors",
        "models/text_encoder/t5xxl.safetensors",
        "models/Text-encoder/clip_g.safetensors",
        "models/ControlNet/depth.safetensors",
        "models/ESRGAN/4x.pth",
        "embeddings/bad.pt",
    )


KINDS = {
    "checkpoints/dreamshaper_8.safetensors": ("model", "file"),
    "checkpoints/xl/sd_xl_base_1.0.safetensors": ("model", "file"),
    "diffusers/my-xl": ("model", "diffusers"),
    "diffusion_models/flux1-dev.safetensors": ("network", "file"),
    "unet/flux1-dev-Q4_K_S.gguf": ("network", "file"),
    "vae/ae.safetensors": ("autoencoder", "file"),
    "vae_approx/taesd_decoder.safetensors": ("autoencoder", "file"),
    "text_encoders/t5xxl_fp16.safetensors": ("text_encoder", "file"),
    "clip/clip_l.safetensors": ("text_encoder", "file"),
    "loras/dreamshaper_8.safetensors": ("lora", "file"),
    "loras/add_detail.safetensors": ("lora", "file"),
    "controlnet/canny.pth": ("controlnet", "file"),
    "embeddings/easynegative.pt": ("embedding", "file"),
    "upscale_models/4x.pth": ("upscaler", "file"),
}
WEBUI_KINDS = {
    "Stable-diffusion/v1-5-pruned.ckpt": "model",
    "VAE/vae-ft-mse.vae.pt": "autoencoder",
    "VAE-approx/model.pt": "autoencoder",
    "Lora/style.safetensors": "lora",
    "text_encoder/t5xxl.safetensors": "text_encoder",
    "Text-encoder/clip_g.safetensors": "text_encoder",
    "ControlNet/depth.safetensors": "controlnet",
    "ESRGAN/4x.pth": "upscaler",
    "embeddings/bad.pt": "embedding",
}


@pytest.mark.parametrize("root", [".", "models"])
def test_comfyui_folders_say_what_files_are_for(comfyui: Path, root: str) -> None:
    assert {item.name: (item.kind, item.layout) for item in found_in(comfyui / root)} == KINDS


def test_the_folders_of_a1111_forge_and_sdnext_do_too(webui: Path) -> None:
    assert {item.name: item.kind for item in found_in(webui)} == WEBUI_KINDS


def test_a_folder_for_one_kind_says_it_alone(comfyui: Path) -> None:
    assert [item.kind for item in found_in(comfyui / "models" / "vae")] == ["autoencoder"]


@pytest.mark.parametrize(
    "name, path",
    [
        ("dreamshaper_8", "checkpoints/dreamshaper_8.safetensors"),  # not the LoRA of the same name
        ("dreamshaper_8.safetensors", "checkpoints/dreamshaper_8.safetensors"),
        ("DreamShaper_8", "checkpoints/dreamshaper_8.safetensors"),
        ("sd_xl_base_1.0", "checkpoints/xl/sd_xl_base_1.0.safetensors"),
        ("xl/sd_xl_base_1.0", "checkpoints/xl/sd_xl_base_1.0.safetensors"),
        ("checkpoints/xl/sd_xl_base_1.0.safetensors", "checkpoints/xl/sd_xl_base_1.0.safetensors"),
        ("Checkpoints/XL/sd_xl_base_1.0", "checkpoints/xl/sd_xl_base_1.0.safetensors"),
        ("flux1-dev", "diffusion_models/flux1-dev.safetensors"),
        ("flux1-dev-Q4_K_S", "unet/flux1-dev-Q4_K_S.gguf"),
        ("my-xl", "diffusers/my-xl"),
        ("diffusers/my-xl", "diffusers/my-xl"),
        ("loras/add_detail.safetensors", "loras/add_detail.safetensors"),  # a whole way is what it says
    ],
)
@pytest.mark.parametrize("root", [".", "models"])
def test_a_model_is_found_by_name(comfyui: Path, root: str, name: str, path: str) -> None:
    assert find_model(name, [comfyui / root]).resolve() == (comfyui / "models" / path).resolve()


@pytest.mark.parametrize(
    "name, path",
    [
        ("ae", "vae/ae.safetensors"),
        ("taesd_decoder", "vae_approx/taesd_decoder.safetensors"),
        ("t5xxl_fp16", "text_encoders/t5xxl_fp16.safetensors"),
        ("clip_l.safetensors", "clip/clip_l.safetensors"),
        ("diffusers/my-xl/unet", "diffusers/my-xl/unet"),
    ],
)
def test_a_part_is_found_by_name(comfyui: Path, name: str, path: str) -> None:
    assert find_part(name, [comfyui]) == comfyui / "models" / path


def test_other_kinds_are_found_when_asked_for(comfyui: Path) -> None:
    assert find_part("add_detail", [comfyui], "lora") == comfyui / "models/loras/add_detail.safetensors"
    assert find_part("canny", [comfyui], "controlnet") == comfyui / "models/controlnet/canny.pth"


def test_what_lies_in_a_folder_for_others_is_pointed_at(comfyui: Path) -> None:
    with pytest.raises(InputError, match=r"only .*loras/add_detail\.safetensors has this name.*\(lora\)"):
        find_model("add_detail", [comfyui])


def test_letters_as_given_go_before_other_capitals(tmp_path: Path) -> None:
    put(tmp_path, "a/Dream.safetensors", "b/dream.safetensors")
    assert find_model("dream", [tmp_path]) == tmp_path / "b/dream.safetensors"
    with pytest.raises(InputError, match="several"):
        find_model("DREAM", [tmp_path])


def test_a_whole_way_goes_before_its_end(tmp_path: Path) -> None:
    put(tmp_path, "base.safetensors", "old/base.safetensors")
    assert find_model("base", [tmp_path]) == tmp_path / "base.safetensors"


def test_safetensors_go_before_the_same_model_pickled(tmp_path: Path) -> None:
    put(tmp_path, "a.ckpt", "a.safetensors", "b.ckpt", "old/b.safetensors", "c.gguf", "c.safetensors")
    assert find_model("a", [tmp_path]) == tmp_path / "a.safetensors"
    assert find_model("a.ckpt", [tmp_path]) == tmp_path / "a.ckpt"
    put(tmp_path, "d.gguf", "d.ckpt")
    for name in ("c", "d"):  # the same weights or not: names do not say
        with pytest.raises(InputError, match="several"):
            find_model(name, [tmp_path])


def test_several_models_of_a_name_are_listed(tmp_path: Path) -> None:
    put(tmp_path, *(f"{n:02}/same.safetensors" for n in range(12)))
    with pytest.raises(InputError) as caught:
        find_model("same", [tmp_path])
    lines = str(caught.value).splitlines()
    assert lines[0] == "model 'same': several have this name, give the path of one:"
    assert lines[1:11] == [f"  {tmp_path}/{n:02}/same.safetensors" for n in range(10)]
    assert lines[11:] == ["  and 2 more"]


def test_one_file_by_two_ways_is_one(comfyui: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(comfyui / "models")
    found = find_model("dreamshaper_8", [comfyui, comfyui / "models", link])
    assert found.samefile(comfyui / "models/checkpoints/dreamshaper_8.safetensors")
    assert len(list_models([comfyui, link])) == len(KINDS)


def test_nothing_of_a_name_shows_the_nearest_and_where_it_looked(comfyui: Path, cache: Path) -> None:
    with pytest.raises(InputError) as caught:
        find_model("dreamshaper_7", [comfyui])
    assert str(caught.value).splitlines() == [
        "unknown model 'dreamshaper_7': did you mean 'checkpoints/dreamshaper_8.safetensors'? "
        "Looked in (--model-dir and DARKROOM_MODELS add folders):",
        f"  {comfyui}",
        f"  {cache}",
    ]
    with pytest.raises(InputError, match=r"unknown model 'darkroom-mni': did you mean 'darkroom-mini'\?"):
        find_model("darkroom-mni")
    with pytest.raises(InputError, match=r"unknown autoencoder or text encoder 'qqqqq'\. Looked"):
        find_part("qqqqq", [comfyui])


def test_a_repository_of_the_hub_is_found_at_its_main_revision(cache: Path) -> None:
    put_repo(cache, "org/xl", "model_index.json", "vae/config.json", commit=OTHER, main=False)
    main = put_repo(cache, "org/xl", "model_index.json", "vae/config.json", "xl.safetensors")
    assert find_model("org/xl") == find_model("xl", [cache]) == find_model("Org/XL") == main
    assert find_model("org/xl@main") == find_model(f"org/xl@{COMMIT[:8]}") == main
    assert find_model(f"org/xl@{OTHER[:7]}") == main.with_name(OTHER)
    assert find_model("org/xl/xl.safetensors") == main / "xl.safetensors"
    assert find_model("xl.safetensors") == main / "xl.safetensors"
    with pytest.raises(InputError, match=r"unknown model 'org/xl@cafe'"):
        find_model("org/xl@cafe")
    put_repo(cache, "org/xl", "model_index.json", commit=COMMIT[:-1] + "b", main=False)
    with pytest.raises(InputError, match=r"unknown model 'org/xl@aaaa'"):
        find_model("org/xl@aaaa")  # two begin so


def test_without_a_main_revision_the_newest_is_meant(cache: Path) -> None:
    newest = put_repo(cache, "org/xl", "model_index.json", main=False)
    older = put_repo(cache, "org/xl", "model_index.json", commit=OTHER, main=False)
    os.utime(older, (1, 1))
    assert find_model("org/xl") == newest


def test_a_repository_of_one_part_or_of_files_is_found(cache: Path) -> None:
    part = put_repo(cache, "org/vae", "config.json", "diffusion_pytorch_model.safetensors")
    one = put_repo(cache, "org/one", "x-Q8_0.gguf", "README.md")
    put_repo(cache, "org/many", "a.gguf", "b.gguf")
    put_repo(cache, "org/words", "vocab.json")
    assert find_part("org/vae") == part
    assert find_model("org/one") == one / "x-Q8_0.gguf"
    with pytest.raises(InputError, match=r"several.*\n.*a\.gguf\n.*b\.gguf"):
        find_model("org/many")
    with pytest.raises(InputError, match="unknown model 'org/words'"):
        find_model("org/words")


def test_named_folders_go_before_the_cache(cache: Path, tmp_path: Path) -> None:
    put_repo(cache, "org/xl", "xl.safetensors")
    put(tmp_path / "mine", "sub/xl.safetensors")
    assert find_model("xl.safetensors", [tmp_path / "mine"]) == tmp_path / "mine/sub/xl.safetensors"


def test_folders_of_models_are_one_thing_each(tmp_path: Path) -> None:
    put(
        tmp_path,
        "trained/denoiser.safetensors",
        "trained/autoencoder.safetensors",
        "codec/autoencoder.safetensors",
        "sd-vae/config.json",
        "sd-vae/diffusion_pytorch_model.safetensors",
        "sd-vae/diffusion_pytorch_model.bin",
        "bare/diffusion_pytorch_model.safetensors",
        "big/flux.safetensors.index.json",
        "big/flux-00001-of-00002.safetensors",
        "big/flux-00002-of-00002.safetensors",
        "xl/model_index.json",
        "xl/xl.safetensors",
        "xl/unet/diffusion_pytorch_model.fp16.safetensors",
    )
    found = {item.name: (item.kind, item.layout) for item in found_in(tmp_path)}
    assert found == {
        "trained": ("model", "darkroom"),
        "codec": ("autoencoder", "darkroom"),
        "sd-vae": (None, "part"),
        "bare/diffusion_pytorch_model.safetensors": (None, "file"),
        "big/flux.safetensors.index.json": (None, "file"),
        "xl": ("model", "diffusers"),
        "xl/xl.safetensors": (None, "file"),
    }
    assert find_model("trained", [tmp_path]) == tmp_path / "trained"
    assert find_part("codec", [tmp_path]) == tmp_path / "codec"
    assert find_part("sd-vae", [tmp_path]) == tmp_path / "sd-vae"
    assert find_model("flux", [tmp_path]) == tmp_path / "big/flux.safetensors.index.json"
    assert find_model("xl", [tmp_path]) == tmp_path / "xl"
    assert find_model("xl.safetensors", [tmp_path]) == tmp_path / "xl/xl.safetensors"


def test_a_model_folder_may_itself_be_searched(tmp_path: Path) -> None:
    put(tmp_path / "xl", "model_index.json")
    assert [item.name for item in found_in(tmp_path / "xl")] == ["xl"]
    assert find_model("xl", [tmp_path / "xl"]) == tmp_path / "xl"


def test_the_search_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a/x.safetensors", ".hidden/y.safetensors", "node_modules/z.pt", ".git/w.bin", "a/.v.pt")
    put(tmp_path, "/".join(["d"] * 8) + "/deep.pt", "/".join(["d"] * 9) + "/deeper.pt")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nothing")
    names = [item.name for item in found_in(tmp_path)]
    assert sorted(names) == ["a/x.safetensors", "/".join(["d"] * 8) + "/deep.pt"]
    monkeypatch.setattr(folders, "MAX_ENTRIES", 10)
    with pytest.raises(InputError, match=r"has more than 10 files: give the folder of models in it"):
        list(found_in(tmp_path))


def test_a_folder_that_cannot_be_read_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "shut/y.pt", "x.pt")
    scandir = os.scandir

    def refusing(path: Path) -> object:
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert [item.name for item in found_in(tmp_path)] == ["x.pt"]


def test_folders_come_from_options_then_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = put(tmp_path / "one", "a.pt"), put(tmp_path / "two", "b.pt")
    monkeypatch.setenv("DARKROOM_MODELS", os.pathsep.join([str(two), "", str(one)]))
    assert search_folders([one]) == [one, two]
    with pytest.raises(InputError, match=r"three: no such folder \(named by --model-dir\)"):
        search_folders([tmp_path / "three"])
    monkeypatch.setenv("DARKROOM_MODELS", str(tmp_path / "four"))
    with pytest.raises(InputError, match=r"four: no such folder \(named by DARKROOM_MODELS\)"):
        search_folders()


def test_bundled_models_and_paths_go_before_names(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(comfyui, "models/checkpoints/darkroom-mini.safetensors", "models/vae/here.pt", "here.pt")
    monkeypatch.chdir(comfyui)
    assert model_path("darkroom-mini", [comfyui]) == bundled()["darkroom-mini"]
    assert part_path("here.pt", [comfyui]) == Path("here.pt")
    assert model_path(comfyui, []) == comfyui
    assert model_path("flux1-dev", [comfyui]).name == "flux1-dev.safetensors"
    assert part_path("ae", [comfyui]).name == "ae.safetensors"
    for path in (f"{comfyui}/gone", "./gone", "../gone"):
        with pytest.raises(InputError, match=r"gone: no such file or folder"):
            model_path(path, [comfyui])


def test_a_large_tree_is_searched_at_once(tmp_path: Path) -> None:
    for folder in range(20):
        put(tmp_path / f"{folder}", *(f"{file}.safetensors" for file in range(100)))
    start = time.process_time()
    assert find_model("19/7", [tmp_path]) == tmp_path / "19/7.safetensors"
    assert time.process_time() - start < 2


def test_no_torch() -> None:
    code = "import sys, darkroom.checkpoint.find; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"torch", "numpy", "huggingface_hub"} & set(shown.stdout.split())
