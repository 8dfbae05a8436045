"""Half precision with care: the dtype that suits a device, and float32 where float16 overflows.

Float16 ends at 65504. Some networks go further: the decoder of SDXL's autoencoder, FLUX, T5-XXL's
feed-forward and the sums behind it. bfloat16 has float32's range, so it comes first; on devices without it
`guard_half` keeps a network in float16 except where that was seen to fail.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial, wraps
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from darkroom.errors import DarkroomError

# The methods by which networks, text encoders and autoencoders are called.
ENTRIES = ("forward", "encode", "decode", "posterior", "encode_raw", "decode_raw")
GUARD = "half_guard"


def pick_dtype(device: torch.device, requested: torch.dtype | None) -> torch.dtype:
    """The dtype to load networks in: what was asked for, else what suits the device.

    That is float32 on the CPU, where half precision is mostly slower. Accelerators get bfloat16, whose range
    is float32's, where they compute in it themselves; else float16, for which see `guard_half`; else float32.
    """
    if requested is not None:
        return requested
    if device.type == "cpu":
        return torch.float32
    halves = (torch.bfloat16, torch.float16)
    return next((dtype for dtype in halves if computes_in(device, dtype)), torch.float32)


def is_float16_only(device: torch.device) -> bool:
    """Whether float16 is the only half precision of an accelerator, as before NVIDIA's Ampere."""
    return pick_dtype(device, None) == torch.float16


@cache
def computes_in(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device multiplies matrices of `dtype`; bfloat16 that CUDA emulates does not count.

    NVIDIA's driver is asked, since its older cards emulate bfloat16 more slowly than they compute in float32;
    other devices are tried with a small product, as whether they can depends on the system's version too.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:  # ROCm's devices have this type too
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        ones = torch.ones(8, 8, device=device, dtype=dtype)
        return bool((ones @ ones == 8).all())
    except (RuntimeError, TypeError):
        return False


def guard_half(network: nn.Module, name: str) -> nn.Module:
    """Make a float16 network answer with finite numbers, in place; `name` is what messages call it.

    Each call of the network, or of its `encode` and `decode`, checks that the result is finite, which waits
    for the device once. Where it is not, the call is made again and watched. A module whose result is not
    finite though its inputs are is run again in float32; if what it gives then fits into float16, it runs in
    float32 from that moment on. If it does not fit, as with a sum that stays large from block to block, the
    module around it is tried instead. So what ends in float32 is the smallest module with a result that fits.
    There is one warning for each, and later calls search only if they overflow somewhere else.

    Weights stay float16, in memory and in files: each layer in a float32 module gets a float32 copy of its
    own for the moment in which it runs. So T5-XXL takes no more memory than one layer beyond its 9.5 GB.

    A network without float16 weights, or guarded already, is returned as it is. The calls raise DarkroomError
    where float32 does not help; the message names the first module whose result is not finite. One call at a
    time: the copies are swapped in, so two threads may not share a guarded network.
    """
    if hasattr(network, GUARD) or not any(p.dtype == torch.float16 for p in network.parameters()):
        return network
    setattr(network, GUARD, HalfGuard(name))
    # A subclass, since methods set on the instance would hold it, and its memory, in a cycle.
    network.__class__ = _checked(type(network))
    return network


def unguard_half(network: nn.Module) -> nn.Module:
    """Undo `guard_half`, in place: all of the network in float16 again, and unchecked."""
    guard: HalfGuard | None = getattr(network, GUARD, None)
    if guard is not None:
        guard.keep(())
        delattr(network, GUARD)
        network.__class__ = type(network).__bases__[0]
    return network


def float32_modules(network: nn.Module) -> list[str]:
    """Names of the modules that a guarded network runs in float32 by now; "" is the network itself."""
    return sorted(getattr(network, GUARD).promoted)


class HalfGuard:
    """What a guarded network remembers: which of its modules run in float32, and how to undo that.

    Holds no module but those that are running, so that the network is freed with its last reference.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.promoted: frozenset[str] = frozenset()
        self.handles: dict[str, list[RemovableHandle]] = {}
        # The modules that are running in float32, outermost first, with their own float16 tensors.
        self.running: dict[nn.Module, list[dict[str, Any]]] = {}
        self.is_inside = False

    def call(self, network: nn.Module, entry: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The result of `entry(network, ...)`, finite; raises DarkroomError where it cannot be."""
        if self.is_inside:  # an entry that another one calls
            return entry(network, *args, **kwargs)
        run = partial(entry, network)
        self.is_inside = True
        try:
            output = self.run(network, run, *_snapshot(args, kwargs))
            return output if is_finite(output) else _Search(self, network).run(run, args, kwargs)
        finally:
            self.is_inside = False

    def run(self, network: nn.Module, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Call the whole network, in float32 if it has come to that."""
        if "" not in self.promoted:
            return run(*args, **kwargs)
        output, (args, kwargs) = None, self.before(network, args, kwargs)
        try:
            output = run(*args, **kwargs)
        finally:
            output = self.after(network, args, kwargs, output)
        return output

    def promote(self, network: nn.Module, path: str) -> None:
        """Let a module and all in it run in float32 from now on."""
        for part, module in network.get_submodule(path).named_modules(prefix=path):
            if part and part not in self.handles:
                self.handles[part] = [
                    module.register_forward_pre_hook(self.before, with_kwargs=True),
                    module.register_forward_hook(self.after, with_kwargs=True, always_call=True),
                ]
        self.promoted |= {path}

    def keep(self, paths: Iterable[str]) -> None:
        """Let only these modules, of those that run in float32, do so from now on."""
        self.promoted = _outermost(paths)
        for part in [part for part in self.handles if not _is_within(part, self.promoted)]:
            for handle in self.handles.pop(part):
                handle.remove()

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Give a module float32 copies of its own tensors and of its inputs."""
        if module not in self.running:
            self.running[module] = [dict(tensors) for tensors in _own(module)]
            for tensors in _own(module):
                tensors.update(_converted(tensors, torch.float16, torch.float32))
        return tuple(_input(a) for a in args), {name: _input(a) for name, a in kwargs.items()}

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Give a module its own tensors back; the outermost one answers in float16."""
        if module not in self.running:
            return output
        for tensors, originals in zip(_own(module), self.running.pop(module), strict=True):
            tensors.update(originals)
        if self.running:
            return output
        for value in (*args, *kwargs.values()):
            if isinstance(value, list):
                value[:] = _converted(value, torch.float32, torch.float16)
        return _converted(output, torch.float32, torch.float16)


class _Search:
    """One call of a network in which every module is watched, and those that overflow are promoted."""

    def __init__(self, guard: HalfGuard, network: nn.Module) -> None:
        self.guard, self.network = guard, network
        self.inputs: dict[nn.Module, tuple[tuple, dict]] = {}
        self.is_trying = False
        self.first: str | None = None  # the first module whose float32 result is not finite

    def run(self, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The result of the network, finite; raises DarkroomError where it is not in float32 either."""
        guard, known, output = self.guard, self.guard.promoted, None
        if not _is_usable((args, kwargs)):
            raise DarkroomError(f"{guard.name}: its input has values that are not finite")
        modules = [(path, module) for path, module in self.network.named_modules() if path]
        handles = [handle for path, module in modules for handle in self.watch(path, module)]
        try:
            output = guard.run(self.network, run, *_snapshot(args, kwargs))
            if not is_finite(output):
                output = self.tried("", partial(guard.run, self.network, run, *_snapshot(args, kwargs)))
        finally:
            for handle in handles:
                handle.remove()
            guard.keep(known if output is None else guard.promoted)
        if output is None:
            raise DarkroomError(self.complaint())
        self.warn_of(guard.promoted - known)
        return output

    def warn_of(self, paths: Iterable[str]) -> None:
        """Say which modules run in float32 from now on."""
        for path in sorted(paths):
            what = f"{path} overflows" if path else "it overflows"
            warn(f"{self.guard.name}: {what} in float16 and runs in float32 from now on", stacklevel=5)

    def watch(self, path: str, module: nn.Module) -> list[RemovableHandle]:
        """Hooks that keep a module's inputs while it runs and look at its output."""
        return [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(partial(self.after, path)),
        ]

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Keep what a float16 module is given, to give it once more."""
        if not self.is_trying and not self.guard.running:
            self.inputs[module] = _snapshot(args, kwargs)

    def after(self, path: str, module: nn.Module, args: tuple, output: Any) -> Any:
        """Replace a result that is not finite by that of float32, if the fault is this module's own."""
        if self.is_trying:
            if self.first is None and not is_finite(output):
                self.first = path
            return None
        inputs = self.inputs.pop(module, None)
        if inputs is None or self.guard.running or is_finite(output) or not _is_usable(inputs):
            return None
        args, kwargs = inputs
        return self.tried(path, lambda: module(*args, **kwargs))

    def tried(self, path: str, call: Callable[[], Any]) -> Any:
        """The module's result in float32, and the module promoted; None and as before if that is no good."""
        known, self.is_trying = self.guard.promoted, True
        self.guard.promote(self.network, path)
        try:
            output = call()
        finally:
            self.is_trying = False
        if is_finite(output):
            return output
        self.guard.keep(known)
        return None

    def complaint(self) -> str:
        """What to say when even the whole network in float32 was no good."""
        name = self.guard.name
        if self.first is None:
            return f"{name}: its result does not fit into float16; load it in bfloat16 or float32"
        return (
            f"{name}: {self.first} gives values that are not finite, in float32 too; are its weights damaged?"
        )


@cache
def _checked(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of networks whose entries go through the guard."""

    def checked(entry: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(entry)
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, GUARD).call(self, entry, args, kwargs)

        return call

    return type(kind.__name__, (kind,), {n: checked(getattr(kind, n)) for n in ENTRIES if hasattr(kind, n)})


def is_finite(value: object) -> bool:
    """Whether every number of a network's result is finite; waits for the device once."""
    checks = [tensor.isfinite().all() for tensor in _tensors(value)]
    return not checks or bool(torch.stack(checks).all())


def _is_usable(value: object) -> bool:
    """Whether inputs have no NaN and no infinity but the negative ones that attention masks are made of.

    An overflow that is negative throughout is missed here; the module's float32 result isn't finite then.
    """
    checks = [(tensor < torch.inf).all() for tensor in _tensors(value)]
    return not checks or bool(torch.stack(checks).all())


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors of floating-point numbers in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
        return
    parts: Iterable[object] = ()
    if isinstance(value, list | tuple):
        parts = value
    elif isinstance(value, dict):
        parts = value.values()
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in fields(value)]
    for part in parts:
        yield from _tensors(part)


def _converted(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """The same with its tensors of dtype `source` in dtype `target`, containers copied."""
    convert = partial(_converted, source=source, target=target)
    if isinstance(value, Tensor):
        return value.to(target) if value.dtype == source else value
    if isinstance(value, list | tuple):
        parts = [convert(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {name: convert(part) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        given = [field.name for field in fields(value) if field.init]
        return replace(value, **{name: convert(getattr(value, name)) for name in given})
    return value


def _input(value: Any) -> Any:
    """An argument in float32; lists stay the same objects, since modules may take from them (`UpLevel`)."""
    converted = _converted(value, torch.float16, torch.float32)
    if not isinstance(value, list):
        return converted
    value[:] = converted
    return value


def _snapshot(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Arguments for another call, whatever this one takes from the lists among them."""
    copies = [list(value) if isinstance(value, list) else value for value in (*args, *kwargs.values())]
    return tuple(copies[: len(args)]), dict(zip(kwargs, copies[len(args) :], strict=True))


def _own(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's own parameters and buffers, without those of the modules in it."""
    return module._parameters, module._buffers  # pyright: ignore[reportReturnType]


def _is_within(path: str, paths: Iterable[str]) -> bool:
    """Whether a module is one of `paths` or in one of them; "" is the network."""
    return any(not outer or f"{path}.".startswith(f"{outer}.") for outer in paths)


def _outermost(paths: Iterable[str]) -> frozenset[str]:
    """The modules that are in none of the others."""
    every = set(paths)
    return frozenset(path for path in every if not _is_within(path, every - {path}))
