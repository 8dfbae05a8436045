"""Guidance against diffusers': its guiders, and its networks with perturbed attention or layers left out."""

import logging
from functools import partial
from typing import Any

import pytest
import torch
from tests.closeness import assert_parity
from tests.networks import with_unit_gain
from tests.parity.pipelines import recorded, sd3, unet
from torch import Tensor, nn

from darkroom.checkpoint.configs.unet import unet_config_from_diffusers
from darkroom.checkpoint.layouts import dit_to_diffusers, flux_to_diffusers, mmdit_to_diffusers
from darkroom.diffusion.denoiser import Condition, Denoiser
from darkroom.diffusion.guidance import Guide, GuidedDenoiser, make_guide
from darkroom.diffusion.guidance_settings import (
    APG,
    Autoguidance,
    CFGZeroStar,
    Guidance,
    PerturbedAttention,
    SkipLayers,
)
from darkroom.diffusion.path import DiscretePath, EDMPath, FlowPath
from darkroom.diffusion.samplers.first_order import euler
from darkroom.nn.attention import alone_mask
from darkroom.nn.dit import DiT, DiTConfig
from darkroom.nn.extra import Extra
from darkroom.nn.flux import Flux, FluxConfig, pack, positions
from darkroom.nn.mmdit import MMDiT, MMDiTConfig
from darkroom.nn.unet import UNet

pytest.importorskip("diffusers")
import diffusers
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
)
from diffusers.guiders.guider_utils import rescale_noise_cfg
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0, PAGJointAttnProcessor2_0

logging.getLogger("diffusers").setLevel(logging.ERROR)

SHAPE = (3, 4, 6, 5)
SCALE = 5.5
STEPS = 10
SPACES = {
    "flow": (FlowPath(), "flow"),
    "eps": (DiscretePath(), "eps"),
    "v": (DiscretePath(), "v"),
    "edm": (EDMPath(), "edm"),
    "x0": (DiscretePath(), "x0"),
}


class Answers(nn.Module):
    """A network of classes that answers with what it was given for each class, row by row."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs
        self.layers = range(4)

    def forward(self, x: Tensor, timestep: Tensor, context: None, *, extra: Extra) -> Tensor:
        assert extra.class_labels is not None
        kind = extra.class_labels if not (extra.skip or extra.perturbed) else extra.class_labels + 2
        return torch.stack([self.outputs[k, i % SHAPE[0]] for i, k in enumerate(kind.tolist())])


def outputs(seed: int = 0) -> Tensor:
    """With and without the prompt, and made worse: unlike in size, and in part alike."""
    generator = torch.Generator().manual_seed(seed)
    common, *own = torch.randn(4, *SHAPE, dtype=torch.float64, generator=generator)
    sizes = (1.0, 0.7, 1.3)
    return torch.stack([size * (common + 0.6 * one) for size, one in zip(sizes, own, strict=True)])


def told(label: int) -> Condition:
    return Condition(None, Extra(class_labels=torch.full((SHAPE[0],), label)))


def levels(path: Any) -> list[float]:
    return [path.sigma_max * 0.95 * (1 - k / STEPS) for k in range(STEPS)] + [0.0]


def ours(
    guidance: Guidance, space: str, step: int = 3, guide: Guide | None = None, answers: Tensor | None = None
) -> Tensor:
    """The output that our guided estimate means at a step."""
    path, prediction = SPACES[space]
    denoiser = Denoiser(Answers(outputs() if answers is None else answers), path, prediction)
    sigmas = levels(path)
    guide = guide or make_guide(guidance, SCALE, denoiser, sigmas)
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * sigmas[step]
    guided = GuidedDenoiser(denoiser, told(0), told(1), guide, sigmas)(x, sigmas[step])
    return denoiser.to_output(x, guided.value, sigmas[step])


def theirs(guider: Any, step: int = 3, answers: Tensor | None = None) -> Tensor:
    guider.set_state(step, STEPS, None)
    cond, uncond, worse = outputs() if answers is None else answers
    names = {"pred_cond": cond, "pred_uncond": uncond, "pred_cond_skip": worse}
    return guider.forward(**{n: names[n] for n in guider._input_predictions}).pred


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("share", [0.7, 1.0])
def test_rescale(space: str, share: float) -> None:
    cond, uncond, _ = outputs()
    guided = uncond + SCALE * (cond - uncond)
    expected = rescale_noise_cfg(guided, cond, share)
    assert_parity(ours(Guidance(rescale=share), space), expected)
    assert (expected - guided).norm() > 0.3 * guided.norm()


@pytest.mark.parametrize("space", SPACES)
def test_zero_star(space: str) -> None:
    guider = ClassifierFreeZeroStarGuidance(guidance_scale=SCALE, zero_init_steps=0)
    assert_parity(ours(Guidance(zero_star=CFGZeroStar(zero_steps=0)), space), theirs(guider))


def test_zero_star_with_its_first_steps() -> None:
    guidance = Guidance(zero_star=CFGZeroStar(zero_steps=2))
    guider = ClassifierFreeZeroStarGuidance(guidance_scale=SCALE, zero_init_steps=2)
    for step in (0, 1):
        assert (ours(guidance, "flow", step) == theirs(guider, step)).all()
    assert_parity(ours(guidance, "flow", 2), theirs(guider, 2))


@pytest.mark.parametrize(
    ("eta", "threshold", "momentum"), [(0.0, 8.0, -0.5), (0.4, None, 0.0), (1.0, 6.0, 0.3), (0.0, 1e3, -0.75)]
)
def test_projection_over_a_run(eta: float, threshold: float | None, momentum: float) -> None:
    """Theirs is in the network's output, ours in clean latents, as in the paper: alike where they are it."""
    guidance = Guidance(apg=APG(eta=eta, norm_threshold=threshold, momentum=momentum))
    path, prediction = SPACES["x0"]
    denoiser = Denoiser(Answers(outputs()), path, prediction)
    guide = make_guide(guidance, SCALE, denoiser, levels(path))
    guider = AdaptiveProjectedGuidance(
        guidance_scale=SCALE - 1,
        adaptive_projected_guidance_momentum=momentum or None,
        adaptive_projected_guidance_rescale=threshold or 0.0,
        eta=eta,
        use_original_formulation=True,  # that of the paper's algorithm
    )
    if momentum:
        guider.momentum_buffer = diffusers.guiders.adaptive_projected_guidance.MomentumBuffer(momentum)
    for step in range(4):
        answers = outputs(step)
        assert_parity(ours(guidance, "x0", step, guide, answers), theirs(guider, step, answers))


def test_projection_acts_on_clean_latents() -> None:
    """Also where the network answers with something else: the same estimates, the same result."""
    guidance = Guidance(apg=APG(norm_threshold=1.0))
    path, prediction = SPACES["flow"]
    sigmas, clean = levels(path), outputs()
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * sigmas[3]
    velocity = Denoiser(nn.Identity(), path, prediction).to_output(x, clean, sigmas[3])
    denoiser = Denoiser(Answers(velocity), path, prediction)
    guide = make_guide(guidance, SCALE, denoiser, sigmas)
    guided = GuidedDenoiser(denoiser, told(0), told(1), guide, sigmas)(x, sigmas[3])
    assert_parity(guided.value, ours(guidance, "x0"))


@pytest.mark.parametrize("step", [0, 1, 3, 5, 6, 9])
def test_skipped_layers_and_their_window(step: int) -> None:
    guider = SkipLayerGuidance(
        guidance_scale=SCALE,
        skip_layer_guidance_scale=2.8,
        skip_layer_guidance_start=0.1,
        skip_layer_guidance_stop=0.6,
        skip_layer_guidance_layers=[1],
    )
    guidance = Guidance(skip_layers=SkipLayers(layers=(1,), start=0.1, stop=0.6))
    assert_parity(ours(guidance, "flow", step), theirs(guider, step))


def test_perturbed_attention_with_rescale() -> None:
    guider = PerturbedAttentionGuidance(
        guidance_scale=SCALE,
        perturbed_guidance_scale=3.0,
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
        perturbed_guidance_layers=[1],
        guidance_rescale=0.4,
    )
    guidance = Guidance(perturbed=PerturbedAttention(layers=(1,)), rescale=0.4)
    assert_parity(ours(guidance, "eps"), theirs(guider))


def test_autoguidance() -> None:
    """With a scale of 1 beside it, theirs: from the weaker model's estimate to the conditional one."""
    path, prediction = SPACES["v"]
    cond, _, worse = outputs()
    weaker = Denoiser(Answers(torch.stack([worse, worse, worse])), path, prediction)
    denoiser, sigmas = Denoiser(Answers(outputs()), path, prediction), levels(path)
    guide = make_guide(Guidance(autoguidance=Autoguidance(weaker=weaker, scale=2.2)), 1.0, denoiser, sigmas)
    guider = AutoGuidance(guidance_scale=2.2, auto_guidance_layers=[0], dropout=0.1)
    expected = theirs(guider, answers=torch.stack([cond, worse, worse]))
    assert_parity(ours(Guidance(), "v", guide=guide), expected)


@pytest.mark.parametrize("step", range(STEPS))
def test_an_interval(step: int) -> None:
    guider = ClassifierFreeGuidance(guidance_scale=SCALE, start=0.2, stop=0.7)
    assert_parity(ours(Guidance(interval=(0.2, 0.7)), "edm", step), theirs(guider, step))


def perturb(model: nn.Module, prefix: str, processor: Any) -> None:
    """Give the self-attentions of a network of diffusers under a name another processor."""
    found = [
        module
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, diffusers.models.attention_processor.Attention)
        if not module.is_cross_attention
    ]
    assert found
    for module in found:
        module.set_processor(processor)


@torch.no_grad()
def perturbed_half(model: nn.Module, x: Tensor, *rest: Any, **named: Any) -> Tensor:
    """What a network of diffusers answers when the second half of its batch is perturbed."""
    double = partial(torch.cat, dim=0)
    arguments = [double([t, t]) for t in (x, *rest)]
    output = model(*arguments, **{n: double([t, t]) for n, t in named.items()}).sample
    return output.chunk(2)[1]


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("mid", "mid_block"), ("down.1", "down_blocks.1"), ("up.0.1", "up_blocks.0.attentions.1")],
)
def test_perturbed_unet(name: str, prefix: str) -> None:
    model = unet(16)
    network = UNet(unet_config_from_diffusers(dict(model.config))).eval()
    network.load_state_dict(model.state_dict(), strict=True)
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 16, generator=generator)
    timestep = torch.tensor([10.0, 700.0])
    with torch.no_grad():
        output = network(x, timestep, context, extra=Extra(perturbed=(name,)))
        plain = network(x, timestep, context)
    perturb(model, prefix, PAGIdentitySelfAttnProcessor2_0())
    assert_parity(output, perturbed_half(model, x, timestep, context))
    assert (output - plain).norm() > 1e-3 * plain.norm()


def test_perturbed_unet_without_text() -> None:
    model = with_unit_gain(
        diffusers.UNet2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=8,
            norm_num_groups=8,
            add_attention=True,
        ),
        3,
    )
    fields = dict(model.config) | {"_class_name": "UNet2DModel"}
    network = UNet(unet_config_from_diffusers(fields)).eval()
    network.load_state_dict(model.state_dict(), strict=True)
    x, timestep = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 700.0])
    with torch.no_grad():
        output = network(x, timestep, None, extra=Extra(perturbed=("mid", "up.0")))
    for prefix in ("mid_block", "up_blocks.0"):
        perturb(model, prefix, PAGIdentitySelfAttnProcessor2_0())
    assert_parity(output, perturbed_half(model, x, timestep))


def test_perturbed_dit() -> None:
    config = DiTConfig(
        width=32, depth=3, num_heads=4, in_channels=4, out_channels=8, sample_size=8, num_classes=5
    )
    model = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=5,
        norm_eps=1e-6,
    ).eval()
    network = with_unit_gain(DiT(config))
    model.load_state_dict(dit_to_diffusers(config)(network.state_dict()), strict=True)
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, timestep, labels = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 800.0]), torch.tensor([1, 4])
    with torch.no_grad():
        output = network(x, timestep, None, extra=Extra(class_labels=labels, perturbed=(1, 2)))
    for number in (1, 2):
        perturb(model, f"transformer_blocks.{number}", PAGIdentitySelfAttnProcessor2_0())
    assert_parity(output, perturbed_half(model, x, timestep, labels))


def sd3_pair(**fields: Any) -> tuple[MMDiT, Any]:
    """Our network of Stable Diffusion 3 and diffusers', of four blocks with the same weights."""
    config = MMDiTConfig(
        depth=4, num_heads=4, head_width=8, context_dim=40, pooled_dim=32, positions=12, **fields
    )
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=40,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=12,
        qk_norm="rms_norm" if config.qk_norm else None,
        dual_attention_layers=tuple(range(config.dual_layers)),
    ).eval()
    network = MMDiT(config)
    network.pos_embed = model.pos_embed.pos_embed
    with_unit_gain(network)
    model.load_state_dict(mmdit_to_diffusers(4)(network.state_dict()), strict=True)
    return network, model


def sd3_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 16, 8, 6, generator=generator), torch.randn(2, 5, 40, generator=generator)
    return x, context, torch.randn(2, 32, generator=generator), torch.tensor([30.0, 900.0])


@pytest.mark.parametrize("layers", [(1,), (0, 3)])
def test_perturbed_mmdit(layers: tuple[int, ...]) -> None:
    network, model = sd3_pair()
    x, context, pooled, timestep = sd3_inputs()
    with torch.no_grad():
        output = network(x, timestep, context, extra=Extra(pooled=pooled, perturbed=layers))
    for number in layers:
        perturb(model, f"transformer_blocks.{number}.", PAGJointAttnProcessor2_0())
    assert_parity(output, perturbed_half(model, x, context, pooled, timestep))


@pytest.mark.parametrize("layers", [(1, 2), (0,), (3,)])
def test_mmdit_without_layers(layers: tuple[int, ...]) -> None:
    network, model = sd3_pair(qk_norm=True, dual_layers=2)
    x, context, pooled, timestep = sd3_inputs()
    with torch.no_grad():
        output = network(x, timestep, context, extra=Extra(pooled=pooled, skip=layers))
        expected = model(x, context, pooled, timestep, skip_layers=list(layers)).sample
    assert_parity(output, expected)


def test_perturbed_flux() -> None:
    """diffusers has no such pipeline: its attention, given the mask that its pipeline for SD 3 makes."""
    config = FluxConfig(
        double_blocks=2, single_blocks=2, num_heads=2, axes=(4, 6, 6), context_dim=12, pooled_dim=10
    )
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        out_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    network = with_unit_gain(Flux(config))
    model.load_state_dict(flux_to_diffusers()(network.state_dict()), strict=True)
    x, context, pooled = torch.randn(2, 16, 8, 6), torch.randn(2, 5, 12), torch.randn(2, 10)
    timestep, scale = torch.tensor([30.0, 900.0]), torch.tensor([3.5, 1.0])
    places = positions(5, [(4, 3)]).float()
    mask = alone_mask(5, 12, x.device)
    assert mask.sum().item() == 17 * 17 - 12 * 11
    for block in (model.transformer_blocks[1], model.single_transformer_blocks[0]):
        plain = block.attn.processor
        block.attn.processor = partial(_masked, plain, mask[None, None])
    with torch.no_grad():
        extra = Extra(pooled=pooled, guidance=scale, perturbed=(1, 2))
        output = network(x, timestep, context, extra=extra)
        expected = model(
            pack(x),
            context,
            pooled,
            timestep / 1000,
            img_ids=places[5:],
            txt_ids=places[:5],
            guidance=scale,
        ).sample
    assert_parity(pack(output), expected)


def _masked(
    plain: Any,
    mask: Tensor,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: None = None,
    image_rotary_emb: Any = None,
) -> Any:
    return plain(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


def test_skipped_layers_in_the_pipeline_of_sd3(tmp_path: Any) -> None:
    """All steps of `StableDiffusion3Pipeline` with its skip-layer guidance."""
    pipe = sd3(tmp_path, t5_too=False)
    network, model = sd3_pair(qk_norm=True, dual_layers=2)
    pipe.transformer = model
    latents = recorded(pipe)
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(1, 16, 8, 8, generator=generator)
    context, pooled = (
        torch.randn(2, 1, 5, 40, generator=generator),
        torch.randn(2, 1, 32, generator=generator),
    )
    pipe(
        prompt_embeds=context[0],
        negative_prompt_embeds=context[1],
        pooled_prompt_embeds=pooled[0],
        negative_pooled_prompt_embeds=pooled[1],
        latents=start,
        height=64,
        width=64,
        num_inference_steps=10,
        guidance_scale=4.0,
        skip_guidance_layers=[1, 2],
        skip_layer_guidance_start=0.1,
        skip_layer_guidance_stop=0.6,
        output_type="latent",
    )
    denoiser, sigmas = Denoiser(network, FlowPath(shift=3.0), "flow"), pipe.scheduler.sigmas.tolist()
    guidance = Guidance(skip_layers=SkipLayers(layers=(1, 2), start=0.1, stop=0.6))
    guide = make_guide(guidance, 4.0, denoiser, sigmas)
    conds = [Condition(c, Extra(pooled=p)) for c, p in zip(context, pooled, strict=True)]
    steps = euler(GuidedDenoiser(denoiser, conds[0], conds[1], guide, sigmas), start, sigmas)
    for step, expected in zip(steps, latents, strict=True):
        assert_parity(step.x, expected)


def test_the_pipeline_with_perturbed_attention() -> None:
    """All steps of `StableDiffusionPAGPipeline`, rescaled as well."""
    model = unet(16)
    network = UNet(unet_config_from_diffusers(dict(model.config))).eval()
    network.load_state_dict(model.state_dict(), strict=True)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    pipe = diffusers.StableDiffusionPAGPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=model,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    latents = recorded(pipe)
    generator = torch.Generator().manual_seed(3)
    start, context = (
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.randn(2, 1, 7, 16, generator=generator),
    )
    pipe(
        prompt_embeds=context[0],
        negative_prompt_embeds=context[1],
        latents=start,
        height=64,
        width=64,
        num_inference_steps=6,
        guidance_scale=4.0,
        pag_scale=2.5,
        guidance_rescale=0.6,
        output_type="latent",
    )
    denoiser, sigmas = Denoiser(network, DiscretePath(), "eps"), pipe.scheduler.sigmas.tolist()
    guide = make_guide(Guidance(perturbed=PerturbedAttention(scale=2.5), rescale=0.6), 4.0, denoiser, sigmas)
    guided = GuidedDenoiser(denoiser, Condition(context[0]), Condition(context[1]), guide, sigmas)
    for step, expected in zip(euler(guided, start * sigmas[0], sigmas), latents, strict=True):
        assert_parity(step.x, expected)
