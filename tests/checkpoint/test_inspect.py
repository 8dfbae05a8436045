"""What files and folders are, by their headers alone."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.lists import LISTS, NARROWED, narrowed
from tests.networks import read_shapes

from darkroom.checkpoint.formats.header import Entry, Header
from darkroom.checkpoint.formats.io import save_tensors
from darkroom.checkpoint.inspect import Report, inspect, notes, report, rows, summary
from darkroom.errors import InputError
from darkroom.presets import bundled

FILE = Path("model.safetensors")


def header(shapes: dict[str, tuple[int, ...]], **metadata: str) -> Header:
    entries = {n: Entry("F16", s, FILE, 0, 2 * torch.Size(s).numel()) for n, s in shapes.items()}
    # Nothing may be read of a file that is not there.
    telltales = [n for n in entries if n.endswith("transformer_blocks.0.norm1.bias")]
    entries |= {name: replace(entries[name], dtype="F8_E4M3") for name in telltales}
    return Header("safetensors", entries, metadata)


def read(shapes: dict[str, tuple[int, ...]], **metadata: str) -> Report:
    return report(FILE, header(shapes, **metadata))


def test_every_list_is_expected(shared: Path) -> None:
    assert {path.stem for path in (shared / "reference/keys").glob("*.json")} == LISTS.keys()


@pytest.mark.parametrize("size", ["whole", "narrowed"])
@pytest.mark.parametrize("name", LISTS)
def test_every_list_is_what_it_is(name: str, size: str, shared: Path) -> None:
    """At its own size, and made narrower: then names and proportions are left."""
    shapes = read_shapes(shared, name)
    found = read(shapes if size == "whole" else narrowed(shapes))
    assert (found.kind, found.family) == LISTS[name]
    assert found.unknown == ()
    for part in found.components.values():
        assert (part.missing, part.unexpected) == ((), ())
        # 256 codes instead of 16384; DiT's sizes differ in their positions, which diffusers' names lack
        assert size == "narrowed" or not part.reshaped
    counted = sum(part.parameters for part in found.components.values())
    if size == "whole" and found.kind == "network":
        assert counted == sum(torch.Size(shape).numel() for shape in shapes.values())


PREDICTIONS = {
    "sd15.single": "eps",
    "sdxl_base.single": "eps",
    "playground_v25.single": "edm",
    "sd3_medium.single": "flow",
    "flux1_dev.single": "flow",
    "dit_xl2_256.single": "eps",
}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_predictions_are_the_familys_or_marked(name: str, shared: Path) -> None:
    assert read(read_shapes(shared, name)).prediction == PREDICTIONS[name]


def test_markers_and_metadata_say_what_is_predicted(shared: Path) -> None:
    shapes = read_shapes(shared, "sdxl_base.single")
    found = read(shapes | {"v_pred": (), "ztsnr": ()})
    assert found.prediction == "v" and found.schedule is not None and "zero terminal SNR" in found.schedule
    assert any("v_pred" in line for line in found.evidence)
    assert read(shapes, **{"modelspec.prediction_type": "v"}).prediction == "v"
    assert read(shapes, **{"modelspec.prediction_type": "epsilon"}).prediction == "eps"
    assert read(shapes | {"edm_vpred.sigma_max": ()}).prediction == "edm v"


@pytest.mark.parametrize(("spread", "prediction"), [(0.02, "eps"), (0.2, "v")])
def test_sd2_is_told_by_the_spread_of_one_norm(
    spread: float, prediction: str, tmp_path: Path, shared: Path
) -> None:
    shapes = read_shapes(shared, "sd21.single")
    telltale = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    values = torch.randn(shapes[telltale], generator=torch.Generator().manual_seed(0)) * spread
    save_tensors(tmp_path / "one.safetensors", {telltale: values.bfloat16()}, {})
    size = (tmp_path / "one.safetensors").stat().st_size
    entry = Entry("BF16", shapes[telltale], tmp_path / "one.safetensors", size - 2 * values.numel(), 640)
    found = header(shapes)
    found.entries[telltale] = entry
    assert report(FILE, found).prediction == prediction


def test_what_lacks_and_what_is_too_much_is_named(shared: Path) -> None:
    shapes = read_shapes(shared, "sd15.single")
    gone = [name for name in shapes if "output_blocks.11.0" in name]
    found = read(
        {name: shape for name, shape in shapes.items() if name not in gone}
        | {"model.diffusion_model.input_blocks.0.0.surplus": (2,), "what.is.it": (3,)}
    )
    network = found.components["network"]
    assert found.family == "sd1" and set(network.missing) == set(gone)
    assert network.unexpected == ("model.diffusion_model.input_blocks.0.0.surplus",)
    assert found.unknown == ("what.is.it",)
    lines = list(notes(found))
    assert any(f"{sorted(gone)[0]}" in line and f"and {len(gone) - 10} more" in line for line in lines)
    usable = found.components["autoencoder"]
    assert (usable.missing, usable.unexpected) == ((), ())


def test_a_network_that_nobody_knows_has_a_nearest_one(shared: Path) -> None:
    shapes = read_shapes(shared, "sdxl_base.single")
    pruned = {n: s for n, s in shapes.items() if ".transformer_blocks.9." not in n} | {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 99)
    }
    found = read(pruned)
    assert found.family is None and found.prediction is None
    assert "sdxl" in found.components["network"].nearest
    assert any("no known family" in line for line in found.evidence)


# Each alone once told its kind apart; the family must still be the nearest, and what lacks be named.
LACKING = {
    "sdxl_vae.single": "encoder.mid.block_1.norm1.weight",
    "sd15.diffusers.unet": "down_blocks.0.resnets.0.norm1.weight",
    "sd15.diffusers.vae": "encoder.mid_block.resnets.0.norm1.weight",
    "te_clip_l.single": "text_model.embeddings.token_embedding.weight",
    "te_t5xxl.single": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "flux1_dev.diffusers.transformer": "x_embedder.weight",
    "flux1_dev.single": "guidance_in.in_layer.weight",
    "sd3_medium.diffusers.transformer": "time_text_embed.text_embedder.linear_1.weight",
    "dit_xl2_256.single": "y_embedder.embedding_table.weight",
    "sdxl_base.diffusers.unet": "add_embedding.linear_1.weight",
}


@pytest.mark.parametrize("name", LACKING)
def test_a_file_that_lacks_one_tensor_is_still_known(name: str, shared: Path) -> None:
    shapes = read_shapes(shared, name)
    whole, lacking = read(shapes), read({n: s for n, s in shapes.items() if n != LACKING[name]})
    assert (lacking.kind, lacking.family) == (whole.kind, whole.family)
    (part,) = lacking.components.values()
    assert (part.missing, part.unexpected) == ((LACKING[name],), ()) and lacking.unknown == ()


def test_bundled_models_say_what_they_are() -> None:
    for folder in bundled().values():
        found = inspect(folder)
        assert (found.kind, found.format) == ("model", "darkroom folder")
        parts = set(found.components) - {"refine networks"}
        assert found.prediction == "flow" and parts == {"autoencoder", "network", "clip_text"}
        assert found.unknown == ()


def test_a_report_as_json_a_table_and_a_line(shared: Path) -> None:
    found = read(read_shapes(shared, "sd15.single"))
    fields: dict[str, Any] = json.loads(found.to_json())
    assert {"family", "variant", "prediction", "components", "unknown", "evidence"} <= fields.keys()
    network = fields["components"]["network"]
    assert {"parameters", "dtype", "bytes", "missing", "unexpected"} <= network.keys()
    assert (network["parameters"], network["dtype"]) == (859_520_964, "F16")
    assert network["bytes"] == 2 * 859_520_964
    assert len(rows(found)) == 4 and "859,520,964" in rows(found)[1]
    assert summary(found).startswith("model.safetensors: Stable Diffusion 1.5, model, safetensors")


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file of the real size whose data are a hole."""
    fields, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        fields[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(fields).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


MEASURED = """
import sys, time
from pathlib import Path
start = time.perf_counter()
from darkroom.cli import main
code = main(["checkpoint", "inspect", sys.argv[1], "--json"])
seconds = time.perf_counter() - start
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(seconds, int(peak.split()[1]) / 1024, file=sys.stderr)
assert "torch" not in sys.modules and "numpy" not in sys.modules
sys.exit(code)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_file_of_24_gb_is_inspected_at_once(shared: Path, tmp_path: Path) -> None:
    """Without torch, in half a second and 300 MB; the limit of time is wider where tests share cores."""
    path = tmp_path / "flux.safetensors"
    write_sparse(path, read_shapes(shared, "flux1_dev.single"))
    assert path.stat().st_size > 23e9
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(run.stdout)
    assert (found["family"], found["components"]["network"]["parameters"]) == ("flux-dev", 11_901_408_320)
    seconds, megabytes = map(float, run.stderr.split())
    assert seconds < 2.5 and megabytes < 300


def test_an_empty_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file of weights here"):
        inspect(tmp_path)
    with pytest.raises(InputError, match=r"gone\.safetensors"):
        inspect(tmp_path / "gone.safetensors")


def test_dims_that_are_divided_keep_their_heads() -> None:
    assert narrowed({"a": (NARROWED, 4, 3, 3), "b": (320, 63)}) == {"a": (8, 4, 3, 3), "b": (40, 63)}
