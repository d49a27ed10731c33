"""The package as a package: what it imports, that a copy works beside it, and life without Triton."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlm_kernels as fk

PACKAGE = Path(fk.__file__).parent
KERNELS = PACKAGE.parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
_NAMES = """
layer_norm rms_norm add_layer_norm add_rms_norm cross_entropy linear_cross_entropy scaled_dot_product_attention
varlen_attn rotary_embedding gelu silu softmax log_softmax sigmoid tanh relu_squared swiglu geglu
optim nn patch unpatch hf backend explain
"""
PUBLIC = _NAMES.split()

# Every public function once, forward and backward; run in fresh interpreters.
SMOKE = """
import torch
def smoke(fk):
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    head, t = torch.randn(6, 8, requires_grad=True), torch.tensor([0, 1, 5, -100])
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    cos, starts = torch.randn(4, 4), torch.tensor([0, 3, 4], dtype=torch.int32)
    outs = [fk.layer_norm(x, (8,), w, w), fk.rms_norm(x, (8,), w, 1e-6), *fk.add_layer_norm(x, x, (8,), w, w),
            *fk.add_rms_norm(x, x, (8,), w), fk.cross_entropy(x, t), fk.linear_cross_entropy(x, head, t, softcap=9.0),
            fk.scaled_dot_product_attention(q, q, q, is_causal=True, softcap=5.0), *fk.rotary_embedding(q, q, cos, cos),
            fk.varlen_attn(*(q[0].transpose(0, 1),) * 3, starts, starts, 3, 3, window_size=(-1, 0)),
            fk.gelu(x), fk.silu(x), fk.softmax(x, -1), fk.log_softmax(x, -1), fk.sigmoid(x), fk.tanh(x),
            fk.relu_squared(x), fk.swiglu(x, x), fk.geglu(x, x)]
    sum(o.double().sum() for o in outs).backward()
    assert all(p.grad.isfinite().all() for p in (x, w, head, q))
    model = fk.patch(torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.GELU()))
    optimizer = fk.optim.MuonWithAdamW(model.parameters(), max_grad_norm=1.0)
    model(x.detach()).square().sum().backward()
    optimizer.step()
    fk.unpatch(model)
    with fk.backend("torch"):
        fk.rms_norm(x, (8,), w)
"""
BLOCK_TRITON = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


def _run(script: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there() -> None:
    assert set(PUBLIC) <= set(fk.__all__)
    assert all(hasattr(fk, name) for name in fk.__all__)
    optimizers = {"AdamW", "Adam", "SGD", "Adagrad", "Adadelta", "RMSprop", "Muon", "MuonWithAdamW"}
    assert optimizers <= set(fk.optim.__all__)
    modules = ("LayerNorm", "RMSNorm", "GELU", "CrossEntropyLoss", "LinearCrossEntropyLoss")
    assert all(issubclass(getattr(fk.nn, name), torch.nn.Module) for name in modules)
    assert all(callable(getattr(fk.hf, name)) for name in ("patch", "unpatch", "report"))


def test_public_functions_are_documented() -> None:
    for name in fk.__all__:
        assert getattr(fk, name).__doc__, name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_only_torch_triton_and_the_standard_library(path: Path) -> None:
    """And transformers within a function: for those who pass one of its models."""
    allowed = {"torch", "triton"} | set(sys.stdlib_module_names)
    depth = len(path.relative_to(PACKAGE).parts)
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lazy = {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        permitted = allowed | {"transformers"} if id(node) in lazy else allowed
        if isinstance(node, ast.Import):
            roots = {alias.name.partition(".")[0] for alias in node.names}
            assert roots <= permitted, f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").partition(".")[0] in permitted, f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= depth, f"line {node.lineno}: leaves the package"


def test_the_directory_itself_is_no_package() -> None:
    """`import kernels` must go on finding Hugging Face's package, from the repository's root too."""
    assert not (KERNELS / "__init__.py").exists()
    script = """
import importlib.util, sys
spec = importlib.util.find_spec("kernels")
assert spec is None or spec.origin is not None or spec.loader is None, spec
assert spec is None or "fastlm" not in str(spec.origin)
"""
    _run(script, KERNELS.parent)


def test_importing_has_no_side_effects() -> None:
    script = """
import sys, torch
before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.random.get_rng_state().sum().item())
handlers = dict(torch.nn.functional.__dict__)
import fastlm_kernels
assert before == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.random.get_rng_state().sum().item())
assert handlers == dict(torch.nn.functional.__dict__)
assert 'transformers' not in sys.modules and 'torch._dynamo' not in sys.modules
"""
    _run(script, KERNELS)


def test_works_where_triton_does_not_exist() -> None:
    check = """
import sys
import fastlm_kernels as fk
assert "triton" not in sys.modules
assert fk.explain(fk.rms_norm, torch.randn(2, 8), (8,)).path == "torch"
smoke(fk)
"""
    _run(BLOCK_TRITON + SMOKE + check, KERNELS)


def test_a_copy_under_another_name_works_beside_the_original(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "their_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    check = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
sys.path.insert(0, {str(KERNELS)!r})
import their_kernels, fastlm_kernels
assert their_kernels.__file__.startswith({str(tmp_path)!r})
assert their_kernels.rms_norm is not fastlm_kernels.rms_norm
smoke(their_kernels)
smoke(fastlm_kernels)
namespaces = {{name.partition("::")[0] for name in torch._C._dispatch_get_all_op_names()}}
assert {{"their_kernels", "fastlm_kernels"}} <= namespaces
x = torch.randn(3, 8)
assert torch.equal(their_kernels.rms_norm(x, (8,)), fastlm_kernels.rms_norm(x, (8,)))
assert not any(m.__name__.startswith("fastlm_kernels") for m in vars(their_kernels).values() if hasattr(m, "__name__")
               and type(m) is type(sys))
"""
    _run(SMOKE + check, tmp_path)


def test_explain_names_the_path_of_every_function() -> None:
    x = torch.randn(2, 8)
    for name in PUBLIC:
        function = getattr(fk, name)
        if getattr(function, "_without_kernel", None):
            explanation = fk.explain(function, x)
            assert explanation.path == "torch"
            assert name in explanation.reason or "attention" in explanation.reason
