"""A sanitizer for Triton's interpreter: faults that programs running one after another on ready memory do not show.

``with sanitized(): ..`` runs the programs of every launch in a shuffled order and raises :class:`SanitizerError` where

- a kernel or torch reads memory of ``torch.empty``, ``empty_like`` or ``new_empty`` that nobody has written since;
- a kernel loads or stores outside of the tensor that a pointer was given for, or gathers from a place that there is not;
- two programs of a launch touch one address and at least one of them stores, unless both do it by atomics;
- a program loads or stores what it stored itself, without a ``tl.debug_barrier`` between them: other threads may have stored it.

How: the number of an argument travels in the upper 16 bits of the addresses made from it, through any arithmetic; loads and
stores take it off. Beside every storage lie arrays with an entry per byte: which access of the launch stored it last, loaded it
first. Accesses are numbered as they come, so those of earlier programs have smaller numbers. What torch's operations allocate
and write a dispatch mode sees; whatever was not allocated under it counts as written.

triton-viz (3.0) would not do: its sanitizer solves for addresses out of bounds and knows neither races nor unwritten memory.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, interpreter_builder

from tests.kernels.written import Memory, SanitizerError, kind_of, padded

ROOT, TRITON = Path(__file__).parents[2], str(Path(triton.__file__).parent)
TAG = 48  # bits of an address; above them stands the argument
ADDRESS = np.uint64((1 << TAG) - 1)

# By kind of access: what another program may not have done to the address, nor the program itself since its last barrier.
OF_OTHERS = {"loads": ("stores", "updates"), "stores": ("loads", "stores", "updates"), "updates": ("loads", "stores")}
OF_ITS_OWN = {"loads": ("stores", "updates"), "stores": ("stores", "updates"), "updates": ("stores",)}


class Shadow:
    """What the programs of a launch did to a storage: for every kind of access the number of one, 0 for none, byte by byte."""

    def __init__(self, storage: torch.UntypedStorage, written: Tensor | None):
        self.begin = storage.data_ptr()
        self.written = None if written is None else written.numpy()
        self.numbers = {kind: np.zeros(padded(storage), np.int32) for kind in OF_OTHERS}


@dataclass(frozen=True)
class Access:
    """Who did what through which argument, and where: innermost line first."""

    program: tuple[int, ...]
    kind: str
    argument: str
    lines: tuple[tuple[str, int, str], ...]

    def __str__(self) -> str:
        at = ", called from ".join(f"{file.removeprefix(f'{ROOT}/')}:{line} ({name})" for file, line, name in self.lines)
        return f"program {self.program} {self.kind} {self.argument} at {at}"


@dataclass(frozen=True)
class Part:
    """The part of an access that lies in one storage: ``elements`` [n] of ``size`` bytes, and the bits that are stored there."""

    access: Access
    shadow: Shadow
    size: int
    elements: np.ndarray
    values: np.ndarray | None

    def bytes_of(self, per_byte: np.ndarray) -> np.ndarray:
        """[n, size]"""
        return per_byte.reshape(-1, self.size)[self.elements]

    def fill(self, per_byte: np.ndarray, value: int | bool | np.ndarray) -> None:
        per_byte.reshape(-1, self.size)[self.elements] = value

    def current(self) -> np.ndarray:
        """The bits that lie there."""
        addresses = (self.shadow.begin + self.elements * self.size).astype(np.uint64)
        kind = np.dtype(f"u{self.size}")
        every, nothing = np.ones(len(addresses), bool), np.zeros(len(addresses), kind)
        return interpreter._interpreter.load(addresses, every, nothing, kind)


class Launch:
    """One launch of a kernel: every access of its programs comes by here.

    Args:
        tensors: by name of the argument, what its pointers may reach; the first tensor is the argument itself.
        same: arguments through which several programs may store one value to one address.
    """

    def __init__(self, kernel: str, tensors: Mapping[str, list[Tensor]], memory: Memory, same: set[str]):
        self.kernel, self.tensors, self.same = kernel, tensors, same
        self.names = list(tensors)
        shadows: dict[int, Shadow] = {}
        self.extents = {}  # per argument addresses [begin, end) of its tensors, with their storages' shadows
        for name, own in tensors.items():
            self.extents[name] = []
            for x in sorted((x for x in own if x.numel()), key=Tensor.data_ptr):
                storage = x.untyped_storage()
                if storage.data_ptr() not in shadows:
                    shadows[storage.data_ptr()] = Shadow(storage, memory.written(storage))
                end = x.data_ptr() + x.element_size() * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())))
                self.extents[name].append((x.data_ptr(), end, shadows[storage.data_ptr()]))
        self.accesses: list[Access | None] = [None]
        self.program: tuple[int, ...] = ()
        self.first = self.barrier = 1  # the first access of the program, and since its last barrier

    def begin(self, program: tuple[int, ...]) -> None:
        self.program = program
        self.first = self.barrier = len(self.accesses)

    def pass_barrier(self) -> None:
        self.barrier = len(self.accesses)

    def tag(self, name: str, pointer: tl.tensor) -> None:
        """Mark a pointer as that of an argument."""
        pointer.handle.data = pointer.handle.data | np.uint64((self.names.index(name) + 1) << TAG)

    def access(self, kind: str, pointers: TensorHandle, mask: np.ndarray, values: np.ndarray | None = None) -> TensorHandle:
        """Check an access by the lanes of the mask; returns the pointers as plain addresses. values: what is stored."""
        data, size = pointers.data, max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        lanes = np.broadcast_to(mask, data.shape).astype(bool)  # a block's mask and a scalar's make int32 in the interpreter
        if values is not None:
            values = np.broadcast_to(values, data.shape)[lanes].view(f"u{values.itemsize}")
        tags, addresses = data[lanes] >> np.uint64(TAG), (data[lanes] & ADDRESS).astype(np.int64)
        for tag in np.unique(tags):
            argument = self.names[int(tag) - 1] if 0 < tag <= len(self.names) else "a pointer of no argument"
            access = Access(self.program, kind, argument, _lines())
            self.accesses.append(access)
            of_tag = tags == tag
            for part in self._parts(access, size, addresses[of_tag], None if values is None else values[of_tag]):
                self._check(part)
                self._note(part)
        return TensorHandle(data & ADDRESS, pointers.dtype, pointers.attr)

    def _parts(self, access: Access, size: int, addresses: np.ndarray, values: np.ndarray | None) -> Iterator[Part]:
        """An access storage by storage; nothing of it may lie outside of the tensors that its argument may reach."""
        extents = self.extents.get(access.argument) or [(0, 0, None)]
        begins, ends = (np.array([e[i] for e in extents]) for i in (0, 1))
        which = np.searchsorted(begins, addresses, "right") - 1
        outside = (which < 0) | (addresses + size > ends[which])
        if outside.any():
            self._fail("out of bounds", access, size, addresses[outside][0])
        for i in np.unique(which):
            shadow, here = extents[i][2], which == i
            offsets = addresses[here] - shadow.begin
            if (offsets % size).any():
                self._fail("misaligned", access, size, addresses[here][0])
            yield Part(access, shadow, size, offsets // size, None if values is None else values[here])

    def _check(self, part: Part) -> None:
        """Nothing that others did, or the program itself without a barrier, may conflict; what is read must be written."""
        kind = part.access.kind
        for before in OF_OTHERS[kind]:
            numbers = part.bytes_of(part.shadow.numbers[before]).max(1, initial=0)
            conflicts = (numbers > 0) & (numbers < self.first)
            if kind == before == "stores" and f"{self.kernel}.{part.access.argument}" in self.same:
                conflicts &= part.current() != part.values
            self._refuse("race", part, conflicts, numbers)
        for before in OF_ITS_OWN[kind]:
            numbers = part.bytes_of(part.shadow.numbers[before]).max(1, initial=0)
            self._refuse("no barrier", part, numbers >= self.barrier, numbers)
        if kind == "stores":
            order = part.elements.argsort(kind="stable")
            twice = (np.diff(part.elements[order]) == 0) & (np.diff(part.values[order]) != 0)
            conflicts = np.zeros(len(order), bool)
            conflicts[order[1:]] = twice
            self._refuse("two lanes store different values", part, conflicts)
        elif part.shadow.written is not None:
            self._refuse("unwritten memory", part, ~part.bytes_of(part.shadow.written).all(1))

    def _note(self, part: Part) -> None:
        kind, number = part.access.kind, len(self.accesses) - 1
        numbers = part.shadow.numbers[kind]
        if kind == "loads":  # the first: if it is not of an earlier program, none is
            noted = part.bytes_of(numbers)
            part.fill(numbers, np.where(noted > 0, noted, number))
        else:
            part.fill(numbers, number)
            if part.shadow.written is not None:
                part.fill(part.shadow.written, True)

    def _refuse(self, fault: str, part: Part, conflicts: np.ndarray, numbers: np.ndarray | None = None) -> None:
        if conflicts.any():
            i = conflicts.argmax()
            other = None if numbers is None else self.accesses[numbers[i]]
            self._fail(fault, part.access, part.size, part.shadow.begin + part.elements[i] * part.size, other)

    def _fail(self, fault: str, access: Access, size: int, address: int, other: Access | None = None) -> None:
        where = ""
        if access.argument in self.tensors:
            x = self.tensors[access.argument][0]
            where = f", element {(int(address) - x.data_ptr()) // size} of {kind_of(x)}"
        raise SanitizerError(f"{fault}: {self.kernel}, {access}{where}" + (f"; before it {other}" if other else ""))

    def check_gather(self, places: np.ndarray, length: int) -> None:
        """Places must exist even in lanes whose result is not used: the hardware reads them."""
        if ((places < 0) | (places >= length)).any():
            access = Access(self.program, "gathers from", f"places {places.min()} .. {places.max()} of {length}", _lines())
            raise SanitizerError(f"out of bounds: {self.kernel}, {access}")


class Sanitizer:
    """What :func:`sanitized` hands out. ``launched``: the names of the kernels that ran."""

    def __init__(self, seed: int, same: Iterable[str]):
        self.rng = np.random.default_rng(seed)
        self.same = set(same)
        self.reached: dict[str, list[Tensor]] = {}
        self.memory = Memory()
        self.launched: set[str] = set()
        self.launch: Launch | None = None

    def reach(self, argument: str, tensors: Iterable[Tensor]) -> None:
        """Declare that kernels reach these tensors too by offsets from an argument of that name."""
        self.reached[argument] = list(tensors)

    def begin(self, kernel: str, arguments: Mapping[str, object]) -> Launch:
        self.launched.add(kernel)
        tensors = {name: [x, *self.reached.get(name, [])] for name, x in arguments.items() if isinstance(x, Tensor)}
        self.launch = Launch(kernel, tensors, self.memory, self.same)
        return self.launch


class ShuffledGrid(GridExecutor):
    """Runs the programs of a launch on CPU tensors, in a shuffled order, under a sanitizer."""

    def __init__(self, sanitizer: Sanitizer, *arguments):
        super().__init__(*arguments)
        self.sanitizer = sanitizer

    def __call__(self, *arguments, **options):
        options = {name: x for name, x in options.items() if name in self.arg_names}
        arguments = inspect.getcallargs(self.fn, *arguments, **options)
        launch = self.sanitizer.begin(self.fn.__name__, arguments)
        scope = interpreter._patch_lang(self.fn)
        try:
            arguments = {name: x if name in self.constexprs else interpreter._implicit_cvt(x) for name, x in arguments.items()}
            for name in launch.names:
                launch.tag(name, arguments[name])
            grid = self.grid(arguments) if callable(self.grid) else self.grid
            grid = (*grid, 1, 1)[:3]
            interpreter_builder.set_grid_dim(*grid)
            programs = list(itertools.product(*map(range, grid)))
            for i in self.sanitizer.rng.permutation(len(programs)):
                launch.begin(programs[i])
                interpreter_builder.set_grid_idx(*programs[i])
                self.fn(**arguments)
        except Exception as error:
            while error.__cause__ is not None:  # the interpreter wraps it once for every function of the kernel
                error = error.__cause__
            raise error from None
        finally:
            scope.restore()


@contextmanager
def sanitized(seed: int = 0, same: Iterable[str] = ()) -> Iterator[Sanitizer]:
    """Run kernels under the sanitizer until the end of the block.

    Args:
        seed: of the order of programs.
        same: "kernel.argument" through which several programs may store one value to one address: such a race is harmless.
    """
    own = Sanitizer(seed, same)
    plain = {name: getattr(InterpreterBuilder, name) for name in dir(InterpreterBuilder) if name.startswith("create_")}

    def load(self, pointers, mask, *rest):
        return plain["create_masked_load"](self, own.launch.access("loads", pointers, mask.data), mask, *rest)

    def store(self, pointers, value, mask, *rest):
        pointers = own.launch.access("stores", pointers, mask.data, value.data)
        return plain["create_masked_store"](self, pointers, value, mask, *rest)

    def update(self, operation, pointers, value, mask, *rest):
        pointers = own.launch.access("updates", pointers, mask.data)
        return plain["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def exchange(self, pointers, *rest):
        return plain["create_atomic_cas"](self, own.launch.access("updates", pointers, np.array(True)), *rest)

    def gather(self, source, places, axis):
        own.launch.check_gather(places.data, source.data.shape[axis])
        return plain["create_gather"](self, source, places, axis)

    with pytest.MonkeyPatch.context() as patch, own.memory:
        patch.setattr(interpreter, "GridExecutor", partial(ShuffledGrid, own))
        for name, method in {
            "create_masked_load": load,
            "create_masked_store": store,
            "create_atomic_rmw": update,
            "create_atomic_cas": exchange,
            "create_barrier": lambda self: own.launch.pass_barrier(),
            "create_gather": gather,
        }.items():
            patch.setattr(InterpreterBuilder, name, method)
        yield own


def _lines() -> tuple[tuple[str, int, str], ...]:
    """The lines of a kernel and of the functions it calls that are being run, innermost first."""
    lines, frame = [], sys._getframe(1)
    while frame is not None and frame.f_code is not ShuffledGrid.__call__.__code__:
        code = frame.f_code
        if code.co_filename != __file__ and not code.co_filename.startswith(TRITON):
            lines.append((code.co_filename, frame.f_lineno, code.co_name))
        frame = frame.f_back
    return tuple(lines)
