"""Which path a call takes, on a machine with and without Triton, and packages that do not meet."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm_kernels as fk
from fastlm_kernels import _runtime

PACKAGE = Path(fk.__file__).parent
X = torch.ones(3, 8)


def run(code: str, **options: object) -> str:
    """The output of Python code in a fresh process, warnings being errors."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_explain_computes_nothing_and_tells_the_path() -> None:
    """A path and a reason for every public function; the call itself is not made."""
    answer = fk.explain(fk.rms_norm, X, (8,))
    assert answer.path == ("triton" if _runtime.INTERPRETED else "torch")
    assert "interpreter" in answer.reason or "TRITON_INTERPRET" in answer.reason or not _runtime.HAS_TRITON
    assert fk.explain(fk.rms_norm, X.double(), (8,)).path == "torch"
    assert fk.explain(fk.gelu, X).path == answer.path
    with pytest.raises(ValueError, match="weight_offset"):
        fk.explain(fk.rms_norm, X, (8,), weight_offset=float("inf"))


@pytest.mark.parametrize("fn", [torch.nn.functional.gelu, fk.patch, fk.hf.patch, fk.backend, fk.nn.LayerNorm])
def test_explain_refuses_what_does_not_ask(fn: Callable[..., Any]) -> None:
    """Asking it would run it: functions of others, and those of ours that act instead of computing."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(8))
    with pytest.raises(ValueError, match="explain: got"):
        fk.explain(fn, model)
    assert type(model[0]) is torch.nn.LayerNorm


def test_every_public_function_on_tensors_can_be_explained() -> None:
    """Each is marked: it asks before it computes, or is PyTorch's op."""
    others = {"backend", "explain", "patch", "unpatch", "Explanation", "hf", "layers", "nn", "optim"}
    unmarked = {n for n in fk.__all__ if not {"_asks", "_without_kernel"} & set(vars(getattr(fk, n)))}
    assert unmarked == others


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: (fk.rms_norm, X, (8,), torch.ones(8, device="meta")), "tensors lie on cpu and meta"),
        (lambda: (fk.rms_norm, X.double(), (8,)), "no kernel for torch.float64"),
        (lambda: (fk.rms_norm, X, 8), "not a list of sizes"),
        (lambda: (fk.add_rms_norm, X, X[0], (8,)), "broadcast"),
        (lambda: (fk.layer_norm, X, (8,), None, None, None), "eps is None"),
        (lambda: (fk.rms_norm, X.to_sparse(), (8,)), "layout"),
        (lambda: (fk.rms_norm, torch.ones(3, 0), (0,)), "zero elements"),
    ],
)
def test_reasons(call, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a call takes PyTorch's op, as it would be on a machine that runs kernels."""
    monkeypatch.setattr(_runtime, "INTERPRETED", True)
    monkeypatch.setattr(_runtime, "HAS_TRITON", True)
    fn, *arguments = call()
    answer = fk.explain(fn, *arguments)
    assert answer.path == "torch"
    assert reason in answer.reason


def test_backend_nests_and_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a block, as a decorator, after an error, and the same object twice."""
    monkeypatch.setattr(_runtime, "INTERPRETED", True)
    monkeypatch.setattr(_runtime, "HAS_TRITON", True)

    def path() -> str:
        return fk.explain(fk.rms_norm, X, (8,)).path

    torch_only = fk.backend("torch")
    with torch_only:
        assert path() == "torch"
        with fk.backend("triton"):
            assert path() == "triton"
            with torch_only:
                assert path() == "torch"
            assert path() == "triton"
        assert path() == "torch"
    assert path() == "triton"
    assert fk.backend("torch")(path)() == "torch"
    with pytest.raises(KeyError), fk.backend("torch"):
        raise KeyError
    assert path() == "triton"


def test_backend_refuses_other_names() -> None:
    """The value and the remedy."""
    with pytest.raises(ValueError, match="backend: got 'cuda'; use 'triton' or 'torch'"):
        fk.backend("cuda")


def test_preference_yields_to_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prefer_torch` is a preference, an obstacle is not."""
    monkeypatch.setattr(_runtime, "INTERPRETED", True)
    monkeypatch.setattr(_runtime, "HAS_TRITON", True)
    assert not _runtime.choose(X, prefer_torch="small")
    with fk.backend("triton"):
        assert _runtime.choose(X, prefer_torch="small")
        assert not _runtime.choose(X, obstacle="no kernel")


def test_launches_make_the_tensors_device_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor on the second GPU while the first is current."""
    entered: list[torch.device] = []

    class Device:
        def __init__(self, device: torch.device):
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *exc_info: object) -> None:
            entered.append(torch.device("cuda:0"))

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for index in (0, 1):
        with torch._subclasses.FakeTensorMode():
            tensor = torch.empty(2, device=f"cuda:{index}")
        with _runtime.on_device(tensor):
            assert entered == ([torch.device("cuda:1")] if index else [])
    assert entered == [torch.device("cuda:1"), torch.device("cuda:0")]


@pytest.mark.needs_compiler
@pytest.mark.parametrize("compiled", [False, True])
def test_gpus_too_old_take_pytorchs_op(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capability below 8.0, in eager and in compiled code; asked once a device, and never of one that is known."""
    asked: list[int] = []

    def capability(index: int) -> tuple[int, int]:
        asked.append(index)
        return (7, 5)

    def plain(x: Tensor, device: torch.device) -> Tensor:
        return x if _runtime._device_obstacle(device) is None else -x

    monkeypatch.setattr(_runtime, "_capabilities", {1: (9, 0)})
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    # To Dynamo, which asks too, and would then want to use the device, the truth.
    available = torch.cuda.is_available
    for_us = "_age_obstacle"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sys._getframe(1).f_code.co_name == for_us or available())
    old, new = torch.device("cuda", 0), torch.device("cuda", 1)
    if compiled:
        torch._dynamo.reset()
        plain = torch.compile(plain, fullgraph=True, backend="eager")
    for _ in range(2):
        assert torch.equal(plain(X, old), -X)
        assert torch.equal(plain(X, new), X)
    assert asked == [0]


def test_importing_needs_and_loads_little() -> None:
    """No compiler stack, no transformers: importing has no side effect worth noticing."""
    out = run("""
        import sys
        import torch
        before = set(sys.modules)
        import fastlm_kernels
        heavy = ("torch._dynamo", "torch._inductor", "transformers", "matplotlib", "sympy")
        print([name for name in set(sys.modules) - before if name.startswith(heavy)])
    """)
    assert out.strip() == "[]"


def test_works_without_triton() -> None:
    """Where Triton cannot be imported everything takes PyTorch's path, and `explain` says why."""
    out = run("""
        import sys
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton":
                    raise ImportError(name)
        sys.meta_path.insert(0, Blocker())
        import torch, fastlm_kernels as fk
        x = torch.randn(3, 8, requires_grad=True)
        with fk.backend("triton"):
            y = fk.rms_norm(x, (8,))
        y.sum().backward()
        assert torch.equal(y, torch.nn.functional.rms_norm(x, (8,)))
        from fastlm_kernels import check
        print(fk.explain(fk.rms_norm, x, (8,)).reason)
    """)
    assert out.strip() == "Triton is not installed"


def test_a_copied_package_has_operators_of_its_own(tmp_path: Path) -> None:
    """Copied under two names, one inside another package: three sets of operators in one process."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "my_kernels", ignore=ignore)
    shutil.copytree(PACKAGE, tmp_path / "project" / "kernels_copy", ignore=ignore)
    out = run(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import torch, fastlm_kernels, my_kernels, project.kernels_copy
        from fastlm_kernels import norm as a
        from my_kernels import norm as b
        from project.kernels_copy import norm as c
        print(*(m.norm_forward.op._qualname for m in (a, b, c)))
        x = torch.randn(3, 8)
        assert torch.equal(my_kernels.rms_norm(x, (8,)), project.kernels_copy.rms_norm(x, (8,)))
        with my_kernels.backend("torch"):
            print(a._runtime._forced, b._runtime._forced)
        """
    )
    names, forced = out.splitlines()
    assert names.split() == [
        f"{package}::norm_forward" for package in ("fastlm_kernels", "my_kernels", "project__kernels_copy")
    ]
    assert forced == "None torch"


def test_the_package_imports_only_itself_torch_and_triton() -> None:
    """No absolute import of its own name, nothing but torch, triton and the standard library at module level."""
    allowed = {"torch", "triton", "numpy", *sys.stdlib_module_names}
    import ast

    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] in allowed, path
