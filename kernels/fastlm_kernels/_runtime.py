"""May Triton run on this call? And: one kernel, registered once for eager mode and once for the compiler.

Every public function asks `choose(...)` first and takes its Triton path only on a yes; `backend` forces the
answer, `explain` shows it. `Operator` wraps a pair of launchers (forward, backward) so that

    eager mode      runs them through a plain `torch.autograd.Function` (about a third of an op's overhead),
    torch.compile,  fake tensors and tracing see a registered operator with a fake and an autograd formula.

Names in all kernels. Pointers are capitals, the same in every family:

    X, Y            input and output rows; S one of them, saved
    Q, K, G, U      queries and keys (YQ, YK out); gate and up
    R, H            the residual, and the sum X + R
    W, B            weight and bias (WQ, WK of queries and keys), or the classes' weights, whose sum is WEIGHT_SUM
    COS, SIN        tables by position
    V, OUT, DELTA   attention's values, its output (DO its gradient) and rowsum(DO OUT); there T and S are the lengths
    MASK, KEY_MASK  which keys take part, for each query or for all; SEED of dropout
    CU_Q, CU_K, USED_K      where packed documents begin, and how many of their keys are used
    PARTIAL_LSE     the log-sum-exp of each part of a long cache
    T               targets
    D...            the loss's gradient with respect to what follows: DX, DY, DO, DYQ; DW and DB are partial sums
    UPSTREAM        the gradient of what follows the loss: one number, or one a row
    STATS, LSE      of each row: rstd and then mean; the logarithm of the sum of its powers
    LOSS, Z, COUNT  of each row: the loss, its part from LSE^2, what it adds to the mean's denominator
    LOSS_SUM, Z_SUM, DENOMINATOR, ITEMS     their sums, and the number that replaces the last
    PARTIAL, TOTAL  (programs, N) and its sum; SECOND_PARTIAL, SECOND_TOTAL another such pair

There are M rows of N columns, P partial sums, D channels of a head (a constexpr); stride_x is X's step from row to row,
stride_qb, _qh, _qt Q's from batch to batch, head to head, position to position. A tile is BLOCK_M x BLOCK_N, of
positions BLOCK_T; ACC is the type of sums; a program takes `steps` tiles. Arguments come as input pointers, output
pointers, sizes and strides and scalars, constexpr; sizes that vary from call to call are not specialised, so that
they never compile a new binary. Row lengths and row strides are, on whether 16 divides them, which wide loads
need: at most two binaries for each of them, whatever their values.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False
    triton = tl = None  # type: ignore[assignment]

# Triton decides this when a kernel is decorated, so it is read once, as the kernels are defined.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

# Operators are named after the package as it was imported: a copied package registers operators of its own.
NAMESPACE = (__package__ or "fastlm_kernels").replace(".", "__")

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_CAPTURE_MODES = (FakeTensorMode, FunctionalTensorMode, ProxyTorchDispatchMode)
_OLDEST_CAPABILITY = (8, 0)
_REGISTERS = 65536  # of one multiprocessor, on every supported NVIDIA architecture

# Plain globals on purpose: Dynamo guards on them, so that a compiled function follows `backend`.
_forced: str | None = None
_explaining: int | None = None
_recorder: list[Launch] | None = None
_architecture: str | None = None
_capabilities: dict[int, tuple[int, int]] = {}

Public = TypeVar("Public", bound=Callable[..., Any])


@dataclass(frozen=True)
class Explanation:
    """Which path a call takes, and why."""

    path: Literal["triton", "torch"]
    reason: str


class _Answered(Exception):
    """Carries the answer of `choose` out of the function being explained, before it computes anything."""

    def __init__(self, explanation: Explanation):
        self.explanation = explanation
        super().__init__(explanation.reason)


class backend(contextlib.ContextDecorator):
    """Force the path of every function of this package: `with backend("torch"):`, or as a decorator.

    "torch" takes PyTorch's ops. "triton" takes the kernels wherever they give the right answer, at sizes
    where PyTorch's op would be preferred too; a call that no kernel covers still takes PyTorch's op, and
    `explain` says why. The path is fixed in the forward: a backward run later, outside the block, follows its
    forward. Activation checkpointing runs the forward again in the backward, and that one asks again: keep the
    backward inside the block too (where the two differ, PyTorch raises CheckpointError). Process-wide; may be nested.
    """

    def __init__(self, name: str):
        if name not in ("triton", "torch"):
            raise ValueError(f"backend: got {name!r}; use 'triton' or 'torch'")
        self.name = name
        self._outer: list[str | None] = []

    def __enter__(self) -> backend:
        global _forced
        self._outer.append(_forced)
        _forced = self.name
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _forced
        _forced = self._outer.pop()


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """The path ("triton" or "torch") that `fn(*args, **kwargs)` would take, and why; computes nothing.

    `fn` is one of this package's functions on tensors. Raises ValueError for anything else.
    """
    reason = getattr(fn, "_without_kernel", None)
    if reason is not None:
        return Explanation("torch", reason)
    # Asking any other function would run it.
    if not getattr(fn, "_asks", False):
        raise ValueError(f"explain: got {fn!r}; pass a function of {__package__} that computes, such as rms_norm")
    global _explaining
    outer, _explaining = _explaining, threading.get_ident()
    try:
        fn(*args, **kwargs)
    except _Answered as answer:
        return answer.explanation
    finally:
        _explaining = outer
    raise AssertionError(f"{fn!r} is marked `with_kernel` and did not ask `choose`")


def with_kernel(fn: Public) -> Public:
    """Mark a public function that asks `choose` before it computes anything, so that `explain` may call it."""
    fn._asks = True  # type: ignore[attr-defined]
    return fn


def without_kernel(reason: str) -> Callable[[Public], Public]:
    """Mark a public function that is PyTorch's op and asks nothing, so that `explain` can say so."""

    def mark(fn: Public) -> Public:
        fn._without_kernel = reason  # type: ignore[attr-defined]
        return fn

    return mark


def choose(*tensors: Tensor | None, obstacle: str | None = None, prefer_torch: str | None = None) -> bool:
    """Whether the call takes its Triton path. Every public function asks this once, before it computes.

    tensors       all tensor arguments, None for those left out
    obstacle      why no kernel covers this call (a dtype, a shape, an option), None if one does
    prefer_torch  why PyTorch's op is the better choice here (a small size); `backend("triton")` overrules it
    """
    reason = _why_torch(tensors, obstacle, prefer_torch)
    if _explaining is not None and _explaining == threading.get_ident():
        path: Literal["triton", "torch"] = "triton" if reason is None else "torch"
        raise _Answered(Explanation(path, reason or _why_triton()))
    return reason is None


def _why_torch(tensors: Sequence[Tensor | None], obstacle: str | None, prefer_torch: str | None) -> str | None:
    if _forced == "torch":
        return "backend('torch') is in force"
    if not HAS_TRITON:
        return "Triton is not installed"
    if obstacle is not None:
        return obstacle
    device: torch.device | None = None
    for tensor in tensors:
        if tensor is None:
            continue
        reason = _not_plain(tensor)
        if reason is not None:
            return reason
        if device is not None and tensor.device != device:
            return f"tensors lie on {device} and {tensor.device}"
        device = tensor.device
    if device is not None:
        reason = _device_obstacle(device)
        if reason is not None:
            return reason
    reason = _mode_obstacle()
    if reason is not None:
        return reason
    return prefer_torch if _forced is None else None


def _not_plain(tensor: Tensor) -> str | None:
    if type(tensor) not in _PLAIN_TYPES and type(tensor) is not FakeTensor:
        return f"{type(tensor).__name__} is not a plain tensor"
    if tensor.is_nested or tensor.layout is not torch.strided:
        return f"a tensor of layout {tensor.layout}{' (nested)' if tensor.is_nested else ''}"
    # The dispatcher resolves lazy negation before a registered operator; a raw pointer would not see it.
    if not torch.compiler.is_compiling() and tensor.is_neg():
        return "a lazily negated view"
    return None


def _device_obstacle(device: torch.device) -> str | None:
    if _recorder is not None:
        return None
    if INTERPRETED:
        return None if device.type in ("cpu", "cuda") else f"no Triton interpreter for {device.type} tensors"
    if device.type != "cuda":
        return f"tensors are on {device.type}; Triton needs a GPU (or TRITON_INTERPRET=1 set before import)"
    return None if torch.version.hip is not None else _age_obstacle(device.index or 0)


def _age_obstacle(index: int) -> str | None:
    # Fake tensors may lie on a GPU that is not here: that one is taken for a new one.
    capability = _capabilities.get(index)
    if capability is None and torch.cuda.is_available():
        capability = _capabilities[index] = torch.cuda.get_device_capability(index)
    if capability is not None and capability < _OLDEST_CAPABILITY:
        return f"compute capability {capability} is older than {_OLDEST_CAPABILITY}"
    return None


# What torch.compiler.assume_constant_result does, without loading the compiler: Dynamo calls the function while it
# traces and takes the answer for a constant, so that compiled code asks the device as eager code does.
_age_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _mode_obstacle() -> str | None:
    """Transforms and modes that a raw kernel launch would bypass."""
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch.compiler.is_compiling():
        return None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    for index in range(torch._C._len_torch_dispatch_stack()):
        mode = torch._C._get_dispatch_stack_at(index)
        if not isinstance(mode, _CAPTURE_MODES):
            return f"the dispatch mode {type(mode).__name__} is active"
    return None


def _why_triton() -> str:
    where = "in Triton's interpreter" if INTERPRETED else "on the GPU"
    return f"the kernel runs {where}" + (", forced by backend('triton')" if _forced == "triton" else "")


def autocast_to_fp32(tensor: Tensor) -> bool:
    """Whether autocast runs norms and softmax in fp32: CUDA's list holds them, the CPU's does not."""
    return tensor.device.type == "cuda" and torch.is_autocast_enabled("cuda")


def capturing(tensor: Tensor) -> bool:
    """Whether a graph is being captured (compiler, export, fake tensors), which needs the operator."""
    return torch.compiler.is_compiling() or type(tensor) is FakeTensor or torch._C._len_torch_dispatch_stack() > 0


@contextlib.contextmanager
def on_device(tensor: Tensor) -> Iterator[None]:
    """Make the tensor's GPU current: Triton launches on the current device, whatever the arguments."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        yield
    else:
        with torch.cuda.device(tensor.device):
            yield


def kernel(do_not_specialize: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit`; where Triton is missing the function stays as it is and is never called."""

    def decorate(fn: Callable[..., Any]) -> Any:
        return triton.jit(do_not_specialize=list(do_not_specialize))(fn) if triton is not None else fn

    return decorate


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as a launcher asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constexprs: dict[str, Any]
    options: dict[str, int]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    *,
    num_warps: int,
    max_registers: int | None = None,
    scratch: bool = False,
    **constexprs: Any,
) -> None:
    """Launch `kernel` on the device of its first tensor argument, on that device's current stream.

    max_registers  registers a thread may use where the hardware has them. Given none, NVIDIA's assembler prefers a
                   few more resident warps to the last few registers, and spills.
    scratch        the kernel needs memory of its own, as one that makes descriptors does; freed after it has run
    """
    options = {"num_warps": num_warps}
    if max_registers is not None and _is_nvidia():
        options["maxnreg"] = min(max_registers, _REGISTERS // (32 * num_warps))
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, arguments, constexprs, options))
        return
    run = functools.partial(kernel[grid], *arguments, **constexprs, **options)
    with on_device(next(a for a in arguments if isinstance(a, Tensor))):
        # Triton's allocator is a context variable: set in a copy of the context, it is the launch's alone.
        contextvars.copy_context().run(_with_allocator, run) if scratch else run()


def _with_allocator(run: Callable[[], object]) -> None:
    triton.set_allocator(_allocate)  # type: ignore[union-attr]
    run()


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Of the caching allocator, whose blocks are aligned and not given to another stream."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _is_nvidia() -> bool:
    return torch.version.hip is None if _architecture is None else _architecture.startswith("sm_")


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Collect the launches that launchers would make on `architecture` (say "sm_90"), make none."""
    global _recorder, _architecture
    _recorder, _architecture = [], architecture
    try:
        yield _recorder
    finally:
        _recorder = _architecture = None


def architecture(device: torch.device) -> str:
    """The device's entry in the configuration tables: "sm_90", "gfx942"; "generic" for anything but a GPU."""
    if _architecture is not None:
        return _architecture
    return _device_architecture(device.index or 0) if device.type == "cuda" else "generic"


@functools.cache
def _device_architecture(index: int) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs side by side; 1 in the interpreter, so that programs walk several tiles."""
    if device.type != "cuda" or _recorder is not None:
        return 1
    return _device_multiprocessors(device.index or 0)


@functools.cache
def _device_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


class Operator:
    """A forward and a backward launcher as one differentiable function.

    forward(*inputs)                    launches kernels, returns a tensor or a tuple of tensors
    fake(*inputs)                       the same form, nothing computed
    setup_context(ctx, inputs, output)  saves what backward needs
    backward(ctx, *grads)               a gradient (or None) for each input

    An output that nobody asked for has zero elements: operators cannot return None. `backward` calls another
    `Operator`, never a launcher, so that it can be captured too. An operator without a `backward` raises when
    it is differentiated. (`once_differentiable` is not enough: its error node is cut off from the inputs, so
    that torch.autograd.grad walks around it and a gradient penalty comes out wrong without a word.)
    """

    def __init__(
        self,
        schema: str,
        forward: Callable[..., Tensor | tuple[Tensor, ...]],
        fake: Callable[..., Tensor | tuple[Tensor, ...]],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., tuple[Any, ...]] | None = None,
    ):
        name, _, signature = schema.partition("(")
        self.launch = forward
        self.op = torch.library.custom_op(f"{NAMESPACE}::{name}", forward, mutates_args=(), schema=f"({signature}")
        self.op.register_fake(fake)
        if backward is not None and setup_context is not None:
            self.op.register_autograd(backward, setup_context=setup_context)
        self._function = _autograd_function(name, forward, setup_context, backward or _raise_for(name))

    def __call__(self, *inputs: Any) -> Any:
        """Run on `inputs`, the first of them a tensor: by the operator while capturing, else straight."""
        if capturing(inputs[0]):
            return self.op(*inputs)
        if not torch.is_grad_enabled():
            return self.launch(*inputs)
        return self._function.apply(*inputs)


def _autograd_function(name: str, forward: Any, setup: Any, backward: Any) -> Any:
    def eager_forward(ctx: Any, *inputs: Any) -> Any:
        outputs = forward(*inputs)
        if setup is not None:
            setup(ctx, inputs, outputs)
        return outputs

    body = {"forward": staticmethod(eager_forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), body)


def _raise_for(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{NAMESPACE}.{name} cannot be differentiated: the kernels have no second derivative;"
            f" run the forward under {NAMESPACE}.backend('torch') for PyTorch's"
        )

    return backward
