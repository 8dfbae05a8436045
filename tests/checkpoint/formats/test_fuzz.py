"""Damaged and malicious files of tensors: refused or read, but nothing is run, no time or memory is lost."""

import json
import pickle
import resource
import struct
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.torch_files import STORAGE, data_pkl, tensor_pickle

from darkroom.checkpoint.formats.io import load_tensors, save_tensors
from darkroom.checkpoint.formats.read import read_header
from darkroom.checkpoint.formats.safetensors_header import FIELDS
from darkroom.errors import InputError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bounds memory as Linux does")

FEW, MANY = 40, 2500  # files of each kind: in every run, and in the slow one
MEMORY = 1 << 30  # what a reader may allocate; each file is smaller than 10 kB
SECONDS = 5.0
SUSPECT = (
    "exec",
    "compile",
    "import",
    "os.",
    "subprocess.",
    "socket.",
    "pickle.find_class",
    "shutil.",
    "ctypes.",
)


class Guard:
    """Reads files under a bound on memory, and notes what Python reports of code, processes and writes."""

    def __init__(self, folder: Path) -> None:
        self.path, self.active, self.seen = folder / "fuzz.bin", False, []
        self.taken = self.refused = 0
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple) -> None:
        writes = event == "open" and arguments[1] is not None and set(str(arguments[1])) & set("wax+")
        if self.active and (writes or event.startswith(SUSPECT)):
            self.seen.append((event, arguments))

    def read(self, data: bytes) -> None:
        """Write a file and read it: it may be refused, but only as bad input."""
        self.path.write_bytes(data)
        self.seen.clear()
        start = time.process_time()
        self.active = True
        try:
            header = read_header(self.path)
            for entry in header.entries.values():
                assert 0 <= entry.offset <= entry.offset + entry.nbytes <= len(data)
            for tensor in load_tensors(self.path)[0].values():
                tensor.clone()  # touches every byte
            self.taken += 1
        except InputError as error:
            assert str(error).startswith(f"{self.path}: ") and len(str(error)) < 5_000
            self.refused += 1
        finally:
            self.active = False
        assert self.seen == []
        assert time.process_time() - start < SECONDS


def gguf() -> bytes:
    """A small GGUF file: a text, two tensors, one of them quantised."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 1)
    head += struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 2) + b"sd"
    head += struct.pack("<Q1sI2QIQ", 1, b"a", 2, 32, 2, 8, 0)
    head += struct.pack("<Q1sI1QIQ", 1, b"b", 1, 3, 0, 96)
    return head + bytes(-len(head) % 32) + bytes(range(96)) + struct.pack("<3f", 1, 2, 3)


def seeds(folder: Path) -> dict[str, bytes]:
    """A good file of each format."""
    tensors = OrderedDict(
        a=torch.ones(4, 2), b=torch.arange(3), h=torch.ones(2, 3).half().T, e=torch.zeros(0)
    )
    path, made = folder / "seed.bin", {"gguf": gguf()}
    save_tensors(path, tensors, {"title": "x"})
    made["safetensors"] = path.read_bytes()
    state = {"state_dict": tensors, "epoch": 3, "callbacks": [guarded, {"x": (1, None)}]}
    for name, new in (("zip", True), ("legacy", False)):
        torch.save(state, path, _use_new_zipfile_serialization=new)
        made[name] = path.read_bytes()
    return made


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    """A guard with everything imported that the readers need, each format read once."""
    pytest.importorskip("gguf")  # decodes what darkroom does not
    b"x".decode("raw-unicode-escape")  # Python's own, of texts in old pickles
    found = Guard(tmp_path_factory.mktemp("fuzz"))
    for data in seeds(found.path.parent).values():
        found.path.write_bytes(data)
        assert load_tensors(found.path)[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    yield found
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def guarded() -> None:
    """A function for pickles to refer to."""
    raise AssertionError("it was called")


NUMBERS = st.sampled_from(
    [0, 1, 2, 7, 8, 127, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63, 2**64 - 1]
)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """A file with one to four places changed: bits, whole numbers, pieces taken out, doubled or cut off."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        match draw(st.sampled_from(["bit", "byte", "number", "remove", "double", "cut"])):
            case "bit" if changed:
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if changed:
                changed[at] = draw(st.integers(0, 255))
            case "number":
                size = draw(st.sampled_from([2, 4, 8]))
                changed[at : at + size] = (draw(NUMBERS) % 256**size).to_bytes(size, "little")
            case "remove":
                del changed[at : at + draw(st.integers(1, 16))]
            case "double":
                changed[at:at] = changed[at : at + draw(st.integers(1, 64))]
            case "cut" if draw(st.integers(0, 3)) == 0:
                del changed[at:]
    return bytes(changed)


COUNTS = st.one_of(NUMBERS, st.integers(-2, 9), st.sampled_from([1.5, True, None, "1", [], 1e300]))
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "U8", "F4", "F8_E8M0", "I64", "X", 3, None]),
        "shape": st.one_of(st.lists(st.integers(0, 4), max_size=3), st.lists(COUNTS, max_size=70), COUNTS),
        "data_offsets": st.one_of(
            st.tuples(st.integers(0, 8), st.integers(0, 40)), st.lists(COUNTS, max_size=3)
        ),
        "more": COUNTS,
    },
)
NAMES = st.one_of(st.sampled_from(["a", "b", "__metadata__", ""]), st.text(max_size=5))
HEADERS = st.dictionaries(
    NAMES, st.one_of(ROWS, ROWS, COUNTS, st.dictionaries(NAMES, COUNTS, max_size=2)), max_size=4
)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A safetensors file with a header of the right kind and wrong values, few or all of them."""
    rows: list[tuple[str, list, list]] = [
        ("F32", [2, 1], [0, 8]),
        ("F16", [2], [8, 12]),
        ("F4", [0, 3], [12, 12]),
    ]
    table = {name: dict(zip(FIELDS, row, strict=True)) for name, row in zip("abc", rows, strict=True)}
    for _ in range(draw(st.integers(0, 2))):
        values = draw(st.sampled_from([*rows[0][1:], *rows[1][1:], *rows[2][1:]]))
        values[draw(st.integers(0, len(values) - 1))] = draw(COUNTS)
    text = json.dumps(draw(HEADERS) if draw(st.booleans()) else table).encode()
    if draw(st.integers(0, 3)) == 0:
        text = draw(damaged(text))
    length = draw(NUMBERS) if draw(st.integers(0, 3)) == 0 else len(text)
    return length.to_bytes(8, "little") + text + bytes(draw(st.sampled_from([12, 12, 12, 0, 13])))


GLOBALS = [
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch FloatStorage",
    "os system",
]
GLOBALS += [
    "builtins eval",
    "collections OrderedDict",
    "_codecs encode",
    "numpy dtype",
    "torch Size",
    "builtins dict",
]
GLOBALS += [
    "numpy._core.multiarray scalar",
    "torch._utils _rebuild_tensor_v3",
    "torch float16",
    "torch._tensor _rebuild_from_type_v2",
]
TENSOR = tensor_pickle(b"K\x00K\x04\x85K\x01\x85")[2:-1]
PIECES = [
    TENSOR,
    TENSOR[1:-1],
    STORAGE,
    b"X\x01\x00\x00\x00w",
    b"X\x03\x00\x00\x00f8\xc3",
    b"K\x00",
    b"K\x04\x85",
    b"(",
    b"t",
    b"R",
    b"}",
]
PIECES += ["c{}\n{}\n".format(*name.split()).encode() for name in GLOBALS]
PIECES += [bytes([op]) for op in b"(0123.}])etaudsbRQNl\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x81o"]
PIECES += [
    b"q\x00",
    b"q\x01",
    b"h\x00",
    b"h\x01",
    b"r\xff\xff\xff\xff",
    b"X\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f",
]
PIECES += [
    b"\x95" + b"\xff" * 8,
    b"\x96" + b"\xff" * 8,
    b"i" + b"os\nsystem\n",
    b"\x82\x01",
    b"\x97",
    b"I99\n",
    b"L-1L\n",
]
PICKLES = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=6),
    st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=3)), max_size=40),
).map(b"".join)


@st.composite
def pickles(draw: st.DrawFn, folder: Path) -> bytes:
    """Any opcodes, on their own, in a zip file of torch, or in its older format."""
    body = (
        b"\x80\x02"
        + draw(st.sampled_from([b"", TENSOR, b"}", b"}("]))
        + draw(PICKLES)
        + draw(st.sampled_from([b".", b"u.", b"s.", b""]))
    )
    form = draw(st.sampled_from(["zip", "zip", "legacy", "plain"]))
    if form == "zip":
        return data_pkl(folder / "made.pt", body, _0=bytes(16)).read_bytes()
    if form == "plain":
        return body
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    start = b"".join(pickle.dumps(part, 2) for part in parts)
    return start + body + pickle.dumps(["0"], 2) + struct.pack("<Q", 4) + bytes(16)


def files(kind: str, folder: Path) -> st.SearchStrategy[bytes]:
    made = {"header": headers, "pickle": lambda: pickles(folder)}
    return made[kind]() if kind in made else damaged(seeds(folder)[kind])


def fuzz(kind: str, guard: Guard, count: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=checks
    )
    @given(files(kind, guard.path.parent))
    def run(data: bytes) -> None:
        guard.read(data)

    guard.taken = guard.refused = 0
    run()
    assert guard.refused > count // 4


KINDS = ("safetensors", "zip", "legacy", "gguf", "header", "pickle")


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_bad_files(kind: str, guard: Guard) -> None:
    fuzz(kind, guard, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_bad_files(kind: str, guard: Guard) -> None:
    fuzz(kind, guard, MANY)
    assert guard.taken


def test_the_guard_sees_what_it_is_for(guard: Guard, tmp_path: Path) -> None:
    guard.active = True
    try:
        (tmp_path / "x").write_text("")
        eval("1")
    finally:
        guard.active = False
    events = [event for event, _ in guard.seen]
    guard.seen.clear()
    assert {"open", "compile", "exec"} <= set(events)
    with pytest.raises(MemoryError):
        bytearray(2 * MEMORY)
