"""Upscalers by the names and shapes of their tensors, whatever program wrote them. No torch here."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from darkroom.checkpoint.formats.header import Shapes
from darkroom.errors import InputError, some

UpscalerKind = Literal["rrdbnet", "compact", "span"]

# What programs put before every name; of two sets of weights the average comes first.
PREFIXES = ("params_ema.", "params.", "state_dict.", "generator.", "netG.", "module.")
# A name that only this kind has, in any of its layouts.
TELLTALES: dict[UpscalerKind, str] = {
    "rrdbnet": r"^(body|RRDB_trunk|model\.1\.sub)\.\d+\.(rdb|RDB)1\.conv1(\.0)?\.weight$",
    "span": r"^block_1\.c1_r\.(eval_conv|sk)\.weight$",
    "compact": r"^body\.1\.weight$",
}
TITLES: dict[UpscalerKind, str] = {"rrdbnet": "ESRGAN", "compact": "Real-ESRGAN compact", "span": "SPAN"}
READ = "ESRGAN and Real-ESRGAN (RRDBNet), Real-ESRGAN compact (SRVGGNetCompact) and SPAN"
# Upscalers that are not read, by a name that each has.
OTHERS = {
    r"^layers\.\d+\.residual_group\.blocks\.\d+\.attn\.relative_position_bias_table$": "SwinIR",
    r"^layers\.\d+\.residual_group\.blocks\.\d+\.attn\.qkv": "SwinIR or Swin2SR",
    r"^layers\.\d+\.residual_group\.overlap_attn\.": "HAT",
    r"^layers\.\d+\.blocks\.\d+\.attn\.attns\.\d+\.": "DAT",
    r"^unet\d\.conv\d\.": "Real-CUGAN",
    r"^m_(head|down\d|body|up\d|tail)\.": "SCUNet or DRUNet",
    r"^feats\.\d+\.(lk|channe_mixer|channel_mixer)\.": "PLKSR",
    r"^residual_layer\.\d+\.residual_layer\.": "OmniSR",
    r"^feats\.\d+\.(safm|ccm)\.": "SAFMN",
    r"^body\.2\.weight$": "Real-ESRGAN compact with other rectifiers than PReLU",
    r"^conv_first\.weight$": "an upscaler of the kind of EDSR",
}
# SPAN's branches of a conv in training: one of 1 x 1, beside three in a row.
BRANCHES = tuple(
    f"{layer}.{part}" for layer in ("sk", "conv.0", "conv.1", "conv.2") for part in ("weight", "bias")
)

DIRECT = re.compile(r"model\.(\d+)\.weight")
OLD_CONV = re.compile(r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.(weight|bias)")
OLD_SHORTCUT = re.compile(r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv1x1\.weight")
OLD_BODY_END = re.compile(r"model\.1\.sub\.\d+\.(weight|bias)")
OLD_OTHER = re.compile(r"model\.(\d+)\.(weight|bias)")
BSRGAN_NAMES = (
    (re.compile(r"RRDB_trunk\.(\d+)\.RDB(\d)\."), r"body.\1.rdb\2."),
    (re.compile(r"trunk_conv\."), "conv_body."),
    (re.compile(r"HRconv\."), "conv_hr."),
    (re.compile(r"upconv(\d)\."), r"conv_up\1."),
)
SPAN_PART = re.compile(r"\.(sk|conv\.\d|eval_conv)\.(weight|bias)$")
NUMBERED_UP = re.compile(r"conv_up(\d)\.")


@dataclass(frozen=True, kw_only=True)
class UpscalerReading:
    """What an upscaler is: the numbers of its config, and its tensors' names in the file by ours.

    `branched` are our names of SPAN's convs whose branches are still to be joined; their names lead to the
    prefix of the branches.
    """

    kind: UpscalerKind
    scale: int
    numbers: dict[str, int | bool]
    names: dict[str, str]
    branched: dict[str, str]

    @property
    def title(self) -> str:
        """Its kind and size, such as "ESRGAN x4, 23 blocks of 64 channels"."""
        depth = {"rrdbnet": "blocks", "compact": "convs"}.get(self.kind)
        parts = f"{self.numbers[depth]} {depth}" if depth else "6 blocks"
        plus = "+" if self.numbers.get("plus") else ""
        return f"{TITLES[self.kind]}{plus} x{self.scale}, {parts} of {self.numbers['width']} channels"


def read_upscaler(where: object, shapes: Shapes) -> UpscalerReading:
    """Say what upscaler a file's tensors are.

    A x3 ESRGAN in the oldest layout is taken for x2: nothing in the file tells. Raises InputError, which
    starts with `where`, for other files, with what they are or come near to.
    """
    prefix = _prefix(shapes)
    bare = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    kind = _kind(bare)
    if kind is None:
        raise InputError(f"{where}: {_what_it_is(bare)}. Upscalers that are read: {READ}")
    try:
        reading = READERS[kind](bare)
    except KeyError as error:
        raise InputError(f"{where}: looks like {TITLES[kind]}, but lacks {error}") from error
    except ValueError as error:
        raise InputError(f"{where}: looks like {TITLES[kind]}, but {error}") from error
    named = {ours: prefix + theirs for ours, theirs in reading.names.items()}
    branched = {ours: prefix + theirs for ours, theirs in reading.branched.items()}
    return UpscalerReading(
        kind=kind, scale=reading.scale, numbers=reading.numbers, names=named, branched=branched
    )


def upscaler_title(shapes: Shapes) -> str | None:
    """What upscaler a file's tensors are, in a few words; None where they are no upscaler that is read."""
    prefix = _prefix(shapes)
    kind = _kind([name.removeprefix(prefix) for name in shapes if name.startswith(prefix)])
    if kind is None:
        return None
    try:
        return read_upscaler("", shapes).title
    except InputError:  # damaged, or for other pictures than RGB ones
        return TITLES[kind]


def _prefix(names: Iterable[str]) -> str:
    """What stands before the names, several words too: "params_ema.module."."""
    prefix, left = "", list(names)
    while found := next((p for p in PREFIXES if any(name.startswith(p) for name in left)), None):
        prefix += found
        left = [name.removeprefix(found) for name in left if name.startswith(found)]
    return prefix


def _kind(names: Iterable[str]) -> UpscalerKind | None:
    text = "\n".join(names)
    return next((k for k, pattern in TELLTALES.items() if re.search(pattern, text, re.MULTILINE)), None)


def _what_it_is(shapes: Shapes) -> str:
    """What a file is that is no upscaler that is read, or what it comes nearest to."""
    from darkroom.checkpoint.other_files import other_file

    text = "\n".join(shapes)
    known = (what for pattern, what in OTHERS.items() if re.search(pattern, text, re.MULTILINE))
    if what := next(known, None):
        return f"looks like {what}, which is not read"
    other = other_file(shapes)
    if other is not None and other.kind != "upscaler":
        return f"looks like a {other.kind}, and is no upscaler"
    return f"is no upscaler that is known: it has {some(shapes)}"


def _read_rrdbnet(shapes: Shapes) -> UpscalerReading:
    ours = _rrdbnet_names(shapes)
    if len(ours) < len(shapes):
        raise ValueError("has the same tensors in two layouts")
    sizes = {name: shapes[theirs] for name, theirs in ours.items()}
    growth, width = _conv(sizes, "body.0.rdb1.conv1.weight")
    ups = {name.split(".")[1] for name in ours if name.startswith("conv_up.")}
    unshuffle = _fold(_conv(sizes, "conv_first.weight")[1], _conv(sizes, "conv_last.weight")[0])
    if 2 ** len(ups) % unshuffle:
        raise ValueError(
            f"folds the picture by {unshuffle} and doubles it {len(ups)} times, to a smaller one"
        )
    numbers: dict[str, int | bool] = {
        "width": width,
        "growth": growth,
        # Counted, not read from the highest number, which a damaged file could make as large as it likes.
        "blocks": len({name.split(".")[1] for name in ours if name.startswith("body.")}),
        "doublings": len(ups),
        "unshuffle": unshuffle,
        "plus": any(".conv1x1." in name for name in ours),
    }
    scale = 2 ** len(ups) // unshuffle
    return UpscalerReading(kind="rrdbnet", scale=scale, numbers=numbers, names=ours, branched={})


def _conv(shapes: Shapes, name: str) -> tuple[int, int]:
    """The channels that a conv gives and takes."""
    shape = shapes[name]
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"its {name} has shape {list(shape)}, where a conv should be")
    return shape[0], shape[1]


def _fold(many: int, plain: int) -> int:
    """The side of the squares of pixels that are channels at one end, given the channels of both ends."""
    side = math.isqrt(many // 3)
    if plain != 3 or many != 3 * side**2:
        raise ValueError(
            f"has {plain} channels at one end and {many} at the other: only RGB pictures are read"
        )
    return side


def _rrdbnet_names(shapes: Shapes) -> dict[str, str]:
    """Our names of an RRDBNet's tensors, and those of the file: of the release, of BSRGAN, or numbers."""
    if any(OLD_CONV.fullmatch(name) for name in shapes):
        direct = sorted(int(found[1]) for name in shapes if (found := DIRECT.fullmatch(name)))
        roles = ["conv_first", *(f"conv_up.{n}" for n in range(len(direct) - 3)), "conv_hr", "conv_last"]
        numbered = dict(zip(direct, roles, strict=False))
        return {_from_numbers(name, numbered): name for name in shapes}
    return {_from_words(name): name for name in shapes}


def _from_numbers(name: str, numbered: dict[int, str]) -> str:
    if found := OLD_CONV.fullmatch(name):
        return f"body.{found[1]}.rdb{found[2]}.conv{found[3]}.{found[4]}"
    if found := OLD_SHORTCUT.fullmatch(name):
        return f"body.{found[1]}.rdb{found[2]}.conv1x1.weight"
    if found := OLD_BODY_END.fullmatch(name):
        return f"conv_body.{found[1]}"
    if (found := OLD_OTHER.fullmatch(name)) and int(found[1]) in numbered:
        return f"{numbered[int(found[1])]}.{found[2]}"
    return name


def _from_words(name: str) -> str:
    for pattern, ours in BSRGAN_NAMES:
        name = pattern.sub(ours, name)
    return NUMBERED_UP.sub(lambda found: f"conv_up.{int(found[1]) - 1}.", name)


def _read_compact(shapes: Shapes) -> UpscalerReading:
    numbers = sorted({int(name.split(".")[1]) for name in shapes if re.match(r"body\.\d+\.", name)})
    width, seen = _conv(shapes, "body.0.weight")
    scale = _fold(_conv(shapes, f"body.{numbers[-1]}.weight")[0], seen)
    convs = (len(numbers) - 3) // 2  # each with a PReLU, beside the first two and the last conv
    if convs < 1:
        raise ValueError("has too few layers")
    config: dict[str, int | bool] = {"width": width, "convs": convs, "scale": scale}
    same = {name: name for name in shapes}
    return UpscalerReading(kind="compact", scale=scale, numbers=config, names=same, branched={})


def _read_span(shapes: Shapes) -> UpscalerReading:
    last, width = _conv(shapes, "upsampler.0.weight")
    scale = _fold(last, 3)
    numbers: dict[str, int | bool] = {
        "width": width,
        "scale": scale,
        "normalised": "no_norm" not in shapes,
    }
    branched = {name.removesuffix(".sk.weight") for name in shapes if name.endswith(".sk.weight")}
    for conv in branched:
        _check_branches(shapes, conv)
    # Of a conv with branches the merged one is left out: it may be older than they are.
    kept = [name for name in shapes if SPAN_PART.sub("", name) not in branched and name != "no_norm"]
    names = {name.replace(".eval_conv.", "."): name for name in kept}
    same = {conv: conv for conv in branched}
    return UpscalerReading(kind="span", scale=scale, numbers=numbers, names=names, branched=same)


def _check_branches(shapes: Shapes, conv: str) -> None:
    """Raise unless the branches of one of SPAN's convs fit together."""
    drawn, seen = _conv(shapes, f"{conv}.sk.weight")
    (first, _), (middle, _) = _conv(shapes, f"{conv}.conv.0.weight"), _conv(shapes, f"{conv}.conv.1.weight")
    sides = {"sk": (drawn, seen, 1, 1), "conv.0": (first, seen, 1, 1)}
    sides |= {"conv.1": (middle, first, 3, 3), "conv.2": (drawn, middle, 1, 1)}
    for name in BRANCHES:
        layer, part = name.rsplit(".", 1)
        right = sides[layer] if part == "weight" else sides[layer][:1]
        if shapes[f"{conv}.{name}"] != right:
            raise ValueError(
                f"its {conv}.{name} has shape {list(shapes[f'{conv}.{name}'])}, not {list(right)}"
            )


READERS: dict[UpscalerKind, Callable[[Shapes], UpscalerReading]] = {
    "rrdbnet": _read_rrdbnet,
    "compact": _read_compact,
    "span": _read_span,
}
