"""What a pickle of PyTorch would make, without making it: no name in it is looked up, nothing is called.

Opcodes are decoded by `pickletools` of the standard library, which runs nothing either. Tensors become
descriptions of where their values lie; containers and numpy's scalars become Python's; all else is left out.
"""

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from darkroom.checkpoint.formats.dtypes import BITS, TORCH_NAMES
from darkroom.checkpoint.formats.header import MAX_COUNT, MAX_DIMS, Shape

# Large training states take about two million steps; each may make one object.
MAX_STEPS = 4_000_000
MAX_GLOBAL = 500  # characters of a class's or a function's name
MAX_LEFT_OUT = 10_000

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "ComplexFloatStorage": "C64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
# Dtype of the storages that go by each name; an untyped one is of bytes.
STORAGE_DTYPES = {
    "torch.storage.UntypedStorage": "U8",
    "torch.UntypedStorage": "U8",
    **{f"{module}.{name}": dtype for module in ("torch", "torch.cuda") for name, dtype in STORAGES.items()},
}
DTYPES = {f"torch.{name}": dtype for name, dtype in TORCH_NAMES.items()}
# Said of a tensor or a storage without changing its values.
TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.Parameter", "torch.device"}
TYPES |= {"torch.storage.TypedStorage", "torch.storage._TypedStorage"}
# numpy's codes of its scalars, and struct's.
SCALARS = {"b1": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q", "u8": "Q"}
SCALARS |= {"f2": "e", "f4": "f", "f8": "d"}


class LeftOut:
    """The place of an object that was not made."""


LEFT_OUT = LeftOut()


@dataclass(frozen=True, slots=True)
class Global:
    """A function or class by its dotted name, never looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """`nbytes` bytes, from `start` on, of those that the file keeps under `key`."""

    key: str
    dtype: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor whose values begin `offset` bytes into its storage and span `nbytes`."""

    storage: Storage
    dtype: str
    shape: Shape
    strides: Shape | None
    offset: int
    nbytes: int


@dataclass(slots=True)
class NumpyDtype:
    """A numpy type by its code, such as f8, and the order of its bytes."""

    code: str
    order: str = "<"


@dataclass
class Machine:
    """Reads pickles one after the other, and remembers what it left out and which storages it met."""

    stubs: dict[str, None] = field(default_factory=dict)
    storages: dict[str, Storage] = field(default_factory=dict)
    steps: int = 0
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def read(self, file: Any) -> Any:
        """The value of the next pickle of a file or map; ValueError or LookupError where there is none."""
        self.stack, self.marks, self.memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(file):
            self.spend(1)
            if opcode.name in LITERALS:
                self.stack.append(argument)
            elif opcode.name in OPCODES:
                OPCODES[opcode.name](self, argument)
            else:
                raise ValueError(f"it uses {opcode.name}, which files of tensors do not")
        return self.stack.pop()

    def spend(self, steps: int) -> None:
        """Count what takes time or memory, up to a limit."""
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise ValueError(f"it takes more than {MAX_STEPS} steps")

    def pop_mark(self) -> list[Any]:
        """What was pushed since the last mark."""
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def pop(self) -> Any:
        """The topmost value; a mark above it goes first, as in Python's own pickles."""
        if self.marks and self.marks[-1] == len(self.stack):
            return self.marks.pop()
        return self.stack.pop()

    def pop_tuple(self, count: int) -> None:
        """Push the topmost `count` values as a tuple."""
        if len(self.stack) < count:
            raise ValueError("it takes more values than it gave")
        items = tuple(self.stack[-count:])
        self.stack[-count:] = [items]

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, LeftOut):
            raise ValueError(f"it appends to a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(self.pairs(items[::2], items[1::2]))
        elif not isinstance(target, LeftOut):
            raise ValueError(f"it sets items of a {type(target).__name__}")

    def pairs(self, keys: list[Any], values: list[Any]) -> dict[Any, Any]:
        """A dict without the items whose keys could make hashing slow: nested tuples, huge integers."""
        if len(keys) != len(values):
            raise ValueError("it has a key without a value")
        if any(not _is_key(key) for key in keys):
            self.stubs["items whose keys are no text or numbers"] = None
        return {key: value for key, value in zip(keys, values, strict=True) if _is_key(key)}

    def push_global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > MAX_GLOBAL:
            raise ValueError("it refers to a class or function without a name")
        dotted = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if not (dotted in FUNCTIONS or dotted in STORAGE_DTYPES or dotted in DTYPES or dotted in TYPES):
            self.stubs[dotted if dotted.isprintable() else ascii(dotted)] = None
        if len(self.stubs) > MAX_LEFT_OUT:
            raise ValueError(f"it refers to more than {MAX_LEFT_OUT} classes and functions")
        self.stack.append(Global(dotted))

    def call_popped(self, count: int = 2) -> None:
        """Take a function, its arguments, and of three values keyword arguments, which nothing here has."""
        function, arguments = [self.stack.pop() for _ in range(count)][:-3:-1]
        self.call(function, arguments)

    def call_marked(self, function: Any = None) -> None:
        """Take a function, unless it is given, and its arguments from behind the last mark."""
        items = self.pop_mark()
        self.call(*((items[0], items[1:]) if function is None else (function, items)))

    def call(self, function: Any, arguments: Any) -> None:
        """Push what a function that is known here would return, or that something was left out."""
        known = FUNCTIONS.get(function.name) if isinstance(function, Global) else None
        if known is None or not isinstance(arguments, tuple | list):
            self.stack.append(LEFT_OUT)
        else:
            self.stack.append(known(self, arguments))

    def build(self, state: Any) -> None:
        """Objects get no state, but for a numpy type the order of its bytes."""
        target = self.stack[-1]
        if isinstance(target, NumpyDtype) and isinstance(state, tuple) and len(state) > 1:
            target.order = "<" if state[1] in ("<", "|", "=") else ">"

    def push_persistent(self, pid: Any) -> None:
        match pid:
            case ("storage", Global(name), str(key), _, int(numel), *view) if 0 <= numel <= MAX_COUNT:
                self.stack.append(self.storage(name, key, numel, view))
            case ("module", Global() as module, *_):  # a class with its source, in the older format
                self.stack.append(module)
            case _:
                raise ValueError("it refers to something outside of the pickle that is no storage")

    def storage(self, name: str, key: str, numel: int, view: list[Any]) -> Storage | LeftOut:
        if name not in STORAGE_DTYPES:
            return LEFT_OUT  # of a type that only PyTorch has, such as its quantised ones
        dtype = STORAGE_DTYPES[name]
        size = BITS[dtype] // 8
        whole = self.storages.setdefault(key, Storage(key, dtype, 0, numel * size))
        if whole != Storage(key, dtype, 0, numel * size):
            raise ValueError(f"it describes the storage {key:.40} in two ways")
        match view:
            case [] | [None]:
                return whole
            case [(_, int(offset), int(count))] if 0 <= offset <= offset + count <= numel:
                return Storage(key, dtype, offset * size, count * size)
        raise ValueError(f"it has a view that is not in its storage {key:.40}")


def _is_key(key: object) -> bool:
    if isinstance(key, int):  # bool too
        return -MAX_COUNT <= key <= MAX_COUNT
    return key is None or isinstance(key, str | float | bytes)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str | None = None) -> Any:
    """The description of a tensor, whose values all lie in its storage."""
    if isinstance(storage, LeftOut):
        return LEFT_OUT
    shape, strides = _counts(shape), _counts(strides)
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise ValueError("it has a tensor without a storage, or with a shape and strides that do not fit")
    (start,) = _counts((offset,))
    dtype = dtype or storage.dtype
    size = BITS[dtype] // 8
    empty = 0 in shape
    span = 0 if empty else 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if not empty and (start + span) * size > storage.nbytes:
        raise ValueError(f"a tensor of shape {list(shape)} reaches beyond its storage {storage.key:.40}")
    packed = empty or _are_packed(shape, strides)
    begin = 0 if empty else start * size
    return PickledTensor(storage, dtype, shape, None if packed else strides, begin, span * size)


def _counts(value: Any) -> Shape:
    if not isinstance(value, tuple | list) or len(value) > MAX_DIMS:
        raise ValueError("it has a tensor whose shape is no tuple of numbers")
    if not all(type(n) is int and 0 <= n <= MAX_COUNT for n in value):
        raise ValueError("it has a tensor whose shape, strides or offset are no whole numbers from 0 up")
    return tuple(value)


def _are_packed(shape: Shape, strides: Shape) -> bool:
    """Whether the values lie one after the other; the stride of a dimension of one does not matter."""
    step = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != step:
            return False
        step *= n
    return True


def _rebuild(machine: Machine, arguments: Any) -> Any:
    """torch._utils._rebuild_tensor(_v2): storage, offset, shape, strides, and what gradients need."""
    if len(arguments) < 4:
        raise ValueError("it has a tensor without shape and strides")
    return _tensor(*arguments[:4])


def _rebuild_v3(machine: Machine, arguments: Any) -> Any:
    """As above with a dtype of its own, of an untyped storage."""
    match arguments:
        case (storage, offset, shape, strides, _, _, Global(name), *_):
            return _tensor(storage, offset, shape, strides, DTYPES[name]) if name in DTYPES else LEFT_OUT
    raise ValueError("it has a tensor without a dtype")


def _rebuild_from_type(machine: Machine, arguments: Any) -> Any:
    """A tensor of a class of its own: function, class, its arguments, further state."""
    if len(arguments) < 3:
        raise ValueError("it has a tensor of a class without arguments")
    machine.call(arguments[0], arguments[2])
    return machine.stack.pop()


def _first(machine: Machine, arguments: Any) -> Any:
    """A parameter is its tensor, and a tuple or list of a list is that list."""
    return arguments[0] if arguments else LEFT_OUT


def _sequence(machine: Machine, arguments: Any) -> Any:
    value = arguments[0] if arguments else []
    return value if isinstance(value, list | tuple) else LEFT_OUT


def _dict(machine: Machine, arguments: Any) -> Any:
    """A dict, empty, of another one, or of pairs as older pickles give them."""
    source = arguments[0] if arguments else []
    if isinstance(source, dict):
        machine.spend(len(source))
        return dict(source)
    if not isinstance(source, list):
        return {}  # of a defaultdict: what makes its defaults
    machine.spend(len(source))
    if any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in source):
        raise ValueError("it has a dict of something else than pairs")
    return machine.pairs([pair[0] for pair in source], [pair[1] for pair in source])


def _encode(machine: Machine, arguments: Any) -> Any:
    """`_codecs.encode`, which older protocols make bytes of."""
    match arguments:
        case (str(text), "latin1" | "latin-1"):
            machine.spend(len(text) // 64)
            return text.encode("latin-1")
    return b"" if len(arguments) == 0 else LEFT_OUT


def _numpy_dtype(machine: Machine, arguments: Any) -> Any:
    code = arguments[0] if arguments else None
    return NumpyDtype(code) if isinstance(code, str) and code in SCALARS else LEFT_OUT


def _numpy_scalar(machine: Machine, arguments: Any) -> Any:
    match arguments:
        case (NumpyDtype() as dtype, bytes() as data):
            layout = dtype.order + SCALARS[dtype.code]
            if struct.calcsize(layout) != len(data):
                raise ValueError("it has a numpy scalar of another size than its type")
            return struct.unpack(layout, data)[0]
    return LEFT_OUT


FUNCTIONS: dict[str, Callable[[Machine, Any], Any]] = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _sequence,
    "builtins.list": _sequence,
    "builtins.tuple": _sequence,
    "builtins.set": _sequence,
    "builtins.frozenset": _sequence,
    "builtins.dict": _dict,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _dict,
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE"),
    *("BINBYTES", "BINBYTES8", "SHORT_BINBYTES", "BYTEARRAY8"),
}
Operation = Callable[[Machine, Any], object]
OPCODES: dict[str, Operation] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "STOP": lambda m, a: None,
    "MARK": lambda m, a: m.marks.append(len(m.stack)),
    "POP": lambda m, a: m.pop(),
    "POP_MARK": lambda m, a: m.pop_mark(),
    "DUP": lambda m, a: m.stack.append(m.stack[-1]),
    "NONE": lambda m, a: m.stack.append(None),
    "NEWTRUE": lambda m, a: m.stack.append(True),
    "NEWFALSE": lambda m, a: m.stack.append(False),
    "MEMOIZE": lambda m, a: m.put(len(m.memo)),
    "EMPTY_TUPLE": lambda m, a: m.stack.append(()),
    "TUPLE": lambda m, a: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": lambda m, a: m.pop_tuple(1),
    "TUPLE2": lambda m, a: m.pop_tuple(2),
    "TUPLE3": lambda m, a: m.pop_tuple(3),
    "EMPTY_LIST": lambda m, a: m.stack.append([]),
    "LIST": lambda m, a: m.stack.append(m.pop_mark()),
    "APPEND": lambda m, a: m.append([m.stack.pop()]),
    "APPENDS": lambda m, a: m.append(m.pop_mark()),
    "EMPTY_DICT": lambda m, a: m.stack.append({}),
    "DICT": lambda m, a: m.stack.append(m.pairs((items := m.pop_mark())[::2], items[1::2])),
    "SETITEM": lambda m, a: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    "SETITEMS": lambda m, a: m.set_items(m.pop_mark()),
    # Sets become lists, so that nothing needs to be hashed.
    "EMPTY_SET": lambda m, a: m.stack.append([]),
    "ADDITEMS": lambda m, a: m.append(m.pop_mark()),
    "FROZENSET": lambda m, a: m.stack.append(m.pop_mark()),
    "GLOBAL": lambda m, a: m.push_global(*a.split(" ", 1)),
    "STACK_GLOBAL": lambda m, a: m.push_global(*[m.stack.pop(), m.stack.pop()][::-1]),
    "REDUCE": lambda m, a: m.call_popped(),
    "NEWOBJ": lambda m, a: m.call_popped(),
    "NEWOBJ_EX": lambda m, a: m.call_popped(3),
    "OBJ": lambda m, a: m.call_marked(),
    "INST": lambda m, a: m.call_marked(m.push_global(*a.split(" ", 1)) or m.stack.pop()),
    "BUILD": lambda m, a: m.build(m.stack.pop()),
    "BINPERSID": lambda m, a: m.push_persistent(m.stack.pop()),
} | {
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda m, a: m.put(a)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, a: m.stack.append(m.memo[a])),
}
