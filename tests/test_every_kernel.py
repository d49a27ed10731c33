"""What is true of every kernel in the registry (the guarantees of the package), on the kernels themselves."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from layouts import LAYOUTS, expanded, lay_out, moat, offset, padded, snapshot, transposed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointError, checkpoint

from fastlm_kernels import _rows, _runtime, configs
from fastlm_kernels.check import DTYPES, check_kernel, compare, leaves_of, outputs_of, results, upstream_gradients
from fastlm_kernels.registry import CALLS, KERNELS, Arguments, Case, Kernel, case_name

pytestmark = [pytest.mark.needs_kernels, pytest.mark.usefixtures("poisoned")]

SHAPE = {"rows": 5, "columns": 12}


def of_families(*families: str) -> pytest.MarkDecorator:
    """The kernels of these modules; none named: all."""
    chosen = [k for k in KERNELS if not families or k.fused.__module__.rpartition(".")[2] in families]
    return pytest.mark.parametrize("kernel", chosen, ids=lambda kernel: kernel.name)


every_kernel = of_families()
# Packed documents too; their definition reads lengths on the host, so that it cannot be captured.
every_call = pytest.mark.parametrize("kernel", CALLS, ids=lambda kernel: kernel.name)
# One result a row (or an element), whatever axes stand before it.
every_row_kernel = of_families("norm", "softmax", "activation")
# Rows that do not fit a program's registers are walked in blocks.
every_long_row_kernel = of_families("norm", "softmax", "cross_entropy")
every_kernel_and_length = pytest.mark.parametrize(
    ("kernel", "long_rows"),
    [(k, False) for k in KERNELS] + [(k, True) for k in every_long_row_kernel.args[1]],
    ids=lambda value: value.name if isinstance(value, Kernel) else ("long" if value else "whole"),
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

CASES = [
    pytest.param(kernel, case, dtype, id=f"{kernel.name}-{case_name(case)}-{str(dtype).removeprefix('torch.')}")
    for kernel in CALLS
    for case in kernel.small
    for dtype in DTYPES
    # The interpreter takes seconds for one of the longest rows.
    if case["columns"] < 8192 or dtype is torch.bfloat16
]


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4 columns: short rows take the path of rows too long for registers."""
    for name, value in vars(configs).items():
        if isinstance(value, configs.RowConfig):
            monkeypatch.setattr(configs, name, configs.RowConfig(2, 4, 4))
        elif isinstance(value, dict) and isinstance(value.get("generic", ((),))[0], configs.RowConfig):
            only = len(value["generic"]) == 1
            monkeypatch.setattr(configs, name, {"generic": (configs.RowConfig(2, 4, 4),) if only else ()})


@pytest.fixture
def differentiable_attention() -> Iterator[None]:
    """PyTorch's attention by its operator of plain products: its fused ones have no second or forward derivatives."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


def sensitive(kernel: Kernel) -> Case:
    """Options that make small terms show in short rows."""
    return {"eps": 0.1} if kernel.fused.__module__.endswith(".norm") else {}


def make(
    kernel: Kernel, device: str, dtype: torch.dtype = torch.float32, case: Case = SHAPE
) -> tuple[Arguments, tuple[Tensor, ...]]:
    """(arguments, upstream gradients); the call takes the Triton path, or the test says so."""
    arguments = kernel.inputs(dtype, device, 3, **case)
    explanation = _runtime.explain(kernel.fused, **arguments)
    assert explanation.path == "triton", explanation.reason
    return arguments, upstream_gradients(kernel.reference, arguments, 4)


def assert_accurate(kernel: Kernel, arguments: Arguments, upstream: tuple[Tensor, ...]) -> None:
    """The accuracy rule, with every figure in the message."""
    errors = compare(kernel.fused, kernel.reference, arguments, upstream)
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


def bits(found: dict[str, Tensor]) -> dict[str, bytes]:
    """Results as bytes: equal only if every bit is."""
    return {
        name: t.reshape(-1).view(torch.uint8).cpu().numpy().tobytes() if t.numel() else b"" for name, t in found.items()
    }


@pytest.mark.parametrize(("kernel", "case", "dtype"), CASES)
def test_as_accurate_as_pytorch(kernel: Kernel, case: Case, dtype: torch.dtype, kernel_device: str) -> None:
    """Output and gradients of every case in every dtype."""
    make(kernel, kernel_device, dtype, case)
    errors = check_kernel(kernel, case, dtype, kernel_device)
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


@every_long_row_kernel
@every_dtype
@pytest.mark.usefixtures("tiny_tiles")
def test_long_rows_walked_in_blocks(kernel: Kernel, dtype: torch.dtype, kernel_device: str) -> None:
    """Many blocks a row, the last one partial."""
    for columns in (3, 4, 5, 23):
        case = {"rows": 9, "columns": columns, **sensitive(kernel)}
        assert_accurate(kernel, *make(kernel, kernel_device, dtype, case))


@of_families("norm")
@every_dtype
@pytest.mark.parametrize("long_rows", [False, True])
def test_programs_that_walk_several_tiles(
    kernel: Kernel,
    dtype: torch.dtype,
    long_rows: bool,
    kernel_device: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """As with many rows, on a GPU of any size: few programs, each with several tiles, not the same number for all."""
    if long_rows:
        request.getfixturevalue("tiny_tiles")
    monkeypatch.setattr(_runtime, "multiprocessors", lambda device: 1)
    module, steps = sys.modules[kernel.fused.__module__], []
    launch = module.launch

    def noted(fn: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **options: Any) -> None:
        if "steps" in fn.arg_names:
            steps.append((fn.__name__, arguments[fn.arg_names.index("steps")]))
        launch(fn, grid, arguments, **options)

    monkeypatch.setattr(module, "launch", noted)
    shape = {"rows": 35, "columns": 5} if long_rows else {"rows": 300, "columns": 64}
    assert_accurate(kernel, *make(kernel, kernel_device, dtype, shape))
    assert steps
    assert all(count > 1 for _, count in steps), steps


@every_kernel_and_length
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_any_strides_and_offsets(
    kernel: Kernel,
    layout: Callable[[Tensor], Tensor],
    long_rows: bool,
    kernel_device: str,
    request: pytest.FixtureRequest,
) -> None:
    """Inputs and upstream gradients in every layout, each surrounded by NaN; none of that memory is written."""
    if long_rows:
        request.getfixturevalue("tiny_tiles")
    arguments, upstream = make(kernel, kernel_device)
    arguments = dict(zip(arguments, lay_out(tuple(arguments.values()), layout), strict=True))
    upstream = lay_out(upstream, layout)
    before = snapshot((*arguments.values(), *upstream))
    assert_accurate(kernel, arguments, upstream)
    for old, new in zip(before, snapshot((*arguments.values(), *upstream)), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


@every_row_kernel
def test_leading_axes_and_several_normalised_axes_keep_their_shape(kernel: Kernel, kernel_device: str) -> None:
    """More axes than rows and columns, where the function takes them."""
    arguments, upstream = make(kernel, kernel_device, case={"rows": 12, "columns": 8})
    flat = results(kernel.fused, arguments, upstream)
    shaped = {
        name: a.detach().reshape(3, 2, 2, 8).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        if isinstance(a, Tensor) and a.dim() == 2
        else a
        for name, a in arguments.items()
    }
    folded = results(kernel.fused, shaped, tuple(u.reshape(3, 2, 2, 8) for u in upstream))
    for name, tensor in folded.items():
        assert tensor.shape == ((3, 2, 2, 8) if flat[name].dim() == 2 else flat[name].shape)
        torch.testing.assert_close(tensor.reshape(flat[name].shape), flat[name])


@every_kernel
@pytest.mark.parametrize("layout", [expanded, transposed, padded, offset, moat], ids=lambda f: f.__name__)
def test_upstream_gradient_of_any_stride(
    kernel: Kernel, layout: Callable[[Tensor], Tensor], kernel_device: str
) -> None:
    """Only the upstream gradient is laid out; the inputs are plain."""
    arguments, upstream = make(kernel, kernel_device, torch.float16)
    assert_accurate(kernel, arguments, lay_out(upstream, layout))


@every_kernel
def test_upstream_scalar_expanded_to_every_element(kernel: Kernel, kernel_device: str) -> None:
    """What (2.5 * y.sum()).backward() sends: one number, every stride 0."""
    arguments, upstream = make(kernel, kernel_device)
    scalar = torch.tensor(2.5, device=kernel_device)
    assert_accurate(kernel, arguments, tuple(scalar.expand(u.shape) for u in upstream))


@every_kernel
def test_one_output_used_alone(kernel: Kernel, kernel_device: str) -> None:
    """The gradient of each output by itself, the others unused."""
    arguments, _ = make(kernel, kernel_device)
    leaves = list(leaves_of(arguments).values())
    for index in range(len(outputs_of(kernel.reference, arguments))):
        ours, theirs = (
            torch.autograd.grad(outputs_of(fn, arguments)[index].square().sum(), leaves, allow_unused=True)
            for fn in (kernel.fused, kernel.reference)
        )
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b)


@every_kernel_and_length
def test_each_gradient_alone_is_the_same(
    kernel: Kernel, long_rows: bool, kernel_device: str, request: pytest.FixtureRequest
) -> None:
    """Freezing the other arguments changes no bit of a gradient, and frozen ones get none."""
    if long_rows:
        request.getfixturevalue("tiny_tiles")
    arguments, upstream = make(kernel, kernel_device)
    full = results(kernel.fused, arguments, upstream)
    leaves = leaves_of(arguments)
    for kept in leaves:
        frozen = arguments | {name: leaf.detach().requires_grad_(name == kept) for name, leaf in leaves.items()}
        alone = bits(results(kernel.fused, frozen, upstream))
        assert {name: bits(full)[name] for name in alone} == alone


@every_kernel
def test_no_gradient_needed_gives_the_same_output(kernel: Kernel, kernel_device: str) -> None:
    """Under no_grad and inference_mode, bit for bit."""
    arguments, _ = make(kernel, kernel_device)
    expected = bits(results(kernel.fused, arguments))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert bits(results(kernel.fused, arguments)) == expected


@every_kernel
@every_dtype
def test_bitwise_repeatable_and_two_backwards_agree(kernel: Kernel, dtype: torch.dtype, kernel_device: str) -> None:
    """Two runs, and two backwards of one graph, give the same bits."""
    arguments, upstream = make(kernel, kernel_device, dtype, {"rows": 200, "columns": 64})
    first = bits(results(kernel.fused, arguments, upstream))
    assert bits(results(kernel.fused, arguments, upstream)) == first
    outputs = outputs_of(kernel.fused, arguments)
    leaves = list(leaves_of(arguments).values())
    once = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    twice = torch.autograd.grad(outputs, leaves, upstream)
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(a, b)


@every_call
def test_no_rows(kernel: Kernel, kernel_device: str) -> None:
    """Empty batches: what PyTorch gives, and gradients of exactly 0."""
    arguments, upstream = make(kernel, kernel_device, case={"rows": 0, "columns": 12})
    ours = results(kernel.fused, arguments, upstream)
    for name, tensor in results(kernel.reference, arguments, upstream).items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0, equal_nan=True)
        assert name.startswith("output") or not ours[name].any()


@every_row_kernel
def test_no_rows_inside_of_more_axes(kernel: Kernel, kernel_device: str) -> None:
    """Three times no rows."""
    arguments, _ = make(kernel, kernel_device, case={"rows": 0, "columns": 12})
    shaped = {
        name: a.detach().reshape(3, 0, 12).requires_grad_() if isinstance(a, Tensor) and a.dim() == 2 else a
        for name, a in arguments.items()
    }
    upstream = upstream_gradients(kernel.reference, shaped, 0)
    ours = results(kernel.fused, shaped, upstream)
    for name, tensor in results(kernel.reference, shaped, upstream).items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)


@every_row_kernel
def test_rows_of_no_elements(kernel: Kernel, kernel_device: str) -> None:
    """normalized_shape (0,) and the like answer as PyTorch does."""
    arguments = kernel.inputs(torch.float32, kernel_device, 0, rows=3, columns=0)
    for name, tensor in results(kernel.reference, arguments).items():
        torch.testing.assert_close(results(kernel.fused, arguments)[name], tensor)


@every_kernel_and_length
def test_gradients_by_finite_differences(
    kernel: Kernel,
    long_rows: bool,
    kernel_device: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """The kernels themselves, summing in fp64, against numerical derivatives."""
    module = sys.modules[kernel.fused.__module__]
    monkeypatch.setattr(module, "_KERNEL_DTYPES", (torch.float64,))
    if long_rows:
        request.getfixturevalue("tiny_tiles")
    arguments, _ = make(kernel, kernel_device, torch.float64, {"rows": 3, "columns": 6, **sensitive(kernel)})
    leaves = leaves_of(arguments)
    assert torch.autograd.gradcheck(
        lambda *tensors: kernel.fused(**arguments | dict(zip(leaves, tensors, strict=True))), tuple(leaves.values())
    )


@every_kernel
def test_registered_operators_pass_opcheck(kernel: Kernel, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operator that the function calls, forward and backward, on the inputs that it gets."""
    called: list[tuple[_runtime.Operator, tuple[Any, ...]]] = []
    run = _runtime.Operator.__call__

    def record(self: _runtime.Operator, *inputs: Any) -> Any:
        called.append((self, inputs))
        return run(self, *inputs)

    monkeypatch.setattr(_runtime.Operator, "__call__", record)
    arguments, upstream = make(kernel, kernel_device)
    results(kernel.fused, arguments, upstream)
    monkeypatch.undo()
    torch.use_deterministic_algorithms(False)  # opcheck compares unneeded outputs too
    assert len(called) >= 2
    for operator, inputs in called:
        own = [a.detach().clone() if isinstance(a, Tensor) else a for a in inputs]
        if operator is called[0][0]:
            own = [
                b.requires_grad_(a.requires_grad) if isinstance(a, Tensor) else b
                for a, b in zip(inputs, own, strict=True)
            ]
        checks = torch.library.opcheck(operator.op, tuple(own))
        assert set(checks.values()) == {"SUCCESS"}


def test_every_pointer_is_in_the_table_of_names() -> None:
    """The module text of `_runtime` lists the pointers of all kernels, one meaning each."""
    listed = set(re.findall(r"[A-Z_]+", str(_runtime.__doc__).partition("There are M rows")[0]))
    kernels = [
        (name, fn)
        for module in {module for kernel in KERNELS for module in kernel.modules} | {_rows}
        for name, fn in vars(module).items()
        if name.endswith("_kernel") and hasattr(fn, "arg_names")
    ]
    assert len(kernels) > 10
    for name, fn in kernels:
        parameters = inspect.signature(fn.fn).parameters
        numbers = {"M", "N", "P", "SECOND_P"}
        pointers = {p for p in parameters if p.isupper() and parameters[p].annotation is inspect.Parameter.empty}
        gradients = {p for p in pointers if p.startswith("D") and p[1:] in listed}
        assert pointers <= listed | gradients | numbers, name


@every_kernel
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_outputs_require_a_gradient_where_pytorchs_do(kernel: Kernel, captured: bool, kernel_device: str) -> None:
    """For every subset of the arguments that may want a gradient, from the eager function and from the operator."""
    arguments, _ = make(kernel, kernel_device)
    leaves = leaves_of(arguments)
    fake = FakeTensorMode() if captured else None
    for wanted in itertools.product((False, True), repeat=len(leaves)):
        some = dict(zip(leaves, wanted, strict=True))
        own = {
            name: a.detach().clone().requires_grad_(some.get(name, False)) if isinstance(a, Tensor) else a
            for name, a in arguments.items()
        }
        if fake is not None:
            own = {name: fake.from_tensor(a) if isinstance(a, Tensor) else a for name, a in own.items()}
        with fake or contextlib.nullcontext():
            assert _runtime.explain(kernel.fused, **own).path == "triton"
            ours, theirs = ([o.requires_grad for o in outputs_of(fn, own)] for fn in (kernel.fused, kernel.reference))
        assert ours == theirs, some


@every_kernel
@pytest.mark.parametrize("dynamic", [None, True], ids=["once static", "dynamic"])
def test_compiles_whole_and_once_for_all_sizes(kernel: Kernel, dynamic: bool | None, kernel_device: str) -> None:
    """fullgraph, the kernels' operator inside, eager's bits; one graph, and before it a static one unless dynamic."""
    torch._dynamo.reset()
    codes: list[str] = []
    compilations: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        codes.append(graph.code)
        return aot_eager(graph, inputs)

    compiled = torch.compile(lambda given: kernel.fused(**given), fullgraph=True, dynamic=dynamic, backend=backend)
    for rows in (7, 9, 13, 70):
        arguments, upstream = make(kernel, kernel_device, case={"rows": rows, "columns": 24})
        found = results(lambda **given: compiled(given), arguments, upstream)
        assert bits(found) == bits(results(kernel.fused, arguments, upstream))
        compilations.append(len(codes))
    # Of a function with numbers the compiler makes a second graph at once, where they are constants.
    assert compilations[-1] <= 2
    assert compilations[-1] == compilations[0 if dynamic else 1]
    assert all(_runtime.NAMESPACE in code for code in codes)


@every_kernel
@pytest.mark.usefixtures("differentiable_attention")
def test_gradient_penalty_is_right_or_raises(kernel: Kernel, kernel_device: str) -> None:
    """create_graph=True through a kernel must never give a wrong second derivative."""
    arguments, _ = make(kernel, kernel_device)
    leaf = next(iter(leaves_of(arguments).values()))

    def penalty(fn: Callable[..., Any]) -> Tensor:
        first = outputs_of(fn, arguments)[0]
        (grad,) = torch.autograd.grad(first.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum() + first.sum(), leaf)[0]

    with pytest.raises(RuntimeError, match="no second derivative"):
        penalty(kernel.fused)
    with _runtime.backend("torch"):
        torch.testing.assert_close(penalty(kernel.fused), penalty(kernel.reference))


@every_kernel
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_gradient_penalty_raises(kernel: Kernel, compiler: str, kernel_device: str) -> None:
    """The same for the registered operator, where the first term alone would lack its second derivative."""
    arguments, _ = make(kernel, kernel_device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda given: kernel.fused(**given), fullgraph=True, backend=compiler)
    first = outputs_of(lambda **given: compiled(given), arguments)[0]
    leaf = next(iter(leaves_of(arguments).values()))
    (grad,) = torch.autograd.grad(first.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative|double backward"):
        torch.autograd.grad(grad.square().sum() + first.sum(), leaf)


def _detached(arguments: Arguments) -> Arguments:
    return {name: a.detach() if isinstance(a, Tensor) else a for name, a in arguments.items()}


def _first(fn: Callable[..., Any], arguments: Arguments) -> Callable[[Tensor], Tensor]:
    """The first output as a function of the first argument."""
    name = next(iter(arguments))
    return lambda tensor: outputs_of(fn, arguments | {name: tensor})[0]


@every_kernel
@pytest.mark.usefixtures("differentiable_attention")
def test_function_transforms_take_pytorchs_path(kernel: Kernel, kernel_device: str) -> None:
    """func.grad, vmap(grad), jvp and jacrev equal the reference's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own import of its jvp rules
        importlib.import_module("torch._decomp.decompositions_for_jvp")
    arguments, _ = make(kernel, kernel_device)
    arguments = _detached(arguments)
    x = next(iter(arguments.values()))
    ours, theirs = _first(kernel.fused, arguments), _first(kernel.reference, arguments)
    for transform in (
        lambda fn: torch.func.grad(lambda t: fn(t).square().sum())(x),
        lambda fn: torch.func.jvp(fn, (x,), (torch.ones_like(x),))[1],
        lambda fn: torch.func.jacrev(fn)(x),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [torch.autograd.forward_ad.unpack_dual(fn(dual)).tangent for fn in (ours, theirs)]
    assert tangents[0] is not None
    torch.testing.assert_close(*tangents)


@of_families("norm", "softmax", "activation", "cross_entropy")
def test_vmap_over_rows_takes_pytorchs_path(kernel: Kernel, kernel_device: str) -> None:
    """vmap(grad) of one row's function equals the reference's."""
    arguments = _detached(make(kernel, kernel_device)[0])
    rows = len(next(iter(arguments.values())))
    row = {k: a[0] if isinstance(a, Tensor) and len(a) == rows else a for k, a in arguments.items()}
    ours, theirs = (
        torch.func.vmap(torch.func.grad(lambda t, fn=fn: _first(fn, row)(t).square().sum()))(
            next(iter(arguments.values()))
        )
        for fn in (kernel.fused, kernel.reference)
    )
    torch.testing.assert_close(ours, theirs)


class Tagged(Tensor):
    """A subclass that says which functions of PyTorch saw it."""

    seen: tuple[str, ...] = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the function, then run it as usual."""
        cls.seen = (*cls.seen, getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


@every_kernel
def test_subclasses_and_foreign_modes_take_pytorchs_path(kernel: Kernel, kernel_device: str) -> None:
    """A tensor subclass and a dispatch mode both see the op that a raw launch would hide from them."""
    from torch.utils.flop_counter import FlopCounterMode

    arguments, _ = make(kernel, kernel_device)
    Tagged.seen = ()
    name, first = next(iter(arguments.items()))
    tagged = arguments | {name: first.detach().as_subclass(Tagged)}
    assert _runtime.explain(kernel.fused, **tagged).path == "torch"
    Tagged.seen = ()
    outputs = outputs_of(kernel.fused, tagged)
    assert any("get" not in name for name in Tagged.seen)
    assert isinstance(outputs[0], Tagged)
    with FlopCounterMode(display=False):
        assert _runtime.explain(kernel.fused, **arguments).path == "torch"


@of_families("norm", "softmax", "activation", "cross_entropy", "rotary")
def test_dtensor_equals_the_reference(kernel: Kernel, kernel_device: str) -> None:
    """A distributed tensor takes PyTorch's op, which knows how to shard it."""
    from torch.distributed.tensor import DTensor, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        arguments, _ = make(kernel, kernel_device)
        mesh = torch.distributed.device_mesh.init_device_mesh(kernel_device, (1,))
        spread = {
            name: distribute_tensor(a.detach(), mesh) if isinstance(a, Tensor) else a for name, a in arguments.items()
        }
        first = outputs_of(kernel.fused, spread)[0]
        assert isinstance(first, DTensor)
        torch.testing.assert_close(first.to_local(), results(kernel.reference, arguments)["output 0"])
    finally:
        torch.distributed.destroy_process_group()


@every_kernel
def test_negated_views_and_other_dtypes_take_pytorchs_path(kernel: Kernel, kernel_device: str) -> None:
    """A lazily negated view holds other bits than its values; fp64 has no kernel."""
    arguments, _ = make(kernel, kernel_device)
    name, first = next((name, a.detach()) for name, a in arguments.items() if isinstance(a, Tensor))
    negated = torch.complex(first, first).conj().imag
    assert negated.is_neg()
    for tensor in (negated, first.double()):
        others = {
            k: a.to(tensor.dtype) if isinstance(a, Tensor) and k in leaves_of(arguments) else a
            for k, a in arguments.items()
        }
        call = others | {name: tensor}
        assert _runtime.explain(kernel.fused, **call).path == "torch"
        ours, theirs = results(kernel.fused, call), results(kernel.reference, call)
        torch.testing.assert_close(ours, theirs)


@every_kernel
def test_negated_upstream_gradient(kernel: Kernel, kernel_device: str) -> None:
    """An upstream gradient may be a lazily negated view."""
    arguments, upstream = make(kernel, kernel_device)
    negated = tuple(torch.ops.aten._neg_view(u) for u in upstream)
    assert all(u.is_neg() and u.is_contiguous() for u in negated)
    ours = results(kernel.fused, arguments, negated)
    assert bits(ours) == bits(results(kernel.fused, arguments, tuple(-u for u in upstream)))


@of_families("norm", "softmax", "activation", "cross_entropy")
def test_rows_past_two_to_the_31_elements(kernel: Kernel, kernel_device: str) -> None:
    """Offsets are int64: the last of 70 rows lies 2.3e9 elements behind the first (memory touched: 70 rows)."""
    torch.use_deterministic_algorithms(False)  # would fill, and so touch, all of it
    arguments, upstream = make(kernel, kernel_device, torch.float16, {"rows": 70, "columns": 64})
    stride = 2**25

    def spread(tensor: Tensor) -> Tensor:
        if tensor.dim() != 2:
            return tensor
        memory = torch.empty(69 * stride + 64, dtype=tensor.dtype, device=tensor.device)
        return memory.as_strided((70, 64), (stride, 1)).copy_(tensor.detach())

    expected = results(kernel.fused, arguments, upstream)
    name, first = next(iter(arguments.items()))
    x = spread(first).requires_grad_()
    found = results(kernel.fused, arguments | {name: x}, (spread(upstream[0]), *upstream[1:]))
    assert bits(found) == bits(expected)


@every_kernel
def test_path_is_fixed_in_the_forward(kernel: Kernel, kernel_device: str) -> None:
    """A backward run inside backend("torch") follows its forward, bit for bit."""
    arguments, upstream = make(kernel, kernel_device)
    expected = list(results(kernel.fused, arguments, upstream).values())
    outputs = outputs_of(kernel.fused, arguments)
    with _runtime.backend("torch"):
        grads = torch.autograd.grad(outputs, list(leaves_of(arguments).values()), upstream)
    for tensor, wanted in zip(grads, expected[len(outputs) :], strict=True):
        assert torch.equal(tensor, wanted)


def _compiled_whole(function: Callable[[Arguments], Any]) -> tuple[Callable[[Arguments], Any], list[str]]:
    """(function compiled without a break, which runs its graphs as they are; the graphs' code as they come)."""
    torch._dynamo.reset()
    codes: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        codes.append(graph.code)
        return graph.forward

    return torch.compile(function, fullgraph=True, backend=backend), codes


@every_kernel
def test_backend_forces_the_path_in_compiled_code_too(kernel: Kernel, kernel_device: str) -> None:
    """Dynamo guards on the choice: the compiled function follows `backend` from call to call."""
    arguments, _ = make(kernel, kernel_device)
    compiled, codes = _compiled_whole(lambda given: kernel.fused(**given))
    compiled(arguments)
    with _runtime.backend("torch"):
        compiled(arguments)
    compiled(arguments)
    assert [_runtime.NAMESPACE in code for code in codes] == [True, False]


@every_kernel
def test_backend_inside_compiled_code(kernel: Kernel, kernel_device: str) -> None:
    """`with backend("torch")` may stand in the function that is compiled, and ends there."""

    def both(given: Arguments) -> Any:
        with _runtime.backend("torch"):
            plain = kernel.fused(**given)
        return plain, kernel.fused(**given)

    arguments, _ = make(kernel, kernel_device)
    compiled, codes = _compiled_whole(both)
    compiled(arguments)
    assert len(codes) == 1
    assert codes[0].count(f"ops.{_runtime.NAMESPACE}.") == 1
    assert _runtime._forced is None


@every_kernel
def test_traced_code_takes_pytorchs_path(kernel: Kernel, kernel_device: str) -> None:
    """torch.jit.trace records PyTorch's op; a raw launch would be baked in as a constant."""
    arguments, _ = make(kernel, kernel_device)
    arguments = _detached(arguments)
    x = next(iter(arguments.values()))
    ours, theirs = _first(kernel.fused, arguments), _first(kernel.reference, arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced: Any = torch.jit.trace(ours, x)
    torch.testing.assert_close(traced(2 * x + 1), theirs(2 * x + 1))


@every_kernel
def test_checkpoint_recomputes_on_the_path_in_force(kernel: Kernel, kernel_device: str) -> None:
    """Inside the block: PyTorch's gradients. Outside: the recomputation takes the kernel; right, or PyTorch says so."""
    arguments, upstream = make(kernel, kernel_device)
    leaves = list(leaves_of(arguments).values())

    def forward() -> tuple[Tensor, ...]:
        return outputs_of(lambda **given: checkpoint(kernel.fused, **given, use_reentrant=False), arguments)

    with _runtime.backend("torch"):
        grads = torch.autograd.grad(forward(), leaves, upstream)
        outputs = forward()
    wanted = list(results(kernel.reference, arguments, upstream).values())[-len(leaves) :]
    torch.testing.assert_close(list(grads), wanted)
    with contextlib.suppress(CheckpointError):
        torch.testing.assert_close(list(torch.autograd.grad(outputs, leaves, upstream)), wanted)


@pytest.mark.needs_gpu
@every_kernel
@every_dtype
def test_cuda_graph_replays_with_new_numbers(kernel: Kernel, dtype: torch.dtype) -> None:
    """Forward and backward captured once; refilled, the graph gives eager's bits."""
    shape = {"rows": 300, "columns": 768}
    arguments, upstream = make(kernel, "cuda", dtype, shape)
    fresh = kernel.inputs(dtype, "cuda", 7, **shape)
    leaves = list(leaves_of(arguments).values())

    def run() -> tuple[Tensor, ...]:
        outputs = outputs_of(kernel.fused, arguments)
        return (*outputs, *torch.autograd.grad(outputs, leaves, upstream))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for name, new in fresh.items():
            if isinstance(new, Tensor):
                arguments[name].copy_(new)
        for gradient, new in zip(upstream, upstream_gradients(kernel.reference, fresh, 8), strict=True):
            gradient.copy_(new)
    graph.replay()
    expected = results(kernel.fused, arguments, upstream)
    assert bits(dict(zip(expected, captured, strict=True))) == bits(expected)


@pytest.mark.needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@every_kernel
def test_inductors_code_never_waits_for_the_device(kernel: Kernel) -> None:
    """The default compiler, forward and backward: eager's bits, and no synchronisation."""
    torch._dynamo.reset()
    arguments, upstream = make(kernel, "cuda", torch.bfloat16, {"rows": 300, "columns": 768})
    leaves = list(leaves_of(arguments).values())
    compiled = torch.compile(lambda given: kernel.fused(**given), fullgraph=True)

    def run() -> tuple[Tensor, ...]:
        outputs = outputs_of(lambda **given: compiled(given), arguments)
        return (*outputs, *torch.autograd.grad(outputs, leaves, upstream))

    run()  # compiling may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = results(kernel.fused, arguments, upstream)
    assert bits(dict(zip(expected, found, strict=True))) == bits(expected)


@every_kernel
def test_a_change_between_forward_and_backward_is_noticed_or_harmless(kernel: Kernel, kernel_device: str) -> None:
    """Saved tensors are saved through autograd: writing to one raises instead of giving a wrong gradient."""
    arguments, upstream = make(kernel, kernel_device)
    names = list(leaves_of(arguments))

    def run(spoil: int | None) -> list[Tensor]:
        doubled = arguments | {name: arguments[name] * 2 for name in names}
        outputs = outputs_of(kernel.fused, doubled)
        if spoil is not None:
            (*(doubled[name] for name in names), *outputs)[spoil].detach().zero_()
        return list(torch.autograd.grad(outputs, [arguments[name] for name in names], upstream))

    expected, raised = run(None), 0
    for spoil in range(len(names) + len(upstream)):
        try:
            found = run(spoil)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raised += 1
        else:
            assert all(map(torch.equal, found, expected))
    # What forms its gradients in the forward has no use for its inputs afterwards.
    assert raised or kernel.name == "linear_cross_entropy"
