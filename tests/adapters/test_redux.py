"""Reading FLUX Redux from its layouts, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.networks import with_unit_gain
from torch import Tensor

from darkroom.adapters import redux as adapter
from darkroom.adapters.redux import Redux, load_redux
from darkroom.errors import InputError
from darkroom.nn.redux import ReduxConfig, ReduxEmbedder
from darkroom.nn.siglip import SiglipConfig, SiglipEncoder

CONFIG = SiglipConfig(image_size=20, patch_size=8, width=12, layers=1, heads=2, intermediate=16)
FIELDS = {
    "model_type": "siglip_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 12,
    "image_size": 20,
    "intermediate_size": 16,
    "layer_norm_eps": 1e-6,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "patch_size": 8,
}
EXTRACTOR = {
    "do_convert_rgb": None,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 20, "width": 20},
}


def tiny() -> Redux:
    encoder = with_unit_gain(SiglipEncoder(CONFIG), 1)
    return Redux(encoder, with_unit_gain(ReduxEmbedder(ReduxConfig(width=12, context_dim=10)), 2))


def write_json(file: Path, fields: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(fields))


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)


def vision_tensors(prefix: str = "") -> dict[str, Tensor]:
    """The encoder's tensors with some of the pooling head's."""
    tensors = {prefix + name: tensor for name, tensor in tiny().encoder.state_dict().items()}
    return tensors | {
        f"{prefix}head.probe": torch.zeros(1, 1, 12),
        f"{prefix}head.layernorm.bias": torch.zeros(12),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The layout of diffusers, as transformers 4 names the encoder's tensors."""
    folder = tmp_path / "FLUX.1-Redux-dev"
    write_json(folder / "image_encoder/config.json", FIELDS)
    write_tensors(folder / "image_encoder/model.safetensors", vision_tensors("vision_model."))
    write_json(folder / "feature_extractor/preprocessor_config.json", EXTRACTOR)
    write_tensors(folder / "image_embedder/diffusion_pytorch_model.safetensors", tiny().embedder.state_dict())
    return folder


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """The original file, in a folder of its own."""
    write_tensors(tmp_path / "original/flux1-redux-dev.safetensors", tiny().embedder.state_dict())
    return tmp_path / "original/flux1-redux-dev.safetensors"


def same_tokens(redux: Redux) -> bool:
    image = torch.rand(2, 3, 31, 17) * 2 - 1
    return torch.equal(redux.tokens(image), tiny().tokens(image))


def test_the_layout_of_diffusers(folder: Path) -> None:
    redux = load_redux(folder)
    assert redux.encoder.config == CONFIG
    assert same_tokens(redux)
    assert not redux.encoder.training


def test_the_original_file_and_the_folder_of_the_picture_encoder(folder: Path, single: Path) -> None:
    assert same_tokens(load_redux(single, siglip=folder / "image_encoder"))


def test_the_original_file_beside_the_picture_encoder(folder: Path) -> None:
    write_tensors(folder / "flux1-redux-dev.safetensors", tiny().embedder.state_dict())
    assert same_tokens(load_redux(folder / "flux1-redux-dev.safetensors"))


def test_all_of_siglip(single: Path, tmp_path: Path) -> None:
    write_json(
        tmp_path / "all/config.json", {"model_type": "siglip", "vision_config": FIELDS, "text_config": {}}
    )
    write_json(tmp_path / "all/preprocessor_config.json", EXTRACTOR)
    others = {"logit_scale": torch.zeros(1), "text_model.head.weight": torch.zeros(2, 2)}
    write_tensors(tmp_path / "all/model.safetensors", vision_tensors("vision_model.") | others)
    assert same_tokens(load_redux(single, siglip=tmp_path / "all"))


def test_one_file_of_siglip_is_the_published_model(single: Path, tmp_path: Path, monkeypatch) -> None:
    write_tensors(tmp_path / "sigclip.safetensors", vision_tensors("vision_model."))
    with pytest.raises(InputError, match=r"sigclip\.safetensors: its tensors are not those of its config"):
        load_redux(single, siglip=tmp_path / "sigclip.safetensors")
    monkeypatch.setattr(adapter, "SiglipConfig", lambda: CONFIG)
    assert same_tokens(load_redux(single, siglip=tmp_path / "sigclip.safetensors"))


def test_another_precision(folder: Path) -> None:
    redux = load_redux(folder, dtype=torch.bfloat16)
    tokens = redux.tokens([Image.new("RGB", (9, 5), "red")])
    assert tokens.dtype == torch.bfloat16
    assert tokens.isfinite().all()


def test_tokens_carry_no_gradient() -> None:
    assert not tiny().tokens(torch.zeros(1, 3, 20, 20)).requires_grad


def test_a_picture_of_the_right_size_is_seen_as_it_is_in_8_bits(monkeypatch) -> None:
    redux, seen = tiny(), []
    monkeypatch.setattr(redux.encoder, "forward", lambda image: seen.append(image) or torch.zeros(1, 1, 12))
    image = torch.rand(2, 3, 20, 20) * 2 - 1
    redux.tokens(image)
    assert (seen[0] - image).abs().max() <= 1 / 255 + 1e-6


def test_what_is_transparent_becomes_white() -> None:
    clear, white = Image.new("RGBA", (8, 8), (255, 0, 0, 0)), Image.new("RGB", (8, 8), "white")
    assert torch.equal(tiny().tokens([clear]), tiny().tokens([white]))


def test_a_palette_is_resolved_before_resizing() -> None:
    palette = Image.effect_noise((40, 40), 90).convert("RGB").quantize(8)
    assert torch.equal(tiny().tokens([palette]), tiny().tokens([palette.convert("RGB")]))


@pytest.mark.parametrize("images", [
    torch.zeros(3, 20, 20),
    torch.zeros(1, 4, 20, 20),
    torch.zeros(0, 3, 20, 20),
    torch.zeros(1, 3, 20, 20, dtype=torch.uint8),
    [],
    ["picture.png"],
    Image.new("RGB", (20, 20)),
])  # fmt: skip
def test_what_is_no_picture_is_refused(images: Any) -> None:
    with pytest.raises(InputError, match=r"^redux: images must be \(B, 3, H, W\) in −1\.\.1, "):
        tiny().tokens(images)


def test_the_encoder_takes_its_own_size_only() -> None:
    with pytest.raises(InputError, match=r"must be \(B, 3, 20, 20\), not \(1, 3, 20, 24\)"):
        tiny().encoder(torch.zeros(1, 3, 20, 24))


def test_a_width_that_does_not_fit() -> None:
    with pytest.raises(InputError, match="expects states 13 wide, and the picture encoder's are 12"):
        Redux(SiglipEncoder(CONFIG), ReduxEmbedder(ReduxConfig(width=13, context_dim=4)))


@pytest.mark.parametrize(("fields", "message"), [
    ({"layers": 0}, "`layers` = 0 must be at least 1"),
    ({"heads": 5}, "`width` = 12 must divide by `heads` = 5"),
    ({"patch_size": 21}, "`patch_size` = 21 must be at most `image_size` = 20"),
])  # fmt: skip
def test_configs_that_cannot_be(fields: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SiglipConfig(**{"image_size": 20, "width": 12, "heads": 2} | fields)


def test_a_missing_picture_encoder_is_named(single: Path) -> None:
    with pytest.raises(InputError, match=r"original/image_encoder: not there: give `siglip`"):
        load_redux(single)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.safetensors: not there: expected FLUX Redux"):
        load_redux(tmp_path / "missing.safetensors")


def test_a_folder_without_an_embedder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"image_embedder: not there: expected FLUX Redux's folder"):
        load_redux(tmp_path)


def test_a_file_of_another_network(folder: Path, tmp_path: Path) -> None:
    write_tensors(tmp_path / "other.safetensors", {"img_in.weight": torch.zeros(2, 2)})
    with pytest.raises(InputError, match=r"other\.safetensors: not FLUX Redux: expected .*redux_up\.weight"):
        load_redux(tmp_path / "other.safetensors", siglip=folder / "image_encoder")


def test_an_embedder_of_another_shape(folder: Path, single: Path) -> None:
    tensors = tiny().embedder.state_dict()
    write_tensors(single, tensors | {"redux_up.bias": torch.zeros(7)})
    with pytest.raises(
        InputError, match=r"flux1-redux-dev\.safetensors: .*redux_up\.bias \(7,\) instead of \(30,\)"
    ):
        load_redux(single, siglip=folder / "image_encoder")


def change(file: Path, **fields: Any) -> None:
    write_json(file, json.loads(file.read_text()) | fields)


@pytest.mark.parametrize(("file", "fields", "message"), [
    ("image_encoder/config.json", {"hidden_act": "gelu"}, "`hidden_act` = 'gelu'"),
    ("image_encoder/config.json", {"model_type": "clip_vision_model"}, "`model_type` = 'clip_vision_model'"),
    ("image_encoder/config.json", {"num_attention_heads": 5}, "must divide by `heads` = 5"),
    ("image_encoder/config.json", {"image_size": [20, 20]}, r"`image_size` = \[20, 20\]"),
    ("feature_extractor/preprocessor_config.json", {"resample": 2}, "`resample` = 2"),
    ("feature_extractor/preprocessor_config.json", {"image_mean": [0.48, 0.46, 0.41]}, "`image_mean` = "),
    ("feature_extractor/preprocessor_config.json", {"size": {"height": 24, "width": 20}}, "`size` = "),
])  # fmt: skip
def test_fields_that_ask_for_something_else(
    folder: Path, file: str, fields: dict[str, Any], message: str
) -> None:
    change(folder / file, **fields)
    with pytest.raises(InputError, match=f"{Path(file).name}: .*{message}"):
        load_redux(folder)


def test_missing_tensors_are_named(folder: Path) -> None:
    kept = {n: t for n, t in vision_tensors().items() if not n.startswith("post_layernorm")}
    write_tensors(folder / "image_encoder/model.safetensors", kept)
    with pytest.raises(InputError, match=r"image_encoder: .*missing: post_layernorm\.bias"):
        load_redux(folder)
