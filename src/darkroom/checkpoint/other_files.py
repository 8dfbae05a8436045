"""Files of tensors that are no models: LoRAs, ControlNets, words, halves. No torch here."""

import re
from dataclasses import dataclass

from darkroom.checkpoint.formats.header import Shapes
from darkroom.checkpoint.upscaler_names import upscaler_title


@dataclass(frozen=True, kw_only=True)
class OtherFile:
    """What a file is, in which form, for which family if that shows, and what to say to who wants a model.

    `unknown` are names that do not belong in such a file.
    """

    kind: str
    form: str
    family: str | None
    refusal: str
    unknown: tuple[str, ...] = ()


LORA_REFUSAL = "looks like a LoRA, which changes a model and is none itself: give the file of a model"
CONTROLNET_REFUSAL = (
    "looks like a ControlNet: ControlNets steer a model and are no models: give the file of a model"
)

# Forms of LoRAs: the tensors that each has, and one name that no other form has.
LORA_TENSORS = {
    "kohya": r"lora_(unet|te\d?)_\w+\.(lora_(down|up|mid)\.weight|alpha|dora_scale)",
    "lycoris": r"(lora|lycoris)_\w+\.((hada|lokr)_\w+|lora_(down|up|mid)\.weight|alpha|dora_scale|diff(_b)?|"
    r"(lora_)?w\d\w*)",
    "peft": r"base_model\.model\..+\.(lora_[AB]\.(default\.)?weight|lora_magnitude_vector.*)",
    "xlabs": r".+_lora\d?\.(down|up)\.weight",
    "diffusers (old)": r".+(_lora|lora_linear_layer)\.(down|up)\.weight",
    "diffusers": r"(unet|transformer|text_encoder(_\d)?)\..+\.(lora_[AB]\.weight|lora_mag\w+|alpha)",
    "cloneofsimo": r"(unet|text_encoder):\d+:(up|down|rank)|<.+>",
    "comfyui": r"diffusion_model\..+\.(lora_([AB]|down|up)\.weight|alpha|diff(_b)?)",
    "black forest labs": r"(\w+_in|double_blocks|single_blocks|final_layer)(\..+)?\.(lora_[AB]\.(weight|bias)"
    r"|scale)",
}
LORA_TELLTALES = {
    "lycoris": r"\.(hada_w|lokr_w)|^(lora|lycoris)_.*\.diff$|^lycoris_",
    "kohya": r"^lora_(unet|te\d?)_",
    "peft": r"^base_model\.model\..*lora_",
    "cloneofsimo": r"^(unet|text_encoder):\d+:(up|down)$",
    "xlabs": r"\.processor\.\w+_lora\d\.",
    "diffusers (old)": r"\.processor\.\w+_lora\.|lora_linear_layer",
    "comfyui": r"^diffusion_model\..*lora_",
    "diffusers": r"^(unet|transformer|text_encoder(_\d)?)\..*lora_",
    "black forest labs": r"^\w+\..*lora_[AB]\.",
}
# The network that a LoRA changes, by names of its layers; where U-Nets differ in nothing else, by width.
LORA_NETWORKS = {
    "flux-dev": r"double_blocks|single_blocks|single_transformer_blocks",
    "sd3-medium": r"joint_blocks|(^|\.)transformer_blocks\.\d+\.attn\.",
    "sdxl": r"lora_te[12]_|text_encoder_2\.|lora_unet_(in|out)put_block|transformer_blocks[._][2-9]",
}
CONTEXT_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}
ANY_LORA = re.compile(
    r"^(unet|text_encoder):\d+:(up|down)$|(^|[._])lora[_.A-Z\d]|^lycoris_|\.(hada_w|lokr_w|oft_)|\.diff$",
    re.MULTILINE,
)

CONTROLNET = re.compile(r"^control_model\.|controlnet_|^input_hint_block\.", re.MULTILINE)
CONTROLNETS = {
    "flux-dev": r"^controlnet_x_embedder",
    "sd3-medium": r"^pos_embed_input",
    "sdxl": r"(add_embedding|label_emb)\.",
    "sd2": r"",  # by the width of what is told
}
OTHERS = {
    r"^(ip_adapter|image_proj|redux_up)\.": (
        "picture prompts",
        "makes prompts of pictures and is no model: give the file of one",
    ),
    r"^(emb_params|clip_l|clip_g|string_to_param.*)$|\A<[^>\n]+>\Z": (
        "textual inversion",
        "is a textual inversion, a word and no model: give the file of a model",
    ),
    r"(^|\.)(absmax|quant_map|quant_state\..*)$": (
        "quantised model",
        "holds weights quantised to 4 bits by bitsandbytes, which are not read: give full ones",
    ),
    r"^cond_stage_model\.channel_mapper\.": (
        "semantic synthesis",
        "is the 2021 model that paints segmentations: it is not known",
    ),
    r"\A(\d+\.(conv\.\d+\.|pool\.\d+\.)?(weight|bias)(\n|\Z))+\Z": (
        "half of a tiny autoencoder",
        "is half of a tiny autoencoder: the other half must lie beside it, named the same but for "
        "`encoder` or `decoder`",
    ),
    r"^(conv_first|model\.0)\.weight$": ("upscaler", "is an upscaler and no model: give the file of a model"),
    r"^(regression|diffusion)\.conv_in\.weight$": (
        "refine networks",
        "puts detail back into a model's pictures and is no model: give the model's folder",
    ),
    r"^vision_model\.": ("picture encoder", "is an encoder of pictures and no model: give the file of one"),
}


def other_file(shapes: Shapes) -> OtherFile | None:
    """What a file is that is no model and no part of one; None where nothing says so."""
    names = "\n".join(shapes)
    if ANY_LORA.search(names) and not CONTROLNET.search(names):
        return _lora(shapes, names)
    if CONTROLNET.search(names):
        return _controlnet(shapes, names)
    if title := upscaler_title(shapes):
        kind, refusal = "upscaler", "is an upscaler and no model: give the file of a model"
        return OtherFile(kind=kind, form=title, family=None, refusal=refusal)
    for pattern, (kind, refusal) in OTHERS.items():
        if re.search(pattern, names, re.MULTILINE):
            return OtherFile(kind=kind, form=kind, family=None, refusal=refusal)
    return None


def _lora(shapes: Shapes, names: str) -> OtherFile:
    forms = (form for form, pattern in LORA_TELLTALES.items() if re.search(pattern, names, re.MULTILINE))
    form = next(forms, "unknown form")
    tensors = re.compile(LORA_TENSORS.get(form, r".*"))
    unknown = tuple(name for name in shapes if not tensors.fullmatch(name))
    family = _lora_family(shapes, names)
    return OtherFile(kind="LoRA", form=form, family=family, refusal=LORA_REFUSAL, unknown=unknown)


def _lora_family(shapes: Shapes, names: str) -> str | None:
    for family, pattern in LORA_NETWORKS.items():
        if family != "sdxl" and re.search(pattern, names, re.MULTILINE):
            return family
    told = r"attn2[._](processor\.)?to_k(_lora)?\.?(lora_down|lora_A|down|hada_w1_b)"
    width = _width(shapes, told)
    if width in CONTEXT_WIDTHS:
        return CONTEXT_WIDTHS[width]
    return "sdxl" if re.search(LORA_NETWORKS["sdxl"], names, re.MULTILINE) else _by_text(shapes)


def _by_text(shapes: Shapes) -> str:
    """A LoRA of a text encoder alone: SD 2's is wider than SD 1's, whose SDXL has too."""
    return "sd2" if _width(shapes, r"q_proj\.(lora_down|lora_A)") == 1024 else "sd1"


def _width(shapes: Shapes, pattern: str) -> int | None:
    """The inputs of the first layer of this name."""
    search = re.compile(pattern).search
    return next((shape[1] for name, shape in shapes.items() if search(name) and len(shape) > 1), None)


def _controlnet(shapes: Shapes, names: str) -> OtherFile:
    original = re.search(r"^(control_model\.|input_hint_block\.)", names, re.MULTILINE)
    form = "original" if original else "diffusers"
    family = next(name for name, pattern in CONTROLNETS.items() if re.search(pattern, names, re.MULTILINE))
    if family == "sd2":
        family = CONTEXT_WIDTHS.get(_width(shapes, r"attn2\.to_k\.weight") or 0) or _by_projection(shapes)
    return OtherFile(kind="ControlNet", form=form, family=family, refusal=CONTROLNET_REFUSAL)


def _by_projection(shapes: Shapes) -> str:
    """SD 2 projects by matrices what SD 1 projects by convs."""
    flat = any(name.endswith("proj_in.weight") and len(shape) == 2 for name, shape in shapes.items())
    return "sd2" if flat else "sd1"
