"""Run a Gluon kernel's own text on CPU tensors: warp groups, barriers, copies and products under a random schedule.

`run(launch, seed)` takes a recorded launch and executes the kernel function itself, and every function that it calls,
with stand-ins for `gl`, `tl`, `tma`, `mbarrier` and the warp-group products. What is modelled:

    partitions      of `warp_specialize`: a thread each, one at a time; which goes on at every operation on barriers,
                    copies, products and shared memory is drawn from the seed
    mbarriers       arrivals, expected bytes and a phase of which `wait` sees the parity alone; an arrival too many is
                    an error
    loads           overwrite the tile with NaN when issued and fill it at a later, random moment, or when nothing else
                    can happen, in any order; outside the descriptor they read 0
    stores          read the tile at a random moment until `store_wait`, and see what was stored before a fence alone
    products        read shared memory from when they are issued until they are waited for: if it changes meanwhile,
                    the result is NaN. A result in use before it was waited for is an error
    shared memory   NaN until written; a kernel that ends with copies or products on their way is wrong
    deadlock        nobody can go on: an error that says who waits where

Everything is in fp64, so that nothing but the text decides. What this proves: arithmetic, indices, masks and the
protocol between the warps, as the text says them. What it does not: that the compiler keeps to the text, layouts and
registers (those are seen ahead of time, in `test_hopper`), rounding, the hardware's memory model, and any time at all.
"""

from __future__ import annotations

import inspect
import math
import random
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class ProtocolError(AssertionError):
    """What a kernel did that no schedule allows."""


class _Stopped(BaseException):
    """Ends a partition's thread after another one has failed."""


@dataclass(eq=False)
class Copy:
    """On its way; of a store who issued it."""

    storer: str | None
    happen: Callable[[], None]
    last: bool


@dataclass
class Machine:
    """One program: its partitions, and copies on their way."""

    chance: random.Random
    program: int
    programs: int
    waiting: dict[str, Any] = field(default_factory=dict)  # by partition: when it may go on; None where it may now
    copies: list[Copy] = field(default_factory=list)
    products: dict[str, list[Product]] = field(default_factory=dict)
    unfenced: dict[str, list[Callable[[], Any]]] = field(default_factory=dict)
    batons: dict[str, threading.Semaphore] = field(default_factory=dict)
    back: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    failure: BaseException | None = None

    def me(self) -> str:
        return threading.current_thread().name

    def pause(self, until: Callable[[], bool] | None = None, where: str = "") -> None:
        """Let others go on, and come back at a random moment at which `until` holds."""
        name = self.me()
        if name not in self.waiting:  # outside of warp_specialize
            return
        self.waiting[name] = (until, where)
        self.back.release()
        self.batons[name].acquire()
        if self.failure is not None:
            raise _Stopped

    def _body(self, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.batons[name].acquire()
        try:
            if self.failure is None:
                function(*arguments)
                for kind, left in (("products", self.products[name]), ("stores", self.stores(name))):
                    if left:
                        raise ProtocolError(f"{name} ends with {kind} on their way")
        except _Stopped:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        del self.waiting[name]
        self.back.release()

    def stores(self, name: str) -> list[Any]:
        return [copy for copy in self.copies if copy.storer == name]

    def copy(self, storer: str | None, happen: Callable[[], None]) -> None:
        """Issue a copy; some come when nothing else can happen, the others at any moment."""
        self.copies.append(Copy(storer, happen, last=self.chance.random() < 0.3))

    def specialise(self, functions: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
        """Run the partitions to their ends."""
        threads = []
        for number, (function, arguments) in enumerate(functions):
            name = f"partition {number}"
            self.batons[name], self.waiting[name] = threading.Semaphore(0), (None, "")
            self.products[name] = []
            threads.append(threading.Thread(target=self._body, args=(name, function, arguments), name=name))
        for thread in threads:
            thread.start()
        while self.waiting:
            self._step()
        for thread in threads:
            thread.join()
        if self.failure is None and self.copies:
            self.failure = ProtocolError("the program ends with loads on their way")
        if self.failure is not None:
            raise self.failure

    def _step(self) -> None:
        """A copy arrives, or a partition that may goes on until it pauses."""
        ready = [name for name, (until, _) in self.waiting.items() if self.failure or until is None or until()]
        copies = [copy for copy in self.copies if not copy.last] if ready else self.copies
        if not ready and not copies:
            where = "; ".join(f"{name} waits for {where}" for name, (_, where) in self.waiting.items())
            self.failure = ProtocolError(f"deadlock: {where}")
            return
        chosen = self.chance.choice([*ready, *copies])
        if isinstance(chosen, str):
            self.batons[chosen].release()
            self.back.acquire()
        else:
            self.copies.remove(chosen)
            chosen.happen()


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all arrivals and all expected bytes are in."""

    count: int
    missing: int
    name: str
    bytes: int = 0
    phase: int = 0

    def move(self, arrivals: int, bytes: int) -> None:
        self.missing, self.bytes = self.missing - arrivals, self.bytes + bytes
        if self.missing < 0:
            raise ProtocolError(f"{self.name}: an arrival too many in phase {self.phase}")
        if self.missing == 0 and self.bytes == 0:
            self.missing, self.phase = self.count, self.phase + 1


class Shared:
    """A view of shared memory."""

    def __init__(self, machine: Machine, memory: Tensor, barriers: int = 0):
        self.machine, self.memory = machine, memory
        self.barriers: list[Barrier | None] = [None] * barriers

    @property
    def shape(self) -> list[int]:
        return list(self.memory.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    def index(self, i: int) -> Any:
        if self.barriers:
            return BarrierRef(self.barriers, i)
        if not 0 <= i < self.memory.shape[0]:
            raise ProtocolError(f"buffer {i} of {self.memory.shape[0]}")
        return Shared(self.machine, self.memory[i])

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.machine, self.memory.view(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.machine, self.memory.permute(order))

    def store(self, value: Tensor) -> None:
        """Written by threads: the copy engine sees it after a fence."""
        self.machine.pause()
        self.memory.fill_(math.nan)
        self.machine.unfenced.setdefault(self.machine.me(), []).append(lambda: self.memory.copy_(value))


@dataclass
class BarrierRef:
    """One of an array of barriers."""

    array: list[Barrier | None]
    i: int

    @property
    def it(self) -> Barrier:
        barrier = self.array[self.i]
        if barrier is None:
            raise ProtocolError("a barrier in use before it is initialised")
        return barrier


@dataclass
class Product:
    """A product on its way, or done: `result` may be read once it was waited for."""

    a: Any
    b: Shared
    acc: Any
    use_acc: bool
    seen: tuple[Tensor, Tensor] = ()  # type: ignore[assignment]
    result: Tensor | None = None

    def __post_init__(self) -> None:
        self.seen = self._operands()

    @property
    def shape(self) -> list[int]:
        return [self.seen[0].shape[0], self.seen[1].shape[1]]

    def _operands(self) -> tuple[Tensor, Tensor]:
        a, b = ((x.memory if isinstance(x, Shared) else x).clone() for x in (self.a, self.b))
        return a, b

    def finish(self) -> None:
        acc = self.acc.result if isinstance(self.acc, Product) else self.acc
        if acc is None:
            raise ProtocolError("a product adds to one that is not done")
        result = self.seen[0] @ self.seen[1] + (acc if self.use_acc else 0.0)
        intact = all(torch.equal(x, y) for x, y in zip(self.seen, self._operands(), strict=True))
        self.result = result if intact else torch.full_like(result, math.nan)


@dataclass(frozen=True)
class BlockType:
    shape: list[int]
    nbytes: int


class Descriptor:
    """A host descriptor over a CPU tensor: boxes of it, 0 outside."""

    def __init__(self, host: Any):
        whole = torch.as_strided(host.base, host.shape, host.strides, host.base.storage_offset())
        self.whole, self.dtype, self.layout = whole.double(), torch.float64, None
        self.block_type = BlockType(list(host.block_shape), math.prod(host.block_shape) * 8)

    def _inside(self, corner: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """(of the tensor, of the box): the part of the box at `corner` that exists."""
        ends = [(at, size, n) for at, size, n in zip(corner, self.block_type.shape, self.whole.shape, strict=True)]
        outer = tuple(slice(min(max(at, 0), n), min(max(at + size, 0), n)) for at, size, n in ends)
        inner = tuple(slice(s.start - at, s.stop - at) for s, (at, _, _) in zip(outer, ends, strict=True))
        return outer, inner

    def read(self, corner: list[int], tile: Tensor) -> None:
        outer, inner = self._inside(corner)
        tile.zero_()
        if all(s.stop > s.start for s in outer):
            tile[inner] = self.whole[outer]

    def write(self, corner: list[int], tile: Tensor) -> None:
        outer, inner = self._inside(corner)
        if all(s.stop > s.start for s in outer):
            self.whole[outer] = tile[inner]


@dataclass(frozen=True)
class Pointer:
    """Into a dense tensor, as a kernel adds to it."""

    flat: Tensor
    at: Any = 0

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.flat, self.at + more)


def stand_ins(machine: Machine) -> dict[str, Any]:
    """What kernels find under `gl`, `tl`, `mbarrier`, `tma` and the names imported from Hopper's module."""
    language = _language(machine)
    return {"gl": language, "tl": language, "mbarrier": _barriers(machine), **_copies(machine), **_products(machine)}


def _barriers(machine: Machine) -> types.SimpleNamespace:
    def wait(barrier: BarrierRef, phase: int) -> None:
        it = barrier.it
        where = f"the end of a phase of parity {phase} of {it.name}, which is in {it.phase}"
        machine.pause(lambda: it.phase & 1 != phase, where)

    def arrive(barrier: BarrierRef, count: int = 1) -> None:
        machine.pause()
        barrier.it.move(count, 0)

    def expect(barrier: BarrierRef, bytes: int) -> None:
        machine.pause()
        barrier.it.move(1, bytes)

    def init(barrier: BarrierRef, count: int) -> None:
        barrier.array[barrier.i] = Barrier(count, count, f"barrier {barrier.i} of {len(barrier.array)}")

    return types.SimpleNamespace(wait=wait, arrive=arrive, expect=expect, init=init, MBarrierLayout=lambda: None)


def _copies(machine: Machine) -> dict[str, Any]:
    def load(source: Descriptor, corner: list[int], barrier: BarrierRef, tile: Shared) -> None:
        machine.pause()
        tile.memory.fill_(math.nan)

        def arrives() -> None:
            source.read(corner, tile.memory)
            barrier.it.move(0, -source.block_type.nbytes)

        machine.copy(None, arrives)

    def store(target: Descriptor, corner: list[int], tile: Shared) -> None:
        machine.pause()
        machine.copy(machine.me(), lambda: target.write(corner, tile.memory))

    def store_wait(pending: int) -> None:
        own = machine.me()
        machine.pause(lambda: len(machine.stores(own)) <= pending, "its stores")

    def fence() -> None:
        machine.pause()
        for write in machine.unfenced.pop(machine.me(), []):
            write()

    names = {"async_copy_global_to_shared": load, "async_copy_shared_to_global": store, "store_wait": store_wait}
    return {"tma": types.SimpleNamespace(**names), "fence_async_shared": fence}


def _products(machine: Machine) -> dict[str, Any]:
    def product(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
        machine.pause()
        issued = Product(a, b, acc, use_acc)
        machine.products[machine.me()].append(issued)
        return issued if is_async else wait(0, [issued])

    def wait(outstanding: int, deps: list[Any]) -> Any:
        machine.pause()
        mine = machine.products[machine.me()]
        while len(mine) > outstanding:
            mine.pop(0).finish()
        results = [x.result if isinstance(x, Product) else x for x in deps]
        if any(result is None for result in results):
            raise ProtocolError("a result taken while its product is on its way")
        return results[0] if len(results) == 1 else tuple(results)

    return {"warpgroup_mma": product, "warpgroup_mma_wait": wait}


def _language(machine: Machine) -> types.SimpleNamespace:
    def allocate(dtype: Any, shape: list[int], layout: Any) -> Shared:
        if dtype == torch.int64:
            return Shared(machine, torch.empty(0), shape[0])
        return Shared(machine, torch.full(shape, math.nan, dtype=dtype))

    return types.SimpleNamespace(
        float32=torch.float64,
        int64=torch.int64,
        program_id=lambda axis: machine.program,
        num_programs=lambda axis: machine.programs,
        static_range=range,
        warp_specialize=lambda functions, warps, registers: machine.specialise(functions),
        allocate_shared_memory=allocate,
        store=_store,
        where=lambda c, x, y: torch.where(c, x, y) if isinstance(c, Tensor) else (x if c else y),
        maximum=lambda x, y: torch.maximum(x, y) if isinstance(x, Tensor) else max(x, y),
        minimum=lambda x, y: x.clamp(max=y) if isinstance(x, Tensor) else min(x, y),
        cdiv=lambda x, y: -(-x // y),
        cast=lambda x, dtype: x,
        arange=lambda low, high, layout=None: torch.arange(low, high),
        full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
        zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
        convert_layout=lambda x, layout: x,
        max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis),
        **{name: getattr(torch, name) for name in ("exp", "exp2", "log2", "abs")},
        **dict.fromkeys(("NVMMADistributedLayout", "SliceLayout", "DotOperandLayout"), lambda *parts: None),
    )


def _store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    pointer.flat[pointer.at[mask]] = value[mask]


def plain(kernel: Any, names: dict[str, Any], done: dict[Any, Any] | None = None) -> Callable[..., Any]:
    """The Python function behind a kernel, its globals replaced by `names` and by what kernels it calls, likewise."""
    done = {} if done is None else done
    original = kernel.fn
    if original not in done:
        scope = dict(original.__globals__)
        done[original] = types.FunctionType(original.__code__, scope, original.__name__, original.__defaults__)
        for name in original.__code__.co_names:
            if name in names:
                scope[name] = names[name]
            elif hasattr(scope.get(name), "fn"):
                scope[name] = plain(scope[name], names, done)
    return done[original]


def run(launch: Any, seed: int) -> dict[str, Any]:
    """Execute a recorded launch, program after program, under the schedule that `seed` draws, in fp64.

    Returns what the kernel's arguments hold then, by name: copies in fp64, the call's own tensors stay as they are.
    """
    chance, names = random.Random(seed), list(inspect.signature(launch.kernel.fn).parameters)
    arguments = [_argument(x) for x in launch.arguments]
    (programs,) = launch.grid
    for program in range(programs):
        machine = Machine(chance, program, programs)
        plain(launch.kernel, stand_ins(machine))(*arguments, **launch.constexprs)
    memory = [getattr(x, "whole", getattr(x, "flat", x)) for x in arguments]
    return dict(zip(names, memory, strict=False))


def _argument(x: Any) -> Any:
    if hasattr(x, "block_shape"):
        return Descriptor(x)
    return Pointer(torch.full((x.numel(),), math.nan, dtype=torch.float64)) if isinstance(x, Tensor) else x
