"""What files with scaled float8 weights hold beside the weights, by name. No torch here."""

from collections.abc import Container, Iterable

MARKER = "scaled_fp8"  # one for each model of a file, under its prefix
# The second name of each is the newer one.
WEIGHT_SCALES = ("scale_weight", "weight_scale")
INPUT_SCALES = ("scale_input", "input_scale")
LAYER_FORMAT = "comfy_quant"  # JSON as bytes
SUFFIXES = (*WEIGHT_SCALES, *INPUT_SCALES, LAYER_FORMAT)


def fp8_companions(names: Iterable[str]) -> frozenset[str]:
    """Those of `names` that say how the float8 weights beside them are scaled.

    They are `X.scale_weight` and `X.scale_input` (or `X.weight_scale`, `X.input_scale`, `X.comfy_quant`)
    where there is `X.weight`, and the marker `scaled_fp8` under any prefix.
    """
    present = frozenset(names)
    return frozenset(name for name in present if _is_companion(name, present))


def _is_companion(name: str, present: frozenset[str]) -> bool:
    layer, _, last = name.rpartition(".")
    return last == MARKER or (last in SUFFIXES and f"{layer}.weight" in present)


def weight_scale(weight: str, names: Container[str]) -> str | None:
    """The one of `names` that holds the scale of the tensor `weight`, if it has one."""
    layer, _, last = weight.rpartition(".")
    choices = [f"{layer}.{suffix}" for suffix in WEIGHT_SCALES] if last == "weight" else []
    return next((name for name in choices if name in names), None)
