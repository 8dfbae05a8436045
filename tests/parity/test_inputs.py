"""Pipelines whose networks are shown pictures beside the noisy latents, against diffusers'."""

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from tests.networks import with_unit_gain
from torch import Tensor

import darkroom
from darkroom.errors import InputError

pytest.importorskip("diffusers")

import diffusers
import transformers
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from tests.parity.drawing import HEIGHT, PROMPTS, STEPS, assert_drawn_alike
from tests.parity.drawing import WIDTH as PIXELS
from tests.parity.pipelines import WIDTH, clip, clip_tokenizer, flux, random_image, sd15, unet, vae


def square_mask() -> Tensor:
    """1 where to paint."""
    mask = torch.zeros(1, 1, HEIGHT, PIXELS)
    mask[:, :, 8:37, 10:40] = 1.0
    return mask


def compare(
    pipe: Any, ours: dict[str, Any], theirs: dict[str, Any], prompts: list[Any] | None = PROMPTS
) -> None:
    """Save their pipeline, load it here, and hold every step and the pictures against each other."""
    folder = Path(mkdtemp()) / "model"
    pipe.save_pretrained(folder)
    mine = darkroom.load(folder, device="cpu")
    ours, theirs = {"steps": STEPS} | ours, {"num_inference_steps": STEPS} | theirs
    assert_drawn_alike(mine, pipe, ours, theirs, asked=prompts or [""], prompts=prompts)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_with_nine_channels(strength: float, tmp_path: Path) -> None:
    pipe = sd15(tmp_path, unet(WIDTH, in_channels=9), "StableDiffusionInpaintPipeline")
    image, mask = random_image(HEIGHT, PIXELS), square_mask()
    given = {"guidance_scale": 3.0, "height": HEIGHT, "width": PIXELS, "strength": strength}
    compare(
        pipe,
        given | {"image": image, "mask": mask, "negative_prompt": "blue"},
        given | {"image": (image + 1) / 2, "mask_image": mask, "negative_prompt": ["blue"] * 2},
    )


def test_depth_beside_a_picture(tmp_path: Path) -> None:
    pipe = sd15(
        tmp_path,
        unet(WIDTH, in_channels=5),
        "StableDiffusionDepth2ImgPipeline",
        depth_estimator=None,
        feature_extractor=None,
    )
    image, depth = random_image(HEIGHT, PIXELS), random_image(HEIGHT, PIXELS, seed=3)[:, :1]
    given = {"guidance_scale": 3.0, "strength": 0.6}
    compare(
        pipe,
        given | {"image": image, "control": depth.expand(-1, 3, -1, -1)},
        given | {"image": (image + 1) / 2, "depth_map": depth[:, 0]},
    )


def test_the_x4_upscaler(tmp_path: Path) -> None:
    tokenizer = clip_tokenizer(tmp_path / "bpe")
    network = unet(
        WIDTH,
        in_channels=7,
        num_class_embeds=1000,
        only_cross_attention=(True, False),
        use_linear_projection=True,
    )
    pipe = diffusers.StableDiffusionUpscalePipeline(
        vae=vae(levels=3, scaling_factor=0.08333),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        unet=network,
        low_res_scheduler=diffusers.DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02
        ),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.0001,
            beta_end=0.02,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction",
        ),
    )
    small = random_image(16, 12, count=2)
    given = {"guidance_scale": 3.0, "noise_level": 50}
    compare(pipe, given | {"image": small}, given | {"image": (small + 1) / 2})


LDM_DDIM = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "clip_sample": False}


def vq(**fields: Any) -> Any:
    network = diffusers.VQModel(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=4,
        num_vq_embeddings=64,
        scaling_factor=1.0,
        **fields,
    )
    return with_unit_gain(network, 3)


def plain_unet(in_channels: int) -> Any:
    network = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=in_channels,
        out_channels=3,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return with_unit_gain(network, 5)


def test_super_resolution_of_2021() -> None:
    pipe = diffusers.LDMSuperResolutionPipeline(
        vqvae=vq(), unet=plain_unet(6), scheduler=diffusers.DDIMScheduler(**LDM_DDIM)
    )
    small = random_image(16, 12)
    compare(pipe, {"image": small}, {"image": small}, None)


def test_pictures_of_one_kind_of_2021() -> None:
    pipe = diffusers.LDMPipeline(
        vqvae=vq(), unet=plain_unet(3), scheduler=diffusers.DDIMScheduler(**LDM_DDIM)
    )
    compare(pipe, {}, {"batch_size": 1}, None)


def test_text_to_picture_of_2021(tmp_path: Path) -> None:
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "red",
        "apple",
        "a",
        "rocket",
        "##s",
        ",",
        "3d",
        "style",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=len(words),
            d_model=WIDTH,
            encoder_layers=2,
            encoder_ffn_dim=4 * WIDTH,
            encoder_attention_heads=2,
            head_dim=8,
        )
    )
    pipe = diffusers.LDMTextToImagePipeline(
        vqvae=vae(scaling_factor=0.18215),
        bert=with_unit_gain(bert, 4),
        tokenizer=tokenizer,
        unet=unet(WIDTH),
        scheduler=diffusers.DDIMScheduler(**LDM_DDIM, steps_offset=1, set_alpha_to_one=False),
    )
    given = {"guidance_scale": 3.0, "height": HEIGHT, "width": PIXELS}
    compare(pipe, given, given)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_flux_fill(strength: float, tmp_path: Path) -> None:
    pipe = flux(tmp_path, guided=True, pipeline="FluxFillPipeline", in_channels=384)
    image, mask = random_image(HEIGHT, PIXELS), square_mask()
    given = {"guidance_scale": 30.0, "height": HEIGHT, "width": PIXELS, "strength": strength}
    compare(
        pipe,
        given | {"image": image, "mask": mask},
        given | {"image": (image + 1) / 2, "mask_image": mask},
    )


def test_flux_control(tmp_path: Path) -> None:
    pipe = flux(tmp_path, guided=True, pipeline="FluxControlPipeline", in_channels=128)
    edges = random_image(
        HEIGHT, PIXELS, count=2
    )  # one each: diffusers encodes one for all as often, and draws as often
    given = {"guidance_scale": 10.0, "height": HEIGHT, "width": PIXELS}
    compare(pipe, given | {"control": edges}, given | {"control_image": edges})


def test_flux_kontext(tmp_path: Path) -> None:
    pipe = flux(tmp_path, guided=True, pipeline="FluxKontextPipeline")
    image = random_image(HEIGHT, PIXELS)
    given = {"guidance_scale": 2.5, "height": HEIGHT, "width": PIXELS}
    size = {"max_area": HEIGHT * PIXELS, "_auto_resize": False}
    compare(pipe, given | {"image": image}, given | size | {"image": (image + 1) / 2})


def test_everything_that_is_shown_matters(tmp_path: Path) -> None:
    """Another mask, masked picture, depth map, edges or reference moves the picture."""
    pipe = sd15(tmp_path / "a", unet(WIDTH, in_channels=9), "StableDiffusionInpaintPipeline")
    fill = flux(tmp_path / "b", guided=True, pipeline="FluxFillPipeline", in_channels=384)
    edit = flux(tmp_path / "c", guided=True, pipeline="FluxKontextPipeline")
    image, other, mask = random_image(HEIGHT, PIXELS), random_image(HEIGHT, PIXELS, seed=9), square_mask()
    for their_pipe, shown in (
        (pipe, {"image": image, "mask": mask}),
        (fill, {"image": image, "mask": mask}),
        (edit, {"image": image}),
    ):
        folder = Path(mkdtemp()) / "model"
        their_pipe.save_pretrained(folder)
        mine = darkroom.load(folder, device="cpu")
        changes = [{"image": other}, *([{"mask": mask.flip(3).roll(9, 2)}] if "mask" in shown else [])]
        first = np.asarray(mine(PROMPTS[0], seed=1, steps=STEPS, **shown).images[0], np.int16)
        for change in changes:
            second = np.asarray(mine(PROMPTS[0], seed=1, steps=STEPS, **shown | change).images[0], np.int16)
            assert np.abs(first - second).max() >= 3


def test_flux_redux(tmp_path: Path) -> None:
    """Tokens of a picture behind those of the text, as diffusers takes them ready made."""
    pipe = flux(tmp_path / "a", guided=True)
    pipe.save_pretrained(tmp_path / "model")
    mine = darkroom.load(tmp_path / "model", device="cpu")
    tokens = torch.randn(1, 9, 40, generator=torch.Generator().manual_seed(1))
    embeds, pooled, _ = pipe.encode_prompt(prompt=PROMPTS, prompt_2=PROMPTS)
    theirs = {
        "prompt_embeds": torch.cat([embeds, tokens.expand(2, -1, -1)], dim=1),
        "pooled_prompt_embeds": pooled,
    }
    given = {"height": HEIGHT, "width": PIXELS, "guidance_scale": 3.0}
    ours = {"steps": STEPS, "image_prompt": tokens} | given
    assert_drawn_alike(mine, pipe, ours, {"num_inference_steps": STEPS} | given | theirs, prompts=None)
    with pytest.raises(InputError, match=r"image_prompt must have shape \(1 or 1, N, 40\), not \(1, 9, 8\)"):
        mine("a rocket", image_prompt=tokens[:, :, :8])


@pytest.mark.parametrize("kind", ["inpaint", "fill", "reference"])
def test_half_precision_takes_what_is_shown(kind: str, tmp_path: Path) -> None:
    pipe = {
        "inpaint": lambda: sd15(tmp_path, unet(WIDTH, in_channels=9), "StableDiffusionInpaintPipeline"),
        "fill": lambda: flux(tmp_path, guided=True, pipeline="FluxFillPipeline", in_channels=384),
        "reference": lambda: flux(tmp_path, guided=True, pipeline="FluxKontextPipeline"),
    }[kind]()
    pipe.save_pretrained(tmp_path / "model")
    shown = {"image": random_image(HEIGHT, PIXELS)} | ({} if kind == "reference" else {"mask": square_mask()})
    a, b = (
        darkroom.load(tmp_path / "model", device="cpu", dtype=dtype)("a rocket", seed=1, steps=2, **shown)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert 0 < ((a.latents - b.latents).norm() / a.latents.norm()).item() < 0.2
