"""Files of torch.save are read as torch reads them, but for code: it is named and never run."""

import builtins
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from darkroom.checkpoint.formats import pickled
from darkroom.checkpoint.formats.io import load_tensors
from darkroom.checkpoint.formats.read import read_header
from darkroom.errors import InputError

FORMATS = {"zip": True, "legacy": False}


@pytest.fixture(params=FORMATS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """Saves something in one of the two formats, and says where."""

    def save(value: object, protocol: int = 2) -> Path:
        path = tmp_path / "a.pt"
        new = FORMATS[request.param]
        torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
        return path

    return save


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert as_bytes(found[name]) == as_bytes(tensor), name


DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "complex64",
    "int64",
    "int32",
)
DTYPES += ("int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool")


def every_kind() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    tensors = {f"dtype.{name}": torch.tensor([[0, 1], [1, 0]]).to(getattr(torch, name)) for name in DTYPES}
    return tensors | {
        "transposed": base.T,
        "sliced": base[1:5, 2:7:2],
        "expanded": base[0, :1].expand(3),
        "channels_last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "half": torch.randn(5, generator=generator).half()[1:],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "one": base[:1, :1],
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_are_those_that_were_saved(saved: Callable[..., Path], protocol: int) -> None:
    tensors = every_kind()
    path = saved(tensors, protocol)
    header = read_header(path)
    assert (header.format, header.stubs, header.metadata) == ("pickle", (), {})
    assert_same(load_tensors(path)[0], tensors)
    strided = {name for name, entry in header.entries.items() if entry.strides is not None}
    assert strided == {"transposed", "sliced", "expanded", "channels_last"}


def test_tensors_are_those_that_torch_loads(saved: Callable[..., Path]) -> None:
    """But for unsigned and 8-bit ones, which torch itself does not read from its older format."""
    typed = {n: t for n, t in every_kind().items() if not n.startswith(("dtype.float8", "dtype.uint"))}
    path = saved(typed)
    assert_same(load_tensors(path)[0], torch.load(path, weights_only=True))


def test_a_module_with_parameters_buffers_and_metadata(saved: Callable[..., Path]) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    state = module.state_dict()
    state._metadata["extra"] = {"version": 3}
    path = saved(state)
    assert_same(load_tensors(path)[0], dict(torch.load(path, weights_only=True)))
    path = saved({name: nn.Parameter(tensor) for name, tensor in state.items() if tensor.is_floating_point()})
    assert_same(load_tensors(path)[0], torch.load(path, weights_only=True))
    assert read_header(path).stubs == ()


class Named(Tensor):
    """A tensor of a class of its own, which torch saves by another function."""


def test_tensors_of_a_class_and_with_attributes(saved: Callable[..., Path]) -> None:
    tagged = torch.arange(3.0)
    tagged.note = "mine"
    path = saved({"a": torch.ones(2).as_subclass(Named), "b": tagged})
    assert_same(load_tensors(path)[0], {"a": torch.ones(2), "b": torch.arange(3.0)})
    assert [name.rpartition(".")[2] for name in read_header(path).stubs] == ["Named"]


def test_tied_tensors_share_their_bytes(saved: Callable[..., Path]) -> None:
    weight = torch.randn(4, 4)
    path = saved({"shared": weight, "tied": weight, "row": weight[2]})
    entries = read_header(path).entries
    assert entries["shared"].offset == entries["tied"].offset == entries["row"].offset - 32
    assert_same(load_tensors(path)[0], {"shared": weight, "tied": weight, "row": weight[2]})


def test_real_files(shared: Path) -> None:
    files = [p for p in (shared / "data/weights").rglob("*") if p.suffix in (".pth", ".bin", ".pt")]
    assert len(files) >= 4
    for path in files:
        assert_same(load_tensors(path)[0], dict(torch.load(path, weights_only=True, map_location="cpu")))
        assert read_header(path).stubs == ()


WRAPPED = {
    "lightning": (
        {"state_dict": ..., "epoch": 3, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}]},
        "",
    ),
    "dit": ({"model": {"w": torch.zeros(1)}, "ema": ..., "args": None}, ""),
    "esrgan": ({"params": {"w": torch.zeros(1)}, "params_ema": ...}, ""),
    "in two": ({"model": {"state_dict": ..., "step": 7}, "lr": 0.5}, ""),
    "parts": ({"unet": ..., "vae": {}}, "unet."),
    "deep": ({"a": {"b": [..., 1]}}, "a.b.0."),
}


@pytest.mark.parametrize(("whole", "prefix"), WRAPPED.values(), ids=WRAPPED)
def test_the_state_dict_is_found(tmp_path: Path, whole: dict, prefix: str) -> None:
    inner = {"x.weight": torch.ones(2), "y": torch.arange(3)}

    def filled(value: object) -> object:
        if value is ...:
            return inner
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        return [filled(item) for item in value] if isinstance(value, list) else value

    torch.save(filled(whole), tmp_path / "a.ckpt")
    assert_same(
        load_tensors(tmp_path / "a.ckpt")[0], {prefix + name: tensor for name, tensor in inner.items()}
    )


def test_what_lies_beside_the_state_dict_is_named(saved: Callable[..., Path]) -> None:
    adam = {
        "state": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(1.0)}},
        "param_groups": [{"lr": 1e-4}],
    }
    top = {
        "state_dict": {"w": torch.ones(1)},
        "optimizer_states": [adam],
        "step": torch.tensor(3),
        "lrs": [1, 2],
    }
    top |= {
        "epoch": 3,
        "rate": 0.5,
        "done": True,
        "note": "fin",
        "nothing": None,
        "raw": b"bytes",
        "large": 2**70,
    }
    header = read_header(saved(top))
    assert list(header.entries) == ["w"]
    assert header.metadata == {"epoch": "3", "rate": "0.5", "done": "True", "note": "fin"}
    expected = ("optimizer_states: 2 tensors", "step: 1 tensor", "lrs", "raw", "large")
    assert header.stubs == expected


def test_an_embedding_as_stable_diffusion_webui_saves_it(saved: Callable[..., Path]) -> None:
    embedding = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": nn.Parameter(torch.ones(2, 8))},
        "name": "cat",
    }
    header = read_header(saved(embedding))
    assert (header.shapes, header.metadata, header.stubs) == (
        {"*": (2, 8)},
        {"name": "cat"},
        ("string_to_token",),
    )


def test_containers_are_python_s(saved: Callable[..., Path]) -> None:
    nested = defaultdict(
        list, {"a": (torch.ones(1),), "s": {1, 2}, "f": frozenset("x"), "z": torch.Size([1, 2])}
    )
    path = saved(OrderedDict(inner=nested, odd={(1, 2): torch.zeros(1), "w": torch.ones(1)}))
    header = read_header(path)
    assert list(header.entries) == ["inner.a.0", "odd.w"]
    assert header.stubs == ("items whose keys are no text or numbers",)


SCALARS = [
    np.float64(0.1),
    np.float32(0.5),
    np.float16(2),
    np.int64(-7),
    np.uint8(255),
    np.bool_(True),
    np.int32(9),
]


@pytest.mark.parametrize("scalar", SCALARS, ids=lambda scalar: scalar.dtype.name)
@pytest.mark.parametrize("protocol", [2, 4])
def test_numpy_scalars_are_read(saved: Callable[..., Path], scalar: np.generic, protocol: int) -> None:
    header = read_header(saved({"w": torch.ones(1), "best": scalar}, protocol))
    assert header.metadata == {"best": str(scalar.item())} and header.stubs == ()


def test_numpy_scalars_of_the_older_numpy_and_the_other_byte_order(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1), "best": np.float64(0.1)}, tmp_path / "a.pt")
    old = rewritten(tmp_path / "a.pt", lambda data: data.replace(b"numpy._core.multi", b"numpy.core.multi"))
    assert read_header(old).metadata == {"best": "0.1"}
    big = np.array(0.1, ">f8")[()]
    data = pickle.dumps(
        {"best": Reduced(np._core.multiarray.scalar, np.dtype(">f8"), big.tobytes()[::-1])}, 2
    )
    assert pickled.Machine().read(io.BytesIO(data))["best"] == 0.1


def test_numpy_arrays_and_texts_are_stubs(saved: Callable[..., Path]) -> None:
    header = read_header(saved({"w": torch.ones(1), "a": np.ones(3), "t": np.str_("x")}))
    assert header.metadata == {}
    assert {"a", "t"} < set(header.stubs)
    assert any("_reconstruct" in name for name in header.stubs)


class Reduced:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """The zip file with its pickle changed."""
    other = path.with_name("changed.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return other


@pytest.fixture
def watched() -> Iterator[list[str]]:
    """What Python itself reports of imports, code and processes while the test runs."""
    seen: list[str] = []
    active = [True]
    suspects = (
        "import",
        "exec",
        "compile",
        "os.system",
        "subprocess.Popen",
        "pickle.find_class",
        "os.remove",
    )

    def hook(event: str, arguments: tuple) -> None:
        if active[0] and event in suspects:
            seen.append(f"{event} {arguments[:1]}")

    sys.addaudithook(hook)
    yield seen
    active[0] = False


def made_class(monkeypatch: pytest.MonkeyPatch, module: str, name: str, **members: object) -> type:
    """A class that lies in a module of this name while it is pickled."""
    parts = module.split(".")
    for i in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(".".join(parts[: i + 1])))
    made = type(name, (), {"__module__": module, "__qualname__": name, **members})
    setattr(sys.modules[module], name, made)
    return made


def test_a_callback_and_a_config_of_a_training_framework_are_stubs(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, watched: list[str]
) -> None:
    callback = made_class(monkeypatch, "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    config = made_class(
        monkeypatch, "omegaconf.dictconfig", "DictConfig", __setstate__=lambda self, state: None
    )
    conf = config()
    conf.content = {"model": {"target": "ldm", "weights": torch.ones(3)}}
    state = {callback: {"best": torch.tensor(0.1), "path": "x.ckpt"}, "plain": {"k": 1}}
    path = saved({"state_dict": {"w": torch.ones(2)}, "callbacks": state, "config": conf, "epoch": 1})
    monkeypatch.undo()
    read_header(path)  # imports of its own come first
    watched.clear()
    header = read_header(path)
    assert watched == []
    assert header.shapes == {"w": (2,)} and header.metadata == {"epoch": "1"}
    assert header.stubs == (
        "items whose keys are no text or numbers",
        "omegaconf.dictconfig.DictConfig",
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "callbacks",
        "config",
    )
    assert "omegaconf" not in sys.modules and "pytorch_lightning" not in sys.modules


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_named_and_not_run(
    saved: Callable[..., Path], tmp_path: Path, watched: list[str], protocol: int
) -> None:
    marker = tmp_path / "ran"
    evil = {
        "w": torch.ones(2),
        "a": Reduced(os.system, f"touch {marker}"),
        "b": Reduced(builtins.eval, f"open({str(marker)!r}, 'w')"),
        "c": Reduced(builtins.getattr, "text", "upper"),
    }
    path = saved(evil, protocol)
    read_header(path)
    watched.clear()
    header = read_header(path)
    assert watched == [] and not marker.exists()
    assert header.stubs == ("builtins.eval", "builtins.getattr", f"{os.name}.system", "a", "b", "c")
    assert_same(load_tensors(path)[0], {"w": torch.ones(2)})
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # so the file would have run it


def test_code_hidden_in_a_tensor_a_key_or_a_state_is_not_run(
    saved: Callable[..., Path], tmp_path: Path, watched: list[str]
) -> None:
    marker = tmp_path / "ran"
    touch = Reduced(os.system, f"touch {marker}")
    rebuild = Reduced(torch._utils._rebuild_parameter, torch.ones(2), touch, OrderedDict())
    path = saved({"w": rebuild, "inner": OrderedDict([("k", touch)]), "list": [touch, {"x": touch}]})
    watched.clear()
    header = read_header(path)
    assert not marker.exists() and not any("system" in event for event in watched)
    assert header.shapes == {"w": (2,)} and f"{os.name}.system" in header.stubs


def test_a_plain_pickle_with_code_is_refused_by_name(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "a.ckpt").write_bytes(pickle.dumps(Reduced(os.system, f"touch {marker}"), 2))
    refers = (
        rf"a pickle, but not one of torch\.save; it refers to {os.name}\.system, of which nothing was run"
    )
    with pytest.raises(InputError, match=rf"a\.ckpt: not a file of PyTorch that can be read: {refers}"):
        read_header(tmp_path / "a.ckpt")
    assert not marker.exists()


def test_a_file_without_tensors_says_what_it_holds(saved: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"it holds no dict of tensors; it refers to .*Sequential"):
        read_header(saved(nn.Sequential(nn.Linear(1, 1))))
    with pytest.raises(InputError, match=r"it holds no tensors$"):
        read_header(saved({"a": 1}))
    with pytest.raises(InputError, match=r"it holds no dict of tensors$"):
        read_header(saved(torch.ones(1)))


def test_names_are_text_and_given_once(saved: Callable[..., Path]) -> None:
    with pytest.raises(
        InputError, match=r"one of its tensors has a name with characters that are not text: 'a\\x1b"
    ):
        read_header(saved({"a\x1b[31m": torch.ones(1)}))
    with pytest.raises(InputError, match="one of its tensors has a name longer than 1000 characters: 'xxx"):
        read_header(saved({"x" * 1001: torch.ones(1)}))
    with pytest.raises(InputError, match=r"it has the tensor a\.b twice"):
        read_header(saved({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}))
    header = read_header(saved({"w": torch.ones(1), "a\x1b": 1, "note": "\ud800x"}))
    assert header.metadata == {r"'a\x1b'": "1", "note": "?x"}


def test_the_older_format_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(30)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    count = data.rindex(struct.pack("<Q", 30))
    changes = {
        "has 31 values, and by its pickle 120 bytes": data[:count]
        + struct.pack("<Q", 31)
        + data[count + 8 :],
        "has 18446744073709551615 values": data[:count] + b"\xff" * 8 + data[count + 8 :],
        "not in little-endian order": data.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        "of another version": data.replace(b"M\xe9\x03.", b"M\xe8\x03.", 1),
        r"would end beyond its end \(truncated\?\)": data[:-1],
    }
    for message, changed in changes.items():
        assert changed != data
        path.write_bytes(changed)
        with pytest.raises(InputError, match=rf"a\.pt: not a file of PyTorch that can be read: .*{message}"):
            read_header(path)
