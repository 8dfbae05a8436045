"""SigLIP's picture encoder against transformers, FLUX Redux against diffusers, weight for weight."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.closeness import assert_parity
from tests.networks import with_unit_gain
from torch import Tensor, nn

from darkroom.adapters.redux import Redux, load_redux
from darkroom.nn.redux import ReduxConfig, ReduxEmbedder
from darkroom.nn.siglip import SiglipConfig, SiglipEncoder

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TINY = SiglipConfig(image_size=28, patch_size=7, width=24, layers=2, heads=3, intermediate=40)
CONFIGS = {
    "patches fill the square": TINY,
    "pixels left over, as in so400m": replace(TINY, image_size=33, layers=3, heads=2),
    "one layer, large patches, narrow feed-forward": replace(
        TINY, image_size=32, patch_size=16, width=32, layers=1, heads=4, intermediate=20
    ),
}
EMBEDDERS = [(24, 16), (16, 40), (9, 1)]
WIDTH = 32  # of the text's states
PICTURES = ((50, 31), (20, 90), (12, 12))


def siglip(config: SiglipConfig) -> Any:
    """transformers' encoder of this shape, which has a pooling head too."""
    fields = transformers.SiglipVisionConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.intermediate,
    )
    return transformers.SiglipVisionModel(fields)


def without_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of version 4, which has a prefix, and of version 5, which has none."""
    named = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if not name.startswith("head.")}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_siglip(name: str) -> None:
    config = CONFIGS[name]
    model = with_unit_gain(siglip(config))
    ours = SiglipEncoder(config)
    ours.load_state_dict(without_head(model.state_dict()), strict=True)
    image = torch.rand(2, 3, config.image_size, config.image_size) * 2 - 1
    states = ours(image)
    assert states.shape == (2, config.tokens, config.width)
    assert_parity(states, model(image).last_hidden_state)
    assert (states[:, 0] - states[:, -1]).norm() > 0.1  # each patch has a state of its own


@pytest.mark.parametrize(("width", "context_dim"), EMBEDDERS)
@torch.no_grad()
def test_embedder(width: int, context_dim: int) -> None:
    model = with_unit_gain(embedder(width, context_dim))
    ours = ReduxEmbedder(ReduxConfig(width=width, context_dim=context_dim))
    ours.load_state_dict(model.state_dict(), strict=True)
    states = torch.randn(2, 5, width)
    assert_parity(ours(states), model(states).image_embeds)


def embedder(width: int, context_dim: int) -> Any:
    """diffusers' embedder of these widths."""
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    return ReduxImageEncoder(redux_dim=width, txt_in_features=context_dim)


@pytest.mark.parametrize("theirs, ours", [
    (lambda: siglip(SiglipConfig()), lambda: SiglipEncoder(SiglipConfig())),
    (lambda: embedder(1152, 4096), lambda: ReduxEmbedder(ReduxConfig())),
], ids=["siglip", "redux"])  # fmt: skip
def test_published_names_and_shapes(theirs: Callable[[], nn.Module], ours: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        published, own = theirs().state_dict(), ours().state_dict()
    assert {n: t.shape for n, t in without_head(published).items()} == {n: t.shape for n, t in own.items()}
    assert SiglipConfig().tokens == 729


def pictures() -> list[Image.Image]:
    """Pictures of several proportions: gradients, a frame and noise."""
    drawn = []
    for number, (width, height) in enumerate(PICTURES):
        y, x = np.mgrid[:height, :width]
        noise = np.random.default_rng(number).integers(0, 256, (height, width))
        pixels = np.stack([x * 255 // width, y * 255 // height, noise], axis=2).astype(np.uint8)
        pixels[:3], pixels[:, -3:] = 255, 0
        drawn.append(Image.fromarray(pixels))
    return drawn


@pytest.fixture(scope="module")
def prior() -> Any:
    """A tiny pipeline; its text encoder does nothing but let the text's states be given."""
    clip = transformers.CLIPTextConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    return diffusers.FluxPriorReduxPipeline(
        image_encoder=with_unit_gain(siglip(TINY), 1),
        feature_extractor=transformers.SiglipImageProcessor(size={"height": 28, "width": 28}),
        image_embedder=with_unit_gain(embedder(TINY.width, WIDTH), 2),
        text_encoder=transformers.CLIPTextModel(clip),
    )


@pytest.fixture(scope="module")
def redux(prior: Any, tmp_path_factory: pytest.TempPathFactory) -> Redux:
    folder = tmp_path_factory.mktemp("redux")
    prior.save_pretrained(folder)
    return load_redux(folder)


def image_part(prior: Any, images: list[Image.Image]) -> Tensor:
    """What follows the text's states in the prompt that diffusers makes, for no text."""
    texts = torch.zeros(len(images), 6, WIDTH)
    states = prior(
        images, prompt_embeds=texts, pooled_prompt_embeds=torch.zeros(len(images), 8)
    ).prompt_embeds
    assert not states[:, :6].any()
    return states[:, 6:]


@pytest.mark.parametrize("index", range(len(PICTURES)))
def test_tokens_are_what_diffusers_adds_to_the_prompt(prior: Any, redux: Redux, index: int) -> None:
    picture = pictures()[index]
    tokens = redux.tokens([picture])
    assert tokens.shape == (1, TINY.tokens, WIDTH)
    assert_parity(tokens, image_part(prior, [picture]))


def test_of_several_pictures_diffusers_adds_up_the_tokens(prior: Any, redux: Redux) -> None:
    tokens = redux.tokens(pictures())
    assert tokens.shape == (3, TINY.tokens, WIDTH)
    assert_parity(tokens.sum(0, keepdim=True), image_part(prior, pictures()))


def test_pictures_are_prepared_as_transformers_does(prior: Any, redux: Redux, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(redux.encoder, "forward", lambda image: seen.append(image) or torch.zeros(1, 1, 24))
    expected = prior.feature_extractor(images=pictures(), return_tensors="pt").pixel_values
    redux.tokens(pictures())
    assert (seen[0] - expected).abs().max() < 1e-6
    for picture, wanted in zip(pictures(), expected, strict=True):
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        redux.tokens(image)
        assert (seen.pop()[0] - wanted).abs().max() < 1e-6
