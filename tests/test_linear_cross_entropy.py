"""linear_cross_entropy: equal to logits and cross_entropy in float64, in every shape that DESIGN 3.1 names."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm_kernels as fk
from bench import bench_kernels
from fastlm_kernels import configs
from fastlm_kernels.check import DTYPES, compare, leaves_of, results, upstream_gradients
from fastlm_kernels.registry import KERNELS, case_name

pytestmark = pytest.mark.both_paths

# The package's attribute of that name is the function.
module: Any = sys.modules["fastlm_kernels.linear_cross_entropy"]
KERNEL = next(kernel for kernel in KERNELS if kernel.fused is fk.linear_cross_entropy)


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    input = torch.randn(2, 6, 7, dtype=dtype)
    linear_weight = torch.randn(11, 7, dtype=dtype)
    bias = torch.randn(11, dtype=dtype)
    target = torch.randint(0, 11, (2, 6))
    target[0, 3] = -100
    return input, linear_weight, bias, target, 0.2 + torch.rand(11, dtype=dtype)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 4.0}, {"z_loss": 0.2}, {"label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("dims", [2, 3])
def test_equals_the_formula(reduction: str, options: dict[str, Any], dims: int) -> None:
    input, linear_weight, bias, target, weight = _inputs()
    input, target = (input, target) if dims == 3 else (input.flatten(0, 1), target.flatten())
    leaves = [t.clone().requires_grad_() for t in (input, linear_weight, bias)]
    loss = fk.linear_cross_entropy(
        leaves[0], leaves[1], target, linear_bias=leaves[2], weight=weight, reduction=reduction, **options
    )
    copies = [t.clone().requires_grad_() for t in (input, linear_weight, bias)]
    logits = torch.einsum("...d,vd->...v", copies[0], copies[1]) + copies[2]
    cap = options.get("softcap")
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    flat, flat_target = logits.reshape(-1, 11), target.flatten()
    smoothing = options.get("label_smoothing", 0.0)
    expected = F.cross_entropy(flat, flat_target, weight, reduction="none", label_smoothing=smoothing)
    counted = flat_target != -100
    expected = expected + torch.where(counted, options.get("z_loss", 0.0) * flat.logsumexp(-1) ** 2, 0.0)
    if reduction == "none":
        expected = expected.view(target.shape)
    else:
        expected = expected.sum() / (weight[flat_target[counted]].sum() if reduction == "mean" else 1.0)
    assert loss.shape == expected.shape
    torch.testing.assert_close(loss, expected)
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    grads = torch.autograd.grad(loss, leaves, upstream)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, copies, upstream), strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_gradcheck_with_our_options() -> None:
    input, linear_weight, bias, target, weight = _inputs()

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Any:
        return fk.linear_cross_entropy(
            x, w, target, linear_bias=b, weight=weight, softcap=3.0, z_loss=0.1, num_items=torch.tensor(9)
        )

    leaves = tuple(t.requires_grad_() for t in (input, linear_weight, bias))
    assert torch.autograd.gradcheck(loss, leaves)


def test_num_items_makes_micro_batches_add_up() -> None:
    input, linear_weight, _, target, _ = _inputs()
    whole = fk.linear_cross_entropy(input, linear_weight, target, softcap=5.0)
    items = int((target != -100).sum())
    parts = [
        fk.linear_cross_entropy(input[i : i + 1], linear_weight, target[i : i + 1], softcap=5.0, num_items=items)
        for i in range(2)
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_return_z_loss_keeps_the_tokens_shape() -> None:
    input, linear_weight, _, target, _ = _inputs()
    loss, z = fk.linear_cross_entropy(input, linear_weight, target, reduction="none", z_loss=0.5, return_z_loss=True)
    assert loss.shape == z.shape == target.shape
    plain = fk.linear_cross_entropy(input, linear_weight, target, reduction="none")
    torch.testing.assert_close(loss - z, plain)
    assert z[0, 3] == 0


def test_probabilities_per_token() -> None:
    input, linear_weight, _, _, _ = _inputs()
    probabilities = torch.randn(2, 6, 11, dtype=torch.float64).softmax(-1)
    loss = fk.linear_cross_entropy(input, linear_weight, probabilities)
    logits = input @ linear_weight.T
    torch.testing.assert_close(loss, -(probabilities * logits.log_softmax(-1)).sum(-1).mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_difference_a_losses_are_fp32(dtype: torch.dtype) -> None:
    input, linear_weight, _, target, _ = _inputs(dtype)
    loss = fk.linear_cross_entropy(input, linear_weight, target)
    assert loss.dtype == torch.float32
    logits = (input @ linear_weight.T).double().flatten(0, 1)
    torch.testing.assert_close(loss.double(), F.cross_entropy(logits, target.flatten()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "z_loss": 0.1}], ids=["plain", "ours"])
def test_difference_b_nothing_counted(options: dict[str, Any]) -> None:
    input, linear_weight, _, target, _ = _inputs()
    leaves = [input.requires_grad_(), linear_weight.requires_grad_()]
    ignored = torch.full_like(target, -100)
    loss = fk.linear_cross_entropy(leaves[0], leaves[1], ignored, **options)
    assert loss.isnan()
    assert all(not grad.any() for grad in torch.autograd.grad(loss, leaves))
    loss = fk.linear_cross_entropy(leaves[0], leaves[1], ignored, num_items=12, **options)
    assert loss.item() == 0.0
    assert all(not grad.any() for grad in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(
    ("target_shape", "words"),
    [((2, 5), "target: got shape (2, 5)"), ((12,), "target: got shape (12,)"), ((2, 6, 10), "calls for (2, 6)")],
    ids=str,
)
def test_targets_that_do_not_fit_three_dimensions(target_shape: tuple[int, ...], words: str) -> None:
    input, linear_weight, _, _, _ = _inputs()
    with pytest.raises(RuntimeError) as error:
        fk.linear_cross_entropy(input, linear_weight, torch.zeros(target_shape, dtype=torch.long))
    assert words in str(error.value)


def test_bad_options_are_value_errors() -> None:
    input, linear_weight, _, target, _ = _inputs()
    calls: Any = ({"softcap": -2.0}, {"z_loss": -1.0}, {"num_items": 3, "reduction": "none"}, {"num_items": 2**63})
    for options in calls:
        with pytest.raises(ValueError, match=r"give|use"):
            fk.linear_cross_entropy(input, linear_weight, target, **options)


@pytest.mark.parametrize("reduction", ["average", None, 3], ids=str)
def test_num_items_does_not_hide_a_bad_reduction(reduction: Any) -> None:
    input, linear_weight, _, target, _ = _inputs(torch.float32)
    with pytest.raises(ValueError, match="is not a valid value for reduction"):
        fk.linear_cross_entropy(input, linear_weight, target, reduction=reduction, num_items=2)


@pytest.mark.parametrize("options", [3, "a", {}], ids=str)
def test_options_of_another_kind_are_pytorchs_error(options: Any) -> None:
    """On every version, also those that have no such class."""
    input, linear_weight, _, target, _ = _inputs(torch.float32)
    with pytest.raises(AttributeError, match="LinearCrossEntropyOptions, or None"):
        fk.linear_cross_entropy(input, linear_weight, target, options=options)


def test_num_items_that_requires_a_gradient_gets_it() -> None:
    input, linear_weight, _, target, _ = _inputs(torch.float32)
    items = torch.tensor(4.0, requires_grad=True)
    loss = fk.linear_cross_entropy(input, linear_weight, target, num_items=items)
    (grad,) = torch.autograd.grad(loss, items)
    torch.testing.assert_close(grad, -loss.detach() / 4)


# The kernels: everything below in chunks of 4 tokens or blocks of 4 classes, the last of them shorter.

# Numbers that fp32 holds exactly, as the kernels get them.
EVERY_TERM = {"bias": True, "weight": True, "label_smoothing": 0.125, "z_loss": 0.0625, "softcap": 4.0}
SHAPE = {"rows": 11, "columns": 6, "classes": 13}
TOKEN_CHUNKS, CLASS_BLOCKS = 3, 4
needs_kernels = pytest.mark.needs_kernels
every_mode = pytest.mark.parametrize("mode", ["tokens", "classes"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def use_tiny_plans(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """4 tokens a chunk; in mode "classes" 4 classes a block."""
    for name, value in {"_LEAST_ROWS": 4, "_MOST_ROWS": 4, "_MULTIPLE": 4, "_BUFFER_BYTES": 0}.items():
        monkeypatch.setattr(configs._linear_cross_entropy, name, value)
    for owner in (configs, configs._linear_cross_entropy):
        monkeypatch.setattr(owner, "linear_cross_entropy_by_classes", lambda *shape: mode == "classes")
    plan = configs.linear_cross_entropy_plan(SHAPE["rows"], SHAPE["columns"], SHAPE["classes"], torch.float32)
    assert (plan.mode, plan.rows, plan.classes) == (mode, 4, 4 if mode == "classes" else SHAPE["classes"])


@pytest.fixture
def tiny_plans(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`use_tiny_plans` for the test's own mode."""
    use_tiny_plans(monkeypatch, mode)


def arguments_of(
    device: str, dtype: torch.dtype = torch.float32, **case: Any
) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """(arguments, upstream gradients) of a call that takes the kernels, or the test says why it does not."""
    arguments = KERNEL.inputs(dtype, device, 7, **SHAPE | case)
    explanation = fk.explain(fk.linear_cross_entropy, **arguments)
    assert explanation.path == "triton", explanation.reason
    return arguments, upstream_gradients(KERNEL.reference, arguments, 8)


@needs_kernels
@every_mode
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("tiny_plans")
def test_rows_past_num_classes_stand_for_no_class(kernel_device: str, reduction: str) -> None:
    """The padded head gives the same loss and gradients, and zeros for its own rows: one whole block of them, too."""
    arguments: dict[str, Any] = arguments_of(kernel_device, reduction=reduction, softcap=5.0)[0] | {"linear_bias": None}
    whole = {name: arguments[name].detach().clone().requires_grad_() for name in ("input", "linear_weight")}
    classes = whole["linear_weight"].shape[0]
    loss = fk.linear_cross_entropy(**arguments | whole)
    loss.sum().backward()
    padded = F.pad(whole["linear_weight"].detach(), (0, 0, 0, 7)).requires_grad_()
    input = whole["input"].detach().clone().requires_grad_()
    again = fk.linear_cross_entropy(**arguments | {"input": input, "linear_weight": padded}, num_classes=classes)
    again.sum().backward()
    assert padded.grad is not None
    assert not padded.grad[classes:].any()
    pairs = (again, loss), (input.grad, whole["input"].grad), (padded.grad[:classes], whole["linear_weight"].grad)
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("classes", "bias"), [(0, False), (12, False), (True, False), (5.0, False), (5, True)])
def test_num_classes_cuts_a_plain_head(classes: int, bias: bool) -> None:
    input, linear_weight, added, target, _ = _inputs()
    with pytest.raises(ValueError, match="num_classes"):
        fk.linear_cross_entropy(input, linear_weight, target, linear_bias=added if bias else None, num_classes=classes)


@needs_kernels
@every_mode
@every_dtype
@pytest.mark.parametrize(
    "case",
    [{}, EVERY_TERM, {"reduction": "sum", "bias": True}, {"reduction": "none"}, {"reduction": "none", **EVERY_TERM}],
    ids=case_name,
)
@pytest.mark.usefixtures("tiny_plans", "poisoned")
def test_chunks_are_as_accurate_as_pytorch(case: Any, dtype: torch.dtype, mode: str, kernel_device: str) -> None:
    """The accuracy rule, every output and gradient."""
    errors = compare(fk.linear_cross_entropy, KERNEL.reference, *arguments_of(kernel_device, dtype, **case))
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


@needs_kernels
@every_mode
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_equal_one_chunk_in_fp64(
    mode: str, reduction: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding apart, the plan changes nothing: outputs and every gradient."""
    monkeypatch.setattr(module, "_KERNEL_DTYPES", (torch.float64,))
    arguments, upstream = arguments_of(kernel_device, torch.float64, reduction=reduction, **EVERY_TERM)
    whole = results(fk.linear_cross_entropy, arguments, upstream)
    use_tiny_plans(monkeypatch, mode)
    torch.testing.assert_close(results(fk.linear_cross_entropy, arguments, upstream), whole, rtol=1e-11, atol=1e-11)
    # The kernels' tanh is as exact as fp32 asks.
    torch.testing.assert_close(whole, results(KERNEL.reference, arguments, upstream), rtol=1e-6, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize(("mode", "reduction"), [("tokens", "mean"), ("classes", "none")])
@pytest.mark.usefixtures("tiny_plans")
def test_chunks_by_finite_differences(
    mode: str, reduction: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels themselves, summing in fp64."""
    monkeypatch.setattr(module, "_KERNEL_DTYPES", (torch.float64,))
    case = {"rows": 5, "columns": 2, "classes": 5, "reduction": reduction, **EVERY_TERM}
    arguments, _ = arguments_of(kernel_device, torch.float64, **case)
    leaves = leaves_of(arguments)
    assert len(leaves) == 3
    assert torch.autograd.gradcheck(
        lambda *tensors: fk.linear_cross_entropy(**arguments | dict(zip(leaves, tensors, strict=True))),
        tuple(leaves.values()),
    )


def equal_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """The same names and the same values, NaN for NaN."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].nan_to_num(1e9), expected[name].nan_to_num(1e9)) for name in found
    )


@needs_kernels
@every_mode
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("tiny_plans", "poisoned")
def test_chunks_repeat_bit_for_bit(mode: str, reduction: str, kernel_device: str) -> None:
    """Two calls; two backwards of one graph, nothing modified between them; the loss under no_grad."""
    arguments, upstream = arguments_of(kernel_device, torch.bfloat16, reduction=reduction, bias=True)
    first = results(fk.linear_cross_entropy, arguments, upstream)
    assert equal_bits(results(fk.linear_cross_entropy, arguments, upstream), first)
    output, leaves = fk.linear_cross_entropy(**arguments), leaves_of(arguments)
    for _ in range(2):
        grads = torch.autograd.grad(output, list(leaves.values()), upstream, retain_graph=True)
        assert equal_bits(first | {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}, first)
    with torch.no_grad():
        assert torch.equal(fk.linear_cross_entropy(**arguments), first["output 0"])


class Calls(TorchDispatchMode):
    """Matrix products, and the largest and all living memory, of what runs inside; that of `inputs` does not count."""

    def __init__(self, *inputs: Any) -> None:
        super().__init__()
        self.products = self.largest = self.living = self.peak = 0
        # Tensors alive on each piece of memory.
        self.users: dict[int, int] = {t.untyped_storage()._cdata: 1 for t in inputs if isinstance(t, Tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator; note its products and new memory."""
        result = func(*args, **kwargs or {})
        self.products += func._schema.name in ("aten::mm", "aten::addmm")
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        self.users[key] = self.users.get(key, 0) + 1
        if self.users[key] == 1:
            self.largest, self.living = max(self.largest, size), self.living + size
            self.peak = max(self.peak, self.living)
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.users[key] -= 1
        self.living -= 0 if self.users[key] else size


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched, in order; those that write a gradient too with a +."""
    names: list[str] = []
    rows: Any = sys.modules["fastlm_kernels.cross_entropy"]
    for owner in (module._scale, rows._forward, rows._reduce, rows._backward):

        def noted(fn: Any, *args: Any, run: Any = owner.launch, **options: Any) -> None:
            names.append(fn.__name__ + "+" * options.get("HAS_GRADIENT", False))
            run(fn, *args, **options)

        monkeypatch.setattr(owner, "launch", noted)
    return names


def operator_inputs(arguments: dict[str, Any], needs: list[bool], reduction: str = "mean") -> tuple[Any, ...]:
    """The forward operator's inputs."""
    tensors = (arguments[name].detach() for name in ("input", "linear_weight"))
    return (
        *tensors,
        None,
        arguments["target"],
        None,
        None,
        reduction,
        -100,
        0.0,
        0.0,
        None,
        arguments["linear_weight"].shape[0],
        needs,
        reduction == "none",
    )


@needs_kernels
@every_mode
@pytest.mark.usefixtures("tiny_plans")
def test_products_and_launches_of_a_step(mode: str, kernel_device: str, launches: list[str]) -> None:
    """No pass beyond what the module's text counts; only what is needed is formed."""
    arguments, _ = arguments_of(kernel_device)
    forward, scale = module.linear_cross_entropy_forward.launch, module.linear_cross_entropy_scale.launch
    blocks = CLASS_BLOCKS if mode == "classes" else 0
    for needs, products in (
        ([True, True, False], 3 * TOKEN_CHUNKS if mode == "tokens" else TOKEN_CHUNKS + 3 * blocks),
        ([False, True, False], 2 * TOKEN_CHUNKS if mode == "tokens" else TOKEN_CHUNKS + 2 * blocks),
        # A frozen head sums no weight gradient: one pass.
        ([True, False, False], 2 * TOKEN_CHUNKS),
        ([False, False, False], TOKEN_CHUNKS),
    ):
        launches.clear()
        with Calls() as calls:
            *_, dx, dw, db, _ = forward(*operator_inputs(arguments, needs))
        assert calls.products == products
        one_pass = any(needs) and not (blocks and needs[1])
        assert launches.count("cross_entropy_forward_kernel" + "+" * one_pass) == TOKEN_CHUNKS
        assert launches.count("cross_entropy_backward_kernel") == (blocks if needs[1] else 0)
        assert launches.count("cross_entropy_reduce_kernel") == 1
        launches.clear()
        one = torch.ones((), device=kernel_device)
        with Calls() as calls:
            scale(one, one, dx, dw, db, torch.float32)
        assert calls.products == 0
        assert launches == ["linear_cross_entropy_scale_kernel"] * sum(needs)


@needs_kernels
@every_mode
@pytest.mark.usefixtures("tiny_plans")
def test_products_of_a_loss_for_each_token(mode: str, kernel_device: str, launches: list[str]) -> None:
    """Logits once for the loss, once more for the gradients."""
    arguments, _ = arguments_of(kernel_device)
    inputs = operator_inputs(arguments, [False] * 3, "none")
    with Calls() as calls:
        loss, *_, lse = module.linear_cross_entropy_forward.launch(*inputs)
    assert calls.products == TOKEN_CHUNKS
    rest = (inputs[0], inputs[1], None, inputs[3], None, *inputs[7:12], [True, True, False])
    with Calls() as calls:
        module.linear_cross_entropy_backward.launch(torch.ones_like(loss), lse, *rest)
    parts = TOKEN_CHUNKS if mode == "tokens" else CLASS_BLOCKS
    assert calls.products == 3 * parts
    assert launches.count("cross_entropy_backward_kernel") == parts


@needs_kernels
@pytest.mark.usefixtures("tiny_plans")
@pytest.mark.parametrize("mode", ["tokens"])
def test_never_more_than_a_chunk_of_logits(mode: str, kernel_device: str) -> None:
    """240 tokens x 500 classes in chunks of 4 tokens: the peak is the chunk, the sums and the results."""
    arguments, _ = arguments_of(kernel_device, torch.bfloat16, rows=240, columns=6, classes=500)
    inputs = operator_inputs(arguments, [True, True, False])
    with Calls(*inputs) as calls:
        kept = module.linear_cross_entropy_forward.launch(*inputs)
    chunk, dx, dw = 4 * 500 * 2, 240 * 6 * 2, 500 * 6 * 4
    assert [t.numel() * t.element_size() for t in kept[3:5]] == [dx, dw]
    assert calls.largest == dw
    # On a CPU no product takes 16-bit operands and fp32 results: one chunk's operands are copied.
    copies = 0 if kernel_device == "cuda" else 2 * chunk + 4 * 6 * 4 + dw
    assert calls.peak <= chunk + dx + dw + 240 * 5 * 4 + copies + 4096
    assert calls.peak * 4 < 240 * 500 * 2


def test_plan_of_the_shape_that_the_design_names() -> None:
    """64k tokens x 50304 classes x 768: at most an eighth of the logits and their gradient, final dW not counted."""
    tokens, hidden, classes = 65536, 768, 50304
    plan = configs.linear_cross_entropy_plan(tokens, hidden, classes, torch.bfloat16)
    assert (plan.mode, plan.rows) == ("tokens", 11008)
    ours = plan.buffer_elements * 2 + classes * hidden * 4 + 2 * tokens * hidden * 2
    assert ours * 8 <= 2 * tokens * classes * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [768, 4096, 8192])
@pytest.mark.parametrize("classes", [50304, 128256, 262144])
def test_plans_of_all_sizes(classes: int, hidden: int, dtype: torch.dtype) -> None:
    """Chunks cover all tokens, blocks all classes, in parts of equal length; the buffer holds what the plan says."""
    for tokens in (1, 255, 8192, 8193, 12_345, 65536, 1_000_000):
        plan = configs.linear_cross_entropy_plan(tokens, hidden, classes, dtype)
        assert plan == configs.linear_cross_entropy_plan(tokens, hidden, classes, dtype)
        assert plan.rows == tokens or (plan.rows % 256 == 0 and 1024 <= plan.rows <= 11264)
        assert (tokens - 1) // plan.rows == (tokens - 1) // min(tokens, -(-tokens // -(-tokens // plan.rows)))
        assert plan.buffer_elements >= plan.rows * classes
        allowed = max(2**30, 2 * tokens * classes * dtype.itemsize // 8)
        assert plan.rows <= 2048 or plan.rows * classes * dtype.itemsize <= allowed
        large = dtype == torch.bfloat16 and hidden * classes * 4 > 2**31 and plan.rows < tokens
        assert plan.mode == ("classes" if large else "tokens")
        if large:
            assert plan.classes % 256 == 0
            assert plan.buffer_elements >= tokens * min(plan.classes, classes)
            frozen = configs.linear_cross_entropy_plan(tokens, hidden, classes, dtype, weight_gradient=False)
            assert (frozen.mode, frozen.rows) == ("tokens", plan.rows)


@pytest.mark.parametrize("case", KERNEL.large, ids=case_name)
def test_what_is_timed_is_what_was_checked(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benches check fewer tokens than they time: in as many chunks and blocks of classes all the same."""
    timed = configs.linear_cross_entropy_plan(case["rows"], case["columns"], case["classes"], torch.bfloat16)
    parts = (timed.mode, -(-case["rows"] // timed.rows), -(-case["classes"] // timed.classes))
    seen: list[Any] = []

    def check_kernel(kernel: Any, small: Any, dtype: torch.dtype, device: str) -> list[Any]:
        plan = configs.linear_cross_entropy_plan(small["rows"], small["columns"], small["classes"], dtype)
        seen.append((plan.mode, -(-small["rows"] // plan.rows), -(-small["classes"] // plan.classes)))
        assert small["rows"] <= 256
        assert plan.buffer_elements >= plan.rows * case["classes"]
        assert plan.mode == "tokens" or plan.buffer_elements >= small["rows"] * plan.classes
        return []

    monkeypatch.setattr(bench_kernels, "check_kernel", check_kernel)
    monkeypatch.setattr(bench_kernels, "DTYPE", torch.bfloat16)
    bench_kernels._check.__wrapped__(KERNELS.index(KERNEL), tuple(case.items()))
    assert seen == [parts]


def test_benches_time_every_way_of_walking() -> None:
    """One chunk, several, and blocks of classes."""
    large: Any = KERNEL.large
    plans = [
        configs.linear_cross_entropy_plan(case["rows"], case["columns"], case["classes"], torch.bfloat16)
        for case in large
    ]
    chunks = [-(-case["rows"] // plan.rows) for case, plan in zip(large, plans, strict=True)]
    assert min(chunks) == 1
    assert {plan.mode for plan, count in zip(plans, chunks, strict=True) if count > 1} == {"tokens", "classes"}


@needs_kernels
@every_mode
@pytest.mark.parametrize("tokens", [0, 9])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("tiny_plans", "poisoned")
def test_nothing_counted_in_the_kernels(mode: str, tokens: int, bias: bool, kernel_device: str) -> None:
    """Difference (b): NaN with gradients of exactly 0; 0 with num_items."""
    arguments, _ = arguments_of(kernel_device, torch.float16, rows=tokens, bias=bias, z_loss=0.1)
    arguments["target"].fill_(-100)
    for num_items, expected in ((None, torch.nan), (12, 0.0), (torch.tensor(0), 0.0)):
        loss = fk.linear_cross_entropy(**arguments, num_items=num_items)
        torch.testing.assert_close(loss, torch.tensor(expected, device=kernel_device), equal_nan=True)
        grads = torch.autograd.grad(loss, list(leaves_of(arguments).values()))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    loss = fk.linear_cross_entropy(**arguments, reduction="none")
    assert torch.equal(loss, torch.zeros_like(loss))
    grads = torch.autograd.grad(loss.sum(), list(leaves_of(arguments).values()))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@needs_kernels
@every_mode
@pytest.mark.parametrize("terms", [{}, {"z_loss": 0.1, "bias": True}], ids=case_name)
@pytest.mark.usefixtures("tiny_plans", "poisoned")
def test_class_weights_that_sum_to_zero(mode: str, terms: Any, kernel_device: str) -> None:
    """Not the same as nothing counted: NaN where PyTorch's gradients are, and 0 for ignored tokens; else untouched."""
    arguments, _ = arguments_of(kernel_device, **terms)
    assert (arguments["target"] == -100).any()
    arguments["weight"] = torch.zeros(SHAPE["classes"], device=kernel_device)
    leaves = list(leaves_of(arguments).values())
    finite = []
    for fn in (fk.linear_cross_entropy, KERNEL.reference):
        loss = fn(**arguments)
        assert not loss.isfinite()
        finite.append([grad.isfinite() for grad in torch.autograd.grad(loss, leaves)])
    assert torch.equal(finite[0][0], (arguments["target"] == -100)[:, None].expand_as(leaves[0]))
    torch.testing.assert_close(*finite)
    others: tuple[Any, ...] = ({"reduction": "sum"}, {"num_items": 3})
    for other in others:
        call: Any = arguments | other
        expected = torch.autograd.grad(KERNEL.reference(**call), leaves)
        torch.testing.assert_close(torch.autograd.grad(fk.linear_cross_entropy(**call), leaves), expected)
    arguments["target"].fill_(-100)
    for grad in torch.autograd.grad(fk.linear_cross_entropy(**arguments), leaves):
        assert torch.equal(grad, torch.zeros_like(grad))


@needs_kernels
def test_class_weights_of_counted_tokens_alone(kernel_device: str) -> None:
    """An ignored token's target is no class: the weight that stands where it points may not enter the sum."""
    arguments, upstream = arguments_of(kernel_device)
    arguments["target"], arguments["ignore_index"] = torch.arange(11, device=kernel_device) % 3, 2
    arguments["weight"] = torch.zeros(SHAPE["classes"], device=kernel_device)
    arguments["weight"][2] = 1.0
    x, head = leaves_of(arguments).values()
    grads = torch.autograd.grad(fk.linear_cross_entropy(**arguments), (x, head), upstream)
    assert torch.equal(grads[0].isnan().all(1), arguments["target"] != 2)
    assert grads[1].isnan().all()


@needs_kernels
@every_mode
@pytest.mark.usefixtures("tiny_plans")
def test_fp16_gradients_do_not_depend_on_a_loss_scale(mode: str, kernel_device: str) -> None:
    """Under a scale of 65536 exactly 65536 times those of scale 1, down to where those are subnormal."""
    arguments, _ = arguments_of(kernel_device, torch.float16, num_items=2**24)
    leaves = list(leaves_of(arguments).values())
    loss = fk.linear_cross_entropy(**arguments)
    wide = arguments | {k: a.detach().double().requires_grad_() for k, a in leaves_of(arguments).items()}
    truth = torch.autograd.grad(65536 * KERNEL.reference(**wide), list(leaves_of(wide).values()))
    for grad, exact in zip(torch.autograd.grad(loss, leaves, torch.full_like(loss, 65536)), truth, strict=True):
        assert grad.dtype == torch.float16
        torch.testing.assert_close(grad.double(), exact, rtol=4e-3, atol=2e-3 * exact.abs().max().item())
        assert exact.abs().max() < 65536 * torch.finfo(torch.float16).smallest_normal


@needs_kernels
@every_dtype
def test_kept_gradients_are_as_wide_as_they_must(dtype: torch.dtype, kernel_device: str) -> None:
    """Sums over tokens in fp32; dx too in fp16, whose range a token's unscaled gradient may pass."""
    arguments, _ = arguments_of(kernel_device, dtype)
    *_, dx, dw, db, _ = module.linear_cross_entropy_forward.launch(*operator_inputs(arguments, [True] * 3))
    assert (dw.dtype, db.dtype) == (torch.float32, torch.float32)
    assert dx.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


@needs_kernels
def test_fp16_sums_over_many_tokens_stay_finite(kernel_device: str) -> None:
    """Halves of 3000 hidden states of 60 add up to 90,000, more than fp16 holds; their mean is 30."""
    x = torch.full((3000, 2), 60.0, dtype=torch.float16, device=kernel_device)
    head = torch.tensor([[0.1, 0.0], [0.0, 0.1]], dtype=torch.float16, device=kernel_device, requires_grad=True)
    target = torch.zeros(3000, dtype=torch.int64, device=kernel_device)
    assert fk.explain(fk.linear_cross_entropy, x, head, target).path == "triton"
    (grad,) = torch.autograd.grad(fk.linear_cross_entropy(x, head, target), head)
    torch.testing.assert_close(grad.float(), torch.tensor([[-30.0, -30.0], [30.0, 30.0]], device=kernel_device))


@needs_kernels
@every_dtype
def test_shapes_and_strides(dtype: torch.dtype, kernel_device: str) -> None:
    """(D,), (B, T, D), rows of a larger tensor, a transposed head, every other column: the values of (N, D)."""
    arguments, _ = arguments_of(kernel_device, dtype, reduction="none")
    x, head, target = (arguments[name].detach() for name in ("input", "linear_weight", "target"))
    plain = fk.linear_cross_entropy(x, head, target, reduction="none")

    def check(x: Tensor, head: Tensor, target: Tensor, expected: Tensor) -> None:
        assert fk.explain(fk.linear_cross_entropy, x, head, target).path == "triton"
        loss = fk.linear_cross_entropy(x, head, target, reduction="none")
        assert loss.shape == target.shape
        torch.testing.assert_close(loss.flatten(), expected.flatten(), rtol=1e-5, atol=1e-5)

    check(x[3], head, target[3], plain[3])
    check(x[:10].view(2, 5, 6), head, target[:10].view(2, 5), plain[:10])
    check(x[:10].view(5, 2, 6).transpose(0, 1), head, target[:10].view(5, 2).T, plain[:10].view(5, 2).T)
    check(torch.cat([x, x], 1)[:, 6:], head.T.contiguous().T, target, plain)
    check(x.repeat_interleave(2, 1)[:, ::2], head.repeat_interleave(2, 1)[:, ::2], target.to(torch.int64), plain)
    check(x[:1].expand(4, 6), head, target[:1].expand(4), plain[:1].expand(4))
    inside = target.where(target >= 0, 1)
    check(x, head, inside.to(torch.uint8), fk.linear_cross_entropy(x, head, inside, reduction="none"))


@needs_kernels
@every_mode
@pytest.mark.usefixtures("tiny_plans", "poisoned")
def test_upstream_gradients_of_any_stride(mode: str, kernel_device: str) -> None:
    """One number for all tokens, every other number, a lazily negated view: what plain ones give, bit for bit."""
    arguments, (upstream,) = arguments_of(kernel_device, torch.float16, reduction="none", bias=True)
    expected = results(fk.linear_cross_entropy, arguments, (upstream,))
    strided = torch.stack([upstream, upstream * torch.nan], 1)[:, 0]
    negated = torch.ops.aten._neg_view(-upstream)
    assert (strided.stride(), negated.is_neg()) == ((2,), True)
    for other in (strided, negated):
        assert equal_bits(results(fk.linear_cross_entropy, arguments, (other,)), expected)
    one = upstream[:1].expand_as(upstream)
    expected = results(fk.linear_cross_entropy, arguments, (one.contiguous(),))
    assert equal_bits(results(fk.linear_cross_entropy, arguments, (one,)), expected)


@needs_kernels
@every_mode
@pytest.mark.usefixtures("tiny_plans")
def test_tied_weights_add_up(mode: str, kernel_device: str) -> None:
    """The head is the embedding too: its gradient is the sum of both uses."""
    arguments, _ = arguments_of(kernel_device)
    table = arguments["linear_weight"].detach()
    tokens = torch.arange(11, device=kernel_device)
    grads = []
    for fn in (fk.linear_cross_entropy, KERNEL.reference):
        leaf = table.clone().requires_grad_()
        loss = fn(torch.nn.functional.embedding(tokens, leaf), leaf, arguments["target"])
        grads.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(*grads)


@needs_kernels
@every_mode
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("tiny_plans")
def test_return_z_loss_in_the_kernels(mode: str, reduction: str, kernel_device: str) -> None:
    """z as the reference gives it, detached; the loss and its gradient as without it."""
    arguments, upstream = arguments_of(kernel_device, z_loss=0.3, reduction=reduction)
    loss, z = fk.linear_cross_entropy(**arguments, return_z_loss=True)
    expected, expected_z = KERNEL.reference(**arguments, return_z_loss=True)
    torch.testing.assert_close((loss, z), (expected, expected_z))
    assert not z.requires_grad
    grads = torch.autograd.grad(loss, list(leaves_of(arguments).values()), upstream)
    torch.testing.assert_close(grads, tuple(results(KERNEL.reference, arguments, upstream).values())[1:])


@needs_kernels
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_references_dtypes(reduction: str, dtype: torch.dtype, kernel_device: str) -> None:
    """fp32 tensors under autocast: the product in 16 bits, loss and gradients in fp32."""
    arguments, upstream = arguments_of(kernel_device, bias=True, weight=True, reduction=reduction)
    leaves = list(leaves_of(arguments).values())
    found = []
    for fn in (fk.linear_cross_entropy, KERNEL.reference):
        with torch.autocast(kernel_device, dtype):
            if fn is fk.linear_cross_entropy:
                assert fk.explain(fn, **arguments).path == "triton"
            output = fn(**arguments)
        found.append((output, *torch.autograd.grad(output, leaves, upstream)))
        assert [t.dtype for t in found[-1]] == [torch.float32] * 4
    torch.testing.assert_close(found[0], found[1], rtol=0.03, atol=0.01)
    cast = arguments | {name: arguments[name].to(dtype) for name in leaves_of(arguments)}
    same = fk.linear_cross_entropy(**cast | {"weight": arguments["weight"].to(dtype)})
    torch.testing.assert_close(found[0][0], same, rtol=0.01, atol=0.01)
    assert not torch.equal(found[0][0], fk.linear_cross_entropy(**arguments))


@needs_kernels
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": torch.rand(11, 13)}, "targets of torch.float32"),
        ({"target": torch.zeros(11, dtype=torch.int32)}, "targets of torch.int32"),
        ({"linear_weight": torch.rand(13, 2, 6)}, "shapes"),
        ({"linear_weight": torch.rand(1, 6)}, "a head of shape (1, 6)"),
        ({"linear_weight": torch.rand(13, 6, dtype=torch.float16)}, "dtypes torch.float32 and torch.float16"),
        ({"input": torch.rand(11, 6, dtype=torch.float64)}, "no kernel for torch.float64"),
        ({"linear_bias": torch.rand(12)}, "linear_bias of shape (12,)"),
        ({"weight": torch.rand(13, dtype=torch.float16)}, "weight is torch.float16, input torch.float32"),
        ({"weight": torch.rand(12)}, "weight of shape (12,) for 13 classes"),
        ({"weight": torch.rand(13, requires_grad=True)}, "weight requires a gradient"),
        ({"reduction": "average"}, "reduction is 'average'"),
        ({"label_smoothing": 2.0}, "label_smoothing is 2.0"),
        ({"target": torch.zeros(11, dtype=torch.uint8), "label_smoothing": 0.1}, "PyTorch's label smoothing"),
        ({"ignore_index": 1.5}, "ignore_index is not an int"),
        ({"ignore_index": 2**63}, "ignore_index is no int64"),
        ({"num_items": torch.tensor(3.0, requires_grad=True)}, "num_items requires a gradient"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_calls_without_a_kernel_say_why(change: Any, words: str, kernel_device: str) -> None:
    arguments, _ = arguments_of(kernel_device)
    change = {name: v.to(kernel_device) if isinstance(v, Tensor) else v for name, v in change.items()}
    explanation = fk.explain(fk.linear_cross_entropy, **arguments | change)
    assert explanation.path == "torch"
    assert words in explanation.reason


@needs_kernels
@pytest.mark.parametrize("case", [{"reduction": "none", **EVERY_TERM}, EVERY_TERM], ids=case_name)
def test_options_compile_whole_with_eagers_bits(case: Any, kernel_device: str) -> None:
    """Every option inside the graph; the count of items may be a tensor or a number."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda given: fk.linear_cross_entropy(**given), fullgraph=True, backend="aot_eager")
    arguments, upstream = arguments_of(kernel_device, torch.bfloat16, **case)
    items = ({},) if "reduction" in case else ({"num_items": 9}, {"num_items": torch.tensor(9, device=kernel_device)})
    for extra in items:
        given = arguments | extra
        found = results(lambda **given: compiled(given), given, upstream)
        assert equal_bits(found, results(fk.linear_cross_entropy, given, upstream))


@needs_kernels
@every_mode
@pytest.mark.parametrize("case", [{"reduction": "none"}, {"reduction": "none", **EVERY_TERM}], ids=case_name)
@pytest.mark.usefixtures("tiny_plans")
def test_operators_of_a_loss_for_each_token_pass_opcheck(mode: str, case: Any, kernel_device: str) -> None:
    """The registry's own case is a mean."""
    arguments, _ = arguments_of(kernel_device, torch.float16, **case)
    needs = [True, True, "bias" in case]
    leaves = [arguments[name].detach() for name in ("input", "linear_weight")]
    bias, weight = (arguments.get(name) for name in ("linear_bias", "weight"))
    terms = (case.get(name, 0.0) for name in ("label_smoothing", "z_loss"))
    options = (-100, *terms, case.get("softcap"), leaves[1].shape[0])
    tensors = (*leaves, None if bias is None else bias.detach(), arguments["target"], weight)
    outputs = module.linear_cross_entropy_forward.op(*tensors, None, "none", *options, [False] * 3, True)
    checked = torch.library.opcheck(
        module.linear_cross_entropy_backward.op,
        (torch.rand(11, device=kernel_device), outputs[-1], *tensors, *options, needs),
    )
    assert set(checked.values()) == {"SUCCESS"}


def test_a_sharded_head_is_one_clear_error_and_the_module_the_way() -> None:
    """A DTensor head with a plain input; the module that holds it works under FSDP2, gradients included."""
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        x, target = torch.randn(5, 4, requires_grad=True), torch.tensor([0, 1, 2, -100, 5])
        head = distribute_tensor(torch.randn(6, 4), mesh)
        with pytest.raises(ValueError, match=r"nn\.LinearCrossEntropyLoss"):
            fk.linear_cross_entropy(x, head, target)
        loss_module = fk.nn.LinearCrossEntropyLoss(4, 6, bias=True)
        whole = loss_module.linear.weight.detach().clone().requires_grad_()
        expected = KERNEL.reference(x, whole, target, linear_bias=loss_module.linear.bias.detach().clone())
        fully_shard(loss_module, mesh=mesh)
        loss = loss_module(x, target)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        grad = loss_module.linear.weight.grad
        assert isinstance(grad, DTensor)
        torch.testing.assert_close(grad.to_local(), torch.autograd.grad(expected, whole)[0])
    finally:
        torch.distributed.destroy_process_group()
