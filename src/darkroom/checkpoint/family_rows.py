"""Which family a denoising network is of, by facts that names and shapes show. No torch here."""

from collections.abc import Callable
from dataclasses import dataclass, field

from darkroom.checkpoint.formats.header import Shapes
from darkroom.errors import InputError


@dataclass(frozen=True)
class Row:
    """A family by facts about its network, others being free, and the heads, which shapes leave open."""

    family: str
    kind: str
    facts: dict[str, object]
    heads: dict[str, int] = field(default_factory=dict)


EIGHT, ONE = {"num_heads": 8}, {"num_heads": 1}
WIDE, NARROW = {"head_width": 64}, {"head_width": 32}


def _unet_row(family: str, heads: dict[str, int], inputs: int, context: int | None, **facts: object) -> Row:
    given = {"inputs": inputs, "context": context, "pooled": None, "labels": None}
    return Row(family, "unet", given | facts, heads)


# The first row that fits decides.
ROWS = (
    _unet_row("sd1", EIGHT, 4, 768),
    _unet_row("sd1-inpainting", EIGHT, 9, 768),
    _unet_row("sd2", WIDE, 4, 1024),
    _unet_row("sd2-inpainting", WIDE, 9, 1024),
    _unet_row("sd2-depth", WIDE, 5, 1024),
    _unet_row("sd-x4-upscaler", EIGHT, 7, 1024, labels=1000),
    _unet_row("playground-v2.5", WIDE, 4, 2048, pooled=2816, edm=True),
    _unet_row("sdxl", WIDE, 4, 2048, pooled=2816),
    _unet_row("sdxl-refiner", WIDE, 4, 1280, pooled=2560),
    _unet_row("ldm-cin256", ONE, 3, 512),
    _unet_row("ldm-cin256-f8", EIGHT, 4, 512),
    _unet_row("ldm-text2img256", NARROW, 3, 640),
    _unet_row("ldm-text2img-large", EIGHT, 4, 1280),  # the 1.45B one
    _unet_row("ldm-unconditional", NARROW, 3, None),
    _unet_row("ldm-churches256", EIGHT, 4, None),
    _unet_row("ldm-super-resolution", NARROW, 6, None),
    _unet_row("ldm-inpainting", EIGHT, 7, None),
    Row("sd3-medium", "mmdit", {"norm": False, "dual": False}),
    Row("sd3.5-medium", "mmdit", {"norm": True, "dual": True}),
    Row("sd3.5-large", "mmdit", {"norm": True, "dual": False}),
    Row("flux-dev", "flux", {"inputs": 64, "guidance": True}),
    Row("flux-schnell", "flux", {"inputs": 64, "guidance": False}),
    Row("flux-fill", "flux", {"inputs": 384}),
    Row("flux-control", "flux", {"inputs": 128}),
    Row("dit-xl-2-256", "dit", {"tokens": 256}),
    Row("dit-xl-2-512", "dit", {"tokens": 1024}),
)


def find_row(kind: str, shapes: Shapes, *, edm: bool = False) -> Row:
    """What is known of the family whose network has such tensors, under the original release's names or
    diffusers'.

    Raises InputError, which says what the network looks like, where no family has such a one.
    """
    facts = FACTS[kind](shapes) | {"edm": edm}
    for row in ROWS:
        if row.kind == kind and row.facts.items() <= facts.items():
            return row
    raise InputError(f"its {kind} ({describe(kind, shapes)}) is of no family that is known")


def describe(kind: str, shapes: Shapes) -> str:
    """The facts that tell families of this kind apart."""
    return ", ".join(f"{name} {value}" for name, value in FACTS[kind](shapes).items())


def _axis(shapes: Shapes, axis: int, *names: str) -> int | None:
    """The length along an axis of the first of these tensors that is there."""
    found = (shapes[name] for name in names if name in shapes)
    return next((shape[axis] for shape in found if len(shape) > axis), None)


def _unet_facts(shapes: Shapes) -> dict[str, object]:
    context = next((n for n in shapes if n.endswith("attn2.to_k.weight")), "")
    return {
        "inputs": _axis(shapes, 1, "input_blocks.0.0.weight", "conv_in.weight"),
        "context": _axis(shapes, 1, context),
        "pooled": _axis(shapes, 1, "label_emb.0.0.weight", "add_embedding.linear_1.weight"),
        "labels": _axis(shapes, 0, "label_emb.weight", "class_embedding.weight"),
    }


def _mmdit_facts(shapes: Shapes) -> dict[str, object]:
    ours, theirs = "joint_blocks.0.x_block.", "transformer_blocks.0."
    return {
        "norm": ours + "attn.ln_q.weight" in shapes or theirs + "attn.norm_q.weight" in shapes,
        "dual": ours + "attn2.qkv.weight" in shapes or theirs + "attn2.to_q.weight" in shapes,
    }


def _flux_facts(shapes: Shapes) -> dict[str, object]:
    guidance = ("guidance_in.in_layer.weight", "time_text_embed.guidance_embedder.linear_1.weight")
    return {
        "inputs": _axis(shapes, 1, "img_in.weight", "x_embedder.weight"),
        "guidance": any(name in shapes for name in guidance),
    }


FACTS: dict[str, Callable[[Shapes], dict[str, object]]] = {
    "unet": _unet_facts,
    "mmdit": _mmdit_facts,
    "flux": _flux_facts,
    "dit": lambda shapes: {"tokens": _axis(shapes, 1, "pos_embed")},
}
